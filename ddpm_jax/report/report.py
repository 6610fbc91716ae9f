"""A run on one page: `report.html`, made from the files of a workdir alone, for people to look at and pass on.

The page is one file without scripts that opens from disk: pictures are data URIs, charts inline SVG. The same files
give the same page. Whatever is missing is left out; what is there and cannot be read is told at the top.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
from typing import Any

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.report.charts import Series, line_chart, running_mean
from ddpm_jax.report.measures import completed, measured, part, tiles
from ddpm_jax.report.page import Html, document, finite, join, number, picture, tag, tile
from ddpm_jax.workdir import grids
from ddpm_jax.workdir.metrics import training_seconds
from ddpm_jax.workdir.storage import write_whole

NAME = "report.html"

_MOST_GRIDS = 8
_MOST_MEASURED_PICTURES = 8
_DRAWN = {
  "samples": "Samples, as --mode=sample drew them last",
  "progressive": "Progressive generation: the estimate of x0 along the way",
  "interpolate": "Interpolation between pairs of images",
  "slerp": "Interpolation between pairs of noises",
  "inpaint": "Inpainting",
  "reconstruct": "Reconstruction: images encoded to noise and decoded",
}
_MEASURED = {"samples": "Samples that were measured", "neighbours": "Samples and their nearest images of the training"}


@dataclasses.dataclass
class RunFiles:
  """What the files of a workdir say. `notes` are for the reader: what could not be read, and what went wrong."""

  workdir: pathlib.Path
  notes: list[str]
  config: Config | None = None
  metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def text(self, name: str) -> str | None:
    """A file's text; None if it is missing, or cannot be read."""
    try:
      return (self.workdir / name).read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
      return None
    except OSError as error:
      self.notes.append(f"{name} cannot be read: {error.strerror}.")
      return None

  def points(self, key: str) -> list[tuple[float, float]]:
    """A metric over the updates, without those that are missing or not finite."""
    pairs = ((finite(row.get("step")), finite(row.get(key))) for row in self.metrics)
    return [(step, value) for step, value in pairs if step is not None and value is not None]

  @property
  def newest(self) -> int:
    """The newest checkpoint; 0 if there is none."""
    names = [path.name for path in (self.workdir / "checkpoints").glob("[0-9]*")]
    return max((int(name) for name in names if name.isascii() and name.isdecimal()), default=0)

  def older(self, step: int) -> str:
    """For a caption: that a picture is not of the newest checkpoint, if it is older."""
    return f"; older than the newest checkpoint, {self.newest:,}" if step < self.newest else ""

  @property
  def update(self) -> int:
    """The last update that the files know of."""
    logged = [step for step, _ in self.points("step")]
    return max((*map(int, logged), *(evaluation["step"] for evaluation in self.evaluations)), default=0)


def write_report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes or replaces `workdir/report.html`, a page about the run in `workdir`, and returns its path.

  Files that are missing, damaged, or still being written are no error: the page shows what there is.

  Raises:
    OSError: if the page cannot be written.
  """
  run = read_run(workdir)
  sections = [*_samples(run), *_training(run), *measured(run.evaluations), *_measured_pictures(run), *_settings(run)]
  dataset = run.config.data.dataset if run.config else "unknown data"
  name = workdir.resolve().name
  body = [tag("h1", f"{dataset}: {name}"), tag("p", _lead(run), class_="lead"), *_tiles(run), *_notes(run), *sections]
  page = document(f"{dataset}: {name} (ddpm_jax)", body)
  write_whole(workdir / NAME, page.encode("utf-8", "replace"))
  return workdir / NAME


def read_run(workdir: pathlib.Path) -> RunFiles:
  """What the files of a workdir say, as far as they can be read; the rest is in its `notes`."""
  run = RunFiles(workdir, [])
  _read(run)
  return run


def _read(run: RunFiles) -> None:
  """Reads configuration, metrics and evaluations."""
  text = run.text("config.json")
  if text is None:
    run.notes.append("There is no config.json.")
  else:
    try:
      run.config = config_lib.from_json(text)
    except (UserError, RecursionError) as error:
      run.notes.append(f"The settings cannot be read: {error}.")
  lines = (run.text("metrics.jsonl") or "").split("\n")[:-1]  # a last line without its end is still being written
  rows = [_json(line) for line in lines]
  run.metrics = [row for row in rows if isinstance(row, dict)]
  if len(rows) > len(run.metrics):
    run.notes.append(f"metrics.jsonl has damaged lines, which are left out: {len(rows) - len(run.metrics)}.")
  for what, key in (("Updates that were not finite, and so not applied", "nonfinite"), ("Bad records", "bad_records")):
    count = max((value for _, value in run.points(key)), default=0)
    if count:
      run.notes.append(f"{what}: {number(count)}.")
  for path in sorted((run.workdir / "eval").glob("*.json")):
    if path.stem.isdecimal():
      evaluation = _json(run.text(f"eval/{path.name}") or "")
      step = evaluation.get("step") if isinstance(evaluation, dict) else None
      if isinstance(step, int) and 0 <= step < 1e15 and isinstance(evaluation, dict):
        dtype = run.config.model.dtype if run.config else "unknown"
        run.evaluations.append(completed({**evaluation, "step": int(step)}, dtype))
      else:
        run.notes.append(f"eval/{path.name} is damaged, and left out.")
  run.evaluations.sort(key=lambda evaluation: evaluation["step"])
  warnings = run.evaluations[-1].get("warnings") if run.evaluations else None
  for warning in warnings if isinstance(warnings, list) else ():
    run.notes.append(f"{str(warning)[:1].upper()}{str(warning)[1:]}.")


def _json(text: str) -> Any:
  """What a JSON text says; None if it is none."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return None


