"""Latent models of ours in diffusers, and of diffusers here: the same images for the same noise.

pip install -e '.[test,interop]'
python -m pytest tests/interop
"""

import functools
import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.devices import make_mesh
from ddpm_jax.diffusion.guidance import guided, pair_of
from ddpm_jax.diffusion.samplers import steps_table
from ddpm_jax.export.card import card
from ddpm_jax.first_stage.latents import FixedStage, Latents
from ddpm_jax.models.build import build_autoencoder, build_model, init_params
from ddpm_jax.training.setup import Run, build_run
from ddpm_jax.weights import diffusers as folders
from ddpm_jax.weights import initial
from ddpm_jax.weights.load import Weights
from ddpm_jax.weights.stage_folder import Autoencoder
from tests.weights.make_diffusers_golden import nhwc

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  import torch
  from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

pytestmark = pytest.mark.filterwarnings("ignore")  # what others warn of is theirs

STEPS = 20
AUTOENCODER = {
  "stage": "autoencoder",
  "channels": 8,
  "channel_multipliers": (1, 2, 3),
  "norm_groups": 4,
  "attention_resolutions": (),
}
REGULARIZERS = {
  "kl": {"latent_channels": 4},
  "vq": {"latent_channels": 3, "regularizer": "vq", "codebook_size": 32},
}
UNET = {
  "channels": 16,
  "channel_multipliers": (1, 2),
  "attention_resolutions": (4,),
  "block": "ldm",
  "norm_groups": 4,
  "head_channels": 8,
  "prediction": "v",
  "num_timesteps": 200,
  "beta_schedule": "scaled_linear",
  "beta_end": 0.08,
  "threshold": "auto",
}


class Model(NamedTuple):
  run: Run
  stage: FixedStage
  params: dict  # of the U-Net


def random_params(init, seed):
  """Parameters of the shapes that init makes, none of them zero; as NumPy arrays, as nothing need be compiled."""
  generator = np.random.default_rng(seed)

  def value(path, leaf):
    noise = generator.standard_normal(leaf.shape)
    match path[-1].key:
      case "scale":
        return np.float32(1 + 0.1 * noise)
      case "kernel":
        return np.float32(noise / np.sqrt(np.prod(leaf.shape[:-1])))
      case _:
        return np.float32(0.1 * noise)

  return jax.tree_util.tree_map_with_path(value, jax.eval_shape(init, jax.random.key(0)))


def make_model(regularizer: str, size=(32, 32), classes: int = 0, **changes) -> Model:
  image_shape = (*size, 3)
  first = config_lib.override(Config(), AUTOENCODER | REGULARIZERS[regularizer])
  network = build_autoencoder(first.model, first.autoencoder, image_shape)
  params = random_params(lambda key: network.init(key, image_shape), 1)
  z = first.autoencoder.latent_channels
  std = np.full(z, 0.6) if regularizer == "vq" else np.linspace(0.5, 2.0, z)
  mean = np.linspace(-0.7, 0.4, z).astype(np.float32)
  stage = FixedStage(
    Latents(network, image_shape), {"autoencoder": params, "mean": mean, "std": std.astype(np.float32)}, "0" * 64
  )
  of_classes = {"conditioning": "class", "num_classes": classes} if classes else {}
  config = config_lib.override(Config(), UNET | of_classes | {"first_stage": "/somewhere", **changes})
  run = build_run(config, image_shape, make_mesh("pmap"), stage=stage)
  shape = stage.latents.latent_shape
  unet = random_params(lambda key: init_params(build_model(config.model, shape), key, shape), 2)
  return Model(run, stage, unet)


def write(folder, model: Model, classes=()):
  folder.mkdir()
  run = model.run
  folders.write_folder(folder, run.config, run.image_shape, model.params, classes, model.stage)


def opened(folder) -> Weights:
  """As --mode=sample --init_from=FOLDER has it."""
  config = initial.base_config(str(folder))
  return initial.find_weights(config_lib.override(config, {"init_from": str(folder)}), None)


