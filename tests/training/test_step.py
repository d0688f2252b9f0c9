import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from folding import config as c
from folding import paths
from folding.config import MeshConfig
from folding.training import losses, sharding
from folding.training import step as step_lib
from tests.training import tiny

# One step of it takes the gradient off the parameters.
SGD = optax.with_extra_args_support(optax.sgd(1.0))


@pytest.fixture(scope="module")
def run():
  return tiny.make(tiny.config())


@pytest.fixture(scope="module")
def start(run):
  """Returns the state before the first step."""
  return run.init()


@pytest.fixture(scope="module")
def gradient(run):
  """Returns a function to the gradient that a step uses, and its metrics."""
  steps = {
    is_check: run.step(is_check, tx=SGD, rules=[]) for is_check in (False, True)
  }

  def gradient(state, batch, is_check=False):
    start = state._replace(opt_state=SGD.init(state.params))
    new, metrics = steps[is_check](start, batch)
    return jax.tree.map(jnp.subtract, state.params, new.params), metrics

  return gradient


def test_state_is_a_function_of_the_seed(run, start):
  first, again, other = start, run.init(0), run.init(1)
  chex.assert_trees_all_equal(first, again)
  name = "embedding"
  assert (first.params["embed"][name] != other.params["embed"][name]).all()
  assert first.step == 0


def test_gradient_is_that_of_finite_differences(run, start, gradient):
  state, batch = start, tiny.batch(0)
  grads, metrics = gradient(state, batch)
  batch = jax.tree.map(jnp.asarray, batch)

  @jax.jit
  def mean(params):
    logits = run.model.apply({"params": params}, batch["tokens"])
    z = logits - logits.max(-1, keepdims=True)
    log_p = z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))
    nats = -jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    return (nats * batch["weights"]).sum() / batch["weights"].sum()

  assert metrics["loss"] == pytest.approx(float(mean(state.params)), rel=1e-6)
  for name, g in paths.flatten(grads).items():
    if name.endswith("attn/k/bias"):
      continue  # it shifts all logits of a query alike: 0 but for rounding
    # Along the gradient itself, where the difference is well above rounding.
    direction = g / jnp.linalg.norm(g)
    h = 0.02

    def moved(by, name=name, direction=direction):
      return paths.map_named(
        lambda n, p: p + by * direction if n == name else p, state.params
      )

    slope = (mean(moved(h)) - mean(moved(-h))) / (2 * h)
    # The third derivative is left out, and float32 rounds a loss of 5 by 5e-7.
    np.testing.assert_allclose(
      slope, jnp.linalg.norm(g), rtol=0.02, atol=5e-5, err_msg=name
    )


def test_statistics_do_not_change_the_gradient(start, gradient):
  state, batch = start, tiny.batch(0)
  plain, plain_metrics = gradient(state, batch, is_check=False)
  checked, checked_metrics = gradient(state, batch, is_check=True)
  # Two programs: XLA may order their sums differently.
  chex.assert_trees_all_close(checked, plain, rtol=1e-5, atol=1e-7)
  chex.assert_trees_all_close(checked_metrics, plain_metrics, rtol=1e-6)


def test_what_does_not_count_has_no_influence(start, gradient):
  state, batch = start, tiny.batch(0)
  junk = tiny.batch(1)
  rows = np.arange(16) < 8
  batch["weights"] = batch["weights"] * rows[:, None]
  other = {
    name: np.where(rows[:, None], x, junk[name]) for name, x in batch.items()
  }
  other["weights"] = batch["weights"]
  chex.assert_trees_all_equal(gradient(state, other), gradient(state, batch))


def told_value():
  """Returns a transform that updates nothing and keeps the value it is told."""

  def update(updates, state, params=None, *, value, **extra_args):
    return jax.tree.map(jnp.zeros_like, updates), value

  return optax.GradientTransformationExtraArgs(lambda _: jnp.zeros([]), update)


def test_label_smoothing_is_in_the_loss_not_in_the_metric(run, start):
  tx = told_value()
  state, batch = start._replace(opt_state=jnp.zeros([])), tiny.batch(0)
  step = run.step(False, tx=tx, rules=[], label_smoothing=0.2)
  new, metrics = step(state, batch)
  logits = run.model.apply(
    {"params": state.params}, jnp.asarray(batch["tokens"])
  )
  z = np.asarray(logits, np.float64)
  log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
  one_hot = np.eye(tiny.VOCAB)[batch["targets"]]
  for found, smoothing in ((new.opt_state, 0.2), (metrics["loss"], 0.0)):
    target = (1 - smoothing) * one_hot + smoothing / tiny.VOCAB
    nats = -(target * log_p).sum(-1)
    expected = np.average(nats, weights=batch["weights"])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_dropout_is_a_function_of_seed_and_step(start):
  model = c.ModelConfig(num_layers=1, width=32, num_heads=4, dropout=0.5)
  run = tiny.make(tiny.config(model=model))
  state = start._replace(opt_state=jnp.zeros([]))
  batch = tiny.batch(0)
  step = run.step(False, tx=told_value(), rules=[])
  # Returning the loss alone lets XLA drop the backward pass.
  only_loss = jax.jit(lambda *args, **seed: step(*args, **seed)[1]["loss"])

  def loss(seed, step):
    now = state._replace(step=jnp.int32(step))
    return float(only_loss(now, batch, seed=np.uint32(seed)))

  assert len({loss(seed, step) for seed in (0, 1) for step in range(4)}) == 8


