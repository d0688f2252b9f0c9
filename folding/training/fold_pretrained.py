"""Folds a trained model, layer by layer, on calibration text.

Each layer is folded as the layers below it are folded already, and what it
writes is refitted so that the residual stream is that of the dense model
again: errors of lower layers are corrected, not handed on.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from folding import config as config_lib
from folding.compression import lowrank
from folding.config import Config
from folding.models.attention import rope_frequencies
from folding.models.transformer import Block, Transformer
from folding.schema import require
from folding.training.fit_attention import fit_attention, halves, total

Batch = Mapping[str, Any]
Watch = Callable[[range], Iterable[int]]
Streams = list[jax.Array]
Prune = Callable[[int, dict[str, Any], Streams, Streams], dict[str, Any]]

# Modules of a block that read the residual stream: what a layer has to match.
STREAMS = ("norm_attn", "norm_mlp")


def fold_pretrained(
  config: Config,
  params: Mapping[str, Any],
  batches: Iterable[Batch],
  watch: Watch = iter,
  prune: Prune | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Returns the folded parameters of a trained dense model, and a report.

  From the first layer to the last: W_Q and W_K are replaced by the projections
  of G channels whose logits are nearest (`lowrank.fold_heads`, or
  `fold_rotary_heads` and `fold_input_rows`), which are fitted to the attention
  weights (`fit_attention`), W_V by a diagonal of ones; then W_O and the second
  feed-forward matrix, with their biases, are fitted by least squares, given
  the folded layers below, so that the residual stream after each equals that
  of the dense model; W_O beside a folded W_V so that attention writes what
  the dense layer would write on that stream.

  Args:
    config: Resolved; its `fold` says how to fold, layer by layer.
    params: Of `config_lib.dense_twin(config)`; NumPy or JAX arrays. Entries
      that are no blocks are handed through.
    batches: {"tokens": int[B, L], and perhaps "mask": bool[B, L], True at
      tokens}. Some thousands of tokens, more than twice the width.
    watch: Given the layers, hands them out one by one, as a progress bar does.
    prune: Given the number of a layer, its folded parameters, and the stream
      and tokens that it reads, returns pruned ones; what is left of the second
      feed-forward matrix is fitted after that, and so makes up for it.

  Returns:
    (params of `config`, [{"layer", "groups", "values", "logits_kept": share of
    the variance of the logits before they are fitted (None on the input axis),
    "divergence": of the attention weights, nats, "attention_r2", "mlp_r2":
    share of what the stream needed that the fit gives on text it was not made
    on}]).

  Raises:
    ConfigError: there is too little text, or the fold is not one of trained
      weights.
  """
  require_pairs(config)
  x, kept = embed_batches(config, params, list(batches))
  dense_x = x  # the very same, until something is folded
  folded, report = dict(params), []
  dense = config_lib.dense_twin(config)
  for n in watch(range(config.model.num_layers)):
    name, block = f"blocks_{n}", make_block(dense, n)
    target = look_all(block, params[name], dense_x, kept, STREAMS)
    out = [seen["out"] for seen in target]
    f = config_lib.layers_of(config.model, config.fold)[n]
    if x is dense_x and not (f.groups or f.values != "dense" or prune):
      x = dense_x = out
      report.append({"layer": n, **_figures(0, "dense")})
      continue
    folded[name], figures = fold_layer(
      config, n, params[name], x, target, kept, prune
    )
    report.append({"layer": n, **figures})
    dense_x = out
    seen = look_all(make_block(config, n), folded[name], x, kept)
    x = [one["out"] for one in seen]
  return folded, report


def require_pairs(config: Config) -> None:
  """Refuses rotary heads whose channels would be folded without their pairs.

  Args:
    config: Resolved.

  Raises:
    ConfigError: says so.
    ValueError: the config is not resolved.
  """
  f = config.fold
  layers = config_lib.layers_of(config.model, f)
  has_groups = any(layer.groups for layer in layers)
  is_turning = config.model.positions == "rope" and f.axis == "output"
  require(
    not (has_groups and is_turning) or f.rope == "pairs",
    "trained rotary heads are folded by pairs; use fold.rope='pairs' (and "
    "fold.groups even), or fold.groups=0",
  )


