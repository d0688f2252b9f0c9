import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from folding import paths
from folding.compression.fpp import fpp, fpp_counts
from folding.compression.observe import observe
from folding.compression.sites import Rule
from folding.config import MeshConfig
from folding.training.sharding import make_mesh, tree_shardings
from tests import transforms_battery as battery
from tests.compression.fpp_cases import separable

# ---------------------------------------------------------------------------
# State: size, devices, the battery.


@pytest.mark.parametrize(
  ("rule", "patience", "num_bytes"),
  [
    (Rule("w", 0.5), 0, 16 * 13),
    (Rule("w", 0.5), 3, 3 * 16 * 13),
    (Rule("w", 0.5, "row"), 2, 2 * 2),
    (Rule("w", 0.5, "neuron"), 1, 13),
  ],
)
def test_fpp_state_is_one_bit_per_unit_and_update(rule, patience, num_bytes):
  tx = fpp(
    optax.sgd(0.1),
    [rule],
    begin=0,
    end=1,
    every=1,
    patience=patience,
    score="magnitude",
  )
  state = tx.init({"w": jnp.ones((16, 100))})
  assert sum(x.nbytes for x in state.suspected.values()) == num_bytes
  assert state.averages == {}


_SHARDED_RULES = {
  "weight": [Rule("mlp/.*|embed", 0.6)],
  "neuron": [Rule("mlp/up", 0.5, "neuron", {"mlp/down": 0})],
}


@pytest.mark.parametrize("granularity", _SHARDED_RULES)
def test_fpp_on_eight_devices_has_the_masks_of_one(granularity):
  rng = np.random.default_rng(0)
  shapes = {"mlp/up": (64, 128), "mlp/down": (128, 64), "embed": (72, 64)}
  params = {
    # Rounded, so that ties lie on all devices.
    n: jnp.asarray(np.round(rng.normal(size=s), 2), jnp.float32)
    for n, s in shapes.items()
  }
  tx = fpp(
    optax.adamw(0.05, weight_decay=0.1),
    _SHARDED_RULES[granularity],
    begin=0,
    end=4,
    every=1,
    patience=2,
    score="magnitude",
    warn=False,  # see `_battery_case`
  )

  def step_fn(params, state, step):
    grads = separable(params, step)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  def run(devices):
    mesh = make_mesh(MeshConfig(data=1, fsdp=len(devices)), devices)
    p, state = params, tx.init(params)
    placed = tree_shardings(mesh, (p, state))
    p, state = jax.device_put((p, state), placed)
    jitted = battery.jit(step_fn, out_shardings=placed)
    for step in range(5):
      p, state = jitted(p, state, jnp.float32(step))
    return p, state

  found, state = run(jax.devices())
  expected, one_state = run(jax.devices()[:1])
  assert len(found["mlp/up"].sharding.device_set) == 8
  assert not found["mlp/up"].sharding.is_fully_replicated
  for n, packed in one_state.suspected.items():
    assert np.any(packed)
    np.testing.assert_array_equal(state.suspected[n], packed)
  for n, w in expected.items():
    np.testing.assert_array_equal(found[n] == 0, w == 0)
    # A few roundings: the programs may fuse products with sums differently.
    np.testing.assert_allclose(found[n], w, rtol=1e-5, atol=1e-6)


def _battery_case(inner, rule, **options):
  # Programs with callbacks do not agree bit for bit, even if unoptimized.
  def make():
    return fpp(inner, rule, begin=0, end=2, every=1, warn=False, **options)

  return make


def _stats_and_value(step):
  return {
    "stats": {"mlp/up/kernel": 1.5 + jnp.sin(step + jnp.arange(8.0))},
    "value_fn": lambda params: battery.loss(params, step),
  }


_BATTERY = {
  "verified-weights": (
    _battery_case(
      optax.adamw(0.1, weight_decay=0.01),
      Rule("mlp/up/kernel", 0.6),
      patience=0,
      tolerance=0.5,
    ),
    _stats_and_value,
  ),
  "muon": (
    _battery_case(optax.contrib.muon(0.1), Rule("mlp/.*", 0.6)),
    lambda step: {
      "stats": {
        f"mlp/{name}/kernel": 1.5 + jnp.sin(step + jnp.arange(size))
        for name, size in (("up", 8.0), ("down", 13.0))
      }
    },
  ),
  "neurons": (
    _battery_case(
      optax.sgd(0.1),  # its updates have the dtype of the gradients
      Rule("(mlp)/up/kernel", 0.5, "neuron", {r"\1/down/kernel": 0}),
      score="movement",
      patience=2,
    ),
    lambda step: {},
  ),
}


