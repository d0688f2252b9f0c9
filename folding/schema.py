"""Dataclasses <-> plain dicts, with names and types checked on the way in."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from folding.errors import ConfigError as ConfigError
from folding.errors import TrainingError as TrainingError

if TYPE_CHECKING:
  PerLayer = int | tuple[int, ...]
else:

  class _IsPerLayer(type):
    def __instancecheck__(cls, value):
      numbers = value if isinstance(value, tuple) else (value,)
      return all(type(n) is int for n in numbers)

  class PerLayer(metaclass=_IsPerLayer):
    """One number for all layers, or a tuple of one for each.

    A class and no union, since flags find their parser by the class.
    """


def require(condition: bool, message: str) -> None:
  """Raises `ConfigError` with the message unless the condition holds."""
  if not condition:
    raise ConfigError(message)


def one_line(error: Exception) -> str:
  """Returns what an error says, without line breaks."""
  return " ".join(str(error).split())


def first_line(error: Exception) -> str:
  """Returns the first line of what an error says, or its kind."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: Exception) -> str:
  """Returns an error in one line, without the note that JAX appends."""
  return f"{type(error).__name__}: {one_line(error)}".rstrip(": ")


def require_seed(seed: int) -> None:
  """Raises `ConfigError` unless a number is a seed that no other is equal to.

  Of more bits JAX takes the last 32.
  """
  require(
    0 <= seed < 2**32, f"a seed is a number of 0 to 2^32 - 1; it is {seed}"
  )


def edited(config: Any, edits: Mapping[str, Any]) -> Any:
  """Returns a copy of a dataclass with {"section.field": value} put in.

  Raises:
    ConfigError: there is no such field, or the value is of the wrong type.
  """
  values = dataclasses.asdict(config)
  for name, value in edits.items():
    *sections, last = name.split(".")
    holder: Any = values
    for section in sections:
      holder = holder.get(section)
      require(
        isinstance(holder, dict),
        f"config has no field {name!r}: there is no such section",
      )
    holder[last] = value
  return build(type(config), values, "config")


def differences(a: Any, b: Any) -> list[str]:
  """Returns "name: value in a -> value in b" for each field that differs."""
  return _differences(dataclasses.asdict(a), dataclasses.asdict(b), "")


def _differences(a: Any, b: Any, prefix: str) -> list[str]:
  if not isinstance(a, dict):
    return [] if a == b else [f"{prefix}: {a!r} -> {b!r}"]
  dot = "." if prefix else ""
  return [
    line
    for name in a
    for line in _differences(a[name], b[name], f"{prefix}{dot}{name}")
  ]


def fields(kind: type, prefix: str = "") -> dict[str, Any]:
  """Returns {dotted name: type} of every settable field."""
  found: dict[str, Any] = {}
  for name, hint in typing.get_type_hints(kind).items():
    if dataclasses.is_dataclass(hint):
      found |= fields(hint, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
    else:
      found[prefix + name] = hint
  return found


def no_field(where: str, name: str, names: Iterable[str]) -> str:
  """Returns what is said of a field that there is not, with the likely ones.

  Example:
    >>> no_field("config", "steps", ["model.width", "train.steps"])
    "config has no field 'steps'; did you mean train.steps?"
    >>> no_field("config", "colour", ["model.width", "train.steps"])
    "config has no field 'colour'; its fields are model.width, train.steps"
  """
  names = list(names)
  last = name.split(".")[-1]
  near = [n for n in names if n.split(".")[-1] == last]
  near = near or difflib.get_close_matches(name, names)
  found = f"{where} has no field {name!r}; "
  if near:
    return found + f"did you mean {' or '.join(near)}?"
  return found + f"its fields are {', '.join(names)}"


def build(kind: type, values: Any, where: str) -> Any:
  """Builds a dataclass, and those inside it, from nested dicts.

  Args:
    kind: The dataclass.
    values: Field values; a field left out keeps its default.
    where: What errors call the dataclass.

  Raises:
    ConfigError: a name is unknown or a value is of the wrong type.
  """
  require(
    isinstance(values, dict), f"{where} must have fields; it is {values!r}"
  )
  hints = typing.get_type_hints(kind)
  unknown = sorted(set(values) - set(hints))
  if unknown:
    raise ConfigError(no_field(where, unknown[0], hints))
  built = {}
  for name, value in values.items():
    place = f"{where}.{name}"
    if dataclasses.is_dataclass(hints[name]):
      built[name] = build(hints[name], value, place)
    else:
      built[name] = _typed(hints[name], value, place)
  return kind(**built)


def _typed(hint: Any, value: Any, place: str) -> Any:
  """Returns the value if it fits the annotation.

  An int fits a float, a list a tuple, as JSON has neither.
  """
  options = typing.get_args(hint) if is_union(hint) else (hint,)
  if value is None and type(None) in options:
    return None
  if PerLayer in options and isinstance(value, list):
    value = tuple(value)
  for option in options:
    if option is PerLayer and isinstance(value, PerLayer):  # pyright: ignore
      return value
    if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
      items = typing.get_args(option)
      if items[-1] is Ellipsis:
        items = items[:1] * len(value)
      require(
        len(items) == len(value),
        f"{place} must have {len(items)} items; it is {value!r}",
      )
      return tuple(
        _typed(item, one, f"{place}[{i}]")
        for i, (item, one) in enumerate(zip(items, value, strict=True))
      )
  literal = [o for o in options if typing.get_origin(o) is Literal]
  if literal:
    names = typing.get_args(literal[0])
    require(
      value in names,
      f"{place} must be one of {', '.join(map(repr, names))}; it is {value!r}",
    )
    return value
  if float in options and type(value) is int:
    value = float(value) if abs(value) < 2**1023 else math.inf
  names = " or ".join(map(_name, options))
  require(
    type(value) in options
    and (type(value) is not float or math.isfinite(value)),
    f"{place} must be {names}; it is {value!r}",
  )
  return value


def is_union(hint: Any) -> bool:
  """Returns whether an annotation is `a | b`."""
  return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _name(hint: Any) -> str:
  if hint is type(None):
    return "None"
  if hint is PerLayer:
    return "int or one int a layer"
  return "a tuple" if typing.get_origin(hint) is tuple else hint.__name__


def per_layer(argument: Any) -> Any:
  """Reads "4" or "4,2,1", as flags give it; what is no text stays as it is.

  Raises:
    ValueError: it is neither.
  """
  if not isinstance(argument, str):
    return argument
  numbers = [int(part) for part in argument.strip("()[] ,").split(",")]
  return numbers[0] if len(numbers) == 1 else tuple(numbers)
