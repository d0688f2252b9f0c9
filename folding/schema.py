"""Old names, until their last users have moved to `errors` and `typed`."""

from folding.errors import ConfigError as ConfigError
from folding.errors import TrainingError as TrainingError
from folding.errors import first_line as first_line
from folding.errors import one_line as one_line
from folding.errors import reason as reason
from folding.typed import build as build
from folding.typed import differences as differences
from folding.typed import edited as edited
from folding.typed import fields as fields


def require(condition: bool, message: str) -> None:
  """Raises `ConfigError` with the message unless the condition holds."""
  if not condition:
    raise ConfigError(message)


def require_seed(seed: int) -> None:
  """Raises `ConfigError` for a seed of more than 32 bits, which JAX truncates."""
  require(0 <= seed < 2**32, f"a seed is in [0, 2^32); it is {seed}")
