"""The first stage of a pixel model, the identity: where uint8 in 0..255 becomes float32 in [-1, 1] and comes back.

Pixels are uint8 in 0..255 on the host and in files, float32 in [-1, 1] in the model (Ho et al. 2020, section 3.3).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.likelihood import BIN

Shape = tuple[int, int, int]


class FirstStage(Protocol):
  """A pair of maps between images and x_0. Its parameters are not trained with the denoiser: the `frozen` of a step."""

  @property
  def image_shape(self) -> Shape:
    """H, W, C of an image."""
    ...

  @property
  def latent_shape(self) -> Shape:
    """Of x_0."""
    ...

  @property
  def identity(self) -> bool:
    """Whether x_0 is the image itself, in [-1, 1]."""
    ...

  @property
  def bin_width(self) -> float | None:
    """The distance of two values of a number of x_0; None: it is continuous, and its likelihood a density."""
    ...

  def moments(self, params: Any, images: jax.Array) -> jax.Array:
    """Images uint8 [B, H, W, C] -> what x_0 is sampled from, deterministic, [B, ...]."""
    ...

  def x0(self, params: Any, moments: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """x_0, float32 [B, *latent_shape], sampled with the keys of the B examples; without them the mean."""
    ...

  def decode(self, params: Any, x0: jax.Array) -> jax.Array:
    """x_0 float [B, *latent_shape] -> images uint8 [B, H, W, C]."""
    ...


@dataclasses.dataclass(frozen=True)
class Pixels:
  """x_0 is the image itself, scaled to [-1, 1]. It has no parameters."""

  image_shape: Shape

  @property
  def latent_shape(self) -> Shape:
    """The shape of the images."""
    return self.image_shape

  @property
  def identity(self) -> bool:
    """True."""
    return True

  @property
  def bin_width(self) -> float:
    """That of 256 values in [-1, 1]."""
    return BIN

  def moments(self, params: Any, images: jax.Array) -> jax.Array:
    """`to_float`."""
    del params
    return to_float(images)

  def x0(self, params: Any, moments: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """The moments: nothing is sampled."""
    del params, keys
    return moments

  def decode(self, params: Any, x0: jax.Array) -> jax.Array:
    """`to_uint8`."""
    del params
    return to_uint8(x0)


def to_float(images: jax.Array) -> jax.Array:
  """Pixels uint8 [..] in 0..255 as float32 [..] in [-1, 1].

  >>> to_float(jnp.asarray([0, 255], jnp.uint8)).tolist()
  [-1.0, 1.0]
  """
  return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
  """Images float [..] as uint8 [..]: the exact inverse of `to_float`; values outside [-1, 1] are clipped.

  >>> to_uint8(jnp.asarray([-1.5, 0.0, 1.0])).tolist()
  [0, 128, 255]
  """
  return jnp.round(jnp.clip((images.astype(jnp.float32) + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)
