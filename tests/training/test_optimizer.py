import dataclasses
import functools
import math

import chex
import jax
import numpy as np
import optax
import pytest

from folding import config as c
from folding import paths
from folding.compression.sites import Rule, make_sites, unpack
from folding.tasks import TASKS
from folding.training import optimizer
from tests.training import tiny


@pytest.mark.parametrize(
  ("steps", "warmup"), [(100, 0.1), (7, 0.5), (10, 0.0), (1, 0.05)]
)
def test_schedule_warms_up_then_follows_a_cosine(steps, warmup):
  train = c.TrainConfig(
    steps=steps, warmup=warmup, learning_rate=0.2, final_learning_rate=0.1
  )
  schedule = optimizer.make_schedule(train)
  top = max(1, round(warmup * steps)) if warmup else 0
  for step in range(steps):
    if step < top:
      expected = 0.2 * step / top
    else:
      turn = math.pi * (step - top) / (steps - top)
      expected = 0.2 * (0.1 + 0.9 * (1 + math.cos(turn)) / 2)
    assert schedule(step) == pytest.approx(expected, rel=1e-5, abs=1e-8), step


PARTS = {"linear": 0.7, "embedding": 0.7}
MLP = ("blocks_0/mlp/down/kernel", "blocks_0/mlp/up/kernel")
GATED = c.llama(num_layers=1, width=32, num_heads=4)


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"preset": "none", "fpp": c.FPPConfig()}, {}),
    ({"dense": True}, {}),
    (
      {},
      {
        "blocks_0/attn/o/kernel": (0.7, "weight"),
        **dict.fromkeys(MLP, (0.7, "weight")),
        "embed/embedding": (0.7, "weight"),
      },
    ),
    (
      {
        "fpp": c.FPPConfig(
          linear=0.5,
          embedding=0.2,
          granularity="neuron",
          embedding_granularity="row",
        )
      },
      {
        "blocks_0/attn/o/kernel": (0.5, "weight"),
        "blocks_0/mlp/up/kernel": (0.5, "neuron"),
        "embed/embedding": (0.2, "row"),
      },
    ),
    (
      {
        "model": GATED,
        "fpp": c.FPPConfig(linear=0.5, embedding=0.0, granularity="neuron"),
      },
      {
        "blocks_0/attn/o/kernel": (0.5, "weight"),
        "blocks_0/mlp/up/kernel": (0.5, "neuron"),
        "head/kernel": (0.5, "weight"),
      },
    ),
    (
      {
        "task": "classify",
        "model": c.bert(num_layers=1, width=32),
        "fpp": c.FPPConfig(**PARTS),
      },
      {
        "blocks_0/attn/o/kernel": (0.7, "weight"),
        **dict.fromkeys(MLP, (0.7, "weight")),
        "embed/embedding": (0.7, "weight"),
        "position_embed/embedding": (0.7, "weight"),
      },
    ),
    (
      {
        "task": "classify",
        "model": c.bert(num_layers=1, width=32),
        "fpp": c.FPPConfig(**PARTS, embedding_granularity="row"),
      },
      {
        "blocks_0/attn/o/kernel": (0.7, "weight"),
        **dict.fromkeys(MLP, (0.7, "weight")),
        "embed/embedding": (0.7, "row"),  # positions are not tokens
      },
    ),
  ],
  ids=[
    "none",
    "dense",
    "paper",
    "neuron-row",
    "untied-gated",
    "bert",
    "bert-row",
  ],
)
def test_rules_of_a_config(fields, expected):
  assert tiny.rules_of(tiny.config(**fields)) == expected


@pytest.mark.parametrize("prune", ["none", "sparsegpt"])
def test_embedding_of_a_set_rank_keeps_all_tokens(prune):
  fields = {
    "task": "classify",
    "preset": "none",
    "pretrained": "RUN",
    "model": c.bert(num_layers=1, width=32, num_heads=4),
    "fpp": c.FPPConfig(
      saving=0.5,
      granularity="neuron",
      attention="none",
      embedding_granularity="rank",
    ),
    "compress": c.CompressConfig(prune=prune),
  }
  fold = c.FoldConfig(groups=4, value_rank=4, embedding_rank=8)
  config = tiny.config(**fields, fold=fold)
  [(name, (neurons, _))] = tiny.rules_of(config).items()
  assert name == "blocks_0/mlp/up/kernel"  # which saves all the rest
  size, dense = (
    sum(x.size for x in jax.tree.leaves(tiny.shapes(each)))
    for each in (config, c.dense_baseline(config))
  )
  saved = neurons * (2 * 32 + 1) * 128  # a row, a column and a bias each
  assert size - saved == pytest.approx(0.5 * dense)


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({}, "magnitude"),
    ({"score": "activation"}, "magnitude"),
    ({"embedding_granularity": "row"}, "activation"),
    ({"embedding_granularity": "row", "score": "saliency"}, "activation"),
    ({"embedding_granularity": "row", "score": "movement"}, "activation"),
    ({"score": "movement"}, "magnitude"),
    ({"score": "saliency"}, None),
  ],
)
def test_embedding_rule_has_the_score_of_its_kind(fields, expected):
  config = tiny.config(fpp=c.FPPConfig(**fields))
  scores = {rule.pattern: rule.score for rule in tiny.make(config).rules}
  assert scores.pop("embed/embedding") == expected
  assert set(scores.values()) == {None}


