"""3x3 convolutions as XLA is asked to compute them: the same numbers to rounding, in less time on CPUs.

Four things are slow there: the gradient by the kernel, which XLA takes for a convolution whose window is the whole
image; copies of many times the image, which no cache holds; within a loop, such as that of `--grad_accum_steps`, the
gradient by the image and all convolutions with a stride; and pixels of an image enlarged by repetition that are
multiplied more than once. So on CPUs all of it is done with one kind of convolution, without stride, and matrix
products. Other compilers have kernels for the plain one, and get that. `benchmarks/README.md` has what it brings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike

# Of a 3x3 kernel's three rows (or columns), which ones meet the two pixels that a row of the enlarged image sees:
# [row's place, pixel, kernel row]. An even row sees (above, own), an odd one (own, below).
_MERGE = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
# Of two neighbouring pairs of rows (or columns), which row meets which row of the kernel: [pair, row, kernel row].
_PAIRS = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 0, 0]]], np.float32)
_PIXELS_AT_ONCE = 6272  # of a gradient by the kernel: their moved copies fit into a cache


class Conv3x3(nn.Module):
  """`flax.linen.Conv` with a 3x3 kernel and SAME padding: parameters of the same names, shapes and values.

  Attributes:
    features: channels of the output.
    kernel_init: of the kernel; the bias begins with zeros.
    dtype: of the computation; the parameters are float32.
    resample: 'none'; 'up' convolves the input enlarged by two, each pixel repeated; 'down' has stride 2.
  """

  features: int
  kernel_init: nn.initializers.Initializer
  dtype: DTypeLike
  resample: str = "none"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H, W, features], [B, 2H, 2W, features] or, of even H and W, [B, H/2, W/2, features]."""
    kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
    return convolve(x, kernel, self.resample) + bias[None, None, None, :]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, resample: str = "none") -> jax.Array:
  """Cross-correlation of x [B, H, W, C] with a kernel [3, 3, C, F], zeros around the image.

  resample: 'none' gives [B, H, W, F]; 'up', of the image with each pixel repeated 2 x 2, [B, 2H, 2W, F]; 'down', with
    stride 2, rows 2r to 2r + 2 for row r, [B, H/2, W/2, F].
  """
  way = _WAYS[resample]
  return jax.lax.platform_dependent(x, kernel, cpu=way.convolve, default=way.plain)


# Linear in both arguments, so the derivative is the function itself at the tangents. How that is transposed, for
# reverse mode, is said here.
def _convolve_jvp(resample, primals, tangents):
  (x, kernel), (dx, dkernel) = primals, tangents
  way = _WAYS[resample]
  y = convolve(x, kernel, resample)
  dy = jnp.zeros_like(y)

  def gradient(plain: Callable, shape: tuple[int, ...], on_cpu: Callable) -> Callable:
    """(other, dy) -> the gradient of `shape`, by the argument in which plain(other, argument) is linear."""

    def elsewhere(other: jax.Array, dy: jax.Array) -> jax.Array:
      return jax.linear_transpose(functools.partial(plain, other), jax.ShapeDtypeStruct(shape, dy.dtype))(dy)[0]

    return lambda other, dy: jax.lax.platform_dependent(other, dy, cpu=on_cpu, default=elsewhere)

  if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
    by_image = gradient(lambda kernel, x: way.plain(x, kernel), x.shape, way.image_gradient)
    dy += jax.custom_derivatives.linear_call(lambda kernel, dx: convolve(dx, kernel, resample), by_image, kernel, dx)
  if not isinstance(dkernel, jax.custom_derivatives.SymbolicZero):
    by_kernel = gradient(way.plain, kernel.shape, way.kernel_gradient)
    dy += jax.custom_derivatives.linear_call(lambda x, dk: convolve(x, dk, resample), by_kernel, x, dkernel)
  return y, dy


convolve.defjvp(_convolve_jvp, symbolic_zeros=True)


