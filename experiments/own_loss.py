"""Trains with a loss of your own: the error of x_0 instead of that of eps, with pixels of the middle counted twice.

    python experiments/own_loss.py runs/own_loss

An objective is a frozen dataclass with these two methods. What comes with the parts of the run (denoiser, noise
schedule) is taken from `run`. The command can draw from the workdir and measure it, as the network is the usual one.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp

import ddpm_jax
from ddpm_jax.config import Config, override
from ddpm_jax.diffusion.denoiser import Denoiser
from ddpm_jax.diffusion.forward import q_sample
from ddpm_jax.diffusion.schedules import NoiseSchedule
from ddpm_jax.first_stage.pixels import to_float


@dataclasses.dataclass(frozen=True)
class OwnLoss:
  """The mean over the batch of w |x_0 - x_0_hat(x_t)|^2, where w is 2 in the middle of the image and 1 elsewhere."""

  denoiser: Denoiser
  schedule: NoiseSchedule

  def loss(self, params, extra, frozen, batch, keys):
    """The terms, of which training minimises the sum; every random choice comes from the key of its example."""

    def noised(key, image):
      t_key, eps_key = jax.random.split(key)
      t = jax.random.randint(t_key, (), 1, self.schedule.num_timesteps + 1)
      return to_float(image), t, jax.random.normal(eps_key, image.shape)

    x0, t, eps = jax.vmap(noised)(keys, batch["image"])
    level = self.schedule.level(t)
    xt = jax.vmap(q_sample)(x0, eps, level)
    error = jnp.square(x0 - self.denoiser.bind(params)(xt, level).x0)
    height, width = x0.shape[1:3]
    middle = jnp.zeros((height, width)).at[height // 4 : -height // 4, width // 4 : -width // 4].set(1.0)
    return {"x0": jnp.mean((1 + middle)[None, :, :, None] * error)}, {}

  def update_extra(self, extra, per_example):
    """It keeps nothing from step to step."""
    return extra


def own_loss(run):
  """The objective of a run."""
  return OwnLoss(run.denoiser, run.schedule)


if __name__ == "__main__":
  workdir, *steps = sys.argv[1:] or ["runs/own_loss"]
  config = override(Config(), {"num_steps": int(steps[0]) if steps else 2000, "prediction": "v"})
  model = ddpm_jax.train(config, workdir, objective=own_loss)
  images = model.sample(16, sampler="dpmpp", steps=20)
  print(model, images.shape, f"mean {images.mean():.1f}")
