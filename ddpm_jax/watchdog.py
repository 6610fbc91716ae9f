"""Ends a process that is alive but stuck, and says where: the heartbeats of a job go on while a process hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable

_FIRST_S = 3600.0  # the least that the time before the first beat may take: the compilation
_MARGIN_S = 3.0  # the backstop waits that much longer
_LAST_WORDS_S = 3.0  # for standard error and the folder, which may be stuck too


class Watchdog:
  """Ends the process with exit code 1 when `beat` was not called for too long (a context manager).

  It prints one line and the stacks of all threads, whatever the main thread does. Where that holds Python's lock for
  ever, in C, a timer of faulthandler's, which needs no lock, ends the process a few seconds later, without the line.
  """

  def __init__(
    self,
    timeout_s: float,
    *,
    process: int = 0,
    folder: pathlib.Path | None = None,
    first_s: float = _FIRST_S,
    leave: Callable[[int], object] = os._exit,
  ):
    """Args:
    timeout_s: seconds from one beat to the next; 0 turns the watchdog off.
    process: the number of this process, for the line.
    folder: where the line and the stacks are written too, as stuck.PROCESS.txt.
    first_s: seconds until the first beat, if that is more than timeout_s.
    leave: what is called with the exit code at the end; it may tell other processes, for some seconds.
    """
    self._timeout, self._first = timeout_s, max(timeout_s, first_s)
    self._process, self._folder, self._leave = process, folder, leave
    self._last = (0.0, "")
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def __enter__(self) -> Watchdog:
    self._last = (time.monotonic(), "")
    if self._timeout:
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._over.set()
    if self._timeout:
      self._thread.join()
      faulthandler.cancel_dump_traceback_later()

  def beat(self, what: str) -> None:
    """Something is done: `what`, as in 'update 12'. Costs less than a microsecond."""
    self._last = (time.monotonic(), what)

  def _watch(self) -> None:
    tick = min(max(self._timeout / 20, 0.05), _MARGIN_S / 2)
    while True:
      last, what = self._last
      limit = self._timeout if what else self._first
      left = last + limit - time.monotonic()
      if left < 0:
        self._end(limit - left, what or "the start")
      # Re-armed at every tick, so it fires if this thread gets no turn.
      faulthandler.dump_traceback_later(left + _MARGIN_S, exit=True, file=2)
      if self._over.wait(tick):
        return

  def _end(self, silent: float, what: str) -> None:
    line = (
      f"error: nothing done for {silent:.0f} s after {what} on process {self._process} (host {socket.gethostname()}, "
      f"pid {os.getpid()}): it is stuck and ends here; raise --step_timeout if this is normal\n"
    )
    last_words = exit_within(_LAST_WORDS_S, 1)
    to_folder = threading.Thread(target=self._write, args=[line], daemon=True)
    to_folder.start()
    _dump(2, line)
    to_folder.join(timeout=_LAST_WORDS_S / 2)
    last_words.cancel()  # what follows has limits of its own
    faulthandler.cancel_dump_traceback_later()
    self._leave(1)
    os._exit(1)

  def _write(self, line: str) -> None:
    if self._folder:
      try:
        file = os.open(self._folder / f"stuck.{self._process}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
      except OSError:
        return  # standard error has it
      _dump(file, line)


def _dump(file: int, line: str) -> None:
  try:
    os.write(file, line.encode(errors="backslashreplace"))
    faulthandler.dump_traceback(file=file, all_threads=True)
  except OSError:
    return  # closed, or nobody listens any more


def tell(text: str) -> None:
  """Prints a line to standard error, from any thread."""
  with contextlib.suppress(OSError):  # nobody listens any more
    os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def exit_within(seconds: float, code: int) -> threading.Timer:
  """Ends the process after some seconds, unless the timer is cancelled."""
  timer = threading.Timer(seconds, os._exit, [code])
  timer.daemon = True
  timer.start()
  return timer
