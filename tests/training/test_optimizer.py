import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from folding import config as c
from folding import paths, schema
from folding.compression.sites import Rule, make_sites, unpack
from folding.training import optimizer
from tests.training import tiny


@pytest.mark.parametrize(
  ("steps", "warmup"), [(100, 0.1), (7, 0.5), (10, 0.0), (1, 0.05)]
)
def test_schedule_is_a_line_and_a_cosine(steps, warmup):
  train = c.TrainConfig(
    steps=steps, warmup=warmup, learning_rate=0.2, final_learning_rate=0.1
  )
  schedule = optimizer.make_schedule(c.Config(train=train))
  top = max(1, round(warmup * steps)) if warmup else 0
  for step in range(steps):
    if step < top:
      expected = 0.2 * step / top
    else:
      turn = math.pi * (step - top) / (steps - top)
      expected = 0.2 * (0.1 + 0.9 * (1 + math.cos(turn)) / 2)
    assert schedule(step) == pytest.approx(expected, rel=1e-5, abs=1e-8), step
    assert optimizer.current_rate(c.Config(train=train), step) == schedule(step)


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
        "embed/embedding": (0.7, "row"),  # positions are no tokens
      },
    ),
    (
      {
        "fpp": c.FPPConfig(
          **PARTS, exclude=r"(.*)/(attn|mlp)/(o|up)/kernel|embed/.*"
        )
      },
      {"blocks_0/mlp/down/kernel": (0.7, "weight")},
    ),
    (
      # Groups of the pattern must not be taken for those of the rule.
      {
        "fpp": c.FPPConfig(
          **PARTS, exclude="(?i)(EM)bed/.*", granularity="neuron"
        )
      },
      {
        "blocks_0/attn/o/kernel": (0.7, "weight"),
        "blocks_0/mlp/up/kernel": (0.7, "neuron"),
      },
    ),
    ({"fpp": c.FPPConfig(**PARTS, exclude=".*")}, {}),
  ],
  ids=[
    "none",
    "dense",
    "paper",
    "neuron-row",
    "untied-gated",
    "bert",
    "bert-row",
    "exclude",
    "exclude-neuron",
    "exclude-all",
  ],
)
def test_rules_of_a_config(fields, expected):
  assert tiny.rules_of(tiny.config(**fields)) == expected


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
    ({"embedding_score": "relative"}, "relative"),
    ({"embedding_granularity": "row", "embedding_score": "random"}, "random"),
  ],
)
def test_score_of_the_embedding(fields, expected):
  config = tiny.config(fpp=c.FPPConfig(**fields))
  of_tokens, others = [], set()
  for rule in tiny.make(config).rules:
    if re.fullmatch(rule.pattern, "embed/embedding"):
      of_tokens.append(rule.score)
    else:
      others.add(rule.score)
  assert of_tokens == [expected]
  assert others == {None}


def test_gradients_of_an_embedding_that_is_no_output_tell_usage():
  model = c.ModelConfig(
    num_layers=1, width=32, num_heads=4, tie_embeddings=False
  )
  config = tiny.config(fpp=c.FPPConfig(score="saliency"), model=model)
  [rule] = [r for r in tiny.make(config).rules if "embed" in r.pattern]
  assert rule.score == "magnitude"


