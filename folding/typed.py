"""Typed dataclasses from plain values: JSON, config files and flags.

Annotations are plain types, `Literal`, unions, tuples, dataclasses, and
`Annotated` with a `Range` of numbers or `OneOf` some names. Every error is one
line.
"""

import ast
import contextlib
import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from folding.errors import ConfigError

RENAMED = {"overall": "saving"}  # earlier names of fields


@dataclasses.dataclass(frozen=True)
class Range:
  """The interval that annotates a number.

  Attributes:
    low: Lower end.
    high: Upper end.
    ends: Which ends belong to it, in mathematical notation.

  Example:
    >>> describe(Annotated[float, Range(0, 1)] | None)
    'float in [0, 1) or None'
  """

  low: int | float
  high: int | float = math.inf
  ends: Literal["[)", "[]", "()"] = "[)"

  def __contains__(self, x: int | float) -> bool:
    is_above = x > self.low or (x == self.low and self.ends[0] == "[")
    return is_above and (
      x < self.high or self.ends[1] == "]" and x == self.high
    )

  def __str__(self) -> str:
    high = f"{self.high:g}"
    if self.high in (2**24, 2**31, 2**32):
      high = f"2^{math.log2(self.high):.0f}"
    return f"{self.ends[0]}{self.low:g}, {high}{self.ends[1]}"


@dataclasses.dataclass(frozen=True)
class OneOf:
  """The names that annotate a string, such as the keys of a table.

  Attributes:
    names: Returns them.
  """

  names: Callable[[], Iterable[str]]

  def __contains__(self, x: str) -> bool:
    return x in self.names()

  def __str__(self) -> str:
    return f"one of {', '.join(map(repr, self.names()))}"


def build(kind: type, values: Any, where: str) -> Any:
  """Builds a dataclass, and the dataclasses inside it, from nested dicts.

  Args:
    kind: The dataclass.
    values: Values of fields; a field that is left out keeps its default.
    where: What errors call the dataclass.

  Raises:
    ConfigError: a name is unknown, or a value is of the wrong type or range.
  """
  if not isinstance(values, dict):
    raise ConfigError(f"{where} must have fields; it is {values!r}")
  hints = typing.get_type_hints(kind, include_extras=True)
  for name in values:
    if name not in hints:
      raise ConfigError(unknown_field(where, str(name), hints))
  built = {}
  for name, value in values.items():
    hint, place = hints[name], f"{where}.{name}"
    if dataclasses.is_dataclass(hint):
      built[name] = build(typing.cast(type, hint), value, place)
    else:
      try:
        built[name] = _fit(hint, value)
      except ValueError:
        raise _misfit(hint, repr(value), place) from None
  return kind(**built)


def parse(hint: Any, text: str, where: str) -> Any:
  """Returns the value of a flag from its text.

  Numbers, booleans, None and tuples such as "4,2,1" read as in Python.

  Args:
    hint: Annotation of the field.
    text: Text of the flag.
    where: What errors call the field.

  Raises:
    ConfigError: the text does not fit the annotation.
  """
  value: Any = tuple(text.split(","))
  unreadable = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)
  with contextlib.suppress(*unreadable):
    value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
  candidates = [text, value, (value,)]
  # "None" and "a,b" are names only if the field takes neither None nor two names.
  if value is None or (isinstance(value, tuple) and len(value) > 1):
    candidates = [value, text, (value,)]
  for candidate in candidates:
    with contextlib.suppress(ValueError):
      return _fit(hint, candidate)
  raise _misfit(hint, text, where)


def edited(config: Any, edits: Mapping[str, Any]) -> Any:
  """Returns a copy of a dataclass with {"section.field": value} put in.

  Raises:
    ConfigError: there is no such field, or the value does not fit it.
  """
  known = fields(type(config))
  values = dataclasses.asdict(config)
  for name, value in edits.items():
    if name not in known:
      raise ConfigError(unknown_field("config", name, known))
    *sections, last = name.split(".")
    holder = values
    for section in sections:
      holder = holder[section]
    holder[last] = value
  return build(type(config), values, "config")


def differences(a: Any, b: Any) -> list[str]:
  """Returns "name: value in a -> value in b" for each field that differs.

  Numbers are shown with six digits, unless these are equal.
  """
  found = []
  for name in fields(type(a)):
    value_of = operator.attrgetter(name)
    exact = value_of(a), value_of(b)
    if exact[0] != exact[1]:
      rounded = _rounded(exact)
      x, y = exact if rounded[0] == rounded[1] else rounded
      found.append(f"{name}: {x!r} -> {y!r}")
  return found


