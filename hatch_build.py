"""The README of a wheel: its links lead to the repository, or are left out."""

import pathlib
import re

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ReadmeHook(MetadataHookInterface):
  """Sets the README, whose links are relative to the repository."""

  def update(self, metadata: dict) -> None:
    """Adds `readme` to the metadata of the project."""
    text = pathlib.Path(self.root, "README.md").read_text(encoding="utf-8")
    text = with_address(text, metadata["urls"].get("Repository"))
    metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_address(text: str, address: str | None) -> str:
  """Returns Markdown whose relative links and pictures begin with an address.

  Args:
    text: Markdown.
    address: Address of the repository. None keeps the words of links, and drops
      pictures.
  """

  def link(found: re.Match[str]) -> str:
    mark, words, path = found.groups()
    if address is None:
      return "" if mark else words
    return f"{mark}[{words}]({address}/{'raw' if mark else 'blob'}/main/{path})"

  return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]*)\)", link, text)
