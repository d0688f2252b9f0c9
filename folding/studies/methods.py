"""Ways to make a model smaller, as edits of a run's config.

All methods share steps, data, optimizer and accounting. A saving is the fraction
of the dense baseline's parameters to save, over the whole model.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from folding import config as config_lib
from folding.config import Config, DataConfig, ModelConfig
from folding.data.tokenizers import vocab_size
from folding.errors import ConfigError
from folding.models.shape import shape_of
from folding.models.transformer import make_model, param_shapes

Edits = dict[str, Any]  # {dotted field of `Config`: value}


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to make a model smaller.

  Attributes:
    about: Description for tables, with its source.
    edits: Function of the base config and the saving that returns edits of the
      base config. The saving is 0.0 if the method has none.
    has_savings: Whether the size depends on the saving; if not, there is one run
      per seed.
    after: Whether the method starts from a trained dense model, which takes
      `Study.pretrain` of the steps.
  """

  about: str
  edits: Callable[[Config, float], Edits]
  has_savings: bool = True
  after: bool = False


def folded(saving: float) -> Edits:
  """Returns the edits of `ours`: folded attention, neurons pruned by FPP.

  W_Q and W_K stay dense up to a saving of 0.4, as in the presets.
  """
  edits: Edits = {
    "preset": "paper",
    "fpp.granularity": "neuron",
    "fpp.score": "saliency",
    **_saving(saving),
  }
  if saving <= 0.4:
    edits["fold.groups"] = 0
  return edits


def unfolded(saving: float, score: str = "relative") -> Edits:
  """Returns the edits of FPP alone: single weights, dense attention."""
  return {
    "preset": "none",
    "fold.groups": 0,
    "fold.values": "dense",
    "fpp.granularity": "weight",
    "fpp.embedding_granularity": "weight",
    "fpp.score": score,
    **_saving(saving),
  }


def gradual(saving: float, score: str) -> Edits:
  """Returns the edits of gradual pruning: all matrices, nothing is frozen."""
  return unfolded(saving, score) | {"fpp.attention": "all", "fpp.patience": 0}


def one_shot(saving: float, prune: str) -> Edits:
  """Returns the edits of one-shot pruning of a trained model."""
  return unfolded(saving) | {"fpp.attention": "all", "compress.prune": prune}


def _saving(saving: float | None) -> Edits:
  """Returns edits that set the sparsity of the whole model; None: unset."""
  return {
    "fpp.saving": saving,
    "fpp.linear": None,
    "fpp.embedding": None,
    "fpp.linear_layers": None,
  }


