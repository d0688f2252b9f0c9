"""`fpp.overall`: what the whole model saves, and who pays for it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from folding import config as c
from folding.compression.sites import make_sites
from folding.training.planner import outer_fractions
from tests.training import tiny


@pytest.mark.parametrize(
  ("model", "fpp"),
  [
    ({}, {}),
    ({"tie_embeddings": False}, {}),
    ({}, {"exclude": "embed/.*"}),
    ({"gated": True}, {"granularity": "neuron"}),
    ({}, {"embedding_granularity": "row"}),
    ({}, {"embedding_share": 1.0}),
    ({}, {"embedding_share": 0.0}),
  ],
  ids=["plain", "untied", "exclude", "neuron", "row", "alike", "linear-alone"],
)
def test_overall_is_what_is_saved_in_the_end(model, fpp):
  config = tiny.config(
    model=c.ModelConfig(num_layers=1, width=32, num_heads=4, **model),
    fpp=c.FPPConfig(overall=0.35, score="magnitude", **fpp),
    train=c.TrainConfig(steps=1),  # so that its one check is the last
  )
  run = tiny.make(config)
  params = tiny.noise(tiny.shapes(config))
  no_grads = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(run.tx.update)(no_grads, run.tx.init(params), params)
  params = optax.apply_updates(params, updates)
  stored = sum(np.count_nonzero(x) for x in jax.tree.leaves(params))
  dense = tiny.shapes(c.dense_twin(config))
  total = sum(x.size for x in jax.tree.leaves(dense))
  # Each site falls short of its target by less than one of its units: a
  # weight, an embedding's row of 32, or a neuron of 3 x 32 weights, 2 biases.
  sites = make_sites(run.rules, params)
  granularities = [run.rules[s.rule].granularity for s in sites]
  short = sum({"weight": 1, "row": 32, "neuron": 98}[g] for g in granularities)
  assert 0 <= stored - (1 - 0.35) * total < short


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 2.0])
def test_embeddings_keep_a_power_of_what_linear_layers_keep(share):
  fpp = c.FPPConfig(overall=0.6, embedding_share=share)
  targets = {
    n: found[0] for n, found in tiny.rules_of(tiny.config(fpp=fpp)).items()
  }
  embedding = targets.pop("embed/embedding", 0.0)
  (linear,) = set(targets.values())
  assert 1 - embedding == pytest.approx((1 - linear) ** share, abs=1e-12)


def test_a_share_may_be_so_large_that_no_embedding_is_kept():
  fpp = c.FPPConfig(overall=0.6, embedding_share=1e9)
  found = tiny.rules_of(tiny.config(fpp=fpp))
  assert 0.999999 < found["embed/embedding"][0] < 1


def test_a_share_may_be_so_small_that_no_linear_layer_is_kept():
  fpp = c.FPPConfig(overall=0.95, embedding_share=0.01)
  found = tiny.rules_of(tiny.config(fpp=fpp))
  assert 0.999999 < found["blocks_0/mlp/up/kernel"][0] < 1
  assert found["embed/embedding"][0] < 0.99


def test_a_plan_leaves_some_of_the_embedding():
  config = c.Config(fpp=c.FPPConfig(overall=0.6, embedding_share=50.0))
  linear, embedding = outer_fractions(c.resolve(config))
  assert linear == 0.6
  assert 0.999999 < embedding < 1


@pytest.mark.parametrize(("task", "share"), [("lm", 0.2), ("classify", 1.0)])
def test_the_share_of_embeddings_depends_on_the_task(task, share):
  assert c.resolve(c.Config(task=task)).fpp.embedding_share == share


def test_folding_alone_may_save_enough():
  assert tiny.rules_of(tiny.config(fpp=c.FPPConfig(overall=0.01))) == {}
