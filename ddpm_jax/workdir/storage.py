"""Atomic replacement of files, and files that grow by whole records, also on a full disk or after a kill."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib


def write_whole(path: pathlib.Path, data: bytes) -> None:
  """Writes or replaces a file: it is there with all of `data`, also after a loss of power, or as it was before.

  Raises:
    OSError: if it cannot be written.
  """
  os.close(_replace(path, data))


def _replace(path: pathlib.Path, data: bytes) -> int:
  """As `write_whole`; returns the descriptor of the new file, open for writing."""
  temporary = path.with_name(f".{path.name}.tmp")
  file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
  try:
    _write_at(file, data, 0)
    os.fsync(file)
    os.replace(temporary, path)
  except OSError:
    os.close(file)
    with contextlib.suppress(OSError):
      temporary.unlink()  # it takes space that is missing
    raise
  return file


def _write_at(file: int, data: bytes, offset: int) -> None:
  done = 0
  while done < len(data):
    done += os.pwrite(file, data[done:], offset + done)


def remedy(error: OSError) -> str:
  """What a person can do where a file cannot be written."""
  return "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"


def size_text(number: int) -> str:
  """A number of bytes for people."""
  return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def sync_file(path: pathlib.Path) -> None:
  """Flushes a file to the disk. Raises OSError."""
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)


class Records:
  """A file that grows by whole records, in order and each once, however often writing fails in between."""

  def __init__(self, path: pathlib.Path, flags: int = 0, *, unit: int = 1, exclusive: bool = False):
    """Opens or creates a file.

    Args:
      path: of the file.
      flags: more of `os.open`.
      unit: size of a record in bytes, or a divisor of it; a part of one that a kill left at the end is cut off.
      exclusive: lock the file against other processes that ask for this, where the file system has locks.

    Raises:
      OSError: if it cannot be opened; BlockingIOError if another process has it.
    """
    self._path = path
    self._file = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    try:
      if exclusive:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
        os.close(self._file)
        raise
    size = os.fstat(self._file).st_size
    self._length = self._synced = size - size % unit  # bytes that are written, and bytes that a loss of power leaves
    if size > self._length:
      self._cut()
    self._pending: list[bytes] = []  # not written yet
    self._unsynced: list[bytes] = []  # written, but some storage says only at fsync that it could not keep it

  def add(self, record: bytes) -> None:
    """Takes a record, which stays in memory until it is written."""
    self._pending.append(record)

  def write(self) -> None:
    """Hands all records to the kernel: a kill cannot take them any more. Raises OSError at the first that fails."""
    while self._pending:
      self.write_or_drop(self._pending[0])
      self._unsynced.append(self._pending.pop(0))

  def write_or_drop(self, record: bytes) -> None:
    """Writes a record at once, ahead of those that wait, and forgets it if that fails. Raises OSError."""
    if os.fstat(self._file).st_size > self._length:
      os.ftruncate(self._file, self._length)  # `_cut` had failed
    try:
      _write_at(self._file, record, self._length)
    except OSError:
      self._cut()
      raise
    self._length += len(record)

  def sync(self) -> None:
    """Writes all records and waits until a loss of power cannot take them. Raises OSError."""
    self.write()
    try:
      os.fsync(self._file)
    except OSError:
      # The kernel has thrown away what it could not store: all since the last time is written again.
      self._pending, self._unsynced, self._length = self._unsynced, [], self._synced
      self._cut()
      raise
    self._unsynced, self._synced = [], self._length

  def rewrite(self, data: bytes) -> None:
    """Replaces all that the file holds by `data`, as `write_whole` does. Raises OSError, and leaves it as it was."""
    file = _replace(self._path, data)
    os.close(self._file)
    self._file, self._length, self._synced, self._unsynced = file, len(data), len(data), []

  def close(self) -> None:
    """Tries to write what is left, and closes the file. Raises nothing: whoever must know calls `sync` before."""
    with contextlib.suppress(OSError):
      self.write()
    with contextlib.suppress(OSError):
      os.close(self._file)

  def _cut(self) -> None:
    """Takes a part of a record off the end at once, for whoever reads the file meanwhile."""
    with contextlib.suppress(OSError):
      os.ftruncate(self._file, self._length)
