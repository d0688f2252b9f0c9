"""How the site reads docstrings, where they are not quite what it expects."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
  """Reads "Example:" as the section "Examples:", and lists without a gap."""

  def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    """Rewrites the docstring of an object before it is parsed."""
    del kwargs
    if obj.docstring is not None:
      text = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
      # Markdown wants an empty line before the first item of a list.
      text = re.sub(r"(?m)^((?!\s*- ).*\S.*)\n(?=- )", r"\1\n\n", text)
      obj.docstring.value = text
