"""Several runs on one page, made from the files of their workdirs alone: see `ddpm_jax.compare`."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.summary import columns, duration, finite, number
from ddpm_jax.report.charts import COLOURS, Chart, Series, line_chart, running_mean
from ddpm_jax.report.files import Picture, RunFiles, read_run
from ddpm_jax.report.page import Cell, Table, measures_table, write_page
from ddpm_jax.workdir.metrics import training_seconds

# Settings without which a loss is of something else.
_OF_LOSS = ("dataset", "split", "image_size", "resize", "crop", "resample")
_OF_LOSS += ("num_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction", "loss", "loss_weighting")
_OF_LOSS += ("variance", "stage", "regularizer", "latent_channels", "codebook_size", "kl_weight", "perceptual")
_OF_LOSS += ("perceptual_weight", "discriminator_weight", "discriminator_start", "discriminator_warmup")
_Runs = dict[str, RunFiles]  # by what the page calls them


def write_comparison(workdirs: Sequence[pathlib.Path], out: pathlib.Path) -> None:
  """Writes or replaces a page about the runs in `workdirs`.

  Raises:
    UserError: there are fewer than two, one is no workdir, or the page cannot be written.
  """
  if len(workdirs) < 2:
    raise UserError("RUN: name the workdirs of two runs or more, such as runs/a runs/b")
  if len({path.resolve() for path in workdirs}) < len(workdirs):
    raise UserError("RUN: one workdir is named twice; name each once")
  runs = {name: _read(path) for name, path in zip(_names(workdirs), workdirs, strict=True)}
  values = {
    "names": list(runs),
    "runs": Table([Cell(text) for text in _OVERVIEW], [_overview(runs, name) for name in runs]),
    "curves": _curves(runs),
    "differing": _differing(runs),
    **_grids(runs),
    "measures": _measures(runs),
    "settings": _settings(runs),
  }
  notes = [f"{name}: {note}" for name, run in runs.items() for note in run.notes]
  try:
    write_page(out, "comparison.html", notes=notes, **values)
  except OSError as error:
    raise UserError(f"out: cannot write {out} ({error.strerror}); name another file") from error


def _differing(runs: _Runs) -> list[str]:
  """What makes the losses of the runs different things."""
  values = {name: {str(_value(run, name)) for run in runs.values()} for name in _OF_LOSS}
  values["first_stage"] = {run.first_stage for run in runs.values()}
  return [name for name, found in values.items() if len(found) > 1]


def _names(workdirs: Sequence[pathlib.Path]) -> list[str]:
  """The shortest ends of the paths that distinguish them."""
  parts = [path.resolve().parts for path in workdirs]
  length = 1
  while len({names[-length:] for names in parts}) < len(parts):
    length += 1
  return ["/".join(names[-length:]).replace("//", "/") for names in parts]


def _read(workdir: pathlib.Path) -> RunFiles:
  if not workdir.is_dir():
    raise UserError(f"RUN: there is no folder {workdir}; name the workdir of a run")
  run = read_run(workdir)
  if run.config is None:
    reason = run.notes[0].removesuffix(".")
    raise UserError(f"RUN: {workdir} is no workdir ({reason[:1].lower()}{reason[1:]}); name that of a run")
  return run


def _config(run: RunFiles) -> Config:
  """The settings, which `_read` has made sure of."""
  assert run.config is not None
  return run.config


def _value(run: RunFiles, name: str) -> Any:
  return config_lib.values(_config(run))[name]


def _colour(runs: _Runs, name: str) -> int:
  return list(runs).index(name) % COLOURS + 1


_OVERVIEW = ("Run", "Steps", "Images seen", "Training time", "Images per second", "Loss")


def _overview(runs: _Runs, name: str) -> list[Cell]:
  run, config = runs[name], _config(runs[name])
  return [
    Cell(name, colour=_colour(runs, name)),
    Cell(f"{run.step:,}", f"of {config.train.num_steps:,}"),
    Cell(f"{run.step * config.data.batch_size:,}"),
    Cell(duration(run.seconds) if run.seconds else ""),
    Cell(number(run.speed, 3) if run.speed else ""),
    Cell(number(run.loss[0], 3) if run.loss else ""),
  ]


def _curves(runs: _Runs) -> list[Chart | None]:
  """The loss over training steps, images and time."""
  longest = max(run.seconds for run in runs.values())
  unit, name = (3600, "hours") if longest >= 5400 else (60, "minutes") if longest >= 180 else (1, "seconds")
  drawn = []
  for title, label, across in (
    ("Loss over training steps", "training steps", lambda run, row, seconds: finite(row.get("step"))),
    ("Loss over images", "images seen", _images),
    (f"Loss over {name} of training", name, lambda run, row, seconds: seconds / unit),
  ):
    series = [Series(name, running_mean(_points(run, across)), _colour(runs, name)) for name, run in runs.items()]
    drawn.append(line_chart(title, series, x_label=label))
  return drawn


def _points(run: RunFiles, across: Callable[..., float | None]) -> list[tuple[float, float]]:
  """The logged losses over `across` of the run, a line of its metrics, and the seconds of training up to it."""
  pairs = [
    (across(run, row, seconds), finite(row.get("loss")))
    for row, seconds in zip(run.metrics, training_seconds(run.metrics), strict=True)
  ]
  return [(x, loss) for x, loss in pairs if x is not None and loss is not None]


def _images(run: RunFiles, row: dict[str, Any], seconds: float) -> float | None:
  """Images seen, which metrics of release 0.1.0 do not have."""
  step, images = finite(row.get("step")), finite(row.get("images"))
  return step * _config(run).data.batch_size if images is None and step is not None else images


def _grids(runs: _Runs) -> dict[str, Any]:
  """The sample grids of the latest step that all runs have; if there is none, the latest of each."""
  grids = {name: run.grids() for name, run in runs.items()}
  common = max(set.intersection(*map(set, grids.values())), default=None)
  shown: list[Picture | None] = []
  for name, run in runs.items():
    if (step := max(grids[name], default=None) if common is None else common) is not None:
      caption = f"{name}, step {step:,}"
      shown.append(run.picture(grids[name][step], f"Sample grid of {name}", caption, colour=_colour(runs, name)))
  return {"common_step": common, "grids": shown}


def _measures(runs: _Runs) -> Table | None:
  """A row for each evaluated checkpoint, a column for each measure under the same conditions."""
  results, headings = {}, {}
  for i, (name, run) in enumerate(runs.items()):
    data = {"dataset": _value(run, "dataset"), "size": _value(run, "image_size")}
    for step, result in run.results.items():
      results[i, step] = result | {"data": data}
      headings[i, step] = [Cell(name, colour=_colour(runs, name)), Cell(f"{step:,}")]
  found = columns(results)
  if not found:
    return None
  table = measures_table(found, headings, [])
  return table._replace(head=[Cell("Run"), Cell("Step"), *table.head])


def _settings(runs: _Runs) -> Table | None:
  """The settings in which the runs differ."""
  rows = []
  for group in zip(*(config_lib.options(_config(run)) for run in runs.values()), strict=True):
    (section, field, first), values = group[0], [value for _, _, value in group]
    if any(value != first for value in values):
      cells = [Cell(config_lib.flag_text(value) or "empty", best=value != field.default) for value in values]
      rows.append([Cell(field.name, section), *cells])
  return Table([Cell("Setting"), *(Cell(name, colour=_colour(runs, name)) for name in runs)], rows) if rows else None
