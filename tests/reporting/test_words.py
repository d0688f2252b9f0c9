import pytest

from folding.reporting import words


@pytest.mark.parametrize(
  ("fraction", "text"),
  [
    (0.0, "0.0%"),
    (-0.0001, "0.0%"),
    (-0.034, "-3.4%"),
    (0.99949, "99.9%"),
    (0.99951, ">99.9%"),
    (1.0, "100.0%"),
  ],
)
def test_percent(fraction, text):
  assert words.percent(fraction) == text


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (59.94, "59.9 s"),
    (59.96, "1 min 0 s"),
    (3599.4, "59 min 59 s"),
    (3599.6, "1 h 0 min"),
    (90000.0, "25 h 0 min"),
  ],
)
def test_duration_never_shows_sixty(seconds, text):
  assert words.duration(seconds) == text


def test_table():
  assert words.table(("a", "long"), [("x|y", "1")]) == (
    "| a    | long |\n| ---- | ---: |\n| x\\|y |    1 |\n"
  )


def test_listing():
  assert words.listing([]) == ""
  assert words.listing(["a"]) == "a"
  assert words.listing(["a", "b", "c"]) == "a, b and c"
