import numpy as np
import pytest

from folding.compression import checks


@pytest.mark.parametrize(
  ("value", "is_whole", "is_between"),
  [
    (3, True, True),
    (np.int64(3), True, True),
    (3.0, False, True),
    (np.float32(3), False, True),
    (0, True, True),
    (9, False, False),
    (-1, False, False),
    (True, False, False),
    (np.bool_(True), False, False),
    ("3", False, False),
    (None, False, False),
    (float("nan"), False, False),
  ],
)
def test_checks_take_numbers_of_python_and_numpy(value, is_whole, is_between):
  assert checks.is_whole(value, 0, 9) is is_whole
  assert checks.is_between(value, 0, 9) is is_between