def embed_batches(
  config: Config, params: Mapping[str, Any], batches: list[Batch]
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Returns what the first layer reads, and which of it are tokens.

  Raises:
    ConfigError: there is too little text.
  """
  D = config.model.width
  kept = [jnp.asarray(b.get("mask", b["tokens"] >= 0)) for b in batches]
  num_tokens = sum(int(keep.sum()) for keep in kept)
  require(
    num_tokens > 2 * D and sum(map(len, kept)) > 1,
    f"calibration has {num_tokens:,} tokens in {sum(map(len, kept)):,} texts; "
    f"the moments of {D} channels need more than {2 * D:,} tokens, and two "
    "texts; give more",
  )
  stem = {name: w for name, w in params.items() if "embed" in name}
  vocabulary, positions = (
    len(stem[name]["embedding"]) if name in stem else 0
    for name in ("embed", "position_embed")
  )
  model = Transformer(config.model, config.fold, vocabulary, positions)
  embed = jax.jit(functools.partial(model.apply, method="embed_tokens"))
  return [embed({"params": stem}, b["tokens"]) for b in batches], kept


def fold_layer(config: Config, n: int, old, x, target, kept, prune=None):
  """Returns the parameters of a folded layer, and its figures."""
  m, f = config.model, config_lib.layers_of(config.model, config.fold)[n]
  block = make_block(config, n)
  attn = dict(old["attn"])
  figures = _figures(f.groups, f.values)
  dense = make_block(config_lib.dense_twin(config), n)
  if f.groups:
    heads = _heads(m, f, attn, *_moments(dense, old, x, kept))
    attn |= {"q": heads.q, "k": heads.k}
    figures["logits_kept"] = heads.kept
    if heads.frequency is not None and f.groups != m.head_dim:
      attn["frequency"] = heads.frequency
  if f.values != "dense":
    del attn["v"]
  if f.values == "diagonal":  # W_O, which is fitted, can express any other
    attn["v"] = {"diagonal": np.ones((m.width, 1, 1), np.float32)}
  if f.groups:  # values do not matter, but what is missing would
    attn, figures["divergence"] = fit_attention(
      *(block, {**old, "attn": attn}, dense, old, x, kept),
      steps=config.compress.fit_steps,
    )
  new = {**old, "attn": attn}
  is_post = m.norm_position == "post"

  def refit(role, projection, bases, streams, trusted):
    return _refit(
      block, new, (x, kept, bases, streams), role, projection, trusted
    )

  middle = "norm_attn" if is_post else "norm_mlp"
  # Without the old W_V, the old W_O says nothing of what the new one is, and
  # what heads of other values can express is better used for the layer's own
  # output than for the errors of those below.
  trusted, streams = f.values == "dense", target
  if not trusted:
    streams = look_all(dense, old, x, kept, STREAMS)
  attn["o"], figures["attention_r2"] = refit(
    "o", attn["o"], x, [seen[middle] for seen in streams], trusted
  )
  if prune is not None:
    new = prune(n, new, x, kept)
  seen = look_all(block, new, x, kept, ("up", "norm_mlp"))
  down, figures["mlp_r2"] = refit(
    "down",
    new["mlp"]["down"],
    [s["up" if is_post else "norm_mlp"] for s in seen],
    [s["norm_mlp" if is_post else "out"] for s in target],
    True,
  )
  if prune is not None:  # exactly: the fit is rounded
    stays = np.any(new["mlp"]["down"]["kernel"], axis=1, keepdims=True)
    down["kernel"] = np.where(stays, down["kernel"], 0)
  return {**new, "mlp": {**new["mlp"], "down": down}}, figures


def _figures(groups: int, values: str) -> dict[str, Any]:
  """Returns the report of a layer that is as good as the dense one."""
  figures = {"groups": groups, "values": values, "logits_kept": 1.0}
  return figures | {"divergence": 0.0, "attention_r2": 1.0, "mlp_r2": 1.0}


def _heads(m, f, attn, second, centred) -> lowrank.FoldedHeads:
  q, k = attn["q"], attn["k"]
  if f.axis == "input":
    rows = [lowrank.fold_input_rows(w, second, f.groups) for w in (q, k)]
    return lowrank.FoldedHeads(*rows, kept=None)
  if m.positions == "rope":
    frequencies = rope_frequencies(m.head_dim, m.rope_base, m.rope_scaling)
    return lowrank.fold_rotary_heads(
      q, k, second, second, f.groups, frequencies
    )
  return lowrank.fold_heads(q, k, second, centred, f.groups)


def make_block(config: Config, n: int) -> Block:
  """Returns the module of layer n."""
  m = config.model
  return Block(m, config_lib.layers_of(m, config.fold)[n])


@functools.partial(jax.jit, static_argnames=("block", "names"))
def look(block: Block, params, x, keep, names=()) -> dict[str, Any]:
  """Returns the inputs of modules of a block by name, and its output, "out"."""
  seen = {}

  def watch(next_fun, args, kwargs, context):
    if context.method_name == "__call__" and context.module.name in names:
      seen[context.module.name] = args[0]
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(watch):
    out = block.apply({"params": params}, x, keep, True)
  return {**seen, "out": out}


def look_all(block: Block, params, x, kept, names=()) -> list[dict[str, Any]]:
  """Returns what `look` does, of each batch."""
  return [
    look(block, params, *at, names=names) for at in zip(x, kept, strict=True)
  ]


def _moments(block, params, x, kept):
  """Returns E[a a'] of what attention reads, and around each text's mean."""
  sums = total(functools.partial(_moment_sums, block, params), x, kept)
  count = sum(int(keep.sum()) for keep in kept)
  return [a / count for a in sums]


@functools.partial(jax.jit, static_argnums=0)
def _moment_sums(block, params, x, keep):
  a = look(block, params, x, keep, ("q",))["q"].astype(jnp.float32)
  weight = keep.astype(jnp.float32)[..., None]
  if "bias" in params["attn"]["q"]:
    a = jnp.concatenate([a, jnp.ones_like(a[..., :1])], axis=-1)
  mean = (a * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
  parts = (a * weight, (a - mean[:, None]) * weight)
  return [_sum_of_products(part, part) for part in parts]


def _sum_of_products(a_BLF, b_BLE):
  # By default an accelerator rounds the factors to half of their digits.
  return jnp.einsum("BLF,BLE->FE", a_BLF, b_BLE, precision="highest")


def _refit(block, params, data, role, old, trusted):
  """Returns a last projection refitted so that base + output = stream."""
  kernel = np.asarray(old["kernel"], np.float64)
  width = kernel.shape[-1]
  size = kernel.size // width
  prior = np.zeros((size + ("bias" in old), width))
  if trusted:
    prior[:size] = kernel.reshape(-1, width)
    if "bias" in old:
      prior[size] = old["bias"]
  part = functools.partial(_fit_sums, block, params, role, prior)
  sums = [total(part, *zip(*half, strict=True)) for half in halves(*data)]
  gram, cross, left, square, target, count = (
    np.stack(pair) for pair in zip(*sums, strict=True)
  )
  square = square.sum()
  variance = square - np.square(target.sum(0)).sum() / count.sum()
  # What is constant has a variance of rounding alone.
  variance = max(variance, 1e-6 * square)
  fit = lowrank.regress(gram, cross, left, variance, prior)
  weights = fit.weights.astype(np.float32)
  new = {"kernel": weights[:size].reshape(kernel.shape)}
  if "bias" in old:
    new["bias"] = weights[size]
  return new, fit.r2


@functools.partial(jax.jit, static_argnums=(0, 2))
def _fit_sums(block, params, role, prior, x, keep, base, stream):
  """Returns sums over tokens: see `lowrank.regress`."""
  features = look(block, params, x, keep, (role,))[role].astype(jnp.float32)
  features = features.reshape(*x.shape[:2], -1)
  if len(prior) > features.shape[-1]:  # there is a bias
    one = jnp.ones((*x.shape[:2], 1), features.dtype)
    features = jnp.concatenate([features, one], axis=-1)
  weight = keep.astype(jnp.float32)[..., None]
  features, target = features * weight, (stream - base) * weight
  left = target - jnp.einsum(
    "BLF,FD->BLD", features, prior.astype(jnp.float32), precision="highest"
  )
  return (
    _sum_of_products(features, features),
    _sum_of_products(features, left),
    jnp.sum(jnp.square(left)),
    jnp.sum(jnp.square(target)),
    target.sum((0, 1)),
    weight.sum(),
  )
