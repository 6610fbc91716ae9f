"""A folder of image files, `--dataset=folder:PATH`."""

from __future__ import annotations

import collections
import errno
import os
import pathlib
import stat
from collections.abc import Collection, Mapping
from typing import NamedTuple, NoReturn

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data import files, images, labels
from ddpm_jax.data.files import ImageFiles
from ddpm_jax.data.names import Names
from ddpm_jax.errors import UserError

_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def exists(data: DataConfig) -> bool:
  """Returns True if there is a folder of that name."""
  path = files.path_of(data)
  return bool(path) and os.path.isdir(path)


def find(data: DataConfig) -> ImageFiles:
  """The images of a folder, in the order of their relative paths, the same on every machine.

  Reads the header of every file. With `data.on_bad_record=skip` a file without a readable header keeps its place in the
  order.

  Raises:
    UserError: no such folder, a folder in it that cannot be listed, no image in it, or, without skip, a file that is
      not an image.
  """
  root = pathlib.Path(files.path_of(data))
  if not exists(data):
    raise files.not_there(
      data, "is not a folder; use folder:PATH with the path of a folder of images, its new path if it was moved"
    )
  found = find_images(root, follow_links=data.follow_links, suffixes=files.suffixes_of(data))
  if not len(found.names):
    raise files.nothing_found(data, found.left_out, ", or use --follow_links" * found.has_links)
  names, start = found.names, _inside(root)

  def place(row: int) -> str:
    return start + names[row]

  def fetch(rows: np.ndarray) -> list[str]:
    return [start + names[row] for row in rows.tolist()]

  headers = files.read_headers(data, fetch, place, len(names), skip=data.on_bad_record == "skip")
  left_out = files.remark(data.dataset, len(names), found.left_out)
  return ImageFiles(
    names=names,
    sizes=found.sizes,
    headers=headers,
    fetch=fetch,
    place=place,
    classes=lambda: labels.of_files(data.dataset, names, _dataset_json(root)),
    remark=left_out + " (--follow_links follows links)" * (bool(left_out) and found.has_links),
  )


def _dataset_json(root: pathlib.Path) -> bytes | None:
  """The file that may hold the labels. Raises UserError if it is there and cannot be read."""
  path = root / labels.DATASET_JSON
  try:
    return path.read_bytes()
  except FileNotFoundError:
    return None
  except OSError as error:
    raise UserError(f"dataset: {path} cannot be read ({error.strerror}); make it readable") from error


class Found(NamedTuple):
  """The images of a folder.

  Attributes:
    root: the folder.
    names: their paths below it, sorted.
    sizes: of each, int64 [N], in bytes.
    left_out: what is there and is no image of it, see `files.LeftOut`.
  """

  root: pathlib.Path
  names: Names
  sizes: np.ndarray
  left_out: Mapping[str, Mapping[str, int]]

  @property
  def files(self) -> list[pathlib.Path]:
    """The paths of all."""
    return [self.root / name for name in self.names]

  @property
  def has_links(self) -> bool:
    """True if --follow_links would take more."""
    return any(kind.startswith("link to") for kind in self.left_out)


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
  inside, start = root.resolve(), _inside(root)
  taken, links, seen = [], [str(root)], set()
  left_out: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

  def identity(folder: str) -> tuple[int, int]:
    try:
      status = os.stat(folder)
    except OSError as error:
      _refuse(error)
    return status.st_dev, status.st_ino

  while links:
    first = links.pop(0)
    if first != str(root) and identity(first) in seen:
      continue  # its images are there already, under another path
    linked = []
    for folder, subfolders, names in os.walk(first, onerror=_refuse):
      here = start if folder == str(root) else os.path.join(folder, "").removeprefix(f".{os.sep}")
      if follow_links:
        seen.add(identity(folder))
      for name in list(subfolders):
        path = here + name
        if name.startswith("."):
          left_out["hidden folder"][""] += 1
        elif os.path.islink(path):
          linked.append(path)
          if not follow_links:
            left_out["link to a folder"][""] += 1
        elif not follow_links or identity(path) not in seen:
          continue
        subfolders.remove(name)
      for name in names:
        path = here + name
        if name.startswith("."):
          left_out["hidden file"][""] += 1
          continue
        link, status = _status(path)
        if status is None or not stat.S_ISREG(status.st_mode):
          left_out["broken link" if link else "special file"][""] += 1
        elif here == start and name == labels.DATASET_JSON:
          continue  # it may hold the labels
        elif os.path.splitext(name)[1].lower() not in suffixes:
          left_out["file of another format"][pathlib.PurePath(name).suffix.lower() or "no suffix"] += 1
        elif link and not follow_links and not pathlib.Path(path).resolve().is_relative_to(inside):
          left_out["link to a file outside"][""] += 1
        else:
          taken.append((path[len(start) :], status.st_size))
    if follow_links:
      links += sorted(linked, key=pathlib.PurePath)
  taken.sort()
  sizes = np.array([size for _, size in taken], np.int64)
  return Found(root, Names.of(name for name, _ in taken), sizes, left_out)


def _inside(root: pathlib.Path) -> str:
  """What a path below `root` begins with, before its path within it."""
  return "" if root == pathlib.Path() else os.path.join(root, "")


def _status(path: str) -> tuple[bool, os.stat_result | None]:
  """True for a link, and what is known of the file there or where it leads; None if there is none."""
  link = False
  try:
    status = os.lstat(path)
    link = stat.S_ISLNK(status.st_mode)
    return link, os.stat(path) if link else status
  except OSError as error:
    if error.errno not in _NO_FILE:
      raise UserError(f"dataset: {path} cannot be read ({error.strerror}); make it readable") from error
    return link, None


def _refuse(error: OSError) -> NoReturn:
  raise UserError(f"dataset: the folder {error.filename} cannot be listed ({error.strerror}); make it readable")
