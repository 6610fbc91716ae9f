"""The autoencoder of Rombach et al. 2022 (appendix E.1), the first stage of latent diffusion, read top to bottom.

The encoder halves the image once less than it has levels, the decoder mirrors it; both are made of the U-Net's residual
blocks without a timestep. What bounds the latents is a diagonal Gaussian (KL) or a codebook (VQ).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from ddpm_jax.models.layers import (
  BLOCKS,
  Conv3x3,
  Dense,
  Downsample,
  GroupNorm,
  SelfAttention,
  Upsample,
  pixelwise,
  pytorch_init,
  rematerialized,
)

EPSILON = BLOCKS["ddpm"].epsilon  # 1e-6, of every norm
LOG_VARIANCE = (-30.0, 20.0)  # within which the log-variance of the posterior is kept


class Half(nn.Module):
  """What encoder and decoder share.

  Attributes:
    features: channels of the result.
    channels: at the full resolution.
    channel_multipliers: channels of each level as multiples of `channels`; each level but the first halves the image.
    num_res_blocks: residual blocks of each level.
    attention_resolutions: heights at which each residual block is followed by attention.
    num_groups: groups of GroupNorm; divides `channels`.
    dropout: rate inside the residual blocks.
    dtype: of the activations; parameters, the last layers and what comes out are float32.
    remat: see `layers.rematerialized`.
    middle_attention: whether there is attention between the two residual blocks of the lowest level.
  """

  features: int
  channels: int
  channel_multipliers: tuple[int, ...]
  num_res_blocks: int
  attention_resolutions: tuple[int, ...]
  num_groups: int
  dropout: float
  dtype: DTypeLike
  remat: str
  middle_attention: bool

  def block(
    self, h: jax.Array, features: int, name: str, dropout_keys: jax.Array | None, attention: str | None = None
  ) -> jax.Array:
    """A residual block of h [B, H, W, C] -> [B, H, W, features], and the attention of that name after it."""
    block_class, rematted = rematerialized(self.remat)

    def whole(half: Half, h: jax.Array, dropout_keys: jax.Array | None) -> jax.Array:
      h = block_class(
        features,
        half.num_groups,
        half.dropout,
        half.dtype,
        epsilon=EPSILON,
        kernel_init=pytorch_init,
        last_init=pytorch_init,
        name=name,
      )(h, None, dropout_keys)
      if not attention:
        return h
      return SelfAttention(
        half.num_groups,
        half.dtype,
        epsilon=EPSILON,
        kernel_init=pytorch_init,
        last_init=pytorch_init,
        name=attention,
      )(h)

    return rematted(whole)(self, h, dropout_keys)

  def level(self, h: jax.Array, features: int, count: int, name: str, dropout_keys: jax.Array | None) -> jax.Array:
    """`count` residual blocks with the attention that their resolution has."""
    attends = h.shape[1] in self.attention_resolutions
    for i in range(count):
      attention = f"{name}_block{i}_attention" if attends else None
      h = self.block(h, features, f"{name}_block{i}", dropout_keys, attention)
    return h

  def middle(self, h: jax.Array, dropout_keys: jax.Array | None) -> jax.Array:
    """Residual block, attention, residual block."""
    attention = "mid_attention" if self.middle_attention else None
    h = self.block(h, h.shape[-1], "mid_block0", dropout_keys, attention)
    return self.block(h, h.shape[-1], "mid_block1", dropout_keys)

  def end(self, h: jax.Array, features: int) -> jax.Array:
    """The last norm and convolution: float32 [B, H, W, features]."""
    h = nn.swish(GroupNorm(self.num_groups, jnp.float32, EPSILON, name="norm_out")(h))
    return Conv3x3(features, pytorch_init, jnp.float32, name="conv_out")(h)


class Encoder(Half):
  """Images -> what the latents are drawn from."""

  @nn.compact
  def __call__(self, x: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
    """x float [B, H, W, C], dropout_keys B random keys or None -> float32 [B, H / f, W / f, features]."""
    h = Conv3x3(self.channels, pytorch_init, self.dtype, name="conv_in")(x)
    for level, multiplier in enumerate(self.channel_multipliers):
      h = self.level(h, self.channels * multiplier, self.num_res_blocks, f"down{level}", dropout_keys)
      if level < len(self.channel_multipliers) - 1:
        h = Downsample(self.dtype, kernel_init=pytorch_init, name=f"down{level}_downsample")(h)
    h = self.end(self.middle(h, dropout_keys), self.features)
    return pixelwise(Dense(self.features, pytorch_init, jnp.float32, name="quant_conv"), h)


class Decoder(Half):
  """Latents -> images."""

  @nn.compact
  def __call__(self, z: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
    """z float [B, h, w, z], dropout_keys B random keys or None -> float32 [B, f h, f w, features], not clipped."""
    h = pixelwise(Dense(z.shape[-1], pytorch_init, jnp.float32, name="post_quant_conv"), z)
    widths = [self.channels * multiplier for multiplier in self.channel_multipliers]
    h = Conv3x3(widths[-1], pytorch_init, self.dtype, name="conv_in")(h)
    h = self.middle(h, dropout_keys)
    for level, features in reversed(list(enumerate(widths))):
      h = self.level(h, features, self.num_res_blocks, f"up{level}", dropout_keys)
      if level > 0:
        h = Upsample(self.dtype, pytorch_init, name=f"up{level}_upsample")(h)
    return self.end(h, self.features)


class Codebook(nn.Module):
  """K vectors of the latents' size, uniform within 1/K at first (van den Oord et al. 2017).

  Attributes:
    size: K.
    features: z, of a vector.
  """

  size: int
  features: int

  @nn.compact
  def __call__(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest vectors: see `Autoencoder.quantize`."""

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
      return jax.random.uniform(key, shape, jnp.float32, -1.0 / self.size, 1.0 / self.size)

    embedding = self.param("embedding", init, (self.size, self.features))
    return quantize(z, embedding)


