"""How the site reads docstrings, where they are not quite what it expects."""

import re
from collections.abc import Iterator
from typing import Any

import griffe

from folding import typed


class Docstrings(griffe.Extension):
  """Reads "Example:" as the section "Examples:", and lists without a gap."""

  def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    """Rewrites the docstring of an object before it is parsed."""
    del kwargs
    if obj.docstring is not None:
      text = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
      # Markdown wants an empty line before the first item of a list.
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