@functools.partial(jax.jit, static_argnums=0)
def decoded(latents: Latents, params, x):
  """Images in 0..1, as their pipelines make them."""
  z = x * params["std"].reshape(1, 1, 1, -1) + params["mean"].reshape(1, 1, 1, -1)
  if latents.network.regularizer == "vq":
    z, _ = latents.network.quantize(params["autoencoder"], z)
  return jnp.clip(latents.network.decode(params["autoencoder"], z) / 2 + 0.5, 0, 1)


def drawn_by_us(run: Run, denoise, stage_params, x: np.ndarray, timesteps) -> np.ndarray:
  """DDIM without noise from x at their timesteps."""
  times = np.append(np.asarray(timesteps) + 1, 0)
  table, step = (
    steps_table(run.schedule, "ddim", times[:-1], times[1:], eta=0.0, variance="fixed_large"),
    jax.jit(denoise),
  )
  for t, c_xt, c_x0 in zip(table.t, table.c_xt, table.c_x0, strict=True):
    x = (c_xt * x + c_x0 * np.asarray(step(x, run.schedule.level(int(t))).x0)).astype(np.float32)
  assert isinstance(run.first_stage, Latents)
  return decoded(run.first_stage, stage_params, x)


@pytest.fixture(scope="module", params=REGULARIZERS)
def written(request, tmp_path_factory):
  model, folder = make_model(request.param), tmp_path_factory.mktemp("latent") / "out"
  write(folder, model)
  return model, folder


def test_their_pipeline_draws_our_images(written):
  """LDMPipeline from an exported folder, and our sampler with the mean and deviation that are folded into it."""
  model, folder = written
  pipeline = LDMPipeline.from_pretrained(folder)
  pipeline.set_progress_bar_config(disable=True)
  images = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=STEPS, output_type="np").images
  height, width, channels = model.run.first_stage.latent_shape
  noise = nhwc(torch.randn((2, channels, height, width), generator=torch.Generator().manual_seed(0)))
  denoise = model.run.denoiser.bind(model.params)
  ours = drawn_by_us(model.run, denoise, model.stage.params, noise, pipeline.scheduler.timesteps)
  print(f"largest difference {np.abs(ours - images).max():.1e}, deviation {images.std():.2f}")
  assert images.shape == (2, *model.run.image_shape)
  assert images.std() > 0.05 and np.abs(ours - images).max() < 1e-3
  assert pipeline.vqvae.config.scaling_factor == 1.0


def test_what_is_written_is_read_again(written):
  """As a model with latents of mean 0 and deviation 1, which decodes the same x_0 to the same images."""
  model, folder = written
  weights = opened(folder)
  config, theirs = model.run.config, weights.run.config
  assert theirs.diffusion == config_lib.override(config, {"first_stage": str(folder)}).diffusion
  assert (theirs.model, theirs.sample.threshold) == (config.model, "none")
  assert weights.run.image_shape == model.run.image_shape
  for ours, read in zip(jax.tree.leaves(model.params), jax.tree.leaves(weights.params), strict=True):
    np.testing.assert_array_equal(ours, np.asarray(read).reshape(ours.shape))
  frozen = jax.tree.map(np.asarray, weights.run.frozen)
  assert (frozen["mean"] == 0).all() and (frozen["std"] == 1).all()
  x = np.asarray(jax.random.normal(jax.random.key(0), (2, *model.run.first_stage.latent_shape)))
  expected = decoded(model.stage.latents, model.stage.params, x)
  assert isinstance(weights.run.first_stage, Latents)
  assert np.abs(decoded(weights.run.first_stage, frozen, x) - expected).max() < 1e-5


def test_their_own_folder_draws_their_images_here(written, tmp_path):
  """Saved by diffusers, with a scaling_factor that is not 1."""
  model, folder = written
  pipeline = LDMPipeline.from_pretrained(folder)
  pipeline.vqvae.register_to_config(scaling_factor=0.5)
  pipeline.save_pretrained(tmp_path / "theirs")
  pipeline.set_progress_bar_config(disable=True)
  images = pipeline(1, torch.Generator().manual_seed(0), num_inference_steps=STEPS, output_type="np").images
  weights = opened(tmp_path / "theirs")
  height, width, channels = model.run.first_stage.latent_shape
  noise = nhwc(torch.randn((1, channels, height, width), generator=torch.Generator().manual_seed(0)))
  frozen = jax.tree.map(np.asarray, weights.run.frozen)
  ours = drawn_by_us(
    weights.run, weights.run.denoiser.bind(weights.params), frozen, noise, pipeline.scheduler.timesteps
  )
  assert np.abs(ours - images).max() < 1e-3


