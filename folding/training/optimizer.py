"""The optimizer chain and the pruning rules of a configuration."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from folding import paths
from folding.compression.fpp import fpp
from folding.compression.scores import SCORES
from folding.compression.sites import Rule, make_sites
from folding.config import FPPConfig, Order, TrainConfig
from folding.errors import ConfigError
from folding.model import Targets
from folding.models.params import axis_of, kind_of
from folding.models.shape import Layer, Shape

_TOKENS, _POSITIONS = "embed/embedding", "position_embed/embedding"

# Arrays of a layer that belong to a unit, and letters of the axis it indexes.
_NEURON = "mlp/(up|gate|down)/(kernel|bias)", "F"
_HEAD = "attn/[qkv]/(kernel|bias)", "HJ"


def make_rules(
  shape: Shape,
  f: FPPConfig,
  params: Any,
  dense: Any,
  targets: Targets | None = None,
) -> list[Rule]:
  """Returns the pruning rules of a model; none if nothing is pruned.

  Args:
    shape: Shape of the model.
    f: The section of FPP.
    params: Tree of parameters, or of their shapes, before any shrink.
    dense: Parameters of the dense baseline, which `saving` refers to.
    targets: Fractions that a plan chose; None: those of `f`.

  Raises:
    ConfigError: no fraction of the prunable parameters reaches `saving`.
  """
  if targets is None:
    linear, embedding = f.linear or 0.0, f.embedding or 0.0
    if f.saving is not None:
      linear, embedding = _fractions_for(f.saving, (shape, f), params, dense)
    layers = f.linear_layers or (linear,) * shape.num_layers
    targets = Targets(layers, linear, embedding)
  return _rules(shape, f, params, targets)


def _rules(
  shape: Shape, f: FPPConfig, params: Any, targets: Targets
) -> list[Rule]:
  """Returns a rule per array (or array of units) with a target above 0."""
  names = list(paths.flatten(params))
  # (pattern of a layer's arrays, granularity, other arrays of a unit)
  mlp = ("mlp/(up|gate|down)/kernel", "weight", None)
  if f.granularity == "neuron":
    mlp = ("mlp/up/kernel", "neuron", _NEURON)
  attention = {
    "none": [],
    "output": [("attn/o/kernel", "weight", None)],
    "all": [("attn/[qkvo]/kernel", "weight", None)],
    "heads": [("attn/o/kernel", "row", _HEAD)],
  }[f.attention]
  unit, score = _embedding_rule(shape, f)
  # A plan that has yet to choose the rank prunes rows in place of it.
  keeps_tokens = f.embedding_granularity == "rank" and shape.embedding_rank > 0
  rules = []
  for name in names:
    if in_layer := re.fullmatch(r"(blocks_(\d+)/)(.*)", name):
      block, layer, role = in_layer.groups()
      for pattern, granularity, members in [mlp, *attention]:
        if re.fullmatch(pattern, role):
          tied = _members(names, block, members) if members else {}
          tied.pop(name, None)
          target = targets.layers[int(layer)]
          axis = axis_of(name, members[1]) if members else None
          rules.append(
            Rule(re.escape(name), target, granularity, tied, axis=axis)
          )
    elif name == "head/kernel" and shape.output == "tokens":
      rules.append(Rule(re.escape(name), targets.head))
    elif keeps_tokens:
      continue
    elif name == _TOKENS or (name == _POSITIONS and unit == "weight"):
      target = targets.embedding
      rules.append(Rule(re.escape(name), target, unit, score=score))
  return [rule for rule in rules if rule.target]


def _members(
  names: list[str], block: str, members: tuple[str, str]
) -> dict[str, int]:
  """Returns {array of a block that a unit has a slice of: its axis}."""
  pattern, letters = members
  axes = {
    name: axis_of(name, letters)
    for name in names
    if re.fullmatch(block + pattern, name)
  }
  return {name: axis for name, axis in axes.items() if axis is not None}


def _embedding_rule(shape: Shape, f: FPPConfig) -> tuple[str, str | None]:
  """Returns (granularity, score) of the rules of embeddings."""
  if f.embedding_granularity != "weight":
    return "row", "activation"  # how common a token is
  # A score that depends on how common a token is would empty rare ones. The
  # gradient of an embedding that is the output layer too does not.
  is_output = shape.output == "tokens" and shape.tie_embeddings
  is_usage = bool(SCORES[f.score].evidence) and not (
    f.score == "saliency" and is_output
  )
  return "weight", "magnitude" if is_usage else None


def embedding_fraction(rules: list[Rule]) -> float:
  """Returns the fraction of the token embedding that the rules prune."""
  found = (r.target for r in rules if re.fullmatch(r.pattern, _TOKENS))
  return next(found, 0.0)


def _fractions_for(
  saving: float, asked: tuple[Shape, FPPConfig], params: Any, dense: Any
) -> tuple[float, float]:
  """Returns the fractions that make the whole model `saving` smaller.

  With P parameters, of which L in linear layers and E in embeddings can be
  pruned, and T in the dense baseline, linear layers keep k and embeddings
  k**s, s their share: P - (1 - k) L - (1 - k**s) E = (1 - saving) T. Instead of
  k**s it is what `fpp.embedding` leaves, if that is given.
  """
  shape, f = asked
  share = f.embedding_share or 0.0

  def kept_embedding(kept: float) -> float:
    return kept**share if f.embedding is None else 1 - f.embedding

  sizes = {n: x.size for n, x in paths.flatten(params).items()}
  total = sum(x.size for x in jax.tree.leaves(dense))
  layers = (0.5,) * shape.num_layers
  # Which arrays are pruned does not depend on the fractions.
  is_pruned = kept_embedding(0.5) < 1
  rules = _rules(shape, f, params, Targets(layers, 0.5, 0.5 * is_pruned))
  prunable = {"linear": 0, "embedding": 0}
  for site in make_sites(rules, params):
    for name in site.members:
      is_embedding = kind_of(name) == "embedding"
      prunable["embedding" if is_embedding else "linear"] += sizes[name]
  linear, embedding = prunable.values()
  stored = sum(sizes.values())
  needed = stored - (1 - saving) * total
  most = linear + round((1 - kept_embedding(0.0)) * embedding)
  if needed >= most and needed > 0:
    raise ConfigError(
      f"fpp.saving {saving} cannot be reached: only {most:,} "
      f"of {stored:,} parameters can be pruned; fold more or ask for less"
    )
  low, high = 0.0, 1.0
  while low < (kept := (low + high) / 2) < high:
    pruned = (1 - kept) * linear + (1 - kept_embedding(kept)) * embedding
    low, high = (kept, high) if pruned > needed else (low, kept)
  limit = math.nextafter(1, 0)  # rounding may give 1, which prunes everything
  return min(1 - high, limit), min(1 - kept_embedding(high), limit)


def removed_units(rules: list[Rule], before: Any, after: Any) -> dict[str, int]:
  """Returns {parameter that a rule matches: units that a shrink removed}.

  Args:
    rules: The rules of the parameters before the shrink.
    before: Tree of parameters, or of their shapes.
    after: Tree of the parameters after the shrink.
  """
  sizes = {s.name: math.prod(s.shape) for s in make_sites(rules, after)}
  return {
    s.name: math.prod(s.shape) - sizes[s.name]
    for s in make_sites(rules, before)
  }


def mask_updates(order: Order) -> range:
  """Returns the steps, counted from 0, in which FPP updates its masks.

  If training starts from pruned weights, that is the first step alone. It holds the
  zeros that it finds, and if these are fewer than the target (Wanda rounds down per
  output) the next weights by magnitude.
  """
  if order.compress.prunes:
    return range(1)
  f, steps = order.fpp, order.train.steps
  begin = int(f.begin * steps)
  end = max(begin, min(int(f.end * steps), steps - 1))
  return range(begin, end + 1, max(1, math.ceil((end - begin) / f.checks)))


def make_optimizer(
  order: Order,
  layers: Sequence[Layer],
  rules: list[Rule],
  removed: Mapping[str, int] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Returns FPP around a chain: clip by norm, AdamW or Muon, learning rates.

  The clip is inside FPP, so that frozen parameters do not count in the norm.
  FPP is outside, so that weight decay and momentum do not move them. Weight
  decay acts on the kinds "qkv", "linear" and "embedding" of `models.params`,
  not on "other": norms, biases, slopes, the projection of an embedding and a
  BERT's pooler.

  Args:
    order: Resolved.
    layers: Layers of the model.
    rules: From `make_rules`.
    removed: From `removed_units`; None: nothing was removed.
  """
  t, f = order.train, order.fpp
  adam = optax.scale_by_adam(t.b1, t.b2)
  optimizer = optax.chain(
    adam if t.optimizer == "adamw" else _muon(adam),
    optax.add_decayed_weights(t.weight_decay, _is_matrix),
    optax.scale_by_learning_rate(make_schedule(t)),
  )
  inner = optax.chain(
    optax.clip_by_global_norm(t.clip_norm),
    optimizer,
    optax.stateless(
      lambda updates, _: paths.map_named(
        lambda name, update: rate(t, layers, name) * update, updates
      )
    ),
  )
  updates = mask_updates(order)
  if order.compress.prunes:
    f = dataclasses.replace(f, score="magnitude", patience=0, tolerance=None)
    rules = [dataclasses.replace(rule, score=None) for rule in rules]
  return fpp(
    inner,
    rules,
    begin=updates.start,
    end=updates.stop - 1,
    every=updates.step,
    patience=f.patience,
    score=f.score,
    decay=f.decay,
    tolerance=f.tolerance if rules else None,
    seed=order.seed,
    removed=removed,
    warn=False,  # a run reads `fpp_counts`, and keeps its compiled programs
  )


