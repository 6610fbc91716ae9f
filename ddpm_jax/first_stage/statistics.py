"""The moments of a data set's latents: kept in memory where they fit, and what standardises them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.devices.batched import BatchedFn
from ddpm_jax.devices.mesh import DeviceMesh
from ddpm_jax.first_stage.latents import Latents

_BATCH = 64  # images encoded at once on each device
_PRECISION = "highest"  # of products: latents are the same on every kind of device, to rounding
_LEAST = 1e-6  # of a deviation: of a channel that never varies


class Encoded(NamedTuple):
  """The moments of neighbouring images.

  Attributes:
    moments: float32 [B, O, h, w, ..] of `Latents.moments`, O = 2 with mirrored images behind the others, else 1.
    rows: what the source says of these images.
  """

  moments: np.ndarray
  rows: DecodedRows


def encoded(latents: Latents, params: Any, source: Source, mesh: DeviceMesh, *, flips: bool) -> Iterator[Encoded]:
  """The moments of all images in their order, batch after batch. All processes must ask for each.

  Args:
    latents: the first stage.
    params: its parameters, placed; mean and deviation do not matter.
    source: the images; of random crops the centres.
    mesh: the devices.
    flips: encode the mirrored images too: their latents are not the mirrored latents.
  """

  def encode(params: Any, images: jax.Array) -> jax.Array:
    both = (images, images[:, :, ::-1]) if flips else (images,)
    return jnp.stack([latents.moments(params, image) for image in both], axis=1)

  compiled, size = BatchedFn(encode, mesh, matmul_precision=_PRECISION), _BATCH * mesh.num_devices
  for first in range(0, len(source), size):
    indices = np.arange(first, min(first + size, len(source)))
    rows = source.read(indices)
    record = indices if rows.record is None else rows.record
    yield Encoded(np.asarray(compiled(params, rows.images, size=size)), rows._replace(record=record))


def standard(latents: Latents, moments: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation of each channel of z over all images, all pixels and the posterior, float32 [z] each.

  The variance is that of the mean of the posterior plus the mean of its variance; of a codebook's latents there is one
  for all channels, as distances between its vectors must stay what they are.

  moments: [.., h, w, ..], in parts of any size.

  >>> from ddpm_jax.config import AutoencoderConfig, ModelConfig
  >>> from ddpm_jax.models.build import build_autoencoder
  >>> network = build_autoencoder(ModelConfig(), AutoencoderConfig(latent_channels=1), (4, 4, 1))
  >>> mean, std = standard(Latents(network, (4, 4, 1)), [np.zeros((3, 2, 2, 2))])  # means 0, log-variances 0
  >>> mean.tolist(), std.tolist()
  ([0.0], [1.0])
  """
  centres, spreads, counts = [], [], []
  for part in moments:
    mean, variance = (np.asarray(each, np.float64) for each in latents.distribution(jnp.asarray(part)))
    axes = tuple(range(mean.ndim - 1))
    centres.append(mean.mean(axes))
    spreads.append(np.square(mean - centres[-1]).mean(axes) + variance.mean(axes))
    counts.append(mean.size)
  share = (np.asarray(counts) / np.sum(counts))[:, None]
  mean = np.sum(share * centres, axis=0)
  variance = np.sum(share * (spreads + np.square(centres - mean)), axis=0)  # within the parts, and between them
  if latents.network.regularizer == "vq":
    variance = np.full_like(variance, variance.mean())
  return mean.astype(np.float32), np.sqrt(np.maximum(variance, _LEAST**2)).astype(np.float32)


def cached_bytes(latents: Latents, source: Source, *, flips: bool) -> float:
  """What the moments of all images take in memory; infinite for random crops, of which there is no end."""
  if source.random_crop:
    return math.inf
  *_, per_latent = latents.latent_shape
  numbers = math.prod(latents.latent_shape[:2]) * per_latent * (1 if latents.network.regularizer == "vq" else 2)
  return 4.0 * len(source) * numbers * (2 if flips else 1)


def as_source(source: Source, everything: Encoded) -> Source:
  """The source with the moments of all its images in their place."""
  rows = everything.rows
  kept = DecodedRows(everything.moments, rows.replaced, record=rows.record)
  return dataclasses.replace(source, read=kept.take, remote=None)
