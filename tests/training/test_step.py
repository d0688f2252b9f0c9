import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from folding import config as c
from folding import paths
from folding.config import MeshConfig
from folding.models.shape import shape_of
from folding.tasks import TASKS
from folding.training import losses, sharding
from folding.training import step as step_lib
from tests import jaxprs
from tests.training import tiny

TEMPERATURE = 3.0


def told_statistics():
  """Returns gradient descent that keeps the arguments of its update."""

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


@pytest.fixture(scope="module")
def run():
  return tiny.make(tiny.config())


@pytest.fixture(scope="module")
def start(run):
  """Returns the state before the first step."""
  return run.init()


@pytest.fixture(scope="module")
def teacher(run):
  """Returns parameters of another seed."""
  return run.init(1).params


@pytest.fixture(scope="module")
def descent(start):
  """Returns the state before the first step of `told_statistics`."""
  return start._replace(opt_state={})


@pytest.fixture(scope="module")
def steps(run):
  """Returns {is it a mask update: step of `told_statistics`}."""
  return {
    is_mask_update: run.step(is_mask_update, tx=told_statistics(), rules=[])
    for is_mask_update in (False, True)
  }


@pytest.fixture(scope="module")
def taught_step(run):
  """Returns a step of `told_statistics` with 0.7 of the loss from a teacher."""
  options = {"tx": told_statistics(), "rules": [], **distilled(run, 0.7)}
  return run.step(False, **options)


@pytest.fixture(scope="module")
def gradient(descent, steps):
  """Returns a function that returns the gradient and metrics of a step."""

  def gradient(batch, is_mask_update=False):
    new, metrics = steps[is_mask_update](descent, batch)
    return jax.tree.map(np.subtract, descent.params, new.params), metrics

  return gradient


def test_init_state_is_a_function_of_the_seed(run, start, teacher):
  first, again = start, run.init(0)
  chex.assert_trees_all_equal(first, again)
  name = "embedding"
  assert (first.params["embed"][name] != teacher["embed"][name]).all()
  assert first.step == 0


def test_step_gradient_equals_finite_differences(run, start, gradient):
  state, batch = start, tiny.batch(0)
  grads, metrics = gradient(batch)
  batch = jax.tree.map(jnp.asarray, batch)

  @jax.jit
  def mean(params):
    logits = run.model.apply({"params": params}, batch["tokens"])
    z = logits - logits.max(-1, keepdims=True)
    log_p = z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))
    nats = -jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    return (nats * batch["weights"]).sum() / batch["weights"].sum()

  assert metrics["loss"] == pytest.approx(float(mean(state.params)), rel=1e-6)
  params = jax.tree.map(np.asarray, state.params)
  for name, g in paths.flatten(jax.tree.map(np.asarray, grads)).items():
    if name.endswith("attn/k/bias"):
      continue  # it shifts all logits of a query equally: its gradient is 0
    # Along the gradient, where the difference is well above rounding.
    size = np.linalg.norm(g)
    direction = g / size
    h = 0.02

    def moved(by, name=name, direction=direction):
      return paths.map_named(
        lambda n, p: p + by * direction if n == name else p, params
      )

    slope = (mean(moved(h)) - mean(moved(-h))) / (2 * h)
    # Errors: the third derivative, and rounding of a loss of 5 by 5e-7.
    np.testing.assert_allclose(slope, size, rtol=0.02, atol=5e-5, err_msg=name)


def test_step_statistics_leave_the_gradient_alone(gradient):
  batch = tiny.batch(0)
  plain, plain_metrics = gradient(batch, is_mask_update=False)
  checked, checked_metrics = gradient(batch, is_mask_update=True)
  # Two programs: XLA may order their sums differently.
  chex.assert_trees_all_close(checked, plain, rtol=1e-5, atol=1e-7)
  chex.assert_trees_all_close(checked_metrics, plain_metrics, rtol=1e-6)


