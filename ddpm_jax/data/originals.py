"""The original files of MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100, read without TensorFlow.

TFDS's builders of these four need TensorFlow to open the files and to encode the images. Here are the same examples
with images as PNG files, which TFDS's writer then shuffles, divides into shards and describes: the data set has the
records, the order and the description of one that was prepared with TensorFlow, and its files differ in the compression
of the images only.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from ddpm_jax.data.images import png
from ddpm_jax.errors import UserError

Examples = Iterator[tuple[int, dict[str, Any]]]  # keys and features, as of TFDS's _generate_examples
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, LookupError, ValueError)


class _Cifar(NamedTuple):
  """The members of an archive. A record is a byte for each label, in their order here, and 3 x 32 x 32 of pixels."""

  folder: str
  splits: Mapping[str, list[str]]
  label_names: Mapping[str, str]  # feature -> file with the names of its classes


_CIFAR10 = _Cifar(
  folder="cifar-10-batches-bin",
  splits={"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]},
  label_names={"label": "batches.meta.txt"},
)
_CIFAR100 = _Cifar(
  folder="cifar-100-binary",
  splits={"train": ["train.bin"], "test": ["test.bin"]},
  label_names={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
)


def _mnist_splits(builder: tfds.core.DatasetBuilder, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
  """What TFDS's `_split_generators` returns, from the four files of a data set of MNIST's form."""
  files = _download(builder, dl_manager)
  return {
    split: _mnist_examples(_idx(files[f"{prefix}-images-idx3-ubyte.gz"]), _idx(files[f"{prefix}-labels-idx1-ubyte.gz"]))
    for split, prefix in (("train", "train"), ("test", "t10k"))
  }


def _mnist_examples(images: np.ndarray, labels: np.ndarray) -> Examples:
  for index, (image, label) in enumerate(zip(images, labels, strict=True)):
    yield index, {"image": png(image), "label": int(label)}


def _idx(path: str) -> np.ndarray:
  """The uint8 array of a gzipped IDX file: the magic number 0, 0, 8, N; N big-endian sizes; the bytes."""
  with _readable(path), gzip.open(path) as file:
    data = file.read()
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _cifar_splits(
  archive: _Cifar, builder: tfds.core.DatasetBuilder, dl_manager: tfds.download.DownloadManager
) -> dict[str, Examples]:
  """What TFDS's `_split_generators` returns. As TFDS's does, it gives the classes their names."""
  (path,) = _download(builder, dl_manager).values()
  with _readable(path), tarfile.open(path) as tar:  # read in one pass: going back decompresses it again
    files = {member.name: file.read() for member in tar if (file := tar.extractfile(member))}
  with _readable(path):
    features: Any = builder.info.features
    for feature, name in archive.label_names.items():
      features[feature].names = [line for line in files[f"{archive.folder}/{name}"].decode().split("\n") if line]
    width = len(archive.label_names) + 3 * 32 * 32
    records = {
      split: np.frombuffer(b"".join(files[f"{archive.folder}/{name}"] for name in names), np.uint8).reshape(-1, width)
      for split, names in archive.splits.items()
    }
  return {split: _cifar_examples(records[split], archive, split) for split in records}


def _cifar_examples(records: np.ndarray, archive: _Cifar, split: str) -> Examples:
  number = len(archive.label_names)
  for index, record in enumerate(records):
    labels = dict(zip(archive.label_names, map(int, record[:number]), strict=True))
    pixels = record[number:].reshape(3, 32, 32).transpose(1, 2, 0)
    yield index, {"id": f"{split}_{index:05d}", "image": png(pixels), **labels}


def _download(builder: tfds.core.DatasetBuilder, dl_manager: tfds.download.DownloadManager) -> dict[str, str]:
  """The paths of the original files by their names; TFDS takes them from manual_dir, or downloads them."""
  urls: Any = {info.filename: url for url, info in (builder.url_infos or {}).items()}
  return {name: str(path) for name, path in dl_manager.download(urls).items()}


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
  """Raises UserError for a file that is damaged: TFDS verifies what it downloads, not what it finds there later."""
  try:
    yield
  except _DAMAGED as error:
    raise UserError(f"dataset: {path} is damaged ({error}); delete it, and it is downloaded again") from None


_SPLITS: Mapping[str, Callable[..., dict[str, Examples]]] = {
  "mnist": _mnist_splits,
  "fashion_mnist": _mnist_splits,
  "cifar10": functools.partial(_cifar_splits, _CIFAR10),
  "cifar100": functools.partial(_cifar_splits, _CIFAR100),
}
NAMES = frozenset(_SPLITS)


def read_without_tensorflow(builder: tfds.core.DatasetBuilder) -> None:
  """Lets the builder of one of `NAMES` read its original files with this module; leaves others as they are."""
  if builder.name in NAMES:
    overridden: Any = builder  # the method that a data set of TFDS defines
    overridden._split_generators = functools.partial(_SPLITS[builder.name], builder)
