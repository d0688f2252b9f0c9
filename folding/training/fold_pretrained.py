"""Folds a trained model, layer by layer, on calibration text.

Each layer is folded on top of the folded layers below it, and its output
projections are refitted so that the residual stream is that of the dense model
again. A layer so corrects the errors of the layers below.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.progress

from folding.compression import lowrank
from folding.compression.lowrank import Moments
from folding.compression.shrink import make_cut
from folding.config import Config, Layer, ModelConfig, dense_baseline, layers_of
from folding.data.trim import token_usage
from folding.errors import ConfigError
from folding.models.attention import attention_logits, layer_frequencies
from folding.models.transformer import Block, Transformer

# "tokens" int[B, L]; perhaps "mask" bool[B, L] and "segments" int[B, L]
Batch = Mapping[str, Any]
Params = Mapping[str, Any]

# {kernel of a block: module whose input it reads}; v and gate may be missing.
READS = {
  "attn/q": "q",
  "attn/k": "q",
  "attn/v": "q",
  "attn/o": "o",
  "mlp/up": "up",
  "mlp/gate": "up",
  "mlp/down": "down",
}
# Modules of a block whose inputs are the residual stream.
STREAMS = ("norm_attn", "norm_mlp")
OUTPUTS = ("o", "down")  # the last modules of its branches
_FIT_RATE = 0.03  # first learning rate of a fit, relative to an array's RMS
_FIT_CHECKS = 10  # evaluations of a fit on the held-out half


class Stream(NamedTuple):
  """What a layer reads of the calibration text, in batches.

  Attributes:
    x: float[B, L, D] each, the residual stream.
    masks: bool[B, L] each, True at tokens and False at padding.
  """

  x: Sequence[jax.Array]
  masks: Sequence[jax.Array]

  @property
  def num_tokens(self) -> int:
    """Number of tokens, padding left out."""
    return sum(int(mask.sum()) for mask in self.masks)


Matter = Mapping[str, np.ndarray]  # see `sensitivity.sensitivities`
Prune = Callable[[int, dict[str, Any], Stream], dict[str, Any]]


def fold_pretrained(
  config: Config,
  params: Params,
  batches: Iterable[Batch],
  *,
  prune: Prune | None = None,
  usage_V: np.ndarray | None = None,
  matter: Matter | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Returns the folded parameters of a trained dense model, and a report.

  From the first layer to the last:

  1. Heads that `model.heads` leaves out are removed, and W_O is refitted to the
     output of all (`keep_heads`).
  2. W_Q and W_K become the projections of G channels whose logits are nearest
     to the dense ones (`lowrank`), fitted to the dense attention weights
     (`fit_attention`). W_V becomes a diagonal of ones, or W_V and W_O those of
     rank r whose output is nearest.
  3. W_O and the second feed-forward matrix, with their biases, are refitted by
     least squares, so that the residual stream equals that of the dense model.
     Beside a diagonal W_V, W_O is fitted to the output of the dense layer on the
     same input.

  Before all layers the embedding becomes one of rank `fold.embedding_rank`, if
  set; the layers then make up for some of what that changes.

  A terminal shows a progress bar.

  Args:
    config: Resolved; `config.fold` sets the folding of each layer, and
      `config.model.heads` its heads.
    params: Parameters of `dense_baseline(config)`, NumPy or JAX arrays. Entries
      other than blocks are passed through.
    batches: {"tokens": int[B, L], optionally "mask": bool[B, L], True at
      tokens, and "segments" of pairs}. Some thousands of tokens, more than twice
      the width.
    prune: (number of a layer, its folded parameters, the stream that it reads)
      -> pruned parameters. Called before the second feed-forward matrix is
      fitted, which then makes up for the pruned weights.
    usage_V: How often each token occurs, above 0; None: as in the batches.
    matter: How errors count, see `sensitivity.sensitivities`; ranks are chosen by
      it. None: all alike.

  Returns:
    (params of `config`, [{"layer", "heads": their number, "groups", "values":
    kind or rank of W_V, "logits_kept": share of the variance of the logits before
    the fit (None on the input axis), "divergence": of the attention weights in
    nats, "attention_r2", "mlp_r2": share of the variance that the two
    regressions explain on held-out text}]).

  Raises:
    ConfigError: there is too little text, or trained weights cannot be folded
      so.
  """
  require_pairs(config)
  matter = matter or {}
  folded, report, dense = dict(params), [], dense_baseline(config)
  batches = list(batches)
  dense_stream = embed_batches(dense, params, batches)
  stream = dense_stream  # the same object until something is folded
  if rank := config.fold.embedding_rank:
    embedding_VD = params["embed"]["embedding"]
    if usage_V is None:
      usage_V = usage_of(batches, len(embedding_VD))
    folded |= lowrank.fold_embedding(
      embedding_VD, usage_V, rank, matter.get("embed")
    )
    stream = embed_batches(config, folded, batches)
  for n in layers_with_bar(config, "folding"):
    name, layer = f"blocks_{n}", layers_of(config.model, config.fold)[n]
    block = make_block(dense, n)
    target = look_all(
      block, params[name], dense_stream, STREAMS, outputs=OUTPUTS
    )
    out = Stream([seen["out"] for seen in target], stream.masks)
    if stream is dense_stream and layer == block.layer and prune is None:
      stream = dense_stream = out
      report.append({"layer": n, **_figures(layer)})
      continue
    folded[name], figures = fold_layer(
      config,
      n,
      params[name],
      stream,
      target=target,
      prune=prune,
      matter_DD=matter.get(f"{name}/attn/o"),
    )
    report.append({"layer": n, **figures})
    dense_stream = out
    stream = advance(make_block(config, n), folded[name], stream)
  return folded, report