def narrower(base: Config, saving: float) -> Edits:
  """Returns the edits of a narrower dense model with as many parameters.

  Heads keep their size, so a narrower model has fewer heads. The width is the
  largest that fits with `mlp_width` in proportion; `mlp_width` takes up the
  rest.

  Raises:
    ConfigError: there is no such model.
  """
  dense = config_lib.dense_baseline(config_lib.resolve(base))
  full = dense.model
  head_dim, mlp_width = full.head_dim, full.mlp_width
  if dense.pretrained is not None:
    raise ConfigError("a narrower dense model cannot start from a checkpoint")
  if not isinstance(mlp_width, int) or full.num_heads != full.num_kv_heads:
    raise ConfigError(
      "a narrower dense model needs one mlp_width for all layers and "
      "num_kv_heads equal to num_heads"
    )
  count = functools.partial(
    _count, dense.task, vocab_size(dense.data), dense.data.length
  )
  target = (1 - saving) * count(full)

  def shape(width: int, extra: int = 0) -> ModelConfig:
    heads = math.ceil(width / head_dim)
    mlp = max(1, round(mlp_width * width / full.width) + extra)
    return dataclasses.replace(
      full, width=width, num_heads=heads, num_kv_heads=heads, mlp_width=mlp
    )

  low, high = 0, full.width
  while high - low > 1:
    middle = (low + high) // 2
    fits = count(shape(middle)) <= target
    low, high = (middle, high) if fits else (low, middle)
  if low == 0:
    raise ConfigError(f"no dense model is {saving:.12g} smaller")
  found = count(shape(low))
  per_neuron = count(shape(low, 1)) - found
  best = shape(low, round((target - found) / per_neuron))
  names = ("width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
  return {"dense": True} | {f"model.{n}": getattr(best, n) for n in names}


@functools.cache
def _count(task: Any, vocabulary: int, length: int, model: ModelConfig) -> int:
  data = DataConfig(length=length)
  config = Config(task=task, dense=True, model=model, data=data)
  made = make_model(shape_of(config), vocabulary, num_classes=2)
  return sum(x.size for x in jax.tree.leaves(param_shapes(made)))


METHODS: dict[str, Method] = {
  "dense": Method(
    "the dense baseline",
    lambda base, saving: {"dense": True},
    has_savings=False,
  ),
  "dense-small": Method(
    "a narrower dense model with as many parameters as the others store, but for "
    "its head",
    narrower,
  ),
  "ours": Method(
    "folding and FPP: W_V diagonal, W_Q and W_K at G = 1 above 40%, the rest by "
    "FPP by saliency, whole neurons of feed-forward layers",
    lambda base, saving: folded(saving),
  ),
  "ours-weight": Method(
    "ours by the score `relative`, single weights of feed-forward layers",
    lambda base, saving: {
      **folded(saving),
      "fpp.score": "relative",
      "fpp.granularity": "weight",
    },
  ),
  "fold": Method(
    "folding alone: W_V diagonal, W_Q and W_K at G = 1",
    lambda base, saving: {
      "preset": "paper",
      **_saving(None),
      "fpp.linear": 0.0,
      "fpp.embedding": 0.0,
    },
    has_savings=False,
  ),
  "fpp": Method(
    "FPP alone: single weights of embeddings, W_O and feed-forward layers",
    lambda base, saving: unfolded(saving),
  ),
  "random": Method(
    "gradual, weights drawn at random",
    lambda base, saving: gradual(saving, "random"),
  ),
  "magnitude": Method(
    "gradual magnitude pruning (Zhu and Gupta 2017)",
    lambda base, saving: gradual(saving, "magnitude"),
  ),
  "movement": Method(
    "gradual, by -w g summed with a decay of 0.99 (after Sanh et al. 2020)",
    lambda base, saving: {**gradual(saving, "movement"), "fpp.decay": 0.99},
  ),
  "saliency": Method(
    "gradual, by the averaged |w g| (Lee et al. 2019, Molchanov et al. 2019)",
    lambda base, saving: gradual(saving, "saliency"),
  ),
  "neuron": Method(
    "gradual, whole neurons of feed-forward layers, the rest by weight",
    lambda base, saving: {
      **gradual(saving, "activation"),
      "fpp.granularity": "neuron",
    },
  ),
  "heads": Method(
    "gradual, whole heads and neurons (after Michel et al. 2019)",
    lambda base, saving: {
      **gradual(saving, "activation"),
      "fpp.granularity": "neuron",
      "fpp.attention": "heads",
    },
  ),
  "wanda": Method(
    "Wanda on a trained model (Sun et al. 2024), then recovery",
    lambda base, saving: one_shot(saving, "wanda"),
    after=True,
  ),
  "sparsegpt": Method(
    "SparseGPT on a trained model (Frantar and Alistarh 2023), then recovery",
    lambda base, saving: one_shot(saving, "sparsegpt"),
    after=True,
  ),
}


def pick(*names: str) -> dict[str, Method]:
  """Returns methods by name.

  Raises:
    ConfigError: a name is not in `METHODS`.
  """
  for name in names:
    if name not in METHODS:
      raise ConfigError(f"no method {name!r}; methods: {', '.join(METHODS)}")
  return {name: METHODS[name] for name in names}
