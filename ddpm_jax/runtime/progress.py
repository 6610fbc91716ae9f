"""Progress of a task: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

from ddpm_jax.runtime import console

_FIRST_LINE_S, _LONGEST_S = 5.0, 300.0  # off a terminal: to the first line, and the most between two
_TICK_S = 1.0  # of what a bar says of a compilation
_COMPILING_S = 20.0  # off a terminal: to the first line that says so

# Of a bar that says what is done in words.
_BAR = "{desc}{postfix} |{bar}| {percentage:3.0f}% [{elapsed}<{remaining}]"

_shown: list[Progress] = []  # what is open, the innermost last


class Progress:
  """Progress of a counted task, on stderr if that is a terminal, as lines on stdout if not."""

  def __init__(self, what: str, *, total: int, done: int = 0, quiet: bool = False):
    """Args: a word for the unit, such as 'step'; how many in all; how many already; print nothing at all."""
    self._what, self._total, self._quiet = what, total, quiet
    self._text = ""
    self.left_out_s = 0.0  # seconds that are no part of the speed, such as compilations
    self._bar = None
    if not quiet and console.columns() > 0:
      self._bar = console.bar(total=total, initial=done, unit=what, dynamic_ncols=True, smoothing=0.05)
    _shown.append(self)

  def describe(self, text: str) -> None:
    """From now on the bar and the lines show `text` in place of the count."""
    self._text = text
    if self._bar is not None:
      self._bar.bar_format = _BAR
      self._bar.set_description_str(text, refresh=False)

  def advance(self, by: float = 1) -> None:
    """Moves the bar."""
    if self._bar is not None:
      self._bar.update(by)

  def begin(self, done: float) -> None:
    """Sets the bar to `done`; the speed is that of what comes after."""
    if self._bar is not None:
      self._bar.initial = self._bar.n = self._bar.last_print_n = done
      self._bar.start_t = self._bar.last_print_t = time.time()
      self._bar.refresh()

  def unpause(self) -> None:
    """Leaves the time since the last `advance` out of the time left."""
    if self._bar is not None:
      self._bar.unpause()

  @contextlib.contextmanager
  def compiling(self, what: str = "") -> Iterator[None]:
    """Shows, while it lasts, what compiles and for how long. That time does not count in the speed."""
    began, over = time.perf_counter(), threading.Event()

    def tick() -> None:
      waits = _growing(_COMPILING_S, _LONGEST_S)
      while not over.wait(_TICK_S if self._bar is not None else next(waits)):
        text = f"compiling{what and ' ' + what}, {time.perf_counter() - began:.0f} s"
        if self._bar is not None:
          self._bar.set_postfix_str(text)
        else:
          console.say(text)

    thread = threading.Thread(target=tick, name="compiling", daemon=True)
    if not self._quiet:
      thread.start()
    try:
      yield
    finally:
      over.set()
      if not self._quiet:
        thread.join()
      self.left_out_s += time.perf_counter() - began
      if self._bar is not None:
        self._bar.set_postfix_str("", refresh=False)
        self._bar.unpause()

  def report(self, done: float, facts: Mapping[str, float], rate: float, mean_rate: float = 0.0) -> None:
    """Shows facts at a point of interest.

    Args:
      done: how many units.
      facts: name -> value.
      rate: units a second, lately; 0 if unknown.
      mean_rate: the same of a longer time, by which the time left is estimated; 0: `rate`.
    """
    text = "  ".join(f"{name} {value:.4g}" for name, value in facts.items())
    if self._bar is not None:
      self._bar.set_postfix_str(text)
    elif not self._quiet:
      speed = ""
      if rate:
        left = datetime.timedelta(seconds=round((self._total - done) / (mean_rate or rate)))
        speed = f"  {rate:.3g} {self._what}s/s  {left} left"
      console.say(f"{self._text or f'{self._what} {done}/{self._total}'}{text and '  ' + text}{speed}")

  def estimate(self, done: int, rate: float) -> None:
    """Shows the time left where there are no facts yet; a bar shows it anyway. rate: units a second."""
    if self._bar is None:
      self.report(done, {}, rate)

  def say(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    if not self._quiet:
      console.say(text)

  def close(self) -> None:
    """Leaves the terminal on a fresh line."""
    if self in _shown:
      _shown.remove(self)
    if self._bar is not None:
      self._bar.close()


def compiling() -> contextlib.AbstractContextManager[None]:
  """`Progress.compiling` of the innermost open `Progress`; without one it shows nothing."""
  return _shown[-1].compiling() if _shown else contextlib.nullcontext()


def _growing(first: float, longest: float) -> Iterator[float]:
  """Intervals in seconds, each twice the one before: lines come early, and no log fills up."""
  while True:
    yield first
    first = min(2 * first, longest)


class Drawing(NamedTuple):
  """Progress of sampling: batch by batch, each by a number of network evaluations."""

  number: int  # images in all
  first: int  # images before those of this batch, all of them drawn
  count: int  # images of this batch
  made: int  # network evaluations done for this batch
  evaluations: int  # network evaluations that a batch takes

  @property
  def images(self) -> float:
    """Images done, as a float: parts of images count."""
    return self.first + self.count * self.made / self.evaluations

  def __str__(self) -> str:
    which = f"{self.number} images"
    if self.count < self.number:
      which = f"images {self.first + 1} to {self.first + self.count} of {self.number}"
    return f"drawing: {which}, network evaluation {self.made}/{self.evaluations}"


class Done(Protocol):
  """Callback with the number of units done, and a text in place of the count."""

  def __call__(self, number: float, text: str = "") -> None: ...


@contextlib.contextmanager
def counted(what: str, *, total: int, quiet: bool) -> Iterator[tuple[Done, Callable[[str], None]]]:
  """Progress of a counted task: yields a function that takes the number done, and one that prints a line.

  Off a terminal lines are printed at growing intervals, and one at the end. The speed is measured from the first call
  on, without compilations.
  """
  with contextlib.closing(Progress(what, total=total, quiet=quiet)) as progress:
    waits = _growing(_FIRST_LINE_S, _LONGEST_S)
    before, at_first, began, due = 0.0, None, 0.0, 0.0

    def done(number: float, text: str = "") -> None:
      nonlocal before, at_first, began, due
      if text:
        progress.describe(text)
      now = time.perf_counter() - progress.left_out_s
      if at_first is None:
        at_first, began, due = number, now, now + next(waits)
        progress.begin(number)
      else:
        progress.advance(number - before)
      before = number
      if number == total or now >= due:
        due = now + next(waits)
        progress.report(number, {}, (number - at_first) / max(now - began, 1e-9))

    yield done, progress.say
