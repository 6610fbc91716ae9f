"""Several runs on one page, made from the files of their workdirs alone: see `ddpm_jax.compare`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.report import measures
from ddpm_jax.report import report as report_lib
from ddpm_jax.report.charts import Series, line_chart, running_mean
from ddpm_jax.report.page import COLOURS, Html, decimals, document, finite, join, number, picture, table, tag
from ddpm_jax.workdir.metrics import training_seconds
from ddpm_jax.workdir.storage import write_whole

# Settings without which a loss is of something else.
_OF_LOSS = ("dataset", "split", "image_size", "num_timesteps", "beta_schedule", "beta_start", "beta_end")
_OF_LOSS += ("prediction", "loss", "loss_weighting")
_Points = list[tuple[float, float]]


@dataclasses.dataclass
class _Entry:
  """A run of the page. `name`: what it is called there; `colour`: of its curves."""

  name: str
  run: report_lib.RunFiles
  colour: int

  @property
  def config(self) -> Config:
    """Its settings, which `_read` has made sure of."""
    assert self.run.config is not None
    return self.run.config

  def curve(self, across: Callable[[dict[str, Any], float], float | None]) -> _Points:
    """The loss over whatever `across` makes of a line and its seconds of training; a mean of several lines."""
    points = []
    for row, seconds in zip(self.run.metrics, training_seconds(self.run.metrics), strict=True):
      x, loss = across(row, seconds), finite(row.get("loss"))
      if x is not None and loss is not None:
        points.append((x, loss))
    return list(running_mean(points, report_lib.averaged_over(len(points)))) if points else []

  def grids(self) -> dict[int, pathlib.Path]:
    """Step -> its sample grid."""
    paths = {path.stem.removeprefix("step_"): path for path in (self.run.workdir / "samples").glob("step_*.png")}
    return {int(step): path for step, path in paths.items() if step.isascii() and step.isdecimal()}


def write_comparison(workdirs: Sequence[pathlib.Path], out: pathlib.Path) -> None:
  """Writes or replaces a page about the runs in `workdirs`.

  Raises:
    UserError: there are fewer than two, one is no workdir, or the page cannot be written.
  """
  if len(workdirs) < 2:
    raise UserError("RUN: name the workdirs of two runs or more, such as runs/a runs/b")
  if len({path.resolve() for path in workdirs}) < len(workdirs):
    raise UserError("RUN: one workdir is named twice; name each once")
  names = _names(workdirs)
  entries = [_Entry(names[i], _read(path), i % COLOURS + 1) for i, path in enumerate(workdirs)]
  sections = [*_overview(entries), *_curves(entries), *_grids(entries), *_measures(entries), *_settings(entries)]
  title = f"{len(entries)} runs compared"
  lead = tag("p", ", ".join(entry.name for entry in entries), class_="lead")
  page = document(f"{title} (ddpm_jax)", [tag("h1", title), lead, *_notes(entries), *sections])
  try:
    write_whole(out, page.encode("utf-8", "replace"))
  except OSError as error:
    raise UserError(f"out: cannot write {out} ({error.strerror}); name another file") from error


def _names(workdirs: Sequence[pathlib.Path]) -> list[str]:
  """The shortest ends of the paths that tell them apart."""
  parts = [path.resolve().parts for path in workdirs]
  length = 1
  while len({names[-length:] for names in parts}) < len(parts):
    length += 1
  return ["/".join(names[-length:]).replace("//", "/") for names in parts]


def _read(workdir: pathlib.Path) -> report_lib.RunFiles:
  if not workdir.is_dir():
    raise UserError(f"RUN: there is no folder {workdir}; name the workdir of a run")
  run = report_lib.read_run(workdir)
  if run.config is None:
    reason = run.notes[0].removesuffix(".")
    raise UserError(f"RUN: {workdir} is no workdir ({reason[:1].lower()}{reason[1:]}); name that of a run")
  return run


def _notes(entries: Sequence[_Entry]) -> list[Html]:
  notes = [f"{entry.name}: {note}" for entry in entries for note in entry.run.notes]
  return (
    [tag("div", tag("b", "Notes"), tag("ul", *(tag("li", n) for n in notes)), class_="card notes")] if notes else []
  )


def _overview(entries: Sequence[_Entry]) -> list[Html]:
  """A row for each run: how far it is, and how low its loss."""
  rows = []
  for entry in entries:
    run, train = entry.run, entry.config.train
    losses = [value for _, value in run.points("loss")]
    last = losses[-report_lib.averaged_over(len(losses)) :]
    seconds = max(training_seconds(run.metrics), default=0.0)
    speeds = [value for _, value in run.points("images_per_second")]
    rows.append(
      [
        join([_key(entry), entry.name]),
        join([f"{run.update:,}", tag("small", f" of {train.num_steps:,}")]),
        f"{run.update * entry.config.data.batch_size:,}",
        _time(seconds) if seconds else "",
        number(statistics.median(speeds), 3) if speeds else "",
        number(statistics.fmean(last), 3) if last else "",
      ]
    )
  head = ["Run", "Steps", "Images seen", "Training time", "Images per second", "Loss"]
  remark = (
    "Training time leaves out compilation, checkpoints, sample grids and evaluations. Loss: mean of the last lines."
  )
  return [tag("h2", "Runs"), table(head, rows), tag("p", remark, class_="soft")]


def _key(entry: _Entry) -> Html:
  return tag("span", tag("i", class_=f"c{entry.colour}"), class_="key")


def _time(seconds: float) -> str:
  if seconds >= 5400:
    return f"{seconds / 3600:.1f} h"
  return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _curves(entries: Sequence[_Entry]) -> list[Html]:
  longest = max((training_seconds(entry.run.metrics) or [0.0])[-1] for entry in entries)
  unit, name = (3600, "hours") if longest >= 5400 else (60, "minutes") if longest >= 180 else (1, "seconds")
  drawn = []
  for title, label, across in (
    ("Loss over training steps", "training steps", lambda entry: lambda row, seconds: finite(row.get("step"))),
    ("Loss over images", "images seen", _images),
    (f"Loss over {name} of training", name, lambda entry: lambda row, seconds: seconds / unit),
  ):
    series = [Series(entry.name, entry.curve(across(entry)), entry.colour) for entry in entries]
    drawn.append(line_chart(title, series, x_label=label))
  if not any(drawn):
    return []
  text = "Each a mean over a twentieth of the lines of metrics.jsonl."
  differing = [name for name in _OF_LOSS if len({str(config_lib.values(e.config)[name]) for e in entries}) > 1]
  if differing:
    text += f" The runs differ in {', '.join(differing)}: their losses are of different things, and cannot be compared."
  return [tag("h2", "Loss"), tag("p", text, class_="soft"), tag("div", *drawn, class_="grid wide")]


def _images(entry: _Entry) -> Callable[[dict[str, Any], float], float | None]:
  """Lines of release 0.1.0 do not say how many."""

  def across(row: dict[str, Any], seconds: float) -> float | None:
    step, told = finite(row.get("step")), finite(row.get("images"))
    return step * entry.config.data.batch_size if told is None and step is not None else told

  return across


def _grids(entries: Sequence[_Entry]) -> list[Html]:
  """At the latest step that all have a grid of; where there is none, the latest of each."""
  grids = [entry.grids() for entry in entries]
  common = set.intersection(*map(set, grids))
  text = (
    "Drawn during training with the moving average of the weights (EMA) and raw, each run from the noise of its seed."
  )
  if common:
    chosen = [max(common)] * len(entries)
    text = f"At step {max(common):,}, the latest of which all have a grid. {text}"
  else:
    chosen = [max(steps, default=None) for steps in grids]
    text = f"The latest of each, as there is no step of which all have one. {text}"
  shown = []
  for entry, steps, step in zip(entries, grids, chosen, strict=True):
    if step is not None:
      shown.append(_grid(entry, steps[step], join([_key(entry), f"{entry.name}, step {step:,}"])))
  if not any(shown):
    return []
  return [tag("h2", "Sample grids"), tag("p", text, class_="soft"), tag("div", *shown, class_="grid wide")]


def _grid(entry: _Entry, path: pathlib.Path, caption: Html) -> Html:
  try:
    return picture(path.read_bytes(), f"Sample grid of {entry.name}", caption, large=True)
  except (OSError, ValueError) as error:
    reason = getattr(error, "strerror", None) or error
    return tag("figure", tag("figcaption", caption), tag("p", f"{path.name} {reason}", class_="soft"), class_="card")


def _measures(entries: Sequence[_Entry]) -> list[Html]:
  """A row for each evaluated checkpoint, a column for each measure under the same conditions."""
  found: dict[tuple[str, str, str], measures.Column] = {}
  values: dict[tuple[int, int], dict[tuple[str, str, str], tuple[float, float | None]]] = {}
  for i, entry in enumerate(entries):
    for column in measures.columns(entry.run.evaluations):
      for step, (value, spread, conditions) in column.values.items():
        key = (column.title, column.remark, _of_data(entry, conditions))
        found.setdefault(key, column)
        values.setdefault((i, step), {})[key] = value, spread
  if not found:
    return []
  keys = sorted(found, key=lambda key: [(k[0], k[1]) for k in found].index(key[:2]))
  head = ["Run", "Step"]
  for key in keys:
    alike = [other for other in keys if other[:2] == key[:2]]
    how = _differences(key[2], [other[2] for other in alike])
    column = found[key]
    arrow = {"lower": "\N{NO-BREAK SPACE}↓", "higher": "\N{NO-BREAK SPACE}↑"}.get(column.better, "")
    head.append(join([f"{column.title}{arrow}", tag("small", "; ".join(filter(None, [column.remark, how])))]))
  rows = []
  for (i, step), here in sorted(values.items()):
    cells = [join([_key(entries[i]), entries[i].name]), f"{step:,}"]
    for key in keys:
      column = [other[key][0] for other in values.values() if key in other]
      better = {"lower": min, "higher": max}.get(found[key].better)
      if key not in here:
        cells.append(tag("td"))
        continue
      value, spread = here[key]
      best = better is not None and len(column) > 1 and value == better(column)
      margin = tag("small", f" ± {number(spread, 2)}") if spread is not None else None
      cells.append(tag("td", f"{value:.{decimals(column)}f}", margin, class_="best" if best else None))
    rows.append(cells)
  text = (
    "↓ lower is better, ↑ higher is better; the best value of a column is shaded. What was measured in another way, by "
    "another number of samples, sampler, reference or features, has a column of its own."
  )
  return [tag("h2", "Measures"), table(head, rows), tag("p", text, class_="soft")]


def _of_data(entry: _Entry, conditions: str) -> str:
  """The conditions with the data, where they do not say of which they are: within one run there is only one."""
  told, data = json.loads(conditions), entry.config.data
  return json.dumps(
    told if "reference" in told else told | {"data": {"dataset": data.dataset, "size": data.image_size}}
  )


def _differences(conditions: str, all_of_them: Sequence[str]) -> str:
  """In what these conditions differ from others of the same measure, as text."""
  mine, *others = (_flat(json.loads(text)) for text in (conditions, *all_of_them))
  names = [name for name in mine if any(other.get(name) != mine[name] for other in others)]
  return ", ".join(f"no {name}" if mine[name] is None else f"{name} {str(mine[name])[:24]}" for name in names)


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
  """The leaves of conditions, by the names on the way to them."""
  if isinstance(tree, dict):
    return {key: value for part, inner in tree.items() for key, value in _flat(inner, f"{name} {part}".strip()).items()}
  return {name: tree}


def _settings(entries: Sequence[_Entry]) -> list[Html]:
  """The settings in which the runs differ."""
  rows = []
  for group in zip(*(config_lib.options(entry.config) for entry in entries), strict=True):
    (section, field, _), told = group[0], [value for _, _, value in group]
    if any(value != told[0] for value in told):
      texts = [config_lib.flag_text(value) or "empty" for value in told]
      cells = [
        tag("td", text, class_="best" if value != field.default else None)
        for text, value in zip(texts, told, strict=True)
      ]
      rows.append([join([field.name, tag("small", f" {section}")]), *cells])
  if not rows:
    return [tag("h2", "Settings"), tag("p", "The runs have the same settings.", class_="soft")]
  head = ["Setting", *(join([_key(entry), entry.name]) for entry in entries)]
  text = "Those in which the runs differ; values other than the default are shaded."
  return [tag("h2", "Settings"), tag("p", text, class_="soft"), table(head, rows)]
