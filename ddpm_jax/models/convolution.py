"""3x3 convolutions as XLA is asked to compute them: the same numbers to rounding, in less time on CPUs.

Two things are slow there. XLA computes the gradient of a kernel as a convolution whose window is the whole image, at a
fraction of the speed of the forward pass; and a convolution of an image that was enlarged by repetition multiplies most
pixels more than once. Both are written differently here, for CPUs alone: other compilers have kernels for them.
`benchmarks/README.md` has what it brings.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike

# Of a 3x3 kernel's three rows (or columns), which ones meet the two pixels that a row of the enlarged image sees:
# [row's place, pixel, kernel row]. An even row sees (above, own), an odd one (own, below).
_MERGE = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)


class Conv3x3(nn.Module):
  """`flax.linen.Conv` with a 3x3 kernel, stride 1 and SAME padding: parameters of the same names, shapes and values.

  Attributes:
    features: channels of the output.
    kernel_init: of the kernel; the bias begins with zeros.
    dtype: of the computation; the parameters are float32.
    upsampled: convolve the input enlarged by two, each pixel repeated.
  """

  features: int
  kernel_init: nn.initializers.Initializer
  dtype: DTypeLike
  upsampled: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H, W, features], or [B, 2H, 2W, features] if `upsampled`."""
    kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
    return (convolve_upsampled if self.upsampled else convolve)(x, kernel) + bias[None, None, None, :]


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Cross-correlation with zeros around the image: x [B, H, W, C], kernel [3, 3, C, F] -> [B, H, W, F]."""
  return _bilinear(x, kernel, False)


def convolve_upsampled(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`convolve` of the image with each pixel repeated 2 x 2: x [B, H, W, C], kernel [3, 3, C, F] -> [B, 2H, 2W, F]."""
  return _bilinear(x, kernel, True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _bilinear(x: jax.Array, kernel: jax.Array, upsampled: bool) -> jax.Array:
  def on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _convolve_phases(x, kernel) if upsampled else _slide(x, kernel)

  def elsewhere(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _slide(_repeat(x) if upsampled else x, kernel)

  return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


# Linear in both arguments, so the derivative is the function itself at the tangents. Only how its derivative by the
# kernel is transposed, for reverse mode, is said here; that by the image is transposed by JAX.
def _bilinear_jvp(upsampled, primals, tangents):
  (x, kernel), (dx, dkernel) = primals, tangents
  y = _bilinear(x, kernel, upsampled)
  dy = jnp.zeros_like(y)
  if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
    dy += _bilinear(dx, kernel, upsampled)
  if not isinstance(dkernel, jax.custom_derivatives.SymbolicZero):
    dy += jax.custom_derivatives.linear_call(
      lambda x, dkernel: _bilinear(x, dkernel, upsampled),
      lambda x, dy: _kernel_gradient(x, dy, upsampled),
      x,
      dkernel,
    )
  return y, dy


_bilinear.defjvp(_bilinear_jvp, symbolic_zeros=True)


def _kernel_gradient(x: jax.Array, dy: jax.Array, upsampled: bool) -> jax.Array:
  """The gradient [3, 3, C, F] of sum(dy * y) by the kernel."""

  def on_cpu(x: jax.Array, dy: jax.Array) -> jax.Array:
    return _phases_gradient(x, dy) if upsampled else _gradient_as_product(x, dy, 3)

  def elsewhere(x: jax.Array, dy: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct((3, 3, x.shape[-1], dy.shape[-1]), dy.dtype)
    return jax.linear_transpose(lambda kernel: _slide(_repeat(x) if upsampled else x, kernel), shape)(dy)[0]

  return jax.lax.platform_dependent(x, dy, cpu=on_cpu, default=elsewhere)


def _repeat(x: jax.Array) -> jax.Array:
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def _slide(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Slides a kernel [n, n, C, F] over x [B, H, W, C] with one zero pixel around it -> [B, H + 3 - n, W + 3 - n, F]."""
  padding = ((1, 1), (1, 1))
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _gradient_as_product(x: jax.Array, dy: jax.Array, n: int) -> jax.Array:
  """The gradient [n, n, C, F] of sum(dy * _slide(x, kernel)) by the kernel, as one matrix product over all pixels.

  Entry (i, j) is the sum of x[r - 1 + i, s - 1 + j] dy[r, s]: the image moved sideways by j meets dy moved down by i.
  """
  height, width = x.shape[1], dy.shape[2]
  padded_x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
  padded_dy = jnp.pad(dy, ((0, 0), (n - 2, n - 2), (0, 0), (0, 0)))
  columns = jnp.concatenate([padded_x[:, :, j : j + width] for j in range(n)], axis=-1)  # [B, H, W', n C]
  rows = jnp.concatenate([padded_dy[:, n - 1 - i : n - 1 - i + height] for i in range(n)], axis=-1)  # [B, H, W', n F]
  product = jnp.einsum("pc,pf->cf", columns.reshape(-1, columns.shape[-1]), rows.reshape(-1, rows.shape[-1]))
  return product.reshape(n, x.shape[-1], n, dy.shape[-1]).transpose(2, 0, 1, 3)


def _convolve_phases(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`convolve_upsampled` with 4/9 of the multiplications.

  The enlarged image is never made: each pixel of `x` has four output pixels, each of which sees 2x2 pixels of `x`
  through a 2x2 kernel of its own, the sums of those entries of the 3x3 kernel that meet the same pixel.
  """
  batch, height, width, channels = x.shape
  merge = _MERGE.astype(kernel.dtype)
  phases = jnp.einsum("aui,bvj,ijcf->uvcabf", merge, merge, kernel)  # [2, 2, C, 2, 2, F]: (a, b) is the output's place
  y = _slide(x, phases.reshape(2, 2, channels, -1)).reshape(batch, height + 1, width + 1, 2, 2, -1)
  rows = [
    jnp.stack([y[:, a : a + height, b : b + width, a, b] for b in range(2)], axis=3)  # [B, H, W, 2, F]
    for a in range(2)
  ]
  return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)


def _phases_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
  """The gradient [3, 3, C, F] of sum(dy * _convolve_phases(x, kernel)) by the kernel."""
  phases = [
    jnp.pad(dy[:, a::2, b::2], ((0, 0), (a, 1 - a), (b, 1 - b), (0, 0)))  # [B, H + 1, W + 1, F]
    for a in range(2)
    for b in range(2)
  ]
  gradient = _gradient_as_product(x, jnp.concatenate(phases, axis=-1), 2)
  merge = _MERGE.astype(dy.dtype)
  return jnp.einsum("aui,bvj,uvcabf->ijcf", merge, merge, gradient.reshape(2, 2, x.shape[-1], 2, 2, -1))
