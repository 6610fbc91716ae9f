"""Derivatives of a convolution beside those of XLA's own in float64: the largest relative errors.

python -m tests.runtime.derivatives
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.runtime.cpu import convolve

MODES = ("none", "up", "down", "down_symmetric", "4x4", "4x4_down")
DTYPES = ("float64", "float32", "bfloat16")


def plain(x, kernel, resample):
  """The same function as a convolution that JAX differentiates and batches by its own rules."""
  if resample == "up":
    x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
  strides = (2, 2) if "down" in resample else (1, 1)
  padding = [(1, 1), (1, 1)] if "symmetric" in resample or "4x4" in resample else "SAME"
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def derivatives(function, x, kernel, dx, dkernel):
  """Name -> array or arrays: of first and second order, batched and not.

  Args:
    function: (x [2, H, W, C], kernel [k, k, C, F]) -> y.
    x, kernel, dx, dkernel: arguments and tangents of them.
  """

  def loss(x, kernel):
    return jnp.sum(jnp.tanh(function(x, kernel) / 4))

  def slope(x, kernel):
    return jax.jvp(loss, (x, kernel), (dx, dkernel))[1]

  def along(x, kernel):
    return sum(jnp.vdot(a, b) for a, b in zip(jax.grad(loss, (0, 1))(x, kernel), (dx, dkernel), strict=True))

  def penalty(x, kernel):
    return jnp.sum(jnp.square(jax.grad(loss)(x, kernel)))

  def hessian_vector(x, kernel):
    return jax.jvp(jax.grad(loss, (0, 1)), (x, kernel), (dx, dkernel))[1]

  def corner(values):  # a few numbers of either argument
    return loss(x.at[0, 0, 0].set(values[: x.shape[3]]), kernel.at[0, 1, :, 0].set(values[x.shape[3] :]))

  values = jnp.concatenate([x[0, 0, 0], kernel[0, 1, :, 0]])
  xs, kernels = jnp.stack([x, dx, x + dx]), jnp.stack([kernel, dkernel, kernel - dkernel])
  gradient = jax.grad(loss, (0, 1))
  return {
    "value": function(x, kernel),
    "jvp": jax.jvp(function, (x, kernel), (dx, dkernel))[1],
    "gradient": gradient(x, kernel),
    "jacfwd": jax.jacfwd(function, 1)(x, kernel),
    "jacrev": jax.jacrev(function, 1)(x, kernel),
    "linearize, vmap": jax.vmap(jax.linearize(lambda x: function(x, kernel), x)[1])(xs),
    "vmap(grad): images": jax.vmap(gradient, (1, None), 0)(xs.swapaxes(0, 1), kernel),
    "vmap(grad): kernels": jax.vmap(gradient, (None, 3))(x, jnp.moveaxis(kernels, 0, 3)),
    "vmap(grad): both": jax.vmap(gradient)(xs, kernels),
    "vmap(vmap(grad))": jax.vmap(lambda x: jax.vmap(gradient, (None, 0))(x, kernels))(xs),
    "each example": jax.vmap(lambda x: gradient(x[None], kernel)[1])(x),
    "forward over reverse": hessian_vector(x, kernel),
    "reverse over forward": jax.grad(slope, (0, 1))(x, kernel),
    "reverse over reverse": jax.grad(along, (0, 1))(x, kernel),
    "gradient penalty": jax.grad(penalty, (0, 1))(x, kernel),
    "hessian": jax.hessian(corner)(values),
    "vmap(forward over reverse)": jax.vmap(hessian_vector)(xs, kernels),
    "checkpoint in a scan": jax.grad(
      lambda k: jax.lax.scan(lambda s, x: (s + jax.checkpoint(loss)(x, k), None), jnp.zeros((), x.dtype), xs)[0]
    )(kernel),
  }


def arguments(resample, dtype):
  """(x, kernel, dx, dkernel), NumPy; of a height other than the width, and numbers that bfloat16 holds."""
  side = 4 if "4x4" in resample else 3
  rng, shapes = np.random.default_rng(0), [(2, 4, 6, 2), (side, side, 2, 3)] * 2
  arrays = (np.asarray(jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)) for shape in shapes)
  return tuple(array.astype(jnp.dtype(dtype)) for array in arrays)


def errors(resample, dtype):
  """Name -> the largest difference from float64 over the largest number, for each of the derivatives."""
  got, want = _computed(convolve, resample, dtype), _computed(plain, resample, "float64")
  assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
  return {name: _error(got[name], want[name]) for name in want}


@functools.cache
def _computed(function, resample, dtype):
  def compute(*arrays):
    return derivatives(lambda x, kernel: function(x, kernel, resample), *arrays)

  with jax.enable_x64(True):
    # Compilation is what takes time here.
    compiled = jax.jit(compute, compiler_options={"xla_llvm_disable_expensive_passes": True})
    return jax.device_get(compiled(*arguments(resample, dtype)))


def _error(got, want):
  got, want = (np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(t)]) for t in (got, want))
  return np.abs(got - want).max() / np.abs(want).max()


def main():
  """Prints a table."""
  columns = {(resample, dtype): errors(resample, dtype) for resample in MODES for dtype in DTYPES}
  print(f"| JAX {jax.__version__} | {' | '.join(f'{resample}, {dtype}' for resample, dtype in columns)} |")
  print("|---" * (1 + len(columns)) + "|")
  for name in next(iter(columns.values())):
    print(f"| {name} | {' | '.join(f'{column[name]:.0e}' for column in columns.values())} |")


if __name__ == "__main__":
  main()
