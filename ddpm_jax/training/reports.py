"""What a training run tells: metrics and pictures, on disk and on the terminal, from the first process alone."""

from __future__ import annotations

import contextlib
import math
import pathlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from ddpm_jax import grids
from ddpm_jax.errors import NonFiniteError
from ddpm_jax.progress import Progress
from ddpm_jax.training.parallel import to_host
from ddpm_jax.training.step import Metrics
from ddpm_jax.writers import MetricsWriter


class Reports:
  """Reads metrics from the device and passes them on. Every process reads, so that all see bad news; one writes."""

  def __init__(self, workdir: pathlib.Path, progress: Progress, *, start_step: int, batch_size: int):
    """Opens the files of `workdir`; what they hold of updates after `start_step` is forgotten."""
    self._samples = workdir / "samples"
    self._progress = progress
    self._batch_size = batch_size
    self._writer = MetricsWriter(workdir, resume_step=start_step) if jax.process_index() == 0 else None
    self._clock = _Clock()

  def compiled(self, step: int) -> None:
    """Says how long the first update took, which includes the compilation, and starts to measure the speed."""
    self._progress.say(f"compiled and made update {step} in {self._clock.start(step):.1f} s")
    self._progress.unpause()

  def check(self, step: int, metrics: Metrics) -> dict[str, float]:
    """Reads the metrics of update `step`, once the device has made it.

    Raises:
      NonFiniteError: if one of them is infinite or not a number.
    """
    values = {name: float(to_host(value)) for name, value in metrics.items()}
    if not all(math.isfinite(value) for value in values.values()):
      raise NonFiniteError(
        f"update {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; what was saved "
        "before is intact; try a lower --learning_rate in another --workdir"
      )
    return values

  def metrics(self, step: int, metrics: Metrics) -> None:
    """Checks, writes and shows the metrics of update `step`. Raises NonFiniteError."""
    values = self.check(step, metrics)
    rate = self._clock.rate(step)
    if rate:
      values |= {"steps_per_second": rate, "images_per_second": rate * self._batch_size}
    if self._writer:
      self._writer.write(step, values)
    self._progress.report(step, {"loss": values["loss"], "grad norm": values["grad_norm"]}, rate)

  def samples(self, step: int, picture: np.ndarray) -> None:
    """Writes a sample grid uint8 [height, width, 3]."""
    if self._writer:
      grids.save_png(self._samples / f"step_{step:08d}.png", picture)
      self._writer.write_image(step, "samples", picture)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the time spent inside out of the measured speed."""
    with self._clock.paused():
      yield
    self._progress.unpause()

  def close(self) -> None:
    """Closes the files."""
    if self._writer:
      self._writer.close()


class _Clock:
  """Updates a second between two points."""

  def __init__(self):
    self._time, self._step, self._pause = time.perf_counter(), 0, 0.0

  def start(self, step: int) -> float:
    """Begins to count at `step`. Returns the seconds since the clock was made."""
    before, self._time, self._step = self._time, time.perf_counter(), step
    return self._time - before

  def rate(self, step: int) -> float:
    """Updates a second since the last call; 0 if there was none."""
    now = time.perf_counter()
    rate = (step - self._step) / (now - self._time - self._pause)
    self._time, self._step, self._pause = now, step, 0.0
    return rate

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves out the time spent inside."""
    began = time.perf_counter()
    yield
    self._pause += time.perf_counter() - began
