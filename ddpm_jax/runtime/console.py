"""The only module that prints. Output never raises and never blocks: it may neither end a run nor hold it up.

`say`, `warn`, `note` and `error` print a line, `show_png` a picture where the terminal can show it.

`protect_streams` replaces standard output and standard error of a command, so that this holds for libraries too: where
nobody reads a pipe, the disk with the log on it is full or a terminal is gone, lines wait in memory, within limits, and
are written later or left out. `add_times` begins each line of a log with
the time.
"""

from __future__ import annotations

import atexit
import base64
import collections
import contextlib
import datetime
import io
import os
import pathlib
import re
import select
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from absl import logging as absl_logging

if TYPE_CHECKING:
  import tqdm

_PATIENCE_S = 0.1  # that a caller waits for its line to be written; 0 until the stream has caught up
_LAST_PATIENCE_S = 1.0  # at the end of the process
_RETRY_S = 1.0  # between two attempts, where writing fails
_MOST_BYTES = 2**20  # that wait to be written
_MOST_PICTURE = 2**19  # bytes of a PNG that is shown; a third more when it is written as text
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_KITTY_CHUNK = 4096  # the most that one escape sequence of its protocol may carry

_above_bars: Callable[[TextIO], contextlib.AbstractContextManager] = contextlib.nullcontext  # until there is a bar
_times = False  # whether lines begin with the time, off a terminal


def say(text: str) -> None:
  """Prints a line to standard output."""
  _print(sys.stdout, f"{text}\n")


def warn(text: str) -> None:
  """Prints a warning to standard error: something is not as it should be, and the run goes on."""
  note(f"warning: {text}")


def note(text: str, end: str = "\n") -> None:
  """Prints a line, or the beginning of one, to standard error, see `one_line`. From any thread."""
  _print(sys.stderr, f"{one_line(text)}{end}")


def error(text: str, more: str = "") -> None:
  """Prints why the process ends to standard error: `error: TEXT`. From any thread.

  Other programs read it: it is one line, see `one_line`, without a time. `more`: further lines, such as stacks.
  """
  _print(sys.stderr, f"error: {one_line(text)}\n{more}", times=False)


def one_line(text: str) -> str:
  """The text with escapes for what would end the line or command a terminal: names of files may hold anything."""
  return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def add_times() -> None:
  """From now on, lines begin with the time where they go to a file or a pipe, and not to a terminal.

  It is the local time in ISO 8601 with its distance from UTC, as in 2026-11-28T14:10:47+01:00.
  """
  global _times
  _times = True


def show_png(path: pathlib.Path) -> None:
  """Shows a picture on standard output, if that is a terminal that can, as far as its environment says; else nothing.

  By the protocol of kitty (also of Ghostty), or that of iTerm2 (also of WezTerm). Not inside tmux or screen.

  Raises:
    OSError: if the picture cannot be read.
  """
  draw = _picture_protocol() if sys.stdout is not None and sys.stdout.isatty() else None
  data = path.read_bytes() if draw else b""
  if draw and len(data) <= _MOST_PICTURE:
    _print(sys.stdout, draw(base64.b64encode(data).decode("ascii"), len(data)))


def _picture_protocol() -> Callable[[str, int], str] | None:
  """(PNG in base64, its size in bytes) -> the escape sequence that shows it on this terminal; None if none is known."""
  about = os.environ
  term, program = about.get("TERM", ""), about.get("TERM_PROGRAM", "")
  if "TMUX" in about or term.startswith(("screen", "tmux")):
    return None
  if "KITTY_WINDOW_ID" in about or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
    return _as_kitty
  if program in ("iTerm.app", "WezTerm") or about.get("LC_TERMINAL") == "iTerm2":
    return _as_iterm
  return None


def _as_kitty(data: str, _: int) -> str:
  chunks = [data[i : i + _KITTY_CHUNK] for i in range(0, len(data), _KITTY_CHUNK)]
  heads = ["a=T,f=100,q=2,"] + [""] * (len(chunks) - 1)  # show it, it is a PNG, do not answer
  more = [1] * (len(chunks) - 1) + [0]
  return "".join(f"\x1b_G{head}m={m};{chunk}\x1b\\" for head, m, chunk in zip(heads, more, chunks, strict=True)) + "\n"


def _as_iterm(data: str, size: int) -> str:
  return f"\x1b]1337;File=inline=1;size={size};preserveAspectRatio=1:{data}\a\n"


def columns() -> int:
  """Width of the terminal that standard error is.

  0 if it is none, or has no size, as under `docker exec -t`: no bar can be drawn there.
  """
  if sys.stderr is None or not sys.stderr.isatty():
    return 0
  try:
    return os.get_terminal_size(sys.stderr.fileno()).columns
  except (OSError, ValueError):
    return 80


def bar(**options: Any) -> tqdm.tqdm:
  """tqdm's progress bar, with its arguments, on standard error. Lines that are printed appear above it."""
  global _above_bars
  import tqdm  # where there is a bar to be drawn

  _above_bars = tqdm.tqdm.external_write_mode
  return tqdm.tqdm(**options)


def stdout_to_stderr() -> contextlib.AbstractContextManager:
  """Redirects standard output to standard error, for what libraries print."""
  return contextlib.redirect_stdout(sys.stderr)


