"""The errors that the command line reports, and text that is safe to print."""

import importlib
import re

# Control characters, line ends, and those that turn the direction of text.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class ConfigError(ValueError):
  """A mistake in a configuration or an input. Exit status 2."""


class TrainingError(RuntimeError):
  """Training cannot continue: a loss is not finite, or a save failed. Exit 1."""


def require_package(name: str) -> None:
  """Raises `ConfigError` without the package of an export format and extra."""
  try:
    importlib.import_module(name)
  except ImportError:
    raise ConfigError(
      f"--format={name} needs the package {name}: "
      f"pip install 'folding-jax[{name}]'"
    ) from None


def printable(text: str) -> str:
  r"""Returns a text with its control characters escaped, as in JSON.

  A terminal obeys some of them: they change its colors, its title, or what was
  printed before.

  Example:
    >>> printable("a\x1b[31mred")
    'a\\u001b[31mred'
  """
  return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def escaped(text: str) -> str:
  r"""Returns Markdown that shows a text as it is, in one line.

  Example:
    >>> escaped("![x](/etc/passwd) <b>")
    '!\\[x\\](/etc/passwd) \\<b>'
  """
  return re.sub(r"([\\`*<&\[\]]|\b_|_\b)", r"\\\1", printable(text))


def one_line(error: BaseException) -> str:
  """Returns the message of an error without line breaks."""
  return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
  """Returns the first line of the message of an error, or its type."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: BaseException) -> str:
  """Returns the type and the message of an error in one line."""
  return f"{type(error).__name__}: {one_line(error)}".rstrip(": ")
