"""The report of a run, `report.html`: made from the files of its workdir alone, for people to look at and pass on.

The same files give the same page. What is missing is left out; what cannot be read is listed at the top.
"""

from __future__ import annotations

import math
import pathlib
from typing import Any

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.evaluation.summary import (
  YARDSTICKS,
  Column,
  Result,
  by_class,
  columns,
  decimals,
  duration,
  finite,
  guidance_of,
  in_words,
  number,
  part,
  sweep,
  title_of,
  yardsticks,
)
from ddpm_jax.report import charts
from ddpm_jax.report.charts import Chart, Series, line_chart, smoothed
from ddpm_jax.report.files import RunFiles, read_run
from ddpm_jax.report.page import Cell, Table, measures_table, write_page
from ddpm_jax.workdir import grids
from ddpm_jax.workdir.stage_facts import StageFacts
from ddpm_jax.workdir.storage import write_whole

_MOST_PICTURES = 8  # grids, and pictures of an evaluation
_DRAWN = {
  "samples": "Samples, as --mode=sample drew them last",
  "progressive": "Progressive generation: the estimate of x0 along the way",
  "interpolate": "Interpolation between pairs of images",
  "slerp": "Interpolation between pairs of noises",
  "inpaint": "Inpainting",
  "reconstruct": "Reconstruction: images encoded to noise and decoded",
}
_MEASURED = {
  "samples": "Samples that were measured",
  "neighbours": "Samples and their nearest training images",
  "reconstructions": "Images, and below each its reconstruction",
  "worst": "The images that are reconstructed worst, by PSNR, and below each its reconstruction",
}
_DISTANCES = ("fid", "classifier_distance", "network_distance")
_TERMS = ("total", "prior", "chain", "decoder", "rate", "distortion")
_MOST_TERMS = 12  # charts of the terms of a loss


