"""The discriminator of patches of Isola et al. 2017 (pix2pix), as the autoencoders of Esser et al. 2021 have it.

One thing differs: where that has BatchNorm, it has GroupNorm. Each image is judged alone, so that a batch split over
devices or accumulated over microbatches gives the same loss.
"""

from __future__ import annotations

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike

from ddpm_jax.models.layers import GroupNorm

CHANNELS = 64  # of the first layer; up to eight times as many in the next ones
_GROUPS = 32
_EPSILON = 1e-5
_SLOPE = 0.2  # of leaky ReLU below zero

kernel_init = nn.initializers.normal(0.02)


def scale_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
  """Normal with mean 1 and deviation 0.02."""
  return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


class Conv4x4(nn.Module):
  """A convolution with a 4x4 kernel and a pixel of zeros around the image.

  Attributes:
    features: F, channels of the output.
    stride: 1 or 2.
    bias: whether there is one.
    dtype: of the computation; the parameters are float32.
  """

  features: int
  stride: int
  bias: bool
  dtype: DTypeLike

  @property
  def resample(self) -> str:
    """The kind of convolution, for `build.fast_convolutions`."""
    return "4x4_down" if self.stride == 2 else "4x4"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H', W', F], see `size_after`."""
    kernel = self.param("kernel", kernel_init, (4, 4, x.shape[-1], self.features), jnp.float32)
    height, width = (size_after(self.stride, size) for size in x.shape[1:3])
    if self.stride == 2:  # the last row of an odd number is followed by one of zeros, for which nothing is kept
      x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
    y = self.convolve(x, kernel)[:, :height, :width]
    if not self.bias:
      return y
    bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
    return (y + bias[None, None, None, :]).astype(y.dtype)  # added as float32, for the reason that layers.Dense gives

  def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, H, W, C], kernel [4, 4, C, F], of one type -> [B, H', W', F]; see `build.fast_convolutions`."""
    strides, padding = (self.stride, self.stride), ((1, 1), (1, 1))
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def size_after(stride: int, size: int) -> int:
  """Rows, or columns, after a convolution of an image that has `size` of them; less than 1: none is left."""
  return (size - 2) // stride + 1


def strides(layers: int) -> tuple[int, ...]:
  """Of the convolutions, the last of which makes the logits."""
  return (2,) * layers + (1, 1)


def sizes(layers: int, size: int) -> Iterator[int]:
  """`size_after` each of them."""
  for stride in strides(layers):
    size = size_after(stride, size)
    yield size


class Discriminator(nn.Module):
  """Logits for overlapping patches, 70 pixels wide of three layers, 34 of two, 16 of one: high for real ones.

  Attributes:
    layers: convolutions with stride 2.
    dtype: of the activations; parameters, the last convolution and the logits are float32.
  """

  layers: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x float [B, H, W, C] in [-1, 1] -> float32 [B, h, w]."""
    *inner, last = strides(self.layers)
    for i, stride in enumerate(inner):
      x = Conv4x4(CHANNELS * min(2**i, 8), stride, i == 0, self.dtype, name=f"conv{i}")(x)
      if i:
        x = GroupNorm(_GROUPS, self.dtype, _EPSILON, scale_init, name=f"norm{i}")(x)
      x = nn.leaky_relu(x, _SLOPE)
    return Conv4x4(1, last, True, jnp.float32, name="conv_out")(x)[..., 0]
