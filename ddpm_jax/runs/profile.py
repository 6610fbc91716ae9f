"""A trace of some training steps by `jax.profiler`: where the time of a step goes."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from ddpm_jax.runtime import console


class Profile:
  """Traces the calls that make some of the training steps, in process 0, and writes the trace into a folder.

  Calls are traced whole and end where they would without a trace, so a trace changes no bit of a run. The devices
  finish what they do before the first of them, so that nothing else is in the trace.
  """

  def __init__(
    self,
    steps: range,
    folder: pathlib.Path,
    *,
    start_step: int,
    say: Callable[[str], None],
    paused: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
  ):
    """Args:
    steps: those to be traced; none if empty.
    folder: where the trace is written, made if need be.
    start_step: the number of training steps made before.
    say: takes a line about what was written.
    paused: the measured speed leaves out the time spent inside.
    """
    self._folder, self._say, self._paused = folder, say, paused
    self._steps, self._running, self._first = steps, False, 0
    if jax.process_index():
      self._steps = range(0)
    elif steps and steps[-1] <= start_step:
      say(f"profile_steps: step {start_step} is after {steps[0]}:{steps[-1]}, so nothing is traced")
      self._steps = range(0)

  def before(self, steps: range, state: Any) -> None:
    """Starts the trace if the next call, which takes `steps` from `state`, is the first to be traced.

    Where another trace already runs in this process, a warning says that nothing is traced, and the run goes on.
    """
    if self._steps and not self._running and steps[-1] >= self._steps[0]:
      jax.block_until_ready(state)
      try:
        jax.profiler.start_trace(self._folder)
      except RuntimeError as error:  # also where an earlier one in this process could not be written
        console.warn(f"profile_steps: nothing is traced ({' '.join(str(error).split())})")
        self._steps = range(0)
        return
      self._running, self._first = True, steps[0]

  def after(self, steps: range, outputs: Any) -> None:
    """Ends the trace if the call that took `steps` and returned `outputs` was the last to be traced."""
    if self._running and steps[-1] >= self._steps[-1]:
      jax.block_until_ready(outputs)
      self._write(steps[-1])

  def close(self) -> None:
    """Ends and writes a trace that still runs, of a run that was stopped or has failed meanwhile."""
    if self._running:
      self._write()

  def _write(self, last: int | None = None) -> None:
    self._steps, self._running = range(0), False
    with self._paused():
      try:
        jax.profiler.stop_trace()
      except (OSError, RuntimeError) as error:
        console.warn(f"profile_steps: cannot write the trace into {self._folder} ({' '.join(str(error).split())})")
        return
    which = f"from step {self._first} on" if last is None else f"of steps {self._first} to {last}"
    self._say(f"profile {which}: {self._folder}")
