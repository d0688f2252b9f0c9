import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding.errors import ConfigError
from folding.serving import sampling as sampling_lib
from folding.serving.sampling import Sampling

V = 12
_kept, _choose = jax.jit(sampling_lib.kept), jax.jit(sampling_lib.choose)
_noise = jax.jit(sampling_lib.noise, static_argnums=(2, 3))


def _logits(batch, seed=0):
  rng = np.random.default_rng(seed)
  return (2 * rng.normal(size=(batch, V))).astype(np.float32)


def kept_by_oracle(logits, top_k, top_p):
  """Returns the token ids that remain, from their definition, in float64."""
  order = sorted(range(len(logits)), key=lambda v: -logits[v])
  order = order[: top_k or len(logits)]
  weights = np.exp([np.float64(logits[v]) for v in order])
  sums = np.cumsum(weights / weights.sum())
  count = len(order) if top_p is None else 1 + int((sums < top_p).sum())
  return set(order[:count])


@pytest.mark.parametrize(
  ("top_k", "top_p"),
  [(1, None), (3, None), (99, None), (None, 0.01), (None, 0.5), (None, 0.9)]
  + [(None, 1.0), (4, 0.7), (V, 0.95)],
  ids=str,
)
def test_top_k_and_top_p_keep_what_the_oracle_keeps(top_k, top_p):
  logits_BV = _logits(20)
  draw = sampling_lib.make_draw(Sampling(1.0, top_k, top_p), V)
  found = _kept(jnp.asarray(logits_BV), draw.top_k, draw.top_p)
  assert [set(np.flatnonzero(row)) for row in np.asarray(found)] == [
    kept_by_oracle(row, top_k, top_p) for row in logits_BV
  ]


def test_likeliest_token_stays_if_top_p_rounds_to_zero():
  draw = sampling_lib.make_draw(Sampling(1.0, top_p=1e-50), V)
  logits_BV = _logits(20)
  found = _kept(jnp.asarray(logits_BV), draw.top_k, draw.top_p)
  best_BV = np.arange(V) == logits_BV.argmax(axis=-1)[:, None]
  np.testing.assert_array_equal(found, best_BV)


def test_top_p_that_is_reached_exactly_needs_no_more():
  halves = jnp.log(jnp.asarray([[2.0, 1.0, 1.0]]))
  assert jax.nn.softmax(halves)[0, 0] == 0.5
  found = _kept(halves, jnp.int32(3), jnp.float32(0.5))
  np.testing.assert_array_equal(found, [[True, False, False]])


def test_ties_stay_and_top_p_of_1_keeps_all():
  tied = jnp.asarray([[1.0, 3.0, 1.0, 0.0]])
  found = _kept(tied, jnp.int32(2), jnp.float32(1))
  np.testing.assert_array_equal(found, [[True, True, True, False]])
  # In float32 the first one's probability is 1 already.
  steep = jnp.asarray([[30.0, 0.0, 0.0]])
  assert _kept(steep, jnp.int32(3), jnp.float32(1)).all()


@pytest.mark.parametrize(
  "sampling", [Sampling(), Sampling(1.0), Sampling(1.0, 3)], ids=str
)
def test_row_with_nan_has_no_token(sampling):
  logits_BV = _logits(3)
  draw = sampling_lib.make_draw(sampling, V)
  choose = functools.partial(_choose, draw)
  expected = np.array(choose(jnp.asarray(logits_BV), jnp.int32(0)))
  logits_BV[1, 4], expected[1] = np.nan, -1
  found = choose(jnp.asarray(logits_BV), jnp.int32(0))
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  ("temperature", "top_k", "top_p"),
  [(1.0, None, None), (0.5, None, None), (2.0, 5, None), (1.0, None, 0.8)],
  ids=str,
)
def test_draws_follow_the_softmax(temperature, top_k, top_p):
  logits, count = _logits(1)[0], 20_000
  sampling = Sampling(temperature, top_k, top_p, seed=3)
  draw = sampling_lib.make_draw(sampling, V)
  rows_BV = jnp.tile(jnp.asarray(logits), (count, 1))
  drawn = _choose(draw, rows_BV, jnp.int32(0))
  scaled = logits / np.float64(temperature)
  weights = np.exp(scaled)
  kept = kept_by_oracle(scaled, top_k, top_p)
  weights[[v for v in range(V) if v not in kept]] = 0
  expected = count * weights / weights.sum()
  found = np.bincount(drawn, minlength=V)
  # Five standard deviations of a binomial count; exactly 0 where 0 is due.
  assert (np.abs(found - expected) <= 5 * np.sqrt(expected)).all()


def test_noise_depends_on_seed_row_and_step():
  key = jax.random.key(0)
  noise = np.asarray(_noise(key, jnp.int32(4), 3, V))
  more = np.asarray(_noise(key, jnp.int32(4), 5, V))
  np.testing.assert_array_equal(more[:3], noise)
  later = np.asarray(_noise(key, jnp.int32(5), 3, V))
  other = np.asarray(_noise(jax.random.key(1), jnp.int32(4), 3, V))
  values = [*noise.ravel(), *later.ravel(), *other.ravel()]
  assert len(set(values)) == len(values)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e-39}, "temperature"),  # logits beyond float32
    ({"temperature": 1e39}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"seed": 2**32}, "seed"),
    ({"seed": -1}, "seed"),
    ({"top_k": 0}, "top-k"),
    ({"top_k": True}, "top-k"),
    ({"top_p": 0.0}, "top-p"),
    ({"top_p": 1.5}, "top-p"),
  ],
)
def test_sampling_value_out_of_range_is_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    Sampling(**fields)
