"""The errors that the command line reports, and errors in one line."""


class ConfigError(ValueError):
  """A mistake in a configuration or an input. Exit status 2."""


class TrainingError(RuntimeError):
  """Training cannot continue: a loss is not finite, or a save failed. Exit 1."""


def one_line(error: BaseException) -> str:
  """Returns the message of an error without line breaks."""
  return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
  """Returns the first line of the message of an error, or its type."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: BaseException) -> str:
  """Returns the type and the message of an error in one line."""
  return f"{type(error).__name__}: {one_line(error)}".rstrip(": ")