def test_untied_embedding_is_not_pruned_by_saliency():
  model = c.ModelConfig(
    num_layers=1, width=32, num_heads=4, tie_embeddings=False
  )
  config = tiny.config(fpp=c.FPPConfig(score="saliency"), model=model)
  [rule] = [r for r in tiny.make(config).rules if "embed" in r.pattern]
  assert rule.score == "magnitude"


def test_neuron_rule_ties_all_its_arrays():
  config = tiny.config(
    model=c.ModelConfig(num_layers=1, width=32, num_heads=4, gated=True),
    fpp=c.FPPConfig(linear=0.5, embedding=0.0, granularity="neuron"),
  )
  sites = make_sites(tiny.make(config).rules, tiny.shapes(config))
  [members] = [s.members for s in sites if s.name == "blocks_0/mlp/up/kernel"]
  assert members == {
    "blocks_0/mlp/up/kernel": 1,
    "blocks_0/mlp/up/bias": 0,
    "blocks_0/mlp/gate/kernel": 1,
    "blocks_0/mlp/gate/bias": 0,
    "blocks_0/mlp/down/kernel": 0,
  }


def test_weight_decay_acts_on_matrices_alone():
  config = tiny.config(
    task="classify",
    preset="none",
    model=c.bert(num_layers=1, width=32, num_heads=4),
    train=c.TrainConfig(
      steps=8, learning_rate=0.1, warmup=0.0, weight_decay=0.5
    ),
  )
  run = tiny.make(config)
  params = tiny.noise(tiny.shapes(config))
  no_grads = jax.tree.map(np.zeros_like, params)
  update = jax.jit(functools.partial(run.tx.update, is_due=False))
  updates, _ = update(no_grads, jax.jit(run.tx.init)(params), params)
  moved = jax.tree.map(np.add, params, updates)
  before, after = paths.flatten(params), paths.flatten(moved)
  for name, w in before.items():
    is_matrix = name.endswith(("/kernel", "/embedding"))
    expected = w * (1 - 0.1 * 0.5) if is_matrix else w
    np.testing.assert_allclose(after[name], expected, 1e-6, err_msg=name)


def test_without_rules_it_is_adamw_after_a_clip():
  config = tiny.config(preset="none", fpp=c.FPPConfig())
  run, t = tiny.make(config), config.train
  by_hand = optax.chain(
    optax.clip_by_global_norm(t.clip_norm),
    optax.scale_by_adam(t.b1, t.b2),
    optax.add_decayed_weights(
      t.weight_decay,
      lambda p: paths.map_named(
        lambda n, _: n.endswith(("/kernel", "/embedding", "/diagonal")), p
      ),
    ),
    optax.scale_by_learning_rate(optimizer.make_schedule(config.train)),
  )
  params = expected = tiny.noise(tiny.shapes(config))
  state = jax.jit(run.tx.init)(params)
  hand_state = jax.jit(by_hand.init)(params)
  update, hand_update = jax.jit(run.tx.update), jax.jit(by_hand.update)
  for seed in range(3):
    grads = tiny.noise(params, seed)
    updates, state = update(grads, state, params)
    params = jax.tree.map(np.add, params, updates)
    updates, hand_state = hand_update(grads, hand_state, expected)
    expected = jax.tree.map(np.add, expected, updates)
  chex.assert_trees_all_close(params, expected, rtol=1e-6)


