"""Mean and deviation of latents over a data set, by which they are standardised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.sources import Source
from ddpm_jax.devices.batched import BatchedFn
from ddpm_jax.devices.mesh import DeviceMesh
from ddpm_jax.first_stage.latents import Latents

BATCH = 64  # images encoded at once on each device
PRECISION = "highest"  # of products: latents are the same on every kind of device, to rounding
_LEAST = 1e-6  # of a deviation: of a channel that never varies


def encode(latents: Latents, params: Any, images: jax.Array, *, flips: bool) -> jax.Array:
  """Moments float32 [B, 1, h, w, ..] of images uint8 [B, H, W, C].

  flips: also those of the mirrored images, [B, 2, h, w, ..]: the latent of one is not the mirrored latent.
  """
  both = (images, images[:, :, ::-1]) if flips else (images,)
  return jnp.stack([latents.moments(params, image) for image in both], axis=1)


def measure(
  latents: Latents,
  params: Any,
  source: Source,
  mesh: DeviceMesh,
  *,
  flips: bool,
  done: Callable[[int], None] = lambda number: None,
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation of each channel of z over all images, all pixels and the posterior. All processes must call it.

  The variance is that of the mean of the posterior plus the mean of its variance; of a codebook's latents there is one
  for all channels, as distances between its vectors must stay what they are.

  Args:
    latents: the first stage.
    params: its parameters, placed; mean and deviation among them do not matter.
    source: the images; of random crops the centres.
    mesh: the devices.
    flips: whether they are mirrored at random.
    done: called with the number of images done, after each batch.

  Returns:
    float32 [z] each.
  """

  def each(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean, variance = latents.distribution(encode(latents, params, images, flips=flips))
    centre = jnp.mean(mean, (1, 2, 3))
    return centre, jnp.mean(jnp.square(mean - centre[:, None, None, None]) + variance, (1, 2, 3))

  compiled, size = BatchedFn(each, mesh, matmul_precision=PRECISION), BATCH * mesh.num_devices
  means, spreads = [], []
  for first in range(0, len(source), size):
    images = source.read(np.arange(first, min(first + size, len(source)))).images
    centre, spread = compiled(params, images, size=size)
    means.append(np.asarray(centre, np.float64))
    spreads.append(np.asarray(spread, np.float64))
    done(first + len(images))
  centres, within = np.concatenate(means), np.concatenate(spreads)
  mean = centres.mean(0)
  variance = within.mean(0) + np.square(centres - mean).mean(0)  # within the images, and between them
  if latents.network.regularizer == "vq":
    variance = np.full_like(variance, variance.mean())
  return mean.astype(np.float32), np.sqrt(np.maximum(variance, _LEAST**2)).astype(np.float32)
