r"""Hooks of MkDocs: formulas, subscripts, and the address of the repository.

Formulas become MathML when the site is built, so that no page loads a script
from elsewhere. W_Q in text has a subscript. The version is that of the package,
and links to the sources begin with `project.urls.Repository` of pyproject.toml;
without that entry there are none.
"""

import html
import pathlib
import re
import runpy
import tomllib
from typing import Any

from latex2mathml import converter

ROOT = pathlib.Path(__file__).parents[1]

_FORMULA = r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>'
_NO_TEXT = r"(<(code|pre|math|script)\b.*?</\2>|<[^>]*>)"


def on_config(config: Any) -> Any:
  """Sets the version, and links to the sources if their address is known."""
  names = runpy.run_path(str(ROOT / "folding" / "version.py"))
  config.copyright = f"folding {names['__version__']}"
  with open(ROOT / "pyproject.toml", "rb") as file:
    address = tomllib.load(file)["project"]["urls"].get("Repository")
  if address:
    config.repo_url, config.repo_name = address, "Sources"
    config.edit_uri = "edit/main/docs/"
  return config


def on_page_content(content: str, page: Any, **_: Any) -> str:
  """Returns the HTML of a page with formulas and subscripts."""
  for item in page.toc:
    _lower(item)
  return subscripts(re.sub(_FORMULA, _mathml, content, flags=re.S))


def _lower(item: Any) -> None:
  item.title = subscripts(item.title)
  for child in item.children:
    _lower(child)


def _mathml(found: re.Match[str]) -> str:
  display = "block" if found[1] == "div" else "inline"
  return converter.convert(html.unescape(found[2]).strip(), display=display)


def subscripts(content: str) -> str:
  r"""Returns HTML with the indices of W_Q, W_down, ... lowered, outside tags and code.

  Example:
    >>> subscripts('W_Q <code>W_K</code> <img alt="W_V">')
    'W<sub>Q</sub> <code>W_K</code> <img alt="W_V">'
  """
  parts = re.split(_NO_TEXT, content, flags=re.S)
  # Text, a tag or an element, its name, text, ...
  parts[::3] = [
    re.sub(r"\bW_(\w+)\b", r"W<sub>\1</sub>", x) for x in parts[::3]
  ]
  del parts[2::3]
  return "".join(parts)
