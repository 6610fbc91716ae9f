"""Parquet files of Hugging Face data sets, `--dataset=parquet:PATH`: a column of encoded images, a column of classes.

Reading single rows would read whole row groups. So the images are read once, in order: into memory, where their files
take little of it, or else into one file in the user's cache, which is kept.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import functools
import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data import files, index, labels
from ddpm_jax.data.encoded import Labels, NoLabels
from ddpm_jax.data.files import File, ImageFiles, Reader, Scanned
from ddpm_jax.data.names import Names
from ddpm_jax.errors import UserError

_OF_MEMORY = 0.5  # of --cache_gib that encoded images may take
_ROWS = 256  # at once
# As `datasets` finds splits in names of files: 'train-00000-of-00005', or a word of these between other signs.
_SHARD = re.compile(r"(?:.*/)?(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")
_WORDS = {
  "train": ("train", "training"),
  "validation": ("validation", "valid", "dev", "val"),
  "test": ("test", "testing", "eval", "evaluation"),
}


def exists(data: DataConfig) -> bool:
  """Returns True if there is a parquet file of that name."""
  return bool(_paths(data))


def split_names(data: DataConfig) -> list[str]:
  """The splits, by the names of the files. Raises UserError if there are none."""
  return list(dict.fromkeys(_split_of_files(data, _paths_or_error(data))))


def find(data: DataConfig) -> ImageFiles:
  """The images of parquet files, by the path of their file and their row.

  Raises:
    UserError: no such files, one that is damaged, no column of images or several, other columns in another file; files
      that can be packed nowhere; without `data.on_bad_record=skip` also a row that is no image.
  """
  paths = _paths_or_error(data)
  splits, columns = _split_of_files(data, paths), _columns(data, paths)
  in_memory = not data.data_workers and columns.size <= data.cache_gib * 2**30 * _OF_MEMORY
  if in_memory:
    contents: list[bytes] = []
    fetch: Fetch = functools.partial(_from_memory, contents)
    found = _scan(data, paths, splits, columns, contents.append, lambda *_: fetch)
    scanned, listing = files.from_index(data.dataset, files.to_index(found))
  else:
    scanned, listing, fetch = _packed(data, paths, splits, columns)
  whole = scanned.facts["splits"]
  rows = {name: np.concatenate([np.arange(*span) for span in spans]) for name, spans in whole.items()}
  return ImageFiles(
    names=scanned.names,
    sizes=scanned.sizes,
    headers=scanned.headers,
    fetch=fetch,
    place=functools.partial(_place, paths, scanned.facts["ends"]),
    classes=functools.partial(files.given, scanned.labels),
    splits=rows,
    listing=listing,
  )


def _place(paths: list[str], ends: list[int], row: int) -> str:
  number = bisect.bisect_right(ends, row)
  return f"row {row - (ends[number - 1] if number else 0)} of {paths[number]}"


def _from_memory(contents: list[bytes], rows: np.ndarray) -> list[bytes]:
  return [contents[row] for row in rows.tolist()]


def _paths(data: DataConfig) -> list[str]:
  """The files, sorted."""
  path = files.path_of(data)
  if os.path.isfile(path):
    return [path]
  if os.path.isdir(path):
    path = os.path.join(glob.escape(path), "**", "*.parquet")
  return sorted(found for found in glob.glob(path, recursive=True) if os.path.isfile(found))


def _paths_or_error(data: DataConfig) -> list[str]:
  paths = _paths(data)
  if not paths:
    raise files.not_there(data, "holds no .parquet file; use parquet:PATH with a file, a folder of files, or a pattern")
  return paths


def _split_of_files(data: DataConfig, paths: list[str]) -> list[str]:
  """The split of each file: all are 'train' unless the path is a folder in which their names say otherwise."""
  root = files.path_of(data)
  if os.path.isdir(root):
    relative = [os.path.relpath(path, root) for path in paths]
    for named in (_split_of_shard, _split_of_word):
      found = [named(path) for path in relative]
      if all(found) and len(set(found)) > 1:
        return [name for name in found if name]
  return ["train"] * len(paths)


def _split_of_shard(path: str) -> str | None:
  found = _SHARD.fullmatch(path)
  return found and found[1]


def _split_of_word(path: str) -> str | None:
  words = re.split(r"[^a-z]+", path.lower())
  return next((split for word in reversed(words) for split, known in _WORDS.items() if word in known), None)


Fetch = Callable[[np.ndarray], Sequence[File]]


class _Columns(NamedTuple):
  """Where images and classes are.

  Attributes:
    image: name of the column.
    label: name of the column; None if there is none.
    not_classes: type of the column of classes, if its values can be none.
    names: of the classes; None: the column does not say.
    size: of all encoded images, in bytes.
  """

  image: str
  label: str | None
  not_classes: str
  names: list[str] | None
  size: int


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
  """Raises UserError where a file is not what pyarrow can read. Only what reads it may be inside."""
  import pyarrow

  try:
    yield
  except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: of texts that are none
    if code := getattr(error, "errno", None):  # of the system, and not of pyarrow
      raise UserError(f"dataset: {path} cannot be read ({os.strerror(code)}); make it readable") from None
    raise UserError(
      f"dataset: {path} is no whole parquet file ({' '.join(str(error).split())}); copy it again"
    ) from None


def _columns(data: DataConfig, paths: list[str]) -> _Columns:
  """The columns that are used, and that all files have them. Raises UserError."""
  import pyarrow.parquet

  found, size = None, 0
  for path in paths:
    with _reading(path), pyarrow.parquet.ParquetFile(path) as file:
      here = _columns_of(data, path, file.schema_arrow)
      metadata = file.metadata
      for group in range(metadata.num_row_groups):
        columns = (metadata.row_group(group).column(number) for number in range(metadata.num_columns))
        size += sum(c.total_uncompressed_size for c in columns if f"{c.path_in_schema}.".startswith(f"{here.image}."))
    if found is not None and here != found:
      raise UserError(f"dataset: {path} has other columns or classes than {paths[0]}; name files of one data set")
    found = here
  assert found is not None  # there is a file
  return found._replace(size=size)


def _columns_of(data: DataConfig, path: str, schema: Any) -> _Columns:
  """The same of one file. schema: pyarrow's."""
  from pyarrow import types

  features = _features(schema)
  binaries = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)

  def kind(name: str) -> str:
    return str(features[name].get("_type")) if isinstance(features.get(name), dict) else ""

  def holds_bytes(kind: Any) -> bool:
    if types.is_struct(kind):
      place = kind.get_field_index("bytes")
      return place >= 0 and _is(kind.field(place).type, *binaries)
    return _is(kind, *binaries)

  columns = ", ".join(f"{field.name} ({kind(field.name) or field.type})" for field in schema)
  if len(set(schema.names)) < len(schema.names):
    raise UserError(f"dataset: {path} has two columns of one name; it has {columns}; write it again with other names")
  able = [field.name for field in schema if holds_bytes(field.type)]
  images = [name for name in able if kind(name) == "Image"]
  images = images or [field.name for field in schema if field.name in able and types.is_struct(field.type)] or able
  if data.image_field and data.image_field not in able:
    raise UserError(f"image_field: {data.image_field!r} is no column of images of {path}; it has {columns}")
  if not images:
    raise UserError(f"dataset: {path} has no column of images; it has {columns}; use files that hold images")
  if len(images) > 1 and not data.image_field:
    raise UserError(
      f"dataset: {path} has several columns of images, {' and '.join(images)}, of {columns}; choose one with "
      f"--image_field={images[0]}"
    )
  classes = [name for name in schema.names if kind(name) == "ClassLabel"]
  label = data.label_field or (classes or [name for name in schema.names if name == "label"] or [None])[0]
  if label is not None and label not in schema.names:
    raise UserError(f"label_field: {label!r} is no column of {path}; it has {columns}")
  type_of = schema.field(label).type if label is not None else None
  names = features[label].get("names") if label is not None and label in classes else None
  return _Columns(
    data.image_field or images[0],
    label,
    "" if type_of is None or _is(type_of, types.is_integer, types.is_null, *_texts()) else str(type_of),
    names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None,
    0,
  )


