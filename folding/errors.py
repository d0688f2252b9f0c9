"""The two errors that the command line reports in one line."""


class ConfigError(ValueError):
  """A mistake in a configuration or an input. Exit status 2."""


class TrainingError(RuntimeError):
  """Training cannot continue: a loss is not finite, or a save failed. Exit 1."""
