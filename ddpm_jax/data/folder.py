"""A folder of image files, `--dataset=folder:PATH`."""

from __future__ import annotations

import collections
import functools
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import NamedTuple, NoReturn

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data import files, images, labels
from ddpm_jax.data.files import ImageFiles
from ddpm_jax.errors import UserError


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
  if not found.files:
    raise files.nothing_found(data, found.left_out, ", or use --follow_links" * found.has_links)
  paths = np.array([os.fsencode(file) for file in found.files])  # of a million, a worker process gets its copy at once

  def path(row: int) -> pathlib.Path:
    return pathlib.Path(os.fsdecode(paths[row]))

  def fetch(rows: np.ndarray) -> list[pathlib.Path]:
    return [path(row) for row in rows.tolist()]

  def place(row: int) -> str:
    return str(path(row))

  headers = files.read_headers(data, fetch, place, len(paths), skip=data.on_bad_record == "skip")
  names = [_relative(file, root) for file in found.files]
  left_out = files.remark(data.dataset, len(paths), found.left_out)
  return ImageFiles(
    names=names,
    sizes=np.array([_size(file) for file in found.files]),
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


def _size(file: pathlib.Path) -> int:
  """In bytes; -1 if it is gone."""
  try:
    return file.stat().st_size
  except OSError:
    return -1


class Found(NamedTuple):
  """The images of a folder.

  Attributes:
    files: sorted by path below the folder.
    left_out: what is there and is no image of it, see `files.LeftOut`.
  """

  files: list[pathlib.Path]
  left_out: Mapping[str, Mapping[str, int]]

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
  inside = root.resolve()
  taken, links, seen = [], [root], set()
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
        elif here == root and name == labels.DATASET_JSON:
          continue  # it may hold the labels
        elif file.suffix.lower() not in suffixes:
          left_out["file of another format"][file.suffix.lower() or "no suffix"] += 1
        elif file.is_symlink() and not follow_links and not file.resolve().is_relative_to(inside):
          left_out["link to a file outside"][""] += 1
        else:
          taken.append(file)
    if follow_links:
      links += sorted(linked)
  return Found(sorted(taken, key=functools.partial(_relative, root=root)), left_out)


def _relative(file: pathlib.Path, root: pathlib.Path) -> str:
  return file.relative_to(root).as_posix()


def _refuse(error: OSError) -> NoReturn:
  raise UserError(f"dataset: the folder {error.filename} cannot be listed ({error.strerror}); make it readable")