def _features(schema: Any) -> dict[str, Any]:
  """What the package `datasets` has written of the columns; empty if it has not."""
  tree: Any = (schema.metadata or {}).get(b"huggingface", b"{}")
  try:
    tree = json.loads(tree)
  except (ValueError, RecursionError):
    return {}  # somebody else's
  for name in ("info", "features"):
    tree = tree.get(name) if isinstance(tree, dict) else None
  return tree if isinstance(tree, dict) else {}


def _is(kind: Any, *tests: Callable[[Any], bool]) -> bool:
  """True if a type of pyarrow, or that of the values of a dictionary, passes one of the tests."""
  from pyarrow import types

  return _is(kind.value_type, *tests) if types.is_dictionary(kind) else any(test(kind) for test in tests)


def _texts() -> list[Callable[[Any], bool]]:
  """Tests of types whose values are texts."""
  from pyarrow import types

  return [types.is_string, types.is_large_string, types.is_string_view]


def _scan(
  data: DataConfig,
  paths: list[str],
  splits: list[str],
  columns: _Columns,
  append: Callable[[bytes], Any],
  fetch_of: Callable[[np.ndarray, np.ndarray, Callable[[int], str]], Fetch],
) -> Scanned:
  """Reads all files once.

  Args:
    data: the data set.
    paths: of the files.
    splits: of each file.
    columns: to be read.
    append: keeps an encoded image behind those before it.
    fetch_of: (where they start there [N], their sizes [N], `ImageFiles.place`) -> what reads them from there.
  """
  names, sizes, values, ends = [], [], [], []
  of_split: collections.Counter[str] = collections.Counter()
  spans: dict[str, list[list[int]]] = collections.defaultdict(list)
  for path, split in zip(paths, splits, strict=True):
    for content, name, value in _rows(path, columns):
      names.append(name or f"{of_split[split]:09d}")
      sizes.append(len(content))
      values.append(value)
      of_split[split] += 1
      append(content)
    spans[split].append([ends[-1] if ends else 0, len(names)])
    ends.append(len(names))
  if not sizes:
    raise UserError(f"dataset: {data.dataset!r} has no rows; name files with images")
  if not any(sizes):
    raise UserError(
      f"dataset: {data.dataset!r} holds no images, only paths to them; use files with the images, as "
      "Dataset.push_to_hub writes them"
    )
  lengths = np.array(sizes, np.int64)
  starts = np.cumsum(lengths) - lengths
  place = functools.partial(_place, paths, ends)
  fetch = fetch_of(starts, lengths, place)

  def found_labels() -> Labels:
    if not columns.label:
      raise NoLabels(data.dataset)
    if columns.not_classes:
      raise UserError(
        f"dataset: column {columns.label!r} of {data.dataset} is {columns.not_classes}; name one of whole numbers or "
        "texts with --label_field"
      )
    return labels.of_values(data.dataset, values, columns.names)

  return Scanned(
    Names.of(names),
    lengths,
    files.read_headers(data, fetch, place, len(names), skip=True),
    files.labels_or_error(found_labels),
    {},
    {"start": starts},
    {"splits": spans, "ends": ends},
  )


