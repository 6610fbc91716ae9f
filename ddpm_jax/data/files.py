"""Collections of image files, in a folder or packed: what is the same for all kinds of them.

A kind finds the files and reads them. Here are their split, size and channels, their digest and their errors, so that
the same files under the same names are the same data set, however they are kept.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from ddpm_jax.config import DataConfig, own_images
from ddpm_jax.data import fingerprint, images
from ddpm_jax.data.encoded import EncodedImages, Labels, NoLabels, decoded_size
from ddpm_jax.data.index import Index
from ddpm_jax.data.names import Names
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.runtime.paths import expanded

_MANY_FILES = 256  # of which a process keeps all open; it may open 1,024 where nothing else is said
_CHUNK = 256  # headers a task

File = images.File | images.BadRecord


@dataclasses.dataclass(frozen=True)
class ImageFiles:
  """All images of a collection, in its order, before a split is taken.

  Attributes:
    names: of each, its path within the collection.
    sizes: of each, int64 [N], in bytes.
    headers: int32 [N, 3]: height and width in pixels, and 1 if it is grey; zeros for one whose header is bad.
    fetch: encoded images, or paths to them, for int [M] in 0..N-1. Called from several threads, and pickled.
    place: where image i lies, for an error.
    classes: the labels of all; raises NoLabels, or UserError. Not called, it costs nothing.
    splits: name -> its images, int [..]. None: one split, 'train', of all.
    listing: `fingerprint.digest` of names and sizes of all, if it is known.
    remark: a line about what was left out; may be empty.
  """

  names: Sequence[str]
  sizes: np.ndarray
  headers: np.ndarray
  fetch: Callable[[np.ndarray], Sequence[File]]
  place: Callable[[int], str]
  classes: Callable[[], Labels]
  splits: Mapping[str, np.ndarray] | None = None
  listing: str | None = None
  remark: str = ""


def suffixes_of(data: DataConfig) -> frozenset[str]:
  """By which an image is known, in small letters."""
  return images.BASIC_SUFFIXES if data.formats == "basic" else images.SUFFIXES


def key_of(data: DataConfig) -> str:
  """What an index depends on beside the files: what counts as an image, with a plugin or without, and as grey."""
  return f"{data.formats} {' '.join(sorted(suffixes_of(data)))}"


def path_of(data: DataConfig) -> str:
  """The path, or pattern, of own images, with its home folder. Raises UserError if that is nobody's."""
  _, path = own_images(data.dataset) or ("", "")
  return expanded("dataset", path)


def not_there(data: DataConfig, what: str) -> UserError:
  """The error that there is no such collection; `what`: why, and what to do."""
  if "://" in data.dataset:
    what = "is an address, and images are read from disk; copy them to one, or mount the bucket"
  path = path_of(data)
  try:
    os.listdir(path if os.path.isdir(path) else os.path.dirname(path) or os.curdir)
  except PermissionError as error:
    what = f"is not found: {error.filename} cannot be listed ({error.strerror}); make it readable"
  except OSError:
    pass  # it is not there either
  return UserError(f"dataset: {data.dataset!r} {what}")


def open_files(data: DataConfig, found: ImageFiles) -> EncodedImages:
  """The images of a split of a collection. They are grey if all in the collection are, whatever the split.

  Raises:
    UserError: an image without a readable header (with `data.on_bad_record=skip`: all are), a split that is none, see
      `split_of`, or images of different sizes where `data.image_size` is 0.
  """
  heights, widths, greys = found.headers.T
  good = heights > 0
  if not good.all() and data.on_bad_record != "skip":
    _raise_bad(found, int(np.argmin(good)))
  if not good.any():
    raise UserError(f"dataset: none of the {len(good)} files of {data.dataset!r} is an image that Pillow can read")
  same = all(len(np.unique(lengths[good])) == 1 for lengths in (heights, widths))
  size = decoded_size(
    data.dataset, (int(heights[good][0]), int(widths[good][0])) if same else (None, None), data.image_size
  )
  chosen, whole = split_of(data, found.names, found.splits)
  fetch, place, names, sizes, classes = found.fetch, found.place, found.names, found.sizes, found.classes

  def listing(rows: np.ndarray) -> str:
    return fingerprint.digest(part for row in map(int, rows) for part in (names[row], str(sizes[row])))

  def labels() -> Labels:
    of_all = classes()
    return of_all if whole else Labels(of_all.classes[chosen], of_all.names)

  return EncodedImages(
    name=data.dataset,
    length=len(chosen),
    shape=(*size, 1 if greys[good].all() else 3),
    resize=bool(data.image_size),
    identity="folder" if data.split == "train" else f"folder {data.split}",
    listing=found.listing if found.listing and whole else listing(chosen),
    fetch=lambda indices: fetch(chosen[indices]),
    label=lambda index: numbered(place, int(chosen[index])),
    classes=labels,
    part_listing=lambda places: listing(chosen[places]),
    remark=found.remark,
    file_name=lambda index: names[int(chosen[index])],
    stored=images.sizes_text(found.headers[good, :2]),
  )


