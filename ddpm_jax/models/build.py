"""ModelConfig -> module: the one place where names become classes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext

from ddpm_jax.config import AUTO_ATTENTION, ModelConfig, check_size
from ddpm_jax.diffusion.denoiser import Cond, Denoiser, Network
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.errors import UserError
from ddpm_jax.models.layers import Conv3x3, SelfAttention, num_norm_groups
from ddpm_jax.models.unet import UNet
from ddpm_jax.runtime import cpu

Params = Any  # a nested dict of float32 arrays


def num_labels(config: ModelConfig) -> int:
  """Rows of the label embedding: one for each class, and the last for no label where some are dropped."""
  return 0 if config.stage == "classifier" else config.num_classes + (null_label(config) is not None)


def null_label(config: ModelConfig) -> int | None:
  """The label that stands for none; None if the network has no such label."""
  return config.num_classes if config.num_classes and config.label_dropout else None


def fitted(config: ModelConfig, image_shape: tuple[int, int, int]) -> ModelConfig:
  """The network with what it leaves to the size of the images [H, W, C]: where attention is.

  Attention costs the square of the number of pixels, so by default it is at the lowest level alone, and only there if
  that has at most 16 x 16 of them, as in Ho et al. (2020).
  """
  if config.attention_resolutions != AUTO_ATTENTION:
    return config
  height, width = (size // 2 ** (len(config.channel_multipliers) - 1) for size in image_shape[:2])
  return dataclasses.replace(config, attention_resolutions=(height,) if 1 <= height * width <= 16 * 16 else ())


def build_model(config: ModelConfig, image_shape: tuple[int, int, int]) -> UNet:
  """The U-Net for images of that shape [H, W, C], or its half that is a classifier.

  Raises:
    UserError: see `config.check_size`, or an attention resolution is never reached, or channels cannot be divided into
      heads.
  """
  height, width, channels = image_shape
  check_size(config, height, width)
  config = fitted(config, image_shape)
  resolutions = [height // 2**level for level in range(len(config.channel_multipliers))]
  for resolution in config.attention_resolutions:
    if resolution not in resolutions:
      raise UserError(
        f"attention_resolutions: {resolution} is none of this U-Net's resolutions, {', '.join(map(str, resolutions))}; "
        "use some of those, or --attention_resolutions= for attention in the middle only"
      )
  _check_heads(config, resolutions)
  classifier = config.stage == "classifier"
  assert config.num_classes or not classifier, "a classifier is built for its classes"
  return UNet(
    out_channels=config.num_classes if classifier else channels,
    channels=config.channels,
    channel_multipliers=config.channel_multipliers,
    num_res_blocks=config.num_res_blocks,
    attention_resolutions=config.attention_resolutions,
    block=config.block,
    num_heads=config.num_heads,
    head_channels=config.head_channels,
    num_groups=config.norm_groups or num_norm_groups(config.channels),
    dropout=config.dropout,
    dtype=jnp.dtype(config.dtype),
    remat=config.remat,
    num_labels=num_labels(config),
    classifier=classifier,
  )


def _check_heads(config: ModelConfig, resolutions: list[int]) -> None:
  """Raises UserError unless heads divide the channels wherever there is attention; in the middle there always is."""
  name = "head_channels" if config.head_channels else "num_heads"
  value = getattr(config, name)
  for resolution, multiplier in zip(resolutions, config.channel_multipliers, strict=True):
    width, attends = config.channels * multiplier, resolution in (*config.attention_resolutions, resolutions[-1])
    if attends and width % value:
      raise UserError(
        f"{name}: {value} does not divide the {width} channels of the level of {resolution} rows, which has "
        "attention; use a divisor"
      )


def fast_convolutions(plain: Callable, args: tuple, kwargs: dict, context: InterceptorContext) -> Any:
  """An interceptor, for `flax.linen.intercept_methods`: 3x3 convolutions in less time on CPUs."""
  if isinstance(context.module, Conv3x3) and context.method_name == "convolve":
    return cpu.convolve(args[0], args[1], context.module.resample)
  return plain(*args, **kwargs)


def fused_attention(plain: Callable, args: tuple, kwargs: dict, context: InterceptorContext) -> Any:
  """An interceptor as `fast_convolutions`: attention by one kernel of cuDNN, where that has one.

  It takes half precision, and heads of up to 128 channels in eights. One head alone stays as it is: its programs, and
  so its bits, are those of earlier releases.
  """
  if isinstance(context.module, SelfAttention) and context.method_name == "attend":
    (_, _, num_heads, size), half = args[0].shape, args[0].dtype in (jnp.bfloat16, jnp.float16)
    if half and num_heads > 1 and size % 8 == 0 and size <= 128:
      return jax.nn.dot_product_attention(*args, implementation="cudnn")
  return plain(*args, **kwargs)


class TrainableNetwork(Network, Protocol):
  """A network that can be trained: one that makes its own first parameters."""

  def init(self, key: jax.Array, image_shape: tuple[int, int, int]) -> Params:
    """Fresh parameters, a tree of float32 arrays, for images of that shape [H, W, C]."""
    ...


@dataclasses.dataclass(frozen=True)
class UNetNetwork:
  """The U-Net as a `diffusion.denoiser.Network`, a pure function of its parameters. Its condition is a label.

  Attributes:
    model: the module.
    attention: 'cudnn' where its programs are for GPUs with cuDNN alone, see `fused_attention`; else 'xla'.
  """

  model: UNet
  attention: str = "xla"

  def __call__(
    self, params: Params, x: jax.Array, time: jax.Array, cond: Cond = None, *, dropout_keys: jax.Array | None = None
  ) -> jax.Array:
    """x float32 [B, H, W, C], time [B], cond int32 [B] or, if it is unconditional, None -> float32 as the U-Net's."""
    assert (cond is not None) == (self.model.num_labels > 0), "a label goes to a conditional network, and to no other"
    fused = nn.intercept_methods(fused_attention) if self.attention == "cudnn" else contextlib.nullcontext()
    with nn.intercept_methods(fast_convolutions), fused:
      output = self.model.apply({"params": params}, x, time, dropout_keys, cond)
    assert isinstance(output, jax.Array)  # and not a pair with mutated collections: the U-Net has none
    return output

  def init(self, key: jax.Array, image_shape: tuple[int, int, int]) -> Params:
    """See `init_params`."""
    return init_params(self.model, key, image_shape)


