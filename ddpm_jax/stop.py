"""Stopping on request: the first SIGTERM or SIGINT asks the run to save and end, a second one ends the process at once.

Python handles signals between two bytecodes of the main thread, which may be inside a compilation or a collective for
minutes. So a thread of its own listens: the kernel's note of a signal reaches it through a pipe at any time.
"""

from __future__ import annotations

import os
import signal
import threading

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_UNWIND_S = 3.0  # what the main thread gets to clean up, where there is nothing to save


class Stopped(BaseException):
  """Raised in the main thread by the first signal while there is nothing to save; no library catches it by mistake."""

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.number = number


class StopRequest:
  """Listens for signals while it is open (a context manager, in the main thread).

  At first there is nothing to save: a signal raises `Stopped` in the main thread, and ends the process a few seconds
  later with `exit_code` if the main thread is somewhere it does not come back from. After `defer()` a signal only sets
  `requested`, and whoever has called it must look there.
  """

  def __init__(self, exit_code: int | None = None):
    """exit_code: where there is nothing to save; 128 + the signal's number if None."""
    self.requested: int | None = None
    self._exit_code = exit_code
    self._deferred = False
    self._timer: threading.Timer | None = None
    self._previous = {}

  def __enter__(self) -> StopRequest:
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
    self._thread.start()
    self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    self._previous = {number: signal.signal(number, self._in_main_thread) for number in _SIGNALS}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._previous_fd)
    os.write(self._writer, b"\0")
    self._thread.join()
    if self._timer:
      self._timer.cancel()
    os.close(self._reader)
    os.close(self._writer)

  def again(self) -> None:
    """Takes the signals back from a library that has installed a handler of its own."""
    for number in _SIGNALS:
      signal.signal(number, self._in_main_thread)

  def defer(self) -> None:
    """From now on there is something to save: a signal only sets `requested`."""
    self._deferred = True

  def exit_code(self, number: int) -> int:
    """The exit code where there was nothing to save."""
    return 128 + number if self._exit_code is None else self._exit_code

  def _in_main_thread(self, number: int, _frame) -> None:
    self.requested = self.requested or number
    if not self._deferred:
      raise Stopped(number)

  def _listen(self) -> None:
    first = None
    while (number := os.read(self._reader, 1)[0]) != 0:
      if number not in _SIGNALS:
        continue
      if first is not None:
        os._exit(128 + number)
      first = self.requested = number
      name = signal.Signals(number).name
      if self._deferred:
        _tell(f"\n{name}: saving, then stopping; a second signal ends at once, without a checkpoint\n")
      else:
        _tell(f"\n{name}: stopping; there is nothing to save\n")
        self._timer = threading.Timer(_UNWIND_S, os._exit, [self.exit_code(number)])
        self._timer.daemon = True
        self._timer.start()


def _tell(text: str) -> None:
  try:
    os.write(2, text.encode())
  except OSError:
    return  # nobody listens any more
