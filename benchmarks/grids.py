"""Time grids: how far a few evaluations are from the solution with all T, for each sampler and each grid.

  python -m benchmarks.grids --models=runs/digits
  python -m benchmarks.grids --models=runs/linear,runs/cosine --evaluations=10,20 --threshold=none

The models are trained ones: workdirs, or what else `--init_from` takes. From the same noise x_T, the deterministic
samplers all go towards the solution of one ODE, which is drawn here with DPM-Solver++ and all T evaluations: the number
is the root mean square difference to it, over pixels in [-1, 1]. It tells nothing of ddpm, whose images differ with
every noise: there it is the Fréchet distance between the pixels of the drawn images and those of the run's data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ddpm_jax
from benchmarks import command, report
from ddpm_jax import config as config_lib
from ddpm_jax.api import Model
from ddpm_jax.config import Config, SampleConfig
from ddpm_jax.data.sources import open_source
from ddpm_jax.diffusion.samplers import SamplerTable, grid_name, make_sampler, sample
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.measures import frechet_distance
from ddpm_jax.evaluation.moments import add, covariance, no_moments
from ddpm_jax.keys import indexed_keys, seeded, stream_key
from ddpm_jax.models.build import Params
from ddpm_jax.sampling.draw import bind_for_sampling

GRIDS = next(field for field in dataclasses.fields(SampleConfig) if field.name == "time_grid").metadata["choices"][1:]
_SAMPLERS = "ddim,dpmpp,heun"
_KNOWN = ("ddim", "dpmpp", "heun", "ddpm")


class Cell(NamedTuple):
  """A sampler, a number of network evaluations and a grid."""

  sampler: str
  evaluations: int
  grid: str


def make_parser() -> command.Parser:
  """The options."""
  parser = command.Parser("grids", "Measures time grids with trained models.", timed=False)
  parser.add_argument("--models", required=True, metavar="PATH,...", help="trained models: workdirs")
  parser.add_argument("--samplers", default=_SAMPLERS, help=f"of {', '.join(_KNOWN)} ({_SAMPLERS})")
  parser.add_argument("--evaluations", default="10,20,50", help="network evaluations for each image (10,20,50)")
  parser.add_argument("--images", type=command.positive(int), default=64, help="to draw for each number (64)")
  return parser


def main(argv: Sequence[str]) -> None:
  """Measures and prints."""
  options, (setting,) = command.parse(make_parser(), argv)
  samplers, numbers = parse_samplers(options.samplers), parse_numbers(options.evaluations)
  results, about = {}, {}
  for path in options.models.split(","):
    model = with_threshold(ddpm_jax.load(path), setting.config)
    command.say(f"measuring {path}: {model}")
    results[path] = measure(model, samplers, numbers, options.images)
    about[path] = {"flags": setting.flags}
    diffusion, threshold = model.config.diffusion, model.config.sample.threshold
    print(report.heading(f"{path}: {diffusion.beta_schedule}, threshold {threshold}, {options.images} images"))
    print(f"{text(results[path])}\n")
  print(report.machine())
  listed = {path: {" ".join(map(str, cell)): value for cell, value in found.items()} for path, found in results.items()}
  report.write_json(options.json, report.document("grids", about, {}, [], listed))


def parse_samplers(text: str) -> list[str]:
  """'ddim,heun' -> ['ddim', 'heun']. Raises UserError."""
  names = [name.strip() for name in text.split(",")]
  for name in names:
    if name not in _KNOWN:
      raise UserError(f"samplers: {name!r} is none of {', '.join(_KNOWN)}")
  return names


def parse_numbers(text: str) -> list[int]:
  """'10,20' -> [10, 20]. Raises UserError."""
  words = text.split(",")
  if not all(word.strip().isdecimal() and int(word) for word in words):
    raise UserError(f"evaluations: {text!r} are no numbers above 0; write 10,20,50, for example")
  return [int(word) for word in words]


def with_threshold(model: Model, config: Config) -> Model:
  """The model with the threshold that the command line names."""
  named = {name: getattr(config.sample, name) for name in ("threshold", "threshold_quantile")}
  return Model(config_lib.override(model.config, named), model.weights)


def measure(model: Model, samplers: Sequence[str], numbers: Sequence[int], images: int) -> dict[Cell, float]:
  """The distance of each sampler, number of evaluations and grid.

  Raises:
    UserError: for more evaluations than the model has timesteps.
  """
  steps = model.schedule.num_timesteps
  if max(numbers) > steps:
    raise UserError(f"evaluations: {max(numbers)} are more than the {steps} timesteps of the model")
  draw = make_draw(model, images)
  distances: dict[str, Callable[[np.ndarray], float]] = {}
  if set(samplers) - {"ddpm"}:
    solution = draw(make_sampler(model.schedule, "dpmpp"))
    distances["ode"] = lambda drawn: float(np.sqrt(np.mean((drawn - solution) ** 2)))
  if "ddpm" in samplers:
    source = open_source(model.config.data)
    data = pixel_statistics(source.read(np.arange(len(source))).images / 127.5 - 1)
    distances["ddpm"] = lambda drawn: frechet_distance(*pixel_statistics(drawn), *data)
  found = {}
  for sampler in samplers:
    distance = distances["ddpm" if sampler == "ddpm" else "ode"]
    for number in numbers:
      for grid in GRIDS:
        table = make_sampler(
          model.schedule, sampler, num_steps=number, grid=grid, variance=model.config.diffusion.variance
        )
        found[Cell(sampler, number, grid)] = distance(draw(table))
      command.say(f"  {sampler}, {number} evaluations")
  return found


def make_draw(model: Model, number: int) -> Callable[[SamplerTable], np.ndarray]:
  """table -> float32 [number, H, W, C], images 0, 1, ... of seed 0.

  Without noise it compiles once for each number of evaluations, else for each table.
  """
  run, params = model.weights.run, model.params
  bind = bind_for_sampling(run, model.config.sample)
  keys = indexed_keys(stream_key(0, "sample"), jnp.arange(number))

  @functools.partial(jax.jit, static_argnames="sigma")
  def draw(params: Params, columns: Any, sigma: tuple[float, ...]) -> jax.Array:
    return sample(
      SamplerTable._make((*columns, np.asarray(sigma))), bind(seeded(params, 0), None), keys, run.image_shape
    )[0]

  return lambda table: np.asarray(draw(params, tuple(table[:-1]), tuple(table.sigma.tolist())))


def pixel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and covariance of the pixels of images [N, H, W, C]."""
  moments = add(no_moments(images[0].size), images.reshape(len(images), -1))
  return moments.mean, covariance(moments)


def text(found: dict[Cell, float]) -> str:
  """The table: a row for each grid, a column for each sampler and number; what `auto` takes is marked."""
  columns = list(dict.fromkeys((cell.sampler, cell.evaluations) for cell in found))
  rows = [
    [grid]
    + [
      f"{found[Cell(sampler, number, grid)]:.4f}" + ("*" if grid == grid_name(sampler, "auto") else " ")
      for sampler, number in columns
    ]
    for grid in GRIDS
  ]
  return report.table(["grids", *(f"{sampler} {number}" for sampler, number in columns)], rows)


if __name__ == "__main__":
  command.finish(main)
