"""The perceptual distance of two images: LPIPS of Zhang et al. 2018 with VGG16, version 0.1, and its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import Conv3x3, pytorch_init

# Channels of the 3x3 convolutions of VGG16 (Simonyan and Zisserman 2015) between its pools: its configuration D.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Mean and deviation of ImageNet's colours, for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10  # added to the length of a vector of features


class VGG16(nn.Module):
  """The convolutions of VGG16: what each of its five stages ends with, before the pool."""

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
    """x float32 [B, H, W, 3] -> five arrays float32 [B, H / 2^i, W / 2^i, C_i], rounded down, none negative."""
    ends = []
    for i, stage in enumerate(STAGES):
      if i:
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
      for j, channels in enumerate(stage):
        # Of the two subgradients of ReLU at zero it has 0: `unit` needs that.
        x = nn.relu(Conv3x3(channels, pytorch_init, jnp.float32, name=f"conv{i + 1}_{j + 1}")(x))
      ends.append(x)
    return tuple(ends)


class LPIPS(nn.Module):
  """The distance; its parameters are {'vgg16': ..., 'weights1' to 'weights5': [C_i], not negative}."""

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """See `models.build.lpips`."""
    both = jnp.concatenate([x, y]).astype(jnp.float32)
    shift, scale = (jnp.asarray(colours, jnp.float32)[None, None, None, :] for colours in (SHIFT, SCALE))
    both = (jnp.broadcast_to(both, (*both.shape[:3], 3)) - shift) / scale
    halves = [jnp.split(features, 2) for features in VGG16(name="vgg16")(both)]
    weights = [
      self.param(f"weights{i + 1}", nn.initializers.ones_init(), (stage[-1],), jnp.float32)
      for i, stage in enumerate(STAGES)
    ]
    return feature_distance([x for x, _ in halves], [y for _, y in halves], weights)


def feature_distance(
  x: Sequence[jax.Array], y: Sequence[jax.Array], weights: Sequence[jax.Array] | None = None
) -> jax.Array:
  """The squared difference of unit vectors of features, the mean over pixels, summed over layers (eq. 1 there).

  Args:
    x, y: of each layer of a network what it makes of an image, float32 [B, H_l, W_l, C_l].
    weights: of each layer's channels, [C_l]; None: 1.

  Returns:
    float32 [B].
  """
  total = jnp.zeros(x[0].shape[0], jnp.float32)
  for i, (one, other) in enumerate(zip(x, y, strict=True)):
    difference = jnp.square(unit(one) - unit(other))
    difference = difference if weights is None else difference * weights[i][None, None, None, :]
    total += jnp.mean(jnp.sum(difference, axis=-1), axis=(1, 2))
  return total


def unit(features: jax.Array) -> jax.Array:
  """Vectors along the last axis with length 1; zero stays zero, and its gradient is zero, not infinite."""
  squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
  some = squares > 0
  length = jnp.sqrt(jnp.where(some, squares, 1.0))
  return jnp.where(some, features / (length + _EPSILON), 0.0)


def tensor_names() -> dict[str, tuple[str, ...]]:
  """Name of each tensor in the files of torchvision and of the `lpips` package -> its path in the parameters."""
  names: dict[str, tuple[str, ...]] = {}
  index = 0  # in torchvision's sequence of convolutions, ReLUs and pools
  for i, stage in enumerate(STAGES):
    for j in range(len(stage)):
      for theirs, ours in (("weight", "kernel"), ("bias", "bias")):
        names[f"features.{index}.{theirs}"] = ("vgg16", f"conv{i + 1}_{j + 1}", ours)
      index += 2
    index += 1
    names[f"lin{i}.model.1.weight"] = (f"weights{i + 1}",)
  return names


def abstract_params() -> Any:
  """The tree of parameters as shapes."""
  x = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  return jax.eval_shape(lambda x: LPIPS().init(jax.random.key(0, impl="threefry2x32"), x, x), x)["params"]
