"""A small convolutional classifier, whose inner layer serves to compare images."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.layers import default_init

FEATURES = 64
_NORMS = "conv1_norm", "conv2_norm", "conv3_norm"
_LARGEST_MAP = 16  # pixels of the first layer's output, of the shorter side: large images stay cheap


class Classifier(nn.Module):
  """Three convolutions with GroupNorm and swish, then two dense layers. Nothing in it is random.

  The first convolution keeps the size of images of up to 16 pixels, and makes 16 or a few less of more. Each of the
  other two halves the size.

  Attributes:
    num_classes: K.
  """

  num_classes: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x float32 [B, H, W, C] in [-1, 1] -> features float32 [B, 64], logits float32 [B, K], each row for itself.

    Any H and W, but the parameters are those for one H, W and C.
    """
    stride = 1
    while min(x.shape[1:3]) // stride > _LARGEST_MAP:
      stride *= 2
    x = self._convolution(x, 16, stride, "conv1")
    x = self._convolution(x, 32, 2, "conv2")
    x = self._convolution(x, 64, 2, "conv3")
    x = x.reshape(x.shape[0], -1)
    x = nn.swish(nn.Dense(FEATURES, kernel_init=default_init, precision="highest", name="features")(x))
    return x, nn.Dense(self.num_classes, kernel_init=default_init, precision="highest", name="logits")(x)

  def _convolution(self, x: jax.Array, channels: int, stride: int, name: str) -> jax.Array:
    """[B, H, W, C] -> [B, H / stride, W / stride, channels], rounded up."""
    # "highest": GPUs and TPUs multiply with fewer bits else, and the features would depend on the machine.
    size = max(3, stride)
    x = nn.Conv(channels, (size, size), stride, kernel_init=default_init, precision="highest", name=name)(x)
    return nn.swish(nn.GroupNorm(channels // 4, name=f"{name}_norm")(x))


def maps(model: Classifier, params: Any, x: jax.Array) -> list[jax.Array]:
  """What the three convolutions make of x float32 [B, H, W, C] in [-1, 1]: [B, h, w, F] each."""
  _, state = model.apply({"params": params}, x, capture_intermediates=lambda module, _: module.name in _NORMS)
  return [nn.swish(jnp.asarray(state["intermediates"][name]["__call__"][0])) for name in _NORMS]
