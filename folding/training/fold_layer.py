"""Folds one layer of a trained model."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from folding.compression import lowrank
from folding.compression.lowrank import Moments
from folding.compression.shrink import make_cut
from folding.config import Layer, ModelConfig
from folding.models.attention import layer_frequencies
from folding.models.transformer import Block
from folding.training.fit_attention import fit_attention
from folding.training.stream import (
  OUTPUTS,
  STREAMS,
  Params,
  Stream,
  capture,
  capture_all,
  halves,
  input_moments,
  second_moment,
  total,
)


def fold_layer(
  block: Block,
  dense: Block,
  old: Params,
  stream: Stream,
  *,
  target: Sequence[Mapping[str, jax.Array]],
  fit_steps: int = 0,
  prune: Callable[[dict[str, Any], Stream], dict[str, Any]] | None = None,
  sensitivity_DD: np.ndarray | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the parameters of a folded layer, and its row of the report.

  Args:
    block: The folded layer.
    dense: The dense layer.
    old: Its parameters.
    stream: Input of the folded layer.
    target: `capture_all` of the dense layer on the dense stream, with `STREAMS` and
      `OUTPUTS`.
    fit_steps: As for `fit_attention`.
    prune: As for `fold_pretrained`, without the number of the layer.
    sensitivity_DD: How errors of the output of W_O count; None: all alike.
  """
  m = block.config
  attn, report = _fold_attention(
    block,
    dense,
    old,
    stream,
    fit_steps=fit_steps,
    sensitivity_DD=sensitivity_DD,
  )
  new = {**old, "attn": attn}
  # If W_V is not dense, W_O has no prior and does not correct the layers below: it
  # is fitted to the output of the dense layer on the same input.
  has_prior = block.layer.values == "dense"
  wanted = target
  if not has_prior:
    wanted = capture_all(dense, old, stream, STREAMS, outputs=OUTPUTS)
  data = (*stream, *_fit_data(m, "o", stream, wanted))
  attn["o"], report["attention_r2"] = _refit(
    block, new, "o", data, has_prior=has_prior
  )
  if prune is not None:
    new = prune(new, stream)
  seen = capture_all(block, new, stream, ("up", "norm_mlp"), outputs=OUTPUTS)
  data = (*stream, *_fit_data(m, "down", stream, target, seen))
  down, report["mlp_r2"] = _refit(block, new, "down", data, has_prior=True)
  if prune is not None:  # exactly 0, as the fit is rounded
    stays = np.any(new["mlp"]["down"]["kernel"], axis=1, keepdims=True)
    down["kernel"] = np.where(stays, down["kernel"], 0)
  return {**new, "mlp": {**new["mlp"], "down": down}}, report


