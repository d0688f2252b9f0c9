"""Folding of trained arrays: finds the nearest folded ones from second moments.

The caller measures the second moments of a layer's input on calibration text, in
float64. Nothing here runs a model.

Axes: D width, H heads, J key heads, R = H / J, K head size, G row groups. E is D,
plus 1 if the projections have a bias (a constant input of 1).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

Projection = Mapping[str, Any]  # "kernel" [D, H, K] and maybe "bias" [H, K]

# A ridge is a fraction of the mean variance that is added to a moment.
_RIDGE = 1e-6
_RIDGES = tuple(10.0**n for n in range(-6, 3))  # `regress` chooses one
_ROWS = 1024  # of an embedding that are float64 at a time


class Moments(NamedTuple):
  """E[a a'] and E[a] of the input of a module."""

  second_II: Any
  mean_I: Any

  def around(self, projection: Mapping[str, Any]) -> Any:
    """Returns the covariance; without a bias for the mean, the second moment."""
    if "bias" not in projection:
      return self.second_II
    return self.second_II - np.outer(self.mean_I, self.mean_I)

  def mixed(self, mix: np.ndarray) -> "Moments":
    """Returns the moments of a @ mix."""
    return Moments(mix.T @ self.second_II @ mix, self.mean_I @ mix)


class FoldedHeads(NamedTuple):
  """Folded query and key projections.

  Attributes:
    q: "kernel" [D, H, G] and maybe "bias" [H, G].
    k: The same with J heads.
    kept: Fraction of the variance of the logits that is kept, over all heads.
    frequency: [J, G/2], radians per token; None without rotary positions.
  """

  q: dict[str, np.ndarray]
  k: dict[str, np.ndarray]
  kept: float
  frequency: np.ndarray | None = None


Tables = Mapping[str, tuple[np.ndarray, np.ndarray]]


class Components(NamedTuple):
  """Components of the rows of embeddings, uncorrelated over uses of tokens.

  A row is the mean of its embedding plus its D coordinates times `decode_DD`. The
  first r coordinates give the nearest row of rank r.

  Attributes:
    means: {module: mean row}, float64[D].
    encode_DD: Matrix from a centred row to its coordinates.
    decode_DD: Its inverse.
    variances_D: Variance of each coordinate, summed over the embeddings.
  """

  means: Mapping[str, np.ndarray]
  encode_DD: np.ndarray
  decode_DD: np.ndarray
  variances_D: np.ndarray


def components(
  tables: Tables, sensitivity_DD: np.ndarray | None = None
) -> Components:
  """Returns the components of embeddings; without F, the principal ones.

  Args:
    tables: {module: (float[rows, D], frequency of each row, in any unit)}. Errors
      of a row count in proportion to its frequency, above 0.
    sensitivity_DD: F; an error e of a row counts as e F e'. None: the identity.
  """
  [D] = {rows.shape[1] for rows, _ in tables.values()}
  means, covariance_DD = {}, np.zeros((D, D))
  for name, (rows, usage) in tables.items():
    share = np.asarray(usage, np.float64) / np.sum(usage, dtype=np.float64)
    mean_D = sum(share[at] @ rows[at] for at in _blocks(rows))
    for at in _blocks(rows):
      left = rows[at] - mean_D
      covariance_DD += (left * share[at, None]).T @ left
    means[name] = mean_D
  root, unroot = _root(np.eye(D) if sensitivity_DD is None else sensitivity_DD)
  variances_D, axes_DD = np.linalg.eigh(root.T @ covariance_DD @ root)
  axes_DD = axes_DD[:, ::-1]
  return Components(
    means, root @ axes_DD, (unroot @ axes_DD).T, variances_D[::-1]
  )


def _blocks(rows: np.ndarray) -> list[slice]:
  """Returns slices of rows, of which one at a time is float64."""
  return [slice(at, at + _ROWS) for at in range(0, len(rows), _ROWS)]


def _low_rank(
  tables: Tables, rank: int, sensitivity_DD: np.ndarray | None
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
  """Returns the nearest embeddings of low rank, in the mean over uses of tokens.

  A row becomes the mean plus r coordinates times a matrix of orthonormal rows,
  which span the leading components.

  Returns:
    ({module: coordinates, float32[rows, r]}, the matrix float64[r, D], the sum of
    the means).
  """
  found = components(tables, sensitivity_DD)
  axes_Dr, mix_rr = np.linalg.qr(found.decode_DD[:rank].T)
  encode_Dr = found.encode_DD[:, :rank] @ mix_rr.T

  def encode(rows, mean_D):
    parts = ((rows[at] - mean_D) @ encode_Dr for at in _blocks(rows))
    return np.concatenate([part.astype(np.float32) for part in parts])

  codes = {name: encode(tables[name][0], m) for name, m in found.means.items()}
  return codes, axes_Dr.T, np.sum(list(found.means.values()), axis=0)


def fold_embedding(
  embedding_VD: np.ndarray,
  usage_V: np.ndarray,
  rank: int,
  sensitivity_DD: np.ndarray | None = None,
) -> dict[str, Any]:
  """Returns the nearest embedding of low rank, in the mean over uses of tokens.

  Args:
    embedding_VD: One row per token.
    usage_V: Frequency of each token, as for `components`.
    rank: r, at most D.
    sensitivity_DD: As for `components`.

  Returns:
    {"embed": {"embedding": [V, r]}, "embed_expand": {"kernel": [r, D], "bias":
    [D]}}, float32.
  """
  codes, kernel_rD, mean_D = _low_rank(
    {"embed": (embedding_VD, usage_V)}, rank, sensitivity_DD
  )
  return {
    "embed": {"embedding": codes["embed"]},
    "embed_expand": {
      "kernel": kernel_rD.astype(np.float32),
      "bias": mean_D.astype(np.float32),
    },
  }


def fold_embeddings(
  tables: Tables, rank: int, sensitivity_DD: np.ndarray | None = None
) -> dict[str, Any]:
  """Returns embeddings that are added, all of low rank and with one matrix.

  The last channel of the last one has the mean of the sum; the matrix needs no bias.

  Args:
    tables: As for `components`.
    rank: r, above 1.
    sensitivity_DD: As for `components`.

  Returns:
    {module: {"embedding": [rows, r]}, "embed_expand": {"kernel": [r, D]}}, float32.
  """
  codes, kernel_rD, mean_D = _low_rank(tables, rank - 1, sensitivity_DD)
  size = np.linalg.norm(mean_D) or 1.0
  kernel = np.concatenate([kernel_rD, mean_D[None] / size])
  folded: dict[str, Any] = {
    name: {"embedding": np.pad(rows, ((0, 0), (0, 1)))}
    for name, rows in codes.items()
  }
  folded[list(tables)[-1]]["embedding"][:, -1] = size
  return folded | {"embed_expand": {"kernel": kernel.astype(np.float32)}}


class LogitTerms(NamedTuple):
  """The logits of dense heads as a sum over K channels, of which some can stay.

  Attributes:
    q_EHK: Queries.
    k_EJK: Keys. The logits are the products over channels of both.
    variance_JK: Variance of the logits of each channel, over the heads that share
      its key. Rotary channels stay in pairs, and both have half of that of the pair.
    width: D; rows of the projections from D on are the bias.
    frequencies: [K/2], radians per token; None without rotary positions.
  """

  q_EHK: np.ndarray
  k_EJK: np.ndarray
  variance_JK: np.ndarray
  width: int
  frequencies: np.ndarray | None = None

  def channels(self, groups: int) -> np.ndarray:
    """Returns [J, G], the channels of largest variance, in order.

    Raises:
      ValueError: G is 0 or above K, or odd with rotary positions.
    """
    J, K = self.variance_JK.shape
    if not 0 < groups <= K:
      raise ValueError(f"G must be 1 to {K}, the head size; it is {groups}")
    if self.frequencies is None:
      return np.tile(np.arange(groups), (J, 1))  # they are sorted
    if groups % 2:
      raise ValueError(
        f"rotary channels come in pairs, so G must be even; it is {groups}"
      )
    best = np.argsort(-self.variance_JK[:, : K // 2], axis=1, kind="stable")
    # Keep the order of the dense head: all pairs give that head again.
    pairs = np.sort(best[:, : groups // 2], axis=1)
    return np.concatenate([pairs, pairs + K // 2], axis=1)

  def fold(self, groups: int) -> FoldedHeads:
    """Returns the projections to the G channels of largest variance.

    Raises:
      ValueError: as in `channels`.
    """
    chosen_JG = self.channels(groups)
    J, K = self.variance_JK.shape
    scale = (groups / K) ** 0.5

    def cut(w_EHK):
      per_head = np.repeat(chosen_JG, w_EHK.shape[1] // J, axis=0)
      return _split(
        scale * np.take_along_axis(w_EHK, per_head[None], axis=2), self.width
      )

    kept = np.take_along_axis(self.variance_JK, chosen_JG, axis=1).sum()
    frequency = None
    if self.frequencies is not None:
      pairs = chosen_JG[:, : groups // 2]
      frequency = self.frequencies[pairs].astype(np.float32)
    return FoldedHeads(
      cut(self.q_EHK),
      cut(self.k_EJK),
      _share(kept, self.variance_JK.sum()),
      frequency,
    )


def head_terms(
  q: Projection,
  k: Projection,
  query_moment: np.ndarray,
  key_moment: np.ndarray,
) -> LogitTerms:
  """Returns terms of which the first G are the nearest logits of rank G.

  The logits of a head are x_i' M x_j with M = W_Q W_K', biases included. Let
  C = E[x x'] = L L' over queries, and C~ = L~ L~' over keys. For independent i
  and j, E (x_i' (M - M^) x_j)^2 = |L' (M - M^) L~|^2. The minimum has the G
  leading terms of the singular value decomposition of L' M L~. Query heads that
  share a key head are stacked and decomposed together.

  Softmax ignores a constant that is added to a row of logits. So subtract from
  each key the mean of its own text; the moment of keys is then a covariance.

  Args:
    q: Dense, H heads.
    k: Dense, J heads; J divides H.
    query_moment: [E, E], E[x x'] over query tokens.
    key_moment: [E, E], over key tokens. With biases, the last row and column of
      a covariance are 0.
  """
  a_EHK, b_EJK = _augmented(q), _augmented(k)
  (E, H, K), J = a_EHK.shape, b_EJK.shape[1]
  R = H // J
  root_q, unroot_q = _root(query_moment)
  root_k, unroot_k = _root(key_moment)
  new_q, new_k = np.zeros((E, H, K)), np.zeros((E, J, K))
  variance_JK = np.zeros((J, K))
  for j in range(J):
    of_j = slice(j * R, (j + 1) * R)
    left = np.concatenate([root_q.T @ a_EHK[:, j * R + r] for r in range(R)])
    u, s, v = _svd_of_product(left, root_k.T @ b_EJK[:, j])
    n = len(s)  # below K if there are fewer input channels
    variance_JK[j, :n] = s**2
    # Each side takes the root of a singular value.
    u_REn = (u[:, :n] * np.sqrt(s)).reshape(R, E, n)
    new_q[:, of_j, :n] = (unroot_q @ u_REn).transpose(1, 0, 2)
    new_k[:, j, :n] = unroot_k @ (v[:, :n] * np.sqrt(s))
  return LogitTerms(new_q, new_k, variance_JK, len(q["kernel"]))


def rotary_terms(
  q: Projection,
  k: Projection,
  query_moment: np.ndarray,
  key_moment: np.ndarray,
  frequencies: np.ndarray,
) -> LogitTerms:
  """Returns the channels of heads under RoPE, which carry the logits by pairs.

  Let q_f and k_f be complex numbers, one per pair of channels that rotates by
  theta_f. The logits are sum_f Re(q_f conj(k_f) e^(i theta_f (i - j))). As
  functions of the distance, these terms are nearly orthogonal for different
  theta_f. So the number of pairs matters, not the rank of W_Q W_K'. The error of
  G/2 pairs is the sum of the variances E|q_f|^2 E|k_f|^2 / 2 of the others.
  Channels that do not rotate are first replaced by the terms of `head_terms`, two
  per pair.

  Args:
    q: Dense, H heads.
    k: Dense, J heads; J divides H.
    query_moment: [E, E], E[x x'] over query tokens.
    key_moment: [E, E], over key tokens.
    frequencies: [K/2], radians per token; channel i is paired with i + K/2.
  """
  a_EHK, b_EJK = _augmented(q), _augmented(k)
  J, K = b_EJK.shape[1:]
  still = np.flatnonzero(np.tile(np.asarray(frequencies) == 0, 2))
  if still.size:
    terms = head_terms(
      {"kernel": a_EHK[..., still]},
      {"kernel": b_EJK[..., still]},
      query_moment,
      key_moment,
    )
    # Terms 0 and 1, the largest, are the first pair.
    order = np.arange(still.size).reshape(-1, 2).T.reshape(-1)
    a_EHK[..., still] = terms.q_EHK[..., order]
    b_EJK[..., still] = terms.k_EJK[..., order]

  def energies(w_EHK, moment):
    """Returns [J, K], the energy of each pair, at both of its channels."""
    w_EN = w_EHK.reshape(len(w_EHK), -1)
    energy_N = np.sum(w_EN * (moment @ w_EN), axis=0)
    each_JK = energy_N.reshape(J, -1, K).sum(1)
    return each_JK + np.roll(each_JK, K // 2, axis=1)

  variance_JK = energies(a_EHK, query_moment) * energies(b_EJK, key_moment) / 4
  return LogitTerms(
    a_EHK, b_EJK, variance_JK, len(q["kernel"]), np.asarray(frequencies)
  )


class FoldedValues(NamedTuple):
  """Value and output projections of rank r per head.

  Attributes:
    v: "kernel" [D, J, r] and maybe "bias" [J, r].
    o: "kernel" [H, r, D] and maybe "bias" [D].
    wrong: [HK, D]; c @ wrong is the error of the output of attention for an input
      c of the dense W_O, apart from a constant.
    mix: [HK, Hr]; the input of the new W_O is c @ mix.
  """

  v: dict[str, np.ndarray]
  o: dict[str, np.ndarray]
  wrong: np.ndarray
  mix: np.ndarray


def fold_values(
  v: Projection,
  o: Mapping[str, Any],
  moments: Moments,
  ranks: Iterable[int],
  *,
  sensitivity_DD: np.ndarray | None = None,
) -> Iterator[FoldedValues]:
  """Yields, per rank r, the projections with the nearest output of attention.

  Head h adds c_h W_O^h to the output, where c_h = z_h W_V mixes the values of all
  tokens. Let S_h = E[c_h c_h'] = L L', and let F = R R' weigh the errors. The
  nearest c_h T O, with T [K, r], spans the r leading left singular vectors U of
  L' W_O^h R, so T = L'^-1 U, scaled so that values and rows of W_O have the same
  size. T is absorbed into W_V. Heads that share values are stacked and decomposed
  together, with the mean of their S_h. Then W_O of all heads is the least-squares
  fit to the output of the layer, so that heads compensate for each other.

  Args:
    v: Dense, J heads; J divides H.
    o: "kernel" [H, K, D] and maybe "bias" [D], which absorbs the means.
    moments: E[c c'] [HK, HK] and E[c] [HK] of the inputs of W_O.
    ranks: r, at most K each.
    sensitivity_DD: F; an error e of the output counts as e F e'. None: the identity.

  Raises:
    ValueError: a rank is 0 or above K.
  """
  a_EJK, o_HKD = _augmented(v), np.asarray(o["kernel"], np.float64)
  J, (H, K, D) = a_EJK.shape[1], o_HKD.shape
  R = H // J
  of_head = moments.around(o).reshape(H, K, H, K)
  f_DD = np.eye(D) if sensitivity_DD is None else sensitivity_DD
  f_DD = f_DD + _RIDGE * np.trace(f_DD) / D * np.eye(D)
  t_JKK = np.zeros((J, K, K))  # T; there may be fewer outputs than ranks
  for j in range(J):
    heads = range(j * R, (j + 1) * R)
    root, unroot = _root(np.mean([of_head[h, :, h] for h in heads], axis=0))
    outputs_RKD = root.T @ o_HKD[heads]
    # From products of K by K, for which F needs no root.
    square_KK = np.tensordot(outputs_RKD @ f_DD, outputs_RKD, ((0, 2), (0, 2)))
    u = np.linalg.eigh(square_KK)[1][:, ::-1][:, : R * D]
    size = np.linalg.norm(u.T @ outputs_RKD, axis=(0, 2))
    t_JKK[j, :, : len(size)] = unroot @ (u * np.sqrt(size))
  # A lower rank keeps the first channels of a head.
  mix = np.asarray(scipy.linalg.block_diag(*np.repeat(t_JKK, R, axis=0)))
  fit = _OutputFit(o, moments, mix)
  for rank in ranks:
    if not 0 < rank <= K:
      raise ValueError(f"r must be 1 to {K}, the head size; it is {rank}")
    stays = np.tile(np.arange(K) < rank, H)
    new_v = np.einsum("EJK,JKr->EJr", a_EJK, t_JKK[:, :, :rank])
    new_o, wrong = fit(stays, rank)
    new_v = _split(new_v, len(v["kernel"]))
    yield FoldedValues(new_v, new_o, wrong, mix[:, stays])


def fit_heads(
  o: Mapping[str, Any], moments: Moments, heads: Sequence[int]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Returns W_O for some of the heads, fitted to the output of all of them.

  Args:
    o: As for `fold_values`.
    moments: As for `fold_values`.
    heads: Remaining heads, in order.

  Returns:
    ({"kernel": [heads, K, D] and maybe "bias" [D]}, `wrong` as in `FoldedValues`).
  """
  H, K, _ = o["kernel"].shape
  stays = np.repeat(np.isin(np.arange(H), heads), K)
  return _OutputFit(o, moments)(stays, K)


class _OutputFit:
  """W_O for some of the inputs c @ mix in place of all c."""

  def __init__(
    self, o: Mapping[str, Any], moments: Moments, mix: np.ndarray | None = None
  ):
    """Computes what fits to different inputs share.

    Args:
      o: W_O for inputs c.
      moments: Moments of c.
      mix: [HK, HK]; None: the identity.
    """
    gram = moments.around(o)
    self._o, self._mean_I, self._mix = o, moments.mean_I, mix
    self._old = np.asarray(o["kernel"], np.float64).reshape(len(gram), -1)
    cross = gram @ self._old
    if mix is not None:
      gram, cross = mix.T @ gram @ mix, mix.T @ cross
    self._gram, self._cross = gram, cross

  def __call__(
    self, stays: np.ndarray, size: int
  ) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns W_O and `wrong` of `FoldedValues`.

    Args:
      stays: bool[HK], True at inputs that stay.
      size: Number of them per remaining head.
    """
    new = solve_ridge(self._gram[np.ix_(stays, stays)], self._cross[stays])
    wrong = self._old.copy()
    if self._mix is None:
      wrong[stays] -= new
    else:
      wrong -= self._mix[:, stays] @ new
    kernel = new.reshape(-1, size, new.shape[1])
    new_o = {"kernel": kernel.astype(np.float32)}
    if "bias" in self._o:
      bias_D = self._o["bias"] + self._mean_I @ wrong
      new_o["bias"] = bias_D.astype(np.float32)
    return new_o, wrong


def fold_input_rows(
  projection: Projection, moment: np.ndarray, groups: int
) -> dict[str, np.ndarray]:
  """Returns the projection with one row per group (input axis).

  The D/G channels of a group are summed: z = S x. The rows are the regression of
  x' W on z, which is (S C S')^-1 S C W; it includes the bias, if any.

  Args:
    projection: Dense, [D, H, K].
    moment: [E, E], E[x x'].
    groups: G, a divisor of D.

  Raises:
    ValueError: G does not divide D.
  """
  w_EHK = _augmented(projection)
  D = projection["kernel"].shape[0]
  E, H, K = w_EHK.shape
  if not groups or D % groups:
    raise ValueError(f"{groups} groups do not divide {D} input channels")
  sums = np.zeros((groups + E - D, E))
  sums[np.arange(D) // (D // groups), np.arange(D)] = 1
  sums[groups:, D:] = np.eye(E - D)
  rows = solve_ridge(
    sums @ moment @ sums.T, sums @ moment @ w_EHK.reshape(E, -1)
  )
  return _split(rows.reshape(-1, H, K), groups)


class Regression(NamedTuple):
  """Least squares with a ridge that was chosen on held-out halves.

  Attributes:
    weights: [n, m].
    r2: 1 - error / variance on the held-out half, mean of both halves.
  """

  weights: np.ndarray
  r2: float


def regress(
  gram_2nn: Sequence[np.ndarray],
  cross_2nm: np.ndarray,
  square_2: np.ndarray,
  variance: float,
  prior_nm: np.ndarray | None = None,
) -> Regression:
  """Returns the coefficients that map features to targets.

  Each ridge is fitted on one half of the data and evaluated on the other; the
  best is fitted on both. The ridge shrinks the weights towards the prior, so they
  stay near it if there is little data.

  Args:
    gram_2nn: Sums of products of the n features, per half. Most of the memory; they
      are not copied, unless features are always 0.
    cross_2nm: Sums of products of features and residuals of the prior, per
      half. Compute residuals per token: a difference of sums would cancel.
    square_2: Sums of squares of the residuals, per half.
    variance: Sum of squares of the targets around their mean, for r2.
    prior_nm: Weights without data; None: zero.
  """
  # Features that are always 0, such as removed neurons, only cost time.
  is_live_n = np.any([np.diag(gram) for gram in gram_2nn], axis=0)
  if is_live_n.any() and not is_live_n.all():
    live = regress(
      [gram[np.ix_(is_live_n, is_live_n)] for gram in gram_2nn],
      cross_2nm[:, is_live_n],
      square_2,
      variance,
    )
    weights = np.zeros(cross_2nm.shape[1:])
    weights[is_live_n] = live.weights
    return Regression(weights + (0 if prior_nm is None else prior_nm), live.r2)
  error = np.zeros(len(_RIDGES))
  with futures.ThreadPoolExecutor(2) as pool:
    spectra = list(pool.map(_spectrum, gram_2nn))
  for half, (size, basis) in enumerate(spectra):
    other = 1 - half
    # In the basis of one half, so that ridges cost no products of matrices.
    ours_nm, theirs_nm = (basis.T @ cross_2nm[at] for at in (half, other))
    linear_n = np.sum(ours_nm * theirs_nm, axis=1)
    square_nn = (basis.T @ gram_2nn[other] @ basis) * (ours_nm @ ours_nm.T)
    for i, ridge in enumerate(_RIDGES):
      scale_n = 1 / _added(size, ridge)
      error[i] += square_2[other] - 2 * scale_n @ linear_n
      error[i] += scale_n @ square_nn @ scale_n
  best = int(np.argmin(error))
  gram = np.add(*gram_2nn)
  weights = solve_ridge(gram, cross_2nm.sum(0), _RIDGES[best])
  if prior_nm is not None:
    weights = weights + prior_nm
  return Regression(weights, float(1 - error[best] / max(variance, 1e-300)))


def solve_ridge(
  gram: np.ndarray, cross: np.ndarray, ridge: float = _RIDGE
) -> np.ndarray:
  """Returns (gram + ridge mean(diag) I)^-1 cross."""
  damped = np.array(gram, np.float64)
  np.fill_diagonal(damped, _added(np.diag(damped), ridge))
  try:
    return scipy.linalg.cho_solve(scipy.linalg.cho_factor(damped), cross)
  except np.linalg.LinAlgError:  # by rounding, see `_spectrum`
    size, basis = _spectrum(gram)
    return basis @ ((basis.T @ cross) / _added(size, ridge)[:, None])


def _spectrum(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns eigenvalues and eigenvectors of a matrix of sums of products.

  Rounding of sums in float32 can make eigenvalues negative, by more than a ridge,
  so a Cholesky factor may not exist. They become 0 here.
  """
  size, basis = np.linalg.eigh(np.asarray(gram, np.float64))
  return size.clip(0), basis


def _added(size: np.ndarray, ridge: float) -> np.ndarray:
  # Without any variance the ridge only has to be positive.
  return size + ridge * (size.mean() or 1.0)


def _augmented(projection: Projection) -> np.ndarray:
  """Returns the kernel [E, H, K] with the bias, if any, as its last row."""
  rows = [np.asarray(projection["kernel"], np.float64)]
  if "bias" in projection:
    rows.append(np.asarray(projection["bias"], np.float64)[None])
  return np.concatenate(rows)


def _split(w_EHG: np.ndarray, D: int) -> dict[str, np.ndarray]:
  """Returns the kernel [D, H, G], and the row after it, if any, as the bias."""
  parts = {"kernel": w_EHG[:D].astype(np.float32)}
  if len(w_EHG) > D:
    parts["bias"] = w_EHG[D].astype(np.float32)
  return parts


def _root(moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns (L, inverse of L') with L L' = moment + ridge."""
  size, basis = _spectrum(moment)
  root = np.sqrt(_added(size, _RIDGE))
  return basis * root, basis / root


def _svd_of_product(a: np.ndarray, b: np.ndarray):
  """Returns (u, s, v) with a b' = u diag(s) v', from a K by K product."""
  left, r_left = np.linalg.qr(a)
  right, r_right = np.linalg.qr(b)
  u, s, vt = np.linalg.svd(r_left @ r_right.T)
  return left @ u, s, right @ vt.T


def _share(kept: float, total: float) -> float:
  """Returns kept / total, 1 if the total is 0."""
  return float(kept / total) if total else 1.0
