"""Adapts docstrings to what the site expects."""

import re
from collections.abc import Iterator
from typing import Any

import griffe

from folding import typed


class Docstrings(griffe.Extension):
  """Rewrites docstrings before the site parses them.

  "Example:" becomes the section "Examples:", a list gets an empty line before
  it, and a dataclass of the config gets a list of its fields.
  """

  def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    """Rewrites the docstring of an object."""
    del kwargs
    if obj.docstring is not None:
      text = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
      # Markdown needs an empty line before the first item of a list.
      text = re.sub(r"(?m)^((?!\s*- ).*\S.*)\n(?=- )", r"\1\n\n", text)
      if obj.path.startswith("folding.config.") and obj.is_class:
        text += "\n\nAttributes:\n" + "\n".join(_fields(obj))
      obj.docstring.value = text


def _fields(config: griffe.Object) -> Iterator[str]:
  """Yields the fields of a dataclass with the comments beside them."""
  comments = typed.comments(config.lines)
  for name, attribute in config.attributes.items():
    value = str(attribute.value)
    default = f"Default: `{value}`."
    if "default_factory" in value:
      default = "A section."
    about = comments.get(name, "").rstrip(".")
    yield f"  {name}: {about}{'. ' if about else ''}{default}"
