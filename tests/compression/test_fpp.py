import fractions
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from folding import paths
from folding.compression.fpp import fpp, fpp_counts
from folding.compression.observe import observe
from folding.compression.rules import Rule
from folding.config import MeshConfig
from folding.training.sharding import make_mesh, tree_shardings
from tests import transforms_battery as battery

# ---------------------------------------------------------------------------
# The state machine against a loop over units.

_WEIGHTS = [Rule("up|embed", 0.7)]
_NEURONS = [Rule("up", 0.5, "neuron", {"bias": 0, "gate": 1, "down": 0})]
_LR, _MOMENTUM, _WEIGHT_DECAY = 0.2, 0.8, 0.05


def _random_params(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = {
    "up": (8, 6),
    "gate": (8, 6),
    "bias": (6,),
    "down": (6, 4),
    "embed": (12, 5),
    "scale": (8,),
  }
  return {n: jnp.asarray(rng.normal(size=s), dtype) for n, s in shapes.items()}


def _gradient(step, name, shape):
  rng = np.random.default_rng([step, *name.encode()])
  return rng.normal(size=shape).astype(np.float32)


def _stats(step):
  rng = np.random.default_rng([step, 99])
  sizes = {"up": 8, "gate": 8, "down": 6, "embed": 12}
  return {
    n: rng.uniform(0.01, 4, size=k).astype(np.float32) for n, k in sizes.items()
  }


class Loop:
  """FPP around SGD, one unit at a time, in Python and NumPy float64."""

  def __init__(self, params, rules, options):
    self.p = {n: np.float64(w) for n, w in params.items()}
    self.rules, self.o = rules, options
    self.momentum = {n: np.zeros(w.shape) for n, w in self.p.items()}
    self.average = {n: None for n in self.p}
    self.gradients = {n: np.zeros(w.shape) for n, w in self.p.items()}
    self.seen = 0
    self.sites = []  # (rule, name, units), a unit: elements (name, index)
    for rule in rules:
      for name in sorted(rule.pattern.split("|")):  # the tree's order
        self.sites.append((rule, name, list(self._units(rule, name))))
    self.age = {}  # checks in a row at which a unit was suspected
    self.zero = set()

  def _units(self, rule, name):
    shape = self.p[name].shape
    if rule.granularity in ("row", "neuron"):
      axis = 0 if rule.granularity == "row" else len(shape) - 1
      members = {name: axis} | dict(rule.tied)
      for i in range(shape[axis]):
        yield tuple(
          (n, index)
          for n, a in members.items()
          for index in np.ndindex(self.p[n].shape)
          if index[a] == i
        )
    else:
      for index in np.ndindex(shape):
        yield ((name, index),)

  def _observe(self, stats, grads):
    score, decay = self.o["score"], self.o["decay"]
    if score in ("activation", "relative") and stats:
      self.seen += 1
      weight = max(1 - decay, 1 / self.seen)
      for n, new in stats.items():
        old = 1 if self.average[n] is None else self.average[n]
        self.average[n] = old + weight * (np.float64(new) - old)
    if score in ("saliency", "movement"):
      for n, g in grads.items():
        wg = self.p[n] * g
        new = np.abs(wg) if score == "saliency" else -wg
        self.gradients[n] = decay * self.gradients[n] + (1 - decay) * new

  def _element_score(self, name, index, random):
    score, w = self.o["score"], abs(self.p[name][index])
    if score == "magnitude":
      return w
    if score == "random":
      return float(random[index])
    if score in ("activation", "relative"):
      square = self.average[name]
      square = 1 if square is None else square[index[0]]
      if score == "activation":
        return w * square**0.5
      row, column = np.abs(self.p[name][index[0]]), w
      if self.p[name].ndim == 1:
        row = np.abs(self.p[name])
      else:
        column = np.abs(self.p[name][:, index[1]])
      # The means as they are in the library: all-zero lines score 0.
      terms = [np.mean(line) + 1e-12 for line in (row, column)]
      return sum(w / mean for mean in terms) * square**0.25
    if score == "evolution":
      return self.average[name][index]
    return self.gradients[name][index]

  def _unit_scores(self, position, name, units):
    random = None
    if self.o["score"] == "random":
      key = jax.random.fold_in(jax.random.key(self.o["seed"]), position)
      random = np.asarray(jax.random.uniform(key, self.p[name].shape))
    scores = []
    for unit in units:
      elements = [self._element_score(n, index, random) for n, index in unit]
      if len(unit) == 1 or self.o["score"] == "movement":
        scores.append(sum(elements))
      else:
        scores.append(math.sqrt(sum(e * e for e in elements)))
      if unit in self.zero:
        scores[-1] = -math.inf
    return scores

  def _protect(self, rule, name, scores):
    """Takes the n highest of m neighbours out of the ranking."""
    n, m = rule.pattern_nm
    table = np.array(scores).reshape(self.p[name].shape)
    for start in range(0, table.shape[0], m):
      for column in range(table.shape[1]):
        group = table[start : start + m, column]
        for i in sorted(range(m), key=lambda i: (group[i], i))[m - n :]:
          group[i] = math.inf
    return table.ravel().tolist()

  def _check(self, number, last):
    if self.o["score"] == "evolution":
      d = self.o["decay"]
      for n, w in self.p.items():
        old = np.abs(w) if number == 0 else self.average[n]
        self.average[n] = d * old + (1 - d) * np.abs(w)
    ranking = []
    for position, (rule, name, units) in enumerate(self.sites):
      scores = self._unit_scores(position, name, units)
      if rule.pattern_nm:
        scores = self._protect(rule, name, scores)
      ranking.append(list(zip(scores, units, strict=True)))
    # Exact arithmetic: the cubic ramp as a fraction.
    q = 1 - (1 - fractions.Fraction(number, max(last, 1))) ** 3
    q = fractions.Fraction(1) if number == last else q
    pools = [[i] for i in range(len(self.sites))]
    if self.o["scope"] == "rule":
      pools = [
        [i for i, s in enumerate(self.sites) if s[0] is r] for r in self.rules
      ]
    suspects = set()
    for pool in pools:
      entries = [entry for i in pool for entry in ranking[i]]
      target = fractions.Fraction(str(self.sites[pool[0]][0].target))
      k = math.floor(q * target * len(entries))
      entries.sort(key=lambda entry: entry[0])  # stable: ties by position
      suspects |= {unit for _, unit in entries[:k]}
    for unit in suspects - self.zero:
      if number == last or self.age.get(unit, 0) >= self.o["patience"]:
        self.zero.add(unit)
    self.age = {unit: self.age.get(unit, 0) + 1 for unit in suspects}

  def step(self, step, grads, stats):
    o = self.o
    self._observe(stats, grads)
    last = (o["end"] - o["begin"]) // o["every"]
    number, rest = divmod(step - o["begin"], o["every"])
    if rest == 0 and 0 <= number <= last:
      self._check(number, last)
    frozen = {element for unit in self.age for element in unit}
    zero = {element for unit in self.zero for element in unit}
    for n, w in self.p.items():
      for index in np.ndindex(w.shape):
        g = 0.0 if (n, index) in frozen else float(grads[n][index])
        m = _MOMENTUM * self.momentum[n][index] + g + _WEIGHT_DECAY * w[index]
        self.momentum[n][index] = m
        if (n, index) in zero:
          w[index] = 0.0
        elif (n, index) not in frozen:
          w[index] -= _LR * m

  def frozen(self, name):
    """Bools of the elements of a parameter that are frozen or zero."""
    found = np.zeros(self.p[name].shape, bool)
    for unit in self.age:
      for n, index in unit:
        if n == name:
          found[index] = True
    return found


def _sgd():
  return optax.chain(
    optax.add_decayed_weights(_WEIGHT_DECAY),
    optax.sgd(_LR, momentum=_MOMENTUM),
  )


_DEFAULTS = {
  "begin": 1,
  "end": 12,  # the last check falls on step 11
  "every": 2,
  "patience": 1,
  "score": "magnitude",
  "scope": "parameter",
  "decay": 0.7,
  "seed": 5,
}
_MACHINES = {
  "magnitude-0": (_WEIGHTS, {"patience": 0}),
  "activation-1": (_WEIGHTS, {"score": "activation"}),
  "relative-1": (_WEIGHTS, {"score": "relative"}),
  "evolution-1": (_WEIGHTS, {"score": "evolution"}),
  "saliency-2": (_WEIGHTS, {"score": "saliency", "patience": 2}),
  "movement-1": (_WEIGHTS, {"score": "movement"}),
  "random-2": (_WEIGHTS, {"score": "random", "patience": 2}),
  "rule-scope": (_WEIGHTS, {"score": "activation", "scope": "rule"}),
  "one-check": (_WEIGHTS, {"begin": 3, "end": 3}),
  "longest-patience": (_WEIGHTS, {"patience": 9}),
  "row": ([Rule("embed", 0.4, "row")], {"score": "activation"}),
  "row-movement": ([Rule("embed", 0.4, "row")], {"score": "movement"}),
  "neuron": (_NEURONS, {"score": "activation", "patience": 2}),
  "neuron-relative": (_NEURONS, {"score": "relative"}),
  "neuron-saliency": (_NEURONS, {"score": "saliency"}),
  "2:4": ([Rule("up", 0.5, "2:4")], {"score": "activation", "patience": 2}),
  "two-rules": (
    [Rule("up", 0.5, "2:4"), Rule("embed", 0.3)],
    {"score": "evolution", "scope": "rule"},
  ),
}


@pytest.mark.parametrize("name", _MACHINES)
def test_equals_a_loop_over_units(name):
  rules, options = _MACHINES[name]
  options = _DEFAULTS | options
  params = _random_params()
  loop = Loop(params, rules, options)
  tx = fpp(_sgd(), rules, **options)
  update, state = battery.jit(tx.update), tx.init(params)
  num_thawed, previous = 0, {}
  for step in range(15):
    grads = {n: _gradient(step, n, w.shape) for n, w in params.items()}
    stats = _stats(step)
    updates, state = update(
      {n: jnp.asarray(g) for n, g in grads.items()},
      state,
      params,
      stats={n: jnp.asarray(s) for n, s in stats.items()},
    )
    params = optax.apply_updates(params, updates)
    loop.step(step, grads, stats)
    for n, w in params.items():
      np.testing.assert_array_equal(w == 0, loop.p[n] == 0, f"{n} at {step}")
      np.testing.assert_allclose(w, loop.p[n], rtol=1e-4, atol=1e-5)
    for n in state.suspected:
      frozen = loop.frozen(n)
      num_thawed += np.sum(previous.get(n, frozen) & ~frozen)
      previous[n] = frozen
    counts = fpp_counts(rules, state, params)
    selected = {n for _, _, units in loop.sites for u in units for n, _ in u}
    num_frozen = sum(loop.frozen(n).sum() for n in selected)
    num_zero = sum(np.sum(loop.p[n] == 0) for n in selected)
    assert {k: int(v) for k, v in counts.items()} == {
      "selected": sum(params[n].size for n in selected),
      "frozen": num_frozen - num_zero,
      "zero": num_zero,
    }
  # The case means something: units came back to life (where scores move, and
  # checks do not zero at once).
  fixed = {"random-2", "one-check", "magnitude-0"}
  assert num_thawed > 0 or name in fixed or "neuron" in name or name == "row"


@pytest.mark.parametrize("target", [0.0, 0.29, 0.995])
@pytest.mark.parametrize("patience", [0, 2])
def test_sparsity_follows_the_ramp_and_never_exceeds_it(target, patience):
  sizes = {"a": 1000, "b": 37, "c": 1}
  rng = np.random.default_rng(0)
  params = {
    n: jnp.asarray(rng.normal(size=k), jnp.float32) for n, k in sizes.items()
  }
  begin, end, every = 2, 22, 4
  tx = fpp(
    optax.sgd(0.3),
    [Rule("[abc]", target)],
    begin=begin,
    end=end,
    every=every,
    patience=patience,
    score="magnitude",
  )
  update, state = battery.jit(tx.update), tx.init(params)
  exact = fractions.Fraction(str(target))
  for step in range(27):
    grads = {
      n: jnp.asarray(_gradient(step, n, w.shape)) for n, w in params.items()
    }
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    t = fractions.Fraction(max(0, min(5, (step - begin) // every)), 5)
    q = exact * (1 - (1 - t) ** 3)
    for n, size in sizes.items():
      num_zero = int(np.sum(params[n] == 0))
      assert num_zero <= math.floor(q * size)
      if patience == 0 or step >= end:
        assert num_zero == math.floor(q * size)


# ---------------------------------------------------------------------------
# Frozen, zero, and untouched.


def _separable(params, step):
  """Gradients of each element by itself: w - sin(step + position)."""
  return jax.tree.map(
    lambda p: p - jnp.sin(step + jnp.arange(p.size)).reshape(p.shape), params
  )


def _history(tx, params, steps=14, outside=None):
  """Returns params before the first and after every step, and the states."""

  @battery.jit
  def step_fn(params, state, step):
    updates, state = tx.update(_separable(params, step), state, params)
    if outside is not None:
      updates, _ = outside.update(updates, outside.init(params), params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  history, states = [params], [state]
  for step in range(steps):
    params, state = step_fn(params, state, jnp.float32(step))
    history.append(params)
    states.append(state)
  return history, states


def _units(state, name, shape):
  """Which elements are not trainable, read from the packed bits."""
  bits = np.unpackbits(np.asarray(state.suspected[name][0]), axis=-1)
  return bits[..., : shape[-1]].astype(bool)


_INNER = {
  "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
  "momentum": lambda: optax.chain(
    optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True)
  ),
}
_SLOW = {"begin": 2, "end": 11, "every": 3, "patience": 2}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("inner", _INNER)
def test_frozen_keeps_its_bits_and_zero_stays_zero(inner, dtype):
  params = _random_params(dtype)
  tx = fpp(_INNER[inner](), _WEIGHTS, score="magnitude", **_SLOW)
  history, states = _history(tx, params)
  num_frozen = 0
  for before, after, state in zip(
    history, history[1:], states[1:], strict=False
  ):
    for n in ("up", "embed"):
      old, new = np.asarray(before[n]), np.asarray(after[n])
      assert new.dtype == old.dtype
      stop = _units(state, n, new.shape)
      frozen = stop & (new != 0)
      num_frozen += frozen.sum()
      np.testing.assert_array_equal(new[frozen], old[frozen])
      np.testing.assert_array_equal(new[old == 0], 0.0)
      assert not np.any(np.signbit(new[stop & (new == 0)].astype(np.float32)))
  assert num_frozen > 20
  for n in ("up", "embed"):
    size = params[n].size
    assert np.sum(np.asarray(history[-1][n]) == 0) == math.floor(0.7 * size)


def test_weight_decay_after_fpp_moves_what_is_frozen():
  """Negative control of the test above."""
  tx = fpp(_INNER["adamw"](), _WEIGHTS, score="magnitude", **_SLOW)
  decay = optax.add_decayed_weights(-0.1)
  history, states = _history(tx, _random_params(), outside=decay)
  stop = _units(states[7], "up", (8, 6))
  frozen = stop & np.asarray(history[7]["up"] != 0)
  assert frozen.any()
  moved = np.asarray(history[7]["up"] != history[6]["up"])
  assert moved[frozen].all()


@pytest.mark.parametrize("inner", _INNER)
def test_what_is_never_suspected_trains_as_with_the_bare_optimizer(inner):
  params = _random_params()
  rules = [Rule("up|embed", 0.3)]
  tx = fpp(_INNER[inner](), rules, score="magnitude", **_SLOW)
  history, states = _history(tx, params)
  free, _ = _history(_INNER[inner](), params)
  for n, w in params.items():
    touched = np.zeros(w.shape, bool)
    for found, expected, state in zip(history, free, states, strict=True):
      if n in state.suspected:
        touched |= _units(state, n, w.shape)
      a, b = np.asarray(found[n]), np.asarray(expected[n])
      np.testing.assert_array_equal(a[~touched], b[~touched])
    assert touched.any() == (n in ("up", "embed"))
    assert not touched.all()


def test_without_rules_it_is_the_bare_optimizer():
  tx = fpp(_INNER["adamw"](), [], **_SLOW)
  found, _ = _history(tx, _random_params())
  expected, _ = _history(_INNER["adamw"](), _random_params())
  battery.assert_equal(found, expected)


def _clipped_update(clip_inside):
  clip = optax.clip_by_global_norm(1.0)
  options = {"begin": 0, "end": 9, "every": 1, "patience": 9}
  options |= {"score": "magnitude"}
  params = {"w": jnp.arange(1.0, 9.0), "b": jnp.ones(3)}
  grads = {"w": jnp.where(params["w"] < 3, 1e3, 1.0), "b": jnp.ones(3)}
  inner = optax.chain(clip, optax.sgd(1.0)) if clip_inside else optax.sgd(1.0)
  tx = fpp(inner, [Rule("w", 0.5)], **options)
  update, state = battery.jit(tx.update), tx.init(params)
  # Two steps of no gradient: at the second check floor(0.29 * 4) = 1 unit is
  # frozen, at the third 2, which are those of the large gradients.
  for _ in range(2):
    _, state = update(jax.tree.map(jnp.zeros_like, grads), state, params)
  if not clip_inside:
    grads, _ = clip.update(grads, clip.init(params))
  updates, _ = update(grads, state, params)
  return np.asarray(updates["w"]), np.asarray(updates["b"])


def test_a_clip_inside_sees_only_trainable_gradients():
  w, b = _clipped_update(clip_inside=True)
  expected = -1 / math.sqrt(6 + 3)  # nine trainable gradients of 1
  np.testing.assert_array_equal(w[:2], 0.0)
  np.testing.assert_allclose(w[2:], expected, rtol=1e-6)
  np.testing.assert_allclose(b, expected, rtol=1e-6)


def test_a_clip_outside_is_swamped_by_frozen_gradients():
  """Negative control of the test above."""
  w, _ = _clipped_update(clip_inside=False)
  assert np.abs(w[2:]).max() < 1e-3


def test_verification_zeroes_only_what_is_harmless():
  # Elements in ascending magnitude; the loss hangs on those from the 8th on.
  params = {"w": jnp.arange(1.0, 33.0) / 100}
  harm = (jnp.arange(32) >= 8).astype(jnp.float32)

  def value_fn(p):
    return 1.0 + jnp.sum(harm * (p["w"] - params["w"]) ** 2)

  tx = fpp(
    optax.sgd(0.01),
    [Rule("w", 0.75)],
    begin=0,
    end=0,
    every=1,
    score="magnitude",
    tolerance=0.01,
  )
  update = battery.jit(tx.update, static_argnames="value_fn")
  grads, options = {"w": jnp.ones(32)}, {"value_fn": value_fn}
  updates, state = update(
    grads, tx.init(params), params, value=value_fn(params), **options
  )
  pruned = optax.apply_updates(params, updates)
  new = np.asarray(pruned["w"])
  # Loop oracle: of the 24 suspects 24, 12, 6, ... are tried.
  w, bound = np.float64(params["w"]), 1.01
  for count in (24, 12, 6, 3, 1, 0):
    rise = sum(w[i] ** 2 for i in range(8, 32) if i < count)
    if 1.0 + rise <= bound:
      break
  assert 0 < count < 24
  np.testing.assert_array_equal(new[:count], 0.0)
  # The rest is trainable again at once.
  np.testing.assert_allclose(new[count:], w[count:] - 0.01, rtol=1e-5)
  stop = _units(state, "w", (32,))
  np.testing.assert_array_equal(stop, np.arange(32) < count)
  # That was the last check: what did not hold is not suspected again.
  _, later = update(grads, state, pruned, **options)
  np.testing.assert_array_equal(later.suspected["w"], state.suspected["w"])


def test_verified_pruning_keeps_the_loss_and_unverified_does_not():
  params = {"w": jnp.linspace(0.5, 1.0, 40)}

  def value_fn(p):
    return 1.0 + jnp.sum((p["w"] - params["w"]) ** 2)

  losses = {}
  for tolerance in (None, 0.05):
    tx = fpp(
      optax.sgd(0.0),
      [Rule("w", 0.5)],
      begin=0,
      end=3,
      every=1,
      score="magnitude",
      tolerance=tolerance,
    )
    update = battery.jit(tx.update, static_argnames="value_fn")
    p, state = params, tx.init(params)
    for _ in range(4):
      zeros = jax.tree.map(jnp.zeros_like, p)
      updates, state = update(zeros, state, p, value_fn=value_fn)
      p = optax.apply_updates(p, updates)
    losses[tolerance] = float(value_fn(p))
  assert losses[0.05] <= 1.05**4
  assert losses[None] > 5


# ---------------------------------------------------------------------------
# State: size, devices, the battery.


@pytest.mark.parametrize(
  ("rule", "patience", "units"),
  [
    (Rule("w", 0.5), 1, [16, 100]),
    (Rule("w", 0.5), 0, [16, 100]),
    (Rule("w", 0.5, "2:4"), 3, [16, 100]),
    (Rule("w", 0.5, "row"), 2, [16]),
    (Rule("w", 0.5, "neuron"), 1, [100]),
  ],
  ids=["weight", "no-patience", "2:4", "row", "neuron"],
)
def test_a_decision_is_one_bit(rule, patience, units):
  params = {"w": jnp.ones((16, 100))}
  tx = fpp(
    optax.sgd(0.1),
    [rule],
    begin=0,
    end=1,
    every=1,
    patience=patience,
    score="magnitude",
  )
  state = tx.init(params)
  *lead, last = units
  bytes_of_a_plane = math.prod(lead) * math.ceil(last / 8)
  found = sum(x.nbytes for x in state.suspected.values())
  assert found == max(patience, 1) * bytes_of_a_plane
  assert state.averages == {}


_SHARDED_RULES = {
  "weight": [Rule("mlp/.*|embed", 0.6)],
  "neuron": [Rule("mlp/up", 0.5, "neuron", {"mlp/down": 0})],
  "2:4": [Rule("mlp/up", 0.5, "2:4")],
}


@pytest.mark.parametrize("granularity", _SHARDED_RULES)
def test_eight_devices_give_the_masks_of_one(granularity):
  rng = np.random.default_rng(0)
  shapes = {"mlp/up": (64, 128), "mlp/down": (128, 64), "embed": (72, 64)}
  params = {
    # Rounded: ties that lie on all devices.
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
  )

  def step_fn(params, state, step):
    grads = _separable(params, step)
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
    np.testing.assert_array_equal(found[n], w)


def _battery_case(inner, rule, **options):
  def make():
    return fpp(inner, [rule], begin=0, end=2, every=1, **options)

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
  "neurons": (
    _battery_case(
      optax.sgd(0.1),  # its updates are as narrow as gradients
      Rule("(mlp)/up/kernel", 0.5, "neuron", {r"\1/down/kernel": 0}),
      score="movement",
      patience=2,
    ),
    lambda step: {},
  ),
}


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", _BATTERY)
def test_battery(case, check, tmp_path):
  make, extra = _BATTERY[case]
  check(make, extra, tmp_path / "checkpoint")


# ---------------------------------------------------------------------------
# Mistakes.


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"begin": -1}, "fpp: begin -1 to end 4 is no range of steps"),
    ({"begin": 5}, "fpp: begin 5 to end 4 is no range of steps"),
    ({"every": 0}, "fpp: every must be at least 1; it is 0"),
    ({"patience": -1}, "fpp: patience must be at least 0; it is -1"),
    ({"score": "size"}, "fpp: score must be one of .*; it is 'size'"),
    ({"scope": "model"}, "fpp: scope must be 'parameter' or 'rule'"),
    ({"decay": 1.0}, r"fpp: decay must be in \[0, 1\); it is 1\.0"),
    ({"tolerance": -0.1}, "fpp: tolerance must be at least 0; it is -0.1"),
  ],
  ids=lambda x: None if isinstance(x, str) else next(iter(x)),
)
def test_options_out_of_range_are_refused_at_once(options, message):
  options = {"begin": 0, "end": 4, "every": 1} | options
  with pytest.raises(ValueError, match=message):
    fpp(optax.sgd(0.1), [Rule("w", 0.5)], **options)


