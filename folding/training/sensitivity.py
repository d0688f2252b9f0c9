"""Sensitivity of the output of a model to errors of each layer."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from folding import config as config_lib
from folding.config import Config
from folding.models.transformer import model_for
from folding.tasks import task_of
from folding.training.stream import Batch, masks_of, second_moment, total
from folding.typed import edited

Sensitivities = Mapping[str, np.ndarray]  # see `sensitivities`

# Fraction of the mean eigenvalue of F that is added in all directions, as the first
# order misses some. MiniLM at 70% is equally accurate with 0.01, 0.1 and 1.
_REST = 0.1
MODULES = {"o": "attn/o", "down": "mlp/down"}  # of `stream.OUTPUTS`


def sensitivities(
  config: Config, params: Mapping[str, Any], batches: Sequence[Batch]
) -> dict[str, np.ndarray]:
  """Returns the sensitivity of the model to errors of each layer's outputs.

  To first order, an error e in a token's output of W_O ("o") or W_down ("down")
  changes the output of the model by J e. The square of that change is e' F e,
  with F = E[J' J]. J is the gradient of the logits times random signs; for a
  language model, of the log-likelihood of tokens drawn from its predictions; for
  an encoder without a head, of the vector of a text times random signs. A
  tenth of the mean eigenvalue of F is added in all directions.

  Args:
    config: Resolved.
    params: Parameters of its dense baseline. Leave out an untrained head.
    batches: Calibration text.

  Returns:
    {path of W_O, W_down or the embedding of tokens: float64[D, D]}.
  """
  # Errors are added by the path of a layer.
  dense = edited(
    config_lib.dense_baseline(config), {"model.scan_layers": False}
  )
  if "head" not in params and not task_of(config).predicts_tokens:
    dense = dataclasses.replace(dense, task="embed")
  model = model_for(dense, params)
  part = functools.partial(_sensitivity_sums, model, jax.device_put(params))
  masks = masks_of(batches)
  sums = total(
    part,
    [batch["tokens"] for batch in batches],
    masks,
    [batch.get("segments") for batch in batches],
    [jax.random.key(number) for number in range(len(batches))],
  )
  num_tokens = sum(int(mask.sum()) for mask in masks)

  def mean(sum_DD):
    f_DD, D = sum_DD / num_tokens, len(sum_DD)
    return f_DD + _REST * np.trace(f_DD) / D * np.eye(D)

  return jax.tree.map(mean, sums)


@functools.partial(jax.jit, static_argnums=0)
def _sensitivity_sums(model, params, tokens, mask, segments, key):
  def output(errors):
    def add(next_fun, args, kwargs, context):
      out, name = next_fun(*args, **kwargs), "/".join(context.module.path)
      is_call = context.method_name == "__call__"
      return out + errors[name] if is_call and name in errors else out

    with nn.intercept_methods(add):
      out = model.apply({"params": params}, tokens, mask, True, segments)
    if model.num_classes or model.embeds:
      return jnp.sum(out * jax.random.rademacher(key, out.shape, out.dtype))
    drawn = jax.lax.stop_gradient(jax.random.categorical(key, out))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(out), drawn[..., None], -1)
    return jnp.sum(chosen[..., 0] * mask)

  zero = jnp.zeros((*tokens.shape, model.config.width), jnp.float32)
  layers = range(model.config.num_layers)
  modules = [f"blocks_{n}/{m}" for n in layers for m in MODULES.values()]
  width = params["embed"]["embedding"].shape[1]
  zeros = {"embed": zero[..., :width], **dict.fromkeys(modules, zero)}
  grads = jax.grad(output)(zeros)
  weight = mask.astype(jnp.float32)[..., None]
  return jax.tree.map(lambda g: second_moment(g * weight, g), grads)
