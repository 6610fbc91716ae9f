"""The compiled step of a training run, ahead of its first call."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ddpm_jax.run import Run
from ddpm_jax.training.step import abstract_batch


class StepPrograms:
  """The step for each number of updates in a call.

  Where shapes are enough for that, a thread compiles the first that is called. XLA needs no Python for it, so that
  beside it the state, the files and the first batch are made.
  """

  def __init__(self, run: Run, train_step: Callable, *, first: int):
    """Traces the step, and begins to compile.

    Args:
      run: the run.
      train_step: one update, (state, batch, axis_name) -> (state, metrics).
      first: updates in the first call; 0 if there is none.
    """
    self._steps = {
      updates: run.parallel.compile(train_step, run.abstract_state, updates=updates)
      for updates in {1, run.config.train.steps_per_dispatch}
    }

    self._thread = ThreadPoolExecutor(1, thread_name_prefix="compile")
    self._compiled = None
    if first and run.parallel.lowers_shapes:
      batch = abstract_batch(run.image_shape, run.config.data.batch_size)
      lowered = self._steps[first].lower(run.abstract_state, *run.parallel.abstract_inputs(batch, updates=first))
      self._compiled = self._thread.submit(lowered.compile)  # JAX keeps the result, and the first call finds it

  def __getitem__(self, updates: int) -> Callable:
    """What `Parallel.compile` returns for that many updates in a call."""
    if self._compiled:
      self._compiled.result()
    return self._steps[updates]

  def close(self) -> None:
    """Does not wait: what ends a run before its first update is told at once. The process ends when XLA is done."""
    self._thread.shutdown(wait=False)