def test_step_ignores_targets_of_weight_0(gradient):
  batch, junk = tiny.batch(0), tiny.batch(1)
  rows = np.arange(16) < 8
  batch["weights"] = batch["weights"] * rows[:, None]
  other = {
    name: np.where(rows[:, None], x, junk[name]) for name, x in batch.items()
  }
  other["weights"] = batch["weights"]
  chex.assert_trees_all_equal(gradient(other), gradient(batch))


def told_value():
  """Returns a transform without updates whose state is the last `value`."""

  def update(updates, state, params=None, *, value, **extra_args):
    return jax.tree.map(jnp.zeros_like, updates), value

  return optax.GradientTransformationExtraArgs(lambda _: jnp.zeros([]), update)


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


@pytest.mark.parametrize(("score", "count"), [("magnitude", 1), ("random", 2)])
def test_step_program_is_shared_between_seeds(score, count):
  fpp = c.FPPConfig(begin=0.0, end=0.75, checks=3, score=score)
  programs = set()
  for seed in (0, 1):
    run = tiny.make(tiny.config(fpp=fpp, seed=seed))
    state = jax.eval_shape(run.init)
    lowered = run.step(True).lower(state, tiny.batch(0), seed=np.uint32(seed))
    programs.add(lowered.as_text())
  # Random scores are constants of the program.
  assert len(programs) == count


def distilled(run, logits, hidden=0.0):
  """Returns the options of learning from a teacher of the same shape."""
  distill = c.DistillConfig(
    logits=logits, hidden=hidden, temperature=TEMPERATURE
  )
  return {"teacher": run.model, "distill": distill}


def test_step_with_itself_as_teacher_does_not_move(run, descent, teacher):
  options = {"tx": told_statistics(), "rules": []}
  step = run.step(False, **options, **distilled(run, 1.0, hidden=1.0))
  batch, params = tiny.batch(0), jax.device_get(descent.params)
  new, _ = step(descent, batch, teacher_params=params)
  chex.assert_trees_all_close(new.params, params, atol=1e-6)
  new, _ = step(descent, batch, teacher_params=teacher)
  moved = jax.tree.map(
    lambda a, b: np.abs(np.asarray(a) - b).max(), new.params, params
  )
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_step_with_teacher_tells_optimizer_the_loss_on_labels(
  descent, steps, taught_step, teacher
):
  batch = tiny.batch(0)
  plain, _ = steps[False](descent, batch)
  taught, metrics = taught_step(descent, batch, teacher_params=teacher)
  loss = plain.opt_state["value"]
  np.testing.assert_allclose(taught.opt_state["value"], loss, rtol=1e-6)
  np.testing.assert_allclose(taught.opt_state["again"], loss, rtol=1e-6)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
  with pytest.raises(AssertionError):  # the teacher did change the gradient
    chex.assert_trees_all_close(taught.params, plain.params, atol=1e-3)


def test_step_of_vectors_tells_optimizer_the_loss_of_hidden_states():
  model = c.ModelConfig(num_layers=1, width=32, num_heads=4, causal=False)
  run = tiny.make(tiny.config(task="embed", model=model))
  step = run.step(
    False, tx=told_statistics(), rules=[], **distilled(run, 0.0, hidden=1.0)
  )
  tokens = tiny.batch(0)["tokens"]
  batch = {"tokens": tokens, "mask": tokens >= 0, "weights": np.ones(16, "f4")}
  state = run.init()._replace(opt_state={})
  told = step(state, batch, teacher_params=run.init(1).params)[0].opt_state
  np.testing.assert_allclose(told["value"], told["again"], rtol=1e-6)


