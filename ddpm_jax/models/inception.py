"""The InceptionV3 that the FID is defined by: TensorFlow's graph of 2015-12-05, read top to bottom.

It is that of Szegedy et al. 2016 with four peculiarities, which the port pytorch-fid (Seitzer 2020) has found and which
its weights need: average pools leave the padding out, the branch of the last block pools the maximum, BatchNorm adds
0.001 to the variance, and there are 1,008 classes. Names are those of that port, so that a tensor's name in its weights
is the path of a module here. Everything is float32; products are float32 also on accelerators that prefer less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIZE = 299  # height and width of the input
NUM_FEATURES = 2048
NUM_CLASSES = 1008

Variables = Any  # {'params': nested dict, 'batch_stats': nested dict} of float32 arrays
Layer = tuple[str, int, tuple[int, int]]  # name, features, (height, width) of the kernel


class BasicConv2d(nn.Module):
  """Convolution without bias, BatchNorm with the statistics of its training, ReLU."""

  features: int
  kernel_size: tuple[int, int]
  strides: int = 1
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H', W', features]."""
    x = nn.Conv(
      self.features,
      self.kernel_size,
      strides=self.strides,
      padding=self.padding,
      use_bias=False,
      precision=jax.lax.Precision.HIGHEST,
      name="conv",
    )(x)
    return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=0.001, name="bn")(x))


def chain(x: jax.Array, *layers: Layer) -> jax.Array:
  """Convolutions one after the other; each keeps height and width."""
  for name, features, kernel_size in layers:
    x = BasicConv2d(features, kernel_size, name=name)(x)
  return x


def halve(x: jax.Array, name: str, features: int) -> jax.Array:
  """A 3x3 convolution with stride 2 and no padding."""
  return BasicConv2d(features, (3, 3), strides=2, padding="VALID", name=name)(x)


def halving_pool(x: jax.Array) -> jax.Array:
  """The maximum of 3x3 pixels with stride 2 and no padding."""
  return nn.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")


def average_pool(x: jax.Array) -> jax.Array:
  """The mean of up to 3x3 pixels: at the border, of those that there are."""
  return nn.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


def max_pool(x: jax.Array) -> jax.Array:
  """The maximum of up to 3x3 pixels."""
  return nn.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")


def concatenate(*branches: jax.Array) -> jax.Array:
  """Branches beside each other in the channels."""
  return jnp.concatenate(branches, axis=-1)


class InceptionA(nn.Module):
  """35x35 pixels: 5x5 and 3x3 convolutions."""

  pool_features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, 35, 35, C] -> [B, 35, 35, 224 + pool_features]."""
    return concatenate(
      chain(x, ("branch1x1", 64, (1, 1))),
      chain(x, ("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))),
      chain(x, ("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))),
      chain(average_pool(x), ("branch_pool", self.pool_features, (1, 1))),
    )


class InceptionB(nn.Module):
  """From 35x35 to 17x17 pixels."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, 35, 35, C] -> [B, 17, 17, 480 + C]."""
    double = chain(x, ("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)))
    return concatenate(halve(x, "branch3x3", 384), halve(double, "branch3x3dbl_3", 96), halving_pool(x))


class InceptionC(nn.Module):
  """17x17 pixels: 7x7 convolutions as 1x7 and 7x1."""

  channels: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, 17, 17, C] -> [B, 17, 17, 768]."""
    c = self.channels
    return concatenate(
      chain(x, ("branch1x1", 192, (1, 1))),
      chain(x, ("branch7x7_1", c, (1, 1)), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))),
      chain(
        x,
        ("branch7x7dbl_1", c, (1, 1)),
        ("branch7x7dbl_2", c, (7, 1)),
        ("branch7x7dbl_3", c, (1, 7)),
        ("branch7x7dbl_4", c, (7, 1)),
        ("branch7x7dbl_5", 192, (1, 7)),
      ),
      chain(average_pool(x), ("branch_pool", 192, (1, 1))),
    )


class InceptionD(nn.Module):
  """From 17x17 to 8x8 pixels."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, 17, 17, C] -> [B, 8, 8, 512 + C]."""
    single = chain(x, ("branch3x3_1", 192, (1, 1)))
    seven = chain(x, ("branch7x7x3_1", 192, (1, 1)), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)))
    return concatenate(halve(single, "branch3x3_2", 320), halve(seven, "branch7x7x3_4", 192), halving_pool(x))


