"""Whether samples are copies: the nearest training images of each, in a data set that need not fit in memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ddpm_jax.workdir.grids import captioned, framed, image_grid

_AT_ONCE = 1000  # queries, and references
_NUMBERS = 2**22  # in one temporary array of exact differences
_ZERO = 1e-6  # of the typical distance


def _squared(queries: np.ndarray, block: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
  """|queries[row] - block[column]|^2 of each pair, by differences: 0 for equal points, equal for equal pairs."""
  found = np.empty(len(rows))
  size = max(1, _NUMBERS // queries.shape[1])
  for start in range(0, len(rows), size):
    pairs = slice(start, start + size)
    found[pairs] = np.square(queries[rows[pairs]] - block[columns[pairs]]).sum(axis=1)
  return found


def _improve(queries: np.ndarray, start: int, block: np.ndarray, squared: np.ndarray, indices: np.ndarray) -> None:
  """Updates the k best of each query, `squared` and `indices` [N, k], with one block of the data set.

  A matrix product finds the pairs that may be among the best, and some more, as it is only right to rounding; the
  distances of these few are then taken by differences.
  """
  k = squared.shape[1]
  center = queries.mean(axis=0)
  a, b = queries - center, block - center
  norms_a, norms_b = (np.einsum("nd,nd->n", points, points) for points in (a, b))
  rough = norms_a[:, None] - 2 * (a @ b.T) + norms_b
  rounding = 4 * max(a.shape[1], 8) * np.finfo(np.float64).eps * (norms_a + norms_b.max())
  best = np.partition(rough, k - 1, axis=1)[:, k - 1] if k < len(block) else np.inf
  rows, columns = np.nonzero(rough <= (np.minimum(squared[:, -1], best) + 2 * rounding)[:, None])

  of = np.concatenate([np.repeat(np.arange(len(queries)), k), rows])
  distance = np.concatenate([squared.ravel(), _squared(queries, block, rows, columns)])
  index = np.concatenate([indices.ravel(), start + columns])
  order = np.lexsort((index, distance, of))  # by query, then distance, then index
  chosen = order[np.searchsorted(of[order], np.arange(len(queries)))[:, None] + np.arange(k)]
  squared[:], indices[:] = distance[chosen], index[chosen]


def nearest(queries: np.ndarray, references: Iterable[tuple[int, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
  """The k nearest references of each query by Euclidean distance; of equally near ones those of lower index.

  Args:
    queries: [N, D], features or pixels, of any number type.
    references: (index of the first row, rows [B, D]), for all of a data set, in any order and blocks of any size; read
      once, one at a time. Besides one, float64 copies of the queries and of 1000 rows are kept in memory.
    k: how many.

  Returns:
    Distances, float64 [N, k], ascending, in the units of the queries, exactly 0 for equal points, and the same however
    the data set is cut into blocks; indices, int64 [N, k].

  Raises:
    ValueError: fewer than k references, or values that are not finite or do not fit.
  """
  queries = np.asarray(queries, np.float64)
  if queries.ndim != 2 or not np.isfinite(queries).all() or k < 1:
    raise ValueError(f"queries of shape {queries.shape} and k = {k}: finite [N, D] and at least 1 are needed")
  squared = np.full((len(queries), k), np.inf)
  indices = np.full((len(queries), k), np.iinfo(np.int64).max)
  seen = 0
  for start, block in references:
    if block.ndim != 2 or block.shape[1] != queries.shape[1] or not np.isfinite(block).all():
      raise ValueError(f"references from {start}: shape {block.shape}; finite [B, {queries.shape[1]}] are needed")
    seen += len(block)
    for row in range(0, len(block), _AT_ONCE):
      rows = np.asarray(block[row : row + _AT_ONCE], np.float64)
      for first in range(0, len(queries), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        _improve(queries[part], start + row, rows, squared[part], indices[part])
  if seen < k:
    raise ValueError(f"{k} nearest of {seen} references")
  return np.sqrt(squared), indices


def nearer_orientation(
  given: tuple[np.ndarray, np.ndarray], mirrored: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The k nearest references where each counts once, at the smaller of its two distances.

  Without that, a reference that is nearly its own mirror image would be both the nearest and the second nearest, and
  `near_duplicates` could not see its copies. The k best of both are among the k best of either.

  Args:
    given: (distances, indices) [N, k] of `nearest`, for the queries.
    mirrored: the same for the queries mirrored.

  Returns:
    Distances, float64 [N, k], ascending; indices, int64 [N, k]; and whether it was the mirrored query that was nearer,
    bool [N, k]. Of equal distances that of the lower index, and of the query as it is given.
  """
  distances, indices = (np.concatenate(pair, axis=1) for pair in zip(given, mirrored, strict=True))
  k = given[0].shape[1]
  flipped = np.broadcast_to(np.arange(2 * k) >= k, distances.shape)
  order = np.lexsort((flipped, indices, distances))
  distances, indices, flipped = (np.take_along_axis(array, order, axis=1) for array in (distances, indices, flipped))
  repeated = np.tril(indices[:, :, None] == indices[:, None, :], -1).any(axis=2)
  first = np.argsort(repeated, axis=1, kind="stable")[:, :k]
  distances, indices, flipped = (np.take_along_axis(array, first, axis=1) for array in (distances, indices, flipped))
  return distances, indices, flipped