def usage_of(batches: Sequence[Batch], size: int) -> np.ndarray:
  """Returns float32[size], `token_usage` of calibration text."""
  tokens = [
    np.asarray(batch["tokens"])[np.asarray(mask)]
    for batch, mask in zip(batches, masks_of(batches), strict=True)
  ]
  return token_usage(np.bincount(np.concatenate(tokens)), size)


def require_pairs(config: Config) -> None:
  """Raises `ConfigError` if rotary heads would be folded across pairs.

  Args:
    config: Resolved.

  Raises:
    ConfigError: so they would.
    ValueError: the config is not resolved.
  """
  layers = layers_of(config.model, config.fold)
  is_rotary = config.model.positions == "rope" and config.fold.axis == "output"
  if (
    is_rotary
    and config.fold.rope != "pairs"
    and any(layer.groups for layer in layers)
  ):
    raise ConfigError(
      "trained rotary heads are folded by pairs; use fold.rope='pairs' (and "
      "fold.groups even), or fold.groups=0"
    )


def layers_with_bar(config: Config, doing: str) -> Iterable[int]:
  """Returns the numbers of the layers, with a progress bar on a terminal."""
  console = rich.console.Console()
  return rich.progress.track(
    range(config.model.num_layers),
    description=f"{doing} layers",
    console=console,
    transient=True,
    disable=not console.is_terminal,
  )


# ---------------------------------------------------------------------------
# Calibration text on its way through the layers.


