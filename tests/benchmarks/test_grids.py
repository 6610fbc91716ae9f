import types

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import command, grids
from benchmarks.grids import GRIDS, Cell
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.diffusion.denoiser import Denoiser, from_x0
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.diffusion.samplers import make_sampler, sample
from ddpm_jax.diffusion.schedules import at, make_schedule
from ddpm_jax.errors import UserError
from ddpm_jax.first_stage.pixels import Pixels
from ddpm_jax.keys import indexed_keys, stream_key

SCHEDULE = make_schedule("linear", 30, beta_start=0.003, beta_end=0.6)
SHAPE = (2, 2, 1)


def network(params, xt, time, cond):
  """The noise in pixels x_0 ~ N(0, 1/4), which the closed form knows."""
  alpha_bar = at(SCHEDULE.alpha_bar, time + 1)[:, None, None, None]
  return xt * jnp.sqrt(1 - alpha_bar) / (alpha_bar / 4 + 1 - alpha_bar)


@pytest.fixture
def model(monkeypatch):
  run = types.SimpleNamespace(
    denoiser=Denoiser(network, PARAMETERIZATIONS["eps"]),
    schedule=SCHEDULE,
    first_stage=Pixels(SHAPE),
    image_shape=SHAPE,
    conditional=False,
  )
  config = config_lib.override(Config(), {"num_timesteps": 30, "threshold": "none", "preview_steps": 5})
  data = (127.5 + 64 * np.random.default_rng(0).standard_normal((200, *SHAPE))).clip(0, 255).astype(np.uint8)
  source = Source("pictures", SHAPE, len(data), DecodedRows(data, np.zeros(len(data), bool)).take, {})
  monkeypatch.setattr(grids, "open_source", lambda config: source)
  return grids.Model(config, types.SimpleNamespace(run=run, params={}))


def test_distances_to_the_solution(model):
  """Each number by a second path; with all timesteps every grid is the same one, and the distance of dpmpp nothing."""
  found = grids.measure(model, ["ddim", "dpmpp", "heun"], [4, 30], 16)
  keys = indexed_keys(stream_key(0, "sample"), jnp.arange(16))

  def draw(name, number, grid):
    def denoise(xt, level):
      x0 = level.alpha / 4 / (level.alpha**2 / 4 + level.sigma**2) * xt  # E[x_0 | x_t]
      return from_x0(x0, xt, level)

    return sample(make_sampler(SCHEDULE, name, num_steps=number, grid=grid), denoise, keys, SHAPE)[0]

  solution = draw("dpmpp", 30, "trailing")
  for name, grid in (("ddim", "trailing"), ("heun", "logistic"), ("dpmpp", "quadratic")):
    wanted = np.sqrt(np.mean((draw(name, 4, grid) - solution) ** 2))
    assert found[Cell(name, 4, grid)] == pytest.approx(wanted, rel=1e-3) and wanted > 1e-3
  assert [found[Cell("dpmpp", 30, grid)] for grid in GRIDS] == pytest.approx([0] * len(GRIDS), abs=1e-6)
  lines = grids.text(found).splitlines()
  assert [line.split()[0] for line in lines[2:]] == list(GRIDS)
  assert [line.count("*") for line in lines[2:]] == [6 * (grid == "logistic") for grid in GRIDS]


def test_distributions_of_ddpm(model):
  """Nearer to the data with all timesteps than with three; what auto takes is marked."""
  found = grids.measure(model, ["ddpm"], [3, 30], 200)
  assert found[Cell("ddpm", 30, "trailing")] < found[Cell("ddpm", 3, "uniform")]
  assert [line.count("*") for line in grids.text(found).splitlines()[2:]] == [2 * (g == "trailing") for g in GRIDS]


def test_pixel_statistics():
  images = np.random.default_rng(0).normal(size=(50, *SHAPE))
  mean, covariance = grids.pixel_statistics(images)
  np.testing.assert_allclose(mean, images.reshape(50, 4).mean(0), rtol=1e-6)
  np.testing.assert_allclose(covariance, np.cov(images.reshape(50, 4).T), rtol=1e-6)


def test_wrong_input(model):
  for parse, text, message in (
    (grids.parse_samplers, "ddim,euler", "samplers: 'euler' is none of ddim"),
    (grids.parse_numbers, "10,x", "evaluations: '10,x' are no numbers"),
    (grids.parse_numbers, "0", "evaluations: '0'"),
  ):
    with pytest.raises(UserError, match=message):
      parse(text)
  with pytest.raises(UserError, match="evaluations: 31 are more than the 30 timesteps"):
    grids.measure(model, ["ddim"], [31], 2)
  with pytest.raises(UserError, match="models"):
    command.parse(grids.make_parser(), [])


def test_the_threshold_of_the_command_line(model):
  _, (setting,) = command.parse(grids.make_parser(), ["--models=x", "--threshold=dynamic"])
  assert grids.with_threshold(model, setting.config).config.sample.threshold == "dynamic"
