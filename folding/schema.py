"""Dataclasses <-> plain dicts, with names and types checked on the way in."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal


class ConfigError(ValueError):
  """A mistake in a configuration or its input; shown to users as one line."""


class TrainingError(RuntimeError):
  """Training cannot go on: the loss is not finite, or nothing can be saved."""


def require(condition: bool, message: str) -> None:
  """Raises `ConfigError` with the message unless the condition holds."""
  if not condition:
    raise ConfigError(message)


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
  require(
    not unknown,
    f"{where} has no field {unknown[0] if unknown else ''!r}; its fields are "
    f"{', '.join(hints)}",
  )
  built = {}
  for name, value in values.items():
    place = f"{where}.{name}"
    if dataclasses.is_dataclass(hints[name]):
      built[name] = build(hints[name], value, place)
    else:
      built[name] = _typed(hints[name], value, place)
  return kind(**built)


def _typed(hint: Any, value: Any, place: str) -> Any:
  """Returns the value if it fits the annotation (an int fits a float)."""
  origin = typing.get_origin(hint)
  if origin is Literal:
    options = typing.get_args(hint)
    require(
      value in options,
      f"{place} must be one of {', '.join(map(repr, options))}; it is "
      f"{value!r}",
    )
    return value
  options = typing.get_args(hint) if origin is types.UnionType else (hint,)
  if value is None and type(None) in options:
    return None
  if float in options and type(value) is int:
    value = float(value)
  names = " or ".join(
    "None" if o is type(None) else o.__name__ for o in options
  )
  require(
    type(value) in options and not (type(value) is float and math.isnan(value)),
    f"{place} must be {names}; it is {value!r}",
  )
  return value
