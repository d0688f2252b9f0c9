"""Small models, and their logits with and without a cache."""

import jax
import jax.numpy as jnp
import numpy as np

from folding import config as config_lib
from folding.models import cache as cache_lib
from folding.models import transformer

D, H, K, V, MOST = 16, 4, 4, 11, 24
LENGTHS = (3, 8, 5)  # of the prompts
B, LONGEST, STEPS = 3, 8, 6

gpt2, bert, llama = config_lib.gpt2, config_lib.bert, config_lib.llama
alibi = config_lib.ModelConfig


def make(build, fold, fields):
  """Returns a model of one layer, and variables with random parameters."""
  shape = {"num_layers": 1, "width": D, "num_heads": H, "mlp_width": 12}
  config = config_lib.resolve(
    config_lib.Config(
      preset="none",
      data=config_lib.DataConfig(length=MOST),
      model=build(**(shape | fields)),
      fold=config_lib.FoldConfig(**fold),
    )
  )
  model = transformer.make_model(config, V)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
  )
  rng = np.random.default_rng(0)
  leaves, tree = jax.tree.flatten(shapes["params"])
  # RoPE by pairs: the frequencies are parameters, and any will do.
  values = [jnp.asarray(0.5 * rng.normal(size=x.shape), "f4") for x in leaves]
  return model, {"params": jax.tree.unflatten(tree, values)}


def texts():
  """Returns rows with the prompts at the start, and how they are filled up."""
  rng = np.random.default_rng(1)
  texts_BL = rng.integers(0, V, (B, LONGEST + STEPS)).astype(np.int32)
  start_B = LONGEST - np.array(LENGTHS, np.int32)
  # What stands before a prompt must not matter.
  prompts_BL = rng.integers(0, V, (B, LONGEST)).astype(np.int32)
  for row, length in enumerate(LENGTHS):
    prompts_BL[row, LONGEST - length :] = texts_BL[row, :length]
  return texts_BL, jnp.asarray(prompts_BL), jnp.asarray(start_B)


def decoded(model, variables, num_slots):
  """Returns logits after the prompts and each of the next tokens, and cache."""
  texts_BL, prompts_BL, start_B = texts()
  at_BT = np.array(LENGTHS)[:, None] + np.arange(STEPS)
  next_TB = jnp.asarray(np.take_along_axis(texts_BL, at_BT, 1).T)

  @jax.jit
  def run(variables):
    first_BV, state = model.apply(
      variables, prompts_BL, start_B, method="prefill", mutable=["cache"]
    )

    def step(carry, tokens_B):
      cache, place = carry
      logits_BV, state = model.apply(
        variables | {"cache": cache},
        tokens_B,
        cache_lib.Step(place, start_B),
        method="decode",
        mutable=["cache"],
      )
      return (state["cache"], place + 1), logits_BV

    cache = cache_lib.resize(state["cache"], num_slots)
    carry = (cache, jnp.int32(LONGEST))
    (cache, _), rest_TBV = jax.lax.scan(step, carry, next_TB)
    return jnp.concatenate([first_BV[None], rest_TBV]), cache

  logits_TBV, cache = run(variables)
  return np.asarray(logits_TBV).swapaxes(0, 1), cache


def whole(model, params):
  """Returns the same logits from one pass without a cache."""
  texts_BL, _, _ = texts()
  logits_BLV = np.asarray(jax.jit(model.apply)(params, jnp.asarray(texts_BL)))
  at_BT = np.array(LENGTHS)[:, None] - 1 + np.arange(STEPS + 1)
  return np.take_along_axis(logits_BLV, at_BT[..., None], 1)
