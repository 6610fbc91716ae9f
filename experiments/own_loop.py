"""A training loop of your own from the functions of the package: the digits, without a workdir.

    python experiments/own_loop.py

The losses are those of the command with the same settings.
"""

import contextlib
import functools

import jax
import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.data.pipeline import batches
from ddpm_jax.data.sources import open_source
from ddpm_jax.diffusion.denoiser import thresholded
from ddpm_jax.diffusion.samplers import make_sampler, sample
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.first_stage.pixels import Pixels, to_uint8
from ddpm_jax.keys import indexed_keys, stream_key
from ddpm_jax.models.build import build_denoiser
from ddpm_jax.training.objective import DenoiserObjective
from ddpm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from ddpm_jax.training.state import create_state
from ddpm_jax.training.step import train_step


def run(config: Config, num_steps: int) -> tuple[list[float], np.ndarray]:
  """Trains, and draws 16 images uint8 [16, H, W, C]. Returns the loss of each step, and the images."""
  source, seed, d = open_source(config.data), config.train.seed, config.diffusion
  schedule = make_schedule(d.beta_schedule, d.num_timesteps, beta_start=d.beta_start, beta_end=d.beta_end)
  denoiser = build_denoiser(config.model, d.prediction, source.image_shape)
  optimizer = make_optimizer(config.optimizer, num_steps)
  step = jax.jit(
    functools.partial(
      train_step,
      seed=seed,
      objective=DenoiserObjective(denoiser, schedule, Pixels(source.image_shape), d, flip=config.data.random_flip),
      optimizer=optimizer,
      learning_rate=learning_rate_schedule(config.optimizer, num_steps),
      ema_decay=config.optimizer.ema_decay,
    )
  )
  state = create_state(denoiser.network.init(stream_key(seed, "init"), source.image_shape), optimizer)
  losses = []
  with contextlib.closing(batches(source, batch_size=config.data.batch_size, seed=seed, start_step=0)) as stream:
    for _ in range(num_steps):
      state, metrics = step(state, {}, next(stream))
      losses.append(float(metrics["loss"]))

  table = make_sampler(schedule, "dpmpp", num_steps=min(20, d.num_timesteps))
  denoise = thresholded(denoiser.bind(state.ema["ema"]), "static")
  keys = indexed_keys(stream_key(seed, "sample"), np.arange(16))
  return losses, np.asarray(to_uint8(jax.jit(lambda keys: sample(table, denoise, keys, source.image_shape)[0])(keys)))


if __name__ == "__main__":
  losses, images = run(Config(), 2000)
  print(f"loss {np.mean(losses[:100]):.3f} at first, {np.mean(losses[-100:]):.3f} at the end; images {images.shape}")
