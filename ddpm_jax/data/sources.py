"""Random-access image sources: the one place where the name of a data set becomes one."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax.config import DataConfig, height_and_width, own_images
from ddpm_jax.data import digits, files, fingerprint, folder, images, parquet, prepared, shards, zips
from ddpm_jax.data.encoded import (
  DecodedRows,
  EncodedImages,
  Labels,
  NoLabels,
  RemoteReader,
  SkipReporter,
  decode_all,
  on_demand,
  remote_reader,
)
from ddpm_jax.data.files import ImageFiles
from ddpm_jax.data.selection import select
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import console


class _Kind(NamedTuple):
  """A kind of collection of image files."""

  find: Callable[[DataConfig], ImageFiles]
  exists: Callable[[DataConfig], bool]


_KINDS = {
  "folder": _Kind(folder.find, folder.exists),
  "zip": _Kind(zips.find, zips.exists),
  "webdataset": _Kind(shards.find, shards.exists),
  "parquet": _Kind(parquet.find, parquet.exists),
}


class KnownClasses(NamedTuple):
  """What is known of the classes of images without reading their records.

  Attributes:
    names: of the classes in their order; empty if they are not known.
    sha256: `fingerprint.of_classes` of all images; empty if it is not known.
    counts: images of each class; empty if they are not known.
  """

  names: tuple[str, ...] = ()
  sha256: str = ""
  counts: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
  """Images by index.

  Attributes:
    name: of the data set, as the user gave it.
    image_shape: (H, W, C) of every image.
    length: number of images, at least 1.
    read: images uint8 [len(indices), H, W, C], and which of them stand for one that is bad, for an int array of indices
      in 0..length-1, repeats allowed. May be called from several threads. Raises UserError for an image that cannot be
      decoded, unless the source was opened with `on_bad_record=skip`. With `random_crop` it takes a second argument,
      float64 [len(indices)] in [0, 1), where the crop of each lies, see `crops`; without that it crops the centre.
    fingerprint: what must stay when a run is resumed, see `fingerprint.take`.
    remote: reads the same in another process; None where the images are in memory, which would be copied.
    labels: reads the class of each image, int32 [length] in 0..K-1; what stands for a bad record's is that of the next
      good one, and no class of the image. Not called, it costs nothing. Raises UserError if the images have no classes,
      or fewer than two, or a record is bad and not to be skipped. None for a source that never has any.
    known_classes: what is known of them without reading records. Raises nothing.
    random_crop: whether each batch of the training chooses other parts of the images.
    stored: height and width of the images as they are stored, in some words; empty if they are not known.
  """

  name: str
  image_shape: tuple[int, int, int]
  length: int
  read: Callable[..., DecodedRows]
  fingerprint: dict[str, str | int] = dataclasses.field(default_factory=dict)
  labels: Callable[[], np.ndarray] | None = None
  remote: RemoteReader | None = None
  known_classes: Callable[[], KnownClasses] = KnownClasses
  random_crop: bool = False
  stored: str = ""

  def __len__(self) -> int:
    return self.length


def num_classes(source: Source, known: int = 0, *, stage: str = "denoiser", settled: bool = False) -> int:
  """The number of classes that a network of these images is told apart, or tells apart.

  Args:
    source: the images.
    known: `--num_classes`, which may be more than there are here; 0: as many as there are.
    stage: what is trained, 'denoiser' or 'classifier'.
    settled: `known` is that of a run which exists.

  Raises:
    UserError: the images have no classes, or more than are known.
  """
  why = "has none"
  try:
    labels = source.labels() if source.labels else None
  except NoLabels as error:
    labels, why = None, error.why
  if labels is None:
    field, remedy = ("stage: classifier", "") if stage == "classifier" else ("conditioning: class", "none")
    raise UserError(
      f"{field} needs the class of each image, and {source.name} {why}; put the images of each class into a folder of "
      f"their own{remedy and f', or use --conditioning={remedy}'}"
    )
  here = max(len(source.known_classes().names), int(labels.max()) + 1)
  if known and here > known and settled:
    raise UserError(
      f"dataset: {source.name} has {here} classes, and the run was begun with {known}; restore them, or use another "
      "--workdir"
    )
  if known and here > known:
    raise UserError(f"num_classes: {known} is less than the {here} classes of {source.name}; use --num_classes={here}")
  return known or here


def class_names(source: Source, number: int) -> tuple[str, ...]:
  """The names of that many classes, in their order: those of the images, and numbers where there is no name."""
  names = source.known_classes().names
  return names + tuple(map(str, range(len(names), number)))


def from_array(images: np.ndarray, name: str = "array", labels: np.ndarray | None = None) -> Source:
  """A source of images in memory, for `ddpm_jax.train(config, workdir, source=...)`.

  Args:
    images: uint8 [N, H, W, C], N at least 1, C 1 or 3.
    name: of the data set.
    labels: of each image, int [N] in 0..K-1; None: there are none.

  Raises:
    UserError: another type or shape, or a label below 0.
  """
  shape, kind = np.shape(images), getattr(images, "dtype", type(images).__name__)
  if kind != np.uint8 or len(shape) != 4 or not shape[0] or shape[3] not in (1, 3):
    raise UserError(f"source: {kind} {list(shape)} is not uint8 [N, H, W, C] with 1 or 3 channels; make it so")
  classes = None if labels is None else np.asarray(labels, np.int32)
  if classes is not None and classes.shape != shape[:1]:
    raise UserError(f"source: labels {list(classes.shape)} are not one for each of {shape[0]} images; make them so")
  if classes is not None and classes.min() < 0:
    raise UserError(f"source: the label {classes.min()} is no class; number them from 0")
  rows = DecodedRows(np.ascontiguousarray(images), np.zeros(len(images), bool))
  return Source(
    name=name,
    image_shape=(shape[1], shape[2], shape[3]),
    length=len(images),
    read=rows.take,
    fingerprint=fingerprint.of_array(name, rows.images),
    labels=None if classes is None else lambda: classes,
  )


def open_source(data: DataConfig, accept: Callable[[int, int], None] = lambda height, width: None) -> Source:
  """Opens `data.dataset`, which is prepared first if need be.

  A data set whose decoded images take at most `data.cache_gib` GiB is decoded here, once, into one array. TensorFlow is
  not imported, not even if it is installed. The first process says on standard error what of a folder is left out, and
  that images are too many for memory.

  With `data.on_bad_record=skip` the place of a bad image is taken by the next one that is not, so that the order of all
  others stays. That is a function of the data and the index: the same on any number of processes and after a resume.

  Args:
    data: says which.
    accept: called with the height and width of the images before anything is prepared or decoded; raises if they are
      not to be used.

  Raises:
    UserError: no such data set, split, file, folder or class; no images in it; images that differ in size where
      `data.image_size` is 0; an image that cannot be decoded (with skip: more than 100 in a row); a data set that
      cannot be prepared.
  """
  encoded = open_encoded(data, accept)
  if encoded.remark:
    _note(encoded.remark)
  skip, gib = data.on_bad_record == "skip", encoded.length * math.prod(encoded.shape) / 2**30
  cached = decode_all(encoded, skip=skip, most=data.cache_gib * 2**30) if gib <= data.cache_gib else None
  if cached is None and data.cache_gib:
    size = f"{gib:.3g} GiB" + ", more before it is cropped" * encoded.random_crop
    _note(f"{encoded.name} is read from disk again and again: {size}, --cache_gib={data.cache_gib:g}")
  if cached is not None:
    read, everything, remote = cached.take, cached.images, None
  else:
    reporter = SkipReporter()
    read, everything = on_demand(encoded, skip=skip, report=reporter.report), None
    remote = remote_reader(encoded, skip=skip, report=reporter.report)
  labels = encoded.classes and functools.cache(encoded.classes)  # all records may be read for them
  return Source(
    name=encoded.name,
    image_shape=encoded.shape,
    length=encoded.length,
    read=read,
    fingerprint=fingerprint.take(encoded, read, everything),
    labels=labels and (lambda: labels().classes),
    remote=remote,
    known_classes=functools.cache(functools.partial(_known_classes, encoded.name, labels, encoded.class_names)),
    random_crop=encoded.random_crop,
    stored=encoded.stored,
  )


def open_encoded(data: DataConfig, accept: Callable[[int, int], None] = lambda height, width: None) -> EncodedImages:
  """The images of `data.dataset`, `data.split` and `data.only` before decoding; see `open_source`. Raises UserError."""
  encoded = _open(data, accept)
  accept(*encoded.shape[:2])
  if data.only:
    encoded = select(encoded, data.only)
  return dataclasses.replace(encoded, how=images.resizing(data))


def _note(remark: str) -> None:
  if jax.process_index() == 0:
    console.note(remark)


def _open(data: DataConfig, accept: Callable[[int, int], None] = lambda height, width: None) -> EncodedImages:
  """The images of `data.dataset` and `data.split`; `accept`: see `open_source`. Raises UserError."""
  if own := own_images(data.dataset):
    return files.open_files(data, _KINDS[own[0]].find(data))
  if digits.is_digits(data):
    return digits.open_digits(data)
  accept(*prepared.image_shape(data)[:2])
  return prepared.open_prepared(data)


def _known_classes(name: str, labels: Callable[[], Labels] | None, class_names: tuple[str, ...] | None) -> KnownClasses:
  """See `Source.known_classes`. Labels that cannot be used are an error for whoever asks for them, and here a line."""
  if labels is None or class_names is not None:
    return KnownClasses(class_names or ())
  try:
    classes, names = labels()
  except NoLabels:
    return KnownClasses()
  except UserError as error:
    _note(f"the labels of {name} are not used: {error}")
    return KnownClasses()
  counts = np.bincount(classes, minlength=len(names))
  return KnownClasses(names, fingerprint.of_classes(classes), tuple(counts.tolist()))


def image_shape(data: DataConfig) -> tuple[int, int, int]:
  """(H, W, C) of the images that `open_source` would give. Downloads and prepares nothing, and needs no image.

  Own images that are not there, with `data.image_size`, count as colour images.

  Raises:
    UserError: no such data set, or its images have different sizes or none that is known, and `data.image_size` is 0.
  """
  if digits.is_digits(data):
    return digits.image_shape(data)
  own = own_images(data.dataset)
  if own is None:
    return prepared.image_shape(data)
  if _KINDS[own[0]].exists(data) or not data.image_size:
    return _open(data).shape
  return (*height_and_width(data.image_size), 3)


def class_count(data: DataConfig) -> int:
  """`num_classes` of the source that `open_source` would give. Downloads and prepares nothing, and decodes no image.

  Raises:
    UserError: no such data set, or its images have no classes, or are not here.
  """
  own = own_images(data.dataset)
  if own is None and not digits.is_digits(data):
    names = prepared.class_names(data)
    only = {part.strip() for part in data.only.split(",")} if data.only else names
    count = len(only) if names else 0  # before it is prepared, a data set may have numbers alone for names
  elif own is None or _KINDS[own[0]].exists(data):
    encoded = open_encoded(data)
    try:
      count = len(encoded.classes().names) if encoded.classes else 0
    except NoLabels:
      count = 0
  else:
    count = 0
  if not count:
    raise UserError(f"num_classes: of {data.dataset} no classes are known here; say how many, --num_classes=10")
  return count


def has_split(data: DataConfig, split: str) -> bool:
  """Returns True if the data set has a split of that name, such as 'test', which is no slice of one.

  Prepares the data set if need be, and raises UserError as `split_names`.
  """
  return split in split_names(data)


def split_names(data: DataConfig) -> list[str]:
  """The splits of a data set, which is prepared if need be; its own split does not matter.

  Raises:
    UserError: no such data set, none of images, `data.image_size` is 0 and has to be set, or it cannot be prepared.
  """
  kind, _ = own_images(data.dataset) or ("", "")
  if kind == "parquet":
    return parquet.split_names(data)
  return ["train"] if kind or digits.is_digits(data) else prepared.split_names(data)
