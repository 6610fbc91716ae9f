"""What a training run compiles ahead of its first call."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from ddpm_jax.training.setup import Run


class Compiler:
  """A thread that compiles one program after the other. XLA needs no Python for it, so other work goes on beside it."""

  def __init__(self):
    self._thread = ThreadPoolExecutor(1, thread_name_prefix="compile")

  def submit(self, lowered: jax.stages.Lowered) -> Future[jax.stages.Compiled]:
    """Compiles it when those before it are done."""
    return self._thread.submit(lowered.compile)

  def close(self) -> None:
    """Does not wait: what ends a run early is reported at once. The process ends when XLA is done with its work."""
    self._thread.shutdown(wait=False, cancel_futures=True)


class StepProgram:
  """The step, for up to `steps_per_dispatch` steps in a call.

  Where shapes are enough for that, it is compiled while the state, the files and the first batch are made.
  """

  def __init__(self, run: Run, train_step: Callable, compiler: Compiler, *, ahead: bool):
    """Traces the step, and begins to compile.

    Args:
      run: the run.
      train_step: one step, as `make_train_step` returns it.
      compiler: has nothing else to do yet.
      ahead: whether it will be called soon.
    """
    max_steps = run.config.train.steps_per_dispatch
    seed = np.uint32(run.config.train.seed)  # no part of the program: runs of other seeds need not compile another one
    arguments = {"seed": seed, "frozen": run.frozen}
    self._step = run.mesh.compile(
      train_step, run.abstract_state, max_steps=max_steps, arguments=arguments, packs=run.packs
    )
    self._compiled = None
    if ahead and run.mesh.lowers_shapes:
      batch = run.abstract_batch(run.config.data.batch_size)
      lowered = self._step.lower(run.abstract_state, *run.mesh.abstract_inputs(batch, max_steps=max_steps))
      self._compiled = compiler.submit(lowered)  # JAX keeps the result, and the first call finds it

  def __call__(self, *arguments: Any) -> Any:
    """As what `DeviceMesh.compile` returns."""
    if self._compiled:
      self._compiled.result()
    return self._step(*arguments)
