"""Rotary heads folded from moments, against the best of all sets of pairs."""

import itertools

import numpy as np
import pytest

from folding.compression import lowrank
from tests.compression.refold_cases import make_case, moment_of, project_heads

FREQUENCIES = np.array([135, 83, 45, 24]) / 64  # float32 holds them exactly
DISTANCES = np.arange(400)


def _by_pair(q, k, x, y, frequencies):
  """Returns [H, n, m, distances, pairs]: what each pair adds to the logits.

  Args:
    q: Queries of H heads.
    k: Keys of J heads.
    x: What queries are made of.
    y: What keys are made of.
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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("H", "J"), [(3, 3), (4, 2)], ids=["own", "shared"])
def test_pairs_that_are_kept_are_the_best_subset(H, J, seed):
  q, k, x, y = make_case(seed, H, J, True, K=8)
  x, y = x[:30], y[:30]
  folded = lowrank.fold_rotary_heads(
    q, k, moment_of(x), moment_of(y), 4, FREQUENCIES
  )
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
  # Products of two pairs do not quite vanish over so many distances.
  assert folded.kept == pytest.approx(1 - error / total, abs=0.03)
  # What is kept is kept as it was.
  logits = _by_pair(folded.q, folded.k, x, y, folded.frequency) * 8 / 4
  for h in range(H):
    own = folded.frequency[h * J // H]
    at = [int(np.abs(FREQUENCIES - w).argmin()) for w in own]
    np.testing.assert_allclose(
      logits[h], dense[h][..., at], atol=1e-5 * dense.std()
    )


@pytest.mark.parametrize("unused", [[], [1, 5], list(range(8))])
@pytest.mark.parametrize(("H", "J"), [(3, 3), (4, 2)], ids=["own", "shared"])
def test_with_all_pairs_a_rotary_head_is_itself(H, J, unused):
  q, k, x, y = make_case(0, H, J, True, K=8)
  for array in q.values():
    array[..., 0, unused] = 0  # channels of the first head
  folded = lowrank.fold_rotary_heads(
    q, k, moment_of(x), moment_of(y), 8, FREQUENCIES
  )
  for new, old in ((folded.q, q), (folded.k, k)):
    np.testing.assert_array_equal(new["kernel"], old["kernel"])
    np.testing.assert_array_equal(new["bias"], old["bias"])
  expected = np.tile(np.float32(FREQUENCIES), (J, 1))
  np.testing.assert_array_equal(folded.frequency, expected)
  assert folded.kept == pytest.approx(1)


def test_half_a_pair_is_refused():
  q, k, x, y = make_case(0, 2, 2, False)
  with pytest.raises(ValueError, match="come in pairs; G is 3, make it even"):
    lowrank.fold_rotary_heads(q, k, moment_of(x), moment_of(y), 3, np.ones(2))
