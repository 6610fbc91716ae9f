"""The files of a workdir as a page needs them: numbers, pictures, and notes on what cannot be read."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import pathlib
import statistics
from typing import Any, NamedTuple

from PIL import Image

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.summary import Result, completed, finite, number
from ddpm_jax.report.charts import averaging_window
from ddpm_jax.workdir.metrics import training_seconds
from ddpm_jax.workdir.stage_facts import StageFacts, facts_of_settings

_EMBED_AS_IS = 1 << 20  # bytes of a picture; a larger one is embedded as a JPEG of at most so many pixels a side
_LONGEST_SIDE = {True: 1600, False: 640}  # if it is shown large, and if not
_LARGEST_ANIMATION = 4 << 20  # bytes
_ROOM = 1150, 600  # pixels; a large picture is enlarged by a whole factor as far as this has room
_WIDE = 640  # pixels; a picture of this width is not made to fit a narrow screen, where it could not be made out


class Picture(NamedTuple):
  """A picture with its own data. `width` and `height`: in pixels of the page."""

  source: str
  alt: str
  caption: str
  width: int
  height: int
  large: bool
  pixelated: bool
  wide: bool
  colour: int


@dataclasses.dataclass
class RunFiles:
  """A workdir. `notes` are for the reader: what could not be read, and what went wrong."""

  workdir: pathlib.Path
  notes: list[str] = dataclasses.field(default_factory=list)
  config: Config | None = None
  stage: StageFacts | None = None  # of a latent model, as far as its workdir says it
  metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  results: dict[int, Result] = dataclasses.field(default_factory=dict)  # by step, in order

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
    """A metric over the training steps, without values that are missing or not finite."""
    pairs = ((finite(row.get("step")), finite(row.get(key))) for row in self.metrics)
    return [(step, value) for step, value in pairs if step is not None and value is not None]

  @property
  def step(self) -> int:
    """The last training step in the files."""
    return max((*(int(step) for step, _ in self.points("step")), *self.results), default=0)

  @property
  def first_stage(self) -> str:
    """What tells the first stages of runs of latents apart; '' for pixels."""
    if self.config is None or not self.config.diffusion.first_stage:
      return ""
    return self.stage.sha256 if self.stage else self.config.diffusion.first_stage

  @property
  def newest_checkpoint(self) -> int:
    """Its step; 0 if there is none."""
    names = [path.name for path in (self.workdir / "checkpoints").glob("[0-9]*")]
    return max((int(name) for name in names if name.isascii() and name.isdecimal()), default=0)

  @property
  def seconds(self) -> float:
    """Of training."""
    return max(training_seconds(self.metrics), default=0.0)

  @property
  def speed(self) -> float | None:
    """Images per second: the median over the run."""
    return statistics.median(y for _, y in self.points("images_per_second") or [(0, 0)]) or None

  @property
  def loss(self) -> tuple[float, int] | None:
    """The mean of the last logged losses, and of how many; None if there is none."""
    losses = [value for _, value in self.points("loss")]
    last = losses[-averaging_window(len(losses)) :]
    return (statistics.fmean(last), len(last)) if last else None

  def grids(self) -> dict[int, str]:
    """Step -> name of its sample grid, in order."""
    names = {path.stem.removeprefix("step_"): path.name for path in (self.workdir / "samples").glob("step_*.png")}
    return {int(step): f"samples/{names[step]}" for step in sorted(names) if step.isascii() and step.isdecimal()}

  def picture(self, name: str, alt: str, caption: str, large: bool = True, colour: int = 0) -> Picture | None:
    """A picture of the workdir; None if it is missing, or with a note if it lies elsewhere or cannot be shown."""
    try:
      path = (self.workdir / name).resolve()
      if not path.is_relative_to(self.workdir.resolve()):
        raise ValueError("is outside of the workdir")
      return _picture(path.read_bytes(), alt, caption, large, colour)
    except FileNotFoundError:
      return None
    except (OSError, ValueError) as error:
      self.notes.append(f"{name}: left out, as it {getattr(error, 'strerror', None) or error}.")
      return None


def _picture(data: bytes, alt: str, caption: str, large: bool, colour: int) -> Picture:
  try:
    with Image.open(io.BytesIO(data), formats=("PNG", "GIF", "JPEG")) as image:
      kind, (width, height) = image.format, image.size
      if len(data) > _EMBED_AS_IS and kind != "GIF":
        image.thumbnail((_LONGEST_SIDE[large], _LONGEST_SIDE[large]))
        smaller = io.BytesIO()
        image.convert("RGB").save(smaller, format="JPEG", quality=88)
        kind, data, (width, height) = "JPEG", smaller.getvalue(), image.size
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f"is no picture that can be read ({error})") from None
  if len(data) > _LARGEST_ANIMATION:
    raise ValueError(f"has {len(data) / 2**20:.1f} MiB, too much for a page")
  times = max(1, min(_ROOM[0] // width, _ROOM[1] // height)) if large else 1
  source = f"data:image/{str(kind).lower()};base64,{base64.b64encode(data).decode('ascii')}"
  pixelated = large and kind != "JPEG"
  return Picture(source, alt, caption, width * times, height * times, large, pixelated, width >= _WIDE, colour)


def read_run(workdir: pathlib.Path) -> RunFiles:
  """Reads configuration, metrics and results as far as possible; the rest is in the `notes`."""
  run = RunFiles(workdir)
  text = run.text("config.json")
  try:
    run.config = None if text is None else config_lib.from_json(text)
    run.notes += ["There is no config.json."] if text is None else []
  except (UserError, RecursionError) as error:
    run.notes.append(f"The settings cannot be read: {error}.")
  if run.config and run.config.diffusion.first_stage and (text := run.text("first_stage/settings.json")) is not None:
    run.stage = facts_of_settings(_json(text))
    run.notes += ["first_stage/settings.json is damaged."] if run.stage is None else []
  lines = (run.text("metrics.jsonl") or "").split("\n")[:-1]  # a last line without its end is still being written
  rows = [_json(line) for line in lines]
  run.metrics = [row for row in rows if isinstance(row, dict)]
  if len(rows) > len(run.metrics):
    run.notes.append(f"metrics.jsonl has damaged lines, which are left out: {len(rows) - len(run.metrics)}.")
  for title, key in (("Training steps skipped as not finite", "nonfinite"), ("Bad records", "bad_records")):
    if count := max((value for _, value in run.points(key)), default=0):
      run.notes.append(f"{title}: {number(count)}.")
  dtype, results = run.config.model.dtype if run.config else "unknown", {}
  for path in sorted((workdir / "eval").glob("*.json")):
    if path.stem.isdecimal():
      result = _json(run.text(f"eval/{path.name}") or "")
      step = result.get("step") if isinstance(result, dict) else None
      if isinstance(step, int) and 0 <= step < 1e15:
        results[int(step)] = completed(result, dtype)
      else:
        run.notes.append(f"eval/{path.name} is damaged, and left out.")
  run.results = dict(sorted(results.items()))
  warnings = run.results[max(run.results)].get("warnings") if run.results else None
  for warning in warnings if isinstance(warnings, list) else ():
    run.notes.append(f"{str(warning)[:1].upper()}{str(warning)[1:]}.")
  return run


def _json(text: str) -> Any:
  """A parsed JSON text; None if it is invalid."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return None
