"""3x3 and 4x4 convolutions as XLA is asked to compute them: the same numbers to rounding, in less time on CPUs.

Four things are slow there: the gradient by the kernel, which XLA takes for a convolution whose window is the whole
image; copies of many times the image, which no cache holds; within a loop, such as that of `--grad_accum_steps`, the
gradient by the image and all convolutions with a stride; and pixels of an image enlarged by repetition that are
multiplied more than once. So on CPUs all of it is done with one kind of convolution, without stride, and matrix
products. Other compilers have kernels for the plain one, and get that. `docs/results/speed.md` has what it brings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# Of a 3x3 kernel's three rows (or columns), which ones meet the two pixels that a row of the enlarged image sees:
# [row's place, pixel, kernel row]. An even row sees (above, own), an odd one (own, below).
_MERGE = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
# Of two neighbouring pairs of rows (or columns), which row meets which row of the kernel: [pair, row, kernel row]. The
# kernel begins with the first pair's first row, or its second one.
_PAIRS = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 0, 0]]], np.float32)
_LATER_PAIRS = np.array([[[0, 0, 0], [1, 0, 0]], [[0, 1, 0], [0, 0, 1]]], np.float32)
_PIXELS_AT_ONCE = 6272  # of a gradient by the kernel: their moved copies fit into a cache


def convolve(x: jax.Array, kernel: jax.Array, resample: str = "none") -> jax.Array:
  """Cross-correlation of x [B, H, W, C] with a kernel [3, 3, C, F], or [4, 4, C, F], zeros around the image.

  Derivatives of any order, forward and reverse, and batching by `jax.vmap` are made of the three primitives below. All
  of them have the precision that `jax.default_matmul_precision` says where this is called.

  Args:
    x: of the type of the kernel.
    kernel: see above.
    resample: 'none' gives [B, H, W, F]; 'up', of the image with each pixel repeated 2 x 2, [B, 2H, 2W, F]; 'down', with
      stride 2, rows 2r to 2r + 2 for row r, [B, H/2, W/2, F]; 'down_symmetric' the same of rows 2r - 1 to 2r + 1. Of
      4x4, '4x4' gives [B, H - 1, W - 1, F], rows r - 1 to r + 2 for row r; '4x4_down' with stride 2, of even H and W,
      rows 2r - 1 to 2r + 2, [B, H/2, W/2, F].

  Raises:
    TypeError, ValueError: types or shapes do not fit, as `jax.lax.conv_general_dilated` says it.
  """
  # Within `jax.shard_map` the two must vary over the same mesh axes; the transpose of `pcast` is the sum over the rest.
  x, kernel = (_vary(array, _varying(x) | _varying(kernel)) for array in (x, kernel))
  precision = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009  unknown to type checkers
  return _convolution.bind(x, kernel, resample=resample, precision=precision)


def _varying(array: jax.Array) -> frozenset[str]:
  return jax.typeof(array).manual_axis_type.varying


def _vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
  missing = tuple(sorted(axes - _varying(array)))
  return jax.lax.pcast(array, missing, to="varying") if missing else array


def _slide(x: jax.Array, kernel: jax.Array, before: int = 1, after: int = 1, stride: int = 1) -> jax.Array:
  """Slides a kernel [n, n, C, F] over x [B, H, W, C] with so many zeros before and after each row and column.

  Returns:
    y [B, H', W', F], H' = H + before + after - n + 1 where the stride is 1: y[r] is the sum of kernel[i] x[r - before +
    i] over i, and likewise for columns.
  """
  padding = ((before, after), (before, after))
  return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _repeat(x: jax.Array, times: int) -> jax.Array:
  return x if times == 1 else jnp.repeat(jnp.repeat(x, times, axis=1), times, axis=2)


def _interleave(y: jax.Array) -> jax.Array:
  """[B, H + 1, W + 1, 4 F] -> [B, 2H, 2W, F]: puts the four pixels of the enlarged image where they belong.

  A 2x2 window before or after a pixel sees what an even or odd row, and column, of the enlarged image does.
  """
  batch, height, width, features = y.shape[0], y.shape[1] - 1, y.shape[2] - 1, y.shape[3] // 4
  y = y.reshape(batch, height + 1, width + 1, 2, 2, features)
  rows = [
    jnp.stack([y[:, a : a + height, b : b + width, a, b] for b in range(2)], axis=3)  # [B, H, W, 2, F]
    for a in range(2)
  ]
  return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, features)


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
  return x.reshape(batch, height // 2, width // 2, 4 * channels)


def _depth_to_space(x: jax.Array) -> jax.Array:
  """The inverse, and transpose, of `_space_to_depth`."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, 2 * height, 2 * width, channels // 4)


