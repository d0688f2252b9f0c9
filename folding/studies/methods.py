"""Ways to make a model smaller, as edits of a run's configuration.

All have the same steps, data, optimizer and accounting. A level is the fraction
of the dense twin's parameters that is to be saved, of the whole model.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from folding import config as config_lib
from folding.config import Config, ModelConfig
from folding.data.batches import vocab_size
from folding.models.transformer import make_model, param_shapes
from folding.reporting import words
from folding.schema import ConfigError, edited, reason, require

Edits = Mapping[str, Any]  # {dotted field of `Config`: value}


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to make a model smaller.

  Attributes:
    about: What it is, for tables; with its source.
    edits: Of the base config; or a function of that and the level.
    kind: What a level does. "level": it becomes `fpp.overall`. "fixed":
      nothing, there is one size. "small": it says how wide a dense model is.
    after: A dense model is trained for a part of the steps, and the method
      starts from it for the rest.
  """

  about: str
  edits: Edits | Callable[[Config, float | None], Edits] = dataclasses.field(
    default_factory=dict
  )
  kind: Literal["level", "fixed", "small"] = "level"
  after: bool = False

  def config(
    self, base: Config, level: float | None, seed: int, start: str = ""
  ) -> Config:
    """Returns the config of a run.

    Args:
      base: What all methods share.
      level: Fraction to save; None for kind "fixed".
      seed: Of the run.
      start: Of a method that is `after`: the run to start from.

    Raises:
      ConfigError: an edit is of no field, or of the wrong type, or the function
        of edits raised.
    """
    edits = self.edits
    try:
      edits = dict(edits(base, level) if callable(edits) else edits)
    except ConfigError:
      raise
    except Exception as error:  # of somebody's program
      raise ConfigError(
        f"the edits of the method fail: {reason(error)}"
      ) from error
    edits["seed"] = seed
    if self.kind == "level":
      edits |= {"fpp.overall": level, "fpp.linear": None}
      edits |= {"fpp.embedding": None, "fpp.linear_layers": None}
    if self.after:
      edits |= {"pretrained": start}
      edits |= {"data.tokenizer": f"{start}/tokenizer.json"}
    found = edited(base, edits)
    if self.kind == "small":
      assert level is not None
      found.model = small(found, level)
      found.pretrained = None
    return found


def small(base: Config, level: float) -> ModelConfig:
  """Returns the shape of a dense model that stores as much as a level leaves.

  Heads keep their size, so that a narrower model has fewer of them. The width
  is the largest that fits with the feed-forward part in proportion; what is
  left over goes to the feed-forward part.

  Raises:
    ConfigError: there is no such model.
  """
  dense = config_lib.dense_twin(config_lib.resolve(base))
  vocabulary, length = vocab_size(dense.data), dense.data.length
  count = functools.partial(_count, dense, vocabulary, length)
  target = (1 - level) * count(dense.model)
  head_dim, full = dense.model.head_dim, dense.model
  mlp = full.mlp_width
  require(
    isinstance(mlp, int) and full.num_heads == full.num_kv_heads,
    "a small dense model is found for layers of one width, and heads with keys "
    "of their own",
  )

  def shape(width: int, mlp_width: int) -> ModelConfig:
    heads = math.ceil(width / head_dim)
    return dataclasses.replace(
      full,
      width=width,
      num_heads=heads,
      num_kv_heads=heads,
      mlp_width=max(1, mlp_width),
    )

  def in_proportion(width: int) -> int:
    return round(mlp * width / full.width)  # pyright: ignore

  low, high = 0, full.width
  while high - low > 1:
    middle = (low + high) // 2
    fits = count(shape(middle, in_proportion(middle))) <= target
    low, high = (middle, high) if fits else (low, middle)
  if low == 0:
    raise ConfigError(
      f"no dense model is {words.level(level)} smaller than the dense twin"
    )
  first = shape(low, in_proportion(low))
  less = count(first)
  more = dataclasses.replace(first, mlp_width=first.mlp_width + 1)  # pyright: ignore
  extra = round((target - less) / (count(more) - less))
  return shape(low, in_proportion(low) + extra)


@functools.cache
def _count_of(
  model: ModelConfig, task: str, vocabulary: int, length: int
) -> int:
  config = Config(task=task, dense=True, model=model)  # pyright: ignore
  config.data.length = length
  made = make_model(config_lib.resolve(config), vocabulary, num_classes=2)
  return sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(made)))


def _count(config: Config, vocabulary: int, length: int, model: ModelConfig):
  return _count_of(model, config.task, vocabulary, length)


_WEIGHTS: Edits = {"fpp.granularity": "weight", "fpp.score": "relative"}
_UNFOLDED: Edits = {
  **_WEIGHTS,
  "preset": "none",
  "fold.groups": 0,
  "fold.values": "dense",
  "fpp.embedding_granularity": "weight",
}
# As configs/lm.py and classify.py have them, whatever the base says.
FOLDED: Edits = {
  "preset": "paper",
  "fpp.granularity": "neuron",
  "fpp.score": "saliency",
}


def _gradual(about: str, score: str, **more: Any) -> Method:
  """Returns gradual pruning of all matrices, without the freezing stage."""
  edits = {**_UNFOLDED, "fpp.score": score, "fpp.attention": "all"}
  more = {f"fpp.{name}": value for name, value in more.items()}
  return Method(about, {**edits, "fpp.patience": 0, **more})


