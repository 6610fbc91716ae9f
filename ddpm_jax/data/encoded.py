"""Encoded images by index, and how they become uint8 arrays: what all kinds of data set have in common."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ddpm_jax.data import images
from ddpm_jax.data.images import BadRecord
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import console

_CHUNK = 256  # images a task: large enough for one batched read of a record file, small enough to share out
_MOST_IN_A_ROW = 100  # bad images; more are no accident, and a search for a good one would take ever longer


class Rows(NamedTuple):
  """Images by row, as a source gives them.

  Attributes:
    images: uint8 [N, H, W, C].
    replaced: bool [N], whether the row holds a later image, as its own is bad.
  """

  images: np.ndarray
  replaced: np.ndarray

  def take(self, indices: np.ndarray) -> Rows:
    """Copies of the rows at `indices` [M]."""
    return Rows(self.images[indices], self.replaced[indices])


Skips = list[tuple[int, str]]  # bad images that were skipped: the index of each, and which it is and why
Tell = Callable[[int, str], None]  # called with each of them


class Elsewhere(NamedTuple):
  """How another process reads images for this one.

  Attributes:
    read: is sent there, so it can be pickled; as `Source.read`, but with the rows come the bad images that were skipped
      for them, each as (index, which and why).
    tell: says of such a one here, on standard error, unless this process has said so before.
  """

  read: Callable[[np.ndarray], tuple[Rows, Skips]]
  tell: Tell


@dataclasses.dataclass(frozen=True)
class EncodedImages:
  """A data set before decoding.

  Attributes:
    name: what the user calls it.
    length: number of images.
    shape: (H, W, C) of the decoded images; C is 1 or 3.
    resize: whether to resize and crop them to that shape; else they must have it.
    identity: what it is called wherever it lies, with its version and split if it has one.
    listing: a digest of what is known of each image without reading it.
    fetch: encoded images, or paths to them, for a list of indices; a BadRecord in the place of one whose record cannot
      be read. Called from several threads.
    label: what to call image i in an error.
    classes: the class of each image, see `Source.labels`; None if they have none. Nothing is read before it is called.
    remark: a line for people about what was found, once a start; empty if there is nothing to say.
  """

  name: str
  length: int
  shape: tuple[int, int, int]
  resize: bool
  identity: str
  listing: str
  fetch: Callable[[list[int]], Sequence[bytes | pathlib.Path | BadRecord]]
  label: Callable[[int], str]
  classes: Callable[[], np.ndarray] | None = None
  remark: str = ""


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


class NoLabels(UserError):
  """Classes are needed, and the data set `name` cannot say them."""

  def __init__(self, name: str, why: str = "has none"):
    super().__init__(
      f"features: 'classifier' needs labels, and {name} {why}; use --features=network, or inception with "
      "--inception_weights"
    )


def stand_ins(bad: np.ndarray) -> np.ndarray:
  """For each bad place of bool [N] the next one that is not, around the end: int [number of bad ones]. Not all are."""
  good = np.flatnonzero(~bad)
  return good[np.searchsorted(good, np.flatnonzero(bad)) % len(good)]


def on_demand(encoded: EncodedImages, *, skip: bool, tell: Tell | None = None) -> Callable[[np.ndarray], Rows]:
  """A function that reads and decodes the images at `indices` [N].

  Args:
    encoded: the data set.
    skip: put the next image that is not bad in the place of a bad one; else raise.
    tell: called with each bad image that is skipped; None: `Skipped` says so.

  Returns:
    The function, which may be called from several threads. It raises UserError for a bad image, or with `skip` where it
    meets more than 100 in a row.
  """
  return functools.partial(_read, encoded, skip=skip, tell=tell or Skipped().tell)


def elsewhere(encoded: EncodedImages, *, skip: bool, tell: Tell) -> Elsewhere:
  """What `on_demand` gives, for another process to read with. `encoded` is sent there, without its classes."""
  return Elsewhere(functools.partial(_read_and_note, dataclasses.replace(encoded, classes=None), skip), tell)


def _read_and_note(encoded: EncodedImages, skip: bool, indices: np.ndarray) -> tuple[Rows, Skips]:
  skipped: Skips = []
  return _read(encoded, indices, skip=skip, tell=lambda *bad: skipped.append(bad)), skipped


def _read(encoded: EncodedImages, indices: np.ndarray, *, skip: bool, tell: Tell) -> Rows:
  positions = [int(i) for i in indices]
  rows = Rows(np.empty((len(positions), *encoded.shape), np.uint8), np.zeros(len(positions), bool))
  for row, error in _decode(encoded, positions, rows.images).items():
    if not skip:
      raise error
    tell(positions[row], error.what)
    _replace(encoded, positions[row], rows.images[row : row + 1], tell)
    rows.replaced[row] = True
  return rows


def decode_all(encoded: EncodedImages, *, skip: bool) -> Rows:
  """All images, decoded on all cores (Pillow releases the GIL); what `on_demand` would give for them, and raise."""
  rows = Rows(np.empty((encoded.length, *encoded.shape), np.uint8), np.zeros(encoded.length, bool))
  skipped = Skipped()

  def fill(start: int) -> int:
    stop = min(start + _CHUNK, encoded.length)
    for row, error in _decode(encoded, list(range(start, stop)), rows.images[start:stop]).items():
      if not skip:
        raise error
      skipped.tell(start + row, error.what)
      rows.replaced[start + row] = True
    return stop - start

  progress = console.bar(
    total=encoded.length, desc=f"decoding {encoded.name}", unit=" images", leave=False, disable=not console.columns()
  )
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, progress:
    for count in pool.map(fill, range(0, encoded.length, _CHUNK)):  # the first error cancels the tasks that wait
      progress.update(count)

  if rows.replaced.all():
    raise _too_many(encoded, 0)
  bad, after = np.flatnonzero(rows.replaced), stand_ins(rows.replaced)
  far = bad[(after - bad) % encoded.length > _MOST_IN_A_ROW]
  if len(far):
    raise _too_many(encoded, int(far[0]))
  rows.images[bad] = rows.images[after]
  return rows


class Skipped:
  """Says on standard error which images are bad, one line each, and each once however many threads meet it."""

  def __init__(self):
    self._lock = threading.Lock()
    self._told: set[int] = set()

  def tell(self, index: int, what: str) -> None:
    """Says that image `index` is bad: which it is, and why."""
    with self._lock:
      if index not in self._told:
        self._told.add(index)
        console.note(f"skipped: {what}")


def _decode(encoded: EncodedImages, positions: list[int], out: np.ndarray) -> dict[int, BadRecord]:
  """Decodes the images at `positions` [N] into `out` [N, H, W, C]. Returns the errors of those that are bad, by row."""
  errors = {}
  for row, (position, file) in enumerate(zip(positions, encoded.fetch(positions), strict=True)):
    try:
      out[row] = _decode_one(encoded, position, file)
    except BadRecord as error:
      errors[row] = error
  return errors


def _decode_one(encoded: EncodedImages, position: int, file: bytes | pathlib.Path | BadRecord) -> np.ndarray:
  """One image uint8 [H, W, C]. Raises BadRecord."""
  if isinstance(file, BadRecord):
    raise file
  height, width, channels = encoded.shape
  name = encoded.label(position)
  image = images.decode(file, channels, name, height if encoded.resize else 0)
  if image.shape != encoded.shape:
    raise BadRecord(
      f"{name} has another size ({image.shape[0]} x {image.shape[1]} and not {height} x {width})",
      "set --image_size to resize and crop the images",
    )
  return image


def _replace(encoded: EncodedImages, position: int, out: np.ndarray, tell: Tell) -> None:
  """Puts the first image after the bad one at `position` that is not bad into `out` [1, H, W, C]. Raises UserError."""
  for distance in range(1, min(_MOST_IN_A_ROW + 1, encoded.length)):
    candidate = (position + distance) % encoded.length
    errors = _decode(encoded, [candidate], out)
    if not errors:
      return
    tell(candidate, errors[0].what)
  raise _too_many(encoded, position)


def _too_many(encoded: EncodedImages, position: int) -> UserError:
  return UserError(
    f"dataset: too many images of {encoded.name} are bad, {min(_MOST_IN_A_ROW + 1, encoded.length)} in a row from "
    f"{encoded.label(position)} on; repair the data set, or use another"
  )