def test_neurons_tie_all_their_arrays():
  config = tiny.config(
    model=c.ModelConfig(num_layers=1, width=32, num_heads=4, gated=True),
    fpp=c.FPPConfig(linear=0.5, embedding=0.0, granularity="neuron"),
  )
  rules = tiny.make(config).rules
  [site] = [s for s in make_sites(rules, tiny.shapes(config)) if s.rule == 0]
  assert site.members == {
    "blocks_0/mlp/up/kernel": 1,
    "blocks_0/mlp/up/bias": 0,
    "blocks_0/mlp/gate/kernel": 1,
    "blocks_0/mlp/gate/bias": 0,
    "blocks_0/mlp/down/kernel": 0,
  }


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"exclude": "nothing"}, "fpp.exclude: pattern 'nothing' matches no"),
    ({"exclude": "("}, r"fpp.exclude: pattern '\(' does not parse"),
    ({"overall": 0.99}, r"overall 0.99 cannot be reached: only [\d,]+ of"),
    ({"overall": 0.5, "exclude": ".*"}, "cannot be reached: only 0 of"),
    (
      {"exclude": ".*down/kernel", "granularity": "neuron"},
      "'blocks_0/mlp/down/kernel', which is pruned by neuron with .*whole MLP",
    ),
    (
      {"exclude": ".*q/kernel", "attention": "heads"},
      "'blocks_0/attn/q/kernel', which is pruned by head .*whole attention",
    ),
  ],
  ids=["no-match", "no-pattern", "overall", "all", "neuron", "head"],
)
def test_rules_that_cannot_be_are_refused(fields, match):
  fold = c.FoldConfig(v_block=0)  # or it would have no heads to prune
  config = tiny.config(fpp=c.FPPConfig(**fields), fold=fold)
  params, dense = tiny.shapes(config), tiny.shapes(c.dense_twin(config))
  with pytest.raises(schema.ConfigError, match=match):
    optimizer.make_rules(config, params, dense)


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
  no_grads = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(run.tx.update)(no_grads, run.tx.init(params), params)
  moved = optax.apply_updates(params, updates)
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
    optax.scale_by_learning_rate(optimizer.make_schedule(config)),
  )
  params = expected = tiny.noise(tiny.shapes(config))
  state, hand_state = run.tx.init(params), by_hand.init(params)
  for seed in range(3):
    grads = tiny.noise(params, seed)
    updates, state = run.tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    updates, hand_state = by_hand.update(grads, hand_state, expected)
    expected = optax.apply_updates(expected, updates)
  chex.assert_trees_all_close(params, expected, rtol=1e-6)


def test_frozen_gradients_do_not_count_in_the_clip():
  config = tiny.config(
    fpp=c.FPPConfig(
      begin=0.0, end=0.75, checks=3, score="magnitude", patience=3
    )
  )
  run = tiny.make(config)
  params = tiny.noise(tiny.shapes(config))
  update = jax.jit(run.tx.update)
  state = run.tx.init(params)
  for seed in range(3):  # checks at steps 0 and 2
    updates, state = update(tiny.noise(params, seed), state, params)
    params = optax.apply_updates(params, updates)
  name = "blocks_0/mlp/up/kernel"
  is_frozen = unpack(state.suspected[name][0], 128)
  assert 0 < is_frozen.sum() < is_frozen.size

  def with_huge(where):
    grads = tiny.noise(params, 3)
    w = grads["blocks_0"]["mlp"]["up"]["kernel"]
    grads["blocks_0"]["mlp"]["up"]["kernel"] = jnp.where(where, 1e6, w)
    return update(grads, state, params)

  plain = with_huge(False)
  chex.assert_trees_all_equal(with_huge(is_frozen), plain)
  # Had they counted, the norm would be dominated by them, as it is here:
  first = jnp.argmax(~is_frozen.reshape(-1))
  is_one = jnp.arange(is_frozen.size).reshape(is_frozen.shape) == first
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
def test_checks_are_those_that_fpp_makes(steps, begin, end, checks):
  config = c.Config(
    fpp=c.FPPConfig(begin=begin, end=end, checks=checks, score="magnitude"),
    train=c.TrainConfig(steps=steps),
  )
  first, end, every = optimizer.check_steps(config)
  last = end - (end - first) % every
  assert end < steps
  tx = optimizer.make_optimizer(config, [Rule("w", 0.5)])
  update = jax.jit(tx.update)
  state = tx.init({"w": jnp.zeros((8, 8))})
  for step in range(steps):
    # New weights at each step, so that each mask update chooses others.
    params = tiny.noise({"w": jnp.zeros((8, 8))}, step)
    updates, new = update(params, state, params)
    is_new = np.any(new.suspected["w"] != state.suspected["w"])
    is_empty = step == first != last  # the ramp starts at 0
    assert optimizer.is_check(config, step) == is_new or is_empty, step
    if step == last:
      pruned = optax.apply_updates(params, updates)
      assert np.count_nonzero(pruned["w"] == 0) == 32
    state = new
