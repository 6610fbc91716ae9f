"""Evaluations while a run trains, and the best checkpoint so far."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import jax
import numpy as np

from ddpm_jax.checkpoint import manifest
from ddpm_jax.config import Config, TrainConfig
from ddpm_jax.data.sources import Source, class_names
from ddpm_jax.devices.hosts import any_host
from ddpm_jax.errors import RunError
from ddpm_jax.evaluation import evaluate as evaluate_lib
from ddpm_jax.evaluation.results import keep_best, measure_of, read_result, scalars, write_result, yardsticks_of
from ddpm_jax.evaluation.summary import Result
from ddpm_jax.evaluation.surroundings import Abandoned, Surroundings
from ddpm_jax.models.build import Params
from ddpm_jax.runs.reports import Reports
from ddpm_jax.runtime import console
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.sampling.classes import one_scale
from ddpm_jax.training.setup import Run
from ddpm_jax.training.state import TrainState
from ddpm_jax.weights.load import Weights, identity_of

_BUDGET_S = 60.0  # of one evaluation, where --evaluate_samples leaves that open


def evaluation_due(options: TrainConfig, step: int) -> bool:
  """Whether the state after `step` training steps is to be measured."""
  every = options.evaluate_every
  return every > 0 and step > 0 and (step % every == 0 or step == options.num_steps)


def evaluation_missing(config: Config, workdir: pathlib.Path, step: int) -> bool:
  """Whether that is due and was not done; all processes must ask."""
  return evaluation_due(config.train, step) and any_host(read_result(workdir / "eval" / f"{step}.json") is None)


def weights_of(run: Run, source: Source, params: Params, step: int, which: str) -> Weights:
  """The weights of a run that trains, with the classes of its images."""
  classes = class_names(source, run.config.model.num_classes) if run.conditional else ()
  return Weights(run, params, step, which, identity_of(manifest.describe(params)), classes=classes)


def check(run: Run, source: Source, workdir: pathlib.Path) -> None:
  """Raises UserError for what the first evaluation of a run would otherwise find wrong."""
  one_scale(run.config.sample)
  evaluate_lib.check(run.config, workdir, source, weights_of(run, source, {}, 0, "ema"))


class Evaluations:
  """Measures the state every `--evaluate_every` training steps, and at the end.

  The checkpoint of that step is on disk before, so that nothing is lost by a stop or a kill meanwhile; the evaluation
  is then made when the run goes on.
  """

  def __init__(
    self,
    run: Run,
    source: Source,
    workdir: pathlib.Path,
    reports: Reports,
    stop: StopRequest,
    beat: Callable[[str], None],
    *,
    given: frozenset[str] = frozenset(),
  ):
    """Nothing is measured yet. `beat` hears what was done, after each batch; `given` are flags of the command."""
    self._run, self._source, self._workdir, self._reports = run, source, workdir, reports
    self._stop, self._beat, self._given = stop, beat, given

  def due(self, step: int) -> bool:
    """Whether the state after `step` training steps is to be measured."""
    return evaluation_due(self._run.config.train, step)

  def missing(self, step: int) -> bool:
    """Whether it is due and was not made; the same on all processes."""
    return evaluation_missing(self._run.config, self._workdir, step)

  def make(self, state: TrainState, step: int) -> bool:
    """Measures the state, whose checkpoint is on disk. Returns whether it was asked to stop meanwhile.

    Where the results cannot be written, it says so.

    Raises:
      UserError: data, labels or weights are missing.
      RunError: the images that are drawn cannot be written.
    """
    options, alone = self._run.config, jax.process_count() == 1
    which = options.sample.sample_weights
    params = state.ema["ema"] if which == "ema" else state.params
    weights = weights_of(self._run, self._source, params, step, which)
    first = jax.process_index() == 0

    def beat(what: str) -> None:
      self._beat(what)
      asked = self._stop.requested is not None
      if asked if alone else any_host(asked):
        raise Abandoned

    around = Surroundings(self._workdir, beat, quiet=not first, budget_s=_BUDGET_S, given=self._given)
    around.say(f"evaluating step {step}")
    try:
      if alone:
        with self._stop.at_rest():
          result, pictures = evaluate_lib.evaluate(options, weights, self._source, around)
      else:
        result, pictures = evaluate_lib.evaluate(options, weights, self._source, around)
    except Abandoned:
      return True
    if first:
      try:
        self._keep(result, pictures)
      except RunError as error:  # the checkpoint is safe, and the same command can evaluate it
        console.warn(f"{error}; step {step} counts as not evaluated")
    return False

  def _keep(self, result: Result, pictures: dict[str, np.ndarray]) -> None:
    """Writes what was measured; the result last: that it is there says that all of this was done. Raises RunError."""
    measure, step = self._run.config.train.best_measure, result["step"]
    best = keep_best(self._workdir, result, measure)
    self._reports.evaluated(step, scalars(result))
    write_result(self._workdir, result, pictures)
    self._reports.renew_pages(step)
    others = ", ".join(f"{kind} {value:.3g}" for kind, value in yardsticks_of(result, measure).items())
    console.say(
      f"evaluated step {step}: {measure} {measure_of(result, measure):.5g}{others and f' ({others})'}"
      f"{', the best so far' * best}"
    )
