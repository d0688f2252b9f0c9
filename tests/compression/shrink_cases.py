"""Small models and parameters for the tests of shrinking."""

from typing import Any, NamedTuple

import jax
import numpy as np

from folding import config as c
from folding.config import Config
from folding.models import shrink as shrink_lib
from folding.models.shape import shape_of, with_shape
from folding.models.transformer import make_model
from tests.models import oracle

N, D, H, K, F, V, C, L = 2, 16, 4, 4, 24, 11, 3, 6
TOKENS = np.random.default_rng(1).integers(0, V, (2, L)).astype(np.int32)
KEEP = np.arange(L) < np.array([[L], [4]])

IRC1 = {"groups": 1, "values": "diagonal"}
MODELS = {
  "bert_folded": (c.bert, "classify", IRC1, {}),
  "gpt2_folded": (c.gpt2, "lm", IRC1, {}),
  "gpt2": (c.gpt2, "lm", {}, {}),
  "llama_shared_keys": (c.llama, "lm", {}, {"num_kv_heads": 2}),
  "llama_pairs": (
    c.llama,
    "classify",
    {"groups": 2, "rope": "pairs", "values": "diagonal"},
    {"num_kv_heads": 2},
  ),
  "alibi_relu": (
    c.ModelConfig,
    "lm",
    IRC1 | {"values": ("dense", "diagonal")},
    {"activation": "relu"},
  ),
  "input_rows": (c.bert, "classify", {"groups": 2, "axis": "input"}, {}),
  "by_layer": (
    c.ModelConfig,
    "lm",
    {"groups": (0, 2), "values": ("identity", "dense")},
    {"mlp_width": (F, 30), "gated": True, "activation": "silu"},
  ),
}


def make_config(build, task, fold, fields):
  shape = {"num_layers": N, "width": D, "num_heads": H, "mlp_width": F}
  return c.resolve(
    c.Config(
      task=task,
      preset="none",
      data=c.DataConfig(length=L),
      model=build(**(shape | fields)),
      fold=c.FoldConfig(**fold),
    )
  )


def random_params(config, seed=0):
  """Returns parameters none of which is zero."""
  model = make_model(shape_of(config), V, C)
  tokens = jax.ShapeDtypeStruct((1, L), np.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  rng = np.random.default_rng(seed)

  def draw(x):
    return rng.uniform(0.1, 0.8, x.shape) * rng.choice([-1, 1], x.shape)

  return jax.tree.map(lambda x: draw(x).astype(np.float32), shapes)


def logits(config, params, tokens):
  model = make_model(shape_of(config), len(params["embed"]["embedding"]), C)
  return jax.jit(model.apply)({"params": params}, tokens, KEEP)


def oracle_logits(config, params, tokens):
  return oracle.Model(config, params)(tokens, KEEP)


class Small(NamedTuple):
  """`Shrunk`, with its shape as a config."""

  config: Config
  params: Any
  cut: Any


def shrink(config, params, **options):
  """Returns the shrunk model of a config."""
  small = shrink_lib.shrink(shape_of(config), params, **options)
  return Small(with_shape(config, small.shape), small.params, small.cut)