def near_duplicates(distances: np.ndarray, ratio: float = 1 / 3) -> np.ndarray:
  """Which samples count as copies of a training image: bool [N]; its mean is the memorised share.

  A sample does if its nearest training image is nearer than `ratio` times the second nearest (Yoon et al. 2023; Gu et
  al. 2023, "On Memorization in Diffusion Models", with 1/3). The criterion cannot see the copy of an image that is
  twice in the training set, as both are equally near. So a sample also counts where the nearest image is at distance 0,
  or below a millionth of the median distance of all given here. What remains unseen is a close, but not exact, copy of
  an image that is there twice.

  Args:
    distances: [N, 2 or more], ascending, as `nearest` returns them.
    ratio: of the first to the second distance.

  Raises:
    ValueError: fewer than two distances, or not ascending.
  """
  distances = np.asarray(distances, np.float64)
  if distances.ndim != 2 or distances.shape[1] < 2 or not (distances[:, :-1] <= distances[:, 1:]).all():
    raise ValueError(f"distances of shape {distances.shape}: two or more for each sample, ascending, are needed")
  first, second = distances[:, 0], distances[:, 1]
  typical = np.median(distances) if distances.size else 0.0
  return (first < ratio * second) | (first <= _ZERO * typical)


def picture(samples: np.ndarray, neighbours: np.ndarray, mirrored: np.ndarray | None = None) -> np.ndarray:
  """Each sample with its nearest training images to the right of it, a row for each sample.

  Args:
    samples: uint8 [R, H, W, C], C 1 or 3.
    neighbours: uint8 [R, k, H, W, C], nearest first, in the orientation that is nearest.
    mirrored: bool [R, k], which of them are mirrored: these are framed. None if only one orientation was looked up.

  Returns:
    uint8 [height, width, 3].

  Raises:
    ValueError: shapes do not fit.
  """
  if neighbours.ndim != 5 or (len(neighbours), *neighbours.shape[2:]) != samples.shape:
    raise ValueError(f"samples {samples.shape} and neighbours {neighbours.shape} do not fit")
  right = image_grid(neighbours.reshape(-1, *samples.shape[1:]), columns=neighbours.shape[1])
  caption, least = "nearest training images", 150  # pixels, for the caption
  if mirrored is not None:
    right = framed(right, mirrored)
    caption, least = "nearest training images (framed: mirrored)", 240
  room = max(0, least - right.shape[1])
  right = np.pad(right, ((0, 0), (0, room), (0, 0)), constant_values=255)
  left = captioned({"sample": image_grid(samples, columns=1)})
  right = captioned({caption: right})
  gap = np.full((len(left), 12, 3), 255, np.uint8)
  return np.concatenate([left, gap, right], axis=1)
