"""What a scan of large files has found, kept in the user's cache until they change."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL

from ddpm_jax.runtime import console
from ddpm_jax.runtime.paths import cache_folder
from ddpm_jax.workdir.arrays import UnusableError, load_arrays, save_arrays

_FORMAT = 1  # of what the scans find


class Index(NamedTuple):
  """What a scan has found.

  Attributes:
    arrays: by name.
    facts: JSON values.
  """

  arrays: dict[str, np.ndarray]
  facts: dict[str, Any]


def path_of(kind: str, place: str, *options: str, suffix: str = ".safetensors") -> pathlib.Path | None:
  """Where something about the files at `place` is kept; None for a user without a home folder.

  Args:
    kind: of the data set.
    place: the absolute path, or pattern, of its files.
    *options: what else it depends on.
    suffix: of the file.
  """
  folder, key = cache_folder(), json.dumps([kind, place, *options])
  return folder and folder / "data" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}{suffix}"


def kept_or(
  path: pathlib.Path | None,
  files: Sequence[str],
  scan: Callable[[], Index],
  usable: Callable[[Index], bool] = lambda index: True,
) -> Index:
  """The index in the cache, if it is whole and of these files as they are; else a new one, which is kept.

  An index that cannot be kept is made anew the next time, and a line on standard error says so.

  Args:
    path: of the index; None: it is not kept.
    files: what is scanned. Another size, or another time of change, of one of them is a change.
    scan: makes the index.
    usable: says whether what belongs to a kept index is there too.

  Raises:
    OSError: a file is not there.
  """
  if path is None:
    return scan()
  now = state_of(files)
  try:
    arrays, facts = load_arrays(path)
    if facts.pop("of") == now and usable(Index(arrays, facts)):
      return Index(arrays, facts)
  except FileNotFoundError:
    pass
  except UnusableError as error:
    console.note(f"{path} cannot be used ({error}); the data set is scanned anew")
  index = scan()
  if state_of(files) == now:
    try:
      save_arrays(path, index.arrays, index.facts | {"of": now})
    except OSError as error:
      console.note(f"{path} cannot be written ({error.strerror}); the data set will be scanned anew next time")
  return index


def state_of(files: Sequence[str]) -> list[Any]:
  """What tells whether files, or the program that scans them, have changed: JSON values. Raises OSError."""
  states = [os.stat(file) for file in files]
  return [
    _FORMAT,
    PIL.__version__,  # another version may read other headers
    [[file, state.st_size, state.st_mtime_ns] for file, state in zip(files, states, strict=True)],
  ]
