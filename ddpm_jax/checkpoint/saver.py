"""When a checkpoint is written, and what happens where it cannot be: how much may be lost is a promise of the run."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.config import Config, TrainConfig
from ddpm_jax.errors import RunError
from ddpm_jax.runtime import console
from ddpm_jax.training.optimizer import decay_start
from ddpm_jax.training.state import TrainState
from ddpm_jax.workdir.lock import Lock


def first_checkpoint(config: Config) -> int:
  """The training step after which a run writes its first checkpoint, unless it is stopped before."""
  options = config.train
  steps = options.checkpoint_every, options.keep_every, options.evaluate_every, options.num_steps
  return min(step for step in (*steps, decay_start(config.optimizer, options.num_steps)) if step)


class Saver:
  """Saves every `checkpoint_every` and `keep_every` steps; retries until `max_unsaved_steps` steps are at risk."""

  def __init__(
    self,
    checkpoints: Checkpoints,
    options: TrainConfig,
    facts: dict[str, Any],
    *,
    start_step: int,
    lock: Lock | None,
    flush: Callable[[], None],
    extra_step: int | None = None,
  ):
    """Nothing is saved yet.

    Args:
      checkpoints: where to.
      options: the options.
      facts: for the manifests.
      start_step: the number of training steps in the newest checkpoint that exists.
      lock: of the workdir, which is looked at before each save; None where another process has it.
      flush: writes what belongs to a checkpoint, the metrics; called before each save, raises OSError.
      extra_step: is saved whatever `checkpoint_every` is.
    """
    self._checkpoints, self._facts, self._lock, self._flush = checkpoints, facts, lock, flush
    self._every = [every for every in (options.checkpoint_every, options.keep_every) if every]
    self._extra_step = extra_step
    self._limit = options.max_unsaved_steps or 2 * options.checkpoint_every
    self._saved = start_step  # the newest that is known to be on disk
    self._pending: int | None = None
    self._has_failed = self._last = False

  def due(self, step: int) -> bool:
    """Whether the state after `step` training steps is to be saved."""
    last_chance = self._has_failed and self._pending is None and step - self._saved >= self._limit
    return any(step % every == 0 for every in self._every) or step == self._extra_step or last_chance

  def save(
    self, state: TrainState, step: int, *, last: bool = False, so_far: Mapping[str, Any] = types.MappingProxyType({})
  ) -> None:
    """Starts to save; returns once the state may be donated again.

    Args:
      state: global arrays.
      step: the number of training steps in it.
      so_far: what else belongs to this step, JSON values, for the manifest.
      last: nothing is trained after it, so that a failure is final.

    Raises:
      RunError: if it fails, and more training steps than may be lost have been made since the newest checkpoint.
      NonFiniteError: if the state is not finite.
    """
    self._last = last
    earlier = self._settle(wait=True)
    if earlier and jax.process_count() > 1:
      raise earlier
    if earlier:  # judged below: this save may succeed
      self._has_failed = True
      console.warn(f"{earlier}")
    self._check_workdir()
    try:
      self._flush()
      self._checkpoints.save(state, step, {**self._facts, **so_far})
    except OSError as error:
      reason = f"checkpoint {step} could not be written, as its metrics cannot ({error})"
      self._tolerate_or_raise(RunError(f"{reason}; the newest is {self._saved or None}"), step)
    except RunError as error:
      self._tolerate_or_raise(error, step)
    else:
      self._pending = step
      last_chance = self._has_failed and step - self._saved >= self._limit
      if last_chance and (error := self._settle(wait=True)):
        self._tolerate_or_raise(error, step)

  def poll(self, step: int) -> None:
    """To be called after every call of the step: hears of a save that failed in the background since.

    If more training steps than may be lost have been made since the newest checkpoint, `due` says so: a last chance.

    Raises:
      RunError: if there are other processes, which may think that it succeeded, or the lock of the workdir is lost.
    """
    if error := self._settle(wait=False):
      self._tolerate_or_raise(error, step, try_again=True)

  def wait(self, step: int) -> bool:
    """Waits for the save of `step`. Returns whether it is on disk; raises as `save` does."""
    if error := self._settle(wait=True):
      self._tolerate_or_raise(error, step)
    return self._saved == step

  def finish(self, step: int) -> None:
    """Waits for the last save, of `step`. Raises RunError if it is not on disk."""
    self._last = True
    if error := self._settle(wait=True):
      self._tolerate_or_raise(error, step)

  def _settle(self, *, wait: bool) -> RunError | None:
    """Takes note of the save under way, if it has ended. Returns why it failed."""
    if self._pending is None:
      return None
    error = None
    try:
      if wait:
        self._checkpoints.wait()
      elif not self._checkpoints.finished():
        return None
    except RunError as failure:
      error = failure
    self._check_workdir()
    if error is None:
      self._saved, self._has_failed = self._pending, False
    self._pending = None
    return error

  def _check_workdir(self) -> None:
    """Before a save, as Orbax would make a folder anew that somebody has deleted; and after it, as that takes time."""
    if self._lock:
      self._lock.check()

  def _tolerate_or_raise(self, error: RunError, step: int, *, try_again: bool = False) -> None:
    self._has_failed = True
    if self._last:
      raise RunError(f"{error}; the run has ended after step {step}, what came after the newest is lost") from error
    if jax.process_count() > 1:  # the others may think that it succeeded: no way back to one story
      raise error
    if step - self._saved >= self._limit and not try_again:
      raise RunError(f"{error}; nothing could be saved since step {self._saved}, see --max_unsaved_steps") from error
    console.warn(f"{error}; the run goes on and tries again")
