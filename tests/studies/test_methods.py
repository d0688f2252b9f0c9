"""Each method, by the shapes of its model: is it as much smaller as it says?"""

import dataclasses

import jax
import numpy as np
import pytest

from folding import config as c
from folding.schema import ConfigError
from folding.studies.methods import METHODS, Method, edited, pick, small
from tests.studies.shapes import count, shapes, smaller

VOCAB = 300
BASES = {
  "lm": c.Config(
    data=c.DataConfig(vocab_size=VOCAB, length=16),
    model=c.ModelConfig(num_layers=2, width=64, num_heads=8),
  ),
  "classify": c.Config(
    task="classify",
    data=c.DataConfig(vocab_size=VOCAB, length=16),
    model=c.ModelConfig(num_layers=2, width=64, num_heads=8, causal=False),
  ),
}
AT_LEVEL = [n for n, m in METHODS.items() if m.kind == "level"]


@pytest.mark.parametrize(("base", "level"), [("lm", 0.3), ("classify", 0.75)])
@pytest.mark.parametrize("name", AT_LEVEL)
def test_a_method_saves_what_its_level_says(name, base, level):
  config = METHODS[name].config(BASES[base], level, 3, "RUN")
  config = c.resolve(config)
  assert config.seed == 3
  # Whole neurons and heads are rounded down; a head is 1/8 of an array.
  slack = {
    "heads": 0.06,
    "neuron": 0.01,
    **dict.fromkeys(("ours", "ours-forward", "ours-v"), 0.01),
    **dict.fromkeys(("diagonal-v", "fold-rows"), 0.01),
  }.get(name, 0.002)
  assert smaller(config) == pytest.approx(level, abs=slack)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", AT_LEVEL)
def test_all_that_a_method_leaves_alone_is_shared(name, base):
  config = METHODS[name].config(BASES[base], 0.5, 0, "RUN")
  assert config.model == BASES[base].model
  assert config.train == BASES[base].train
  data = dataclasses.replace(config.data, tokenizer="bpe")
  assert data == BASES[base].data


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "saved"), [("dense", 0.0), ("fold", None)])
def test_a_method_of_one_size(name, saved, base):
  config = c.resolve(METHODS[name].config(BASES[base], None, 0))
  found = smaller(config)
  if name == "fold":
    # W_Q, W_K: K numbers of a column become one; W_V keeps its diagonal.
    d, h, layers = 64, 8, 2
    qk = 2 * (d * d - d * h)
    folded = layers * (qk + d * d - d)
    assert found >= folded / count(shapes(c.dense_twin(config)))
    saved = found
  assert found == pytest.approx(saved, abs=0.002)


def test_a_method_of_one_size_does_not_prune_as_the_base_does():
  base = BASES["lm"]
  fields = {"overall": 0.5, "linear_layers": (0.5, 0.5)}
  changed = dataclasses.replace(base, fpp=c.FPPConfig(**fields))
  found = METHODS["fold"].config(changed, None, 0).fpp
  assert found == METHODS["fold"].config(base, None, 0).fpp


@pytest.mark.parametrize(("base", "level"), [("lm", 0.3), ("classify", 0.75)])
def test_the_small_dense_model_stores_what_a_level_leaves(level, base):
  base = BASES[base]
  config = c.resolve(METHODS["dense-small"].config(base, level, 0))
  assert config.dense
  assert config.model.head_dim == 8  # as in the large one
  assert config.model.num_layers == 2
  large = count(shapes(c.dense_twin(c.resolve(base))))
  # The nearest feed-forward width: at most half a neuron a layer off.
  neuron = 2 * config.model.width + 1
  found = count(shapes(config))
  assert abs(found - (1 - level) * large) <= neuron * 2 / 2 + 2


def test_the_small_dense_model_keeps_its_proportions():
  model = small(BASES["lm"], 0.5)
  assert 0.85 < model.mlp_width / (4 * model.width) < 1.35
  assert 0.6 < model.width / 64 < 0.85  # about the root of a half


def test_no_dense_model_is_that_small():
  with pytest.raises(ConfigError, match="no dense model"):
    small(BASES["lm"], 0.9999)


def test_where_little_is_saved_keys_and_queries_stay_dense():
  def groups(level):
    return c.resolve(METHODS["ours"].config(BASES["lm"], level, 0)).fold.groups

  assert [groups(x) for x in (0.2, 0.4, 0.41, 0.8)] == [0, 0, 1, 1]


def test_rows_store_as_many_numbers_as_columns():
  def kernels(name):
    config = c.resolve(METHODS[name].config(BASES["lm"], 0.7, 0))
    attn = shapes(config)["blocks_0"]["attn"]
    kernel = {k: v for k, v in attn["q"].items() if "bias" not in k}
    return max(np.prod(x.shape) for x in jax.tree.leaves(kernel))

  assert kernels("fold-rows") == kernels("ours") == 64 * 8


@pytest.mark.parametrize(
  ("edits", "message"),
  [
    ({"no.such": 1}, "there is no such"),
    ({"fpp.no_such": 1}, "no field 'no_such'"),
    ({"fpp.score": "luck"}, "must be one of"),
    ({"train.steps.x": 1}, "there is no such"),
  ],
)
def test_an_edit_of_nothing_is_told(edits, message):
  with pytest.raises(ConfigError, match=message):
    edited(c.Config(), edits)


def test_edits_that_fail_are_told():
  base = BASES["lm"]

  def edits(base, level):
    return {"fold.groups": base.model.head_dim // 2}  # None // 2

  method = Method("whatever", edits)
  with pytest.raises(ConfigError, match="edits of the method fail: TypeError"):
    method.config(base, 0.5, seed=0)


def test_edits_leave_the_base_alone():
  base = c.Config()
  found = edited(base, {"fpp.score": "random", "seed": 5})
  assert (found.fpp.score, found.seed) == ("random", 5)
  assert base == c.Config()
  Method("x", {"fpp.score": "random"}).config(base, 0.5, 1)
  assert base == c.Config()


def test_an_unknown_method_is_told():
  with pytest.raises(ConfigError, match="no method 'luck'; there are dense,"):
    pick("dense", "luck")
