"""What a person sees while something runs: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator, Mapping

from ddpm_jax import console

_LINE_EVERY_S = 10.0


class Progress:
  """Progress of a counted task, on stderr if that is a terminal, as lines on stdout if not."""

  def __init__(self, what: str, *, total: int, done: int = 0, quiet: bool = False):
    """Args: a word for the unit, such as 'step'; how many in all; how many already; print nothing at all."""
    self._what, self._total, self._quiet = what, total, quiet
    self._bar = None
    if not quiet and console.columns() > 0:
      self._bar = console.bar(total=total, initial=done, unit=what, dynamic_ncols=True, smoothing=0.05)

  def advance(self, by: int = 1) -> None:
    """Moves the bar."""
    if self._bar is not None:
      self._bar.update(by)

  def unpause(self) -> None:
    """Leaves the time since the last `advance` out of the time left."""
    if self._bar is not None:
      self._bar.unpause()

  def report(self, done: int, facts: Mapping[str, float], rate: float) -> None:
    """Shows facts at a point of interest. rate: units a second, for the time left; 0 if unknown."""
    text = "  ".join(f"{name} {value:.4g}" for name, value in facts.items())
    if self._bar is not None:
      self._bar.set_postfix_str(text)
    elif not self._quiet:
      speed = ""
      if rate:
        left = datetime.timedelta(seconds=round((self._total - done) / rate))
        speed = f"  {rate:.3g} {self._what}s/s  {left} left"
      console.say(f"{self._what} {done}/{self._total}{text and '  ' + text}{speed}")

  def say(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    if not self._quiet:
      console.say(text)

  def close(self) -> None:
    """Leaves the terminal on a fresh line."""
    if self._bar is not None:
      self._bar.close()


@contextlib.contextmanager
def counted(what: str, *, total: int, quiet: bool) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
  """Progress of something that counts: yields a function that is told how many are done, and one that takes a line.

  Where there is no terminal a line is printed every ten seconds, and one at the end. The speed is measured from the
  first call on: what was there before, and a compilation, are no part of it.
  """
  with contextlib.closing(Progress(what, total=total, quiet=quiet)) as progress:
    before, at_first, began, told = 0, None, 0.0, time.perf_counter()

    def done(number: int) -> None:
      nonlocal before, at_first, began, told
      now = time.perf_counter()
      progress.advance(number - before)
      before = number
      if at_first is None:
        at_first, began = number, now
      if number == total or now - told >= _LINE_EVERY_S:
        told = now
        progress.report(number, {}, (number - at_first) / max(now - began, 1e-9))

    yield done, progress.say
