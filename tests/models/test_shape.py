"""Shapes and the sections of a config that describe them."""

import dataclasses

import pytest

from folding import config as c
from folding.models.shape import shape_of, with_shape

SMALL = {"num_layers": 2, "width": 16, "num_heads": 4, "mlp_width": 24}
CONFIGS = {
  "paper": c.Config(model=c.ModelConfig(**SMALL)),
  "dense": c.Config(dense=True, model=c.gpt2(**SMALL)),
  "encoder": c.Config(task="embed", model=c.bert(**SMALL, segments=2)),
  "per_layer": c.Config(
    task="classify",
    preset="none",
    model=c.llama(
      **SMALL | {"mlp_width": (8, 16), "dense_mlp_width": 24},
      num_kv_heads=2,
      heads=((0, 1), (0, 1, 2, 3)),
      window=(0, 8),
      rope_base=(1e4, 1e6),
      qkv_bias=True,
    ),
    fold=c.FoldConfig(
      groups=(0, 2), rope="pairs", value_rank=(2, 0), embedding_rank=8
    ),
  ),
  "absorbed": c.Config(
    model=c.ModelConfig(**SMALL),
    fold=c.FoldConfig(groups=2, axis="input", values=("identity", "diagonal")),
  ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_with_shape_describes_what_shape_of_reads(config):
  shape = shape_of(config)
  other = dataclasses.replace(c.Config(task=config.task), data=config.data)
  assert shape_of(with_shape(other, shape)) == shape


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_dense_and_whole_are_the_shapes_of_such_configs(config):
  shape, whole = shape_of(config), _whole(c.filled(config))
  assert shape.whole() == shape_of(whole)
  assert shape.dense() == shape_of(dataclasses.replace(whole, dense=True))
  assert shape.dense().is_dense
  assert shape.is_dense == (config.dense is True)


def _whole(config):
  """Returns the config with all heads and neurons, and no absorbed W_V."""
  m, values = config.model, config.fold.values
  width = m.dense_mlp_width or m.mlp_width
  kinds = (values,) if isinstance(values, str) else values
  values = tuple("diagonal" if x == "identity" else x for x in kinds)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(
      m, mlp_width=width, dense_mlp_width=None, heads=None
    ),
    fold=dataclasses.replace(config.fold, values=c.joined(values)),
  )


def test_layers_of_a_shape_have_their_own_sizes():
  first, last = shape_of(CONFIGS["per_layer"]).layers
  assert (first.heads, first.num_kv_heads, last.num_kv_heads) == ((0, 1), 1, 2)
  assert (first.value_dim, last.value_dim) == (2, 4)
  assert (first.window, last.window) == (None, 8)
  kept = shape_of(CONFIGS["per_layer"]).whole(keeps_heads=True).layers[0]
  assert (kept.heads, kept.mlp_width) == ((0, 1), 24)
