"""One-shot pruning of trained layers: SparseGPT, Wanda, magnitude, inputs.

A layer y = x W is given by W [I, O] and the second moment of its input,
C = E[x x'] [I, I]. Everything is computed in float64 on the host.

Axes: I inputs, O outputs.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Float

Matrix = Float[np.ndarray, "I O"]
Sensitivity = Float[np.ndarray, "O O"]
Moment = Float[np.ndarray, "E E"]  # `_damped` checks that E is I


def sparsegpt(
  w_IO: Matrix,
  moment_II: Moment,
  fraction: float,
  *,
  block: int = 128,
  damping: float = 0.01,
) -> Matrix:
  """Returns the weights with a fraction at zero and the others adjusted.

  Inputs are processed in order. If a weight w_i of input i is removed, the
  weights of later inputs change to minimise E |x W - x W^|^2, given the weights
  up to i. The change is w_i / U_ii times row i of U, the upper Cholesky factor
  of the inverse of C. In each block of inputs, the weights of least
  w_i^2 / U_ii^2 are removed. This is what removing w_i alone adds to the error.

  Args:
    w_IO: Weights.
    moment_II: E[x x'], over at least some thousand tokens.
    fraction: Fraction of each block to remove, in [0, 1); rounded so that the
      matrix loses floor(fraction I O) weights.
    block: Inputs per block.
    damping: This fraction of the mean of the diagonal of C is added to it.

  Returns:
    float64[I, O].

  Raises:
    ValueError: the fraction is out of range, or C does not fit the inputs or is
      not positive definite.

  References: Frantar and Alistarh, "SparseGPT", 2023, algorithm 1.
  """
  inputs = len(w_IO)
  # Of C = R R', R upper, found from the last input to the first: U = R^-1.
  c_II = _damped(w_IO, moment_II, damping)[::-1, ::-1]
  u_II = _triangle_inverse(_factor(c_II))[::-1, ::-1]  # U' U = C^-1
  w_IO, removed = np.array(w_IO, np.float64), 0
  for begin in range(0, inputs, block):
    end = min(begin + block, inputs)
    w_BO, u_BB = w_IO[begin:end], u_II[begin:end, begin:end]
    wanted = _count(fraction, end * w_IO.shape[1])
    scale_B1 = np.diag(u_BB)[:, None]
    drop_BO = _lowest(np.square(w_BO / scale_B1), wanted - removed)
    removed = wanted
    error_BO = np.zeros_like(w_BO)
    for i in range(end - begin):
      error_BO[i] = np.where(drop_BO[i], w_BO[i] / u_BB[i, i], 0)
      w_BO[i:] -= np.outer(u_BB[i, i:], error_BO[i])
    w_BO[drop_BO] = 0.0  # exactly
    w_IO[end:] -= u_II[begin:end, end:].T @ error_BO
  return w_IO


def remove_inputs(
  w_IO: Matrix,
  moment_II: Moment,
  fraction: float,
  *,
  rounds: int = 32,
  damping: float = 0.1,
  sensitivity_OO: Sensitivity | None = None,
) -> Matrix:
  """Returns the weights with whole rows, a fraction of the inputs, at zero.

  The remaining rows are the least-squares fit to the output of all rows. Removing
  input i alone costs w_i F w_i' / (C^-1)_ii: it adds that to E e F e', where e is
  the error of the output. Each round removes the inputs that cost least, refits
  the other rows, and updates C^-1 to that of the remaining inputs.

  Args:
    w_IO: Weights.
    moment_II: E[x x'], or the covariance if a bias takes up the means.
    fraction: Fraction to remove, in [0, 1): floor(fraction I) inputs.
    rounds: Number of rounds; each removes the same fraction of what is left.
    damping: This fraction of the median of the diagonal of C is added to it. The
      mean can be thousands of times as large: single neurons of language models
      have most of the energy, and a ridge of that size hides all others.
    sensitivity_OO: F; None: the identity.

  Returns:
    float64[I, O].

  Raises:
    ValueError: the fraction is out of range, or C does not fit the inputs or is
      not positive definite.

  References: Hassibi and Stork, "Second order derivatives for network pruning:
    optimal brain surgeon", 1993; for neurons of transformers Kurtic et al.,
    "ZipLM", 2023.
  """
  inputs = len(w_IO)
  wanted = inputs - _count(fraction, inputs)
  goals = [
    round(inputs * (wanted / inputs) ** (n / rounds))
    for n in range(1, rounds + 1)
  ]
  rounds_IO = removals(
    w_IO, moment_II, goals, damping=damping, sensitivity_OO=sensitivity_OO
  )
  [last_IO] = collections.deque(rounds_IO, maxlen=1)
  return last_IO


def removals(
  w_IO: Matrix,
  moment_II: Moment,
  goals: Sequence[int],
  *,
  unit: int = 1,
  damping: float = 0.1,
  sensitivity_OO: Sensitivity | None = None,
) -> Iterator[Matrix]:
  """Yields the weights after each round of `remove_inputs`.

  Args:
    w_IO: Weights.
    moment_II: As for `remove_inputs`.
    goals: Numbers of units that remain, in decreasing order.
    unit: Number of neighbouring inputs that are removed together. They cost the
      trace of w' P w F, for their rows w and the inverse P of their block of C^-1.
    damping: As for `remove_inputs`.
    sensitivity_OO: As for `remove_inputs`.

  Yields:
    float64[I, O].
  """
  root_II = _triangle_inverse(
    _factor(_damped(w_IO, moment_II, damping, np.median))
  )
  inverse_II = root_II.T @ root_II
  count = len(w_IO) // unit
  blocks = inverse_II.reshape(count, unit, count, unit)  # a view
  w_IO = np.array(w_IO, np.float64)
  weighted = w_IO if sensitivity_OO is None else w_IO @ sensitivity_OO
  both = np.concatenate([w_IO, weighted], axis=1)  # they change alike
  left = np.arange(count)
  for goal in goals:
    inverse_NUU = np.linalg.inv(blocks[left, :, left])
    w_NUO, f_NUO = np.split(both.reshape(count, unit, -1), 2, axis=2)
    square_NUU = (w_NUO @ f_NUO.swapaxes(1, 2))[left]
    cost_N = np.sum(inverse_NUU * square_NUU, axis=(1, 2))
    is_gone = _lowest(cost_N, len(left) - goal)
    drop = (left[is_gone, None] * unit + np.arange(unit)).reshape(-1)
    left = left[~is_gone]
    if not drop.size:  # of an empty matrix, LAPACK prints an error
      yield both[:, : w_IO.shape[1]].copy()
      continue
    # Block elimination: from C^-1 of all inputs to that of the remaining ones.
    cross = inverse_II[drop]
    root = _triangle_inverse(_factor(cross[:, drop]))
    moved = root @ cross
    _subtract(both, moved, root @ both[drop])
    _subtract(inverse_II, moved, moved)
    both[drop] = inverse_II[drop] = inverse_II[:, drop] = 0.0  # exactly
    yield both[:, : w_IO.shape[1]].copy()


def _subtract(c_IJ: np.ndarray, a_KI: np.ndarray, b_KJ: np.ndarray) -> None:
  """Subtracts a' b from c, in place.

  In half of NumPy's time: it makes a temporary array, and its product of a' and a
  is slow for few rows. All are C-contiguous float64; c would be copied otherwise.
  """
  [gemm] = scipy.linalg.get_blas_funcs(["gemm"], [c_IJ])
  gemm(-1.0, b_KJ.T, a_KI.T, beta=1.0, c=c_IJ.T, trans_b=1, overwrite_c=1)


def wanda(w_IO: Matrix, moment_II: Moment, fraction: float) -> Matrix:
  """Returns the weights with the lowest |w| rms(x) of each output at zero.

  Args:
    w_IO: Weights.
    moment_II: E[x x']; only its diagonal counts.
    fraction: Fraction of each output's weights to remove, in [0, 1).

  Raises:
    ValueError: the fraction is out of range, or C does not fit the inputs.

  References: Sun et al., "A simple and effective pruning approach for large
    language models", 2024.
  """
  score_IO = (
    np.abs(w_IO) * np.sqrt(np.diag(_damped(w_IO, moment_II, 0.0)))[:, None]
  )
  count = _count(fraction, len(w_IO))
  order_IO = np.argsort(score_IO, axis=0, kind="stable")
  w_IO = np.array(w_IO, np.float64)
  np.put_along_axis(w_IO, order_IO[:count], 0.0, axis=0)
  return w_IO


def magnitude(w: np.ndarray, fraction: float) -> np.ndarray:
  """Returns an array of any shape with a fraction, the lowest |w|, at zero.

  Raises:
    ValueError: the fraction is not in [0, 1).

  Example:
    >>> magnitude(np.array([[3.0, -1.0], [0.5, 2.0]]), 0.5).tolist()
    [[3.0, 0.0], [0.0, 2.0]]
  """
  w = np.array(w)
  w[_lowest(np.abs(w), _count(fraction, w.size))] = 0
  return w


def _damped(
  w_IO: Matrix,
  moment_II: Moment,
  damping: float,
  average: Callable[[np.ndarray], Any] = np.mean,
) -> Moment:
  if moment_II.shape != (len(w_IO),) * 2:
    raise ValueError(
      f"the moment {moment_II.shape} does not fit the {len(w_IO)} inputs"
    )
  moment_II = np.array(moment_II, np.float64)
  energy_I = np.diag(moment_II)
  if not np.isfinite(moment_II).all() or (energy_I < 0).any():
    raise ValueError(
      "the moment of a layer's input is not finite or has a negative mean square"
    )
  # If all inputs are always 0, any ridge will do.
  ridge = damping * (average(energy_I) or energy_I.mean() or 1.0)
  moment_II[np.diag_indices(len(w_IO))] += ridge
  return moment_II


def _factor(moment_II: Moment) -> Moment:
  """Returns the lower Cholesky factor of a positive definite matrix."""
  try:
    return np.linalg.cholesky(moment_II)
  except np.linalg.LinAlgError as error:
    raise ValueError(
      "the moment of a layer's input cannot be inverted; use more calibration "
      "text or damping"
    ) from error


def _triangle_inverse(lower_II: Moment) -> Moment:
  """Returns the inverse of a lower triangular matrix."""
  [invert] = scipy.linalg.get_lapack_funcs(["trtri"], [lower_II])
  return invert(lower_II, lower=1)[0]


def _count(fraction: float, size: int) -> int:
  if not 0 <= fraction < 1:
    raise ValueError(f"the fraction must be in [0, 1); it is {fraction}")
  return int(fraction * size + 1e-6)  # as FPP counts


def _lowest(score: np.ndarray, count: int) -> np.ndarray:
  """Returns True at the `count` lowest scores; the first of equal ones."""
  if not count:
    return np.zeros(score.shape, bool)
  flat = score.reshape(-1)
  limit = np.partition(flat, count - 1)[count - 1]
  drop = flat < limit
  drop[np.flatnonzero(flat == limit)[: count - np.count_nonzero(drop)]] = True
  return drop.reshape(score.shape)
