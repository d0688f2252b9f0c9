"""Folding from moments, against optima from other algorithms in float64."""

import itertools

import numpy as np
import pytest

from folding.compression import lowrank

D, K = 10, 4
FREQUENCIES = np.array([135, 83, 45, 24]) / 64  # float32 holds them exactly
DISTANCES = np.arange(400)


def _projection(rng, heads, bias, K=K):
  parts = {"kernel": rng.normal(size=(D, heads, K)).astype(np.float32)}
  if bias:
    parts["bias"] = rng.normal(size=(heads, K)).astype(np.float32)
  return parts


def make_inputs(rng, bias, count=200):
  """Returns correlated inputs of unequal scale and mean, then 1 for a bias."""
  x = rng.normal(size=(count, D)) @ rng.normal(size=(D, D))
  x = x * np.geomspace(1, 0.1, D) + rng.normal(size=D)
  return np.concatenate([x, np.ones((count, 1))], 1) if bias else x


def make_case(seed, H, J, bias, K=K):
  """Returns q, k, inputs of queries and of keys."""
  rng = np.random.default_rng(seed)
  q, k = _projection(rng, H, bias, K), _projection(rng, J, bias, K)
  return q, k, make_inputs(rng, bias), make_inputs(rng, bias)


def moment_of(x):
  return x.T @ x / len(x)


