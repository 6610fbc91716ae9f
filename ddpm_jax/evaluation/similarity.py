"""How alike an image and its reconstruction are, pixel by pixel: pure functions of two images, for `jax.vmap`."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

SSIM_WINDOW = 11  # pixels of a side; smaller images have no SSIM
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 of Wang et al. 2004, eq. 13, of values in 0..1


def psnr(x: jax.Array, y: jax.Array) -> jax.Array:
  """The peak signal-to-noise ratio, -10 log10 of the mean squared error, in dB.

  Equal images count as if a single value were off by one in 255, so that a mean over images stays finite.

  Args:
    x: uint8 [H, W, C].
    y: the same.

  Returns:
    float32 scalar.
  """
  squares = jnp.square(x.astype(jnp.int32) - y.astype(jnp.int32))
  return 10 * jnp.log10(255**2 * float(x.size) / jnp.maximum(jnp.sum(squares.astype(jnp.float32)), 1.0))


@functools.cache
def _gaussian() -> np.ndarray:
  """The weights of the window along one axis, float64 [11], of sum 1."""
  offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
  weights = np.exp(-np.square(offsets) / (2 * _SIGMA**2))
  return weights / math.fsum(weights)


def _windows(values: jax.Array) -> jax.Array:
  """Means of [H, W, C], weighted by a Gaussian window around each pixel whose window lies inside: [H - 10, W - 10, C].

  Sums of shifted copies rather than convolutions, which accelerators compute with fewer bits.
  """
  for axis in (0, 1):
    length = values.shape[axis] - SSIM_WINDOW + 1
    parts = [
      weight * jax.lax.slice_in_dim(values, start, start + length, axis=axis)
      for start, weight in enumerate(_gaussian().tolist())
    ]
    values = functools.reduce(jnp.add, parts)
  return values


def ssim(x: jax.Array, y: jax.Array) -> jax.Array:
  """The structural similarity of Wang et al. 2004, eq. 13, averaged over channels and over all whole windows.

  A Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, L = 1.

  Args:
    x: uint8 [H, W, C], H and W at least 11.
    y: the same.

  Returns:
    float32 scalar of at most 1.

  Raises:
    ValueError: the images are smaller than the window.
  """
  if min(x.shape[:2]) < SSIM_WINDOW:
    raise ValueError(f"images of {x.shape[0]}x{x.shape[1]} are smaller than the {SSIM_WINDOW} pixels of the window")
  x, y = (image.astype(jnp.float32) / 255 for image in (x, y))
  mean_x, mean_y = _windows(x), _windows(y)
  # Around 1/2, where the difference of two squares costs the fewest digits; variances do not depend on it.
  x, y, off_x, off_y = (value - 0.5 for value in (x, y, mean_x, mean_y))
  variances = _windows(x * x + y * y) - off_x * off_x - off_y * off_y
  covariance = _windows(x * y) - off_x * off_y
  luminance = (2 * mean_x * mean_y + _C1) / (mean_x * mean_x + mean_y * mean_y + _C1)
  return jnp.mean(luminance * (2 * covariance + _C2) / (variances + _C2))
