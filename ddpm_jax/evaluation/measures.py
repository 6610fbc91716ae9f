"""How far apart two sets of images are, by their features: pure functions in float64 on the host."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_EPSILON = float(np.finfo(np.float64).eps)
_NO_COVARIANCE = 1e-4  # a more negative eigenvalue, as a share of the largest, is not the rounding even of float32


def _matrix(values: np.ndarray, what: str) -> np.ndarray:
  """float64 [N, D] that is finite, or ValueError."""
  values = np.asarray(values, np.float64)
  if values.ndim != 2:
    raise ValueError(f"{what}: shape {values.shape} instead of two dimensions")
  if not np.isfinite(values).all():
    raise ValueError(f"{what}: not all values are finite")
  return values


def _two_sets(
  first: np.ndarray, second: np.ndarray, names: tuple[str, str], at_least: int
) -> tuple[np.ndarray, np.ndarray]:
  """Two `_matrix` of the same width and enough rows, or ValueError."""
  matrices = _matrix(first, names[0]), _matrix(second, names[1])
  if matrices[0].shape[1] != matrices[1].shape[1]:
    raise ValueError(f"{names[0]} and {names[1]}: {matrices[0].shape[1]} and {matrices[1].shape[1]} features")
  for matrix, name in zip(matrices, names, strict=True):
    if len(matrix) < at_least:
      raise ValueError(f"{name}: {len(matrix)} rows, and at least {at_least} are needed")
  return matrices


def _root(cov: np.ndarray, what: str) -> np.ndarray:
  """R [D, rank] with R R^T = cov, without the directions in which cov is 0 but for rounding."""
  values, vectors = np.linalg.eigh((cov + cov.T) / 2)
  largest = max(values[-1], 0.0)
  if values[0] < -_NO_COVARIANCE * largest:
    raise ValueError(f"{what}: eigenvalues from {values[0]:.3g} to {values[-1]:.3g} are not those of a covariance")
  seen = values > len(values) * _EPSILON * largest
  return vectors[:, seen] * np.sqrt(values[seen])


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
  """The squared Fréchet distance of two Gaussians: FID, if the features are those of Inception v3.

  |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^{1/2}): Dowson and Landau 1982; Heusel et al. 2017, eq. 6.
  With cov_a = A A^T and cov_b = B B^T, the eigenvalues of cov_a cov_b, those of A^T cov_b A, are the squares of
  the singular values of A^T B: their sum is the trace of the root. Nothing can become complex, singular covariances
  (fewer images than features) need no offset on the diagonal, and small eigenvalues keep their digits.

  Args:
    mean_a: [D].
    cov_a: [D, D].
    mean_b: [D].
    cov_b: [D, D].

  Returns:
    At least 0.

  Raises:
    ValueError: shapes do not fit, a value is not finite, or `cov_a` or `cov_b` is not a covariance.
  """
  mean_a, mean_b = np.asarray(mean_a, np.float64), np.asarray(mean_b, np.float64)
  cov_a, cov_b = _matrix(cov_a, "cov_a"), _matrix(cov_b, "cov_b")
  width = mean_a.size
  if not mean_a.shape == mean_b.shape == (width,) or not cov_a.shape == cov_b.shape == (width, width):
    shapes = ", ".join(str(part.shape) for part in (mean_a, cov_a, mean_b, cov_b))
    raise ValueError(f"means [D] and covariances [D, D] do not fit: {shapes}")
  if not np.isfinite(mean_a).all() or not np.isfinite(mean_b).all():
    raise ValueError("mean: not all values are finite")
  shared = _root(cov_a, "cov_a").T @ _root(cov_b, "cov_b")
  overlap = np.linalg.svd(shared, compute_uv=False).sum()
  distance = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
  return max(float(distance), 0.0)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """k(x, y) = (x.y / D + 1)^3 of all pairs: [N, M]."""
  base = a @ b.T / a.shape[1] + 1.0
  return base * base * base  # many times faster than a power


def kid(
  features_a: np.ndarray, features_b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
  """The kernel distance (KID, if the features are those of Inception v3) of Binkowski et al. 2018, section 4.

  The unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) with the kernel
  (x.y / D + 1)^3, of random subsets, each drawn without replacement. It may be below 0.

  Args:
    features_a: [N, D].
    features_b: [M, D].
    subsets: how many.
    subset_size: rows of each set in one subset; all rows of the smaller set, if it has fewer.
    seed: of the draw; the same seed gives the same numbers.

  Returns:
    Mean and standard deviation over the subsets. The latter is no error of the mean: subsets share rows, and if each
    subset is all there is, it is 0.

  Raises:
    ValueError: fewer than 2 rows, or values that are not finite or do not fit.
  """
  a, b = _two_sets(features_a, features_b, ("features_a", "features_b"), at_least=2)
  size = min(subset_size, len(a), len(b))
  if size < 2 or subsets < 1:
    raise ValueError(f"{subsets} subsets of {size} rows: at least 1 of at least 2 is needed")
  random = np.random.default_rng(seed)
  estimates = []
  for _ in range(subsets):
    x = a[random.choice(len(a), size, replace=False)]
    y = b[random.choice(len(b), size, replace=False)]
    xx, yy = _kernel(x, x), _kernel(y, y)
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
    estimates.append(within - 2 * _kernel(x, y).mean())
  return float(np.mean(estimates)), float(np.std(estimates))


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
  """exp(E KL(p(y|x) || p(y))) of Salimans et al. 2016, section 4, in nats.

  The images are cut into `splits` runs of consecutive rows, and p(y) is the mean of its run, as in the authors' code. A
  run of n images has a score of at most n.

  Args:
    probabilities: [N, K], a row for each image, K classes; rows that sum to 1.
    splits: how many runs; N, if there are fewer images.

  Returns:
    Mean and standard deviation over the splits.

  Raises:
    ValueError: no image, or rows that are no distributions.
  """
  rows = _matrix(probabilities, "probabilities")
  if not len(rows) or splits < 1:
    raise ValueError(f"probabilities: {len(rows)} rows in {splits} splits; at least 1 of each is needed")
  if (rows < 0).any() or np.abs(rows.sum(axis=1) - 1).max() > 1e-3:
    raise ValueError("probabilities: a row has a value below 0, or does not sum to 1")
  splits = min(splits, len(rows))
  scores = []
  for i in range(splits):
    part = rows[i * len(rows) // splits : (i + 1) * len(rows) // splits]
    # 0 log 0 = 0. The marginal of a class is 0 only where all of its probabilities are.
    conditional = np.log(part, out=np.zeros_like(part), where=part > 0)
    marginal = part.mean(axis=0)
    marginal = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
    scores.append(np.exp((part * (conditional - marginal)).sum(axis=1).mean()))
  return float(np.mean(scores)), float(np.std(scores))


def _blocks(a: np.ndarray, b: np.ndarray, block: int, lean: int) -> Iterator[tuple[slice, np.ndarray]]:
  """Rows of `a`, and their squared distances to all of `b`: [rows, M].

  |x|^2 + |y|^2 - 2 x.y is right to rounding of |x|^2 + |y|^2. A `lean` of -1 takes as much off, so that what is equal
  but for rounding is not above; 1 adds as much; 0 is the best estimate, at least 0.
  """
  rounding = max(a.shape[1], 8) * _EPSILON
  norms_a, norms_b = (np.einsum("nd,nd->n", points, points) for points in (a, b))
  for start in range(0, len(a), block):
    rows = slice(start, start + block)
    squared = a[rows] @ b.T
    squared *= -2
    squared += norms_a[rows, None] * (1 + lean * rounding)
    squared += norms_b * (1 + lean * rounding)
    yield rows, squared if lean else np.maximum(squared, 0, out=squared)


def squared_radii(points: np.ndarray, k: int, block: int = 1000) -> np.ndarray:
  """The squared distance of each point to its k-th nearest neighbour, itself not counted: float64 [N].

  Args:
    points: float64 [N, D], best around 0, where the distances have the most digits.
    k: from 1 to N - 1.
    block: points at a time: memory for block times N numbers is needed.

  Raises:
    ValueError: N <= k.
  """
  if not 1 <= k < len(points):
    raise ValueError(f"{len(points)} points have no {k}-th nearest neighbour each")
  radii = np.empty(len(points))
  for rows, squared in _blocks(points, points, block, lean=0):
    own = np.arange(len(squared))
    squared[own, own + rows.start] = np.inf
    squared.partition(k - 1, axis=1)
    radii[rows] = squared[:, k - 1]
  return radii


def _around_zero(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Both sets in float64, checked, and moved so that the mean of the real ones is 0."""
  real, fake = _two_sets(real, fake, ("real", "fake"), at_least=1)
  mean = real.mean(axis=0)
  return real - mean, fake - mean


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3, block: int = 1000) -> tuple[float, float]:
  """Improved precision and recall of Kynkäänniemi et al. 2019, eqs. 1 and 2, whose numbers are of VGG-16 features.

  The manifold of a set is the union of balls around its points, each as large as the distance to the k-th nearest other
  point of the set, the surface included. Both depend on N and M: compare only numbers from sets of the same sizes.

  Args:
    real: features [N, D].
    fake: features [M, D].
    k: which neighbour.
    block: rows at a time; needs memory for float64 copies of both sets and a few times block times N numbers.

  Returns:
    Precision, the share of fake points on the manifold of the real ones; recall, the share of real points on the
    manifold of the fake ones.

  Raises:
    ValueError: N or M is at most k, or values are not finite or do not fit.
  """
  real, fake = _around_zero(real, fake)
  real_radii, fake_radii = squared_radii(real, k, block), squared_radii(fake, k, block)
  precise, recalled = 0, np.zeros(len(real), bool)
  for rows, squared in _blocks(fake, real, block, lean=-1):
    precise += np.count_nonzero((squared <= real_radii).any(axis=1))
    recalled |= (squared <= fake_radii[rows, None]).any(axis=0)
  return float(precise / len(fake)), float(recalled.mean())


def density_coverage(real: np.ndarray, fake: np.ndarray, k: int = 5, block: int = 1000) -> tuple[float, float]:
  """Density and coverage of Naeem et al. 2020, section 3.

  The balls are those of `precision_recall` around real points, without their surface, as in the authors' code: for
  fake points that are the real ones both numbers are 1.

  Args:
    real: features [N, D].
    fake: features [M, D].
    k: which neighbour.
    block: rows at a time; needs memory as `precision_recall`.

  Returns:
    Density, how many balls a fake point lies in, divided by k, on average: 1 is expected for sets of one distribution,
    and it may be above; coverage, the share of balls with a fake point inside.

  Raises:
    ValueError: N is at most k, there is no fake point, or values are not finite or do not fit.
  """
  real, fake = _around_zero(real, fake)
  radii = squared_radii(real, k, block)
  inside, covered = 0, np.zeros(len(real), bool)
  for _, squared in _blocks(fake, real, block, lean=1):
    within = squared < radii
    inside += np.count_nonzero(within)
    covered |= within.any(axis=0)
  return float(inside / (k * len(fake))), float(covered.mean())