class InceptionE(nn.Module):
  """8x8 pixels: 3x3 convolutions that end in a 1x3 and a 3x1 beside each other."""

  pool: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, 8, 8, C] -> [B, 8, 8, 2048]."""

    def fork(h: jax.Array, name: str) -> jax.Array:
      return concatenate(chain(h, (f"{name}a", 384, (1, 3))), chain(h, (f"{name}b", 384, (3, 1))))

    return concatenate(
      chain(x, ("branch1x1", 320, (1, 1))),
      fork(chain(x, ("branch3x3_1", 384, (1, 1))), "branch3x3_2"),
      fork(chain(x, ("branch3x3dbl_1", 448, (1, 1)), ("branch3x3dbl_2", 384, (3, 3))), "branch3x3dbl_3"),
      chain(self.pool(x), ("branch_pool", 192, (1, 1))),
    )


class InceptionV3(nn.Module):
  """Features and classes of images.

  Attributes:
    output_bias: whether the logits have the bias of the last layer. The graph's own have; those that the Inception
      Score is computed from have not (Salimans et al. 2016, improved-gan/inception_score/model.py).
  """

  output_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Runs the network.

    Args:
      x: float32 [B, 299, 299, 3], RGB in [-1, 1].

    Returns:
      features float32 [B, 2048], the mean over the last 8x8 pixels, and logits float32 [B, 1008].
    """
    x = BasicConv2d(32, (3, 3), strides=2, padding="VALID", name="Conv2d_1a_3x3")(x)  # 149 x 149
    x = BasicConv2d(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)  # 147 x 147
    x = BasicConv2d(64, (3, 3), name="Conv2d_2b_3x3")(x)
    x = halving_pool(x)  # 73 x 73
    x = BasicConv2d(80, (1, 1), name="Conv2d_3b_1x1")(x)
    x = BasicConv2d(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)  # 71 x 71
    x = halving_pool(x)  # 35 x 35

    x = InceptionA(32, name="Mixed_5b")(x)
    x = InceptionA(64, name="Mixed_5c")(x)
    x = InceptionA(64, name="Mixed_5d")(x)
    x = InceptionB(name="Mixed_6a")(x)  # 17 x 17
    x = InceptionC(128, name="Mixed_6b")(x)
    x = InceptionC(160, name="Mixed_6c")(x)
    x = InceptionC(160, name="Mixed_6d")(x)
    x = InceptionC(192, name="Mixed_6e")(x)
    x = InceptionD(name="Mixed_7a")(x)  # 8 x 8
    x = InceptionE(average_pool, name="Mixed_7b")(x)
    x = InceptionE(max_pool, name="Mixed_7c")(x)

    features = jnp.mean(x, axis=(1, 2))
    logits = nn.Dense(NUM_CLASSES, use_bias=self.output_bias, precision=jax.lax.Precision.HIGHEST, name="fc")(features)
    return features, logits


# Flax's name of a leaf -> that of PyTorch.
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _abstract_variables() -> Variables:
  x = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  return jax.eval_shape(lambda x: InceptionV3().init(jax.random.key(0, impl="threefry2x32"), x), x)


def _tensor_name(path: tuple[Any, ...]) -> str:
  """('params', 'Conv2d_1a_3x3', 'conv', 'kernel') -> 'Conv2d_1a_3x3.conv.weight'."""
  _, *modules, leaf = (part.key for part in path)
  return ".".join((*modules, _LEAVES[leaf]))


def tensor_shapes() -> dict[str, tuple[int, ...]]:
  """Name and shape of each tensor of the weights, as the port in PyTorch has them: [out, in, height, width]."""
  leaves = jax.tree.leaves_with_path(_abstract_variables())
  return {_tensor_name(path): tuple(leaf.shape[i] for i in _TO_TORCH[len(leaf.shape)]) for path, leaf in leaves}


def variables_of(tensors: Mapping[str, np.ndarray]) -> Variables:
  """The variables of the module, NumPy, from tensors with the names and shapes of `tensor_shapes`."""

  def take(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    tensor = tensors[_tensor_name(path)]
    return np.ascontiguousarray(tensor.transpose(_FROM_TORCH[len(leaf.shape)]))

  return jax.tree.map_with_path(take, _abstract_variables())


# Number of axes -> the axes of a tensor in the other's order: kernels are [height, width, in, out] and [in, out] here.
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
