"""Encoded images by index, and their decoding to uint8 arrays, for all kinds of data sets."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.config import height_and_width
from ddpm_jax.data import crops, images
from ddpm_jax.data.images import BadRecord
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import console

_CHUNK = 256  # images a task: large enough for one batched read of a record file, small enough to share out
_MOST_IN_A_ROW = 100  # bad images; more are no accident, and a search for a good one would take ever longer


class DecodedRows(NamedTuple):
  """Images by row, as a source gives them.

  Attributes:
    images: uint8 [N, H, W, C].
    replaced: bool [N], whether the row holds a later image, as its own is bad.
    skipped: the bad images met on the way that are still to be reported: index, name and reason of each.
    record: int32 [N], the image that the row holds: that which was asked for, or a later one. None: where none is
      replaced, what was asked for.
  """

  images: np.ndarray
  replaced: np.ndarray
  skipped: Sequence[tuple[int, str]] = ()
  record: np.ndarray | None = None

  def take(self, indices: np.ndarray) -> DecodedRows:
    """Copies of the rows at `indices` [M]."""
    record = None if self.record is None else self.record[indices]
    return DecodedRows(self.images[indices], self.replaced[indices], record=record)


class Covers(NamedTuple):
  """Images by row of which a part is still to be chosen.

  Attributes:
    images: N times uint8 [h, w, C], contiguous; h is H or w is W, and the other not less.
    replaced: as in `DecodedRows`.
    shape: (H, W, C).
    record: as in `DecodedRows`.
  """

  images: Sequence[np.ndarray]
  replaced: np.ndarray
  shape: tuple[int, int, int]
  record: np.ndarray

  def take(self, indices: np.ndarray, places: np.ndarray | None = None) -> DecodedRows:
    """Copies of parts of the rows at `indices` [M], at `places` [M] of `crops.crop`; None: in their centres."""
    chosen = np.empty((len(indices), *self.shape), np.uint8)
    for row, index in enumerate(indices):
      chosen[row] = crops.crop(self.images[index], self.shape, None if places is None else places[row])
    return DecodedRows(chosen, self.replaced[indices], record=self.record[indices])


ReportSkip = Callable[[int, str], None]  # takes index, name and reason of a bad image that is skipped


class RemoteReader(NamedTuple):
  """Reads images in another process.

  Attributes:
    read: as `Source.read`, with places of crops too, but picklable, and `skipped` is filled.
    report: reports a skipped image in this process, once however often it is called for it.
  """

  read: Callable[..., DecodedRows]
  report: ReportSkip


class Labels(NamedTuple):
  """The classes of the images of a data set.

  Attributes:
    classes: int32 [N], each in 0..K-1; what stands for a bad record's is that of the next good one.
    names: of the K classes, in their order.
  """

  classes: np.ndarray
  names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class EncodedImages:
  """A data set before decoding.

  Attributes:
    name: as the user gave it.
    length: number of images.
    shape: (H, W, C) of the decoded images; C is 1 or 3.
    resize: whether to resize them to that shape; else they must have it.
    identity: its name independent of where it lies, with its version and split if it has one.
    listing: a digest of all that is known of the images without reading them.
    fetch: encoded images, or paths to them, for a list of indices; a BadRecord in the place of one whose record cannot
      be read. Called from several threads.
    label: the name of image i in an error.
    classes: the class of each image; None if they never have any. Nothing is read before it is called. It raises
      UserError if the images have no classes, or fewer than two, or a record is bad and not to be skipped.
    class_names: of the classes, where `classes` would have to read all records for them, or raises; None where it does
      not.
    part_listing: `listing` of the images at int [M] alone; None: it does not follow from that of all.
    remark: a line to print once a start, such as what was left out; may be empty.
    how: in which way they are resized.
    file_name: the path of image i within its collection; None: the images are no files.
    stored: height and width of the stored images in some words; empty if they are not known.
  """

  name: str
  length: int
  shape: tuple[int, int, int]
  resize: bool
  identity: str
  listing: str
  fetch: Callable[[list[int]], Sequence[images.File | BadRecord]]
  label: Callable[[int], str]
  classes: Callable[[], Labels] | None = None
  class_names: tuple[str, ...] | None = None
  part_listing: Callable[[np.ndarray], str] | None = None
  remark: str = ""
  how: images.Resizing = images.DEFAULT
  file_name: Callable[[int], str] | None = None
  stored: str = ""

  @property
  def random_crop(self) -> bool:
    """True if a part of each image is chosen only when it is read."""
    return self.resize and self.how.crop == "random"


def decoded_size(name: str, stored: tuple[int | None, int | None], image_size: int | str) -> tuple[int, int]:
  """Height and width of the decoded images, in pixels.

  Args:
    name: of the data set.
    stored: height and width as stored; None where they differ or are not known.
    image_size: what the user asks for; 0: as stored.

  Raises:
    UserError: the images differ in size, and `image_size` is 0.
  """
  if image_size:
    return height_and_width(image_size)
  height, width = stored
  if height is None or width is None:
    raise UserError(
      f"image_size: 0, but the images of {name} have different sizes; set --image_size to resize and crop them"
    )
  return height, width


HAS_NONE = "has none"


class NoLabels(UserError):
  """Classes are needed, and the data set `name` has none."""

  def __init__(self, name: str, why: str = HAS_NONE):
    super().__init__(
      f"features: 'classifier' needs labels, and {name} {why}; use --features=network, or inception with "
      "--inception_weights"
    )
    self.why = why


def stand_ins(bad: np.ndarray) -> np.ndarray:
  """The next good index after each True of bad [N], cyclically: int [number of bad ones]. At least one is good."""
  good = np.flatnonzero(~bad)
  return good[np.searchsorted(good, np.flatnonzero(bad)) % len(good)]


def on_demand(encoded: EncodedImages, *, skip: bool, report: ReportSkip | None = None) -> Callable[..., DecodedRows]:
  """Returns a function that reads and decodes the images at `indices` [N], and may be given `places` [N] of crops.

  Args:
    encoded: the data set.
    skip: put the next image that is not bad in the place of a bad one; else raise.
    report: called with each bad image that is skipped; default: a new `SkipReporter`.

  Returns:
    The function, which may be called from several threads. It raises UserError for a bad image, or with `skip` where it
    meets more than 100 in a row.
  """
  return functools.partial(_read, encoded, skip=skip, report=report or SkipReporter().report)


def remote_reader(encoded: EncodedImages, *, skip: bool, report: ReportSkip) -> RemoteReader:
  """As `on_demand`, for another process, which is sent `encoded` without what only this one asks."""
  return RemoteReader(
    functools.partial(
      _read_with_skips, dataclasses.replace(encoded, classes=None, part_listing=None, file_name=None), skip
    ),
    report,
  )


def _read_with_skips(
  encoded: EncodedImages, skip: bool, indices: np.ndarray, places: np.ndarray | None = None
) -> DecodedRows:
  skipped: list[tuple[int, str]] = []
  return _read(encoded, indices, places, skip=skip, report=lambda *bad: skipped.append(bad))._replace(skipped=skipped)


def _read(
  encoded: EncodedImages,
  indices: np.ndarray,
  places: np.ndarray | None = None,
  *,
  skip: bool,
  report: ReportSkip,
) -> DecodedRows:
  positions = [int(i) for i in indices]
  rows = np.empty((len(positions), *encoded.shape), np.uint8)
  replaced, record = np.zeros(len(positions), bool), np.array(positions, np.int32)
  for row, image in enumerate(_decode(encoded, positions)):
    if isinstance(image, BadRecord):
      if not skip:
        raise image
      report(positions[row], image.what)
      image, record[row] = _next_good(encoded, positions[row], report)
      replaced[row] = True
    rows[row] = crops.crop(image, encoded.shape, None if places is None else places[row])
  return DecodedRows(rows, replaced, record=record)


def decode_all(encoded: EncodedImages, *, skip: bool, most: float = math.inf) -> DecodedRows | Covers | None:
  """All images, decoded on all cores (Pillow releases the GIL): `take` gives what `on_demand` would.

  Args:
    encoded: the data set.
    skip: see `on_demand`.
    most: bytes that images of which a part is still to be chosen may take, as that is not known before.

  Returns:
    The images; None if they take more.

  Raises:
    UserError: as `on_demand`.
  """
  replaced, skipped, taken = np.zeros(encoded.length, bool), SkipReporter(), 0
  rows: Any = [None] * encoded.length if encoded.random_crop else np.empty((encoded.length, *encoded.shape), np.uint8)

  def fill(start: int) -> tuple[int, int]:
    positions, size = list(range(start, min(start + _CHUNK, encoded.length))), 0
    for position, image in zip(positions, _decode(encoded, positions), strict=True):
      if not isinstance(image, BadRecord):
        rows[position] = image
        size += image.nbytes
      elif not skip:
        raise image
      else:
        skipped.report(position, image.what)
        replaced[position] = True
    return len(positions), size

  progress = console.bar(
    total=encoded.length, desc=f"decoding {encoded.name}", unit=" images", leave=False, disable=not console.columns()
  )
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, progress:
    for count, size in pool.map(fill, range(0, encoded.length, _CHUNK)):  # what ends the loop cancels tasks that wait
      progress.update(count)
      taken += size
      if encoded.random_crop and taken > most:
        return None

  if replaced.all():
    raise _too_many(encoded, 0)
  bad, after = np.flatnonzero(replaced), stand_ins(replaced)
  far = bad[(after - bad) % encoded.length > _MOST_IN_A_ROW]
  if len(far):
    raise _too_many(encoded, int(far[0]))
  record = np.arange(encoded.length, dtype=np.int32)
  record[bad] = after
  for index, other in zip(bad, after, strict=True):
    rows[index] = rows[other]
  if encoded.random_crop:
    return Covers(rows, replaced, encoded.shape, record)
  return DecodedRows(rows, replaced, record=record)


class SkipReporter:
  """Reports bad images on standard error, one line each, and each once however many threads meet it."""

  def __init__(self):
    self._lock = threading.Lock()
    self._reported: set[int] = set()

  def report(self, index: int, what: str) -> None:
    """Reports image `index`; `what`: its name, and why it is bad."""
    with self._lock:
      if index not in self._reported:
        self._reported.add(index)
        console.note(f"skipped: {what}")


def _decode(encoded: EncodedImages, positions: list[int]) -> Iterator[np.ndarray | BadRecord]:
  """Yields the image at each of `positions`, or why it is bad."""
  for position, file in zip(positions, encoded.fetch(positions), strict=True):
    try:
      found = _decode_one(encoded, position, file)
    except BadRecord as error:
      found = error
    yield found


def _decode_one(encoded: EncodedImages, position: int, file: images.File | BadRecord) -> np.ndarray:
  """One image uint8 [H, W, C], or what is to be cropped to that. Raises BadRecord."""
  if isinstance(file, BadRecord):
    raise file
  height, width, channels = encoded.shape
  if not isinstance(file, bytes):
    file = images.small_or_path(file)
  name = encoded.label(position)
  image = images.decode(file, channels, name, (height, width) if encoded.resize else None, encoded.how)
  if image.shape != encoded.shape and not encoded.random_crop:
    raise BadRecord(
      f"{name} has another size ({image.shape[0]} x {image.shape[1]} and not {height} x {width})",
      "set --image_size to resize and crop the images",
    )
  return image


def _next_good(encoded: EncodedImages, position: int, report: ReportSkip) -> tuple[np.ndarray, int]:
  """The first image after the bad one at `position` that is not bad, and which one that is. Raises UserError."""
  for distance in range(1, min(_MOST_IN_A_ROW + 1, encoded.length)):
    candidate = (position + distance) % encoded.length
    (image,) = _decode(encoded, [candidate])
    if not isinstance(image, BadRecord):
      return image, candidate
    report(candidate, image.what)
  raise _too_many(encoded, position)


def _too_many(encoded: EncodedImages, position: int) -> UserError:
  return UserError(
    f"dataset: too many images of {encoded.name} are bad, {min(_MOST_IN_A_ROW + 1, encoded.length)} in a row from "
    f"{encoded.label(position)} on; repair the data set, or use another"
  )