def test_step_without_weight_of_logits_does_not_read_them(
  run, descent, teacher
):
  options = {"tx": told_statistics(), "rules": []}
  step = run.step(False, **options, **distilled(run, 0.0, hidden=1.0))
  new, _ = step(descent, tiny.batch(0), teacher_params=teacher)
  # Logits that are not finite would make the loss NaN even with a weight of 0.
  teacher = {**teacher, "norm_final": {"scale": np.full(32, np.nan)}}
  teacher["norm_final"]["bias"] = np.zeros(32)
  other, _ = step(descent, tiny.batch(0), teacher_params=teacher)
  chex.assert_trees_all_equal(new.params, other.params)


def test_step_weighs_labels_and_teacher(
  run, start, descent, taught_step, teacher
):
  new, _ = taught_step(descent, tiny.batch(0), teacher_params=teacher)
  batch = jax.tree.map(jnp.asarray, tiny.batch(0))

  @jax.jit
  @jax.grad
  def gradient(params):
    logits = run.model.apply({"params": params}, batch["tokens"])
    taught = run.model.apply({"params": teacher}, batch["tokens"])
    sums = losses.summed_loss(TASKS["lm"], logits, batch)
    soft = losses.summed_soft_loss(
      TASKS["lm"], logits, taught, batch["weights"], TEMPERATURE
    )
    return (0.3 * sums["loss"] + 0.7 * soft) / sums["weight"]

  expected = jax.tree.map(np.subtract, start.params, gradient(start.params))
  chex.assert_trees_all_close(new.params, expected, rtol=1e-4, atol=1e-6)


TIED = c.ModelConfig(num_layers=1, width=32, num_heads=4, mlp_width=64)
UNTIED = dataclasses.replace(TIED, tie_embeddings=False)


@pytest.mark.parametrize(
  ("model", "mesh_config", "options"),
  [
    pytest.param(TIED, None, {}, marks=pytest.mark.slow),
    (UNTIED, MeshConfig(2, 2, 2), {"accumulate": 2, "logits": 0.7}),
  ],
  ids=["tied", "head_mesh_micro_batches_taught"],
)
def test_step_over_blocks_of_tokens_equals_the_whole(
  model, mesh_config, options, monkeypatch
):
  run = tiny.make(tiny.config(model=model))
  tx, state, batch = told_statistics(), run.init(), tiny.batch(0)
  state, constants = state._replace(opt_state={}), {}
  options = dict(options)
  if mesh_config is not None:
    options["mesh"] = mesh = sharding.make_mesh(mesh_config)
    state = jax.device_put(state, sharding.tree_shardings(mesh, state))
    batch = sharding.put_batch(mesh, batch)
  if "logits" in options:
    options |= distilled(run, options.pop("logits"))
    constants["teacher_params"] = run.init(1).params

  def stepped():
    plain, update = (
      run.step(is_mask_update, tx=tx, rules=[], **options)
      for is_mask_update in (False, True)
    )
    program = plain.trace(state, batch, **constants).jaxpr.jaxpr
    return program, update(state, batch, **constants)

  program, whole = stepped()
  per_device = 16 * tiny.LENGTH * tiny.VOCAB // jax.device_count()
  if mesh_config is None:
    per_device *= jax.device_count()
  monkeypatch.setattr(losses, "LOGITS", per_device // 3)
  smaller, cut = stepped()
  chex.assert_trees_all_close(cut, whole, rtol=2e-5, atol=1e-6)
  logits = 16 * tiny.LENGTH * tiny.VOCAB // options.get("accumulate", 1)
  assert logits in jaxprs.sizes(program)
  if mesh_config is None:
    assert max(jaxprs.sizes(smaller)) < logits


def test_step_prefers_usage_of_the_training_set(descent, steps):
  usage = np.linspace(0, 1, tiny.VOCAB, dtype=np.float32)
  new, _ = steps[True](descent, tiny.batch(0), usage=usage)
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
    sums = losses.summed_loss(TASKS["lm"], logits, half)
    return sums["loss"] / sums["weight"]

  keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))
  expected = [float(loss(key)) for key in keys]
  assert abs(expected[0] - expected[1]) > 1e-3
  assert found == pytest.approx(np.mean(expected), rel=1e-5)


