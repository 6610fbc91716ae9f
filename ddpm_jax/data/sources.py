"""Random-access image sources: the one place where the name of a data set becomes one."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data import folder, prepared
from ddpm_jax.data.encoded import decode, decode_all


@dataclasses.dataclass(frozen=True)
class Source:
  """Images by index.

  Attributes:
    name: what the user calls the data set.
    image_shape: (H, W, C) of every image.
    length: number of images, at least 1.
    read: images uint8 [len(indices), H, W, C] for an int array of indices in 0..length-1, repeats allowed. May be
      called from several threads. Raises UserError for an image that cannot be decoded.
  """

  name: str
  image_shape: tuple[int, int, int]
  length: int
  read: Callable[[np.ndarray], np.ndarray]

  def __len__(self) -> int:
    return self.length


def open_source(data: DataConfig) -> Source:
  """Opens `data.dataset`, which is prepared first if need be.

  A data set whose decoded images take at most `data.cache_gib` GiB is decoded here, once, into one array. TensorFlow is
  not imported, not even if it is installed.

  Raises:
    UserError: no such data set, split or folder; no images in it; images that differ in size, or are not square, where
      `data.image_size` is 0; an image that cannot be decoded; a data set that cannot be prepared.
  """
  opener = folder.open_folder if data.dataset.startswith(folder.PREFIX) else prepared.open_prepared
  encoded = opener(data)
  if encoded.length * math.prod(encoded.shape) <= data.cache_gib * 2**30:
    read = decode_all(encoded).__getitem__
  else:
    read = functools.partial(decode, encoded)
  return Source(name=encoded.name, image_shape=encoded.shape, length=encoded.length, read=read)
