"""Trains a network of your own: checkpoints, exact resume, metrics and sampling stay.

    python experiments/own_network.py runs/own_network

The network is any frozen dataclass with these two methods: pure functions, equal by value.
"""

import dataclasses
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp

import ddpm_jax
from ddpm_jax.config import Config, override


class Convolutions(nn.Module):
  """A few convolutions at one resolution, told the timestep by an added embedding."""

  width: int

  @nn.compact
  def __call__(self, x, time):
    channels = x.shape[-1]
    waves = time[:, None].astype(jnp.float32) / jnp.asarray([1.0, 10.0, 100.0, 1000.0])[None]
    embedding = nn.Dense(self.width)(jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], axis=-1))
    h = nn.Conv(self.width, (3, 3))(x)
    for _ in range(3):
      h = h + nn.Conv(self.width, (3, 3))(nn.silu(h + embedding[:, None, None, :]))
    return nn.Conv(channels, (3, 3))(nn.silu(h))


@dataclasses.dataclass(frozen=True)
class OwnNetwork:
  """`Convolutions` as ddpm_jax takes a network."""

  width: int = 32

  def init(self, key, image_shape):
    """Fresh parameters for images [H, W, C]."""
    return Convolutions(self.width).init(key, jnp.zeros((1, *image_shape)), jnp.zeros(1))["params"]

  def __call__(self, params, x, time, cond=None, *, dropout_keys=None) -> jax.Array:
    """x_t float32 [B, H, W, C] and the time [B] -> eps, x0 or v, as `prediction` says, of the shape of x_t."""
    return Convolutions(self.width).apply({"params": params}, x, time)


if __name__ == "__main__":
  workdir, *steps = sys.argv[1:] or ["runs/own_network"]
  config = override(Config(), {"num_steps": int(steps[0]) if steps else 2000, "prediction": "v"})
  ddpm_jax.train(config, workdir, network=OwnNetwork())
  model = ddpm_jax.load(workdir, network=OwnNetwork())
  images = model.sample(16, sampler="dpmpp", steps=20)
  print(model, images.shape, f"mean {images.mean():.1f}")