def _lead(run: RunFiles) -> str:
  """One sentence on what was trained."""
  if run.config is None:
    return "Denoising diffusion probabilistic model."
  diffusion, model, data = run.config.diffusion, run.config.model, run.config.data
  return (
    f"Denoising diffusion probabilistic model of {data.dataset} ({data.split}): U-Net with {model.channels} channels "
    f"({' : '.join(map(str, model.channel_multipliers))}), T = {diffusion.num_timesteps:,}, {diffusion.beta_schedule} "
    f"schedule, {diffusion.prediction} prediction, batches of {data.batch_size:,} images."
  )


def _tiles(run: RunFiles) -> list[Html]:
  """The numbers at the top."""
  shown = []
  if run.config and run.update:
    total = run.config.train.num_steps
    shown.append(tile("Updates", number(run.update), f"of {total:,} ({100 * run.update / total:.0f}%)"))
    seen = run.update * run.config.data.batch_size
    shown.append(tile("Images seen", number(seen), f"batches of {run.config.data.batch_size:,}"))
  elif run.update:
    shown.append(tile("Updates", number(run.update)))
  speeds = [value for _, value in run.points("images_per_second")]
  if speeds:
    shown.append(tile("Images per second", number(statistics.median(speeds), 3), "median over the run"))
  seconds = max(training_seconds(run.metrics), default=0.0)
  if seconds:
    hours = f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"
    shown.append(tile("Training time", hours if seconds >= 90 else f"{seconds:.0f} s", "without saving and drawing"))
  losses = [value for _, value in run.points("loss")]
  if losses:
    last = losses[-averaged_over(len(losses)) :]
    detail = f"mean of the last {len(last)} logged" if len(last) > 1 else "last logged"
    shown.append(tile("Loss", number(statistics.fmean(last), 3), detail))
  shown += tiles(run.evaluations)
  return [tag("div", *shown, class_="grid tiles")] if shown else []


def _notes(run: RunFiles) -> list[Html]:
  if not run.notes:
    return []
  return [tag("div", tag("b", "Notes"), tag("ul", *(tag("li", note) for note in run.notes)), class_="card notes")]


