"""Encoded images by index, and how they become uint8 arrays: what all kinds of data set have in common."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
import tqdm

from ddpm_jax.data import images
from ddpm_jax.errors import UserError

_CHUNK = 256  # images a task: large enough for one batched read of a record file, small enough to share out


@dataclasses.dataclass(frozen=True)
class EncodedImages:
  """A data set before decoding.

  Attributes:
    name: what the user calls it.
    length: number of images.
    shape: (H, W, C) of the decoded images; C is 1 or 3.
    resize: whether to resize and crop them to that shape; else they must have it.
    fetch: encoded images, or paths to them, for a list of indices. Called from several threads.
    label: what to call image i in an error.
  """

  name: str
  length: int
  shape: tuple[int, int, int]
  resize: bool
  fetch: Callable[[list[int]], Sequence[bytes | pathlib.Path]]
  label: Callable[[int], str]


def decoded_size(name: str, stored: tuple[int | None, int | None], image_size: int) -> tuple[int, int]:
  """Height and width of the decoded images, in pixels.

  Args:
    name: of the data set.
    stored: height and width as stored; None where they differ or are not known.
    image_size: what the user asks for; 0: as stored.

  Raises:
    UserError: the images differ in size or are not square, and `image_size` is 0.
  """
  if image_size:
    return image_size, image_size
  height, width = stored
  remedy = "set --image_size to resize and crop them"
  if height is None or width is None:
    raise UserError(f"image_size: 0, but the images of {name} have different sizes; {remedy}")
  if height != width:
    raise UserError(f"image_size: 0, but the images of {name} are {height} x {width}, not square; {remedy}")
  return height, width


def decode(encoded: EncodedImages, indices: np.ndarray) -> np.ndarray:
  """The images at `indices` [N] as uint8 [N, H, W, C]. Raises UserError if one is broken or has another shape."""
  positions = [int(i) for i in indices]
  height, width, channels = encoded.shape
  batch = np.empty((len(positions), *encoded.shape), np.uint8)
  for row, position, file in zip(batch, positions, encoded.fetch(positions), strict=True):
    name = encoded.label(position)
    image = images.decode(file, channels, name, height if encoded.resize else 0)
    if image.shape != encoded.shape:
      raise UserError(
        f"image_size: 0, but {name} is {image.shape[0]} x {image.shape[1]} and not {height} x {width}; "
        "set --image_size to resize and crop the images"
      )
    row[...] = image
  return batch


def decode_all(encoded: EncodedImages) -> np.ndarray:
  """All images as uint8 [N, H, W, C], decoded on all cores (Pillow releases the GIL). Raises as `decode` does."""
  everything = np.empty((encoded.length, *encoded.shape), np.uint8)

  def fill(start: int) -> int:
    stop = min(start + _CHUNK, encoded.length)
    everything[start:stop] = decode(encoded, np.arange(start, stop))
    return stop - start

  progress = tqdm.tqdm(
    total=encoded.length, desc=f"decoding {encoded.name}", unit=" images", leave=False, disable=not sys.stderr.isatty()
  )
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, progress:
    for count in pool.map(fill, range(0, encoded.length, _CHUNK)):  # the first error cancels the tasks that wait
      progress.update(count)
  return everything
