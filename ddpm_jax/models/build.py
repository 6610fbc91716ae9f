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

from ddpm_jax.config import AUTO_ATTENTION, AutoencoderConfig, ModelConfig, check_size, image_size
from ddpm_jax.diffusion.denoiser import Cond, Denoiser, Network
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.errors import UserError
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.models.discriminator import Conv4x4, Discriminator, sizes
from ddpm_jax.models.layers import Conv3x3, SelfAttention, num_norm_groups
from ddpm_jax.models.lpips import LPIPS
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
  that has at most 16 x 16 of them, as in Ho et al. (2020). An autoencoder has it in the middle alone.
  """
  if config.attention_resolutions != AUTO_ATTENTION:
    return config
  if config.stage == "autoencoder":
    return dataclasses.replace(config, attention_resolutions=())
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
  resolutions = _resolutions(config, height)
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


def _resolutions(config: ModelConfig, height: int) -> list[int]:
  """Rows of each level. Raises UserError if attention is to be elsewhere."""
  resolutions = [height // 2**level for level in range(len(config.channel_multipliers))]
  network = "autoencoder" if config.stage == "autoencoder" else "U-Net"
  for resolution in config.attention_resolutions:
    if resolution not in resolutions:
      raise UserError(
        f"attention_resolutions: {resolution} is none of this {network}'s resolutions, "
        f"{', '.join(map(str, resolutions))}; use some of those, or --attention_resolutions= for attention in the "
        "middle only"
      )
  return resolutions


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
  """An interceptor, for `flax.linen.intercept_methods`: 3x3 and 4x4 convolutions in less time on CPUs."""
  if isinstance(context.module, Conv3x3 | Conv4x4) and context.method_name == "convolve":
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


@dataclasses.dataclass(frozen=True)
class AutoencoderNetwork:
  """The autoencoder as pure functions of its parameters {'encoder', 'decoder', 'codebook' of 'vq'}.

  Attributes:
    model: the module.
  """

  model: Autoencoder

  @property
  def regularizer(self) -> str:
    """'kl' or 'vq'."""
    return self.model.regularizer

  @property
  def factor(self) -> int:
    """How many pixels in a row become one."""
    return 2 ** (len(self.model.channel_multipliers) - 1)

  def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Of the latents (h, w, z) of images (H, W, C)."""
    height, width, _ = image_shape
    return height // self.factor, width // self.factor, self.model.latent_channels

  def moments(self, params: Params, x: jax.Array, *, dropout_keys: jax.Array | None = None) -> jax.Array:
    """See `Autoencoder.moments`."""
    return self._apply(params, x, dropout_keys, method="moments")

  def decode(self, params: Params, z: jax.Array, *, dropout_keys: jax.Array | None = None) -> jax.Array:
    """See `Autoencoder.decode`."""
    return self._apply(params, z, dropout_keys, method="decode")

  def quantize(self, params: Params, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `Autoencoder.quantize`."""
    return self._apply(params, z, method="quantize")

  def init(self, key: jax.Array, image_shape: tuple[int, int, int]) -> Params:
    """Fresh parameters, a tree of float32 arrays."""
    return self.model.init(key, jnp.zeros((1, *image_shape), jnp.float32))["params"]

  def _apply(self, params: Params, *arguments: Any, method: str) -> Any:
    with nn.intercept_methods(fast_convolutions):
      return self.model.apply({"params": params}, *arguments, method=method)


def build_autoencoder(
  model: ModelConfig, autoencoder: AutoencoderConfig, image_shape: tuple[int, int, int]
) -> AutoencoderNetwork:
  """The autoencoder for images of that shape [H, W, C].

  Raises:
    UserError: see `config.check_size`, or an attention resolution is never reached.
  """
  height, width, channels = image_shape
  check_size(model, height, width)
  model = fitted(model, image_shape)
  _resolutions(model, height)
  return AutoencoderNetwork(
    Autoencoder(
      out_channels=channels,
      channels=model.channels,
      channel_multipliers=model.channel_multipliers,
      num_res_blocks=model.num_res_blocks,
      attention_resolutions=model.attention_resolutions,
      latent_channels=autoencoder.latent_channels,
      regularizer=autoencoder.regularizer,
      codebook_size=autoencoder.codebook_size if autoencoder.regularizer == "vq" else 0,
      num_groups=model.norm_groups or num_norm_groups(model.channels),
      dropout=model.dropout,
      dtype=jnp.dtype(model.dtype),
      remat=model.remat,
    )
  )


# Attributes of the module that a network is described by, with their types, as JSON has them.
_SETTINGS = {
  **dict.fromkeys(
    ("out_channels", "channels", "num_res_blocks", "latent_channels", "codebook_size", "num_groups"), int
  ),
  **dict.fromkeys(("channel_multipliers", "attention_resolutions"), list),
  "regularizer": str,
  "middle_attention": bool,
}


def autoencoder_settings(network: AutoencoderNetwork) -> dict[str, Any]:
  """What its parameters mean, as JSON values: the inverse of `autoencoder_of_settings`.

  Dropout, the type of the activations and --remat belong to training, and are left out.
  """
  values = {name: getattr(network.model, name) for name in _SETTINGS}
  return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def config_of_autoencoder(network: AutoencoderNetwork, image_shape: tuple[int, int, int]) -> dict[str, Any]:
  """Options of a run of --stage=autoencoder with this network, but for attention in the middle, which has no option."""
  settings = autoencoder_settings(network)
  same = ("channels", "num_res_blocks", "latent_channels", "regularizer")
  of_vq = {"codebook_size": settings["codebook_size"]} if network.regularizer == "vq" else {}
  return {
    "stage": "autoencoder",
    "image_size": image_size(*image_shape[:2]),
    "norm_groups": settings["num_groups"],
    "discriminator_weight": 0.0,
    **{name: settings[name] for name in same},
    **{name: tuple(settings[name]) for name in ("channel_multipliers", "attention_resolutions")},
    **of_vq,
  }


def autoencoder_of_settings(settings: Any, image_shape: tuple[int, int, int]) -> AutoencoderNetwork:
  """The network that these settings describe, in float32, for images of that shape [H, W, C].

  Raises:
    UserError: names the setting that is missing, unknown or none, or the size that the network cannot halve.
  """
  settings = settings if isinstance(settings, dict) else {}
  for name in settings.keys() - _SETTINGS.keys():
    raise UserError(f"{name}: {settings[name]!r} is no setting of an autoencoder")
  for name, kind in _SETTINGS.items():
    value = settings.get(name)
    if type(value) is not kind or (kind is list and any(type(entry) is not int or entry < 1 for entry in value)):
      raise UserError(f"{name}: {value!r} is none of an autoencoder")
  if settings["regularizer"] not in ("kl", "vq") or not settings["channel_multipliers"]:
    raise UserError("regularizer, channel_multipliers: they are none of an autoencoder")
  tuples = {name: tuple(settings[name]) for name, kind in _SETTINGS.items() if kind is list}
  network = AutoencoderNetwork(Autoencoder(**settings | tuples, dtype=jnp.dtype("float32")))
  height, width, channels = image_shape
  if height % network.factor or width % network.factor:
    raise UserError(
      f"images of {height}x{width} pixels are not divisible by {network.factor}, as its levels need; use another "
      "--image_size"
    )
  if channels != network.model.out_channels:
    raise UserError(f"out_channels: {network.model.out_channels} of the network, and {channels} of its images")
  return network


@dataclasses.dataclass(frozen=True)
class DiscriminatorNetwork:
  """The discriminator as a pure function of its parameters.

  Attributes:
    model: the module.
    image_shape: H, W, C, of the images that it judges.
  """

  model: Discriminator
  image_shape: tuple[int, int, int]

  def __call__(self, params: Params, x: jax.Array) -> jax.Array:
    """x float [B, H, W, C] in [-1, 1] -> logits float32 [B, h, w]."""
    with nn.intercept_methods(fast_convolutions):
      logits = self.model.apply({"params": params}, x)
    assert isinstance(logits, jax.Array)
    return logits

  def init(self, key: jax.Array) -> Params:
    """Fresh parameters, a tree of float32 arrays."""
    return self.model.init(key, jnp.zeros((1, *self.image_shape), jnp.float32))["params"]


def build_discriminator(layers: int, image_shape: tuple[int, int, int], dtype: str = "float32") -> DiscriminatorNetwork:
  """The discriminator with so many strided convolutions for images of that shape [H, W, C].

  dtype: of the activations, 'float32' or 'bfloat16'.

  Raises:
    UserError: if nothing is left of such images.
  """
  smaller = min(image_shape[:2])
  if min(sizes(layers, smaller)) < 1:
    fewer = [n for n in range(1, layers) if min(sizes(n, smaller)) >= 1]
    remedy = f"use --discriminator_layers={fewer[-1]}" if fewer else "use --discriminator_weight=0"
    raise UserError(
      f"discriminator_layers: {layers} leave nothing of images of {image_shape[0]}x{image_shape[1]} pixels; {remedy}"
    )
  return DiscriminatorNetwork(Discriminator(layers, jnp.dtype(dtype)), image_shape)


def lpips(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
  """The perceptual distance of pairs of images, LPIPS of Zhang et al. 2018 with VGG16.

  Args:
    params: of `models.lpips.LPIPS`.
    x, y: float [B, H, W, C] in [-1, 1], H and W at least 16; C is 3, or 1, which stands for three equal ones.

  Returns:
    float32 [B], 0 for equal images.
  """
  with nn.intercept_methods(fast_convolutions):
    distances = LPIPS().apply({"params": params}, x, y)
  assert isinstance(distances, jax.Array)
  return distances


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