def _rows(path: str, columns: _Columns) -> Iterator[tuple[bytes, str | None, Any]]:
  """Yields encoded image, path and class of each row of a file, None where there is none. Raises UserError."""
  import pyarrow.parquet

  labels_of = [columns.label] if columns.label and not columns.not_classes else []
  with _reading(path), pyarrow.parquet.ParquetFile(path) as file:
    for batch in file.iter_batches(batch_size=_ROWS, columns=[columns.image, *labels_of]):
      column, none = batch.column(columns.image), [None] * len(batch)
      parts = {"bytes": column}
      if pyarrow.types.is_struct(column.type):
        parts = dict(zip([field.name for field in column.type], column.flatten(), strict=True))
      found = [content or b"" for content in parts["bytes"].to_pylist()]
      own = parts["path"].to_pylist() if "path" in parts and _is(parts["path"].type, *_texts()) else none
      yield from zip(found, own, *[batch.column(name).to_pylist() for name in labels_of] or [none], strict=True)


def _packed(data: DataConfig, paths: list[str], splits: list[str], columns: _Columns) -> tuple[Scanned, str, Fetch]:
  """What a scan has found, the digest of names and sizes, and what reads images from the file in the cache."""
  place_of = [os.path.abspath(files.path_of(data)), data.label_field, data.image_field, files.key_of(data)]
  kept = index.path_of("parquet", *place_of)
  if kept is None:
    raise UserError(
      f"dataset: {data.dataset!r} is to be packed into the cache, and this user has no home folder; name a folder in "
      "XDG_CACHE_HOME"
    )
  packed = kept.with_suffix(".packed")

  def scan() -> index.Index:
    temporary = packed.with_suffix(f".{os.getpid()}.tmp")
    try:
      packed.parent.mkdir(parents=True, exist_ok=True)
      try:
        with open(temporary, "wb", buffering=2**20) as file:

          def written(*where: Any) -> Fetch:
            file.flush()
            return functools.partial(_from_file, Reader([str(temporary)]), *where)

          made = _scan(data, paths, splits, columns, file.write, written)
        os.replace(temporary, packed)
      finally:
        temporary.unlink(missing_ok=True)
    except OSError as error:
      raise UserError(
        f"dataset: {data.dataset!r} cannot be packed into {packed.parent} ({error.strerror}); make room there, name "
        f"another folder in XDG_CACHE_HOME, or keep it in memory with a larger --cache_gib"
      ) from None
    return files.to_index(made)

  def is_packed(found: index.Index) -> bool:
    return packed.is_file() and packed.stat().st_size == int(found.arrays["sizes"].sum())

  found = index.kept_or(kept, paths, scan, is_packed)
  scanned, listing = files.from_index(data.dataset, found)
  place = functools.partial(_place, paths, scanned.facts["ends"])
  fetch = functools.partial(_from_file, Reader([str(packed)]), scanned.more["start"], scanned.sizes, place)
  return scanned, listing, fetch


def _from_file(
  reader: Reader, starts: np.ndarray, sizes: np.ndarray, place: Callable[[int], str], rows: np.ndarray
) -> list[File]:
  of_rows = zip(rows.tolist(), starts[rows].tolist(), sizes[rows].tolist(), strict=True)
  return [reader.read(0, start, size, functools.partial(files.numbered, place, row)) for row, start, size in of_rows]
