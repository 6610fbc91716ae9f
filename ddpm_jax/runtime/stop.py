"""Stopping on request: the first signal asks the run to save and end; a second SIGTERM or SIGINT ends it at once.

The signals are SIGTERM, SIGINT and SIGHUP (a terminal was closed, a connection was lost). SIGHUP is never the one that
ends a run at once: a terminal that closes may send it twice, and systemd, with SendSIGHUP, after a SIGTERM. Under
`nohup`, or wherever else SIGHUP is ignored when the process starts, it stays ignored.

Python handles signals between two bytecodes of the main thread, which may be inside a compilation or a collective for
minutes. So a thread listens: the wakeup descriptor of `signal` wakes it at any signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from ddpm_jax.runtime import console

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
  """Listens for signals while it is open (a context manager, in the main thread).

  At first there is nothing to save, and a signal ends the process at once; files are written under another name first,
  so none is left half written. After `defer()` the first signal only sets `requested`, which the caller must check.
  """

  def __init__(self, exit_code: int | None = None):
    """exit_code: where a signal ends the process at once and nothing is lost; 128 + the signal's number if None."""
    self.requested: int | None = None
    self.exit_code = exit_code
    self._deferred, self._exit_text = False, "stopped; there was nothing to save"
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    self._numbers = tuple(number for number in _SIGNALS if not (ignored and number == signal.SIGHUP))

  def __enter__(self) -> StopRequest:
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
    self._thread.start()
    self._previous = {number: signal.signal(number, _heard) for number in self._numbers}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._previous_fd)
    os.write(self._writer, b"\0")
    self._thread.join()
    os.close(self._reader)
    os.close(self._writer)

  def reinstall(self) -> None:
    """Installs the handlers again, after a library has installed its own."""
    for number in self._numbers:
      signal.signal(number, _heard)

  def defer(self) -> None:
    """From now on the first signal only sets `requested`: there is something to save."""
    self._deferred = True

  @contextlib.contextmanager
  def at_rest(self) -> Iterator[None]:
    """Everything is saved while this lasts: a signal ends the process at once."""
    before = self._deferred, self._exit_text
    self._deferred, self._exit_text = False, "stopped; everything was saved before"
    try:
      yield
    finally:
      self._deferred, self._exit_text = before

  def _listen(self) -> None:
    by_hand = 0  # signals of a person or a scheduler
    while (number := os.read(self._reader, 1)[0]) != 0:
      if number not in self._numbers:
        continue
      by_hand += number != signal.SIGHUP
      if self.requested is not None:
        if number == signal.SIGHUP or by_hand < 2:
          continue
        console.note(f"{signal.Signals(number).name}: ended at once; what came after the newest checkpoint is lost")
        console.drain()
        os._exit(128 + number)
      name = signal.Signals(number).name
      if not self._deferred:
        console.note(f"{name}: {self._exit_text}")
        console.drain()
        os._exit(128 + number if self.exit_code is None else self.exit_code)
      self.requested = number
      console.note(
        f"{name}: saving after the training steps under way, then stopping; a second SIGTERM or Ctrl-C ends at once, "
        "without it"
      )


def _heard(_number: int, _frame) -> None:
  """Does nothing: the thread acts. But only a signal with a Python handler is written to the wakeup descriptor."""