@pytest.mark.parametrize(
  ("case", "check"),
  [
    (case, check)
    for case in _BATTERY
    for check in battery.CHECKS
    # Its products round in another way if the program donates its inputs. Without
    # jit it is an optimizer of optax as any other, and slow.
    if case != "muon"
    or check not in (battery.donated_state, battery.jit_equals_eager)
  ],
)
def test_fpp_passes_the_battery(case, check, tmp_path):
  make, extra = _BATTERY[case]
  check(make, extra, tmp_path / "checkpoint")


# ---------------------------------------------------------------------------
# Refusals.


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"begin": -1}, "begin .* it is -1"),
    ({"begin": 5}, "end .* from begin 5 on"),
    ({"begin": True}, "begin .* it is True"),
    ({"begin": None}, "begin .* it is None"),
    ({"begin": 0.1}, "begin .* it is 0.1"),
    ({"end": 0.7}, "end .* it is 0.7"),
    ({"end": optax.constant_schedule(4)}, "end .* it is <function"),
    ({"every": 0.05}, "every .* it is 0.05"),
    ({"end": True}, "end .* it is True"),
    ({"end": 10**12}, r"end .* below 2\^31"),
    ({"every": 1.0}, "every .* it is 1.0"),
    ({"every": 0}, "every .* it is 0"),
    ({"end": 10**9}, "every must be larger"),
    ({"patience": False}, "patience .* it is False"),
    ({"patience": -1}, "patience .* it is -1"),
    ({"score": "size"}, "score must be one of .*'size'"),
    ({"score": None}, "score must be one of .*None"),
    ({"decay": 1.0}, "decay must be in"),
    ({"decay": "0.9"}, "decay must be in"),
    ({"tolerance": -0.1}, "tolerance .* it is -0.1"),
    ({"tolerance": math.nan}, "tolerance .* it is nan"),
    ({"seed": 0.5}, "seed .* it is 0.5"),
    ({"removed": {"w": -5}}, "removed .* it is {'w': -5}"),
    ({"removed": ["w"]}, r"removed .* it is \['w'\]"),
    ({"inner": None}, "inner must be an optimizer.* it is None"),
    ({"inner": optax.adam}, "inner must be an optimizer"),
    ({"rules": "w"}, "rules must be folding.Rule .* one is 'w'"),
    ({"rules": None}, "rules must be .* one is None"),
    ({"rules": {"w": 0.5}}, "rules must be .* one is 'w'"),
  ],
)
def test_fpp_refuses_an_option_out_of_range(options, message):
  given = {"inner": optax.sgd(0.1), "rules": [Rule("w", 0.5)]}
  given |= {"begin": 0, "end": 4, "every": 1} | options
  with pytest.raises(ValueError, match=f"fpp: {message}"):
    fpp(**given)


@pytest.mark.parametrize(
  ("pattern", "wrong", "message"),
  [
    ("w", optax.adam(0.1), "must have one FPPState; tuple has 0"),
    ("v", None, r"mask of 'v' has the shape None instead of \(4, 1\)"),
    ("w", jnp.ones((4, 40)), r"shape \(4, 1\) instead of \(4, 5\)"),
  ],
  ids=["optimizer", "rule", "shape"],
)
def test_fpp_counts_refuses_what_does_not_fit(pattern, wrong, message):
  params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}
  tx = fpp(optax.sgd(0.1), Rule("w", 0.5), begin=0, end=4, every=1)
  state = tx.init(params)
  if isinstance(wrong, jax.Array):
    params |= {"w": wrong}
  elif wrong:
    state = wrong.init(params)
  with pytest.raises(ValueError, match=message):
    fpp_counts(Rule(pattern, 0.5), state, params)


@pytest.mark.parametrize(
  ("pattern", "removed", "message"),
  [
    ("v", {}, "'v' matches no parameter"),
    ("w", {"x": 1}, "'x', which is not a site"),
    ("w", {"w": 2**30}, "2,147,483,648 units"),
  ],
  ids=["pattern", "removed", "too-many"],
)
def test_fpp_init_refuses_what_does_not_fit(pattern, removed, message):
  tx = fpp(
    optax.sgd(0.1),
    [Rule(pattern, 0.5)],
    begin=0,
    end=4,
    every=1,
    removed=removed,
  )
  size = jax.ShapeDtypeStruct((2**15, 2**15), jnp.float32)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(tx.init, {"w": size})


@pytest.mark.parametrize(
  ("missing", "message"), [("params", "needs `params`"), ("fn", "`value_fn`")]
)
def test_fpp_update_refuses_a_missing_argument(missing, message):
  tx = fpp(
    optax.sgd(0.1), [Rule("w", 0.5)], begin=0, end=4, every=1, tolerance=0.1
  )
  params = {"w": jnp.ones(4)}
  state = tx.init(params)
  with pytest.raises(ValueError, match=message):
    tx.update(params, state, None if missing == "params" else params)


