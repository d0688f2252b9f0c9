"""A Markdown page as one HTML file, with its pictures inside."""

import base64
import html
import os
import pathlib
import re
import string

import markdown_it

from folding import files


def write(folder: str, name: str, text: str) -> None:
  """Writes a page as NAME.md and as a self-contained NAME.html.

  Args:
    folder: Folder of the page and of its pictures, PNG files.
    name: Name of both files, without an ending.
    text: Markdown that begins with a heading.
  """
  files.write_file(os.path.join(folder, f"{name}.md"), text)
  files.write_file(os.path.join(folder, f"{name}.html"), to_html(text, folder))


def to_html(text: str, folder: str) -> str:
  """Returns the HTML of a Markdown page; see `write`."""

  def figure(found: re.Match[str]) -> str:
    path, caption = pathlib.Path(folder, html.unescape(found[1])), found[2]
    picture = base64.b64encode(path.read_bytes()).decode()
    return (
      f'<figure><img src="data:image/png;base64,{picture}" alt="{caption}">'
      f"<figcaption>{caption}</figcaption></figure>"
    )

  parser = markdown_it.MarkdownIt("commonmark", {"html": False}).enable("table")
  body = parser.render(text)
  body = re.sub(r'<p><img src="(.*?)" alt="(.*?)" /></p>', figure, body)
  body = body.replace("<table>", '<div class="table"><table>')
  body = body.replace("</table>", "</table></div>")
  title = html.escape(text.partition("\n")[0].lstrip("# "))
  template = pathlib.Path(__file__).with_name("page.html").read_text("utf-8")
  return string.Template(template).substitute(title=title, body=body)
