"""Lists files and public names in folding/README.md: `python docs/names.py`.

The names are those of docs/api.md, which needs a build of the site to be read.
"""

import ast
import inspect
import pathlib
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import folding

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "folding" / "README.md"
_HEAD = """\
# Files and public names

[Where things are](../CONTRIBUTING.md#where-things-are) has the questions that readers ask first, each with its file. Below are
the [files](#files), with the first line of each, and the names of the [reference](../docs/api.md) by section, with links to
their sources. The site has signatures and arguments: `pip install -e '.[docs]' && mkdocs serve`. Written by
`python docs/names.py`.
"""


def page() -> str:
  """Returns the page."""
  lines = [_HEAD]
  reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
  for section in reference.split("\n## ")[1:]:
    names = re.findall(r"^::: (\S+)$", section, re.M)
    if names:
      lines += [
        f"## {section.splitlines()[0]}\n",
        "| name | |",
        "| --- | --- |",
      ]
      lines += [row for name in names for row in _rows(name)]
      lines.append("")
  return "\n".join([*lines, *_files(), ""])


def _files() -> Iterator[str]:
  """Yields the section of files, a line for each."""
  yield "## Files\n\n| file | |\n| --- | --- |"
  for path in sorted(PAGE.parent.rglob("*.py")):
    about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if about and path.name != "__main__.py":
      link = path.relative_to(PAGE.parent)
      first = about.splitlines()[0].replace("|", "&#124;")
      yield f"| [`{link}`]({link}) | {first} |"


def _rows(name: str) -> Iterator[str]:
  """Yields a line of the table; of a module, one per class."""
  found = pkgutil.resolve_name(name)
  if inspect.ismodule(found):
    for child, value in vars(found).items():
      if inspect.isclass(value) and value.__module__ == name:
        yield _row(f"{name}.{child}", value)
  else:
    yield _row(name, found)


def _row(name: str, found: Any) -> str:
  """Returns a line of the table."""
  short = name.rpartition(".")[2]
  if getattr(folding, short, None) is found:
    name = f"folding.{short}"
  about = (inspect.getdoc(found) or "").partition("\n\n")[0].replace("\n", " ")
  link = found.__module__.removeprefix("folding.").replace(".", "/") + ".py"
  return f"| [`{name}`]({link}) | {about.replace('|', '&#124;')} |"


if __name__ == "__main__":
  PAGE.write_text(page(), encoding="utf-8")
