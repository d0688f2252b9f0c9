"""Checks of arguments: a table for each function, and one error."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def is_whole(
  value: Any, least: int = -(2**31), below: int | float = 2**31
) -> bool:
  """Returns whether a value is a whole number in [least, below), and no bool."""
  is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
  return is_int and bool(least <= value < below)


def is_between(value: Any, low: int | float, high: int | float) -> bool:
  """Returns whether a value is a number in [low, high), and no bool."""
  is_number = isinstance(value, int | float | np.integer | np.floating)
  is_number &= not isinstance(value, bool)
  return is_number and bool(low <= value < high)


def check(where: str, table: Iterable[tuple[str, object, bool, str]]) -> None:
  """Raises ValueError at the first row that does not hold.

  Args:
    where: Starts the message, such as "fpp".
    table: Rows of (name, value, whether it holds, what it must be).
  """
  for name, value, holds, what in table:
    if not holds:
      raise ValueError(f"{where}: {name} must be {what}; it is {value!r}")
