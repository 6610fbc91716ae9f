"""The run `evaluate`: measures the model of a workdir."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Collection, Iterator, Mapping

import jax

from ddpm_jax.checkpoint import resume
from ddpm_jax.config import Config
from ddpm_jax.data.sources import Source, open_source
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.evaluation import evaluate as evaluate_lib
from ddpm_jax.evaluation.results import scalars, write_result
from ddpm_jax.evaluation.summary import (
  LIKELIHOODS,
  Result,
  by_class,
  direction,
  in_words,
  sweep,
  title_of,
  yardsticks,
)
from ddpm_jax.evaluation.surroundings import Surroundings
from ddpm_jax.runtime import console, paths
from ddpm_jax.weights.initial import ensure_workdir, find_weights
from ddpm_jax.weights.load import keep_place
from ddpm_jax.workdir import layout
from ddpm_jax.workdir.storage import remedy

_CLASSES = 20  # in lines, at most


def evaluate(config: Config, workdir: pathlib.Path | None, given: Collection[str] = ()) -> None:
  """Writes `eval/N.json`, pictures beside it, and `report.html`; with --write_reference that file and nothing else.

  Args:
    config: the settings.
    workdir: of the run; None: statistics are written of a data set that no run has to do with.
    given: names of the flags of this command, as what they say is never chosen otherwise.

  Raises:
    UserError: if the workdir holds no such checkpoint, or data, labels or weights of the measures are missing.
    RunError: if the results cannot be written.
  """
  if config.evaluate.write_reference:
    _write_reference(config, workdir)
    return
  assert workdir is not None
  layout.check_writable(workdir)
  weights = find_weights(config, workdir)
  train = open_source(config.data)
  if train.image_shape != weights.run.image_shape:
    raise UserError(
      f"dataset: the images of {train.name} are not of the size that the model draws, "
      f"{'x'.join(map(str, weights.run.image_shape))}; restore them, or name others if nothing was trained here"
    )
  _warn_of_changed_images(train, workdir)
  measured = evaluate_lib.check(config, workdir, train, weights).evaluate.measures
  keep_place(config, workdir, weights, train)
  ensure_workdir(config, workdir)
  quiet = jax.process_index() != 0
  around = Surroundings(workdir, lambda what: None, quiet, given=frozenset(given), estimates=True)
  around.say(f"evaluating {weights.text}: {', '.join(measured)}")
  result, pictures = evaluate_lib.evaluate(config, weights, train, around)
  if not quiet:
    for warning in result["warnings"]:
      console.warn(warning)
    path = write_result(workdir, result, pictures)
    files = [path, *_write_report(workdir, result)]
    for line in result_lines(result):
      console.say(line)
    console.say(f"done: {', '.join(map(str, files[:-1]))} and {files[-1]}")


def _warn_of_changed_images(train: Source, workdir: pathlib.Path) -> None:
  """Warns where the images are not those that the newest checkpoint was trained with; they are measured as they are."""
  step, facts = layout.newest_facts(workdir)
  if isinstance(facts.get("data"), dict) and jax.process_index() == 0:
    try:
      resume.check_images({"step": step, "data": facts["data"]}, train, workdir)
    except UserError as error:
      console.warn(f"{str(error).partition(';')[0]}; they are compared with as they are now")


def _write_report(workdir: pathlib.Path, result: Result) -> list[pathlib.Path]:
  """Writes the page, and the chart of guidance scales where several were measured. Returns their paths."""
  from ddpm_jax.report.report import write_guidance_chart, write_report  # Matplotlib takes long to import

  try:
    return [*write_guidance_chart(workdir, result), write_report(workdir)]
  except OSError as error:
    name = error.filename or workdir / "report.html"
    raise RunError(f"workdir: cannot write {name} ({error.strerror}); {remedy(error)}") from error


def result_lines(result: Result) -> Iterator[str]:
  """The numbers of a result, a line each, beside those of the data itself, of noise and of an untrained network."""
  beside, numbers, scales = yardsticks(result), _numbers(result), sweep(result)
  width = max([28, *map(len, numbers)])
  if scales:
    columns = {scale: _numbers(one) for scale, one in scales.items()}
    yield f"  {'guidance_scale':{width}}" + "".join(f" {f'{scale:g}':<10}" for scale in columns)
    for name in columns[next(iter(columns))]:
      values = {scale: column[name] for scale, column in columns.items()}
      better = {"lower": min, "higher": max}.get(direction(name))
      several = len(set(values.values())) > 1
      best = [f"best at {better(values, key=values.__getitem__):g}"] if better and several else []
      line = (
        f"  {name:{width}}" + "".join(f" {x:<10.5g}" for x in values.values()) + _remark(best, beside.get(name, {}))
      )
      yield line.rstrip()
      numbers.pop(name, None)
  for name, value in numbers.items():
    yield f"  {name:{width}} {value:<10.5g}{_remark([], beside.get(name, {}))}".rstrip()
  classes = {} if scales else by_class(result)
  for name, found in list(classes.items())[:_CLASSES]:
    shown = f"class {console.one_line(name)}"
    yield f"  {shown:{width}} " + ", ".join(f"{title} {value:.5g}" for title, value in found.items())
  if len(classes) > _CLASSES:
    yield f"  and {len(classes) - _CLASSES} more classes, in the file"
  if any("given" in terms for kind in LIKELIHOODS for terms in result.get(kind, {}).values()):
    yield "Bits/dim are of the images given their classes."
  sentences = [in_words(title_of(name), name, value, beside[name]) for name, value in numbers.items() if name in beside]
  yield from (sentence for i, sentence in enumerate(sentences) if not i or "nothing" in sentence)


def _numbers(result: Result) -> dict[str, float]:
  return {name.removeprefix("evaluation/"): value for name, value in scalars(result).items()}


def _remark(first: list[str], others: Mapping[str, float]) -> str:
  """For the end of a line: what it stands beside."""
  remarks = first + [f"{kind} {other:.3g}" for kind, other in others.items()]
  return f" ({', '.join(remarks)})" if remarks else ""


def _write_reference(config: Config, workdir: pathlib.Path | None) -> None:
  path = paths.absolute("write_reference", config.evaluate.write_reference, "name a file on disk")
  paths.check_name("write_reference", path)
  if paths.exists("write_reference", path):
    raise UserError(f"write_reference: {path} exists; name another file")
  if not path.parent.is_dir():
    raise UserError(f"write_reference: there is no folder {path.parent}; make it, or name another file")
  quiet = jax.process_index() != 0
  with contextlib.ExitStack() as cleanup:
    # Without a run there is no cache to look into.
    place = workdir or pathlib.Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="ddpm_jax-")))
    around = Surroundings(place, beat=lambda what: None, quiet=quiet)
    evaluate_lib.write_reference(config, open_source(config.data), path, around)
    around.say(f"done: {path}")