def build_denoiser(
  config: ModelConfig,
  prediction: str,
  image_shape: tuple[int, int, int],
  network: TrainableNetwork | None = None,
  *,
  attention: str = "xla",
) -> Denoiser:
  """The denoiser of that prediction: the one place that knows predictions by name. Raises UserError.

  network: in the place of the U-Net of `config`.
  attention: see `UNetNetwork`.
  """
  network = network or UNetNetwork(build_model(config, image_shape), attention)
  return Denoiser(network, PARAMETERIZATIONS[prediction])


def portable(denoiser: Denoiser) -> Denoiser:
  """The same function of the same parameters, for programs that run on any kind of device."""
  if not isinstance(denoiser.network, UNetNetwork):
    return denoiser
  return dataclasses.replace(denoiser, network=dataclasses.replace(denoiser.network, attention="xla"))


def init_params(model: UNet, key: jax.Array, image_shape: tuple[int, int, int]) -> Params:
  """Fresh float32 parameters, a nested dict."""
  xt, time = jnp.zeros((1, *image_shape), jnp.float32), jnp.zeros((1,), jnp.int32)
  label = jnp.zeros((1,), jnp.int32) if model.num_labels else None
  return model.init(key, xt, time, None, label)["params"]


def num_params(params: Params) -> int:
  """The number of scalars in a parameter tree (arrays or shapes)."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
