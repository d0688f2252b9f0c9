"""Folds one layer of a trained model."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from folding.compression import lowrank
from folding.compression.lowrank import Moments
from folding.compression.shrink import make_cut
from folding.models.attention import layer_frequencies
from folding.models.shape import Layer, Shape
from folding.models.transformer import Block
from folding.training.fit_attention import fit_attention
from folding.training.stream import (
  Gram,
  Params,
  Reading,
  Stream,
  capture,
  capture_all,
  flat,
  half_totals,
  input_moments,
  reading,
  second_moment,
  total,
)


class Folded(NamedTuple):
  """A folded layer.

  Attributes:
    params: Its parameters.
    report: Its row of the report.
    stream: Its output on calibration text.
  """

  params: dict[str, Any]
  report: dict[str, Any]
  stream: Stream


class Prune(NamedTuple):
  """How a layer is pruned while it is folded.

  Attributes:
    reads: Modules ("q", "o", "up" or "down") whose input is read by kernels that
      are pruned by weight.
    weights: (parameters, {module: moments of its input}) -> parameters with zeros
      in the kernels that read these inputs.
    neurons: (parameters, moments of the input of W_down) -> parameters with
      neurons of zeros.
  """

  reads: frozenset[str]
  weights: Callable[[Params, Mapping[str, Moments]], dict[str, Any]]
  neurons: Callable[[Params, Moments], dict[str, Any]]


def fold_layer(
  block: Block,
  dense: Block,
  old: Params,
  stream: Stream,
  *,
  target: Sequence[Mapping[str, jax.Array]],
  fit_steps: int = 0,
  prune: Prune | None = None,
  sensitivity_DD: np.ndarray | None = None,
) -> Folded:
  """Returns a folded layer.

  Each of its matrices is applied to the text once: what W_O and W_down read is
  kept while the layer is folded.

  Args:
    block: The folded layer.
    dense: The dense layer.
    old: Its parameters.
    stream: Input of the folded layer.
    target: `target_of` the dense layer on the dense stream.
    fit_steps: As for `fit_attention`.
    prune: Neurons are pruned before W_down is fitted, and single weights of a
      matrix after its fit. None: nothing is pruned.
    sensitivity_DD: How errors of the output of W_O count; None: all alike.
  """
  attn, report, outputs = fold_attention(
    block,
    dense,
    old,
    stream,
    target=target,
    fit_steps=fit_steps,
    prune=prune,
    sensitivity_DD=sensitivity_DD,
  )
  new = {**old, "attn": attn}
  if prune is not None and "q" in prune.reads:
    new = prune.weights(new, input_moments(block, new, stream, ("q",)))
    seen = capture_all(block, new, stream, outputs=("o",))
    outputs = [one["o"] for one in seen]

  def middle(*names):
    # The output of attention is given, so layers of any plan run one program.
    rest = stream.put({**new, "attn": old["attn"]})
    return [
      {"o": o} | capture(dense, rest, x, mask, names, given={"attn": o})
      for x, mask, o in zip(*stream, outputs, strict=True)
    ]

  if prune is not None and "up" in prune.reads:
    read = reading([one["up"] for one in middle("up")], stream.masks)
    new = prune.weights(new, {"up": read.moments})
  seen = middle("down", *_MIDDLE[block.shape.norm_position])
  read = reading([one.pop("down") for one in seen], stream.masks)
  if prune is not None:
    new = prune.neurons(new, read.moments)
    stays_F = np.any(new["mlp"]["down"]["kernel"], axis=1)
    read = read._replace(halves=[half.only(stays_F) for half in read.halves])
  data = _fit_data(block.shape, "down", stream, target, seen)
  down, report["mlp_r2"] = _refit(new["mlp"]["down"], read, data)
  new = {**new, "mlp": {**new["mlp"], "down": down}}
  if prune is not None and "down" in prune.reads:
    new = prune.weights(new, {"down": read.moments})
  on_device = stream.put(new["mlp"]["down"])
  rest = stream.put({**new, "attn": old["attn"]})
  given = (  # of one batch at a time
    {"attn": o, "mlp": project(on_device, a)}
    for o, a in zip(outputs, read.a, strict=True)
  )
  x = [
    capture(dense, rest, x, mask, outputs=("out",), given=out)["out"]
    for x, mask, out in zip(*stream, given, strict=True)
  ]
  return Folded(new, report, Stream(x, stream.masks))


# {norm_position: modules whose inputs a fit needs}: of W_down, and of a layer.
_MIDDLE = {"pre": ("norm_mlp",), "post": ("up",), "both": ()}
_STREAMS = {"pre": ("norm_mlp",), "post": ("norm_attn", "norm_mlp"), "both": ()}


def target_of(
  block: Block, params: Params, stream: Stream, *, only_attention: bool = False
) -> list[dict[str, jax.Array]]:
  """Returns what the fits of a layer need of the dense one, and "out".

  Args:
    block: The dense layer.
    params: Its parameters.
    stream: Its input.
    only_attention: Only what the fit of W_O needs, so that the MLP is not run.
  """
  norms = block.shape.norm_position
  names, outputs = _STREAMS[norms], ()
  if norms == "both" or block.shape.parallel:
    outputs = ("o", "down")
  if only_attention:
    return capture_all(block, params, stream, names[:1], outputs[:1])
  return capture_all(block, params, stream, names, (*outputs, "out"))


@jax.jit
def project(projection, a_BLx):
  """Returns the output of a projection whose input has any shape [B, L, ...]."""
  a_BLF = flat(a_BLx)
  kernel = projection["kernel"]
  out = a_BLF @ kernel.reshape(-1, kernel.shape[-1])
  return out + projection["bias"][None, None] if "bias" in projection else out


def fold_attention(
  block: Block,
  dense: Block,
  old: Params,
  stream: Stream,
  *,
  target: Sequence[Mapping[str, jax.Array]] = (),
  fit_steps: int = 0,
  prune: Prune | None = None,
  sensitivity_DD: np.ndarray | None = None,
) -> tuple[dict[str, Any], dict[str, Any], list[jax.Array]]:
  """Returns the attention of a folded layer.

  Args:
    block: As for `fold_layer`, like the others.
    dense: The dense layer.
    old: Its parameters.
    stream: Input of the folded layer.
    target: Of the dense layer; not needed if W_V is not dense.
    fit_steps: As for `fit_attention`.
    prune: How W_O is pruned by weight.
    sensitivity_DD: How errors of the output of W_O count.

  Returns:
    (its parameters, the report of the layer so far, its output on each batch).
  """
  layer, K = block.layer, block.shape.head_dim
  attn, report, read = _fold_logits(block, dense, old, stream, fit_steps)
  mix = np.eye(len(read.halves[0].sum_F))
  if len(mix) > len(layer.heads) * K:  # of the dense heads, which are more
    mix = mix[:, np.repeat(np.isin(dense.layer.heads, layer.heads), K)]
  if layer.value_dim < K:
    [low] = lowrank.fold_values(
      attn["v"],
      attn["o"],
      read.moments.mixed(mix),
      [layer.value_dim],
      sensitivity_DD=sensitivity_DD,
    )
    attn, mix = attn | {"v": low.v, "o": low.o}, mix @ low.mix
  # If W_V is not dense, W_O has no prior and does not correct the layers below: it
  # is fitted to the output of the dense layer on the same input.
  has_prior = layer.values == "dense"
  wanted = target
  if not has_prior:
    wanted = target_of(dense, old, stream, only_attention=True)
  data = _fit_data(block.shape, "o", stream, wanted)
  attn["o"], report["attention_r2"] = _refit(
    attn["o"], read, data, mix=mix, has_prior=has_prior
  )
  if prune is not None and "o" in prune.reads:
    moments = {"o": read.moments.mixed(mix)}
    attn = prune.weights({"attn": attn}, moments)["attn"]
  kernel_xD = attn["o"]["kernel"].reshape(mix.shape[1], -1)
  mixed = {**attn["o"], "kernel": (mix @ kernel_xD).astype(np.float32)}
  mixed = stream.put(mixed)
  return attn, report, [project(mixed, a) for a in read.a]


def _fold_logits(
  block: Block, dense: Block, old: Params, stream: Stream, fit_steps: int
) -> tuple[dict[str, Any], dict[str, Any], Reading]:
  """Returns attention with fewer heads, folded W_Q and W_K and the kind of W_V.

  W_V has all of its rank, and W_O is not fitted yet. The arguments are those of
  `fold_attention`.

  Returns:
    (its parameters, the report of the layer so far, what W_O of all heads of the
    dense layer reads).
  """
  m, layer = block.shape, block.layer
  attn, report = dict(old["attn"]), initial_report(layer)
  # All heads and all of W_V stay until the end, so that layers of other sizes run
  # the same programs.
  names = ("groups", "axis", "rope", "values")
  form = {name: getattr(layer, name) for name in names}
  whole = dense.clone(layer=dataclasses.replace(dense.layer, **form))
  if layer.groups:
    moments = head_moments(dense, old, stream)
    attn, report["logits_kept"] = fold_logits(m, layer, attn, moments)
  if layer.values != "dense":
    attn = {name: w for name, w in attn.items() if name != "v"}
  if layer.values == "diagonal":  # the fitted W_O can express any other
    attn["v"] = {"diagonal": np.ones((m.width, 1, 1), np.float32)}
  if layer.groups:  # the fit ignores values, but the block needs their arrays
    attn, report["divergence"] = fit_attention(
      (whole, {**old, "attn": attn}), (dense, old), stream, fit_steps
    )
  read = _reads_of_output(whole, {**old, "attn": attn}, stream)
  if layer.heads != dense.layer.heads:
    attn, _ = keep_heads(attn, read.moments, layer.heads)
  return attn, report, read


def _reads_of_output(block: Block, params: Params, stream: Stream) -> Reading:
  """Returns what W_O reads."""
  seen = capture_all(block, params, stream, ("o",))
  return reading([one["o"] for one in seen], stream.masks)


def keep_heads(
  attn: Params, moments: Moments, heads: Sequence[int]
) -> tuple[dict[str, Any], np.ndarray]:
  """Returns a dense attention layer with some of its heads, and its error.

  Args:
    attn: Its parameters.
    moments: Moments of the input of W_O.
    heads: Remaining heads, in order; heads that share a key stay together.

  Returns:
    (parameters, `wrong` of `lowrank.FoldedValues`).
  """
  o, wrong = lowrank.fit_heads(attn["o"], moments, heads)
  H, J = len(attn["o"]["kernel"]), attn["k"]["kernel"].shape[1]
  is_dead_H = ~np.isin(np.arange(H), heads)
  is_dead_J = is_dead_H.reshape(J, H // J).all(1)
  cut = make_cut({"attn": attn}, {"attn/o/kernel": is_dead_J})
  return {**cut({"attn": attn})["attn"], "o": o}, wrong


def _fit_data(
  m: Shape,
  role: str,
  stream: Stream,
  target: Sequence[Mapping[str, jax.Array]],
  seen: Sequence[Mapping[str, jax.Array]] = (),
) -> tuple[Sequence[jax.Array], Sequence[jax.Array]]:
  """Returns (base, target) of the fit of a projection: base + output = target.

  Args:
    m: Shape of the model.
    role: "o" or "down".
    stream: Input of the layer.
    target: `target_of` the layer whose output is fitted.
    seen: The same of the folded layer so far, and "up", for "down".
  """
  if m.norm_position == "both":
    # A norm after a branch hides its output from the stream.
    return [jnp.zeros_like(x) for x in stream.x], [one[role] for one in target]
  is_post = m.norm_position == "post"

  def middle(one):
    """Returns the stream after attention, even if the branches are parallel."""
    if m.parallel:
      return one["norm_mlp"] + one["o"]
    return one["norm_attn" if is_post else "norm_mlp"]

  if role == "o":
    return stream.x, [middle(one) for one in target]
  return (
    [one["up"] if is_post else middle(one) for one in seen],
    [one["norm_mlp" if is_post else "out"] for one in target],
  )


def initial_report(layer: Layer) -> dict[str, Any]:
  """Returns the report of a layer that equals the dense one."""
  is_low_rank = layer.value_dim < layer.head_dim
  return {
    "heads": len(layer.heads),
    "groups": layer.groups,
    "values": f"rank {layer.value_dim}" if is_low_rank else layer.values,
    "logits_kept": 1.0,
    "divergence": 0.0,
    "attention_r2": 1.0,
    "mlp_r2": 1.0,
  }


class HeadMoments(NamedTuple):
  """E[a a'] of the input of attention, and around the mean of each text."""

  second: Any
  centred: Any


def head_moments(block: Block, params: Params, stream: Stream) -> HeadMoments:
  """Returns the moments of a layer's input that `fold_logits` needs."""
  sums = total(functools.partial(_moment_sums, block, params), *stream)
  return jax.tree.map(lambda a: a / stream.num_tokens, sums)


@functools.partial(jax.jit, static_argnums=0)
def _moment_sums(block, params, x, mask) -> HeadMoments:
  a = capture(block, params, x, mask, ("q",))["q"].astype(jnp.float32)
  weight = mask.astype(jnp.float32)[..., None]
  if "bias" in params["attn"]["q"]:
    a = jnp.concatenate([a, jnp.ones_like(a[..., :1])], axis=-1)
  mean = (a * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
  a, centred = a * weight, (a - mean[:, None]) * weight
  return HeadMoments(second_moment(a, a), second_moment(centred, centred))


def fold_logits(
  m: Shape, layer: Layer, attn: Params, moments: HeadMoments
) -> tuple[dict[str, Any], float | None]:
  """Returns an attention layer with folded W_Q and W_K, and their `kept`.

  Args:
    m: Shape of the model.
    layer: Has the groups, at least one.
    attn: Parameters of the dense layer.
    moments: Moments of its input.
  """
  if layer.axis == "input":
    q, k = (
      lowrank.fold_input_rows(attn[role], moments.second, layer.groups)
      for role in ("q", "k")
    )
    return {**attn, "q": q, "k": k}, None
  heads = logit_terms(m, layer, attn, moments).fold(layer.groups)
  folded = {**attn, "q": heads.q, "k": heads.k}
  if heads.frequency is not None and layer.groups != m.head_dim:
    folded["frequency"] = heads.frequency
  return folded, heads.kept


def logit_terms(
  m: Shape, layer: Layer, attn: Params, moments: HeadMoments
) -> lowrank.LogitTerms:
  """Returns the terms of the logits of a dense layer (output axis).

  Args:
    m: Shape of the model.
    layer: The layer.
    attn: Parameters of the dense layer.
    moments: Moments of its input.
  """
  q, k, (second, centred) = attn["q"], attn["k"], moments
  if m.positions != "rope":
    return lowrank.head_terms(q, k, second, centred)
  frequencies = layer_frequencies(m, layer)
  return lowrank.rotary_terms(q, k, second, second, frequencies)


def _refit(
  old: Mapping[str, Any],
  read: Reading,
  data: tuple[Sequence[jax.Array], Sequence[jax.Array]],
  *,
  mix: Any = None,
  has_prior: bool = True,
) -> tuple[dict[str, np.ndarray], float]:
  """Returns an output projection for which base + output = target, and its R2.

  Args:
    old: The projection.
    read: What it reads, or what `mix` turns into that.
    data: (base, target) of each batch, from `_fit_data`.
    mix: [F, inputs]; the projection reads a @ mix. None: it reads a.
    has_prior: Whether the fit stays near the present projection.
  """
  kernel = np.asarray(old["kernel"], np.float64)
  width = kernel.shape[-1]
  size = kernel.size // width
  prior = np.zeros((size + ("bias" in old), width))
  if has_prior:
    prior[:size] = kernel.reshape(-1, width)
    if "bias" in old:
      prior[size] = old["bias"]
  grams = [gram.square_FF for gram in read.halves]
  if "bias" in old:  # with the constant input
    grams = [_with_ones(gram) for gram in read.halves]
    mix = None if mix is None else scipy.linalg.block_diag(mix, 1.0)
  expected = (prior if mix is None else mix @ prior).astype(np.float32)
  sums = half_totals(_residual_sums, expected, read.a, read.masks, *data)
  cross, left, square, target, count = (
    np.stack(pair) for pair in zip(*sums, strict=True)
  )
  if mix is not None:
    grams = [mix.T @ gram @ mix for gram in grams]
    cross = mix.T @ cross
  square = square.sum()
  variance = square - np.square(target.sum(0)).sum() / count.sum()
  # The variance of a constant target is only rounding.
  variance = max(variance, 1e-6 * square)
  fit = lowrank.regress(grams, cross, left, variance, prior)
  weights = fit.weights.astype(np.float32)
  new = {"kernel": weights[:size].reshape(kernel.shape)}
  if "bias" in old:
    new["bias"] = weights[size]
  return new, fit.r2


def _with_ones(gram: Gram) -> np.ndarray:
  """Returns the sums of products of inputs and a constant input of 1."""
  sum_F1 = gram.sum_F[:, None]
  return np.block([[gram.square_FF, sum_F1], [sum_F1.T, gram.count]])


def _residual_sums(prior, a, mask, base, target):
  """Returns the sums of `lowrank.regress` over tokens, apart from the Gram.

  A last row of the prior, beyond the inputs, is that of a constant input of 1.
  """
  a = flat(a)
  if len(prior) > a.shape[-1]:
    a = jnp.concatenate([a, jnp.ones((*mask.shape, 1), a.dtype)], axis=-1)
  weight = mask.astype(jnp.float32)[..., None]
  a, target = a * weight, (target - base) * weight
  left = target - jnp.einsum("BLF,FD->BLD", a, prior, precision="highest")
  return (
    second_moment(a, left),
    jnp.sum(jnp.square(left)),
    jnp.sum(jnp.square(target)),
    target.sum((0, 1)),
    weight.sum(),
  )