@pytest.mark.parametrize("score", ["magnitude", "relative", "random"])
def test_runs_that_differ_by_their_seed_share_a_program(score):
  fpp = c.FPPConfig(begin=0.0, end=0.75, checks=3, score=score)
  programs = set()
  for seed in (0, 1):
    run = tiny.make(tiny.config(fpp=fpp, seed=seed))
    state = jax.eval_shape(run.init)
    lowered = run.step(True).lower(state, tiny.batch(0), seed=np.uint32(seed))
    programs.add(lowered.as_text())
  # Scores that are drawn are constants of the program.
  assert len(programs) == (2 if score == "random" else 1)


def distilled(run, logits, hidden=0.0):
  """Returns the options of learning from a teacher of the same shape."""
  return {"distillation": step_lib.Distillation(run.model, logits, hidden, 2.0)}


def test_step_with_itself_as_teacher_does_not_move(run, start):
  step = run.step(False, tx=SGD, rules=[], **distilled(run, 1.0, hidden=1.0))
  state = start._replace(opt_state=SGD.init(start.params))
  new, _ = step(state, tiny.batch(0), teacher_params=start.params)
  chex.assert_trees_all_close(new.params, start.params, atol=1e-6)
  new, _ = step(state, tiny.batch(0), teacher_params=run.init(1).params)
  moved = jax.tree.map(lambda a, b: abs(a - b).max(), new.params, start.params)
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_step_with_teacher_tells_optimizer_the_loss_on_labels(run, start):
  tx = told_statistics()
  state = start._replace(opt_state={})
  plain, _ = run.step(False, tx=tx, rules=[])(state, tiny.batch(0))
  taught, metrics = run.step(False, tx=tx, rules=[], **distilled(run, 0.9))(
    state, tiny.batch(0), teacher_params=run.init(1).params
  )
  loss = plain.opt_state["value"]
  np.testing.assert_allclose(taught.opt_state["value"], loss, rtol=1e-6)
  np.testing.assert_allclose(taught.opt_state["again"], loss, rtol=1e-6)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
  with pytest.raises(AssertionError):  # the teacher did change the gradient
    chex.assert_trees_all_close(taught.params, plain.params, atol=1e-3)


def test_step_prefers_usage_of_the_training_set(run, start):
  tx = told_statistics()
  usage = np.linspace(0, 1, tiny.VOCAB, dtype=np.float32)
  state = start._replace(opt_state={})
  new, _ = run.step(True, tx=tx, rules=[])(state, tiny.batch(0), usage=usage)
  stats = new.opt_state["stats"]
  np.testing.assert_array_equal(stats["embed/embedding"], usage)


def test_micro_batches_draw_dropout_of_their_own():
  model = c.ModelConfig(num_layers=1, width=32, num_heads=4, dropout=0.5)
  run = tiny.make(tiny.config(model=model))
  # Micro-batch i has rows i, i + 2, ...: both have the same texts here.
  batch = {name: np.repeat(x, 2, 0) for name, x in tiny.batch(0, 4).items()}
  state = run.init()._replace(opt_state=jnp.zeros([]))
  options = {"tx": told_value(), "rules": [], "accumulate": 2}
  found = run.step(False, **options)(state, batch)[1]["loss"]
  half = jax.tree.map(jnp.asarray, tiny.batch(0, 4))

  @jax.jit
  def loss(key):
    rngs = {"dropout": key}
    logits = run.model.apply(
      {"params": state.params}, half["tokens"], None, False, rngs=rngs
    )
    sums = losses.summed_loss(logits, half)
    return sums["nats"] / sums["weight"]

  keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))
  expected = [float(loss(key)) for key in keys]
  assert abs(expected[0] - expected[1]) > 1e-3
  assert found == pytest.approx(np.mean(expected), rel=1e-5)


def train(run, state, devices, mesh_config, seeds):
  """Yields the state after each step, trained on a mesh of the devices."""
  mesh = sharding.make_mesh(mesh_config, devices)
  state = jax.device_put(state, sharding.tree_shardings(mesh, state))
  step = run.step(is_check=True)
  for seed in seeds:
    batch = sharding.put_batch(mesh, tiny.batch(seed))
    state, metrics = step(state, batch)
    yield jax.device_get(state), metrics


@pytest.fixture(scope="module")
def one_device(run, start):
  """Returns the states of eight steps, of which 0, 2, 4, 6 are checks."""
  return list(train(run, start, jax.devices()[:1], MeshConfig(), range(8)))


