"""A zip of image files, `--dataset=zip:PATH`, read without unpacking: the layout of EDM and StyleGAN, or folders."""

from __future__ import annotations

import functools
import os
import pathlib
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data import files, index, labels
from ddpm_jax.data.files import File, ImageFiles, Reader, Scanned
from ddpm_jax.data.images import BadRecord
from ddpm_jax.data.names import Names
from ddpm_jax.errors import UserError

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_EMOJI = "emoji64.zip"  # of the presets emoji32 and emoji64
_OTHER_METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd"}
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, ..., length of the name, length of the extra field
_ENCRYPTED = 0x1  # of the flags of an entry
# What `zipfile` raises for a damaged file: ValueError for names that are no text, NotImplementedError for a version.
_NO_ZIP = (zipfile.BadZipFile, EOFError, ValueError, OverflowError, NotImplementedError, struct.error, zlib.error)


def exists(data: DataConfig) -> bool:
  """Returns True if there is a file of that name."""
  return os.path.isfile(files.path_of(data))


def find(data: DataConfig) -> ImageFiles:
  """The images of a zip, in the order of their names, as those of a folder. An index is kept of it.

  Raises:
    UserError: no such file, no whole zip, or one without images, with two entries of one name, or with an entry that is
      encrypted, leads outside, or is compressed otherwise than by deflate; without `data.on_bad_record=skip` also an
      entry that is not an image.
  """
  path = files.path_of(data)
  if not exists(data):
    made = f"{_EMOJI} is made by experiments/make_emoji.py" if os.path.basename(path) == _EMOJI else ""
    raise files.not_there(data, f"is no file; {made or 'use zip:PATH with the path of a zip of images'}")
  kept = index.path_of("zip", os.path.abspath(path), files.key_of(data))
  found = index.kept_or(kept, [path], lambda: files.to_index(_scan(data, path)))
  scanned, listing = files.from_index(data.dataset, found)
  of_entries = scanned.more
  place = functools.partial(_place, path, scanned.names)
  fetch = functools.partial(
    _fetch, Reader([path]), of_entries["start"], of_entries["stored"], scanned.sizes, of_entries["crc"], place
  )
  return ImageFiles(
    names=scanned.names,
    sizes=scanned.sizes,
    headers=scanned.headers,
    fetch=fetch,
    place=place,
    classes=functools.partial(files.given, scanned.labels),
    listing=listing,
    remark=files.remark(data.dataset, len(scanned.names), scanned.left_out),
  )


def _place(path: str, names: Names, row: int) -> str:
  return f"{path}/{names[row]}"


def _scan(data: DataConfig, path: str) -> Scanned:
  """Reads the directory of the zip, and the header of each image. Raises UserError."""
  try:
    with zipfile.ZipFile(path) as archive:
      for entry in archive.infolist():
        entry.filename = entry.filename.replace("\\", "/")  # of Windows
      entries = [entry for entry in archive.infolist() if not entry.is_dir()]
      _check(data, entries, os.path.getsize(path))
      found = sorted((entry for entry in entries if _kind(data, entry) == ""), key=lambda entry: entry.filename)
      if not found:
        raise _without_images(data, entries)
      labels_file = archive.read(labels.DATASET_JSON) if labels.DATASET_JSON in archive.NameToInfo else None
  except OSError as error:
    raise UserError(f"dataset: {path} cannot be read ({error.strerror}); make it readable") from None
  except _NO_ZIP as error:
    raise UserError(
      f"dataset: {data.dataset!r} is no whole zip ({' '.join(str(error).split())}); copy it again"
    ) from None
  names = Names.of(entry.filename for entry in found)
  sizes = np.array([entry.file_size for entry in found], np.int64)
  crc = np.array([entry.CRC for entry in found], np.uint32)
  # Of one that is stored, 0: the bytes are the file.
  stored = np.array([entry.compress_size if entry.compress_type else 0 for entry in found], np.int64)
  place = functools.partial(_place, path, names)
  reader = Reader([path])
  start = _starts(data, reader, np.array([entry.header_offset for entry in found], np.int64), place)
  fetch = functools.partial(_fetch, reader, start, stored, sizes, crc, place)
  left_out = files.counted(
    (kind, pathlib.PurePosixPath(entry.filename).suffix.lower() or "no suffix" if "format" in kind else "")
    for entry in entries
    if (kind := _kind(data, entry)) and entry.filename != labels.DATASET_JSON
  )
  return Scanned(
    names,
    sizes,
    files.read_headers(data, fetch, place, len(names), skip=True),
    files.labels_or_error(lambda: labels.of_files(data.dataset, names, labels_file)),
    left_out,
    {"start": start, "stored": stored, "crc": crc},
    {},
  )


