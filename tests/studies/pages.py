"""Markdown of a page, taken apart."""


def cells_of(table):
  """Returns {first cell: the others} of a Markdown table."""
  lines = [line.strip("|").split("|") for line in table.splitlines() if line]
  return {line[0].strip(): [x.strip() for x in line[1:]] for line in lines}
