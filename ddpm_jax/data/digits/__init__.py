"""The embedded data set `digits`: 1,797 handwritten digits of 8 x 8 pixels, read from the package into memory.

Until release 0.1.0 TFDS prepared them in `--data_dir`. Here they have the order, the splits and the fingerprint that
they had there, so that a run which was trained on those goes on.
"""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.splits import SplitDict

from ddpm_jax.config import DataConfig
from ddpm_jax.data import images, prepared
from ddpm_jax.data.encoded import EncodedImages, Labels, decoded_size
from ddpm_jax.errors import UserError

_FILE = pathlib.Path(__file__).parent / "optdigits.csv.gz"
_VERSION = "1.0.0"
_FULL_NAME = f"digits/{_VERSION}"  # TFDS's
_SIZE, _NUMBER = 8, 1797


def is_digits(data: DataConfig) -> bool:
  """Returns True for this data set, in any version."""
  return data.dataset.partition(":")[0] == "digits"


def splits() -> SplitDict:
  """The one split, `train`, as a folder of TFDS describes it."""
  template: Any = tfds.core.ShardedFileTemplate  # whose folder is of TFDS's own type
  file = template(data_dir=pathlib.Path(), dataset_name="digits", split="train", filetype_suffix="array_record")
  return SplitDict([tfds.core.SplitInfo(name="train", shard_lengths=[_NUMBER], num_bytes=0, filename_template=file)])


def image_shape(data: DataConfig) -> tuple[int, int, int]:
  """(H, W, C) of the decoded images. Raises UserError for another version."""
  if data.dataset not in ("digits", f"digits:{_VERSION}"):
    raise UserError(f"dataset: {data.dataset!r} is unknown; use digits, which has version {_VERSION} alone")
  return (*decoded_size(data.dataset, (_SIZE, _SIZE), data.image_size), 1)


def open_digits(data: DataConfig) -> EncodedImages:
  """The digits of `data.split`. Nothing is written.

  Raises:
    UserError: another version, or no such split.
  """
  shape, shards = image_shape(data), prepared.shards_of(data, splits())
  pixels, labels = _in_order()
  rows = np.concatenate([np.arange(shard.skip, shard.skip + shard.take) for shard in shards])
  return EncodedImages(
    name=data.dataset,
    length=len(rows),
    shape=shape,
    resize=bool(data.image_size),
    identity=f"{_FULL_NAME} {data.split}",
    listing=prepared.listing(_FULL_NAME, data.split, shards),
    fetch=functools.partial(_fetch, pixels[rows]),
    label=functools.partial(_label, data.split),
    stored=f"{_SIZE}x{_SIZE}",
    classes=lambda: Labels(prepared.checked_classes(data, labels[rows]), tuple("0123456789")),
  )


def _in_order() -> tuple[np.ndarray, np.ndarray]:
  """Pixels uint8 [N, 8, 8] and labels int32 [N], in the order of TFDS: by the MD5 of split and line."""
  with gzip.open(_FILE, "rt", newline="") as file:
    table = np.array(list(csv.reader(file)), np.int32)
  keys = [hashlib.md5(f"train{line}".encode(), usedforsecurity=False).digest() for line in range(len(table))]
  table = table[sorted(range(len(table)), key=keys.__getitem__)]
  pixels = np.round(table[:, :-1] * 255 / 16).astype(np.uint8).reshape(-1, _SIZE, _SIZE)
  return pixels, table[:, -1]


def _fetch(pixels: np.ndarray, indices: list[int]) -> list[bytes]:
  """As PNG: decoding and resizing start from files."""
  return [images.png(pixels[index]) for index in indices]


def _label(split: str, index: int) -> str:
  return f"image {index} of digits, {split}"