def _merge(kernel: jax.Array) -> jax.Array:
  """[3, 3, C, F] -> [2, 2, C, 4 F]: the four kernels of an enlarged image, sums of what meets the same pixel."""
  merge = _MERGE.astype(kernel.dtype)
  return jnp.einsum("aui,bvj,ijcf->uvcabf", merge, merge, kernel).reshape(2, 2, kernel.shape[2], 4 * kernel.shape[3])


def _merge_transposed(merged: jax.Array) -> jax.Array:
  """The transpose of `_merge`."""
  merge, (channels, features) = _MERGE.astype(merged.dtype), (merged.shape[2], merged.shape[3] // 4)
  columns = jnp.einsum("bvj,uvcabf->jcfau", merge, merged.reshape(2, 2, channels, 2, 2, features))
  return jnp.einsum("aui,jcfau->ijcf", merge, columns)


def _pair(kernel: jax.Array, pairs: np.ndarray) -> jax.Array:
  """[3, 3, C, F] -> [2, 2, 4 C, F]: the kernel of stride 2 over an image as `_space_to_depth` has it."""
  pairs = pairs.astype(kernel.dtype)
  return jnp.einsum("uai,vbj,ijcf->uvabcf", pairs, pairs, kernel).reshape(2, 2, 4 * kernel.shape[2], kernel.shape[3])


def _pair_transposed(paired: jax.Array, pairs: np.ndarray) -> jax.Array:
  """The transpose of `_pair`."""
  pairs, (channels, features) = pairs.astype(paired.dtype), (paired.shape[2] // 4, paired.shape[3])
  columns = jnp.einsum("vbj,uvabcf->jcfua", pairs, paired.reshape(2, 2, 2, 2, channels, features))
  return jnp.einsum("uai,jcfua->ijcf", pairs, columns)


def _product(x: jax.Array, dy: jax.Array, n: int, before: int, after: int) -> jax.Array:
  """The gradient [n, n, C, F] of sum(dy * y) by the kernel, y = _slide(x, kernel, before, after), as matrix products.

  Entry (i, j) is the sum of x[r - before + i, s - before + j] dy[r, s] over all pixels: the image moved sideways by j
  meets dy moved down by i. A few images at a time, so that what is moved stays in the cache. The sums, and the result,
  are float32 or wider.
  """
  height, width = x.shape[1], dy.shape[2]
  # Once for all copies below: XLA would compute what they are made of anew for each.
  x, dy = jax.lax.optimization_barrier((x, dy))

  dtype = jnp.promote_types(dy.dtype, jnp.float32)

  def product(x: jax.Array, dy: jax.Array) -> jax.Array:
    columns = _shifted(x, 2, [before - j for j in range(n)], width)  # [B, H, W', n C]
    rows = _shifted(dy, 1, [i - before for i in range(n)], height)  # [B, H, W', n F]
    columns, rows = (moved.reshape(-1, moved.shape[-1]) for moved in (columns, rows))
    return jnp.einsum("pc,pf->cf", columns, rows, preferred_element_type=dtype)

  def gradient(product: jax.Array) -> jax.Array:  # [n C, n F] -> [n, n, C, F]
    return product.reshape(n, x.shape[-1], n, dy.shape[-1]).transpose(2, 0, 1, 3)

  most = max(1, _PIXELS_AT_ONCE // (height * width))
  images = max(size for size in range(1, most + 1) if len(x) % size == 0)
  if images == len(x):
    return gradient(product(x, dy))
  parts = tuple(array.reshape(-1, images, *array.shape[1:]) for array in (x, dy))
  zero = jnp.zeros_like(x, dtype, shape=(n * x.shape[-1], n * dy.shape[-1]))
  total, _ = jax.lax.scan(lambda total, part: (total + product(*part), None), zero, parts)
  return gradient(total)


def _shifted(x: jax.Array, axis: int, moves: list[int], size: int) -> jax.Array:
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


def _space_to_depth_inside(x: jax.Array) -> jax.Array:
  """`_space_to_depth` with a pixel of zeros around the image: [B, H, W, C] -> [B, H/2 + 1, W/2 + 1, 4 C]."""
  return _space_to_depth(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))


def _depth_to_space_inside(x: jax.Array) -> jax.Array:
  """The transpose of `_space_to_depth_inside`."""
  return _depth_to_space(x)[:, 1:-1, 1:-1]


def _quarter(kernel: jax.Array) -> jax.Array:
  """[4, 4, C, F] -> [2, 2, 4 C, F]: the kernel of stride 2 over an image as `_space_to_depth` has it."""
  channels, features = kernel.shape[2:]
  quarters = kernel.reshape(2, 2, 2, 2, channels, features).transpose(0, 2, 1, 3, 4, 5)
  return quarters.reshape(2, 2, 4 * channels, features)


def _quarter_transposed(quarters: jax.Array) -> jax.Array:
  """The inverse, and transpose, of `_quarter`."""
  channels, features = quarters.shape[2] // 4, quarters.shape[3]
  parts = quarters.reshape(2, 2, 2, 2, channels, features).transpose(0, 2, 1, 3, 4, 5)
  return parts.reshape(4, 4, channels, features)


def _same(x: jax.Array) -> jax.Array:
  return x


class _ConvPlan(NamedTuple):
  """The arithmetic of a convolution and of its two gradients.

  On CPUs y = post(_slide(pre(x), expand(kernel), before, after)); elsewhere y = _slide(x repeated, kernel, stride).

  Attributes:
    size: n, of the kernel that slides on CPUs.
    before, after: zeros around pre(x).
    expand: [k, k, C, F] to the kernel that slides, with its transpose.
    pre, post: of images, each with its transpose.
    repeat: how often a row of x is repeated.
    side: k, of the kernel itself.
    stride: of that one.
    above, below: rows of zeros above and below, and columns left and right, that it sees.
  """

  size: int
  before: int
  after: int
  expand: Callable[[jax.Array], jax.Array] = _same
  expand_transposed: Callable[[jax.Array], jax.Array] = _same
  pre: Callable[[jax.Array], jax.Array] = _same
  pre_transposed: Callable[[jax.Array], jax.Array] = _same
  post: Callable[[jax.Array], jax.Array] = _same
  post_transposed: Callable[[jax.Array], jax.Array] = _same
  repeat: int = 1
  side: int = 3
  stride: int = 1
  above: int = 1
  below: int = 1

  def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, H, W, C], kernel [k, k, C, F] -> y."""
    return self.post(_slide(self.pre(x), self.expand(kernel), self.before, self.after))

  def image_gradient(self, kernel: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of sum(dy * y) by x: the kernel, turned around, slides over dy."""
    # The barrier keeps XLA from folding the turn into the convolution, which within a loop then gets its slowest code.
    turned = jax.lax.optimization_barrier(self.expand(kernel)[::-1, ::-1].swapaxes(2, 3))
    before, after = self.size - 1 - self.before, self.size - 1 - self.after
    return self.pre_transposed(_slide(self.post_transposed(dy), turned, before, after))

  def kernel_gradient(self, x: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient [k, k, C, F] of sum(dy * y) by the kernel."""
    gradient = _product(self.pre(x), self.post_transposed(dy), self.size, self.before, self.after)
    return self.expand_transposed(gradient).astype(dy.dtype)

  def plain_convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolve` for other compilers."""
    return _slide(_repeat(x, self.repeat), kernel, self.above, self.below, self.stride)

  def plain_image_gradient(self, kernel: jax.Array, dy: jax.Array) -> jax.Array:
    """`image_gradient` for other compilers."""
    dx = jax.lax.conv_general_dilated(
      *(dy, kernel[::-1, ::-1], (1, 1), [(self.side - 1 - self.above, self.side - 1 - self.below)] * 2),
      lhs_dilation=(self.stride, self.stride),
      dimension_numbers=("NHWC", "HWOI", "NHWC"),
    )
    if self.repeat == 1:
      return dx
    batch, height, width, channels = dx.shape
    shape = (batch, height // self.repeat, self.repeat, width // self.repeat, self.repeat, channels)
    return jnp.sum(dx.reshape(shape), axis=(2, 4))

  def plain_kernel_gradient(self, x: jax.Array, dy: jax.Array) -> jax.Array:
    """`kernel_gradient` for other compilers: dy slides over x, and the sum is over the batch."""
    return jax.lax.conv_general_dilated(
      *(_repeat(x, self.repeat), dy, (1, 1), [(self.above, self.below)] * 2),
      rhs_dilation=(self.stride, self.stride),
      dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )


_PLANS = {
  "none": _ConvPlan(3, 1, 1),
  # The enlarged image is never made: 4/9 of the multiplications.
  "up": _ConvPlan(
    *(2, 1, 1),
    expand=_merge,
    expand_transposed=_merge_transposed,
    post=_interleave,
    post_transposed=_part,
    repeat=2,
  ),
  "down": _ConvPlan(
    *(2, 0, 1),
    expand=functools.partial(_pair, pairs=_PAIRS),
    expand_transposed=functools.partial(_pair_transposed, pairs=_PAIRS),
    pre=_space_to_depth,
    pre_transposed=_depth_to_space,
    stride=2,
    above=0,
  ),
  "down_symmetric": _ConvPlan(
    *(2, 1, 0),
    expand=functools.partial(_pair, pairs=_LATER_PAIRS),
    expand_transposed=functools.partial(_pair_transposed, pairs=_LATER_PAIRS),
    pre=_space_to_depth,
    pre_transposed=_depth_to_space,
    stride=2,
    below=0,
  ),
  "4x4": _ConvPlan(4, 1, 1, side=4),
  "4x4_down": _ConvPlan(
    *(2, 0, 0),
    expand=_quarter,
    expand_transposed=_quarter_transposed,
    pre=_space_to_depth_inside,
    pre_transposed=_depth_to_space_inside,
    side=4,
    stride=2,
  ),
}

_Axes = dict[str, int]
# The axes of x, kernel and y whose sizes are free: B examples, C channels of x, F channels of y. A bilinear function of
# two of these arrays sums over the letter that both have; each has one that the other has not, and so has the result.
_X, _KERNEL, _Y = _Axes(B=0, C=3), _Axes(C=2, F=3), _Axes(B=0, F=3)


def _bilinear(name: str, a_axes: _Axes, b_axes: _Axes, c_axes: _Axes, on_cpu: Callable, plain: Callable) -> Primitive:
  """A primitive (a, b) -> c, which is linear in a and in b, with all rules but the transposes.

  Both operands have 4 axes, or 5, of which the first counts independent problems.

  Args:
    name: of the primitive.
    a_axes, b_axes, c_axes: `_X`, `_KERNEL` or `_Y`.
    on_cpu, plain: (plan, a, b) -> c, of 4 axes, for CPUs and for other compilers.
  """
  primitive = Primitive(name)

  def lower_for_cpus(a: jax.Array, b: jax.Array, *, resample: str, precision: Any) -> jax.Array:
    function = functools.partial(on_cpu, _PLANS[resample])
    with jax.default_matmul_precision(precision):
      # A loop, as `jax.vmap` would make a grouped convolution, which is slow there.
      return function(a, b) if a.ndim == 4 else jax.lax.map(lambda pair: function(*pair), (a, b))

  def lower(a: jax.Array, b: jax.Array, *, resample: str, precision: Any) -> jax.Array:
    function = functools.partial(plain, _PLANS[resample])
    with jax.default_matmul_precision(precision):  # lowering may take place where another one is the default
      return function(a, b) if a.ndim == 4 else jax.vmap(function)(a, b)

  def abstract(a: ShapedArray, b: ShapedArray, **parameters: Any) -> ShapedArray:
    shapes = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (a, b))
    c = jax.eval_shape(functools.partial(lower, **parameters), *shapes)
    return a.update(shape=c.shape, dtype=c.dtype, weak_type=False)

  def enlarge(array: jax.Array, axis: int, at: int) -> jax.Array:  # the axis `at` by the batch axis
    return _merge_axes(jnp.moveaxis(array, axis, at + 1), at)

  def batch(arrays: Sequence[jax.Array], axes: Sequence[int | None], **parameters: Any) -> tuple[jax.Array, int]:
    bind = functools.partial(primitive.bind, **parameters)
    (a, b), (i, j) = arrays, axes
    problems = a.ndim - 4 - (i is not None)  # 1, if there is an axis that counts them already
    if i is not None and j is not None:
      a, b = jnp.moveaxis(a, i, 0), jnp.moveaxis(b, j, 0)
      if not problems:
        return bind(a, b), 0
      return _split_axis(bind(_merge_axes(a, 0), _merge_axes(b, 0)), 0, (a.shape[0], a.shape[1])), 0

    # One operand alone is batched: its axis that the other has not becomes longer. The new part of the index is the
    # last, so that examples that are spread over devices stay where they are.
    if i is not None:
      (letter,), size = a_axes.keys() - b_axes.keys(), a.shape[i]
      free = jnp.moveaxis(a, i, -1).shape[problems + a_axes[letter]]
      a = enlarge(a, i, problems + a_axes[letter])
    else:
      assert j is not None
      (letter,), size = b_axes.keys() - a_axes.keys(), b.shape[j]
      free = jnp.moveaxis(b, j, -1).shape[problems + b_axes[letter]]
      b = enlarge(b, j, problems + b_axes[letter])
    at = problems + c_axes[letter]
    return _split_axis(bind(a, b), at, (free, size)), at + 1

  @functools.partial(jax.jit, static_argnames=("resample", "precision"))
  def compiled(a: jax.Array, b: jax.Array, **parameters: Any) -> jax.Array:
    return primitive.bind(a, b, **parameters)

  def implementation(a: jax.Array, b: jax.Array, **parameters: Any) -> jax.Array:
    """Compiled outside of `jax.jit` too, and under `jax.disable_jit`."""
    with jax.disable_jit(False):
      return compiled(a, b, **parameters)

  primitive.def_impl(implementation)
  primitive.def_abstract_eval(abstract)
  batching.primitive_batchers[primitive] = batch
  mlir.register_lowering(primitive, mlir.lower_fun(lower, multiple_results=False))
  mlir.register_lowering(primitive, mlir.lower_fun(lower_for_cpus, multiple_results=False), platform="cpu")
  return primitive


def _merge_axes(array: jax.Array, at: int) -> jax.Array:
  """Makes one axis of `at` and the next."""
  shape = array.shape
  return array.reshape(*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])


def _split_axis(array: jax.Array, at: int, sizes: tuple[int, int]) -> jax.Array:
  """The inverse of `_merge_axes`."""
  return array.reshape(*array.shape[:at], *sizes, *array.shape[at + 1 :])


_convolution = _bilinear("convolution_3x3", _X, _KERNEL, _Y, _ConvPlan.convolve, _ConvPlan.plain_convolve)
_image_gradient = _bilinear(
  "image_gradient_3x3", _KERNEL, _Y, _X, _ConvPlan.image_gradient, _ConvPlan.plain_image_gradient
)
_kernel_gradient = _bilinear(
  "kernel_gradient_3x3", _X, _Y, _KERNEL, _ConvPlan.kernel_gradient, _ConvPlan.plain_kernel_gradient
)

# sum(dy * convolution(x, kernel)) is linear in each of the three arrays. Its gradient by dy is `_convolution`, by x
# `_image_gradient`, by the kernel `_kernel_gradient`; so each one's transposes are the two others.
ad.defbilinear(
  _convolution,
  lambda dy, x, kernel, **parameters: _image_gradient.bind(kernel, dy, **parameters),
  lambda dy, x, kernel, **parameters: _kernel_gradient.bind(x, dy, **parameters),
)
ad.defbilinear(
  _image_gradient,
  lambda x, kernel, dy, **parameters: _kernel_gradient.bind(x, dy, **parameters),
  lambda x, kernel, dy, **parameters: _convolution.bind(x, kernel, **parameters),
)
ad.defbilinear(
  _kernel_gradient,
  lambda kernel, x, dy, **parameters: _image_gradient.bind(kernel, dy, **parameters),
  lambda kernel, x, dy, **parameters: _convolution.bind(x, kernel, **parameters),
)