def test_program_takes_the_options_of_a_step_from_its_config(run):
  distill = c.DistillConfig(logits=0.5, hidden=0.25, temperature=3.0)
  config = tiny.config(
    pretrained="DENSE", distill=distill, train=c.TrainConfig(steps=8)
  )
  mesh = sharding.make_mesh(config.mesh)
  program = step_lib.Program(
    shape_of(config), config, mesh, vocab_size=tiny.VOCAB, num_classes=0
  )
  found = program.options(run.model)
  assert (found.teacher, found.distill) == (run.model, distill)
  assert found.accumulate == 1
  config = tiny.config(train=c.TrainConfig(steps=8, accumulate=4))
  program = step_lib.Program(
    shape_of(config), config, mesh, vocab_size=tiny.VOCAB, num_classes=0
  )
  assert program.options().accumulate == 4


@pytest.fixture(scope="module")
def mask_update(run):
  """Returns the step with a mask update, traced once for all meshes."""
  return run.step(is_mask_update=True)


def train(step, state, devices, mesh_config, seeds):
  """Yields the state after each step, trained on a mesh of the devices."""
  mesh = sharding.make_mesh(mesh_config, devices)
  shardings = sharding.tree_shardings(mesh, state)
  for seed in seeds:
    state = jax.device_put(state, shardings)  # one program for all steps
    batch = sharding.put_batch(mesh, tiny.batch(seed))
    state, metrics = step(state, batch)
    yield jax.device_get(state), metrics


@pytest.fixture(scope="module")
def one_device(mask_update, start):
  """Returns the states after eight steps, with mask updates at 0, 2, 4 and 6."""
  return list(
    train(mask_update, start, jax.devices()[:1], MeshConfig(), range(8))
  )


@pytest.mark.parametrize(
  "mesh_config",
  [
    pytest.param(MeshConfig(2, 4), id="data=2,fsdp=4", marks=pytest.mark.slow),
    pytest.param(MeshConfig(2, 2, 2), id="data=2,fsdp=2,tensor=2"),
  ],
)
def test_step_on_eight_devices_prunes_as_on_one(
  mask_update, start, one_device, mesh_config
):
  eight = train(mask_update, start, jax.devices(), mesh_config, range(8))
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
        # Its gradient is 0 up to rounding, which Adam scales up.
        np.testing.assert_allclose(
          leaves[name], w, rtol=1e-4, atol=2e-6, err_msg=f"{name} at {step}"
        )
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5)


@pytest.mark.slow
def test_steps_run_programs_compiled_ahead_and_equal_train_step(caplog):
  config = tiny.config()
  mesh = sharding.make_mesh(MeshConfig(2), jax.devices()[:2])
  program = step_lib.Program(
    shape_of(config), config, mesh, vocab_size=tiny.VOCAB, num_classes=0
  )
  init = jax.jit(program.draw, out_shardings=program.state_shardings)
  program.mask_updates = range(1, 4, 2)
  batches = [sharding.put_batch(mesh, tiny.batch(step)) for step in range(4)]
  plain, update = (
    program.step(is_mask_update=is_update) for is_update in (False, True)
  )
  state, expected = init(0), []
  for single, batch in zip((plain, update) * 2, batches, strict=True):
    state, metrics = single(state, batch)
    expected.append(jax.device_get((state, metrics)))

  steps = step_lib.Steps(program)
  steps.compile_ahead(0, program.like, batches[0])
  state = init(0)
  with jax.log_compiles():  # of this thread
    for step, batch in enumerate(batches):
      state, metrics = steps(step, state, batch)
      chex.assert_trees_all_equal((state, metrics), expected[step])
  assert "compilation of jit(train_step)" not in caplog.text
  # A batch of another length compiles a program of its own.
  short = {name: x[:, :4] for name, x in batches[1].items()}
  _, metrics = steps(1, state, short)
  assert metrics["selected"] > 0