def _fold_attention(
  block: Block,
  dense: Block,
  old: Params,
  stream: Stream,
  *,
  fit_steps: int,
  sensitivity_DD: np.ndarray | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the attention of a folded layer, and the layer's report so far.

  W_O still has to be fitted. The arguments are those of `fold_layer`.
  """
  m, layer = block.config, block.layer
  if layer.heads != dense.layer.heads:
    seen = input_moments(dense, old, stream, ("o",))["o"]
    old = {**old, "attn": keep_heads(old["attn"], seen, layer.heads)[0]}
    kept = {name: getattr(layer, name) for name in ("heads", "num_kv_heads")}
    dense = dense.clone(layer=dataclasses.replace(dense.layer, **kept))
  attn, report = dict(old["attn"]), initial_report(layer)
  if layer.groups:
    moments = head_moments(dense, old, stream)
    attn, report["logits_kept"] = fold_logits(m, layer, attn, moments)
  if layer.values != "dense":
    del attn["v"]
  if layer.values == "diagonal":  # the fitted W_O can express any other
    size = len(layer.heads) * layer.head_dim
    attn["v"] = {"diagonal": np.ones((size, 1, 1), np.float32)}
  # The layer with all of W_V, from which that of low rank follows.
  whole = block.clone(layer=dataclasses.replace(layer, value_dim=m.head_dim))
  if layer.groups:  # the fit ignores values, but the block needs their arrays
    attn, report["divergence"] = fit_attention(
      (whole, {**old, "attn": attn}), (dense, old), stream, fit_steps
    )
  if layer.value_dim < m.head_dim:
    seen = input_moments(whole, {**old, "attn": attn}, stream, ("o",))["o"]
    [low] = lowrank.fold_values(
      attn["v"],
      attn["o"],
      seen,
      [layer.value_dim],
      sensitivity_DD=sensitivity_DD,
    )
    attn |= {"v": low.v, "o": low.o}
  return attn, report


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
  m: ModelConfig,
  role: str,
  stream: Stream,
  target: Sequence[Mapping[str, jax.Array]],
  seen: Sequence[Mapping[str, jax.Array]] = (),
) -> tuple[Sequence[jax.Array], Sequence[jax.Array]]:
  """Returns (base, target) of the fit of a projection: base + output = target.

  Args:
    m: Resolved.
    role: "o" or "down".
    stream: Input of the layer.
    target: `capture_all` of the layer whose output is fitted.
    seen: `capture_all` of the folded layer, for "down".
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
  m: ModelConfig, layer: Layer, attn: Params, moments: HeadMoments
) -> tuple[dict[str, Any], float | None]:
  """Returns an attention layer with folded W_Q and W_K, and their `kept`.

  Args:
    m: Resolved.
    layer: Has the groups, at least one.
    attn: Parameters of the dense layer.
    moments: Moments of its input.
  """
  q, k, (second, centred) = attn["q"], attn["k"], moments
  if layer.axis == "input":
    rows = [lowrank.fold_input_rows(w, second, layer.groups) for w in (q, k)]
    return {**attn, "q": rows[0], "k": rows[1]}, None
  if m.positions != "rope":
    heads = lowrank.fold_heads(q, k, second, centred, layer.groups)
    return {**attn, "q": heads.q, "k": heads.k}, heads.kept
  heads = lowrank.fold_rotary_heads(
    q, k, second, second, layer.groups, layer_frequencies(m, layer)
  )
  folded = {**attn, "q": heads.q, "k": heads.k}
  if layer.groups != m.head_dim:
    folded["frequency"] = heads.frequency
  return folded, heads.kept


def _refit(
  block: Block,
  params: Params,
  role: str,
  data: tuple[Sequence[Any], ...],
  *,
  has_prior: bool,
) -> tuple[dict[str, np.ndarray], float]:
  """Returns an output projection for which base + output = stream, and its R2.

  Args:
    block: The folded block.
    params: Its parameters.
    role: "o" or "down".
    data: Lists of x, masks, base and stream, one array per batch.
    has_prior: Whether the fit stays near the present projection.
  """
  old = params["attn" if role == "o" else "mlp"][role]
  kernel = np.asarray(old["kernel"], np.float64)
  width = kernel.shape[-1]
  size = kernel.size // width
  prior = np.zeros((size + ("bias" in old), width))
  if has_prior:
    prior[:size] = kernel.reshape(-1, width)
    if "bias" in old:
      prior[size] = old["bias"]
  part = functools.partial(_fit_sums, block, role, params, prior)
  sums = [total(part, *zip(*half, strict=True)) for half in halves(*data)]
  gram, cross, left, square, target, count = (
    np.stack(pair) for pair in zip(*sums, strict=True)
  )
  square = square.sum()
  variance = square - np.square(target.sum(0)).sum() / count.sum()
  # The variance of a constant target is only rounding.
  variance = max(variance, 1e-6 * square)
  fit = lowrank.regress(gram, cross, left, variance, prior)
  weights = fit.weights.astype(np.float32)
  new = {"kernel": weights[:size].reshape(kernel.shape)}
  if "bias" in old:
    new["bias"] = weights[size]
  return new, fit.r2


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit_sums(block, role, params, prior, x, mask, base, stream):
  """Returns sums over tokens, see `lowrank.regress`."""
  features = capture(block, params, x, mask, (role,))[role].astype(jnp.float32)
  features = features.reshape(*x.shape[:2], -1)
  if len(prior) > features.shape[-1]:  # there is a bias
    one = jnp.ones((*x.shape[:2], 1), features.dtype)
    features = jnp.concatenate([features, one], axis=-1)
  weight = mask.astype(jnp.float32)[..., None]
  features, target = features * weight, (stream - base) * weight
  left = target - jnp.einsum(
    "BLF,FD->BLD", features, prior.astype(jnp.float32), precision="highest"
  )
  return (
    second_moment(features, features),
    second_moment(features, left),
    jnp.sum(jnp.square(left)),
    jnp.sum(jnp.square(target)),
    target.sum((0, 1)),
    weight.sum(),
  )
