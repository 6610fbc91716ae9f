"""What a training run reports: metrics and pictures, on disk and on the terminal, from the first process alone."""

from __future__ import annotations

import contextlib
import math
import pathlib
import statistics
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from ddpm_jax.config import TrainConfig, writer_names
from ddpm_jax.devices.hosts import to_host
from ddpm_jax.errors import NonFiniteError
from ddpm_jax.runtime import console
from ddpm_jax.runtime.progress import Progress
from ddpm_jax.training.step import Metrics
from ddpm_jax.workdir import grids
from ddpm_jax.workdir.loggers import Loggers, Settings, find
from ddpm_jax.workdir.writers import MetricsWriter

_FIRST_LINE_S = 20.0  # of training, until the time left is printed at the latest


class Reports:
  """Reads metrics from the device and passes them on. Every process reads, so that all see bad news; one writes."""

  def __init__(
    self,
    workdir: pathlib.Path,
    progress: Progress,
    options: TrainConfig,
    *,
    start_step: int,
    batch_size: int,
    images: Callable[[int], np.ndarray],
    settings: Settings,
    so_far: Mapping[str, Any] = types.MappingProxyType({}),
    clock: Callable[[], float] = time.monotonic,
    alarms: Callable[[int, Mapping[str, float]], Iterable[str]] | None = None,
  ):
    """Opens the files of `workdir`; what they hold of training steps after `start_step` is forgotten.

    Args:
      workdir: where they are.
      progress: the terminal.
      options: the options.
      start_step: the number of training steps made before.
      batch_size: B, over all processes.
      images: training step -> int [B], the indices of its images in the data set.
      settings: of the run, for others to read: no folder of this machine is named.
      so_far: what `so_far` returned at `start_step`; {} for a new run, and for checkpoints of release 0.1.0.
      clock: seconds since any moment.
      alarms: (step, its metrics) -> lines on what looks wrong.

    Raises:
      UserError: one of --writers cannot be imported.
      RunError: the files cannot be written.
    """
    writers = writer_names(options.writers)
    loggers = find(writers)
    self._workdir = workdir
    self._losses = list(so_far.get("losses", ()))  # since the last line of the metrics, those that are finite
    self._pages: Future[None] | None = None  # of `write_pages`, beside the training
    self._beside = ThreadPoolExecutor(1, thread_name_prefix="pages")
    self._progress = progress
    self._batch_size, self._images = batch_size, images
    self._max_nonfinite = options.max_nonfinite if options.on_nonfinite == "skip" else 1
    self._writer, self._loggers, before = None, None, (start_step, so_far.get("seconds", 0.0))
    if jax.process_index() == 0:
      self._writer = MetricsWriter(workdir, resume_step=start_step, tensorboard="tensorboard" in writers)
      self._loggers = Loggers(loggers, workdir, settings, start_step)
      before = before if "seconds" in so_far else self._writer.trained_before
    self._clock = _Clock(*before, clock)
    self._due = self._clock.now + _FIRST_LINE_S  # of the time left, until there are metrics
    self._failing = False
    self._alarms = alarms

  def compiled(self, steps: range) -> None:
    """Says how long the first call took, which includes the compilation, and starts to measure the speed."""
    which = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    self._progress.say(f"compiled and made {which} in {self._clock.start(steps[-1]):.1f} s")
    self._progress.begin(steps[-1])

  def check(self, steps: range, metrics: Metrics) -> None:
    """Waits for the training steps `steps`, made in one call, and looks whether they were finite.

    Raises:
      NonFiniteError: if one was not, and there are as many in a row as `max_nonfinite`.
    """
    in_row, losses = (np.atleast_1d(to_host(metrics[name])) for name in ("nonfinite_in_row", "loss"))
    self._losses += [loss for loss in losses[: len(steps)].tolist() if math.isfinite(loss)]
    for i, step in enumerate(steps):
      if in_row[i]:
        loss, norm = (_of_step(i, metrics[name]) for name in ("loss", "grad_norm"))
        self._nonfinite(step, int(in_row[i]), loss, norm)
    if self._clock.now >= self._due and (rate := self._clock.rate(steps[-1])):
      self._progress.estimate(steps[-1], rate)
      self._due = math.inf

  def _nonfinite(self, step: int, in_row: int, loss: float, norm: float) -> None:
    what = f"step {step}: loss {loss}, gradient norm {norm}"
    indices = " ".join(map(str, self._images(step)))
    if in_row < self._max_nonfinite:
      self._progress.say(f"{what}; left out, the weights stay as they were; its images are {indices}")
      return
    in_all = f", as the {in_row - 1} before it" if in_row > 1 else ""
    raise NonFiniteError(
      f"{what}{in_all}; what was saved before is intact; try a lower --learning_rate in another --workdir"
      f"{', or --on_nonfinite=skip' if self._max_nonfinite == 1 else ''}; its images are {indices}"
    )

  def metrics(self, steps: range, metrics: Metrics) -> None:
    """Writes and shows the metrics of the last of the training steps `steps`, made in one call.

    The loss is the mean over all training steps since the line before, but for those that are not finite.
    """
    step = steps[-1]
    values = {name: _of_step(len(steps) - 1, value) for name, value in metrics.items()}
    values["loss"] = statistics.fmean(self._losses) if self._losses else math.nan
    self._losses = []
    rate, seconds = self._clock.lap(step)
    if rate:
      self._due = math.inf
      values |= {"steps_per_second": rate, "images_per_second": rate * self._batch_size}
    values |= {"images": step * self._batch_size, "seconds": round(seconds, 3)}
    if self._writer and self._loggers:
      with self._reported(f"the metrics of step {step} wait to be written"):
        self._writer.write(step, values | {"time": round(time.time(), 3)})
      self._loggers.scalars(step, values)
    facts = {"loss": values["loss"], "grad norm": values["grad_norm"]}
    facts |= {name.removeprefix("mean/"): value for name, value in values.items() if name.startswith("mean/")}
    facts |= {name.replace("_", " "): values[name] for name in ("nonfinite", "bad_records") if values[name]}
    self._progress.report(step, facts, rate, self._clock.mean_rate(step))
    for line in self._alarms(step, values) if self._alarms else ():
      self._progress.say(f"warning: {line}")

  def seconds(self) -> float:
    """Seconds of training so far, as `ddpm_jax.workdir.metrics` defines them."""
    return self._clock.now

  def so_far(self, step: int) -> dict[str, Any]:
    """What a run that goes on from `step`, which has ended just now, must know: JSON values for the manifest."""
    return {"losses": list(self._losses), "seconds": round(self._clock.at(step), 3)}

  def evaluated(self, step: int, values: dict[str, float]) -> None:
    """Adds what was measured of the model after training step `step` to its metrics."""
    if self._writer and self._loggers:
      with self._reported(f"what was measured of step {step} is not in the metrics"):
        self._writer.amend(step, values)
      self._loggers.scalars(step, values)

  def samples(self, step: int, picture: np.ndarray, settings: Mapping[str, Any]) -> None:
    """Writes and shows a sample grid uint8 [height, width, 3], and begins to renew the pages.

    settings: how it was drawn, JSON values.
    """
    if not (self._writer and self._loggers):
      return
    path = self._workdir / "samples" / f"step_{step:08d}.png"
    with self._reported(f"the sample grid of step {step} is lost"):
      grids.save_png(path, picture, {"checkpoint": step, **settings})
      self._writer.write_image(step, "samples", picture)
      self._progress.say(f"sample grid of step {step}: {path}")
      console.show_png(path)
    self._loggers.image(step, "samples", picture)
    self.renew_pages(step)

  def renew_pages(self, step: int) -> None:
    """Begins to write the pages, unless they are being written: then they are renewed the next time."""
    if self._pages is None or self._pages.done():
      self._settle_pages(step)
      self._pages = self._beside.submit(write_pages, self._workdir)

  def _settle_pages(self, step: int) -> None:
    """Waits until the pages are written, and says so if they could not be."""
    if self._pages:
      with self._reported(f"loss.png and report.html are not renewed at step {step}"):
        self._pages.result()
      self._pages = None

  def flush(self) -> None:
    """Returns once all metrics are on disk. Raises OSError if that cannot be."""
    if self._writer:
      self._writer.flush()

  @contextlib.contextmanager
  def _reported(self, loss: str) -> Iterator[None]:
    """Warns once of storage that fails, and goes on: a checkpoint is not written without its metrics, see `flush`."""
    try:
      yield
    except OSError as error:
      if not self._failing:
        console.warn(f"cannot write ({error}); {loss}, and so on")
      self._failing = True
    else:
      if self._failing:
        self._progress.say("metrics and pictures can be written again")
      self._failing = False

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the time spent inside out of the measured speed."""
    with self._clock.paused():
      yield
    self._progress.unpause()

  def close(self) -> None:
    """Closes the files, once the pages are written."""
    self._beside.shutdown()
    if self._writer and self._loggers:
      self._writer.close()
      self._loggers.close()


def write_pages(workdir: pathlib.Path) -> None:
  """Writes `loss.png` and `report.html` anew, of what the other files of a workdir say. Raises OSError."""
  pages = workdir / "loss.png", workdir / "report.html"
  try:
    from ddpm_jax.report import report  # Matplotlib takes long to import

    report.write_report(workdir)
  finally:
    if not (workdir / "config.json").exists():  # deleted meanwhile, and made anew by a save that was under way
      for page in pages:
        page.unlink(missing_ok=True)


def _of_step(i: int, metric: jax.Array) -> float:
  """A metric of the i-th step of a call. Metrics of several steps have a leading axis, which may be longer."""
  return np.atleast_1d(to_host(metric))[i].item()


class _Clock:
  """Seconds of training in all, and training steps a second. What is paused, such as checkpoints, is no part of them.

  The first call of the step compiles; it counts as long as those after it take on average.
  """

  def __init__(self, step: int, seconds: float, clock: Callable[[], float]):
    """`seconds`: that the steps up to `step` took, in earlier processes. `clock`: seconds since any moment."""
    self._clock, self._made = clock, clock()
    self._seconds, self._since = seconds, None  # until a moment since when it runs; None: it does not
    self._uncounted = -step  # steps of the first call
    self._lap = self._first = step, seconds

  def start(self, step: int) -> float:
    """The first call, which ends at `step`, is over. Returns the seconds since the clock was made."""
    self._uncounted += step
    self._since = self._clock()
    self._lap = self._first = step, self._seconds
    return self._since - self._made

  @property
  def now(self) -> float:
    """Seconds of training so far."""
    return self._seconds + (0.0 if self._since is None else self._clock() - self._since)

  def at(self, step: int) -> float:
    """The same, where `step` has ended just now, so that the first call can be counted."""
    first, seconds = self._first
    if self._uncounted and step > first:
      took = (self.now - seconds) / (step - first) * self._uncounted
      self._seconds, self._uncounted = self._seconds + took, 0
      self._lap, self._first = ((step, seconds + took) for step, seconds in (self._lap, self._first))
    return self.now

  def rate(self, step: int) -> float:
    """Steps a second between the last lap and `step`, which has ended just now; 0 if that is not known."""
    steps, seconds = step - self._lap[0], self.now - self._lap[1]
    return steps / seconds if steps and seconds else 0.0

  def mean_rate(self, step: int) -> float:
    """Steps a second of this process up to `step`, which has ended just now; 0 if that is not known."""
    first, seconds = self._first
    steps, took = step - first, self.now - seconds
    return steps / took if steps and took else 0.0

  def lap(self, step: int) -> tuple[float, float]:
    """Begins a lap. Returns the rate of the one that ends, and the seconds of training up to `step`."""
    if rate := self.rate(step):
      self._lap = step, self.at(step)
    return rate, self._lap[1]

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves out the time spent inside."""
    runs, self._seconds, self._since = self._since is not None, self.now, None
    yield
    self._since = self._clock() if runs else None
