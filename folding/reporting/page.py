"""A Markdown page as one HTML file, with its pictures inside."""

import base64
import html
import os
import pathlib
import re
import string
from collections.abc import Collection

import markdown_it

from folding import errors, files
from folding.errors import escaped as escaped


def write(folder: str, name: str, text: str, figures: Collection[str]) -> None:
  """Writes a page as NAME.md and as a self-contained NAME.html.

  Args:
    folder: Folder of the page and of its figures.
    name: Name of both files, without an ending.
    text: Markdown that begins with a heading. Text of a run is in it as `escaped`
      or `code`.
    figures: Names of PNG files in the folder. No other picture is read, and no
      link is made. Each is a paragraph, `![description](name "caption")`.
  """
  files.write_file(os.path.join(folder, f"{name}.md"), text)
  page = to_html(text, folder, figures)
  files.write_file(os.path.join(folder, f"{name}.html"), page)


def code(text: str) -> str:
  """Returns Markdown that shows a text as code, in one line."""
  text = errors.printable(text)
  if "`" not in text:
    return f"`{text}`"
  ticks = "`" * (1 + max(map(len, re.findall("`+", text))))
  return f"{ticks} {text} {ticks}"


def to_html(text: str, folder: str, figures: Collection[str]) -> str:
  """Returns the HTML of a Markdown page; see `write`."""

  def figure(found: re.Match[str]) -> str:
    name, about, caption = found.groups()
    path = pathlib.Path(folder, html.unescape(name))
    picture = base64.b64encode(path.read_bytes()).decode()
    return (
      f'<figure><img src="data:image/png;base64,{picture}" alt="{about}">'
      f"<figcaption>{caption}</figcaption></figure>"
    )

  parser = markdown_it.MarkdownIt("commonmark", {"html": False}).enable("table")
  parser.validateLink = lambda url: url in figures
  body = parser.render(text)
  # In the text, not in a tag.
  body = re.sub(r"\bW_([QKVO])\b(?![^<]*>)", r"W<sub>\1</sub>", body)
  picture = r'<p><img src="(.*?)" alt="(.*?)" title="(.*?)" /></p>'
  body = re.sub(picture, figure, body)
  body = body.replace("<table>", '<div class="table"><table>')
  body = body.replace("</table>", "</table></div>")
  title = html.escape(text.partition("\n")[0].lstrip("# "))
  template = pathlib.Path(__file__).with_name("page.html").read_text("utf-8")
  return string.Template(template).substitute(title=title, body=body)