def write_report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes or replaces `report.html`, and `loss.png` where there are metrics. Returns the path of the page.

  Files that are missing, damaged, or still being written are no error: the page shows the others.

  Raises:
    OSError: if one of them cannot be written.
  """
  run = read_run(workdir)
  found, path = columns(run.results), workdir / "report.html"
  write_page(
    path,
    "report.html",
    name=workdir.resolve().name,
    config=run.config,
    lead=_lead(run.config, run.stage),
    tiles=_tiles(run, found),
    sections=_pictures(run),
    training=_training(run),
    measured=_measured(run, found),
    settings=_settings(run.config, run.stage) if run.config else {},
    flags=run.text("flags.txt"),
    notes=run.notes,  # of all of the above
  )
  if run.metrics:
    write_whole(workdir / "loss.png", charts.loss_png(run.points("loss")))
  return path


def _lead(config: Config | None, stage: StageFacts | None) -> str:
  """What the page is about, a sentence. `stage`: the first stage of a latent model, as far as it is known."""
  if config is None:
    return "A training run."
  model, own = config.model, config.autoencoder
  levels = f"{number(model.channels)} channels ({' : '.join(map(str, model.channel_multipliers))})"
  images = f"of {config.data.dataset} ({config.data.split})"
  batches = f"batches of {number(config.data.batch_size)} images."
  if model.stage == "autoencoder":
    kind = f"codebook of {number(own.codebook_size)} vectors" if own.regularizer == "vq" else "KL"
    factor = 2 ** (len(model.channel_multipliers) - 1)
    return (
      f"Autoencoder, the first stage of latent diffusion, {images}: {levels}, latents of 1/{factor} of the height and "
      f"width with {number(own.latent_channels)} channels, {kind}, {batches}"
    )
  schedule = f"T = {number(config.diffusion.num_timesteps)}, {config.diffusion.beta_schedule} schedule"
  latent = bool(config.diffusion.first_stage)
  latents = f"latents of {stage.text}, " if stage else ""
  if model.stage == "classifier":
    return f"Classifier of noisy {'latents of ' * latent}images {images}: {latents}{levels}, {schedule}, {batches}"
  kind = "Latent diffusion model" if latent else "Denoising diffusion probabilistic model"
  of = ", ".join(filter(None, (images, config_lib.conditioning_text(config))))
  return f"{kind} {of}: {latents}U-Net with {levels}, {schedule}, {config.diffusion.prediction} prediction, {batches}"


def write_guidance_chart(workdir: pathlib.Path, result: Result) -> list[pathlib.Path]:
  """Writes or replaces `eval/N.guidance.png` for a result that compares guidance scales.

  Returns:
    Its path; [] if there is nothing to draw.

  Raises:
    OSError: if it cannot be written.
  """
  title, series = _guidance(result)
  if not series:
    return []
  path = workdir / "eval" / f"{result['step']}.guidance.png"
  write_whole(path, charts.chart_png(f"{title} over", series, "precision, recall", log_y=False))
  return [path]


def _guidance(result: Result) -> tuple[str, list[Series]]:
  """The distance over precision and over recall, a point for each guidance scale; ('', []) where these are missing."""
  scales = sweep(result)
  names = [name for one in scales.values() for name in part(one, "measures") if name in _DISTANCES]
  series = []
  for i, across in enumerate(("precision", "recall")):
    points = {}
    for scale, one in scales.items():
      x, y = (finite(part(one, "measures").get(name)) for name in (across, names[0] if names else ""))
      if x is not None and y is not None:
        points[number(scale)] = (x, y)
    if points:
      series.append(Series(across, list(points.values()), i + 1, marks=True, labels=list(points)))
  return (title_of(names[0]), series) if series else ("", [])


def _guided(step: int, result: Result) -> dict[str, Any]:
  """The table and the chart of guidance scales; {} if the result has but one."""
  scales = sweep(result)
  if not scales:
    return {}
  found = columns(scales)
  beside = [yardsticks(result).get(column.name, {}) for column in found]
  table = measures_table(found, {scale: [Cell(number(scale))] for scale in scales}, beside)
  title, series = _guidance(result)
  remark = "each point is a guidance scale; a good model is low and on the right"
  return {
    "step": step,
    "table": table._replace(head=[Cell("Guidance scale"), *table.head]),
    "charts": [line_chart(title, series, x_label="precision, recall", remark=remark, log_y=False)],
  }


def _tiles(run: RunFiles, found: list[Column]) -> list[tuple[str, str, str]]:
  """The numbers at the top: label, value, remark."""
  shown = []
  if run.config and run.step:
    total, batch = run.config.train.num_steps, run.config.data.batch_size
    shown.append(("Training steps", number(run.step), f"of {total:,} ({100 * run.step / total:.0f}%)"))
    shown.append(("Images seen", number(run.step * batch), f"batches of {batch:,}"))
  if run.speed:
    shown.append(("Images per second", number(run.speed, 3), "median over the run"))
  if run.seconds:
    shown.append(("Training time", duration(run.seconds), "without compilation, saving and sampling"))
  if run.loss:
    loss, count = run.loss
    shown.append(("Loss", number(loss, 3), f"mean of the last {count} logged" if count > 1 else "last logged"))
  for column in _newest(found):
    is_shown = column.title in ("FID", "Bits/dim") or column.title.startswith(("PSNR", "SSIM", "LPIPS", "rFID"))
    if is_shown or column.title.lower().endswith(("distance", "score", "accuracy", "perplexity")):
      step = max(column.values) if column.best is None else column.best
      texts = [column.remark, f"{'' if column.best is None else 'best, '}step {step:,}"]
      texts += [f"{YARDSTICKS[kind][1]} {number(value, 3)}" for kind, value in _yardsticks(run, column).items()]
      shown.append((column.title, number(column.values[step][0]), "; ".join(texts)))
  return shown


def _newest(found: list[Column]) -> list[Column]:
  """Of columns of one measure, that of the newest result."""
  newest: dict[tuple[str, str], Column] = {}
  for column in found:
    other = newest.setdefault((column.name, column.remark), column)
    if max(column.values) > max(other.values):
      newest[column.name, column.remark] = column
  return list(newest.values())


def _yardsticks(run: RunFiles, column: Column) -> dict[str, float]:
  return yardsticks(run.results[max(column.values)]).get(column.name, {})


def _training(run: RunFiles) -> list[Chart | None]:
  return [
    line_chart("Loss", smoothed("logged", run.points("loss"))),
    *_terms_of_the_loss(run),
    line_chart("Gradient norm", smoothed("logged", run.points("grad_norm"))),
    line_chart("Images per second", [Series("", run.points("images_per_second"))], log_y=False),
    line_chart("Learning rate", [Series("", run.points("learning_rate"))], log_y=False),
  ]


def _terms_of_the_loss(run: RunFiles) -> list[Chart | None]:
  """Where a loss has several, and the numbers of each example, as far as they are logged."""
  remarks, drawn = {"loss": "term of the loss", "mean": "mean over the batch"}, []
  names = dict.fromkeys(name for row in run.metrics for name in row)
  for name in names:
    kind, slash, what = name.partition("/")
    if slash and kind in remarks:
      remark = "share of the codebook" if what == "codes_used" else remarks[kind]
      drawn.append(line_chart(title_of(what), smoothed("logged", run.points(name)), remark=remark))
  return drawn[:_MOST_TERMS]


def _pictures(run: RunFiles) -> list[dict[str, Any]]:
  """The sample grids of the training, and what was sampled later: first the one of the newer step."""
  steps = sorted(run.grids(), reverse=True)
  if len(steps) > _MOST_PICTURES:
    steps = [steps[round(i * (len(steps) - 1) / (_MOST_PICTURES - 1))] for i in range(_MOST_PICTURES)]
  shown = []
  for step in steps:
    caption = f"Step {step:,}{_older(run, step) if step == steps[0] else ''}"
    shown.append(run.picture(run.grids()[step], f"Sample grid, step {step:,}", caption, step == steps[0]))
  title = "Samples over the run"
  text = "Drawn during training from the same noise each time, with the moving average of the weights (EMA) and raw."
  if run.config and run.config.model.stage == "autoencoder":
    title, text = "Reconstructions over the run", "The same images each time, and below each its reconstruction."
  during = {"title": title, "text": text, "pictures": shown}
  shown, newest = [], 0
  for name, title in _DRAWN.items():
    facts = grids.facts_of(run.workdir / "samples" / f"{name}.png")
    step = facts.get("checkpoint")
    caption = f"{title}: unknown step"
    if isinstance(step, int):
      newest = max(newest, step)
      how = [f"{facts[key]}{unit}" for key, unit in (("sample_weights", " weights"), ("sampler", "")) if key in facts]
      caption = f"{title}: {', '.join([f'step {step:,}', *how])}{_older(run, step)}"
    shown += [run.picture(f"samples/{name}{ending}", title, caption) for ending in (".png", ".gif")]
  drawn = {"title": "Sampled with the trained weights", "pictures": shown}
  return [during, drawn] if steps and steps[0] > newest else [drawn, during]


def _older(run: RunFiles, step: int) -> str:
  """For a caption of a picture that is older than the newest checkpoint."""
  newest = run.newest_checkpoint
  return f"; older than the newest checkpoint, {newest:,}" if step < newest else ""


def _measured(run: RunFiles, found: list[Column]) -> dict[str, Any]:
  """What the results say, and how the newest was measured."""
  if not run.results:
    return {}
  step, newest = max(run.results), run.results[max(run.results)]
  beside, pictures = [_yardsticks(run, column) for column in found], []
  texts = [
    in_words(column.title, column.name, column.values[max(column.values)][0], others)
    for column in _newest(found)
    if (others := _yardsticks(run, column))
  ]
  for name, path in list(part(newest, "pictures").items())[:_MOST_PICTURES]:
    what, _, scale = name.partition("_")
    title = f"{_MEASURED[what]}, guidance scale {scale}" if scale and what in _MEASURED else _MEASURED.get(name, name)
    caption = f"{title}, step {step:,}{_older(run, step)}"
    pictures += [run.picture(path, caption, caption)] if isinstance(path, str) else []
  table = measures_table(found, {step: [Cell(f"{step:,}")] for step in run.results}, beside)
  return {
    "newest": newest,
    "sentence": " ".join(text for i, text in enumerate(texts) if not i or "nothing" in text),
    "without_yardsticks": not all(beside),
    "table": table._replace(head=[Cell("Step"), *table.head]) if found else None,
    "charts": _over_steps(found),
    "how": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in guidance_of(newest).items()),
    "guidance": _guided(step, newest),
    "classes": _terms(by_class(newest)),
    "by_timestep": _by_timestep(part(newest, "bits_per_dim") or part(newest, "latent_bits_per_dim")),
    "bound": _terms(part(newest, "bits_per_dim") or part(newest, "latent_bits_per_dim")),
    "ode": _terms(part(newest, "ode_bits_per_dim") or part(newest, "ode_latent_bits_per_dim")),
    "neighbours": _terms(part(newest, "neighbours")),
    "latents": _terms(_channels(newest)),
    "is_autoencoder": bool(part(newest, "reconstruction") or part(newest, "latents")),
    "pictures": pictures,
  }


def _channels(result: Result) -> dict[str, Any]:
  """What is known of the latents of each split and channel."""
  splits = part(result, "latents")
  return {
    f"{split}, channel {channel}": numbers
    for split in splits
    for channel, numbers in part(splits, split, "channels").items()
  }


def _over_steps(found: list[Column]) -> list[Chart | None]:
  """A small chart for each measure of several checkpoints."""
  drawn = []
  for column in found:
    points = sorted((step, value) for step, (value, _) in column.values.items())
    remark = "; ".join(filter(None, (column.remark, column.how, column.better and f"{column.better} is better")))
    series = [Series(column.title, points, marks=True)]
    drawn.append(line_chart(column.title, series, remark=remark, log_y=False, size=(290, 160)) if points[1:] else None)
  return drawn


def _terms(groups: dict[str, Any]) -> Table | None:
  """A row for each group, a column for each number that any of them has."""
  rows: dict[str, dict[str, float]] = {}
  for name in groups:
    pairs = ((key, finite(value)) for key, value in part(groups, name).items())
    rows[name] = {key: value for key, value in pairs if value is not None}
  keys = list(dict.fromkeys(key for row in rows.values() for key in row))
  keys = [key for key in keys if key != "standard_error" or "total" not in keys]
  keys.sort(key=lambda key: _TERMS.index(key) if key in _TERMS else len(_TERMS))
  cells = [[Cell(name)] for name in rows]
  for key in keys:
    known = [row[key] for row in rows.values() if key in row]
    integers = all(value == int(value) for value in known) and key not in _TERMS
    for line, row in zip(cells, rows.values(), strict=True):
      error, value = row.get("standard_error") if key == "total" else None, row.get(key)
      text = "" if value is None else number(value) if integers else f"{value:.{decimals(known)}f}"
      line.append(Cell(text, "" if error is None else f"± {number(error, 2)}"))
  return Table([Cell(), *(Cell(title_of(key)) for key in keys)], cells) if keys else None


def _by_timestep(splits: dict[str, Any]) -> list[Chart | None]:
  """The bits and the error of the predicted noise over the timesteps."""
  drawn = []
  for title, key, remark in (
    ("Bits/dim of one timestep", "bits", "mean over each range of timesteps"),
    ("Squared error of the noise", "eps_mse", "mean over each range of timesteps"),
  ):
    series = []
    for i, (split, terms) in enumerate(splits.items()):
      lists = [part(terms, "by_timestep").get(name) for name in ("t_low", "t_high", key)]
      triples = zip(*(values if isinstance(values, list) else [] for values in lists), strict=False)
      points = []
      for low, high, y in ([finite(value) for value in triple] for triple in triples):
        if low is not None and high is not None and y is not None and 0 < low <= high:
          points.append((math.sqrt(low * high), y))
      points.sort()
      series.append(Series(split, points, colour=i % charts.COLOURS + 1, marks=len(points) <= 60))
    drawn.append(line_chart(title, series, x_label="timestep t", remark=remark, log_x=True, log_y=True))
  return drawn


def _settings(config: Config, stage: StageFacts | None) -> dict[str, list[dict[str, Any]]]:
  """Section -> its options that have an effect: name, value, default if it differs, and help.

  What is known of the first stage of a latent model stands where an autoencoder has its options.
  """
  shown: dict[str, list[dict[str, Any]]] = {}
  idle = config_lib.without_effect(config)
  for (section, field, value), (_, _, default) in zip(
    config_lib.options(config), config_lib.options(Config()), strict=True
  ):
    if section == "autoencoder" and stage:
      shown["first stage"] = [
        {"name": name, "value": text, "help": what, "default": None}
        for name, text, what in (
          ("kind", stage.kind, "What turns images into latents, and latents into images."),
          ("latents", stage.shape, "Height, width and channels of the latents of an image."),
          ("digest", stage.digest, "First digits of the SHA-256 of its parameters."),
        )
      ]
    if field.name in idle or (section == "sample" and config.model.stage != "denoiser"):  # the others draw nothing
      continue
    row = {"name": field.name, "value": config_lib.flag_text(value), "help": field.metadata["help"]}
    row["default"] = None if value == default else config_lib.flag_text(default) or "empty"
    shown.setdefault(section, []).append(row)
  return shown
