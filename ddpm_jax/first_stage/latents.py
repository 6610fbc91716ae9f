"""The first stage of a latent model: an autoencoder between images and the latents that are diffused.

The latents are standardised: with mean and deviation over the training set, for each channel, x_0 = (z - mean) / std
(Rombach et al. 2022, appendix G, divide by one deviation of all; EDM2 standardises each channel).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.first_stage.pixels import Shape, to_float, to_uint8
from ddpm_jax.keys import example_key
from ddpm_jax.models.build import AutoencoderNetwork
from ddpm_jax.workdir.stage_facts import StageFacts


@dataclasses.dataclass(frozen=True)
class Latents:
  """x_0 is the latent of an autoencoder, standardised. Equal and hashed by value; holds no arrays.

  Its parameters are {"autoencoder": those of the network, "mean": float32 [z], "std": float32 [z]}. Of a codebook the
  diffusion sees the latent before the quantisation, which is a part of the decoder.

  Attributes:
    network: the autoencoder.
    image_shape: H, W, C of an image.

  >>> from ddpm_jax.config import AutoencoderConfig, ModelConfig
  >>> from ddpm_jax.models.build import build_autoencoder
  >>> network = build_autoencoder(ModelConfig(channel_multipliers=(1, 2, 2)), AutoencoderConfig(), (32, 32, 3))
  >>> Latents(network, (32, 32, 3)).latent_shape
  (8, 8, 4)
  """

  network: AutoencoderNetwork
  image_shape: Shape

  @property
  def latent_shape(self) -> Shape:
    """h, w, z."""
    return self.network.latent_shape(self.image_shape)

  @property
  def identity(self) -> bool:
    """False."""
    return False

  def facts(self, sha256: str = "") -> StageFacts:
    """What is said of it; `sha256` is that of the parameters of its autoencoder."""
    model = self.network.model
    return StageFacts(model.regularizer, model.codebook_size, self.latent_shape, sha256)

  @property
  def bin_width(self) -> None:
    """None: latents are continuous."""
    return None

  def moments(self, params: Any, images: jax.Array) -> jax.Array:
    """Images uint8 [B, H, W, C] -> mean and log-variance, float32 [B, h, w, 2z]; with a codebook z, [B, h, w, z]."""
    return self.network.moments(params["autoencoder"], to_float(images))

  def x0(self, params: Any, moments: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """A sample of the posterior for each of the keys, the draw 'posterior'; without keys its mean. Standardised."""
    mean, std = _of_channels(params)
    return (self._sample(moments, keys) - mean) / std

  def decode(self, params: Any, x0: jax.Array) -> jax.Array:
    """x_0 [B, h, w, z] -> images uint8 [B, H, W, C]."""
    mean, std = _of_channels(params)
    z = x0 * std + mean
    if self.network.regularizer == "vq":
      z, _ = self.network.quantize(params["autoencoder"], z)
    return to_uint8(self.network.decode(params["autoencoder"], z))

  def reconstruct(self, params: Any, images: jax.Array) -> jax.Array:
    """Images uint8 [B, H, W, C] -> what the autoencoder with these parameters makes of them without sampling, uint8."""
    mean, _ = self.distribution(self.network.moments(params, to_float(images)))
    z = self.network.quantize(params, mean)[0] if self.network.regularizer == "vq" else mean
    return to_uint8(self.network.decode(params, z))

  def distribution(self, moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of z, [B, h, w, z] each, before they are standardised."""
    if self.network.regularizer == "vq":
      return moments, jnp.zeros_like(moments)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(log_variance)

  def _sample(self, moments: jax.Array, keys: jax.Array | None) -> jax.Array:
    mean, variance = self.distribution(moments)
    if keys is None or self.network.regularizer == "vq":
      return mean
    eps = jax.vmap(lambda key, mean: jax.random.normal(example_key(key, "posterior"), mean.shape))(keys, mean)
    return mean + jnp.sqrt(variance) * eps


def _of_channels(params: Any) -> tuple[jax.Array, jax.Array]:
  """Mean and deviation, [1, 1, 1, z] each."""
  return params["mean"].reshape(1, 1, 1, -1), params["std"].reshape(1, 1, 1, -1)


class FixedStage(NamedTuple):
  """A first stage that was trained before, and is not trained any more.

  Attributes:
    latents: the first stage.
    params: its parameters, see `Latents`: NumPy arrays, the same on every process, or their ShapeDtypeStructs. Mean
      and deviation are missing until they are measured.
    sha256: of the autoencoder's, hexadecimal.
  """

  latents: Latents
  params: Any
  sha256: str

  @property
  def facts(self) -> dict[str, Any]:
    """What a checkpoint says of it, JSON values: `sha256`, `mean`, `std`."""
    known = [name for name in ("mean", "std") if isinstance(self.params.get(name), np.ndarray)]
    return {"sha256": self.sha256} | {name: self.params[name].tolist() for name in known}
