"""Ends a process that is alive but stuck, and says where: the heartbeats of a job go on while a process hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable

from ddpm_jax.runtime import console, watcher

_FIRST_S = 3600.0  # the least that the time before the first beat may take: the compilation
_TICK_S = 1.5  # at most
_REPORT_S = 3.0  # to report, as standard error and the folder may be stuck too
_EXIT_S = 20.0  # for `leave`, which has limits of its own; after that the watcher kills the process
_REMEDY = "raise --step_timeout if this is normal"
_SIGNAL = signal.SIGURG  # asks for the stacks; ignored by default


class Watchdog:
  """Ends the process when `beat` was not called for too long (a context manager).

  It prints one line and the stacks of all threads, writes them to a file, and leaves with exit code 1, whatever the
  main thread does. Where that holds Python's lock for ever, in compiled code, a small process (`watcher.py`) prints and
  writes the same a few seconds later, and kills this one.

  Only time in which the process could run counts. After SIGSTOP and SIGCONT (Ctrl-Z and `fg`, `scontrol suspend`), a
  frozen container or a machine that slept, the run goes on.
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
    leave: called with the exit code at the end; may inform other processes, for some seconds.
    """
    self._timeout, self._first = timeout_s, max(timeout_s, first_s)
    self._process, self._leave = process, leave
    self._file = folder.absolute() / f"stuck.{process}.txt" if folder else None
    self._last = ("",)  # a new tuple with each beat
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def __enter__(self) -> Watchdog:
    if self._timeout:
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._over.set()
    if self._timeout:
      self._thread.join()

  def beat(self, what: str) -> None:
    """Reports progress: `what` is done, as in 'step 12'. Costs less than a microsecond."""
    self._last = (what,)

  def _watch(self) -> None:
    here = f"host {socket.gethostname()}, pid {os.getpid()}"
    tick = min(max(self._timeout / 20, 0.05), _TICK_S)
    seen, silent, before = self._last, 0.0, time.monotonic()
    with contextlib.ExitStack() as cleanup:
      helper = None
      while not self._over.wait(tick):
        now = time.monotonic()
        silent += min(now - before, 2 * tick)  # what took longer was stopped, or got no turn
        before = now
        if self._last is not seen:
          seen, silent = self._last, 0.0
        limit = self._timeout if seen[0] else self._first
        where = f"after {seen[0] or 'the start'} on process {self._process} ({here}): stuck"
        if silent > limit:
          if helper:
            helper.send(_EXIT_S, silent, f"{where}, and the process cannot exit; {_REMEDY}")
          self._end(f"no progress for {silent:.0f} s {where}; the process exits; {_REMEDY}")
        if helper is None:
          helper = cleanup.enter_context(_Watcher(self._file))
        helper.send(limit - silent, silent, f"{where} in compiled code; the process is killed; {_REMEDY}")

  def _end(self, line: str) -> None:
    deadline = exit_within(_REPORT_S, 1)
    stacks = _stacks()
    to_file = threading.Thread(target=self._write, args=[f"error: {line}\n{stacks}"], daemon=True)
    to_file.start()
    console.error(line, more=stacks)
    to_file.join(timeout=_REPORT_S / 2)
    console.drain()
    deadline.cancel()  # what follows has limits of its own
    self._leave(1)
    os._exit(1)

  def _write(self, text: str) -> None:
    if self._file:
      with contextlib.suppress(OSError):  # standard error has it
        self._file.write_bytes(text.encode(errors="backslashreplace"))


class _Watcher:
  """The helper process (a context manager). Where it cannot be started, there is none."""

  def __init__(self, file: pathlib.Path | None):
    command = [sys.executable, "-I", "-S", watcher.__file__, str(os.getpid()), str(int(_SIGNAL)), str(file or "")]
    self._process = None
    with contextlib.suppress(OSError):
      self._process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0, cwd="/", start_new_session=True
      )

  def __enter__(self) -> _Watcher:
    if self._process and self._process.stdin:
      self._pipe = self._process.stdin.fileno()
      os.set_blocking(self._pipe, False)
      faulthandler.register(_SIGNAL, file=self._pipe, all_threads=True)  # in C: needs no lock of Python's
    return self

  def __exit__(self, *_) -> None:
    if self._process and self._process.stdin:
      faulthandler.unregister(_SIGNAL)
      self._process.kill()
      self._process.wait()
      self._process.stdin.close()

  def send(self, left: float, silent: float, rest: str) -> None:
    """Sends the state, at every tick."""
    if self._process:
      with contextlib.suppress(OSError):  # somebody has stopped it, or ended it
        os.write(self._pipe, (json.dumps([left, silent, rest]) + "\n").encode())


def _stacks() -> str:
  """The stacks of all threads, innermost call first. faulthandler would print them, and wait for standard error."""
  names = {thread.ident: thread.name for thread in threading.enumerate()}
  parts = []
  for number, frame in sys._current_frames().items():
    calls = [
      f'  File "{call.f_code.co_filename}", line {line} in {call.f_code.co_name}\n'
      for call, line in traceback.walk_stack(frame)
    ]
    parts.append(f"Thread {number} ({names.get(number, 'of a library')}), innermost call first:\n{''.join(calls)}")
  return "\n".join(parts)


def exit_within(seconds: float, code: int) -> threading.Timer:
  """Ends the process after some seconds, unless the timer is cancelled."""
  timer = threading.Timer(seconds, os._exit, [code])
  timer.daemon = True
  timer.start()
  return timer
