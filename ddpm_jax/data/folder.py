"""A folder of image files, `--dataset=folder:PATH`."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import hashlib
import os
import pathlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import tensorflow_datasets as tfds

from ddpm_jax.config import FOLDER, DataConfig
from ddpm_jax.data import fingerprint, images
from ddpm_jax.data.encoded import EncodedImages, NoLabels, decoded_size
from ddpm_jax.errors import UserError
from ddpm_jax.runtime.paths import expanded


def exists(data: DataConfig) -> bool:
  """Returns True if there is a folder of that name."""
  path = data.dataset.removeprefix(FOLDER)
  return bool(path) and os.path.isdir(expanded("dataset", path))


def open_folder(data: DataConfig) -> EncodedImages:
  """The images of a split of a folder, in the order of their relative paths, the same on every machine.

  Reads the header of every file, whatever the split: the images are grey if all in the folder are, and have a size if
  all have the same. With `data.on_bad_record=skip` a file without a readable header says nothing about that and keeps
  its place in the order.

  Raises:
    UserError: no such folder, a folder in it that cannot be listed, no image in it, a file that is not an image (with
      skip: all are not), a split that is none, see `split_of`, or images of different sizes where `data.image_size`
      is 0.
  """
  root = pathlib.Path(expanded("dataset", data.dataset.removeprefix(FOLDER)))
  if not exists(data):
    raise UserError(
      f"dataset: {data.dataset!r} is not a folder; use folder:PATH with the path of a folder of images, its new path "
      "if it was moved"
    )
  basic = data.formats == "basic"
  suffixes = images.BASIC_SUFFIXES if basic else images.SUFFIXES
  found = find_images(root, follow_links=data.follow_links, suffixes=suffixes)
  files = found.files
  if not files:
    there = f", only {found.left_out_text()}" if found.left_out else ""
    raise UserError(
      f"dataset: {data.dataset!r} holds no {' '.join(sorted(suffixes))} file{there}; name a folder of images"
      + ", or use --follow_links" * found.has_links
    )

  paths = np.array([os.fsencode(file) for file in files])
  look = functools.partial(_look, skip=data.on_bad_record == "skip", grey_palettes=not basic)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    looks = list(pool.map(look, files, map(_label, files, range(len(files)))))
  headers = [header for header, _ in looks if header is not None]
  if not headers:
    raise UserError(f"dataset: none of the {len(files)} files of {data.dataset!r} is an image that Pillow can read")
  shapes = {(height, width) for height, width, _ in headers}
  size = decoded_size(data.dataset, shapes.pop() if len(shapes) == 1 else (None, None), data.image_size)
  channels = 1 if all(grey for _, _, grey in headers) else 3
  names = [_relative(file, root) for file in files]
  chosen = split_of(data, names)
  own = paths[chosen]  # of a million, a worker process gets its copy at once

  def path(index: int) -> pathlib.Path:
    return pathlib.Path(os.fsdecode(own[index]))

  return EncodedImages(
    name=data.dataset,
    length=len(chosen),
    shape=(*size, channels),
    resize=bool(data.image_size),
    identity="folder" if data.split == "train" else f"folder {data.split}",
    listing=fingerprint.digest(part for i in chosen for part in (names[i], str(looks[i][1]))),
    fetch=lambda indices: [path(i) for i in indices],
    label=lambda index: _label(path(index), int(chosen[index])),
    classes=lambda: _classes(data.dataset, [_relative(pathlib.Path(os.fsdecode(p)), root) for p in paths])[chosen],
    remark=found.remark(data.dataset),
  )


def _label(file: pathlib.Path, number: int) -> str:
  """The name of an image in an error: its path, and its place among all of the folder."""
  return f"{file} (image {number})"


def split_of(data: DataConfig, names: Sequence[str]) -> np.ndarray:
  """The images of `data.split`, in TFDS's notation, of a folder: int64, the places of their names in `names`.

  A folder has one split, 'train', of which slices may be taken: 'train[:90%]', 'train[90%:]', 'train[:500]'. Slices are
  cut in the order of the SHA-256 of the relative paths, in which folders of classes, or pictures that were taken one
  after the other, do not lie together. So a slice is a random part of all classes; it is the same on every machine and
  wherever the folder lies, slices that do not overlap share no image, and where images are added all but a few of the
  others stay in their slice. Within a slice the order is that of `names`.

  Args:
    data: names the split.
    names: paths below the folder, in the order of the data set.

  Raises:
    UserError: another split than 'train', no split at all, or an empty one.
  """
  try:
    # The files of TFDS stand for those of the folder: one shard.
    whole: Any = {"train": tfds.core.SplitInfo(name="train", shard_lengths=[len(names)], num_bytes=0)}
    parts = tfds.core.ReadInstruction.from_spec(data.split).to_absolute(whole)
  except (ValueError, NotImplementedError) as error:
    raise UserError(
      f"split: {data.split!r} is no part of a folder ({' '.join(str(error).split())}); use 'train' or slices of it, "
      "such as 'train[:90%]', or name the folder of that split in --dataset=folder:PATH"
    ) from None
  if all(part.from_ is None and part.to is None for part in parts):
    order = np.arange(len(names))  # nothing is cut: no digests
  else:
    order = np.argsort([hashlib.sha256(os.fsencode(name)).hexdigest() for name in names], kind="stable")
  chosen = [np.sort(order[part.from_ : part.to]) for part in parts]
  if not sum(map(len, chosen)):
    raise UserError(f"split: {data.split!r} of {data.dataset!r}, of {len(names)} images, is empty; take a larger part")
  return np.concatenate(chosen)


def _classes(name: str, paths: list[str]) -> np.ndarray:
  """The class of each image, int32 [N]: its first folder, in the order of their names, as torchvision's ImageFolder.

  Raises:
    UserError: an image lies in no folder, or all lie in the same one.
  """
  heads = [path.partition("/") for path in paths]
  if not all(slash for _, slash, _ in heads) or len({head for head, _, _ in heads}) < 2:
    raise NoLabels(name)
  number = {head: index for index, head in enumerate(sorted({head for head, _, _ in heads}))}
  return np.array([number[head] for head, _, _ in heads], np.int32)


# The kinds that are left out, in the order of the message.
_PLURALS = {
  "file of another format": "files of other formats",
  "hidden file": "hidden files",
  "hidden folder": "hidden folders",
  "special file": "special files",
  "broken link": "broken links",
  "link to a file outside": "links to files outside",
  "link to a folder": "links to folders",
}


class Found(NamedTuple):
  """The images of a folder.

  Attributes:
    files: sorted by path below the folder.
    left_out: what is there and is no image of it, kind -> suffix (or nothing) -> how many.
  """

  files: list[pathlib.Path]
  left_out: dict[str, collections.Counter[str]]

  @property
  def has_links(self) -> bool:
    """True if --follow_links would take more."""
    return any(kind.startswith("link to") for kind in self.left_out)

  def remark(self, name: str) -> str:
    """A line about what of the data set `name` was left out; empty if nothing was."""
    if not self.left_out:
      return ""
    number = len(self.files)
    return (
      f"{name}: {number} image{'s' * (number != 1)}; left out: {self.left_out_text()}"
      + " (--follow_links follows links)" * self.has_links
    )

  def left_out_text(self) -> str:
    """Kinds and numbers of what was left out; empty if nothing was."""
    kinds = []
    for kind, suffixes in self.left_out.items():
      number = suffixes.total()
      named = sorted((-count, suffix) for suffix, count in suffixes.items() if suffix)
      most = ", ".join([f"{suffix} {-count}" for count, suffix in named[:8]] + ["..."] * (len(named) > 8))
      if images.HEIC_SUFFIXES & suffixes.keys() and not images.HEIC_SUFFIXES & images.SUFFIXES:
        most += "; pip install 'ddpm_jax[heic]' to read HEIC"
      kinds.append(f"{number} {kind if number == 1 else _PLURALS[kind]}{f' ({most})' * bool(most)}")
    return ", ".join(kinds)


def find_images(
  root: pathlib.Path, *, follow_links: bool = False, suffixes: Collection[str] = images.SUFFIXES
) -> Found:
  """Image files below `root`, sorted by relative path: no hidden ones, and what links lead to only if it lies inside.

  Args:
    root: the folder.
    follow_links: take what links lead to, wherever it lies, under the path of the link. A folder is taken once, under
      its own path if it has one below `root`, else under the first link to it; so a link in a circle ends.
    suffixes: by which an image is known, in lower case.

  Raises:
    UserError: a folder cannot be listed. Without its files the order would be another.
  """
  inside = root.resolve()
  files, links, seen = [], [root], set()
  left_out: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

  def identity(folder: pathlib.Path) -> tuple[int, int]:
    try:
      status = folder.stat()
    except OSError as error:
      _refuse(error)
    return status.st_dev, status.st_ino

  while links:
    start = links.pop(0)
    if start != root and identity(start) in seen:
      continue  # its images are there already, under another path
    linked = []
    for folder, subfolders, names in os.walk(start, onerror=_refuse):
      here = pathlib.Path(folder)
      if follow_links:
        seen.add(identity(here))
      for name in list(subfolders):
        path = here / name
        if name.startswith("."):
          left_out["hidden folder"][""] += 1
        elif path.is_symlink():
          linked.append(path)
          if not follow_links:
            left_out["link to a folder"][""] += 1
        elif not follow_links or identity(path) not in seen:
          continue
        subfolders.remove(name)
      for name in names:
        file = here / name
        if name.startswith("."):
          left_out["hidden file"][""] += 1
        elif not file.is_file():
          left_out["broken link" if file.is_symlink() else "special file"][""] += 1
        elif file.suffix.lower() not in suffixes:
          left_out["file of another format"][file.suffix.lower() or "no suffix"] += 1
        elif file.is_symlink() and not follow_links and not file.resolve().is_relative_to(inside):
          left_out["link to a file outside"][""] += 1
        else:
          files.append(file)
    if follow_links:
      links += sorted(linked)
  return Found(
    sorted(files, key=functools.partial(_relative, root=root)),
    {kind: left_out[kind] for kind in _PLURALS if kind in left_out},
  )


def _relative(file: pathlib.Path, root: pathlib.Path) -> str:
  return file.relative_to(root).as_posix()


def _refuse(error: OSError) -> NoReturn:
  raise UserError(f"dataset: the folder {error.filename} cannot be listed ({error.strerror}); make it readable")


def _look(
  file: pathlib.Path, name: str, *, skip: bool, grey_palettes: bool
) -> tuple[tuple[int, int, bool] | None, int]:
  """The header of a file, and its size in bytes. With `skip`: None for one that is bad, -1 if the file is gone.

  Raises:
    images.BadRecord: it is bad, and `skip` is off.
  """
  try:
    header = images.read_header(file, name, grey_palettes=grey_palettes)
  except images.BadRecord:
    if not skip:
      raise
    header = None
  try:
    return header, file.stat().st_size
  except OSError:
    return header, -1