def averaged_over(points: int) -> int:
  """Over how many points a noisy metric is averaged."""
  return max(1, points // 20)


def _training(run: RunFiles) -> list[Html]:
  """Charts of what was logged."""
  drawn = []
  for title, key, noisy in (
    ("Loss", "loss", True),
    ("Gradient norm", "grad_norm", True),
    ("Images per second", "images_per_second", False),
    ("Learning rate", "learning_rate", False),
  ):
    points = run.points(key)
    window = averaged_over(len(points)) if noisy else 1
    series = [Series(title, points)]
    if window > 1:
      mean = Series(f"mean of {window} logged", running_mean(points, window))
      series = [Series("logged", points, dots=True), mean]
    drawn.append(line_chart(title, series, log_y=None if noisy else False))
  if not any(drawn):
    return []
  return [tag("h2", "Training"), tag("div", *drawn, class_="grid wide")]


def _picture(run: RunFiles, name: str, alt: str, caption: str, large: bool = True) -> Html | None:
  """A picture of the workdir; None if it is missing, lies elsewhere or is none."""
  try:
    path = (run.workdir / name).resolve()
    if not path.is_relative_to(run.workdir.resolve()):
      raise ValueError("is outside of the workdir")
    return picture(path.read_bytes(), alt, caption, large)
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    run.notes.append(f"{name}: left out, as it {getattr(error, 'strerror', None) or error}.")
    return None


def _samples(run: RunFiles) -> list[Html]:
  """What was drawn by command and while it trained, the newest first: of the same update, what was asked for."""
  files = [run.workdir / "samples" / f"{name}.png" for name in _DRAWN]
  drawn = max((step for step in map(_step_of, map(grids.facts_of, files)) if step is not None), default=0)
  previews = [path.stem.removeprefix("step_") for path in (run.workdir / "samples").glob("step_*.png")]
  newest = max((int(step) for step in previews if step.isdecimal()), default=0)
  return [*_grids(run), *_drawn(run)] if newest > drawn else [*_drawn(run), *_grids(run)]


def _grids(run: RunFiles) -> list[Html]:
  """Sample grids over the run from the newest back, that one large."""
  paths = sorted((run.workdir / "samples").glob("step_*.png"), reverse=True)
  if len(paths) > _MOST_GRIDS:
    paths = [paths[round(i * (len(paths) - 1) / (_MOST_GRIDS - 1))] for i in range(_MOST_GRIDS)]
  shown = []
  for path in paths:
    step = path.stem.removeprefix("step_")
    at = f"Update {int(step):,}" if step.isdecimal() else path.stem
    large = path is paths[0]
    caption = at + (run.older(int(step)) if large and step.isdecimal() else "")
    shown.append(_picture(run, f"samples/{path.name}", f"Sample grid, {at.lower()}", caption, large))
  if not any(shown):
    return []
  last, *before = shown
  earlier = tag("div", *before, class_="grid wide") if any(before) else None
  text = "Drawn during training from the same noise each time, with the moving average of the weights (EMA) and raw."
  return [tag("h2", "Samples over the run"), tag("p", text, class_="soft"), join([last, "\n", earlier])]


def _drawn(run: RunFiles) -> list[Html]:
  """What --mode=sample left."""
  shown = []
  for name, what in _DRAWN.items():
    caption = f"{what}: {_of(run, grids.facts_of(run.workdir / 'samples' / f'{name}.png'))}"
    for ending in (".png", ".gif"):
      shown.append(_picture(run, f"samples/{name}{ending}", what, caption))
  found = [figure for figure in shown if figure]
  return [tag("h2", "Drawn with the trained weights"), tag("div", *found, class_="row")] if found else []


def _step_of(facts: dict[str, Any]) -> int | None:
  """The update of the weights that drew a picture, if it says so."""
  step = facts.get("checkpoint")
  return step if isinstance(step, int) and not isinstance(step, bool) else None


def _of(run: RunFiles, facts: dict[str, Any]) -> str:
  """What a picture is of, as far as it says."""
  step = _step_of(facts)
  if step is None:
    return "it does not say of which update"
  how = [f"{facts[name]}{unit}" for name, unit in (("sample_weights", " weights"), ("sampler", "")) if name in facts]
  return f"{', '.join([f'update {step:,}', *how])}{run.older(step)}"


def _measured_pictures(run: RunFiles) -> list[Html]:
  """The pictures of the newest evaluation."""
  newest = run.evaluations[-1] if run.evaluations else {}
  shown = []
  for name, path in list(part(newest, "pictures").items())[:_MOST_MEASURED_PICTURES]:
    caption = f"{_MEASURED.get(name, name)}, update {newest['step']:,}{run.older(newest['step'])}"
    if isinstance(path, str):
      shown.append(_picture(run, path, caption, caption))
  return [tag("h3", "Pictures"), tag("div", *shown, class_="row")] if any(shown) else []


def _settings(run: RunFiles) -> list[Html]:
  """Every setting, those that differ from the defaults marked, and how to repeat the run."""
  shown = []
  if run.config:
    sections: dict[str, list[Html]] = {}
    changed = 0
    for (section, field, value), (_, _, default) in zip(
      config_lib.options(run.config), config_lib.options(Config()), strict=True
    ):
      differs = value != default
      changed += differs
      usual = tag("small", f"default: {config_lib.flag_text(default) or 'empty'}", class_="soft") if differs else None
      cells = [tag("td", field.name), tag("td", config_lib.flag_text(value), usual)]
      row = tag("tr", *cells, class_="changed" if differs else None, title=field.metadata["help"])
      sections.setdefault(section, []).append(row)
    cards = [
      tag("div", tag("h3", name), tag("table", tag("tbody", *rows)), class_="card") for name, rows in sections.items()
    ]
    text = f"{changed} differ from the defaults, and are shaded. What a setting means appears on pointing at it."
    shown += [tag("h2", "Settings"), tag("p", text, class_="soft"), tag("div", *cards, class_="settings")]
  flags = run.text("flags.txt")
  if flags is not None:
    command = "python -m ddpm_jax.main --flagfile=flags.txt --workdir=NEW"
    shown += [tag("h2", "How to repeat it"), tag("pre", command)]
    shown.append(tag("details", tag("summary", "flags.txt"), tag("pre", flags)))
  return shown