def numbered(place: Callable[[int], str], row: int) -> str:
  """The name of an image in an error: where it lies, and its place among all of the collection."""
  return f"{place(row)} (image {row})"


def _raise_bad(found: ImageFiles, row: int) -> None:
  """Raises BadRecord for an image whose header was bad when the collection was scanned."""
  name = numbered(found.place, row)
  (file,) = found.fetch(np.array([row]))
  if isinstance(file, images.BadRecord):
    raise file
  images.read_header(file, name)
  raise images.BadRecord(f"{name} could not be read when it was scanned", "give it a new time of change (touch)")


def read_headers(
  data: DataConfig,
  fetch: Callable[[np.ndarray], Sequence[File]],
  place: Callable[[int], str],
  number: int,
  *,
  skip: bool,
) -> np.ndarray:
  """The headers int32 [N, 3] of all images, as `ImageFiles` has them, read on all cores.

  Raises:
    BadRecord: the first that is bad, unless `skip`.
  """
  headers = np.zeros((number, 3), np.int32)

  def read(start: int) -> None:
    rows = np.arange(start, min(start + _CHUNK, number))
    for row, file in zip(rows.tolist(), fetch(rows), strict=True):
      try:
        if isinstance(file, images.BadRecord):
          raise file
        if not isinstance(file, bytes):
          file = images.small_or_path(file)
        headers[row] = images.read_header(file, numbered(place, row), grey_palettes=data.formats != "basic")
      except images.BadRecord:
        if not skip:
          raise

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for _ in pool.map(read, range(0, number, _CHUNK)):  # the first error cancels the tasks that wait
      pass
  return headers


def split_of(
  data: DataConfig, names: Sequence[str], splits: Mapping[str, np.ndarray] | None = None
) -> tuple[np.ndarray, bool]:
  """The images of `data.split`, in TFDS's notation: int64, the places of their names in `names`.

  A collection has one split, 'train', unless `splits` has others, of which slices may be taken: 'train[:90%]',
  'train[90%:]', 'train[:500]'. Slices are cut in the order of the SHA-256 of the names, in which folders of classes, or
  pictures that were taken one after the other, do not lie together. So a slice is a random part of all classes; it is
  the same on every machine and however the images are kept, slices that do not overlap share no image, and where images
  are added all but a few of the others stay in their slice. Within a slice the order is that of `names`.

  Args:
    data: names the split.
    names: paths within the collection, in the order of the data set.
    splits: name -> the places of its images.

  Returns:
    The places, and whether they are all of them in their order.

  Raises:
    UserError: another split than there are, no split at all, or an empty one.
  """
  splits = splits or {"train": np.arange(len(names))}
  kind, _ = own_images(data.dataset) or ("", "")
  try:
    # The files of TFDS stand for those of the collection: one shard for each split.
    whole: Any = {
      name: tfds.core.SplitInfo(name=name, shard_lengths=[len(rows)], num_bytes=0) for name, rows in splits.items()
    }
    parts = tfds.core.ReadInstruction.from_spec(data.split).to_absolute(whole)
  except (ValueError, NotImplementedError) as error:
    first = next(iter(splits))
    raise UserError(
      f"split: {data.split!r} is no part of a {kind} ({' '.join(str(error).split())}); use {first!r} or slices of it, "
      f"such as '{first}[:90%]', or name the {kind} of that split in --dataset={kind}:PATH"
    ) from None
  chosen = [_slice(names, splits[part.splitname], part.from_, part.to) for part in parts]
  if not sum(map(len, chosen)):
    raise UserError(f"split: {data.split!r} of {data.dataset!r}, of {len(names)} images, is empty; take a larger part")
  places = np.concatenate(chosen)
  return places, np.array_equal(places, np.arange(len(names)))


