"""Writing that neither a kill nor a full disk can leave half done."""

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
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    with temporary.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError:
    with contextlib.suppress(OSError):
      temporary.unlink()  # it takes space that is missing
    raise


def size_text(number: int) -> str:
  """A number of bytes for people."""
  return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def sync_file(path: pathlib.Path) -> None:
  """Waits until a loss of power cannot take what a file holds. Raises OSError."""
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
      unit: records are whole multiples of that many bytes; what a kill cut short is taken off.
      exclusive: no second process may write the file so, where the file system has locks.

    Raises:
      OSError: if it cannot be opened; BlockingIOError if another process has it.
    """
    self._file = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    try:
      if exclusive:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      size = os.fstat(self._file).st_size
      if size % unit:
        os.ftruncate(self._file, size - size % unit)
    except OSError as error:
      if not exclusive or error.errno not in (errno.ENOLCK, errno.ENOTSUP):
        os.close(self._file)
        raise
    self._length = self._safe_length = os.fstat(self._file).st_size  # of what is written, and of what survives
    self._pending: list[bytes] = []  # not written yet
    self._unsafe: list[bytes] = []  # written, but some storage says only at fsync that it could not keep it

  def add(self, record: bytes) -> None:
    """Takes a record, which stays in memory until it is written."""
    self._pending.append(record)

  def write(self) -> None:
    """Hands all records to the kernel: a kill cannot take them any more. Raises OSError at the first that fails."""
    while self._pending:
      self._write_one(self._pending[0])
      self._unsafe.append(self._pending.pop(0))

  def write_or_drop(self, record: bytes) -> None:
    """Writes a record at once, ahead of those that wait, and forgets it if that fails. Raises OSError."""
    self._write_one(record)

  def replace_last(self, old: bytes, new: bytes) -> None:
    """Writes `new` over the last record, which is `old`. Raises OSError, and leaves it as it was.

    A longer record that begins as the old one is there as a whole or not at all where the process is killed.
    """
    self.write()
    start = self._length - len(old)
    if os.pread(self._file, len(old) + 1, start) != old:
      raise ValueError("the file does not end with that record")
    try:
      done = 0
      while done < len(new):
        done += os.pwrite(self._file, new[done:], start + done)
      os.ftruncate(self._file, start + len(new))
    except OSError:
      with contextlib.suppress(OSError):
        os.pwrite(self._file, old, start)
      self._cut()
      raise
    self._length = start + len(new)
    self._unsafe = [*self._unsafe[:-1], new]  # the old one too, where it was safe, has been written over
    self._safe_length = min(self._safe_length, start)

  def sync(self) -> None:
    """Writes all records and waits until a loss of power cannot take them. Raises OSError."""
    self.write()
    try:
      os.fsync(self._file)
    except OSError:
      # The kernel has thrown away what it could not store: all since the last time is written again.
      self._pending, self._unsafe, self._length = self._unsafe, [], self._safe_length
      self._cut()
      raise
    self._unsafe, self._safe_length = [], self._length

  def close(self) -> None:
    """Tries to write what is left, and closes the file. Raises nothing: whoever must know calls `sync` before."""
    with contextlib.suppress(OSError):
      self.write()
    with contextlib.suppress(OSError):
      os.close(self._file)

  def _write_one(self, record: bytes) -> None:
    if os.fstat(self._file).st_size > self._length:
      os.ftruncate(self._file, self._length)  # `_cut` had failed
    done = 0
    try:
      while done < len(record):
        done += os.pwrite(self._file, record[done:], self._length + done)
    except OSError:
      self._cut()
      raise
    self._length += len(record)

  def _cut(self) -> None:
    """Takes a part of a record off the end at once, for whoever reads the file meanwhile."""
    with contextlib.suppress(OSError):
      os.ftruncate(self._file, self._length)