def _muon(adam: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns Muon for the kernels of layers, and Adam for all other arrays.

  The updates of Muon get a root mean square of 0.2, about that of Adam, so both
  have the same learning rate and weight decay (Liu et al. 2025, "Muon is Scalable
  for LLM Training").
  """

  def inputs_of(name):
    """Returns the axes of the inputs. W_Q, W_K and W_V have a matrix per head."""
    return (0, 1) if name.endswith("attn/o/kernel") else (0,)

  def axes(name, _):
    return optax.contrib.MuonDimensionNumbers(inputs_of(name), (-1,))

  def scale(name, update):
    inputs = math.prod(update.shape[axis] for axis in inputs_of(name))
    return 0.2 * math.sqrt(max(inputs, update.shape[-1])) * update

  def label(name, _):
    is_kernel = re.fullmatch(r"blocks_\d+/(attn|mlp)/\w+/kernel", name)
    return "muon" if is_kernel else "adam"

  muon = optax.chain(
    optax.contrib.scale_by_muon(
      weight_dimension_numbers=functools.partial(paths.map_named, axes)
    ),
    optax.stateless(lambda updates, _: paths.map_named(scale, updates)),
  )
  return optax.partition(
    {"muon": muon, "adam": adam}, functools.partial(paths.map_named, label)
  )


def _is_matrix(params: Any) -> Any:
  return paths.map_named(lambda name, _: kind_of(name) != "other", params)


def make_schedule(t: TrainConfig) -> optax.Schedule:
  """Returns a linear warm-up, then a cosine to a fraction of the peak."""
  warmup = max(1, round(t.warmup * t.steps)) if t.warmup else 0
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=t.learning_rate,
    warmup_steps=warmup,
    decay_steps=max(t.steps, warmup + 1),
    end_value=t.final_learning_rate * t.learning_rate,
  )


def rate(t: TrainConfig, layers: Sequence[Layer], name: str) -> float:
  """Returns the factor of a parameter's learning rate.

  Args:
    t: Has the rates.
    layers: Layers of the model.
    name: Path of the parameter.
  """
  found = re.match(r"blocks_(\d+)/attn/(q|k|v|log_slopes)\b", name)
  if not found:
    return 1.0
  layer = layers[int(found[1])]
  qk = t.qk_rate if layer.groups else 1.0
  v = 1.0 if layer.values == "dense" else t.v_rate
  return {"q": qk, "k": qk, "v": v, "log_slopes": t.slope_rate}[found[2]]
