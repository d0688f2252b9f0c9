"""How figures are written on a page: percent, counts, durations, tables."""

from collections.abc import Sequence

NOTHING = "–"


def count(value: int | float) -> str:
  """Returns a whole number with thousands separators.

  Example:
    >>> count(1234567)
    '1,234,567'
  """
  return f"{round(value):,}"


def counted(value: int, noun: str) -> str:
  """Returns a whole number of things.

  Example:
    >>> counted(1, "layer"), counted(1200, "step")
    ('1 layer', '1,200 steps')
  """
  return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def short_count(value: int | float) -> str:
  """Returns a number of three digits or so, for the axis of a plot.

  Example:
    >>> short_count(1234567), short_count(65536), short_count(800)
    ('1.23M', '65.5k', '800')
  """
  for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if abs(value) >= size:
      return f"{value / size:.3g}{unit}"
  return f"{value:.3g}"


def percent(fraction: int | float | None, digits: int = 1) -> str:
  """Returns a fraction as percent; never 100% of what is not quite all.

  Example:
    >>> percent(0.7213), percent(0.99996), percent(1.0), percent(None)
    ('72.1%', '>99.9%', '100.0%', '–')
  """
  if fraction is None:
    return NOTHING
  text = f"{100 * fraction:.{digits}f}%"
  if fraction < 1 and text == f"{100:.{digits}f}%":
    return f">{100 - 10**-digits:.{digits}f}%"
  return text.replace(f"-{0:.{digits}f}%", f"{0:.{digits}f}%")


def level(fraction: float) -> str:
  """Returns a fraction that was asked for, with all its digits.

  Example:
    >>> level(0.7), level(0.695)
    ('70%', '69.5%')
  """
  return f"{100 * fraction:.12g}%"


def code(text: str) -> str:
  """Returns a text in which Markdown reads no markup.

  Example:
    >>> code("<class 'int'> *is* `bad`")
    "`<class 'int'> *is* 'bad'`"
  """
  return f"`{text.replace('`', chr(39))}`" if text else ""


def signed_percent(fraction: int | float | None, digits: int = 1) -> str:
  """Returns a relative difference with its sign.

  Example:
    >>> signed_percent(0.0213), signed_percent(-0.5)
    ('+2.1%', '-50.0%')
  """
  if fraction is None:
    return NOTHING
  return f"{100 * fraction:+.{digits}f}%"


def duration(seconds: int | float) -> str:
  """Returns a time in the two units that matter.

  Example:
    >>> duration(12.34), duration(231.2), duration(7261.0)
    ('12.3 s', '3 min 51 s', '2 h 1 min')
  """
  if seconds < 59.95:
    return f"{seconds:.1f} s"
  if seconds < 3599.5:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
  hours, minutes = divmod(round(seconds / 60), 60)
  return f"{hours} h {minutes} min"


def listing(items: Sequence[str]) -> str:
  """Returns "a, b and c"."""
  if len(items) < 2:
    return "".join(items)
  return f"{', '.join(items[:-1])} and {items[-1]}"


def table(
  header: Sequence[str], rows: Sequence[Sequence[str]], num_text: int = 1
) -> str:
  """Returns a Markdown table, all but the first columns aligned right.

  Args:
    header: Names of the columns.
    rows: Cells, as many a row as the header has.
    num_text: How many columns are text and aligned left.
  """
  cells = [[c.replace("|", "\\|") for c in row] for row in (header, *rows)]
  widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
  lines = []
  for row in cells:
    padded = [
      cell.ljust(width) if i < num_text else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append(f"| {' | '.join(padded)} |")
  rule = [
    "-" * width if i < num_text else "-" * (width - 1) + ":"
    for i, width in enumerate(widths)
  ]
  lines.insert(1, f"| {' | '.join(rule)} |")
  return "\n".join(lines) + "\n"
