"""Sensitivity of the output of a model to errors of each layer."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folding.models.block_attention import in_blocks
from folding.models.shape import Shape
from folding.models.transformer import Transformer, model_for
from folding.training.progress import track
from folding.training.sharding import put_like, put_whole
from folding.training.stream import (
  Batch,
  capture,
  changed_outputs,
  embed_batches,
  make_block,
  masks_of,
  second_moment,
  spread,
)

Sensitivities = Mapping[str, Any]  # see `sensitivities`

# Fraction of the mean eigenvalue of F that is added in all directions, as the first
# order misses some. MiniLM at 70% is equally accurate with 0.01, 0.1 and 1.
_REST = 0.1
_LOGITS = 2**22  # most next-token logits that exist at a time: 16 MiB
# Tokens of a language model to draw from; each token is a sample of its own.
_TOKENS = 8192
MODULES = {"o": "attn/o", "down": "mlp/down"}  # of `stream.OUTPUTS`


def sensitivities(
  shape: Shape, params: Mapping[str, Any], batches: Sequence[Batch]
) -> dict[str, jax.Array]:
  """Returns the sensitivity of the model to errors of each layer's outputs.

  To first order, an error e in a token's output of W_O ("o") or W_down ("down")
  changes the output of the model by J e. The square of that change is e' F e,
  with F = E[J' J]. J is the gradient of the logits times random signs; for a
  language model, of the log-likelihood of tokens drawn from its predictions; for
  an encoder without a head, of the vector of a text times random signs. A
  tenth of the mean eigenvalue of F is added in all directions.

  Args:
    shape: Shape of the model.
    params: Parameters of its dense baseline. Leave out an untrained head.
    batches: Calibration text.

  Returns:
    {path of W_O, W_down or the embedding of tokens: float32[D, D]}, split over
    the mesh of the batches like the parameters.
  """
  dense = shape.dense()
  if "head" not in params and shape.output != "tokens":
    dense = dataclasses.replace(dense, output="vector")
  model = model_for(dense, params)
  if shape.output == "tokens":
    sizes = [np.size(batch["tokens"]) for batch in batches]
    batches = spread(batches, sizes, _TOKENS)
  sums: dict[str, Any] = {}
  for seed, batch in enumerate(track(batches, "measuring sensitivities")):
    for name, found in _batch_sums(model, params, batch, seed):
      # Split like the kernel of this path.
      [found] = put_like({f"{name}/kernel": found}, batch["tokens"]).values()
      found = _added(sums[name], found) if name in sums else found
      sums[name] = jax.block_until_ready(found)  # see `halves`
  num_tokens = sum(int(mask.sum()) for mask in masks_of(batches))
  return {name: _mean(sums.pop(name), num_tokens) for name in list(sums)}


@functools.partial(jax.jit, donate_argnums=0)
def _added(sum_DD, found_DD):
  return sum_DD + found_DD


@functools.partial(jax.jit, donate_argnums=0)
def _mean(sum_DD, num_tokens):
  f_DD, D = sum_DD / num_tokens, len(sum_DD)
  return f_DD + _REST * jnp.trace(f_DD) / D * jnp.eye(D)


def shapes(shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes of `sensitivities`, by the kernel that each is split like."""
  names = [
    f"blocks_{n}/{path}/kernel"
    for n in range(shape.num_layers)
    for path in MODULES.values()
  ]
  sizes = dict.fromkeys(names, shape.width)
  sizes["embed/kernel"] = shape.embed_width or shape.width
  return {
    name: jax.ShapeDtypeStruct((size, size), jnp.float32)
    for name, size in sizes.items()
  }


def lowered(
  model: Transformer, params: Any, x: Any, mask: Any
) -> list[jax.stages.Lowered]:
  """Returns the programs of `sensitivities` that need most memory.

  Args:
    model: Dense.
    params: Shapes and shardings of its parameters.
    x: Shape and sharding of a batch of the stream.
    mask: The same of its mask.
  """
  block, top = make_block(model.shape, 0), model.read_out_params(params)
  return [
    _layer_sums.lower(block, params["blocks_0"], x, mask, x),
    _output_gradient.lower(model, top, x, mask, 0),
  ]


def _batch_sums(model, params, batch, seed) -> Iterator[tuple[str, jax.Array]]:
  """Yields paths, as `sensitivities`, and sums of J' J over the tokens of a batch.

  Only the input of each layer is stored. The backward pass computes the values
  inside a layer again.
  """
  tokens, segments = batch["tokens"], batch.get("segments")
  [first], [mask] = embed_batches(model.shape, params, [batch])
  x = [first]
  layers = [make_block(model.shape, n) for n in range(model.shape.num_layers)]

  def whole(part):
    return put_whole(part, mask)

  # Waits for each layer: a call that is queued holds a copy of its parameters.
  for n, layer in enumerate(layers):
    own = params[f"blocks_{n}"]
    seen = capture(layer, whole(own), x[-1], mask, outputs=("out",))
    x.append(jax.block_until_ready(seen["out"]))
  top = model.read_out_params(params)
  grad = _output_gradient(model, whole(top), x.pop(), mask, seed)
  for n, layer in reversed(list(enumerate(layers))):
    own = params[f"blocks_{n}"]
    grad, found = jax.block_until_ready(
      _layer_sums(layer, whole(own), x.pop(), mask, grad)
    )
    for module, path in MODULES.items():
      yield f"blocks_{n}/{path}", found[module]
  stem = {name: w for name, w in params.items() if "embed" in name}
  yield "embed", _embed_sums(model, stem, tokens, segments, mask, grad)


@functools.partial(jax.jit, static_argnums=0)
def _output_gradient(model, params, x_BLD, mask_BL, seed):
  """Returns the gradient of the sampled output by the output of the layers."""
  key = jax.random.key(seed)

  def output(x_BLD, mask_BL, key):
    out = model.apply({"params": params}, x_BLD, mask_BL, method="read_out")
    if model.shape.output != "tokens":
      return jnp.sum(out * jax.random.rademacher(key, out.shape, out.dtype))
    # As by `jax.random.categorical`, but an argmax is slow on CPUs.
    noisy = out + jax.random.gumbel(key, out.shape, out.dtype)
    is_drawn = noisy == noisy.max(axis=-1, keepdims=True)
    return jnp.sum(jax.nn.log_softmax(out) * is_drawn * mask_BL[..., None])

  if model.shape.output != "tokens":
    return jax.grad(output)(x_BLD, mask_BL, key)
  # The logits of one block of positions exist at a time.
  B, L, _ = x_BLD.shape
  count = min(L, -(-B * L * model.vocab_size // _LOGITS))
  parts = (*in_blocks((x_BLD, mask_BL), count), jax.random.split(key, count))
  grad_NBLD = jax.lax.map(lambda part: jax.grad(output)(*part), parts)
  return jnp.moveaxis(grad_NBLD, 0, 1).reshape(B, -1, x_BLD.shape[2])[:, :L]


@functools.partial(jax.jit, static_argnums=0)
def _layer_sums(block, params, x, mask, grad):
  """Returns the gradient by the input of a layer, and sums of J' J inside."""

  def run(x, errors):
    def add(out, name):
      return out + errors[name] if name in errors else out

    with changed_outputs(add):
      return block.apply({"params": params}, x, mask, True)

  errors = dict.fromkeys(MODULES, jnp.zeros(x.shape, jnp.float32))
  _, pull = jax.vjp(run, x, errors)
  grad, grads = pull(grad)
  return grad, jax.tree.map(functools.partial(_weighted_moment, mask), grads)


@functools.partial(jax.jit, static_argnums=0)
def _embed_sums(model, params, tokens, segments, mask, grad):
  """Returns sums of J' J for the embedding of tokens."""

  def run(error):
    with changed_outputs(
      lambda out, name: out + error if name == "embed" else out
    ):
      return model.apply(
        {"params": params}, tokens, segments_BL=segments, method="embed_tokens"
      )

  width = model.shape.embed_width or model.shape.width
  _, pull = jax.vjp(run, jnp.zeros((*tokens.shape, width), grad.dtype))
  return _weighted_moment(mask, *pull(grad))


def _weighted_moment(mask_BL, g_BLD):
  return second_moment(g_BLD * mask_BL[..., None], g_BLD)