@pytest.mark.parametrize(
  ("stats", "is_due"),
  [
    (None, None),
    ({}, None),
    ({}, True),
    ({"x": (4,)}, None),
    ({"v": (4,)}, None),
    ({"v": (4,)}, False),
  ],
  ids=["none", "empty", "due", "other", "partial", "partial-not-due"],
)
def test_fpp_refuses_missing_statistics(stats, is_due):
  tx = fpp(optax.sgd(0.1), [Rule("[vw]", 0.5)], begin=0, end=4, every=1)
  params = {"v": jnp.ones((4, 4)), "w": jnp.ones((4, 4))}
  if stats:
    stats = {name: jnp.ones(shape) for name, shape in stats.items()}
  with pytest.raises(
    ValueError, match="nothing observed for '[vw]'.*magnitude"
  ):
    tx.update(params, tx.init(params), params, stats=stats, is_due=is_due)


def test_fpp_needs_no_statistics_between_mask_updates_or_of_biases():
  rule = Rule("w", 0.5, "neuron", {"q/bias": 1, "b": 0})
  tx = fpp(optax.sgd(0.1), [rule], begin=0, end=4, every=2)
  params = {"w": jnp.ones((4, 6)), "q/bias": jnp.ones((2, 6)), "b": jnp.ones(6)}
  update = jax.jit(tx.update, static_argnames="is_due")
  stats, state = {"w": jnp.ones(4)}, tx.init(params)
  _, state = update(params, state, params, stats=stats, is_due=True)
  update(params, state, params, stats={}, is_due=False)


def test_fpp_names_the_parameter_of_a_scalar_statistic():
  tx = fpp(optax.sgd(0.1), [Rule("w", 0.5)], begin=0, end=4, every=1)
  params = {"w": jnp.ones((4, 4))}
  with pytest.raises(ValueError, match=r"fpp: 'w': a statistic of shape \(\)"):
    tx.update(params, tx.init(params), params, stats={"w": jnp.ones(())})


@pytest.mark.parametrize(
  ("before", "message"),
  [
    (
      {"w": jnp.ones((4, 40))},
      r"suspected\['w'\] has the shape \(2, 4, 5\) .* \(2, 4, 1\)",
    ),
    ({"patience": 1}, r"suspected\['w'\] has the shape \(1, 4, 1\)"),
    ({"score": "magnitude"}, r"averages\['w'\] has the shape None"),
    ({"pattern": "v"}, r"suspected\['v'\] .* \(2, 1\) instead of None"),
  ],
  ids=["shape", "patience", "score", "rule"],
)
def test_fpp_refuses_a_state_of_other_settings(before, message):
  params = {"w": jnp.ones((4, 4)), "v": jnp.ones(4)}

  def make(pattern="w", **options):
    options = {"patience": 2, "score": "saliency"} | options
    rules = [Rule(pattern, 0.5)]
    return fpp(optax.sgd(0.1), rules, begin=0, end=4, every=1, **options)

  if "w" in before:
    state = make().init(params | before)
  else:
    state = make(**before).init(params)
  with pytest.raises(ValueError, match=message):
    make().update(params, state, params)


def test_fpp_reads_rules_from_an_iterator():
  tx = fpp(optax.sgd(0.1), iter([Rule("w", 0.5)]), begin=0, end=4, every=1)
  assert list(tx.init({"w": jnp.ones(4)}).suspected) == ["w"]


def test_explicit_axes_of_a_mesh_change_no_mask():
  rules, axes = [Rule("w", 0.5)], ("data", "fsdp", "tensor")
  tx = fpp(optax.adam(0.1), rules, begin=0, end=4, every=2)
  params = {"w": jax.random.normal(jax.random.key(0), (64, 128))}
  stats = {"w": jnp.arange(1.0, 65.0)}

  def train(kind):
    mesh = jax.make_mesh((1, 4, 2), axes, axis_types=(kind,) * 3)
    with jax.set_mesh(mesh):
      p, state = params, tx.init(params)
      placed = tree_shardings(mesh, (p, state), p)
      p, state = jax.device_put((p, state), placed)

      @jax.jit
      def step(p, state):
        updates, state = tx.update(
          p, state, p, stats=stats, value_fn=lambda p: (p["w"] ** 2).sum()
        )
        return optax.apply_updates(p, updates), state

      for _ in range(5):
        p, state = step(p, state)
      counts = jax.jit(functools.partial(fpp_counts, rules))(state, p)
    assert "fsdp" in p["w"].sharding.spec
    return jax.device_get((p, state.suspected, counts))

  auto, explicit = train(AxisType.Auto), train(AxisType.Explicit)
  chex.assert_trees_all_equal(explicit, auto)
  assert explicit[2]["zero"] == 64 * 128 // 2


