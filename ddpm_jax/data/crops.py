"""Crops: the part of an image that is taken, where it is larger than the images that are wanted in one direction."""

from __future__ import annotations

import numpy as np

_STREAM = 2**64 - 1  # beside the epochs of `shuffle`, which number its streams


def random_places(seed: int, step: int, index: np.ndarray) -> np.ndarray:
  """Where the crops of a training step lie: float64 [N] in [0, 1), a function of (seed, step, index) alone.

  Args:
    seed: of the run, in 0..2**32 - 1.
    step: batches that came before.
    index: int [N], places in the global batch.
  """
  bits = np.random.Philox(key=np.array([seed, _STREAM], np.uint64), counter=np.array([0, step, 0, 0], np.uint64))
  # As in `shuffle`: NumPy promises these words (NEP 19), but not what a `Generator` makes of them.
  return (bits.random_raw(int(index.max()) + 1)[index] >> np.uint64(11)) * 2.0**-53


def crop(image: np.ndarray, shape: tuple[int, int, int], place: float | None = None) -> np.ndarray:
  """A view of the part [H, W, C] of an image [h, w, C] that covers it.

  Args:
    image: of which a part is taken.
    shape: (H, W, C).
    place: in [0, 1), from the top and from the left; each position has the same share of it. None: the centre.
  """
  if image.shape == shape:
    return image
  place = 0.5 if place is None else place
  top, left = (int(place * (have - want + 1)) for have, want in zip(image.shape[:2], shape[:2], strict=True))
  return image[top : top + shape[0], left : left + shape[1]]
