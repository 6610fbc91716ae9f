"""The parts of the U-Net: of Ho et al. 2020 (appendix B), which follows PixelCNN++ and Wide ResNet, and of OpenAI's."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

# Uniform Glorot, the initialisation of every layer in the authors' code that is not a last one.
default_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
zeros_init = nn.initializers.zeros_init()  # where the authors' code has a variance of 1e-10
# One product of queries, keys and values. Its fan-out is three times theirs, so scale 2 makes its uniform range that of
# three separate C -> C layers: 2 / ((C + 3C) / 2) = 1 / ((C + C) / 2).
qkv_init = nn.initializers.variance_scaling(2.0, "fan_avg", "uniform")
# Uniform within 1 / sqrt(fan-in), the default of PyTorch: of every layer in the autoencoders of Rombach et al. 2022.
pytorch_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

CONVOLUTION = "convolution"  # the name of what a convolution has computed, for rules on what to keep


class Block(NamedTuple):
  """What makes one network of another, beside sizes.

  Attributes:
    cosines_first: the timestep embedding, see `timestep_embedding`.
    epsilon: added to the variance of a group of channels.
    scale_shift: the timestep embedding scales and shifts what comes out of the second norm of a residual block (AdaGN,
      Dhariwal and Nichol 2021, eq. 3), rather than being added to what goes into it.
    downsample: the strided convolution between two levels as `Conv3x3` has it.
    residual_resampling: between two levels are residual blocks instead, of which the first norm is followed by the mean
      of 2x2 pixels or by their repetition, as is the shortcut.
    wide_input: the first convolution has the channels of the first level, not `channels`.
  """

  cosines_first: bool = True
  epsilon: float = 1e-5
  scale_shift: bool = False
  downsample: str = "down_symmetric"
  residual_resampling: bool = False
  wide_input: bool = False


# By --block. The others than Ho's are OpenAI's network as it grew.
BLOCKS = {
  "ddpm": Block(cosines_first=False, epsilon=1e-6, downsample="down"),  # Ho et al. 2020
  "ldm": Block(),  # Rombach et al. 2022, and the models of LSUN of Nichol and Dhariwal 2021
  "iddpm": Block(scale_shift=True),  # Nichol and Dhariwal 2021
  "adm": Block(scale_shift=True, residual_resampling=True, wide_input=True),  # Dhariwal and Nichol 2021
}


def num_norm_groups(channels: int) -> int:
  """Groups of GroupNorm for a U-Net with `channels` base channels: 32, or fewer in narrow networks.

  The largest divisor of `channels` that is at most 32 and leaves at least four channels in a group, as 128 channels in
  32 groups have. With one channel in a group the norm would subtract the timestep embedding again, which is constant
  over the image.
  """
  most = max(1, min(32, channels // 4))
  return max(g for g in range(1, most + 1) if channels % g == 0)


def timestep_embedding(positions: jax.Array, channels: int, cosines_first: bool = False) -> jax.Array:
  """Sinusoidal embedding of two conventions.

  Args:
    positions: [B], counted from 0.
    channels: even.
    cosines_first: [cos | sin] with frequencies 10000^(-i / (channels/2)), as in OpenAI's code; else [sin | cos] with
      10000^(-i / (channels/2 - 1)), as in tensor2tensor.

  Returns:
    float32 [B, channels].
  """
  half = channels // 2
  last = half if cosines_first else max(half - 1, 1)
  frequencies = jnp.exp(-math.log(10000.0) / last * jnp.arange(half, dtype=jnp.float32))
  angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
  if cosines_first:
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Dense(nn.Module):
  """`flax.linen.Dense` for rows, whose bias is added as float32: parameters of the same names, shapes and values.

  The gradient by the bias is a sum over all rows, in the type of that addition. In bfloat16, with its 8 bits, sums over
  the pixels of a batch stop growing.

  Attributes:
    features: F.
    kernel_init: of the kernel; the bias begins with zeros.
    dtype: of the product; the parameters are float32.
  """

  features: int
  kernel_init: nn.initializers.Initializer
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[N, C] -> [N, F], float32 also if `dtype` is bfloat16."""
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
    bias = self.param("bias", zeros_init, (self.features,), jnp.float32)
    x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
    return x @ kernel + bias[None, :]


