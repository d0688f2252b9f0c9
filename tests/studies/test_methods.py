"""Each method prunes to its saving, by the shapes of its model and its rules."""

import math

import jax
import pytest

from folding import config as c
from folding import paths
from folding.compression.sites import make_sites
from folding.errors import ConfigError
from folding.models.shape import shape_of
from folding.models.transformer import make_model, param_shapes
from folding.studies import methods
from folding.training.optimizer import make_rules
from folding.typed import edited

VOCAB = 300
BASES = {
  task: c.Config(
    task=task,
    data=c.DataConfig(vocab_size=VOCAB, length=16),
    model=c.ModelConfig(
      num_layers=2, width=64, num_heads=8, causal=task == "lm"
    ),
  )
  for task in ("lm", "classify")
}
SIZED = [name for name, m in methods.METHODS.items() if m.has_savings]


def make_config(name, task, saving):
  method = methods.METHODS[name]
  edits = {"pretrained": "RUN"} if method.after else {}
  base = edited(BASES[task], edits)
  return c.resolve(edited(base, method.edits(base, saving)))


def shapes(config):
  return param_shapes(
    make_model(shape_of(config), config.data.vocab_size, num_classes=2)
  )


def count(tree):
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def saved(config, base):
  """Returns the fraction of the base's dense parameters that a run saves."""
  found = shapes(config)
  own_dense, dense = (
    shapes(c.dense_baseline(config)),
    shapes(c.dense_baseline(base)),
  )
  rules = make_rules(shape_of(config), config.fpp, found, own_dense)
  leaves = paths.flatten(found)
  zeros = 0
  for site in make_sites(rules, found):
    units = math.prod(site.shape)
    size = sum(math.prod(leaves[name].shape) for name in site.members)
    zeros += int(rules[site.rule].target * units + 1e-6) * size // units
  return 1 - (count(found) - zeros) / count(dense)


@pytest.mark.parametrize(("task", "saving"), [("lm", 0.3), ("classify", 0.75)])
@pytest.mark.parametrize("name", SIZED)
def test_method_saves_its_saving(name, task, saving):
  # Whole neurons and heads are rounded down; a head is 1/8 of an array.
  slack = {"heads": 0.06, "neuron": 0.01, "ours": 0.01}.get(name, 0.002)
  config = make_config(name, task, saving)
  base = c.resolve(BASES[task])
  assert saved(config, base) == pytest.approx(saving, abs=slack)
  assert config.train == base.train


def test_methods_of_one_size_fold_alone_or_do_nothing():
  base = c.resolve(BASES["lm"])
  assert saved(make_config("dense", "lm", 0.0), base) == 0
  # W_Q and W_K keep 1 of 8 channels per head, W_V its diagonal.
  d, heads, layers = 64, 8, 2
  folded = layers * (2 * (d * d - d * heads) + d * d - d)
  biases = layers * 2 * (d - heads)  # of W_Q and W_K are folded as well
  dense = count(shapes(c.dense_baseline(base)))
  found = saved(make_config("fold", "lm", 0.0), base) * dense
  assert folded <= round(found) <= folded + biases + layers * d


@pytest.mark.parametrize(("saving", "groups"), [(0.4, 0), (0.41, 1)])
def test_ours_folds_queries_and_keys_above_40_percent(saving, groups):
  assert make_config("ours", "lm", saving).fold.groups == groups


def test_narrower_keeps_head_size_and_proportions():
  model = make_config("dense-small", "lm", 0.5).model
  assert model.head_dim == 8
  assert 0.85 < model.mlp_width / (4 * model.width) < 1.35
  assert 0.6 < model.width / 64 < 0.85  # about the root of a half


@pytest.mark.parametrize(
  ("edits", "saving", "message"),
  [
    ({}, 0.9999, "no dense model"),
    ({"model.mlp_width": (64, 32)}, 0.5, "one mlp_width"),
    ({"model.num_kv_heads": 2}, 0.5, "num_kv_heads"),
    ({"pretrained": "RUN"}, 0.5, "checkpoint"),
  ],
)
def test_narrower_refuses_models_without_a_narrower_one(edits, saving, message):
  with pytest.raises(ConfigError, match=message):
    methods.narrower(edited(BASES["lm"], edits), saving)


def test_pick_refuses_an_unknown_method():
  assert list(methods.pick("ours", "dense")) == ["ours", "dense"]
  with pytest.raises(ConfigError, match="no method 'luck'"):
    methods.pick("dense", "luck")