def _rounded(value: Any) -> Any:
  """Returns a value, or a tuple of values, rounded to six digits."""
  if isinstance(value, tuple):
    return tuple(map(_rounded, value))
  return float(f"{value:.6g}") if isinstance(value, float) else value


def fields(kind: type, prefix: str = "") -> dict[str, Any]:
  """Returns {dotted name: annotation} of every field that can be set."""
  found: dict[str, Any] = {}
  for name, hint in typing.get_type_hints(kind, include_extras=True).items():
    if dataclasses.is_dataclass(hint):
      found |= fields(typing.cast(type, hint), f"{prefix}{name}.")
    else:
      found[prefix + name] = hint
  return found


def comments(lines: Iterable[str]) -> dict[str, str]:
  """Returns {field: comment} of the source of a dataclass.

  A comment may be above the field, beside it, or both.
  """
  found: dict[str, str] = {}
  above: list[str] = []
  for line in map(str.strip, lines):
    name, colon, rest = line.partition(":")
    if line.startswith("#"):
      above.append(line.lstrip("# "))
    elif colon and name.isidentifier():
      beside = rest.partition("  # ")[2]
      found.setdefault(name, " ".join([*above, beside]).strip())
      above = []
  return found


def unknown_field(where: str, name: str, names: Iterable[str]) -> str:
  """Returns the message about an unknown field, with the likely ones.

  Example:
    >>> unknown_field("config", "steps", ["model.width", "train.steps"])
    "config has no field 'steps'; did you mean train.steps?"
    >>> unknown_field("config", "colour", ["model.width", "train.steps"])
    "config has no field 'colour'; its fields are model.width, train.steps"
  """
  names = list(names)
  found = f"{where} has no field {name!r}"
  *section, last = name.split(".")
  now = ".".join([*section, RENAMED.get(last, last)])
  near = [now] if now in names else difflib.get_close_matches(name, names, n=1)
  if not near:
    lasts = [n.split(".")[-1] for n in names]
    likely = difflib.get_close_matches(last, lasts)
    near = [n for n, last in zip(names, lasts, strict=True) if last in likely]
  if near:
    return f"{found}; did you mean {' or '.join(near)}?"
  if len(names) > 20:
    return f"{found}; `folding train --help` lists the fields"
  return f"{found}; its fields are {', '.join(names)}"


def describe(hint: Any) -> str:
  """Returns an annotation in words.

  Example:
    >>> describe(int | tuple[int, ...])
    'int or a tuple of int'
  """
  origin, options = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    of_names = isinstance(options[1], OneOf)
    return f"{'' if of_names else f'{describe(options[0])} in '}{options[1]}"
  if origin in (types.UnionType, typing.Union):
    return " or ".join(map(describe, options))
  if origin is Literal:
    return f"one of {', '.join(map(repr, options))}"
  if origin is tuple and options[-1] is Ellipsis:
    return f"a tuple of {describe(options[0])}"
  if origin is tuple:
    return f"({', '.join(map(describe, options))})"
  return "None" if hint is type(None) else hint.__name__


def _misfit(hint: Any, shown: Any, where: str) -> ConfigError:
  return ConfigError(
    f"{where} must be {describe(hint)}; it is {shown[:200] or 'empty'}"
  )


def _fit(hint: Any, value: Any) -> Any:
  """Returns the value in the type of the annotation; lists become tuples.

  Raises:
    ValueError: it does not fit.
  """
  origin, options = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    fitting = _fit(options[0], value)
    if fitting in options[1]:
      return fitting
  elif origin in (types.UnionType, typing.Union):
    if value == "":  # neither a name nor None
      options = ()
    for option in options:
      with contextlib.suppress(ValueError):
        return _fit(option, value)
  elif origin is Literal:
    # 2.0 and False equal 2 and 0, and are not these.
    if (type(value), value) in [(type(x), x) for x in options]:
      return value
  elif origin is tuple and isinstance(value, list | tuple):
    kinds = options
    if options[-1] is Ellipsis:
      kinds = options[:1] * len(value)
    return tuple(_fit(k, v) for k, v in zip(kinds, value, strict=True))
  elif hint is float and type(value) in (int, float):
    if abs(value) < 2**1023:  # neither NaN nor infinity
      return float(value)
  elif type(value) is hint:
    return value
  raise ValueError(f"{value!r} does not fit {hint}")