def embed_batches(
  config: Config, params: Params, batches: Sequence[Batch]
) -> Stream:
  """Returns the input of the first layer.

  Raises:
    ConfigError: there is too little text.
  """
  D, masks = config.model.width, masks_of(batches)
  num_tokens = Stream([], masks).num_tokens
  num_texts = sum(map(len, masks))
  if num_tokens <= 2 * D or num_texts < 2:
    raise ConfigError(
      f"calibration has {num_tokens:,} tokens in {num_texts:,} texts; the "
      f"moments of {D} channels need more than {2 * D:,} tokens and two texts"
    )
  stem = {name: w for name, w in params.items() if "embed" in name}
  vocabulary, positions = (
    len(stem[name]["embedding"]) if name in stem else 0
    for name in ("embed", "position_embed")
  )
  model = Transformer(config.model, config.fold, vocabulary, positions)
  embed = jax.jit(functools.partial(model.apply, method="embed_tokens"))
  x = [
    embed({"params": stem}, b["tokens"], segments_BL=b.get("segments"))
    for b in batches
  ]
  return Stream(x, masks)


def masks_of(batches: Sequence[Batch]) -> list[jax.Array]:
  """Returns bool[B, L] of each batch, True at tokens."""
  return [jnp.asarray(b.get("mask", b["tokens"] >= 0)) for b in batches]


def make_block(config: Config, n: int) -> Block:
  """Returns the module of layer n."""
  return Block(config.model, layers_of(config.model, config.fold)[n])


@functools.partial(jax.jit, static_argnames=("block", "names", "outputs"))
def look(block: Block, params, x, mask, names=(), outputs=()) -> dict[str, Any]:
  """Returns inputs and outputs of modules of a block, and its output as "out".

  Args:
    block: The layer.
    params: Its parameters.
    x: float[B, L, D], its input.
    mask: bool[B, L], False at padding.
    names: Modules whose input is returned.
    outputs: Modules whose output is returned.
  """
  seen = {}

  def watch(next_fun, args, kwargs, context):
    out, name = next_fun(*args, **kwargs), context.module.name
    if context.method_name == "__call__" and name in names:
      seen[name] = args[0]
    elif context.method_name == "__call__" and name in outputs:
      seen[name] = out
    return out

  with nn.intercept_methods(watch):
    out = block.apply({"params": params}, x, mask, True)
  return {**seen, "out": out}