def _slice(names: Sequence[str], rows: np.ndarray, start: int | None, stop: int | None) -> np.ndarray:
  """The rows of a slice of a split, in their order."""
  if start is None and stop is None:
    return rows  # nothing is cut: no digests
  digests = b"".join(hashlib.sha256(os.fsencode(names[row])).digest() for row in map(int, rows))
  words = np.frombuffer(digests, ">u8").reshape(-1, 4)
  order = np.lexsort(words.T[::-1])  # stable; by the first word, then the second, ...
  return rows[np.sort(order[start:stop])]


class Reader:
  """Reads parts of files by their position: from several threads, and, pickled, from other processes."""

  def __init__(self, paths: Sequence[str]):
    """Opens nothing yet."""
    self._paths, self._open, self._lock = list(paths), {}, threading.Lock()

  def __reduce__(self) -> tuple[type[Reader], tuple[list[str]]]:
    return Reader, (self._paths,)

  def __del__(self, close: Callable[[int], None] = os.close):  # when Python exits, `os` may be gone
    for descriptor in self._open.values():
      close(descriptor)

  def read(self, file: int, start: int, size: int, name: Callable[[], str]) -> bytes | images.BadRecord:
    """`size` bytes from position `start` of the file of that number.

    Returns:
      The bytes, or a BadRecord for the image `name()` where they are not there.

    Raises:
      RunError: this process has no file handle or memory left.
    """
    try:
      if len(self._paths) > _MANY_FILES:
        descriptor = os.open(self._paths[file], os.O_RDONLY)
        try:
          found = os.pread(descriptor, size, start)
        finally:
          os.close(descriptor)
      else:
        descriptor = self._open.get(file)
        found = os.pread(self._descriptor(file) if descriptor is None else descriptor, size, start)
    except OSError as error:
      if error.errno in images.OF_THE_PROCESS:
        raise RunError(
          f"dataset: {name()} cannot be opened ({error.strerror}); raise that limit of the process"
        ) from error
      return images.BadRecord(f"{name()} cannot be read ({error.strerror})", "repair or remove it")
    if len(found) < size:  # the system gives no more than 2 GiB at once, and no image is as large
      return images.BadRecord(f"{name()} is cut off ({len(found)} of {size} bytes)", "repair or remove it")
    return found

  def _descriptor(self, file: int) -> int:
    with self._lock:
      if file not in self._open:
        self._open[file] = os.open(self._paths[file], os.O_RDONLY)
      return self._open[file]


# The kinds of what is left out, in the order of the message.
PLURALS = {
  "file of another format": "files of other formats",
  "hidden file": "hidden files",
  "hidden folder": "hidden folders",
  "special file": "special files",
  "broken link": "broken links",
  "link": "links",
  "link to a file outside": "links to files outside",
  "link to a folder": "links to folders",
  "image with a second dot in its name": "images with a second dot in their names",
  "example without an image": "examples without an image",
}
LeftOut = Mapping[str, Mapping[str, int]]  # kind -> suffix (or nothing) -> how many


def left_out_text(left_out: LeftOut) -> str:
  """Kinds and numbers of what was left out; empty if nothing was."""
  kinds = []
  for kind in (kind for kind in PLURALS if kind in left_out):
    suffixes = left_out[kind]
    number = sum(suffixes.values())
    named = sorted((-count, suffix) for suffix, count in suffixes.items() if suffix)
    most = ", ".join([f"{suffix} {-count}" for count, suffix in named[:8]] + ["..."] * (len(named) > 8))
    if images.HEIC_SUFFIXES & suffixes.keys() and not images.HEIC_SUFFIXES & images.SUFFIXES:
      most += "; pip install 'ddpm_jax[heic]' to read HEIC"
    kinds.append(f"{number} {kind if number == 1 else PLURALS[kind]}{f' ({most})' * bool(most)}")
  return ", ".join(kinds)