@pytest.mark.parametrize(
  ("classes", "label_dropout", "size"), [(3, 0.1, (32, 32)), (3, 0.0, (32, 32)), (0, 0.0, (32, 48))]
)
def test_the_lines_of_the_card_draw(tmp_path, classes, label_dropout, size):
  """By class, with guidance of scale 2 where there is a label for no class; and images that are no squares."""
  model = make_model("kl", size, classes, **({"label_dropout": label_dropout} if classes else {}))
  names = ("a", "b", "c")[:classes]
  write(tmp_path / "ours", model, names)
  params = jax.tree.map(jnp.asarray, model.params)
  text = card(model.run.config, Weights(model.run, params, 0, "ema", "", classes=names), None, "")
  assert "latent-diffusion" in text and ("by_none" in text) == (label_dropout > 0)
  lines = re.search(r"```python\n(.*?)```", text, re.DOTALL)
  assert lines
  torch.manual_seed(0)
  drawn: dict = {}
  exec(lines[1].replace("PATH", str(tmp_path / "ours")).replace("sample.png", str(tmp_path / "sample.png")), drawn)

  height, width, channels = model.run.first_stage.latent_shape
  number = classes or 4
  torch.manual_seed(0)
  noise = nhwc(torch.randn(number, channels, height, width))
  bind = model.run.denoiser.bind
  denoise = bind(model.params, jnp.arange(classes) if classes else None)
  if label_dropout:
    denoise = guided(denoise, pair_of(denoise, bind(model.params, jnp.full(classes, classes))), 2.0)
  ours = drawn_by_us(model.run, denoise, model.stage.params, noise, drawn["scheduler"].timesteps)
  theirs = (nhwc(drawn["x"]) / 2 + 0.5).clip(0, 1)
  assert theirs.shape == (number, *size, 3)
  assert theirs.std() > 0.05 and np.abs(ours - theirs).max() < 1e-3
  assert (tmp_path / "sample.png").exists() and len(drawn["images"]) == number


def test_the_card_of_an_autoencoder_names_a_class_that_reads_it(tmp_path):
  """What --mode=export writes of a first stage alone, and what may be named as --first_stage."""
  from ddpm_jax.weights.autoencoders import read_autoencoder, write_autoencoder

  for regularizer, kind in (("kl", AutoencoderKL), ("vq", VQModel)):
    stage, folder = make_model(regularizer).stage, tmp_path / regularizer
    folder.mkdir()
    z = stage.latents.network.model.latent_channels
    own = (stage.latents.network, stage.params["autoencoder"], np.zeros(z), np.ones(z), (32, 32))
    write_autoencoder(folder, *own)
    theirs, read = kind.from_pretrained(folder), read_autoencoder(folder)
    assert sum(p.numel() for p in theirs.parameters()) == sum(
      leaf.size for leaf in jax.tree.leaves(stage.params["autoencoder"])
    )
    found = Autoencoder(read.network, read.params, read.image_shape, read.mean, read.std)
    assert found.sha256 == Autoencoder(stage.latents.network, stage.params["autoencoder"]).sha256


def test_options_are_those_that_diffusers_keeps(written):
  """It ignores what it does not know: what is written must be known to it, but for names that begin with _."""
  model, _ = written
  scheduler = folders.scheduler_options(model.run.config, "DDIMScheduler", latent=True)
  kept = dict(DDIMScheduler(**{name: value for name, value in scheduler.items() if name[0] != "_"}).config)
  assert {name: kept.get(name) for name in scheduler if name[0] != "_"} == {
    name: value for name, value in scheduler.items() if name[0] != "_"
  }
  assert not scheduler["clip_sample"] and not scheduler["thresholding"]
  unet = folders.unet_options(model.run.config.model, model.run.first_stage.latent_shape)
  kept = dict(UNet2DModel(**unet).config)
  assert {name: kept[name] for name in unet} == unet
