"""Checks of arguments: a table for each function, and one error."""

from collections.abc import Iterable

import numpy as np


def is_whole(value: object, least: int = -(2**31), below: int = 2**31) -> bool:
  """Returns whether a value is a whole number in [least, below), and no bool."""
  is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
  return is_int and least <= value < below


def is_between(value: object, low: float, high: float) -> bool:
  """Returns whether a value is a number in [low, high)."""
  is_number = isinstance(value, int | float | np.number)
  return is_number and not isinstance(value, bool) and low <= value < high


def check(where: str, table: Iterable[tuple[str, object, bool, str]]) -> None:
  """Raises ValueError at the first row that does not hold.

  Args:
    where: Starts the message, such as "fpp".
    table: Rows of (name, value, whether it holds, what it must be).
  """
  for name, value, holds, what in table:
    if not holds:
      raise ValueError(f"{where}: {name} must be {what}; it is {value!r}")