class LabelEmbedding(nn.Module):
  """A row for each label, standard normal at first, as in Dhariwal and Nichol 2021.

  Looked up by a product with one-hot vectors: the gradient of an index is a scatter, which GPUs add up in any order.

  Attributes:
    num_labels: rows.
    features: F.
  """

  num_labels: int
  features: int

  @nn.compact
  def __call__(self, label: jax.Array) -> jax.Array:
    """int32 [B] in 0..num_labels-1 -> float32 [B, F]."""
    rows = self.param("embedding", nn.initializers.normal(1.0), (self.num_labels, self.features), jnp.float32)
    return jnp.matmul(jax.nn.one_hot(label, self.num_labels), rows, precision=jax.lax.Precision.HIGHEST)


class Conv3x3(nn.Module):
  """`flax.linen.Conv` with a 3x3 kernel and zeros around the image: parameters of the same names, shapes and values.

  Attributes:
    features: F, channels of the output.
    kernel_init: of the kernel; the bias begins with zeros.
    dtype: of the computation; the parameters are float32.
    resample: 'none'; 'up' convolves the input enlarged by two, each pixel repeated; 'down' has stride 2, with zeros
      below and right alone (TensorFlow's SAME), 'down_symmetric' on all sides (PyTorch's padding of 1).
  """

  features: int
  kernel_init: nn.initializers.Initializer
  dtype: DTypeLike
  resample: str = "none"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H, W, F], [B, 2H, 2W, F] or, of even H and W, [B, H/2, W/2, F]."""
    kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features), jnp.float32)
    bias = self.param("bias", zeros_init, (self.features,), jnp.float32)
    x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
    y = self.convolve(x, kernel)
    return (y + bias[None, None, None, :]).astype(y.dtype)  # added as float32, for the reason that Dense gives

  def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, H, W, C], kernel [3, 3, C, F], of one type -> [B, H', W', F]; see `build.fast_convolutions`."""
    if self.resample == "up":
      x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    strides = (2, 2) if self.resample.startswith("down") else (1, 1)
    padding = [(1, 1), (1, 1)] if self.resample == "down_symmetric" else "SAME"
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pixelwise(dense: Dense, x: jax.Array) -> jax.Array:
  """A 1x1 convolution: x [B, H, W, C] -> [B, H, W, dense.features], of the dtype of `dense`.

  One product of matrices with a row for each pixel: of [B, H, W, C], XLA would transpose the image for the gradient.
  """
  return dense(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], dense.features).astype(dense.dtype)