def test_muon_orthogonalises_kernels_of_layers_and_leaves_the_rest_to_adam():
  def first_update(name):
    train = c.TrainConfig(
      optimizer=name, learning_rate=0.1, warmup=0.0, weight_decay=0.0
    )
    fold = c.FoldConfig(groups=4)
    run = tiny.make(
      tiny.config(preset="none", fpp=c.FPPConfig(), fold=fold, train=train)
    )
    params = tiny.noise(tiny.shapes(run.config))
    grads = tiny.noise(params, 1)
    state = jax.jit(run.tx.init)(params)
    updates, _ = jax.jit(run.tx.update)(grads, state, params)
    return paths.flatten(grads), paths.flatten(updates)

  (grads, muon), (_, adamw) = first_update("muon"), first_update("adamw")
  kernels = {
    "attn/q": lambda w: np.moveaxis(w, 1, 0),  # a matrix for each head
    "attn/k": lambda w: np.moveaxis(w, 1, 0),
    "attn/v": lambda w: np.moveaxis(w, 1, 0),
    "attn/o": lambda w: w.reshape(1, -1, w.shape[-1]),
    "mlp/up": lambda w: w[None],
    "mlp/down": lambda w: w[None],
  }
  kernels = {f"blocks_0/{n}/kernel": each for n, each in kernels.items()}
  for name, update in muon.items():
    if name not in kernels:
      np.testing.assert_allclose(update, adamw[name], 1e-5, err_msg=name)
      continue
    grad, update = (
      kernels[name](np.asarray(x, np.float64)) for x in (grads[name], update)
    )
    u, s, vh = np.linalg.svd(grad, full_matrices=False)
    scale = 0.1 * 0.2 * math.sqrt(max(grad.shape[1:]))
    found = np.einsum("hdr,hde,hse->hrs", u, -update / scale, vh)
    values = np.einsum("hrr->hr", found)
    # Newton-Schulz brings singular values near 1, except the smallest.
    is_large = s > 0.02 * s.max()
    assert is_large.mean() > 0.5, name
    assert (abs(values[is_large] - 1) < 0.45).all(), (name, values)
    rest = found - values[..., None] * np.eye(values.shape[-1])
    np.testing.assert_allclose(rest, 0, atol=2e-3, err_msg=name)


def test_frozen_gradients_do_not_count_in_the_clip():
  config = tiny.config(
    fpp=c.FPPConfig(
      begin=0.0, end=0.75, checks=3, score="magnitude", patience=3
    )
  )
  run = tiny.make(config)
  params = tiny.noise(tiny.shapes(config))
  update = jax.jit(run.tx.update)
  state = jax.jit(run.tx.init)(params)
  for seed in range(3):  # mask updates at steps 0 and 2
    updates, state = update(tiny.noise(params, seed), state, params)
    params = jax.tree.map(np.add, params, updates)
  name = "blocks_0/mlp/up/kernel"
  is_frozen = np.asarray(unpack(state.suspected[name][0], 128))
  assert 0 < is_frozen.sum() < is_frozen.size

  def with_huge(where):
    grads = tiny.noise(params, 3)
    w = grads["blocks_0"]["mlp"]["up"]["kernel"]
    grads["blocks_0"]["mlp"]["up"]["kernel"] = np.where(
      where, np.float32(1e6), w
    )
    return jax.device_get(update(grads, state, params))

  plain = with_huge(False)
  chex.assert_trees_all_equal(with_huge(is_frozen), plain)
  # If frozen elements counted, they would dominate the norm, as this one does:
  first = np.argmax(~is_frozen.reshape(-1))
  is_one = np.arange(is_frozen.size).reshape(is_frozen.shape) == first
  counted, _ = with_huge(is_one & ~is_frozen)
  shrunk = np.abs(counted["norm_final"]["scale"])
  assert (shrunk < np.abs(plain[0]["norm_final"]["scale"])).all()


@pytest.mark.parametrize(
  ("steps", "begin", "end", "checks"),
  [
    (23, 0.1, 0.7, 5),
    (10, 0.0, 1.0, 30),
    (40, 0.5, 0.9, 7),
    (1, 0.1, 0.7, 30),
    (30, 0.29, 0.58, 1),
  ],
)
def test_mask_updates_are_those_of_fpp(steps, begin, end, checks):
  config = c.Config(
    fpp=c.FPPConfig(begin=begin, end=end, checks=checks, score="magnitude"),
    train=c.TrainConfig(steps=steps),
  )
  due = optimizer.mask_updates(config)
  first, last = due[0], due[-1]
  assert due.stop <= steps
  assert len(due) - 1 <= checks
  tx = optimizer.make_optimizer(config, [], [Rule("w", 0.5)])
  update = jax.jit(tx.update)
  like = {"w": np.zeros((8, 8), np.float32)}
  state = jax.device_get(jax.jit(tx.init)(like))
  for step in range(steps):
    # New weights at each step, so that each mask update chooses others.
    params = tiny.noise(like, step)
    updates, new = jax.device_get(update(params, state, params))
    is_new = np.any(new.suspected["w"] != state.suspected["w"])
    is_empty = step == first != last  # the ramp starts at 0
    assert (step in due) == is_new or is_empty, step
    if step == last:
      assert np.count_nonzero(params["w"] + updates["w"] == 0) == 32
    state = new