def quantize(z: jax.Array, embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The vector of a codebook that is nearest to each latent by squared distance; of several, that of lowest index.

  Row by row of the latents, as there are as many distances as latents times vectors. The gradient by the codebook is a
  sum of products with one-hot vectors, kept nowhere: that of an index is a scatter, which GPUs add up in any order.

  Args:
    z: float [B, h, w, C].
    embedding: float32 [K, C].

  Returns:
    float32 [B, h, w, C], of which the gradient by z is zero, and their indices, int32 [B, h, w].
  """

  def nearest(row: jax.Array) -> jax.Array:  # [B, w, C] -> [B, w]
    squares = (jnp.square(row[:, :, c, None] - codes[None, None, :, c]) for c in range(codes.shape[1]))  # [B, w, K]
    return jnp.argmin(functools.reduce(jnp.add, squares), axis=-1)

  @jax.checkpoint
  def look_up(indices: jax.Array, embedding: jax.Array) -> jax.Array:  # [B, w] -> [B, w, C]
    one_hot = jax.nn.one_hot(indices, len(embedding), dtype=jnp.float32)
    return jnp.matmul(one_hot, embedding, precision=jax.lax.Precision.HIGHEST)

  rows, codes = jax.lax.stop_gradient((jnp.moveaxis(z.astype(jnp.float32), 1, 0), embedding))
  indices = jax.lax.map(nearest, rows)
  vectors = jax.lax.map(lambda row: look_up(row, embedding), indices)
  return jnp.moveaxis(vectors, 0, 1), jnp.moveaxis(indices, 0, 1).astype(jnp.int32)


class Autoencoder(nn.Module):
  """Encoder, decoder and, of VQ, codebook; its parameters are {'encoder', 'decoder', 'codebook'}.

  Attributes:
    out_channels: C, channels of the image.
    channels, channel_multipliers, attention_resolutions, num_groups, dropout, dtype, remat, middle_attention: see
      `Half`.
    num_res_blocks: of each level of the encoder; the decoder has one more.
    latent_channels: z.
    regularizer: 'kl' or 'vq'.
    codebook_size: K, of 'vq'.
  """

  out_channels: int
  channels: int = 128
  channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  attention_resolutions: tuple[int, ...] = ()
  latent_channels: int = 4
  regularizer: str = "kl"
  codebook_size: int = 0
  num_groups: int = 32
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32
  remat: str = "none"
  middle_attention: bool = True

  def setup(self) -> None:
    """Makes the parts."""
    shared = {
      "channels": self.channels,
      "channel_multipliers": self.channel_multipliers,
      "attention_resolutions": self.attention_resolutions,
      "num_groups": self.num_groups,
      "dropout": self.dropout,
      "dtype": self.dtype,
      "remat": self.remat,
      "middle_attention": self.middle_attention,
    }
    width = self.latent_channels * (2 if self.regularizer == "kl" else 1)
    self.encoder = Encoder(**shared, num_res_blocks=self.num_res_blocks, features=width)
    self.decoder = Decoder(**shared, num_res_blocks=self.num_res_blocks + 1, features=self.out_channels)
    if self.regularizer == "vq":
      self.codebook = Codebook(self.codebook_size, self.latent_channels)

  def __call__(self, x: jax.Array) -> jax.Array:
    """The reconstruction without sampling: x float [B, H, W, C] -> float32 [B, H, W, C]. Meets every parameter."""
    z = self.moments(x)
    z = z[..., : self.latent_channels] if self.regularizer == "kl" else self.quantize(z)[0]
    return self.decode(z)

  def moments(self, x: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
    """What the latents of images are drawn from.

    Args:
      x: float [B, H, W, C] in [-1, 1]; H and W divisible by f = 2^(levels - 1).
      dropout_keys: B random keys, or None for no dropout.

    Returns:
      float32; of 'kl' [B, H / f, W / f, 2 z], the mean and the log-variance (kept within -30 and 20) of the posterior;
      of 'vq' [B, H / f, W / f, z], before quantisation.
    """
    moments = self.encoder(x, dropout_keys)
    if self.regularizer == "vq":
      return moments
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return jnp.concatenate([mean, jnp.clip(log_variance, *LOG_VARIANCE)], axis=-1)

  def decode(self, z: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
    """Latents float [B, h, w, z], of 'vq' quantised ones -> images float32 [B, f h, f w, C], not clipped."""
    return self.decoder(z, dropout_keys)

  def quantize(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of 'vq': latents float [B, h, w, z] -> float32 [B, h, w, z], indices int32 [B, h, w]; see `quantize`."""
    return self.codebook(z)