def _slide(x: jax.Array, kernel: jax.Array, before: int = 1, after: int = 1, stride: int = 1) -> jax.Array:
  """Slides a kernel [n, n, C, F] over x [B, H, W, C] with so many zeros before and after each row and column.

  Returns:
    y [B, H', W', F], H' = H + before + after - n + 1 where the stride is 1: y[r] is the sum of kernel[i] x[r - before +
    i] over i, and likewise for columns.
  """
  padding = ((before, after), (before, after))
  return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _repeat(x: jax.Array) -> jax.Array:
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def _interleave(y: jax.Array) -> jax.Array:
  """[B, H + 1, W + 1, 4 F] -> [B, 2H, 2W, F]: puts the four pixels of the enlarged image where they belong.

  A 2x2 window before or after a pixel sees what an even or odd row, and column, of the enlarged image does.
  """
  batch, height, width = y.shape[0], y.shape[1] - 1, y.shape[2] - 1
  y = y.reshape(batch, height + 1, width + 1, 2, 2, -1)
  rows = [
    jnp.stack([y[:, a : a + height, b : b + width, a, b] for b in range(2)], axis=3)  # [B, H, W, 2, F]
    for a in range(2)
  ]
  return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)


def _part(dy: jax.Array) -> jax.Array:
  """The transpose of `_interleave`: [B, 2H, 2W, F] -> [B, H + 1, W + 1, 4 F]."""
  phases = [
    jnp.pad(dy[:, a::2, b::2], ((0, 0), (a, 1 - a), (b, 1 - b), (0, 0)))  # [B, H + 1, W + 1, F]
    for a in range(2)
    for b in range(2)
  ]
  return jnp.concatenate(phases, axis=-1)


def _space_to_depth(x: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [B, H/2, W/2, 4 C]: of each 2x2 pixels one, with the channels of all."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, height // 2, width // 2, -1)


def _depth_to_space(x: jax.Array) -> jax.Array:
  """The inverse, and transpose, of `_space_to_depth`."""
  batch, height, width, _ = x.shape
  x = x.reshape(batch, height, width, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, 2 * height, 2 * width, -1)


def _merge(kernel: jax.Array) -> jax.Array:
  """[3, 3, C, F] -> [2, 2, C, 4 F]: the four kernels of an enlarged image, sums of what meets the same pixel."""
  merge = _MERGE.astype(kernel.dtype)
  return jnp.einsum("aui,bvj,ijcf->uvcabf", merge, merge, kernel).reshape(2, 2, kernel.shape[2], -1)


def _pair(kernel: jax.Array) -> jax.Array:
  """[3, 3, C, F] -> [2, 2, 4 C, F]: the kernel of stride 2 over an image as `_space_to_depth` has it."""
  pairs = _PAIRS.astype(kernel.dtype)
  return jnp.einsum("uai,vbj,ijcf->uvabcf", pairs, pairs, kernel).reshape(2, 2, -1, kernel.shape[3])


def _product(x: jax.Array, dy: jax.Array, n: int, before: int, after: int) -> jax.Array:
  """The gradient [n, n, C, F] of sum(dy * y) by the kernel, y = _slide(x, kernel, before, after), as matrix products.

  Entry (i, j) is the sum of x[r - before + i, s - before + j] dy[r, s] over all pixels: the image moved sideways by j
  meets dy moved down by i. A few images at a time, so that what is moved stays in the cache.
  """
  height, width = x.shape[1], dy.shape[2]
  # Once for all copies below: XLA would compute what they are made of anew for each.
  x, dy = jax.lax.optimization_barrier((x, dy))

  def product(x: jax.Array, dy: jax.Array) -> jax.Array:
    columns = _moved(x, 2, [before - j for j in range(n)], width)  # [B, H, W', n C]
    rows = _moved(dy, 1, [i - before for i in range(n)], height)  # [B, H, W', n F]
    columns, rows = (moved.reshape(-1, moved.shape[-1]) for moved in (columns, rows))
    return jnp.einsum("pc,pf->cf", columns, rows, preferred_element_type=jnp.float32)

  def gradient(product: jax.Array) -> jax.Array:  # [n C, n F] -> [n, n, C, F]
    return product.astype(dy.dtype).reshape(n, x.shape[-1], n, dy.shape[-1]).transpose(2, 0, 1, 3)

  most = max(1, _PIXELS_AT_ONCE // (height * width))
  images = max(size for size in range(1, most + 1) if len(x) % size == 0)
  if images == len(x):
    return gradient(product(x, dy))
  parts = tuple(array.reshape(-1, images, *array.shape[1:]) for array in (x, dy))
  zero = jnp.zeros((n * x.shape[-1], n * dy.shape[-1]), jnp.float32)
  total, _ = jax.lax.scan(lambda total, part: (total + product(*part), None), zero, parts)
  return gradient(total)


def _moved(x: jax.Array, axis: int, moves: list[int], size: int) -> jax.Array:
  """Copies of x [B, H, W, C] side by side in the channels, moved along `axis` by `moves`, zeros behind, cut to `size`.

  Each is put between zeros, in channels of its own, and their bits are merged: XLA for CPUs makes one loop of that, and
  of a concatenation one for each copy and another; as a sum of numbers, JAX 0.10 gives it to a slower library.
  """
  length, channels = x.shape[axis], x.shape[-1]
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))

  def place(number: int, move: int) -> jax.Array:
    edges = [(0, 0, 0)] * x.ndim
    edges[axis] = (move, size - length - move, 0)
    edges[-1] = (number * channels, (len(moves) - 1 - number) * channels, 0)
    return jax.lax.pad(bits, jnp.zeros((), bits.dtype), edges)

  places = [place(number, move) for number, move in enumerate(moves)]
  return jax.lax.bitcast_convert_type(functools.reduce(jnp.bitwise_or, places), x.dtype)