def look_all(
  block: Block,
  params: Params,
  stream: Stream,
  names: tuple[str, ...] = (),
  outputs: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
  """Returns `look` of each batch."""
  return [
    look(block, params, x, mask, names=names, outputs=outputs)
    for x, mask in zip(*stream, strict=True)
  ]


def advance(block: Block, params: Params, stream: Stream) -> Stream:
  """Returns the stream after a layer."""
  seen = look_all(block, params, stream)
  return Stream([one["out"] for one in seen], stream.masks)


def halves(*data: Sequence[Any]) -> list[list[tuple[Any, ...]]]:
  """Returns every other text of batches, and the rest, as lists of batches.

  Texts of one length share a batch, so that each half has all lengths. A half
  leaves out batches in which it has no text.

  Args:
    data: Lists of one array per batch, with texts as rows.
  """
  found: list[list[tuple[Any, ...]]] = [[], []]
  for number, batch in enumerate(zip(*data, strict=True)):
    for half in range(2):
      rows = tuple(a[(half + number) % 2 :: 2] for a in batch)
      if len(rows[0]):
        found[half].append(rows)
  return found


def total(function: Callable[..., Any], *data: Sequence[Any]) -> Any:
  """Returns the sum of function(batch) over batches, in float64.

  Args:
    function: Returns a tree of arrays.
    data: As for `halves`.
  """
  sums = None
  for batch in zip(*data, strict=True):
    more = jax.tree.map(np.float64, function(*batch))
    sums = more if sums is None else jax.tree.map(np.add, sums, more)
  return sums


def second_moment(a_BLF: jax.Array, b_BLE: jax.Array) -> jax.Array:
  """Returns the sum of a b' over tokens, [F, E]."""
  # By default an accelerator rounds the factors to half of their digits.
  return jnp.einsum("BLF,BLE->FE", a_BLF, b_BLE, precision="highest")


def input_moments(
  block: Block,
  params: Params,
  stream: Stream,
  names: tuple[str, ...] = ("down", "o", "q", "up"),
) -> dict[str, Moments]:
  """Returns {module of a block: moments of its input}."""
  sums = total(functools.partial(_input_sums, block, names, params), *stream)
  return jax.tree.map(lambda a: a / stream.num_tokens, sums)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _input_sums(block, names, params, x, mask) -> dict[str, Moments]:
  seen = look(block, params, x, mask, names)

  def moments(a):
    a = a.astype(jnp.float32).reshape(*mask.shape, -1) * mask[..., None]
    return Moments(second_moment(a, a), a.sum((0, 1)))

  return {name: moments(seen[name]) for name in names}


# ---------------------------------------------------------------------------
# One layer.


def fold_layer(
  config: Config,
  n: int,
  old: Params,
  stream: Stream,
  *,
  target: Sequence[Mapping[str, jax.Array]],
  prune: Prune | None = None,
  matter_DD: np.ndarray | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the parameters of a folded layer, and its row of the report.

  Args:
    config: Resolved.
    n: Number of the layer.
    old: Its dense parameters.
    stream: What the folded layer reads.
    target: `look_all` of the dense layer on the dense stream, with `STREAMS` and
      `OUTPUTS`.
    prune: As for `fold_pretrained`.
    matter_DD: How errors of the output of W_O count; None: all alike.
  """
  m, layer = config.model, layers_of(config.model, config.fold)[n]
  block = make_block(config, n)
  attn, figures = _fold_attention(config, n, old, stream, matter_DD)
  new = {**old, "attn": attn}
  # The old W_O is no prior without the old W_V. Heads with other values serve
  # the layer's own output better than the errors of the layers below.
  has_prior = layer.values == "dense"
  wanted = target
  if not has_prior:
    dense = make_block(dense_baseline(config), n)
    wanted = look_all(dense, old, stream, STREAMS, outputs=OUTPUTS)
  data = (*stream, *_fit_data(m, "o", stream, wanted))
  attn["o"], figures["attention_r2"] = _refit(
    block, new, "o", data, has_prior=has_prior
  )
  if prune is not None:
    new = prune(n, new, stream)
  seen = look_all(block, new, stream, ("up", "norm_mlp"), outputs=OUTPUTS)
  data = (*stream, *_fit_data(m, "down", stream, target, seen))
  down, figures["mlp_r2"] = _refit(block, new, "down", data, has_prior=True)
  if prune is not None:  # exactly 0, as the fit is rounded
    stays = np.any(new["mlp"]["down"]["kernel"], axis=1, keepdims=True)
    down["kernel"] = np.where(stays, down["kernel"], 0)
  return {**new, "mlp": {**new["mlp"], "down": down}}, figures


def _fold_attention(
  config: Config,
  n: int,
  old: Params,
  stream: Stream,
  matter_DD: np.ndarray | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the attention of a folded layer, and the layer's report so far.

  W_O still has to be fitted.

  Args:
    config: Resolved.
    n: Number of the layer.
    old: Its dense parameters.
    stream: What the folded layer reads.
    matter_DD: As for `fold_layer`.
  """
  m, layer = config.model, layers_of(config.model, config.fold)[n]
  dense = make_block(dense_baseline(config), n)
  if layer.heads != dense.layer.heads:
    seen = input_moments(dense, old, stream, ("o",))["o"]
    old = {**old, "attn": keep_heads(old["attn"], seen, layer.heads)[0]}
    kept = {name: getattr(layer, name) for name in ("heads", "num_kv_heads")}
    dense = dense.clone(layer=dataclasses.replace(dense.layer, **kept))
  attn, figures = dict(old["attn"]), _figures(layer)
  if layer.groups:
    moments = head_moments(dense, old, stream)
    attn, figures["logits_kept"] = fold_logits(m, layer, attn, moments)
  if layer.values != "dense":
    del attn["v"]
  if layer.values == "diagonal":  # the fitted W_O can express any other
    attn["v"] = {"diagonal": np.ones((m.width, 1, 1), np.float32)}
  # The layer with all of W_V, from which that of low rank follows.
  whole = Block(m, dataclasses.replace(layer, value_dim=m.head_dim))
  if layer.groups:  # reads no values, but the block has to have its arrays
    attn, figures["divergence"] = fit_attention(
      (whole, {**old, "attn": attn}),
      (dense, old),
      stream,
      config.compress.fit_steps,
    )
  if layer.value_dim < m.head_dim:
    seen = input_moments(whole, {**old, "attn": attn}, stream, ("o",))["o"]
    low = lowrank.fold_values(
      attn["v"], attn["o"], seen, layer.value_dim, matter_DD=matter_DD
    )
    attn |= {"v": low.v, "o": low.o}
  return attn, figures


def keep_heads(
  attn: Params, moments: Moments, heads: Sequence[int]
) -> tuple[dict[str, Any], np.ndarray]:
  """Returns a dense attention layer with some of its heads, and what it lacks.

  Args:
    attn: Its parameters.
    moments: Moments of the input of W_O.
    heads: The heads that stay, in order, by whole groups that share a key.

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
    stream: What the layer reads.
    target: `look_all` of the layer to equal.
    seen: The same of the folded layer, for "down".
  """
  if m.norm_position == "both":
    # A norm after a branch hides its output from the stream.
    return [jnp.zeros_like(x) for x in stream.x], [one[role] for one in target]
  is_post = m.norm_position == "post"

  def middle(one):
    """Returns the stream between the branches; of parallel ones, its value."""
    if m.parallel:
      return one["norm_mlp"] + one["o"]
    return one["norm_attn" if is_post else "norm_mlp"]

  if role == "o":
    return stream.x, [middle(one) for one in target]
  return (
    [one["up"] if is_post else middle(one) for one in seen],
    [one["norm_mlp" if is_post else "out"] for one in target],
  )


def _figures(layer: Layer) -> dict[str, Any]:
  """Returns the report of a layer that equals the dense one."""
  values = layer.values
  if layer.value_dim < layer.head_dim:
    values = f"rank {layer.value_dim}"
  figures = {"heads": len(layer.heads), "groups": layer.groups}
  figures |= {"values": values, "logits_kept": 1.0}
  return figures | {"divergence": 0.0, "attention_r2": 1.0, "mlp_r2": 1.0}


class HeadMoments(NamedTuple):
  """E[a a'] of the input of attention, and around the mean of each text."""

  second: np.ndarray
  centred: np.ndarray


def head_moments(block: Block, params: Params, stream: Stream) -> HeadMoments:
  """Returns the moments of a layer's input that `fold_logits` needs."""
  sums = total(functools.partial(_moment_sums, block, params), *stream)
  return HeadMoments(*(a / stream.num_tokens for a in sums))


@functools.partial(jax.jit, static_argnums=0)
def _moment_sums(block, params, x, mask):
  a = look(block, params, x, mask, ("q",))["q"].astype(jnp.float32)
  weight = mask.astype(jnp.float32)[..., None]
  if "bias" in params["attn"]["q"]:
    a = jnp.concatenate([a, jnp.ones_like(a[..., :1])], axis=-1)
  mean = (a * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
  parts = (a * weight, (a - mean[:, None]) * weight)
  return [second_moment(part, part) for part in parts]


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
  # The variance of a constant target is rounding alone.
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
  features = look(block, params, x, mask, (role,))[role].astype(jnp.float32)
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


# ---------------------------------------------------------------------------
# Attention weights. The nearest logits, which moments give, do not have the
# nearest weights, as a softmax depends on the large logits.


class Fit(NamedTuple):
  """Parameters of a folded attention layer.

  Attributes:
    params: As given, with other arrays behind the logits.
    divergence: Nats, mean over heads and tokens of the held-out half.
  """

  params: dict[str, Any]
  divergence: float


def fit_attention(
  folded: tuple[Block, Params],
  dense: tuple[Block, Params],
  stream: Stream,
  steps: int,
) -> Fit:
  """Returns a layer whose attention weights are near those of a dense one.

  Adam on the mean of KL(dense weights || folded weights) over half of the
  texts moves W_Q, W_K, their biases and ALiBi's slopes. The best of the start
  and ten later points on the other half is returned, so the fit is never worse
  there than its start.

  Args:
    folded: Block and parameters, where the descent starts.
    dense: The same layer, dense.
    stream: What both layers read.
    steps: Number of steps, a batch each; 0 only measures the layer.
  """
  (block, params), (dense_block, aim) = folded, dense
  blocks, attn = (block, dense_block), dict(params["attn"])
  layers = jax.device_put((params, aim))  # once, not at each step
  names = [name for name in ("q", "k", "log_slopes") if name in attn]
  fitted = {name: layers[0]["attn"][name] for name in names}
  seen, held_out = halves(*stream)

  def measured(fitted):
    part = functools.partial(_divergence, blocks, fitted, layers)
    return float(np.divide(*total(part, *zip(*held_out, strict=True))))

  best = Fit(fitted, measured(fitted))
  state = _fit_optimizer(max(steps, 1)).init(fitted)
  for step in range(steps):
    fitted, state = _descend(
      fitted, state, layers, seen[step % len(seen)], blocks=blocks, steps=steps
    )
    if (step + 1) * _FIT_CHECKS // steps > step * _FIT_CHECKS // steps:
      now = measured(fitted)
      if now < best.divergence:
        best = Fit(fitted, now)
  return Fit(attn | jax.tree.map(np.asarray, best.params), best.divergence)


def _fit_optimizer(steps: int) -> optax.GradientTransformation:
  return optax.chain(
    optax.scale_by_adam(),
    optax.scale_by_param_block_rms(),
    optax.scale_by_learning_rate(optax.cosine_decay_schedule(_FIT_RATE, steps)),
  )


@functools.partial(jax.jit, static_argnames=("blocks", "steps"))
def _descend(fitted, state, layers, batch, *, blocks, steps):
  def loss(fitted):
    total, count = _divergence(blocks, fitted, layers, *batch)
    return total / jnp.maximum(count, 1)

  grads = jax.grad(loss)(fitted)
  updates, state = _fit_optimizer(steps).update(grads, state, fitted)
  return optax.apply_updates(fitted, updates), state


@functools.partial(jax.jit, static_argnums=0)
def _divergence(blocks, fitted, layers, x, mask):
  """Returns the summed divergence of the weights, and the number of rows."""
  (block, dense_block), (params, dense) = blocks, layers
  # Computed at each step, as those of all texts would take much memory.
  aim = jax.lax.stop_gradient(_logits(dense_block, dense, x, mask))
  attn = {**params["attn"], **fitted}
  ours = _logits(block, {**params, "attn": attn}, x, mask)
  log_aim = jax.nn.log_softmax(aim)
  far = jnp.exp(log_aim) * (log_aim - jax.nn.log_softmax(ours))
  rows = jnp.broadcast_to(mask[:, None], far.shape[:-1]).astype(jnp.float32)
  return jnp.sum(far.sum(-1) * rows), jnp.sum(rows)


def _logits(block, params, x, mask):
  """Returns the attention logits of a layer, [B, H, L, L]."""

  def logits(block: Block) -> jax.Array:
    position_L = jnp.arange(x.shape[1])
    q, k, _ = block.attn.project(block.attention_input(x), position_L)
    return attention_logits(
      q,
      k.transpose(0, 2, 3, 1),
      block.attn.bias(position_L, position_L),
      mask,
      **block.attn.logit_options,
    )

  return block.apply({"params": params}, method=logits)
