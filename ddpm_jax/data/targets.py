"""Zips and tar shards of images, written so that a process which is killed can be started again.

Their bytes are a function of the images alone: times are fixed, and nothing is compressed. A file has its final name
once it is whole. Each carries the digest of what it was made from where `git archive` puts that of the commit: in the
comment of a zip, in the global header of a tar.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import io
import json
import os
import pathlib
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from ddpm_jax.data import labels as labels_lib
from ddpm_jax.data.encoded import Labels
from ddpm_jax.data.shards import CLASS_NAMES
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import console
from ddpm_jax.workdir.storage import write_whole

_TIME = (1980, 1, 1, 0, 0, 0)  # the first that a zip can hold
_MODE = 0o644
_LOCAL_HEADER = struct.Struct("<4s2xHHHHLLLHH")  # magic, flags, method, time, date, CRC, two sizes, two lengths
_UTF8 = 0x800  # of the flags of an entry
_OPEN_RANGE = re.compile(r"\{(\d+)\.\.\}")


class Job(NamedTuple):
  """What a target is made of.

  Attributes:
    number: of images.
    comment: names what they are; a target with another one is another job's.
    name: (index, content) -> the name of an image.
    is_name: (index, name) -> whether it is that of the image.
    labels: of the images; None if they have none.
    contents: (first, stop) -> yields index and content of each image from `first` to before `stop`, without those that
      are left out.
    progress: called with the number of images that are done.
  """

  number: int
  comment: str
  name: Callable[[int, bytes], str]
  is_name: Callable[[int, str], bool]
  labels: Labels | None
  contents: Callable[[int, int], Iterator[tuple[int, bytes]]]
  progress: Callable[[int], object]


class Written(NamedTuple):
  """A finished target.

  Attributes:
    dataset: the value of --dataset that reads it.
    what: is there now; empty if it was finished before.
  """

  dataset: str
  what: str = ""


# A zip.


def write_zip(path: str, job: Job) -> Written:
  """Writes a zip of stored entries with `dataset.json`, in the layout of EDM, or goes on with one.

  Raises:
    UserError: another file is there, another process writes it, or no image is left.
    OSError: it cannot be written.
  """
  dataset = f"zip:{path}"
  if os.path.lexists(path):
    if _zip_comment(path) == job.comment:
      return Written(dataset)
    raise _other(path)
  os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
  part = f"{path}.{job.comment[-8:]}.part"
  for other in sorted(set(glob.glob(f"{glob.escape(path)}.*.part")) - {part}):
    console.note(f"{other} is part of another zip, and stays; delete it unless you want to go on with that")
  with _locked(part) as file:
    done, end = _whole_entries(file, job)
    file.seek(end)
    file.truncate()
    images = [index for index, _ in done]
    job.progress(images[-1] + 1 if images else 0)
    with zipfile.ZipFile(file, "w") as archive:  # which begins where the file stands
      archive.comment = job.comment.encode()
      for _, info in done:
        archive.filelist.append(info)
        archive.NameToInfo[info.filename] = info
      for index, content in job.contents(images[-1] + 1 if images else 0, job.number):
        archive.writestr(_info(job.name(index, content)), content)
        images.append(index)
        job.progress(index + 1)
      if not images:
        raise _nothing_left(job)
      archive.writestr(_info(labels_lib.DATASET_JSON), _dataset_json(archive.namelist(), images, job.labels))
    file.flush()
    os.fsync(file.fileno())
    os.replace(part, path)
  return Written(dataset, f"{len(images):,} images")


def _info(name: str) -> zipfile.ZipInfo:
  info = zipfile.ZipInfo(name, _TIME)
  info.create_system, info.external_attr = 3, (0o100000 | _MODE) << 16  # a plain file of Unix, on every machine
  return info


def _whole_entries(file: IO[bytes], job: Job) -> tuple[list[tuple[int, zipfile.ZipInfo]], int]:
  """The images that a zip without a directory holds, by index, up to the first that is not whole; and where they end.

  After a loss of power a file may hold anything: all bytes are read, and their checksums compared.
  """
  done, index, position = [], 0, 0
  while True:
    file.seek(position)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size:
      break
    magic, flags, _, _, _, crc, stored, size, name_size, extra = _LOCAL_HEADER.unpack(header)
    if magic != b"PK\3\4" or extra or stored != size:
      break
    try:
      name = file.read(name_size).decode("utf-8" if flags & _UTF8 else "ascii")
    except UnicodeDecodeError:
      break
    content = file.read(size)
    index = next((i for i in range(index, job.number) if job.is_name(i, name)), job.number)
    if index == job.number or len(content) < size or zlib.crc32(content) != crc:
      break
    info = _info(name)
    info.flag_bits, info.header_offset, info.CRC, info.compress_size, info.file_size = flags, position, crc, size, size
    done.append((index, info))
    index, position = index + 1, file.tell()
  return done, position


def _dataset_json(names: list[str], images: list[int], labels: Labels | None) -> bytes:
  tree: dict[str, object] = {"labels": None}
  if labels is not None:
    classes = labels.classes[images].tolist()
    tree = {"labels": [list(pair) for pair in zip(names, classes, strict=True)], "label_names": list(labels.names)}
  return json.dumps(tree).encode()


def _zip_comment(path: str) -> str:
  try:
    with zipfile.ZipFile(path) as archive:
      return archive.comment.decode(errors="replace")
  except (zipfile.BadZipFile, OSError):
    return ""


# Tar shards.


class Shards(NamedTuple):
  """Names of shards: what stands before and after the number, and its digits."""

  before: str
  digits: int
  after: str

  def path(self, number: int) -> str:
    """Of one of them."""
    return f"{self.before}{number:0{self.digits}d}{self.after}"

  def there(self) -> list[str]:
    """Those that exist."""
    found = glob.glob(f"{glob.escape(self.before)}{'[0-9]' * self.digits}*{glob.escape(self.after)}")
    return sorted(path for path in found if path[len(self.before) : -len(self.after)].isdecimal())


def shards_of(path: str) -> Shards:
  """The shards that the path of a target names: 'x', 'x.tar', 'x-{000000..}.tar' or a folder. Raises UserError."""
  if found := _OPEN_RANGE.search(path):
    before, digits, after = path[: found.start()], found[1], path[found.end() :]
  elif os.path.isdir(path) or path.endswith(os.sep):
    before, digits, after = os.path.join(path, ""), "000000", ".tar"
  else:
    before, digits, after = f"{path.removesuffix('.tar')}-", "000000", ".tar"
  if not after.endswith(".tar") or int(digits) or set("{}*?[") & set(before + after):
    raise UserError(
      f"TARGET: webdataset:{path} names no shards; use webdataset:DIR/NAME or 'webdataset:DIR/NAME-{{000000..}}.tar': "
      "how many there are is for --shard_size to say"
    )
  return Shards(before, len(digits), after)


def write_shards(path: str, job: Job, shard_size: int) -> Written:
  """Writes tar shards of WebDataset, or those that are missing: an image and, if it has one, its class in a `.cls`.

  Shard k holds the images k * shard_size ... but those left out. Names of classes go into `classes.json` beside them.

  Raises:
    UserError: other shards, or names of other classes, are there, another process writes them, or no image is left.
    OSError: they cannot be written.
  """
  shards, count = shards_of(path), -(-job.number // shard_size)
  paths = [shards.path(number) for number in range(count)]
  there = shards.there()
  for shard in there:
    if shard not in paths or _tar_comment(shard) != job.comment:
      raise _other(shard)
  numbers = f"{{{0:0{shards.digits}d}..{count - 1:0{shards.digits}d}}}" if count > 1 else "0" * shards.digits
  dataset = f"webdataset:{shards.before}{numbers}{shards.after}"
  if there == paths:
    return Written(dataset)
  folder = pathlib.Path(os.path.dirname(paths[0]) or ".")
  folder.mkdir(parents=True, exist_ok=True)
  if job.labels is not None:
    _write_class_names(folder / CLASS_NAMES, job.labels.names)
  for number, shard in enumerate(paths):
    first, stop = number * shard_size, min((number + 1) * shard_size, job.number)
    if shard not in there:
      _write_shard(shard, job, first, stop)
    job.progress(stop)
  return Written(dataset, f"{count} shard{'s' * (count > 1)} of {job.number:,} images")


def _write_shard(path: str, job: Job, first: int, stop: int) -> None:
  with _locked(f"{path}.part") as file:
    file.truncate(0)
    empty = True
    archive: Any = tarfile.open(  # noqa: SIM115
      fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": job.comment}
    )
    with archive:
      for index, content in job.contents(first, stop):
        name, empty = job.name(index, content), False
        _add(archive, name, content)
        if job.labels is not None:
          _add(archive, f"{os.path.splitext(name)[0]}.cls", str(job.labels.classes[index]).encode())
        archive.members = []  # else it keeps all of them
        job.progress(index + 1)
    if empty:
      raise _nothing_left(job)
    file.flush()
    os.fsync(file.fileno())
    os.replace(f"{path}.part", path)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
  info = tarfile.TarInfo(name)  # of nobody, in 1970
  info.size, info.mode = len(content), _MODE
  archive.addfile(info, io.BytesIO(content))


def _write_class_names(path: pathlib.Path, names: tuple[str, ...]) -> None:
  text = (json.dumps(list(names), ensure_ascii=False) + "\n").encode()
  if path.exists() and path.read_bytes() != text:
    raise UserError(f"TARGET: {path} names the classes of other shards; write these into another folder")
  write_whole(path, text)


def _tar_comment(path: str) -> str:
  try:
    with tarfile.open(path, "r:") as archive:
      return archive.pax_headers.get("comment", "")
  except (tarfile.TarError, OSError):
    return ""


@contextlib.contextmanager
def _locked(part: str) -> Iterator[IO[bytes]]:
  """Opens or creates a file that becomes the target, for this process alone. Raises UserError, OSError."""
  with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f"TARGET: another process writes {part}; wait for it, or name another target") from None
    yield file


def _other(path: str) -> UserError:
  return UserError(
    f"TARGET: {path} is there already, made of something else or with other settings; delete it, or name another target"
  )


def _nothing_left(job: Job) -> UserError:
  return UserError(f"dataset: none of {job.number} images is left; use another data set")