def project_heads(x, projection, H):
  """Returns projected inputs, [H, n, K]; shared heads are repeated."""
  w = np.asarray(projection["kernel"], np.float64)
  out = np.einsum("nd,dhk->hnk", x[:, :D], w)
  if "bias" in projection:
    out = out + np.float64(projection["bias"])[:, None]
  return np.repeat(out, H // len(out), axis=0)


shapes = pytest.mark.parametrize(
  ("H", "J", "bias"),
  [(3, 3, True), (4, 2, True), (4, 1, False)],
  ids=["heads", "grouped", "multi-query"],
)


def _logits(q, k, x, y):
  """Returns [H, n, m], scaled as attention does, by (K / G) / sqrt(K)."""
  H, G = q["kernel"].shape[1:]
  products = project_heads(x, q, H) @ project_heads(y, k, H).transpose(0, 2, 1)
  return K**0.5 / G * products


def _root(moment):
  """Returns the symmetric root, unlike a triangular factor."""
  size, basis = np.linalg.eigh(moment)
  return (basis * np.sqrt(size.clip(0))) @ basis.T


def _optimum(q, k, query_moment, key_moment, G):
  """Returns M^ [J, R E, E] and the singular values, from E x E matrices."""
  a, b = (
    np.concatenate(
      [np.float64(w["kernel"]), *([w["bias"][None]] if "bias" in w else [])]
    )
    for w in (q, k)
  )
  H, J, E = a.shape[1], b.shape[1], len(a)
  left, right = _root(query_moment), _root(key_moment)
  found, values = [], []
  for j in range(J):
    of_j = range(j * H // J, (j + 1) * H // J)
    whitened = [left @ a[:, h] @ b[:, j].T @ right for h in of_j]
    u, s, vt = np.linalg.svd(np.concatenate(whitened))
    cut = (u[:, :G] * s[:G]) @ vt[:G]
    blocks = cut.reshape(H // J, E, E)
    back = np.linalg.pinv(right, rcond=1e-9)
    found += [np.linalg.solve(left, block @ back) for block in blocks]
    values.append(s)
  return np.array(found), np.array(values)


@shapes
@pytest.mark.parametrize("G", [1, 3])
def test_head_terms_gives_the_nearest_logits_of_their_rank(G, H, J, bias):
  q, k, x, y = make_case(0, H, J, bias)
  folded = lowrank.head_terms(q, k, moment_of(x), moment_of(y)).fold(G)
  best, values = _optimum(q, k, moment_of(x), moment_of(y), G)
  assert folded.q["kernel"].shape == (D, H, G)
  assert folded.k["kernel"].shape == (D, J, G)
  assert ("bias" in folded.q, "bias" in folded.k) == (bias, bias)
  logits = _logits(folded.q, folded.k, x, y)
  # A ridge of 1e-6 of the variance, in the roots.
  expected = np.einsum("ne,hef,mf->hnm", x, best, y) / K**0.5
  spread = np.abs(expected).mean()
  np.testing.assert_allclose(logits, expected, atol=1e-3 * spread)
  # The mean over all pairs of a query and a key equals the sum of the tail.
  error = np.square(_logits(q, k, x, y) - logits).mean((1, 2)).sum()
  tail, total = np.sum(values[:, G:] ** 2), np.sum(values**2)
  assert error == pytest.approx(tail / K, rel=1e-3)
  assert folded.kept == pytest.approx(1 - tail / total, abs=1e-5)


@shapes
def test_head_terms_with_all_channels_loses_nothing(H, J, bias):
  q, k, x, y = make_case(1, H, J, bias)
  folded = lowrank.head_terms(q, k, moment_of(x), moment_of(y)).fold(K)
  x, y = (make_inputs(np.random.default_rng(seed), bias) for seed in (7, 8))
  expected = _logits(q, k, x, y)
  logits = _logits(folded.q, folded.k, x, y)
  # On any other text too; float32 rounds sums of K products.
  np.testing.assert_allclose(logits, expected, atol=1e-5 * expected.std())
  assert folded.kept == pytest.approx(1)


def test_head_terms_larger_than_the_width_has_no_more_terms():
  q, k, x, y = make_case(6, 4, 2, False, K=16)  # heads share keys, and K > D
  folded = lowrank.head_terms(q, k, moment_of(x), moment_of(y)).fold(D + 2)
  expected = _logits(q, k, x, y)
  logits = _logits(folded.q, folded.k, x, y)
  np.testing.assert_allclose(logits, expected, atol=1e-5 * expected.std())
  assert folded.kept == pytest.approx(1)
  assert not folded.k["kernel"][..., D:].any()


def test_head_terms_with_covariances_serves_the_softmax():
  q, k, x, y = make_case(4, 4, 2, True)
  y[:, :D] += 3  # which moves all logits of a query alike
  centred = y - y.mean(0)
  covariance = moment_of(centred)
  assert not covariance[-1].any()
  dense = _logits(q, k, x, y)

  def error(folded):
    wrong = _logits(folded.q, folded.k, x, y) - dense
    return np.square(wrong - wrong.mean(-1, keepdims=True)).mean()

  folded = lowrank.head_terms(q, k, moment_of(x), covariance).fold(2)
  size = np.square(dense - dense.mean(-1, keepdims=True)).mean()
  assert error(folded) / size == pytest.approx(1 - folded.kept, rel=1e-3)
  second = lowrank.head_terms(q, k, moment_of(x), moment_of(y)).fold(2)
  assert error(folded) < 0.9 * error(second)


def test_head_terms_of_zeros_loses_nothing():
  q, k, x, y = make_case(5, 2, 2, False)
  q = {"kernel": np.zeros_like(q["kernel"])}
  folded = lowrank.head_terms(q, k, moment_of(x), moment_of(y)).fold(1)
  assert folded.kept == 1
  assert not folded.q["kernel"].any()
  assert not folded.k["kernel"].any()


def test_head_terms_takes_rounded_moments():
  q, k, x, y = make_case(6, 2, 2, False)
  x[:] = x[:, :1] + 1e-5 * x  # nearly a single direction
  moment = np.zeros((D, D), np.float32)
  for row in np.tile(x, (20, 1)).astype(np.float32):
    moment += np.outer(row, row)
  least = np.linalg.eigvalsh(moment.astype(np.float64)).min()
  assert least < -2e-6 * np.trace(moment) / D  # a ridge of 1e-6 is too small
  folded = lowrank.head_terms(q, k, moment, moment_of(y)).fold(K)
  x, y = make_inputs(np.random.default_rng(7), False), y
  dense = _logits(q, k, x, y)
  np.testing.assert_allclose(
    _logits(folded.q, folded.k, x, y), dense, atol=1e-3 * dense.std()
  )


@pytest.mark.parametrize("G", [0, K + 1])
def test_head_terms_refuses_more_groups_than_channels(G):
  q, k, x, y = make_case(0, 2, 2, False)
  message = f"G must be 1 to {K}"
  with pytest.raises(ValueError, match=message):
    lowrank.head_terms(q, k, moment_of(x), moment_of(y)).fold(G)
  frequencies = np.ones(K // 2)
  with pytest.raises(ValueError, match=message):
    lowrank.rotary_terms(q, k, moment_of(x), moment_of(y), frequencies).fold(G)


def _mixed(seed, heads, bias):
  """Returns v, o and the inputs [n, 4, D] that the heads have mixed."""
  rng = np.random.default_rng(seed)
  v = _projection(rng, heads, bias)
  o = {"kernel": rng.normal(size=(4, K, 3 * D))}
  if bias:
    o["bias"] = rng.normal(size=3 * D)
  mixed = [make_inputs(rng, bias)[:, :D] for _ in range(4)]
  return v, o, np.stack(mixed, 1)


def _contexts(v, mixed):
  """Returns the inputs of W_O, [n, H, r]; heads may share values."""
  kernel, bias = (
    np.repeat(np.float64(x), 4 // x.shape[-2], axis=-2)
    for x in (v["kernel"], v.get("bias", np.zeros(v["kernel"].shape[1:])))
  )
  return np.einsum("nhd,dhr->nhr", mixed, kernel) + bias


def _written(v, o, mixed):
  out = np.einsum("nhr,hrd->nd", _contexts(v, mixed), np.float64(o["kernel"]))
  return out + o.get("bias", 0)


def _fold_values(v, o, mixed, rank, sensitivity=None):
  c = _contexts(v, mixed).reshape(len(mixed), -1)
  moments = lowrank.Moments(moment_of(c), c.mean(0))
  [low] = lowrank.fold_values(v, o, moments, [rank], sensitivity_DD=sensitivity)
  return low


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("rank", [1, 4, D])
def test_fold_embedding_is_the_nearest_in_the_mean_over_uses(
  rank, is_weighted, monkeypatch
):
  monkeypatch.setattr(lowrank, "_ROWS", 7)  # several blocks
  rng = np.random.default_rng(6)
  rows = rng.normal(size=(30, D)) * np.geomspace(1, 0.1, D) + 3
  uses = rng.integers(1, 9, 30)
  root = rng.normal(size=(D, D)) if is_weighted else np.eye(D)
  sensitivity = root @ root.T if is_weighted else None
  small = lowrank.fold_embedding(rows, uses, rank, sensitivity)
  kernel, bias = (small["embed_expand"][x] for x in ("kernel", "bias"))
  numbers = small["embed"]["embedding"]
  assert (numbers.shape, kernel.shape) == ((30, rank), (rank, D))
  wrong = np.repeat(numbers @ kernel + bias - rows, uses, axis=0) @ root
  # One row per use of a token: the singular values that are left out.
  text = np.repeat(rows, uses, axis=0) @ root
  left_out = np.linalg.svd(text - text.mean(0), compute_uv=False)[rank:]
  expected = np.sum(left_out**2)
  assert np.sum(wrong**2) == pytest.approx(expected, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize(("heads", "bias"), [(4, True), (2, True), (1, False)])
def test_fold_values_states_its_error(heads, bias):
  v, o, mixed = _mixed(0, heads, bias)
  dense = _written(v, o, mixed)
  c = _contexts(v, mixed).reshape(len(mixed), -1)
  for rank in (1, K - 1, K):
    low = _fold_values(v, o, mixed, rank)
    assert low.v["kernel"].shape == (D, heads, rank)
    wrong = dense - _written(low.v, low.o, mixed)
    stated = (c - bias * c.mean(0)) @ low.wrong
    np.testing.assert_allclose(wrong, stated, atol=1e-4 * dense.std())
  np.testing.assert_allclose(wrong, 0, atol=1e-4 * dense.std())


@pytest.mark.parametrize("is_weighted", [False, True])
def test_fold_values_of_one_head_is_the_nearest_of_its_rank(is_weighted):
  v, o, mixed = _mixed(1, 4, False)
  o["kernel"][1:] = 0  # the other heads have no output
  dense = _written(v, o, mixed)
  root = np.eye(dense.shape[1])
  if is_weighted:
    root *= np.geomspace(1, 0.01, len(root))
  sizes = np.linalg.svd(dense @ root, compute_uv=False) ** 2
  low = _fold_values(v, o, mixed, 2, root @ root.T)
  wrong = dense - _written(low.v, low.o, mixed)
  error = np.square(wrong @ root).sum()
  # Inputs of other heads may improve the fit a little.
  assert 0.9 * sizes[2:].sum() < error < 1.0001 * sizes[2:].sum()


def test_fold_values_lets_heads_make_up_for_each_other():
  v, o, mixed = _mixed(2, 4, True)
  dense = _written(v, o, mixed)
  low = _fold_values(v, o, mixed, 2)
  kept = _contexts(low.v, mixed).reshape(len(mixed), -1)
  wrong = _written(low.v, low.o, mixed) - dense
  # Least squares: the error is orthogonal to all inputs.
  around = kept - kept.mean(0)
  overlap = np.abs(around.T @ wrong).max() / len(mixed)
  assert overlap < 1e-4 * around.std() * dense.std()
  np.testing.assert_allclose(wrong.mean(0), 0, atol=1e-4 * dense.std())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("G", [1, 5])
def test_fold_input_rows_equals_least_squares(G, bias):
  q, _, x, _ = make_case(3, 3, 3, bias)
  folded = lowrank.fold_input_rows(q, moment_of(x), G)
  sums = x[:, :D].reshape(len(x), G, D // G).sum(-1)
  if bias:
    sums = np.concatenate([sums, np.ones((len(x), 1))], 1)
  target = project_heads(x, q, 3).transpose(1, 0, 2).reshape(len(x), -1)
  best = np.linalg.lstsq(sums, target)[0].reshape(-1, 3, K)
  np.testing.assert_allclose(folded["kernel"], best[:G], rtol=1e-3, atol=1e-3)
  assert ("bias" in folded) == bias
  if bias:
    np.testing.assert_allclose(folded["bias"], best[G], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("G", [0, 3])
def test_fold_input_rows_refuses_other_divisors(G):
  q, _, x, _ = make_case(0, 2, 2, False)
  with pytest.raises(ValueError, match=f"{G} groups do not divide {D} input"):
    lowrank.fold_input_rows(q, moment_of(x), G)


def _regress(features, targets, prior=None):
  """Returns the regression of two halves: even rows and odd ones."""
  left = targets if prior is None else targets - features @ prior
  halves = [(features[h::2], left[h::2]) for h in range(2)]
  return lowrank.regress(
    np.stack([f.T @ f for f, _ in halves]),
    np.stack([f.T @ t for f, t in halves]),
    np.stack([np.square(t).sum() for _, t in halves]),
    np.square(targets - targets.mean(0)).sum(),
    prior,
  )


@pytest.mark.parametrize("has_prior", [False, True])
def test_regress_recovers_linear_targets(has_prior):
  rng = np.random.default_rng(0)
  features, weights = rng.normal(size=(200, 6)), rng.normal(size=(6, 3))
  prior = weights + rng.normal(size=(6, 3)) if has_prior else None
  fit = _regress(features, features @ weights, prior)
  np.testing.assert_allclose(fit.weights, weights, atol=1e-5)
  assert fit.r2 == pytest.approx(1, abs=1e-9)


def test_regress_chooses_the_ridge_on_held_out_halves():
  rng = np.random.default_rng(1)
  features = rng.normal(size=(60, 25))
  truth = 0.3 * rng.normal(size=(25, 4))
  targets = features @ truth + rng.normal(size=(60, 4))
  fit = _regress(features, targets)

  def solve(rows, ridge):
    gram = features[rows].T @ features[rows]
    gram = gram + ridge * np.trace(gram) / 25 * np.eye(25)
    return np.linalg.solve(gram, features[rows].T @ targets[rows])

  halves = [np.arange(h, 60, 2) for h in range(2)]
  error = {}
  for ridge in 10.0 ** np.arange(-6, 3):
    error[ridge] = sum(
      np.square(targets[b] - features[b] @ solve(a, ridge)).sum()
      for a, b in (halves, halves[::-1])
    )
  best = min(error, key=error.__getitem__)
  assert 1e-6 < best < 1e2  # not an end of the range
  np.testing.assert_allclose(fit.weights, solve(np.arange(60), best))
  variance = np.square(targets - targets.mean(0)).sum()
  assert fit.r2 == pytest.approx(1 - error[best] / variance)
  seen = np.square(targets - features @ fit.weights).sum()
  assert fit.r2 < 1 - seen / variance - 0.1  # on the text that was fitted


def test_regress_keeps_the_prior_without_data():
  rng, features = np.random.default_rng(3), np.zeros((40, 3))
  features[:20, 0] = rng.normal(size=20)
  features[21::2, 1] = rng.normal(size=10)  # live in one half
  truth, prior = np.array([[2.0], [5.0], [5.0]]), np.array([[1.0], [3], [4]])
  fit = _regress(features, features @ truth, prior)
  np.testing.assert_allclose(fit.weights, [[2], [5], [4]], atol=1e-5)
  nothing = _regress(0 * features, features @ truth, prior)
  np.testing.assert_array_equal(nothing.weights, prior)


# ---------------------------------------------------------------------------
# Rotary pairs, against the best of all subsets.


def _by_pair(q, k, x, y, frequencies):
  """Returns [H, n, m, distances, pairs]: what each pair adds to the logits.

  Args:
    q: Queries of H heads.
    k: Keys of J heads.
    x: Inputs of queries.
    y: Inputs of keys.
    frequencies: [pairs], or [J, pairs].
  """
  H, width = q["kernel"].shape[1:]
  a, b = (
    w[..., : width // 2] + 1j * w[..., width // 2 :]
    for w in (project_heads(x, q, H), project_heads(y, k, H))
  )
  angle = np.einsum("l,jf->jlf", DISTANCES, np.atleast_2d(frequencies))
  turn = np.exp(1j * np.repeat(angle, H // len(angle), axis=0))
  return np.einsum("hnf,hmf,hlf->hnmlf", a, b.conj(), turn).real


def _square(logits):
  """Returns the mean square of each head's logits, summed over heads."""
  return np.square(logits).mean((1, 2, 3)).sum()


@pytest.mark.parametrize(("H", "J"), [(3, 3), (4, 2)], ids=["own", "shared"])
def test_rotary_terms_keeps_the_best_pairs(H, J):
  q, k, x, y = make_case(0, H, J, True, K=8)
  x, y = x[:30], y[:30]
  folded = lowrank.rotary_terms(
    q, k, moment_of(x), moment_of(y), FREQUENCIES
  ).fold(4)
  dense = _by_pair(q, k, x, y, FREQUENCIES)
  error = 0.0
  for j in range(J):
    of_j = slice(j * H // J, (j + 1) * H // J)
    errors = {
      subset: _square(np.delete(dense[of_j], subset, -1).sum(-1))
      for subset in itertools.combinations(range(4), 2)
    }
    best = min(errors, key=errors.__getitem__)
    error += errors[best]
    np.testing.assert_allclose(
      folded.frequency[j], FREQUENCIES[list(best)], rtol=1e-6
    )
  total = _square(dense.sum(-1))
  # Products of two pairs do not quite vanish over these distances.
  assert folded.kept == pytest.approx(1 - error / total, abs=0.03)
  # Kept pairs do not change.
  logits = _by_pair(folded.q, folded.k, x, y, folded.frequency) * 8 / 4
  for h in range(H):
    own = folded.frequency[h * J // H]
    at = [int(np.abs(FREQUENCIES - w).argmin()) for w in own]
    np.testing.assert_allclose(
      logits[h], dense[h][..., at], atol=1e-5 * dense.std()
    )


@pytest.mark.parametrize("unused", [[], [1, 5]])
@pytest.mark.parametrize(("H", "J"), [(3, 3), (4, 2)], ids=["own", "shared"])
def test_rotary_terms_with_all_pairs_is_the_dense_head(H, J, unused):
  q, k, x, y = make_case(0, H, J, True, K=8)
  for array in q.values():
    array[..., 0, unused] = 0  # channels of the first head
  folded = lowrank.rotary_terms(
    q, k, moment_of(x), moment_of(y), FREQUENCIES
  ).fold(8)
  for new, old in ((folded.q, q), (folded.k, k)):
    np.testing.assert_array_equal(new["kernel"], old["kernel"])
    np.testing.assert_array_equal(new["bias"], old["bias"])
  expected = np.tile(np.float32(FREQUENCIES), (J, 1))
  np.testing.assert_array_equal(folded.frequency, expected)
  assert folded.kept == pytest.approx(1)


def test_rotary_terms_joins_channels_that_do_not_turn():
  q, k, x, y = make_case(0, 4, 2, True, K=8)
  x, y = x[:30], y[:30]
  still = [1, 2, 3, 5, 6, 7]
  mixed = np.random.default_rng(1).normal(size=(2, 6))
  for w in q.values():  # six channels with logits of rank 2
    w[..., still] = w[..., still[:2]] @ mixed
  frequencies = np.array([0.7, 0, 0, 0])
  folded = lowrank.rotary_terms(
    q, k, moment_of(x), moment_of(y), frequencies
  ).fold(4)
  dense = _by_pair(q, k, x, y, frequencies).sum(-1)
  logits = _by_pair(folded.q, folded.k, x, y, folded.frequency).sum(-1) * 8 / 4
  np.testing.assert_allclose(logits, dense, atol=1e-4 * dense.std())
  np.testing.assert_allclose(folded.frequency, [[0.7, 0]] * 2, rtol=1e-6)


def test_rotary_terms_refuses_half_a_pair():
  q, k, x, y = make_case(0, 2, 2, False)
  with pytest.raises(ValueError, match="come in pairs"):
    lowrank.rotary_terms(q, k, moment_of(x), moment_of(y), np.ones(2)).fold(3)
