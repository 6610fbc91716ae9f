"""A workdir that looks trained, one that draws in a moment, and images to start from."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import config as config_lib
from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.config import Config
from ddpm_jax.devices import make_mesh
from ddpm_jax.diffusion.denoiser import Denoiser
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.diffusion.schedules import at
from ddpm_jax.runs import sample as sampling
from ddpm_jax.training.setup import build_run
from ddpm_jax.weights.load import Weights
from ddpm_jax.workdir import layout
from tests.training.tiny import IMAGE_SHAPE, tiny_config


def pictures(number: int = 6, shape=IMAGE_SHAPE) -> np.ndarray:
  """Smooth images uint8, each another."""
  y, x = np.mgrid[: shape[0], : shape[1]] / 8
  waves = [np.sin(2 * np.pi * (x * (1 + i % 3) + y * (i // 3) + i / 7)) for i in range(number)]
  return np.repeat((127.5 + 120 * np.stack(waves)).astype(np.uint8)[..., None], shape[2], axis=3)


def save_pictures(folder: pathlib.Path, images: np.ndarray) -> pathlib.Path:
  folder.mkdir(parents=True)
  for i, image in enumerate(images):
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(folder / f"{i:02d}.png")
  return folder


@dataclasses.dataclass
class Trained:
  """A workdir, and the settings of a short draw."""

  path: pathlib.Path
  config: Config

  def having(self, **changes) -> Config:
    """The settings with some changed."""
    return config_lib.override(self.config, changes)

  @property
  def samples(self) -> pathlib.Path:
    return self.path / "samples"

  def load(self, name: str = "samples") -> dict[str, np.ndarray]:
    with np.load(self.samples / f"{name}.npz") as archive:
      return dict(archive)

  def settings(self, name: str = "samples") -> dict:
    return json.loads(str(self.load(name)["settings"]))

  def files(self) -> list[str]:
    """Everything in samples/, hidden files too."""
    return sorted(path.name for path in self.samples.iterdir()) if self.samples.exists() else []


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Trained:
  """A workdir with checkpoints 3 and 5 of different weights, not to be written into."""
  return make_workdir(tmp_path_factory.mktemp("sampling"))


def make_workdir(folder: pathlib.Path, classes: Sequence[str] = (), **changes) -> Trained:
  """A workdir `run` in a folder, with checkpoints 3 and 5 of different weights.

  Args:
    folder: of the workdir and its images.
    classes: their names, where the settings are those of a conditional run.
    **changes: of the settings.
  """
  path, config = folder / "run", config_lib.override(settings_of(folder), changes)
  layout.create(path, config)
  run = build_run(config, IMAGE_SHAPE, make_mesh("pmap"))
  checkpoints = Checkpoints(path / "checkpoints", keep=9)
  facts = {"image_shape": list(IMAGE_SHAPE), "config": json.loads(config_lib.to_json(config))}
  facts |= {"classes": list(classes)} if run.conditional else {}
  first = run.initial_state()
  for step in (3, 5):
    # The network says nothing at first: give every weight something to say.
    params, average = (
      jax.tree.map(lambda leaf, seed=seed: leaf + noise(leaf.shape, seed), tree)
      for tree, seed in ((first.params, step), (first.ema["ema"], 10 * step))
    )
    state = first.replace(step=jnp.asarray(step), params=params, ema={"ema": average})
    checkpoints.save(jax.device_put(state, run.mesh.state_shardings(run.abstract_state)), step, facts)
    checkpoints.wait()
  checkpoints.close()
  return Trained(path, config)


def noise(shape, seed) -> np.ndarray:
  return 0.07 * np.random.default_rng(seed).standard_normal(shape, np.float32)


def settings_of(folder: pathlib.Path) -> Config:
  data = save_pictures(folder / "data", pictures())
  return tiny_config(
    dataset=f"folder:{data}",
    channel_multipliers=(1,),
    attention_resolutions=(),
    num_timesteps=200,
    beta_end=0.05,
    sampler="ddim",
    sampling_steps=4,
    sample_batch_size=8,
    num_samples=3,
  )


STD = 0.3  # of the images that `quick` draws, around the first of `pictures`


@pytest.fixture(scope="session")
def perfect(tmp_path_factory) -> Weights:
  """Weights of a network that compiles in a moment, for the images of `settings_of`."""
  return perfect_for(settings_of(tmp_path_factory.mktemp("perfect")), IMAGE_SHAPE)


def perfect_for(config: Config, image_shape: tuple[int, int, int]) -> Weights:
  """Weights of a network with eps_hat of images N(mean, STD^2), the mean being its weights."""
  run = build_run(config, image_shape, make_mesh("pmap"))
  schedule = run.schedule

  def network(params, xt, time, _cond):
    ab = at(schedule.alpha_bar, time + 1)[:, None, None, None]
    return jnp.sqrt(1 - ab) * (xt - jnp.sqrt(ab) * params["mean"][None]) / (ab * STD**2 + 1 - ab)

  mean = pictures(1, image_shape)[0] / np.float32(127.5) - 1
  params = {"mean": jax.device_put(mean, run.mesh.replicated)}
  return Weights(run._replace(denoiser=Denoiser(network, PARAMETERIZATIONS["eps"])), params, 5, "ema", "0" * 64)


@pytest.fixture
def quick(perfect, tmp_path, monkeypatch) -> Trained:
  """A workdir from which `sample` draws with `perfect`."""
  monkeypatch.setattr(sampling, "find_weights", lambda config, path: perfect)
  (tmp_path / "run").mkdir()
  return Trained(tmp_path / "run", perfect.run.config)
