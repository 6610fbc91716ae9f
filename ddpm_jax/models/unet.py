"""The U-Net of Ho et al. 2020 (appendix B), and of OpenAI, read top to bottom."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ddpm_jax.models.layers import (
  BLOCKS,
  AttentionPool,
  Conv3x3,
  Dense,
  Downsample,
  GroupNorm,
  LabelEmbedding,
  SelfAttention,
  Upsample,
  default_init,
  rematerialized,
  timestep_embedding,
  zeros_init,
)


class UNet(nn.Module):
  """Predicts eps, x0 or v from (x_t, time); its encoder half alone the class.

  Attributes:
    out_channels: channels of the image, or classes.
    channels: channels at the full resolution; even.
    channel_multipliers: channels of each level as multiples of `channels`, also 0.5; each level halves the resolution.
    num_res_blocks: residual blocks of each level on the way down, one more on the way up.
    attention_resolutions: heights at which each residual block, down and up, is followed by attention.
    block: a key of `layers.BLOCKS`.
    num_heads: of each attention.
    head_channels: channels of a head, in the place of `num_heads`; 0: as that says.
    num_groups: groups of GroupNorm; divides `channels`.
    dropout: rate inside the residual blocks.
    dtype: of the activations; parameters, the last norm and convolution, and the output are float32.
    remat: see `layers.rematerialized`; 'blocks' are those with their attention, on the way up without the
      concatenation.
    num_labels: rows of the label embedding; 0: the network is unconditional.
    classifier: leave out the way up: after the middle, attention pooling makes logits (Dhariwal and Nichol 2021).
  """

  out_channels: int
  channels: int = 128
  channel_multipliers: tuple[float, ...] = (1, 2, 2, 2)
  num_res_blocks: int = 2
  attention_resolutions: tuple[int, ...] = (16,)
  block: str = "ddpm"
  num_heads: int = 1
  head_channels: int = 0
  num_groups: int = 32
  dropout: float = 0.0
  dtype: DTypeLike = jnp.float32
  remat: str = "none"
  num_labels: int = 0
  classifier: bool = False

  @nn.compact
  def __call__(
    self, xt: jax.Array, time: jax.Array, dropout_keys: jax.Array | None = None, label: jax.Array | None = None
  ) -> jax.Array:
    """Runs the network.

    Args:
      xt: float32 [B, H, W, C]; H and W divisible by 2^(levels - 1).
      time: [B], of which the embedding is made; in the papers timesteps counted from 0.
      dropout_keys: B random keys, or None for no dropout.
      label: int32 [B] in 0..num_labels-1; None for an unconditional network.

    Returns:
      float32 [B, H, W, out_channels], zero at initialisation; of a classifier logits [B, out_channels].
    """
    kind = BLOCKS[self.block]
    block_class, rematted = rematerialized(self.remat)

    def heads_of(features: int) -> int:
      return features // self.head_channels if self.head_channels else self.num_heads

    def block(
      h: jax.Array,
      features: int,
      name: str,
      *,
      skip: jax.Array | None = None,
      attention: str | None = None,
      resample: str = "none",
    ) -> jax.Array:
      """A residual block of h, on the way up beside what `skip` brings, and the attention of that name after it."""

      # With the concatenation and the attention, so that remat keeps nothing of them.
      def whole(unet: UNet, h: jax.Array, skip: jax.Array | None, temb: jax.Array, dropout_keys: jax.Array | None):
        h = h if skip is None else jnp.concatenate([h, skip], axis=-1)
        h = block_class(
          features, unet.num_groups, unet.dropout, unet.dtype, kind.scale_shift, kind.epsilon, resample, name=name
        )(h, temb, dropout_keys)
        if not attention:
          return h
        return SelfAttention(unet.num_groups, unet.dtype, heads_of(features), kind.epsilon, name=attention)(h)

      return rematted(whole)(self, h, skip, temb, dropout_keys)

    def attention_after(name: str, h: jax.Array) -> str | None:
      return f"{name}_attention" if h.shape[1] in self.attention_resolutions else None

    def downsample(h: jax.Array, name: str) -> jax.Array:
      if kind.residual_resampling:
        return block(h, h.shape[-1], name, resample="down")
      return Downsample(self.dtype, kind.downsample, name=name)(h)

    def upsample(h: jax.Array, name: str) -> jax.Array:
      if kind.residual_resampling:
        return block(h, h.shape[-1], name, resample="up")
      return Upsample(self.dtype, name=name)(h)

    # Timestep embedding.
    temb = timestep_embedding(time, self.channels, kind.cosines_first)
    temb = Dense(4 * self.channels, default_init, self.dtype, name="temb_dense1")(temb)
    temb = Dense(4 * self.channels, default_init, self.dtype, name="temb_dense2")(nn.swish(temb))
    if label is not None:
      temb = temb + LabelEmbedding(self.num_labels, 4 * self.channels, name="label_embedding")(label)
    temb = nn.swish(temb)  # every block begins its use of the embedding with a swish; done once

    # Down.
    widths = [int(self.channels * multiplier) for multiplier in self.channel_multipliers]
    h = Conv3x3(widths[0] if kind.wide_input else self.channels, default_init, self.dtype, name="conv_in")(xt)
    skips = [h]
    for level, features in enumerate(widths):
      for i in range(self.num_res_blocks):
        name = f"down{level}_block{i}"
        h = block(h, features, name, attention=attention_after(name, h))
        skips.append(h)
      if level < len(widths) - 1:
        h = downsample(h, f"down{level}_downsample")
        skips.append(h)

    # Middle: attention at every resolution.
    features = h.shape[-1]
    h = block(h, features, "mid_block0", attention="mid_attention")
    h = block(h, features, "mid_block1")

    if self.classifier:
      h = nn.swish(GroupNorm(self.num_groups, jnp.float32, kind.epsilon, name="norm_out")(h))
      return AttentionPool(self.out_channels, heads_of(h.shape[-1]), name="pool")(h)

    # Up.
    for level, features in reversed(list(enumerate(widths))):
      for i in range(self.num_res_blocks + 1):
        name = f"up{level}_block{i}"
        h = block(h, features, name, skip=skips.pop(), attention=attention_after(name, h))
      if level > 0:
        h = upsample(h, f"up{level}_upsample")
    assert not skips

    # End, in float32: where the samplers divide by sqrt(alpha_bar_t), a rounding to bfloat16 would be multiplied too.
    h = nn.swish(GroupNorm(self.num_groups, jnp.float32, kind.epsilon, name="norm_out")(h))
    return Conv3x3(self.out_channels, zeros_init, jnp.float32, name="conv_out")(h)
