"""One-shot pruning of trained layers: SparseGPT, Wanda, magnitude, inputs.

A layer y = x W is given by W [I, O] and the second moment of its input,
C = E[x x'] [I, I]. Everything is computed in float64 on the host.

Axes: I inputs, O outputs.
"""

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
  inverse_II = _inverse(_damped(w_IO, moment_II, damping))
  u_II = scipy.linalg.cholesky(inverse_II)  # U' U = C^-1
  w_IO, removed = np.array(w_IO, np.float64), 0
  for begin in range(0, inputs, block):
    end = min(begin + block, inputs)
    scale_B1 = np.diag(u_II)[begin:end, None]
    wanted = _count(fraction, end * w_IO.shape[1])
    drop_BO = _lowest(np.square(w_IO[begin:end] / scale_B1), wanted - removed)
    removed = wanted
    for i in range(begin, end):
      error_O = np.where(drop_BO[i - begin], w_IO[i] / u_II[i, i], 0)
      w_IO[i:] -= np.outer(u_II[i, i:], error_O)
      w_IO[i][drop_BO[i - begin]] = 0.0  # exactly
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
  *_, last = removals(
    w_IO, moment_II, goals, damping=damping, sensitivity_OO=sensitivity_OO
  )
  return last


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
  inverse_II = _inverse(_damped(w_IO, moment_II, damping, np.median))
  w_IO = np.array(w_IO, np.float64)
  left = np.arange(len(w_IO))
  for goal in goals:
    count = len(left) // unit
    w_NUO = w_IO[left].reshape(count, unit, -1)
    block_NUU = inverse_II.reshape(count, unit, count, unit)[
      range(count), :, range(count)
    ]
    solved_NUO = np.linalg.solve(block_NUU, w_NUO)
    if sensitivity_OO is not None:
      w_NUO = (w_IO[left] @ sensitivity_OO).reshape(w_NUO.shape)
    cost_N = np.sum(solved_NUO * w_NUO, axis=(1, 2))
    drop = np.repeat(_lowest(cost_N, count - goal), unit)
    # Block elimination: from C^-1 of all inputs to that of the remaining ones.
    cross = inverse_II[np.ix_(drop, ~drop)]
    moved = np.linalg.solve(inverse_II[np.ix_(drop, drop)], cross)
    w_IO[left[~drop]] -= moved.T @ w_IO[left[drop]]
    w_IO[left[drop]] = 0.0
    inverse_II = inverse_II[np.ix_(~drop, ~drop)]
    inverse_II -= cross.T @ moved
    left = left[~drop]
    yield w_IO.copy()


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
  drop = _lowest(np.abs(w), _count(fraction, w.size))
  return np.where(drop, 0.0, np.asarray(w, np.float64))


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
  # If all inputs are always 0, any ridge will do.
  ridge = damping * (average(energy_I) or energy_I.mean() or 1.0)
  moment_II[np.diag_indices(len(w_IO))] += ridge
  return moment_II


def _inverse(moment_II: Moment) -> Moment:
  """Returns the inverse of a positive definite matrix."""
  try:
    factor = scipy.linalg.cho_factor(moment_II)
    return scipy.linalg.cho_solve(factor, np.eye(len(moment_II)))
  except np.linalg.LinAlgError as error:
    raise ValueError(
      "the moment of a layer's input cannot be inverted; use more calibration "
      "text or damping"
    ) from error


def _count(fraction: float, size: int) -> int:
  if not 0 <= fraction < 1:
    raise ValueError(f"the fraction must be in [0, 1); it is {fraction}")
  return int(fraction * size + 1e-6)  # as FPP counts


def _lowest(score: np.ndarray, count: int) -> np.ndarray:
  """Returns True at the `count` lowest scores; the first of equal ones."""
  drop = np.zeros(score.size, bool)
  drop[np.argsort(score, axis=None, kind="stable")[:count]] = True
  return drop.reshape(score.shape)