def _same(x: jax.Array) -> jax.Array:
  return x


class _Way(NamedTuple):
  """How a convolution is computed on CPUs: y = leave(_slide(enter(x), expand(kernel), before, after)).

  Attributes:
    plain: the same for other compilers.
    size: n, of the kernel that slides.
    before, after: zeros around enter(x).
    expand: [3, 3, C, F] to the kernel that slides.
    enter, leave: of images, each with its transpose.
  """

  plain: Callable[[jax.Array, jax.Array], jax.Array]
  size: int
  before: int
  after: int
  expand: Callable[[jax.Array], jax.Array] = _same
  enter: Callable[[jax.Array], jax.Array] = _same
  enter_transposed: Callable[[jax.Array], jax.Array] = _same
  leave: Callable[[jax.Array], jax.Array] = _same
  leave_transposed: Callable[[jax.Array], jax.Array] = _same

  def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, H, W, C], kernel [3, 3, C, F] -> y."""
    return self.leave(_slide(self.enter(x), self.expand(kernel), self.before, self.after))

  def image_gradient(self, kernel: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of sum(dy * y) by x: the kernel, turned around, slides over dy."""
    # The barrier keeps XLA from folding the turn into the convolution, which within a loop then gets its slowest code.
    turned = jax.lax.optimization_barrier(self.expand(kernel)[::-1, ::-1].swapaxes(2, 3))
    before, after = self.size - 1 - self.before, self.size - 1 - self.after
    return self.enter_transposed(_slide(self.leave_transposed(dy), turned, before, after))

  def kernel_gradient(self, x: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient [3, 3, C, F] of sum(dy * y) by the kernel."""
    gradient = _product(self.enter(x), self.leave_transposed(dy), self.size, self.before, self.after)
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], dy.shape[-1]), dy.dtype)
    return jax.linear_transpose(self.expand, kernel)(gradient)[0]


_WAYS = {
  "none": _Way(_slide, 3, 1, 1),
  # The enlarged image is never made: 4/9 of the multiplications.
  "up": _Way(
    lambda x, kernel: _slide(_repeat(x), kernel), 2, 1, 1, expand=_merge, leave=_interleave, leave_transposed=_part
  ),
  "down": _Way(
    lambda x, kernel: _slide(x, kernel, 0, 1, stride=2),
    *(2, 0, 1),
    expand=_pair,
    enter=_space_to_depth,
    enter_transposed=_depth_to_space,
  ),
}
