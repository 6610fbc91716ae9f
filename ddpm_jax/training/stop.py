"""Stopping on request: SIGTERM or SIGINT asks for a checkpoint at the current step; a second one ends at once."""

from __future__ import annotations

import os
import signal

import jax
from jax.experimental import multihost_utils


class StopRequest:
  """Listens for signals while it is open (a context manager)."""

  def __init__(self):
    self._received: int | None = None
    self._previous = {}

  def __enter__(self) -> StopRequest:
    # With several processes, SIGTERM belongs to JAX's preemption service, which makes all of them stop at one step.
    signals = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
    self._previous = {number: signal.signal(number, self._note) for number in signals}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number: int, _frame) -> None:
    if self._received is not None:
      os._exit(128 + number)
    self._received = number
    os.write(2, b"\nstopping after this update; a second signal ends at once, without a checkpoint\n")
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)  # pass Ctrl-C on to the preemption service

  def due(self, step: int) -> bool:
    """Whether to stop after `step` updates; the same answer on every process."""
    if jax.process_count() == 1:
      return self._received is not None
    return multihost_utils.reached_preemption_sync_point(step)