def drain() -> None:
  """Waits until all is written, at most a second. Call it before `os._exit`."""
  for stream in (sys.stdout, sys.stderr):
    if stream is not None:
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    if isinstance(outlet := getattr(stream, "buffer", None), _Outlet):
      outlet.drain()


def protect_streams() -> None:
  """Replaces Python's streams by ones that never raise and never block. At the start of a command.

  Streams that were replaced before, as in a notebook, stay. A standard descriptor that is closed (`>&-`) is
  opened on the null device: else the next file that is opened, a checkpoint for one, would get what is printed.
  """
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      null = os.open(os.devnull, os.O_RDWR)
      if null != number:
        os.dup2(null, number)
        os.close(null)
      os.set_inheritable(number, True)
  for number, name in ((1, "stdout"), (2, "stderr")):
    stream = getattr(sys, name)
    if stream is None or stream is getattr(sys, f"__{name}__"):
      setattr(sys, name, _protected(number, stream.encoding if stream else "utf-8"))
  absl_logging.get_absl_handler().python_handler.setStream(sys.stderr)  # it holds the one that was there before


def _protected(number: int, encoding: str) -> TextIO:
  return io.TextIOWrapper(_Outlet(number), encoding, errors="backslashreplace", line_buffering=True)


def _print(stream: TextIO | None, text: str, *, times: bool = True) -> None:
  if stream is None:
    return
  encoding = getattr(stream, "encoding", None) or "utf-8"
  with contextlib.suppress(OSError, ValueError), _above_bars(stream):  # closed, or nobody listens any more
    if times and _times and not stream.isatty():
      now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
      text = "".join(f"{now} {line}" if line.strip() else line for line in text.splitlines(keepends=True))
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


class _Outlet(io.RawIOBase):
  """A descriptor whose `write` never blocks for long and never raises.

  A thread writes. The caller waits until its line is written, so that lines come at once and in order, but no longer
  than `_PATIENCE_S`, and not at all while earlier lines still wait. Where too much waits, the oldest lines are left
  out, and their number is reported as soon as something can be written.
  """

  def __init__(self, number: int):
    self._number, self.name = number, f"<output {number}>"
    self._file = os.dup(number)  # stays when the standard descriptor is closed and reused for another file
    self._changed = threading.Condition()
    self._waiting: collections.deque[bytes] = collections.deque()
    self._size = 0  # bytes in `_waiting`
    self._current = b""  # what the thread writes now
    self._left_out = 0  # lines
    self._behind = False  # callers do not wait for the thread
    self._over = False  # the thread may be gone: write without it, or not at all
    self._thread = threading.Thread(target=self._write_all, name=f"output {number}", daemon=True)
    self._thread.start()
    atexit.register(self._finish)
    os.register_at_fork(after_in_child=self._forget)

  def writable(self) -> bool:
    return True

  def fileno(self) -> int:
    return self._number

  def isatty(self) -> bool:
    return os.isatty(self._file)

  def write(self, data: Any) -> int:
    text = bytes(data)
    if self._over:
      self._write_if_possible(text)
      return len(text)
    with self._changed:
      self._waiting.append(text)
      self._size += len(text)
      while self._size > _MOST_BYTES:
        self._leave_out(self._waiting.popleft())
      self._changed.notify_all()
      self._behind |= not self._changed.wait_for(lambda: self._behind or self._all_written(), _PATIENCE_S)
    return len(text)

  def drain(self) -> None:
    """Waits until all is written, `_LAST_PATIENCE_S` at most; where writing fails, for one more try."""
    if not self._over:
      with self._changed:
        self._changed.notify_all()
        self._changed.wait_for(self._all_written, _LAST_PATIENCE_S)

  def _all_written(self) -> bool:
    return not self._current and not self._waiting

  def _leave_out(self, text: bytes) -> None:
    self._size -= len(text)
    self._left_out += text.count(b"\n")

  def _write_all(self) -> None:
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._current or self._waiting)
        if not self._current:
          self._current = self._waiting.popleft()
          self._size -= len(self._current)
        if self._left_out:
          note = f"warning: {self._left_out} lines could not be written here and are left out\n".encode()
          self._current, self._left_out = note + self._current, 0
      try:
        written = os.write(self._file, self._current)
      except BlockingIOError:  # somebody has made it non-blocking
        select.select([], [self._file], [], _RETRY_S)
        continue
      except OSError as error:
        with self._changed:
          self._behind = True
          self._changed.notify_all()
          if isinstance(error, BrokenPipeError):  # nobody will read this
            self._left_out += self._current.count(b"\n")
            self._current = b""
            while self._waiting:
              self._leave_out(self._waiting.popleft())
          else:  # a disk may have room again
            self._changed.wait(_RETRY_S)
        continue
      with self._changed:
        self._current = self._current[written:]
        if self._all_written():
          self._behind = False
          self._changed.notify_all()

  def _finish(self) -> None:
    """At the end of the process, before Python flushes its streams: by then threads no longer run."""
    self.drain()
    self._over = True

  def _forget(self) -> None:
    """In a forked process, which has no thread."""
    self._over = True

  def _write_if_possible(self, text: bytes) -> None:
    with contextlib.suppress(OSError):
      if select.select([], [self._file], [], 0)[1]:
        os.write(self._file, text)