@pytest.mark.parametrize(
  ("model", "fpp"),
  [
    ({}, {}),
    ({"tie_embeddings": False}, {}),
    ({"gated": True}, {"granularity": "neuron"}),
    ({}, {"embedding_granularity": "row"}),
    ({}, {"embedding": 0.6}),
  ],
  ids=["plain", "untied", "neuron", "row", "embedding"],
)
def test_overall_is_the_fraction_saved_at_the_end(model, fpp):
  config = tiny.config(
    model=c.ModelConfig(num_layers=1, width=32, num_heads=4, **model),
    fpp=c.FPPConfig(saving=0.35, score="magnitude", **fpp),
    train=c.TrainConfig(steps=1),  # so that its one mask update is the last
  )
  run = tiny.make(config)
  params = tiny.noise(tiny.shapes(config))
  no_grads = jax.tree.map(np.zeros_like, params)
  usage = {"embed/embedding": np.ones(tiny.VOCAB, np.float32)}
  updates, _ = jax.jit(run.tx.update)(
    no_grads, jax.jit(run.tx.init)(params), params, stats=usage
  )
  params = jax.tree.map(np.add, params, updates)
  stored = sum(np.count_nonzero(x) for x in jax.tree.leaves(params))
  dense = tiny.shapes(c.dense_baseline(config))
  total = sum(x.size for x in jax.tree.leaves(dense))
  # Each site falls short of its target by less than one of its units: a
  # weight, an embedding's row of 32, or a neuron of 3 x 32 weights, 2 biases.
  sites = make_sites(run.rules, params)
  granularities = [run.rules[s.rule].granularity for s in sites]
  short = sum({"weight": 1, "row": 32, "neuron": 98}[g] for g in granularities)
  assert 0 <= stored - (1 - 0.35) * total < short


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 2.0])
def test_embeddings_keep_a_power_of_the_share_of_linear_layers(share):
  fpp = c.FPPConfig(saving=0.6, embedding_share=share)
  targets = {
    n: found[0] for n, found in tiny.rules_of(tiny.config(fpp=fpp)).items()
  }
  embedding = targets.pop("embed/embedding", 0.0)
  (linear,) = set(targets.values())
  assert 1 - embedding == pytest.approx((1 - linear) ** share, abs=1e-12)


def test_embedding_given_beside_overall_is_pruned_so_far():
  config = tiny.config(fpp=c.FPPConfig(saving=0.6, embedding=0.3))
  assert tiny.rules_of(config)["embed/embedding"][0] == pytest.approx(0.3)


@pytest.mark.parametrize(
  ("saving", "share", "emptied"),
  [(0.6, 1e9, "embed/embedding"), (0.95, 0.01, "blocks_0/mlp/up/kernel")],
)
def test_extreme_share_leaves_a_target_below_1(saving, share, emptied):
  fpp = c.FPPConfig(saving=saving, embedding_share=share)
  found = tiny.rules_of(tiny.config(fpp=fpp))
  assert 0.999999 < found[emptied][0] < 1


@pytest.mark.parametrize("task", TASKS)
def test_share_of_embeddings_depends_on_the_task(task):
  share = c.resolve(c.Config(task=task)).fpp.embedding_share
  assert share == (0.2 if task == "lm" else 1.0)


def test_no_rules_if_folding_saves_enough():
  assert tiny.rules_of(tiny.config(fpp=c.FPPConfig(saving=0.01))) == {}


def test_folded_projections_and_slopes_have_their_own_rates():
  config = tiny.config(
    fold=c.FoldConfig(groups=(0, 1), values=("diagonal", "dense")),
    model=c.ModelConfig(num_layers=2, width=32, num_heads=4),
    train=c.TrainConfig(qk_rate=0.25, v_rate=4.0, slope_rate=8.0, warmup=0.0),
  )
  plain = c.TrainConfig(qk_rate=1.0, v_rate=1.0, slope_rate=1.0, warmup=0.0)
  params = tiny.noise(tiny.shapes(config))

  def second_update(config):
    tx = tiny.make(config).tx
    update = jax.jit(functools.partial(tx.update, is_due=False))
    _, state = update(tiny.noise(params, 1), jax.jit(tx.init)(params), params)
    updates, _ = update(tiny.noise(params, 2), state, params)
    return paths.flatten(jax.device_get(updates))

  updates = second_update(config)
  without = second_update(dataclasses.replace(config, train=plain))
  changed = {
    **dict.fromkeys(
      ["blocks_0/attn/log_slopes", "blocks_1/attn/log_slopes"], 8
    ),
    "blocks_0/attn/v/diagonal": 4,
    **{
      f"blocks_1/attn/{q}/{part}": 0.25
      for q in "qk"
      for part in ("kernel", "bias")
    },
  }
  assert changed.keys() <= updates.keys()
  for name, update in updates.items():
    assert np.any(update != 0), name
    # Powers of two, so exact.
    np.testing.assert_array_equal(
      update, changed.get(name, 1) * without[name], err_msg=name
    )
