"""A folder of image files, `--dataset=folder:PATH`."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import pathlib

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data import fingerprint, images
from ddpm_jax.data.encoded import EncodedImages, decoded_size, no_labels
from ddpm_jax.errors import UserError
from ddpm_jax.paths import expanded

PREFIX = "folder:"
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})


def exists(data: DataConfig) -> bool:
  """Whether there is a folder of that name."""
  path = data.dataset.removeprefix(PREFIX)
  return bool(path) and os.path.isdir(expanded("dataset", path))


def open_folder(data: DataConfig) -> EncodedImages:
  """The images below a folder, in the order of their relative paths, the same on every machine.

  Reads the header of every file: the images are grey if all are, and have a size if all have the same. With
  `data.on_bad_record=skip` a file without a readable header says nothing about that and keeps its place in the order.

  Raises:
    UserError: no such folder, a folder in it that cannot be listed, no image in it, a file that is not an image (with
      skip: all are not), a split that a folder does not have, or images of different sizes, or not square, where
      `data.image_size` is 0.
  """
  root = pathlib.Path(expanded("dataset", data.dataset.removeprefix(PREFIX)))
  if not exists(data):
    raise UserError(f"dataset: {data.dataset!r} names no folder; use folder:PATH with the path of a folder of images")
  if data.split != "train":
    raise UserError(
      f"split: {data.split!r} is unknown, a folder has only 'train'; name the folder of that split in "
      "--dataset=folder:PATH"
    )
  files = find_images(root)
  if not files:
    raise UserError(
      f"dataset: {data.dataset!r} holds no {' '.join(sorted(_SUFFIXES))} file (hidden files, and links "
      "that lead out of the folder, are left out); name a folder of images"
    )

  paths = np.array([os.fsencode(file) for file in files])  # of a million, a worker process gets its copy at once

  def path(index: int) -> pathlib.Path:
    return pathlib.Path(os.fsdecode(paths[index]))

  def label(index: int) -> str:
    return f"{path(index)} (image {index})"

  look = functools.partial(_look, skip=data.on_bad_record == "skip")
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    looks = list(pool.map(look, files, map(label, range(len(files)))))
  headers = [header for header, _ in looks if header is not None]
  if not headers:
    raise UserError(f"dataset: none of the {len(files)} files of {data.dataset!r} is an image that Pillow can read")
  sizes = {(height, width) for height, width, _ in headers}
  size = decoded_size(data.dataset, sizes.pop() if len(sizes) == 1 else (None, None), data.image_size)
  channels = 1 if all(grey for _, _, grey in headers) else 3
  return EncodedImages(
    name=data.dataset,
    length=len(files),
    shape=(*size, channels),
    resize=data.image_size > 0,
    identity="folder",
    listing=fingerprint.digest(
      part for file, (_, size) in zip(files, looks, strict=True) for part in (_relative(file, root), str(size))
    ),
    fetch=lambda indices: [path(i) for i in indices],
    label=label,
    classes=lambda: _classes(data.dataset, [_relative(path(i), root) for i in range(len(paths))]),
  )


def _classes(name: str, paths: list[str]) -> np.ndarray:
  """The class of each image, int32 [N]: its first folder, in the order of their names, as torchvision's ImageFolder.

  Raises:
    UserError: an image lies in no folder, or all lie in the same one.
  """
  heads = [path.partition("/") for path in paths]
  if not all(slash for _, slash, _ in heads) or len({head for head, _, _ in heads}) < 2:
    raise no_labels(name)
  number = {head: index for index, head in enumerate(sorted({head for head, _, _ in heads}))}
  return np.array([number[head] for head, _, _ in heads], np.int32)


def find_images(root: pathlib.Path) -> list[pathlib.Path]:
  """Image files below `root`, sorted by relative path; no hidden ones, none that a link leads out of `root` for.

  Raises:
    UserError: a folder cannot be listed. Without its files the order would be another.
  """
  inside = root.resolve()
  found = []
  for folder, subfolders, names in os.walk(root, onerror=_refuse):
    subfolders[:] = [name for name in subfolders if not name.startswith(".")]
    for name in names:
      file = pathlib.Path(folder, name)
      if name.startswith(".") or file.suffix.lower() not in _SUFFIXES or not file.is_file():
        continue
      if not file.is_symlink() or file.resolve().is_relative_to(inside):
        found.append(file)
  return sorted(found, key=functools.partial(_relative, root=root))


def _relative(file: pathlib.Path, root: pathlib.Path) -> str:
  return file.relative_to(root).as_posix()


def _refuse(error: OSError) -> None:
  raise UserError(f"dataset: the folder {error.filename} cannot be listed ({error.strerror}); make it readable")


def _look(file: pathlib.Path, name: str, *, skip: bool) -> tuple[tuple[int, int, bool] | None, int]:
  """The header of a file, and its size in bytes. With `skip`: None for one that is bad, -1 if the file is gone.

  Raises:
    images.BadRecord: it is bad, and `skip` is off.
  """
  try:
    header = images.read_header(file, name)
  except images.BadRecord:
    if not skip:
      raise
    header = None
  try:
    return header, file.stat().st_size
  except OSError:
    return header, -1
