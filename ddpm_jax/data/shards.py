"""Tar shards of image files as of WebDataset, `--dataset=webdataset:GLOB`, with random access.

An example is the files of one shard, one after the other, that have one name up to the first dot behind the last slash:
its image, and its class in a `.cls` or in a field of a `.json`.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data import files, index, labels
from ddpm_jax.data.encoded import Labels
from ddpm_jax.data.files import File, ImageFiles, Reader, Scanned
from ddpm_jax.data.names import Names
from ddpm_jax.errors import UserError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # key and extension
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"\x28\xb5": "unzstd"}  # by first bytes
_MOST_RANGE = 10**6
CLASS_NAMES = "classes.json"  # beside the shards: a list of the names of numbered classes


def exists(data: DataConfig) -> bool:
  """Returns True if there is a shard of that name."""
  try:
    return bool(_shards(data))
  except UserError:
    return False


def find(data: DataConfig) -> ImageFiles:
  """The images of the shards, by the path of their shard and their place in it. An index is kept of them.

  Raises:
    UserError: no such shards, a compressed one, one that is cut off or damaged (with `data.on_bad_record=skip` its
      whole examples are used), no image in them, or an example with two; without skip also a file that is no image.
  """
  paths = _shards(data)
  skip = data.on_bad_record == "skip"
  place_of = os.path.abspath(files.path_of(data))
  kept = index.path_of("webdataset", place_of, data.label_field, files.key_of(data))
  scan = lambda: files.to_index(_scan(data, paths))  # noqa: E731
  try:
    found = index.kept_or(kept, [*paths, *_names_files(paths)], scan)
  except OSError as error:
    raise UserError(f"dataset: {error.filename} cannot be read ({error.strerror}); make it readable") from None
  scanned, listing = files.from_index(data.dataset, found)
  cut, number = scanned.facts["cut"], len(scanned.names)
  if cut and not (skip and number):
    raise UserError(f"dataset: {cut}; copy that shard again{', or use --on_bad_record=skip' * bool(number)}")
  if not number:
    raise files.nothing_found(data, scanned.left_out)
  of_files = scanned.more
  place = functools.partial(_place, paths, of_files["shard"], scanned.names)
  remarks = [cut, files.remark(data.dataset, len(scanned.names), scanned.left_out)]
  return ImageFiles(
    names=scanned.names,
    sizes=scanned.sizes,
    headers=scanned.headers,
    fetch=functools.partial(_fetch, Reader(paths), of_files["shard"], of_files["start"], scanned.sizes, place),
    place=place,
    classes=functools.partial(files.given, scanned.labels),
    listing=listing,
    remark="; ".join(filter(None, remarks)),
  )


def _place(paths: list[str], shard: np.ndarray, names: Names, row: int) -> str:
  return f"{paths[shard[row]]}/{names[row]}"


def _fetch(
  reader: Reader, shard: np.ndarray, start: np.ndarray, sizes: np.ndarray, place: Callable[[int], str], rows: np.ndarray
) -> list[File]:
  """The bytes of images, or a BadRecord. Arguments: of all images [N]."""
  of_rows = (array.tolist() for array in (rows, shard[rows], start[rows], sizes[rows]))
  return [
    reader.read(number, at, size, functools.partial(files.numbered, place, row))
    for row, number, at, size in zip(*of_rows, strict=True)
  ]


def _shards(data: DataConfig) -> list[str]:
  """The paths of the shards, sorted. Raises UserError if one of a range, or all, are missing."""
  pattern = files.path_of(data)
  if os.path.isdir(pattern):
    pattern = os.path.join(glob.escape(pattern), "*.tar")
  found = set()
  for path in _expand(data, pattern):
    if os.path.isfile(path):
      found.add(path)
    elif glob.has_magic(path):
      found.update(path for path in glob.glob(path) if os.path.isfile(path))
    else:
      raise files.not_there(data, f"has no shard {path!r}; use webdataset:GLOB, such as 'DIR/*.tar'")
  if not found:
    raise files.not_there(data, "is no file; use webdataset:GLOB with the shards, such as 'DIR/*.tar'")
  return sorted(found)


def _expand(data: DataConfig, pattern: str) -> Iterator[str]:
  """The patterns that one with ranges stands for: 'x-{008..010}' is x-008, x-009, x-010. Raises UserError."""
  found = _RANGE.search(pattern)
  if found is None:
    yield pattern
    return
  first, last = found.groups()
  if not int(first) <= int(last) < int(first) + _MOST_RANGE:
    raise UserError(f"dataset: the range {found[0]} of {data.dataset!r} is none; write it like {{000..009}}")
  for number in range(int(first), int(last) + 1):
    yield from _expand(data, pattern[: found.start()] + f"{number:0{len(first)}}" + pattern[found.end() :])


def _names_files(paths: list[str]) -> list[str]:
  """The file of class names beside the shards, if there is one."""
  path = os.path.join(os.path.dirname(paths[0]), CLASS_NAMES)
  return [path] if os.path.isfile(path) else []


class _Member(NamedTuple):
  """A file in a shard."""

  name: str
  start: int
  size: int


class _Example(NamedTuple):
  """Files that have one key: extension in small letters -> file."""

  key: str
  files: dict[str, _Member]


def _scan(data: DataConfig, paths: list[str]) -> Scanned:
  """Reads the headers of all shards, the labels, and the header of each image. Raises UserError, OSError."""
  reader, names, rows, values, left_out, cut = Reader(paths), [], [], [], [], []
  for number, path in enumerate(paths):
    examples = []
    problem = _examples(data, path, examples, left_out)
    if problem:
      last = f"the last whole example is {examples[-1].key}" if examples else "it has no whole example"
      cut.append(f"{path} {problem}; {last}")
    for example in examples:
      known = files.suffixes_of(data)
      pictures = [member for extension, member in example.files.items() if f".{extension}" in known]
      if len(pictures) > 1:
        raise UserError(
          f"dataset: example {example.key} of {path} has two images, {pictures[0].name} and {pictures[1].name}; pack "
          "it again with one"
        )
      if not pictures:
        dotted = any(f".{extension.rpartition('.')[2]}" in known for extension in example.files)
        left_out.append(("image with a second dot in its name" if dotted else "example without an image", ""))
        continue
      names.append(pictures[0].name)
      rows.append((number, pictures[0].start, pictures[0].size))
      values.append(_value(data, reader, number, path, example))
  shard, start, sizes = np.array(rows, np.int64).reshape(-1, 3).T
  packed = Names.of(names)
  place = functools.partial(_place, paths, shard, packed)
  fetch = functools.partial(_fetch, reader, shard, start, sizes, place)
  return Scanned(
    packed,
    sizes,
    files.read_headers(data, fetch, place, len(packed), skip=True),
    files.labels_or_error(lambda: _labels(data, paths, values)),
    files.counted(left_out),
    {"shard": shard.astype(np.int32), "start": start},
    {"cut": "; ".join(cut)},
  )


def _examples(data: DataConfig, path: str, examples: list[_Example], left_out: list[tuple[str, str]]) -> str:
  """Appends the whole examples of a shard. Returns what is wrong with its end; empty if nothing is. Raises UserError.

  A shard ends with a block of zeros: without it, what should follow may be missing.
  """
  length, problem, current = os.path.getsize(path), "", None
  with open(path, "rb") as file:
    magic = file.read(2)
    if magic in _COMPRESSED:
      raise UserError(
        f"dataset: {path} is a compressed tar, which has no random access; decompress it ({_COMPRESSED[magic]})"
      )
    file.seek(0)
    try:
      archive: Any = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  nothing of it is open but `file`
      while (entry := archive.next()) is not None:
        archive.members = []  # else it keeps all of them
        if entry.size < 0:
          problem = "is damaged"
          break
        if entry.offset_data + entry.size > length:
          problem = "is cut off"
          break
        current = _add(data, path, entry, examples, current, left_out)
      if not problem:
        file.seek(archive.offset)
        end = file.read(tarfile.BLOCKSIZE)
        problem = "is cut off" if len(end) < tarfile.BLOCKSIZE else "is damaged" if end.strip(b"\0") else ""
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:  # the latter for sizes that no tar has
      none = not examples and current is None
      problem = f"is no tar ({' '.join(str(error).split())})" if none else "is cut off or damaged"
  if current is not None and not (problem and examples and current.files.keys() != examples[-1].files.keys()):
    examples.append(current)  # at a cut only if it has all that the one before it has
  return problem


def _add(
  data: DataConfig,
  path: str,
  entry: tarfile.TarInfo,
  examples: list[_Example],
  current: _Example | None,
  left_out: list[tuple[str, str]],
) -> _Example | None:
  """Adds an entry of a shard to the example that it belongs to. Returns the one that is not finished.

  Raises:
    UserError: the example has such a file already.
  """
  if entry.isdir():
    return current
  found = _NAME.fullmatch(entry.name.removeprefix("./"))
  if (
    not entry.isreg()
    or entry.issparse()
    or found is None
    or files.kind_of(entry.name, files.suffixes_of(data)).startswith("hidden")
  ):
    special = not entry.isreg() or entry.issparse()
    left_out.append(
      ("special file", "") if special else (files.kind_of(entry.name, files.suffixes_of(data)) or "hidden file", "")
    )
    return current
  key, extension = found.groups()
  if current is None or current.key != key:
    if current is not None:
      examples.append(current)
    current = _Example(key, {})
  name = entry.name.removeprefix("./")
  if extension.lower() in current.files:
    raise UserError(f"dataset: example {key} of {path} has two files {name}; pack it again with one")
  current.files[extension.lower()] = _Member(name, entry.offset_data, entry.size)
  return current


def _value(data: DataConfig, reader: Reader, shard: int, path: str, example: _Example) -> Any:
  """The class of an example, as it stands there: an int or a text; None if there is none; a UserError in its place."""
  found, problem = [], lambda member, what: UserError(f"dataset: {path}/{member.name} {what}; pack it again")
  for extension in ("cls", "json"):
    member = example.files.get(extension)
    if member is None:
      continue
    content = reader.read(shard, member.start, member.size, functools.partial("{}/{}".format, path, member.name))
    try:
      text = content.decode() if isinstance(content, bytes) else ""
      tree = json.loads(text) if extension == "json" else {}
    except (ValueError, RecursionError) as error:  # of JSON, or of the encoding
      return problem(member, f"cannot be read ({' '.join(str(error).split())})")
    if extension == "cls":
      found += [text.strip()] if text.strip() else []
    elif isinstance(tree, dict) and tree.get(data.label_field or "label") is not None:
      found.append(tree[data.label_field or "label"])
  if len(set(map(str, found))) > 1:
    return problem(example.files["cls"], f"says {found[0]}, and its .json {found[1]}")
  return found[-1] if found else None


def _labels(data: DataConfig, paths: list[str], values: list[Any]) -> Labels:
  """The labels of all images. Raises UserError."""
  error = next((value for value in values if isinstance(value, UserError)), None)
  if error is not None:
    raise error
  if data.label_field and all(value is None for value in values):
    raise UserError(
      f"label_field: no .json of {data.dataset} has a field {data.label_field!r}; use the one with the class"
    )
  names = None
  for path in _names_files(paths):
    try:
      with open(path, "rb") as file:
        names = json.load(file)
    except (OSError, ValueError, RecursionError) as failure:
      raise UserError(f"dataset: {path} cannot be read ({' '.join(str(failure).split())}); correct it") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
      raise UserError(f"dataset: {path} is no list of names of classes; correct it, or take it away")
  return labels.of_values(data.dataset, values, names)