@pytest.mark.parametrize(
  "mesh_config",
  [MeshConfig(8, 1), MeshConfig(2, 4), MeshConfig(2, 2, 2)],
  ids=["data=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2"],
)
def test_eight_devices_prune_as_one(run, start, one_device, mesh_config):
  eight = train(run, start, jax.devices(), mesh_config, range(8))
  for (state, metrics), (expected, expected_metrics) in zip(
    eight, one_device, strict=True
  ):
    step = int(state.step)
    chex.assert_trees_all_equal(
      state.opt_state.suspected, expected.opt_state.suspected
    )
    leaves = paths.flatten(state.params)
    for name, w in paths.flatten(expected.params).items():
      np.testing.assert_array_equal(
        leaves[name] == 0, w == 0, f"{name} at step {step}"
      )
      if not name.endswith("attn/k/bias"):
        # Its gradient is rounding alone, which Adam divides by itself.
        np.testing.assert_allclose(
          leaves[name], w, rtol=1e-4, atol=2e-6, err_msg=f"{name} at {step}"
        )
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5)


def test_checks_zero_what_they_should(one_device):
  # The ramp 0.7 (1 - (1 - t)^3) at t = 0, 1/3, 2/3, 1, and what a check found
  # is zeroed at the next, or at once by the last.
  q = [0.7 * (1 - (1 - t / 3) ** 3) for t in range(4)]
  frozen = [0, q[1], q[2] - q[1], 0]
  zero = [0, 0, q[1], q[3]]
  for index in range(4):
    _, metrics = one_device[2 * index]
    selected = float(metrics["selected"])
    assert selected == 2 * 32 * 128 + 32 * 32 + tiny.VOCAB * 32
    # One element a parameter is lost to rounding down.
    assert metrics["zero"] / selected <= zero[index]
    if index in (0, 1, 3):
      assert metrics["zero"] / selected == pytest.approx(zero[index], abs=1e-3)
      assert metrics["frozen"] / selected == pytest.approx(
        frozen[index], abs=1e-3
      )


def test_zeros_stay_and_the_rest_heals(one_device):
  before, after = one_device[6][0].params, one_device[7][0].params
  w, healed = (p["blocks_0"]["mlp"]["up"]["kernel"] for p in (before, after))
  assert np.count_nonzero(w == 0) == int(0.7 * w.size)
  np.testing.assert_array_equal(healed == 0, w == 0)
  # A step may be too small for float32 here and there.
  assert (healed != w)[w != 0].mean() > 0.99


def test_mesh_splits_parameters_and_their_moments(start):
  mesh = sharding.make_mesh(MeshConfig(2, 4))
  placed = sharding.tree_shardings(mesh, start)
  is_split = {
    name: not s.is_fully_replicated for name, s in paths.flatten(placed).items()
  }
  for part in ("params", "opt_state/inner/1/0/mu", "opt_state/inner/1/0/nu"):
    assert is_split[f"{part}/blocks_0/mlp/up/kernel"], part
    assert not is_split[f"{part}/norm_final/scale"], part


@pytest.mark.parametrize("task", ["lm", "classify"])
def test_parts_of_a_batch_add_up_to_the_whole(task):
  # A classifier's texts are of different lengths, so that parts weigh unequal.
  model = c.ModelConfig(
    num_layers=1, width=32, num_heads=4, causal=task == "lm"
  )
  run = tiny.make(tiny.config(task=task, model=model))
  state, batch = run.init(), tiny.batch(0)
  if task == "classify":
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, tiny.LENGTH + 1, 16)
    batch = {
      "tokens": batch["tokens"],
      "mask": np.arange(tiny.LENGTH) < lengths[:, None],
      "labels": rng.integers(0, 3, 16).astype(np.int32),
      "weights": (np.arange(16) < 13).astype(np.float32),
    }
  # Plain descent, so that an update is a gradient; FPP sees what it would.
  tx = told_statistics()
  state = state._replace(opt_state=tx.init(state.params))
  whole, parts = (
    run.step(True, tx=tx, rules=[], accumulate=n)(state, batch) for n in (1, 4)
  )
  for state, _ in (whole, parts):  # it has rows of texts, not of tokens
    state.opt_state["stats"].pop("head/kernel", None)
  chex.assert_trees_all_close(parts, whole, rtol=5e-5, atol=1e-6)
  assert "blocks_0/mlp/up/kernel" in whole[0].opt_state["stats"]


def told_statistics():
  """Returns gradient descent that keeps the statistics and value it is told."""

  def init(params):
    del params
    return {}

  def update(
    updates, state, params=None, *, stats, value, value_fn, **extra_args
  ):
    del state
    told = {"stats": stats, "value": value, "again": value_fn(params)}
    return jax.tree.map(jnp.negative, updates), told

  return optax.GradientTransformationExtraArgs(init, update)


def test_one_check_a_step_though_it_has_parts(run, start):
  batch = tiny.batch(0)
  new, metrics = run.step(True, accumulate=2)(start, batch)
  assert int(new.opt_state.observed) == 1
  assert metrics["selected"] > 0