def remark(dataset: str, number: int, left_out: LeftOut) -> str:
  """A line about what of a data set of so many images was left out; empty if nothing was."""
  if not left_out:
    return ""
  return f"{dataset}: {number} image{'s' * (number != 1)}; left out: {left_out_text(left_out)}"


def nothing_found(data: DataConfig, left_out: LeftOut, hint: str = "") -> UserError:
  """The error that a collection holds no image."""
  kind, _ = own_images(data.dataset) or ("", "")
  suffixes, there = " ".join(sorted(suffixes_of(data))), f", only {left_out_text(left_out)}" if left_out else ""
  return UserError(f"dataset: {data.dataset!r} holds no {suffixes} file{there}; name a {kind} of images{hint}")


def kind_of(name: str, suffixes: frozenset[str]) -> str:
  """What a file within a packed collection is by its name: a kind of `PLURALS`, or "" for an image."""
  path = pathlib.PurePosixPath(name)
  if path.name.startswith("."):
    return "hidden file"
  if any(part.startswith(".") for part in path.parts):
    return "hidden folder"
  return "" if path.suffix.lower() in suffixes else "file of another format"


# What an index keeps of all kinds of packed collections.


class Scanned(NamedTuple):
  """What a scan of a packed collection has found: `ImageFiles` without functions.

  Attributes:
    names, sizes, headers: as in `ImageFiles`.
    labels: its classes, or why there are none.
    left_out: what is there and is no image of it.
    more: arrays [N] of its kind, by name.
    facts: JSON values of its kind.
  """

  names: Names
  sizes: np.ndarray
  headers: np.ndarray
  labels: Labels | UserError
  left_out: dict[str, dict[str, int]]
  more: dict[str, np.ndarray]
  facts: dict[str, Any]


def to_index(scanned: Scanned) -> Index:
  """What is kept of it."""
  names, sizes, headers, labels, left_out, more, facts = scanned
  arrays = {"text": names.text, "ends": names.ends, "sizes": sizes, "headers": headers}
  if isinstance(labels, Labels):
    arrays["classes"], of_labels = labels.classes, {"class_names": list(labels.names)}
  else:
    of_labels = {"without_labels": labels.why if isinstance(labels, NoLabels) else None, "bad_labels": str(labels)}
  listing = fingerprint.digest(
    part for name, size in zip(names, sizes.tolist(), strict=True) for part in (name, str(size))
  )
  return Index(
    arrays | {f"of_kind/{name}": array for name, array in more.items()},
    {"left_out": left_out, "labels": of_labels, "listing": listing, "of_kind": facts},
  )


def from_index(dataset: str, index: Index) -> tuple[Scanned, str]:
  """The reverse of `to_index`, and the digest of names and sizes."""
  arrays, facts = index
  of_labels = facts["labels"]
  if "classes" in arrays:
    labels: Labels | UserError = Labels(arrays["classes"], tuple(of_labels["class_names"]))
  elif of_labels["without_labels"] is not None:
    labels = NoLabels(dataset, of_labels["without_labels"])
  else:
    labels = UserError(of_labels["bad_labels"])
  more = {name.removeprefix("of_kind/"): array for name, array in arrays.items() if name.startswith("of_kind/")}
  names = Names(arrays["text"], arrays["ends"])
  scanned = Scanned(names, arrays["sizes"], arrays["headers"], labels, facts["left_out"], more, facts["of_kind"])
  return scanned, facts["listing"]


def labels_or_error(make: Callable[[], Labels]) -> Labels | UserError:
  """The labels, or why there are none: an error only for who asks for them."""
  try:
    return make()
  except UserError as error:
    return error


def given(labels: Labels | UserError) -> Labels:
  """The labels. Raises the error that stands in their place."""
  if isinstance(labels, UserError):
    raise labels
  return labels


def counted(kinds: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
  """What was left out, from the (kind, suffix) of each."""
  found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  for kind, suffix in kinds:
    found[kind][suffix] += 1
  return {kind: dict(found[kind]) for kind in PLURALS if kind in found}