def _after(about: str, prune: str) -> Method:
  edits = {**_UNFOLDED, "compress.prune": prune, "fpp.attention": "all"}
  return Method(about, edits, after=True)


def _ours(about: str, **more: Any) -> Method:
  """Returns folding and FPP, with other fields of `fpp`."""
  changed = {f"fpp.{name}": value for name, value in more.items()}

  def edits(base: Config, level: float | None) -> Edits:
    # As the presets: where little is to be saved, W_Q and W_K stay dense.
    assert level is not None
    return {**FOLDED, **({"fold.groups": 0} if level <= 0.4 else {}), **changed}

  return Method(about, edits)


def _rows(base: Config, level: float | None) -> Edits:
  # As many numbers as one output channel a head: G K = D.
  config = config_lib.resolve(base)
  groups = config.model.width // config.model.head_dim  # pyright: ignore
  return {**FOLDED, "fold.axis": "input", "fold.groups": groups}


METHODS: dict[str, Method] = {
  "dense": Method("the dense twin", {"dense": True}, "fixed"),
  "dense-again": Method(
    "the dense twin in two parts, each with a warm-up and a schedule of its own: "
    "what methods after training would be if they pruned nothing",
    {"dense": True},
    "fixed",
    after=True,
  ),
  "dense-small": Method(
    "a dense model, narrower: as many parameters as are stored",
    {"dense": True},
    "small",
  ),
  "ours": _ours(
    "folding and FPP: W_V diagonal, above 40% W_Q and W_K at G = 1, the rest by "
    "FPP by saliency, whole neurons of feed-forward layers",
  ),
  "ours-forward": _ours(
    "as ours, by what the forward pass says alone: the RMS of inputs, and weights",
    score="relative",
  ),
  "ours-weight": _ours(
    "as ours-forward, but single weights of feed-forward layers, whose arrays "
    "stay as large",
    score="relative",
    granularity="weight",
  ),
  "ours-v": Method(
    "as ours, but W_Q and W_K are pruned and not folded",
    {**FOLDED, "fold.groups": 0, "fpp.attention": "all"},
  ),
  "fold": Method(
    "folding alone: G = 1, W_V diagonal",
    {
      **FOLDED,
      **{"fpp.linear": 0.0, "fpp.embedding": 0.0},
      **{"fpp.overall": None, "fpp.linear_layers": None},
    },
    "fixed",
  ),
  "fpp": Method(
    "FPP alone: freeze, then zero, in embeddings, W_O and feed-forward layers",
    _UNFOLDED,
  ),
  "fpp-all": Method(
    "FPP alone, W_Q, W_K and W_V as well", {**_UNFOLDED, "fpp.attention": "all"}
  ),
  "low-rank-qk": Method(
    "W_Q and W_K folded to G = 1, which is rank 1 a head, W_V dense, the rest "
    "by FPP, single weights",
    {**FOLDED, **_WEIGHTS, "fold.values": "dense"},
  ),
  "diagonal-v": Method(
    "W_V diagonal, W_Q and W_K dense, the rest by FPP",
    {**FOLDED, "fold.groups": 0},
  ),
  "fold-rows": Method(
    "as ours, but rows of inputs are identical, G = D / K of them", _rows
  ),
  "random": _gradual("gradual, weights drawn at random", "random"),
  "magnitude": _gradual(
    "gradual magnitude pruning, each array by itself (Zhu and Gupta 2017)",
    "magnitude",
  ),
  "movement": _gradual(
    "gradual, by -w g summed with a decay of 0.99 (after Sanh et al. 2020)",
    "movement",
    decay=0.99,
  ),
  "saliency": _gradual(
    "gradual, by the averaged |w g| (Lee et al. 2019, Molchanov et al. 2019)",
    "saliency",
  ),
  "activation": _gradual(
    "gradual, by |w| rms(input), the score of Wanda", "activation"
  ),
  "relative": _gradual(
    "gradual, by FPP's default score, after RIA (Zhang et al. 2024)",
    "relative",
  ),
  "neuron": _gradual(
    "gradual, whole neurons of feed-forward layers, the rest by weight",
    "activation",
    granularity="neuron",
  ),
  "heads": _gradual(
    "gradual, whole heads and neurons, embeddings by weight (after Michel et al. "
    "2019)",
    "activation",
    granularity="neuron",
    attention="heads",
  ),
  "magnitude-after": _after(
    "a trained model, pruned by magnitude at once, then recovered", "magnitude"
  ),
  "wanda": _after(
    "a trained model, pruned by Wanda (Sun et al. 2024), then recovered",
    "wanda",
  ),
  "sparsegpt": _after(
    "a trained model, pruned by SparseGPT (Frantar and Alistarh 2023), then "
    "recovered",
    "sparsegpt",
  ),
}


def pick(*names: str) -> dict[str, Method]:
  """Returns methods by name.

  Raises:
    ConfigError: there is no such method.
  """
  for name in names:
    require(
      name in METHODS,
      f"there is no method {name!r}; there are {', '.join(METHODS)}",
    )
  return {name: METHODS[name] for name in names}