def test_a_rule_that_fits_nothing_is_refused_by_init():
  tx = fpp(optax.sgd(0.1), [Rule("v", 0.5)], begin=0, end=4, every=1)
  with pytest.raises(ValueError, match="'v' matches no parameter; there are w"):
    tx.init({"w": jnp.ones(4)})


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ("no-params", r"fpp needs `params`; pass them to update\(\)"),
    ("no-value-fn", "fpp with a tolerance needs `value_fn`"),
  ],
)
def test_update_says_what_it_lacks(given, message):
  tx = fpp(
    optax.sgd(0.1), [Rule("w", 0.5)], begin=0, end=4, every=1, tolerance=0.1
  )
  params = {"w": jnp.ones(4)}
  state = tx.init(params)
  with pytest.raises(ValueError, match=message):
    tx.update(params, state, None if given == "no-params" else params)


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
  params = model.init(jax.random.key(0), x)["params"]
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

  @battery.jit
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


@pytest.mark.parametrize("score", ["activation", "relative"])
def test_forward_scores_find_inputs_that_are_never_used(score):
  kernel = _train_regressor(score)
  np.testing.assert_array_equal(kernel[4:], 0.0)
  assert np.all(kernel[:4] != 0)


def test_magnitude_does_not_find_them():
  """Negative control of the test above."""
  kernel = _train_regressor("magnitude")
  assert np.mean(kernel[4:] == 0) < 0.5
