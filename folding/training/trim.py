"""Which tokens training uses, and a classifier that reads those alone."""

import functools

import jax
import numpy as np

from folding import config as config_lib
from folding.config import Config
from folding.data.batches import Data, make_data
from folding.data.tokenizers import MappedTokenizer, Tokenizer
from folding.data.trim import trimmed
from folding.models.transformer import make_model, param_shapes
from folding.training.optimizer import embedding_fraction, make_rules
from folding.training.planner import outer_fractions


def token_usage(data: Data, size: int) -> np.ndarray:
  """Returns float32[size], the share of each token in the text of training.

  All are positive. Tokens that it does not have are told apart by their ids, as
  vocabularies run from frequent to rare ones: the last are the least likely to
  be met.

  Args:
    data: Of a run.
    size: V, rows of the embedding.
  """
  count_V = 0.5 * (1 - np.arange(size) / size)  # all of it less than a use
  found_V = data.token_counts()
  count_V[: len(found_V)] += found_V
  return (count_V / count_V.sum()).astype(np.float32)


def trim_vocabulary(config: Config, data: Data) -> Data:
  """Returns the same data, cut into the tokens that training uses most.

  As many tokens leave the tokenizer as the config says rows of the embedding
  are to go, and words that had them are cut into other tokens. Special tokens
  stay, and in a BPE what others are made of, so fewer may go; FPP then zeroes
  rows for the rest.

  Args:
    config: Resolved; `fpp.embedding_granularity` is "trim".
    data: With the tokenizer of the model to start from.

  Raises:
    ConfigError: tokens of this kind of tokenizer cannot be removed.
  """
  size = data.tokenizer.vocab_size
  fraction = _fraction(config, data)
  if not fraction:
    return data
  usage_V = token_usage(data, size)
  tokenizer = without_least_used(data.tokenizer, usage_V, fraction)
  return make_data(config, tokenizer, jax.process_index(), jax.process_count())


def without_least_used(
  tokenizer: Tokenizer, usage_V: np.ndarray, fraction: float
) -> MappedTokenizer:
  """Returns a tokenizer without that fraction of its tokens.

  Args:
    tokenizer: Its ids are not mapped.
    usage_V: From `token_usage`.
    fraction: Of the V tokens; fewer go where too many have to stay.

  Raises:
    ConfigError: tokens of this kind of tokenizer cannot be removed.
  """
  size = len(usage_V)
  # What stays in any case comes first, so that as many go as are to go.
  stays_V = trimmed(tokenizer, np.zeros(size, bool)).token_map >= 0
  order = np.argsort(-(usage_V + stays_V), kind="stable")
  keep_V = np.zeros(size, bool)
  keep_V[order[: round((1 - fraction) * size)]] = True
  return trimmed(tokenizer, keep_V)


def _fraction(config: Config, data: Data) -> float:
  if config.compress.plan == "auto":
    return outer_fractions(config)[1]
  make = functools.partial(
    make_model,
    vocab_size=data.tokenizer.vocab_size,
    num_classes=data.num_classes,
  )
  params, dense = (
    param_shapes(make(c)) for c in (config, config_lib.dense_twin(config))
  )
  return embedding_fraction(make_rules(config, params, dense))