def _kind(data: DataConfig, entry: zipfile.ZipInfo) -> str:
  return "link" if stat.S_ISLNK(entry.external_attr >> 16) else files.kind_of(entry.filename, files.suffixes_of(data))


def _check(data: DataConfig, entries: Sequence[zipfile.ZipInfo], length: int) -> None:
  """Raises UserError for entries that no zip of images, of that length in bytes, has."""
  seen = set()
  for entry in entries:
    name = entry.filename
    parts = name.split("/")
    if ".." in parts or not parts[0] or parts[0].endswith(":"):
      raise UserError(f"dataset: {data.dataset!r} has an entry that leads outside, {name!r}; pack it again without")
    if name in seen:
      raise UserError(f"dataset: {data.dataset!r} has two entries {name!r}; pack it again with one")
    seen.add(name)
    if entry.flag_bits & _ENCRYPTED:
      raise UserError(f"dataset: {data.dataset!r} is encrypted ({name!r}); pack it again without a password")
    if _kind(data, entry) and name != labels.DATASET_JSON:
      continue
    if entry.compress_type not in _METHODS:
      method = _OTHER_METHODS.get(entry.compress_type, f"method {entry.compress_type}")
      raise UserError(
        f"dataset: {data.dataset!r} has {name!r} compressed by {method}; pack it again, stored or with deflate"
      )
    size = entry.file_size if entry.compress_type == zipfile.ZIP_STORED else entry.compress_size
    if entry.header_offset + max(size, entry.compress_size) > length or entry.file_size >= 2**63:
      raise _not_there(data, name)


def _without_images(data: DataConfig, entries: Sequence[zipfile.ZipInfo]) -> UserError:
  if latents := next((entry.filename for entry in entries if entry.filename.endswith(".npy")), None):
    return UserError(
      f"dataset: {data.dataset!r} holds arrays such as {latents!r} (.npy, as of latents), which are no images; name "
      "the zip of the images that they were made of"
    )
  kinds = ((kind, "") for entry in entries if (kind := _kind(data, entry)))
  return files.nothing_found(data, files.counted(kinds))


def _starts(data: DataConfig, reader: Reader, headers: np.ndarray, place: Callable[[int], str]) -> np.ndarray:
  """Where the bytes of each entry begin, int64 [N]: behind its local header, whose length stands only there."""
  starts = np.empty_like(headers)
  for row, offset in enumerate(headers.tolist()):
    found = reader.read(0, offset, _LOCAL_HEADER.size, functools.partial(place, row))
    if isinstance(found, bytes):
      magic, name, extra = _LOCAL_HEADER.unpack(found)
    if isinstance(found, BadRecord) or magic != b"PK\3\4":
      raise _not_there(data, place(row))
    starts[row] = offset + _LOCAL_HEADER.size + name + extra
  return starts


def _not_there(data: DataConfig, name: str) -> UserError:
  return UserError(f"dataset: {data.dataset!r} is no whole zip ({name} is not there); copy it again")


def _fetch(
  reader: Reader,
  start: np.ndarray,
  stored: np.ndarray,
  sizes: np.ndarray,
  crc: np.ndarray,
  place: Callable[[int], str],
  rows: np.ndarray,
) -> list[File]:
  """The bytes of images, or a BadRecord. Arguments: of all entries [N]; stored: bytes if compressed, else 0."""
  of_rows = [rows.tolist(), *(array[rows].tolist() for array in (start, stored, sizes, crc))]
  return [_read(reader, place, *entry) for entry in zip(*of_rows, strict=True)]


def _read(
  reader: Reader, place: Callable[[int], str], row: int, start: int, stored: int, size: int, crc: int
) -> bytes | BadRecord:
  name, remedy = functools.partial(files.numbered, place, row), "pack or copy it again"
  found = reader.read(0, start, stored or size, name)
  if isinstance(found, BadRecord):
    return found
  if stored:
    try:
      found = zlib.decompressobj(-zlib.MAX_WBITS).decompress(found, size + 1)  # no more than it says, whatever it holds
    except zlib.error as error:
      return BadRecord(f"{name()} cannot be decompressed ({error})", remedy)
  if len(found) != size or zlib.crc32(found) != crc:
    return BadRecord(f"{name()} is damaged (its checksum differs)", remedy)
  return found