# Inside jit, a parameter on automatic axes does not show its sharding.
@pytest.mark.parametrize(
  ("kind", "is_traced"),
  [
    (AxisType.Auto, False),
    (AxisType.Explicit, False),
    (AxisType.Explicit, True),
  ],
)
def test_state_has_the_shardings_of_its_parameters(kind, is_traced):
  """As compiled: no device has a whole average or all mask bits."""
  rules = [
    Rule("w", 0.5, score="saliency"),
    Rule("v", 0.5, layers=0),
    Rule("u", 0.5, "neuron", axis=1, layers=0, score="movement"),
  ]
  tx = fpp(optax.adam(0.1), rules, begin=0, end=4, every=2)
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2)
  with jax.set_mesh(mesh):
    params = {
      "w": jax.device_put(jnp.ones((64, 128)), P("fsdp", "tensor")),
      "v": jax.device_put(jnp.ones((2, 64, 128)), P(None, "tensor", "fsdp")),
      "u": jax.device_put(jnp.ones((2, 64, 128)), P(None, "fsdp", "tensor")),
    }
    init = jax.jit(tx.init) if is_traced else tx.init
    state = init(params)

    def update(state, params):
      stats = {"v": jnp.ones((2, 64))}
      return tx.update(params, state, params, stats=stats)[1]

    after = jax.jit(update).lower(state, params).compile().output_shardings
  found = state._replace(inner=(), step=None, observed=None, zeroed=None)
  for part in (jax.tree.map(lambda x: x.sharding, found), after):
    for n, spec in (
      ("w", P("fsdp", "tensor")),
      ("u", P(None, None, "tensor")),  # one average per neuron
    ):
      assert part.averages[n].is_equivalent_to(
        NamedSharding(mesh, spec), len(spec)
      )
    for n, spec in (
      ("w", P(None, "fsdp", "tensor")),
      ("v", P(None, None, "tensor", "fsdp")),
    ):
      assert part.suspected[n].is_equivalent_to(
        NamedSharding(mesh, spec), len(spec)
      )
    spec = P(None, "tensor")
    assert part.averages["v"].is_equivalent_to(NamedSharding(mesh, spec), 2)


@pytest.mark.parametrize("removed", [3, {"w": -2.5}, {"w": -1}, {"typo": 3}])
def test_fpp_counts_takes_removed_units_by_parameter(removed):
  params, rule = {"w": jnp.ones((4, 4))}, Rule("w", 0.5)
  state = fpp(optax.sgd(0.1), rule, begin=0, end=4, every=1).init(params)
  with pytest.raises(ValueError, match="removed (must be a|has 'typo')"):
    fpp_counts(rule, state, params, removed=removed)


# ---------------------------------------------------------------------------
# On a model that is not ours.


class Regressor(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(1, name="out")(nn.tanh(nn.Dense(16, name="hidden")(x)))


def _train_regressor(score):
  """Returns hidden/kernel; inputs 4..7 are always zero and of no use."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(64, 8)).astype(np.float32)
  x[:, 4:] = 0
  y = jnp.asarray(np.sin(x[:, 0]) + x[:, 1] * 0.5)[:, None]
  x = jnp.asarray(x)
  model = Regressor()
  params = jax.jit(model.init)(jax.random.key(0), x)["params"]
  # Unused inputs start with the larger weights: magnitude is misled.
  kernel = params["hidden"]["kernel"]
  params["hidden"]["kernel"] = kernel.at[4:].multiply(3.0)
  tx = fpp(
    optax.adam(0.01),
    [Rule("hidden/kernel", 0.5)],
    begin=2,
    end=20,
    every=3,
    score=score,
  )

  def loss_fn(params):
    out, stats = observe(model.apply)({"params": params}, x)
    return jnp.mean((out - y) ** 2), stats

  @jax.jit
  def step_fn(params, state):
    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = tx.update(grads, state, params, stats=stats)
    return optax.apply_updates(params, updates), state, loss

  state, first = tx.init(params), None
  for _ in range(60):
    params, state, loss = step_fn(params, state)
    first = loss if first is None else first
  assert loss < 0.5 * first
  assert set(paths.flatten(params)) >= set(state.averages)
  return np.asarray(params["hidden"]["kernel"])


def test_relative_finds_inputs_that_are_never_used():
  kernel = _train_regressor("relative")
  np.testing.assert_array_equal(kernel[4:], 0.0)
  assert np.all(kernel[:4] != 0)


def test_magnitude_does_not_find_unused_inputs():
  """Negative control of the test above."""
  kernel = _train_regressor("magnitude")
  assert np.mean(kernel[4:] == 0) < 0.5
