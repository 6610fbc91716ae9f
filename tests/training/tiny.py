"""The smallest run that has everything: two levels, attention, dropout, flips. Shared by the tests of training."""

from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax.config import AutoencoderConfig, Config, ModelConfig
from ddpm_jax.devices import make_mesh
from ddpm_jax.first_stage.latents import FixedStage
from ddpm_jax.models.build import build_autoencoder
from ddpm_jax.training.setup import Run, build_run
from ddpm_jax.weights.stage_folder import Autoencoder

IMAGE_SHAPE = (8, 8, 1)
CONDITIONAL = dict(conditioning="class", num_classes=3, label_dropout=0.3)


def tiny_config(**changes) -> Config:
  defaults = dict(
    channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    dropout=0.3,
    random_flip=True,
    batch_size=16,
    warmup_steps=2,
    lr_schedule="constant",
    num_timesteps=100,
    num_steps=8,
    preview_images=4,
    preview_steps=2,
    log_every=1,
    checkpoint_every=4,
    sample_every=0,
  )
  return config_lib.override(Config(), defaults | changes)


def tiny_run(config: Config, stage: FixedStage | None = None) -> Run:
  return build_run(config, IMAGE_SHAPE, make_mesh(config.train.parallel), stage=stage)


def tiny_stage() -> FixedStage:
  """An autoencoder of `IMAGE_SHAPE` with random weights, and statistics as if of some images; latents of 4x4x2."""
  model = ModelConfig(channels=4, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=())
  network = build_autoencoder(model, AutoencoderConfig(latent_channels=2), IMAGE_SHAPE)
  params = host(jax.jit(lambda key: network.init(key, IMAGE_SHAPE))(jax.random.key(3)))
  mean, std = np.asarray([0.1, -0.3], np.float32), np.asarray([0.5, 2.0], np.float32)
  return Autoencoder(network, params, IMAGE_SHAPE, mean, std).fixed(IMAGE_SHAPE)


def random_batch(size: int = 16, seed: int = 0, classes: int = 0) -> dict[str, np.ndarray]:
  """One batch; with the labels of that many classes, if there are any."""
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (size, *IMAGE_SHAPE), dtype=np.uint8)
  labels = {"label": rng.integers(0, classes, size, dtype=np.int32)} if classes else {}
  return {"image": images, "index": np.arange(size, dtype=np.int32), "replaced": np.zeros(size, bool)} | labels


def host(tree):
  """A tree of arrays, placed anyhow, as NumPy."""
  return jax.tree.map(np.asarray, tree)


class Restored(NamedTuple):
  step: int
  state: Any
  manifest: dict
  damaged: dict[int, str]


def newest_intact(checkpoints, abstract_state, **options) -> Restored | None:
  """What a program that takes any run restores; None if there is no checkpoint."""
  candidates = checkpoints.candidates(**options)
  for candidate in candidates:
    state = candidate.restore(abstract_state)
    if state is not None:
      return Restored(candidate.step, state, candidate.manifest, candidates.damaged)
  return None