def test_mask_updates_follow_the_ramp(one_device):
  # The ramp 0.7 (1 - (1 - t)^3) at t = 0, 1/3, 2/3, 1. A mask update freezes
  # weights, the next one zeroes them; the last one does both.
  q = [0.7 * (1 - (1 - t / 3) ** 3) for t in range(4)]
  frozen = [0, q[1], q[2] - q[1], 0]
  zero = [0, 0, q[1], q[3]]
  for index in range(4):
    _, metrics = one_device[2 * index]
    selected = float(metrics["selected"])
    assert selected == 2 * 32 * 128 + 32 * 32 + tiny.VOCAB * 32
    # Rounding down loses one element per parameter.
    assert metrics["zero"] / selected <= zero[index]
    if index in (0, 1, 3):
      assert metrics["zero"] / selected == pytest.approx(zero[index], abs=1e-3)
      assert metrics["frozen"] / selected == pytest.approx(
        frozen[index], abs=1e-3
      )


def test_zeros_stay_and_other_weights_train_on(one_device):
  before, after = one_device[6][0].params, one_device[7][0].params
  w, healed = (p["blocks_0"]["mlp"]["up"]["kernel"] for p in (before, after))
  assert np.count_nonzero(w == 0) == int(0.7 * w.size)
  np.testing.assert_array_equal(healed == 0, w == 0)
  # Some updates are too small for float32.
  assert (healed != w)[w != 0].mean() > 0.99


def test_micro_batches_add_up_to_the_whole_batch():
  # Texts of a classifier differ in length, so micro-batches differ in weight.
  model = c.ModelConfig(num_layers=1, width=32, num_heads=4, causal=False)
  run = tiny.make(tiny.config(task="classify", model=model))
  state, rng = run.init(), np.random.default_rng(1)
  lengths = rng.integers(1, tiny.LENGTH + 1, 16)
  batch = {
    "tokens": tiny.batch(0)["tokens"],
    "mask": np.arange(tiny.LENGTH) < lengths[:, None],
    "labels": rng.integers(0, 3, 16).astype(np.int32),
    "weights": (np.arange(16) < 13).astype(np.float32),
  }
  # Gradient descent, so that an update is a gradient.
  tx = told_statistics()
  state = state._replace(opt_state=tx.init(state.params))
  whole, parts = (
    run.step(True, tx=tx, rules=[], accumulate=n)(state, batch) for n in (1, 4)
  )
  for state, _ in (whole, parts):  # its input is one row per text
    state.opt_state["stats"].pop("head/kernel", None)
  chex.assert_trees_all_close(parts, whole, rtol=5e-5, atol=1e-6)
  assert "blocks_0/mlp/up/kernel" in whole[0].opt_state["stats"]


@pytest.mark.slow
def test_scanned_layers_are_pruned_as_the_others():
  fpp = c.FPPConfig(
    linear=0.7, embedding=0.7, score="activation", begin=0.0, end=0.75, checks=3
  )

  def run(scan_layers):
    model = c.ModelConfig(
      num_layers=2,
      width=32,
      num_heads=4,
      use_bias=False,
      remat=True,
      scan_layers=scan_layers,
    )
    made = tiny.make(tiny.config(model=model, fpp=fpp))
    state, step = made.init(), made.step(True)
    for number in range(6):
      state, metrics = step(state, tiny.batch(number))
    return state, metrics

  (plain, metrics), (scanned, scanned_metrics) = run(False), run(True)
  assert metrics["zero"] > 0
  chex.assert_trees_all_equal(
    scanned.opt_state.suspected, plain.opt_state.suspected
  )
  # The same sums, fused differently.
  chex.assert_trees_all_close(scanned.params, plain.params, atol=1e-4)
  chex.assert_trees_all_close(scanned_metrics, metrics, rtol=1e-4)