class Dropout(nn.Module):
  """Dropout whose mask of example i depends on keys[i] and on the layer's place in the network, and on nothing else.

  So a batch split over devices, processes or accumulation steps drops the same activations.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
    """x [B, ...]; keys: B random keys, or None to let everything pass."""
    if keys is None or self.rate == 0.0:
      return x
    layer = zlib.crc32("/".join(self.path).encode())
    keep = 1.0 - self.rate
    mask = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, layer), keep, x.shape[1:]))(keys)
    return jnp.where(mask, x / keep, jnp.zeros_like(x))


class GroupNorm(nn.Module):
  """`flax.linen.GroupNorm` over groups of channels (Wu and He 2018): the same parameters, less memory traffic.

  Sums over the pixels come first and groups after, and what is left is one multiplication and one addition for each
  element, so no [..., groups, channels / groups] is made and the backward pass has as few passes over the image.
  Statistics and arithmetic are float32.
  """

  num_groups: int
  dtype: DTypeLike
  epsilon: float = BLOCKS["ddpm"].epsilon
  scale_init: nn.initializers.Initializer = nn.initializers.ones_init()

  @nn.compact
  def __call__(self, x: jax.Array, scale_shift: jax.Array | None = None) -> jax.Array:
    """[B, H, W, C] -> [B, H, W, C] of `dtype`.

    scale_shift: float32 [B, 2 C], s and then b, by which the result y becomes (1 + s) y + b.
    """
    batch, height, width, channels = x.shape
    scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)

    def mean(values: jax.Array) -> jax.Array:  # over pixels and the channels of a group, for each channel: [B, C]
      sums = jnp.sum(values, axis=(1, 2)).reshape(batch, self.num_groups, -1)
      return jnp.repeat(jnp.mean(sums, axis=-1) / (height * width), channels // self.num_groups, axis=-1)

    x = x.astype(jnp.float32)
    mu = mean(x)
    variance = jnp.maximum(mean(jnp.square(x)) - jnp.square(mu), 0.0)
    gain = jax.lax.rsqrt(variance + self.epsilon) * scale[None, :]
    offset = bias[None, :] - mu * gain
    if scale_shift is not None:
      s, b = jnp.split(scale_shift, 2, axis=-1)
      gain, offset = (1.0 + s) * gain, (1.0 + s) * offset + b
    return (x * gain[:, None, None, :] + offset[:, None, None, :]).astype(self.dtype)


def halve(x: jax.Array) -> jax.Array:
  """The mean of each 2x2 pixels: [B, H, W, C] -> [B, H/2, W/2, C]."""
  batch, height, width, channels = x.shape
  return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


def double(x: jax.Array) -> jax.Array:
  """Each pixel as 2x2: [B, H, W, C] -> [B, 2H, 2W, C]."""
  wide = x.astype(jnp.float32)  # the gradient is a sum of four
  return jnp.repeat(jnp.repeat(wide, 2, axis=1), 2, axis=2).astype(x.dtype)


class ResBlock(nn.Module):
  """GroupNorm, swish, conv, timestep embedding, GroupNorm, swish, dropout, conv (zero at first), + shortcut.

  Attributes:
    features: channels of the output.
    num_groups: of the norms.
    dropout: rate before the last convolution.
    dtype: of the activations.
    scale_shift, epsilon: see `Block`.
    resample: 'up' or 'down': doubles or halves the resolution, before the first convolution and of the shortcut.
    kernel_init: of the layers but the last convolution.
    last_init: of that one.
  """

  features: int
  num_groups: int
  dropout: float
  dtype: DTypeLike
  scale_shift: bool = False
  epsilon: float = BLOCKS["ddpm"].epsilon
  resample: str = "none"
  kernel_init: nn.initializers.Initializer = default_init
  last_init: nn.initializers.Initializer = zeros_init

  @nn.compact
  def __call__(self, x: jax.Array, temb: jax.Array | None, dropout_keys: jax.Array | None) -> jax.Array:
    """x [B, H, W, C], temb [B, E] after swish or none, dropout_keys [B] or None -> [B, H', W', features]."""
    h = nn.swish(GroupNorm(self.num_groups, self.dtype, self.epsilon, name="norm1")(x))
    if self.resample == "down":
      h, x = halve(h), halve(x)
    if self.resample == "up":
      x = double(x)  # and the convolution does the same with h
    resample = "up" if self.resample == "up" else "none"
    h = checkpoint_name(Conv3x3(self.features, self.kernel_init, self.dtype, resample, name="conv1")(h), CONVOLUTION)
    norm2 = GroupNorm(self.num_groups, self.dtype, self.epsilon, name="norm2")
    if temb is None:
      h = norm2(h)
    elif self.scale_shift:
      h = norm2(h, Dense(2 * self.features, self.kernel_init, self.dtype, name="temb_proj")(temb))
    else:
      temb = Dense(self.features, self.kernel_init, self.dtype, name="temb_proj")(temb)
      h = norm2((h + temb[:, None, None, :]).astype(h.dtype))  # added as float32, as a bias is
    h = Dropout(self.dropout, name="dropout")(nn.swish(h), dropout_keys)
    h = Conv3x3(self.features, self.last_init, self.dtype, name="conv2")(h)
    if x.shape[-1] != self.features:
      x = pixelwise(Dense(self.features, self.kernel_init, self.dtype, name="shortcut"), x)
    return x + h


def rematerialized(remat: str) -> tuple[type[ResBlock], Callable[[Callable], Callable]]:
  """The residual block for a value of --remat, and what lifts a function of a module that calls one.

  'none' keeps all that the backward pass needs; 'norms' keeps of a residual block its input and its first convolution,
  and recomputes norms, swish and dropout; 'blocks' keeps what the lifted function is given alone.
  """
  match remat:
    case "none":
      return ResBlock, lambda function: function
    case "norms":
      keep = jax.checkpoint_policies.save_only_these_names(CONVOLUTION)
      return nn.remat(ResBlock, policy=keep), lambda function: function
    case "blocks":
      return ResBlock, nn.remat
    case _:
      raise ValueError(f"unknown remat {remat!r}")


class SelfAttention(nn.Module):
  """Self-attention over the H x W positions, with a residual; zero at first.

  Attributes:
    num_groups: of the norm.
    dtype: of the activations.
    num_heads: heads, each of C / num_heads channels in a row.
    epsilon: see `Block`.
    kernel_init: of the queries, keys and values, which are one layer.
    last_init: of the last layer.
  """

  num_groups: int
  dtype: DTypeLike
  num_heads: int = 1
  epsilon: float = BLOCKS["ddpm"].epsilon
  kernel_init: nn.initializers.Initializer = qkv_init
  last_init: nn.initializers.Initializer = zeros_init

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x [B, H, W, C] -> [B, H, W, C]."""
    batch, height, width, channels = x.shape
    h = GroupNorm(self.num_groups, self.dtype, self.epsilon, name="norm")(x)
    qkv = pixelwise(Dense(3 * channels, self.kernel_init, self.dtype, name="qkv"), h)
    heads = (batch, height * width, self.num_heads, channels // self.num_heads)
    q, k, v = (part.reshape(heads) for part in jnp.split(qkv.reshape(*heads[:2], 1, 3 * channels), 3, axis=-1))
    h = self.attend(q, k, v).reshape(batch, height, width, channels)
    return x + pixelwise(Dense(channels, self.last_init, self.dtype, name="proj"), h)

  def attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(size)) v of each head, all [B, positions, heads, size]; see `build.fused_attention`."""
    return jax.nn.dot_product_attention(q, k, v)


class AttentionPool(nn.Module):
  """Self-attention of all positions and their mean, of which the latter's is the result (Radford et al. 2021, CLIP).

  Attributes:
    features: F, of the result.
    num_heads: heads, each of C / num_heads channels in a row.
  """

  features: int
  num_heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float32 [B, H, W, C] -> [B, features]."""
    batch, channels = x.shape[0], x.shape[-1]
    tokens = x.reshape(batch, -1, channels)
    tokens = jnp.concatenate([jnp.mean(tokens, axis=1, keepdims=True), tokens], axis=1)
    place = self.param("place", nn.initializers.normal(channels**-0.5), tokens.shape[1:], jnp.float32)
    qkv = Dense(3 * channels, default_init, jnp.float32, name="qkv")((tokens + place[None]).reshape(-1, channels))
    q, k, v = jnp.split(qkv.reshape(batch, -1, 3 * self.num_heads, channels // self.num_heads), 3, axis=2)
    h = jax.nn.dot_product_attention(q[:, :1], k, v).reshape(batch, channels)
    return Dense(self.features, default_init, jnp.float32, name="proj")(h)


class Downsample(nn.Module):
  """Halves the resolution with a strided 3x3 convolution.

  Attributes:
    dtype: of the activations.
    resample: 'down' or 'down_symmetric', see `Conv3x3`.
    kernel_init: of the convolution.
  """

  dtype: DTypeLike
  resample: str = "down"
  kernel_init: nn.initializers.Initializer = default_init

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H/2, W/2, C]."""
    return Conv3x3(x.shape[-1], self.kernel_init, self.dtype, self.resample, name="conv")(x)


class Upsample(nn.Module):
  """Doubles the resolution: nearest neighbour, then a 3x3 convolution."""

  dtype: DTypeLike
  kernel_init: nn.initializers.Initializer = default_init

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, 2H, 2W, C]."""
    return Conv3x3(x.shape[-1], self.kernel_init, self.dtype, "up", name="conv")(x)
