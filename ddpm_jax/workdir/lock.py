"""One trainer at a time in a workdir: a lock that the kernel drops when its holder ends, however it ends."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
import weakref

from ddpm_jax.errors import RunError, UserError
from ddpm_jax.runtime import console

NAME = "lock"
_PATIENCE = 1.0  # seconds for a holder that is about to end, or to write its name
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class Lock:
  """The right to write into a workdir.

  The file `lock` names its holder. It is not removed, as that could hit the lock of another process.
  """

  def __init__(self, workdir: pathlib.Path):
    """Creates the folder if there is none, and takes its lock.

    Raises:
      UserError: if another process has it, or if the lock cannot be written.
    """
    self._workdir, self._path = workdir, workdir / NAME
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      self._file = _acquire(workdir, self._path)
      try:
        self._identity = _identity(os.fstat(self._file))
        _write_holder(self._file)
      except OSError:
        os.close(self._file)
        raise
    except OSError as error:
      raise UserError(f"workdir: cannot write {self._path} ({error.strerror}); use another --workdir") from error
    # A program that is started does not inherit the file (PEP 446), but a copy of this process would.
    reference = weakref.ref(self)
    os.register_at_fork(after_in_child=lambda: (lock := reference()) and lock.close())

  def check(self) -> None:
    """Checks that the workdir is still the one that was locked; to be called before anything is written into it.

    Raises:
      RunError: if it was deleted, moved away, or made anew.
    """
    try:
      found = _identity(os.lstat(self._path))
    except OSError as error:
      if error.errno not in _GONE:
        return  # storage that does not answer: what is written next says so
      found = None
    if found != self._identity:
      raise RunError(
        f"workdir: {self._workdir} has vanished, or was replaced, while this run was training; nothing more is written"
      )

  def close(self) -> None:
    """Releases the lock."""
    if self._file >= 0:
      os.close(self._file)
      self._file = -1


def holder(workdir: pathlib.Path) -> str | None:
  """Describes the process that trains in a workdir; None if there is none, or if that cannot be seen."""
  try:
    file = os.open(workdir / NAME, os.O_RDONLY | os.O_NOFOLLOW)
  except OSError:
    return None
  try:
    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for an instant: a trainer that starts just then tries again
  except BlockingIOError:
    return _holder(file)
  except OSError:
    pass  # a file system without locks
  finally:
    os.close(file)
  return None


def _acquire(workdir: pathlib.Path, path: pathlib.Path) -> int:
  """The open and locked file, which is the one at `path`."""
  patience = time.monotonic() + _PATIENCE
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
      if _locked(file, path) and _identity(os.fstat(file)) == _identity(os.lstat(path)):
        return file
      holder = _holder(file)
    except OSError:
      os.close(file)
      raise
    os.close(file)
    if time.monotonic() > patience:
      raise UserError(
        f"workdir: {workdir} is being trained by {holder}; wait for it or stop it, or use another --workdir"
      )
    time.sleep(0.1)


def _locked(file: int, path: pathlib.Path) -> bool:
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
    console.warn(f"{path}: this file system has no locks ({error.strerror}); take care that no second run trains there")
  return True


def _write_holder(file: int) -> None:
  started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
  text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}) + "\n"
  os.ftruncate(file, 0)  # first, so that the name of an earlier holder does not stay on a full disk
  os.pwrite(file, text.encode(), 0)


def _holder(file: int) -> str:
  """Describes the process that holds the lock."""
  try:
    facts = json.loads(os.pread(file, 4096, 0))
    return f"process {facts['pid']} on host {facts['host']} since {facts['started']}"
  except (ValueError, KeyError, TypeError):
    return "another process"


def _identity(status: os.stat_result) -> tuple[int, int]:
  return status.st_dev, status.st_ino
