"""The convolutions of CPUs against a plain sum in float64, against XLA's, and against `flax.linen.Conv`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ddpm_jax.runtime.cpu import convolution, convolve
from tests.runtime import derivatives


def reference(x, kernel):
  """y[p] = sum over the window of kernel[i, j] x[p + (i, j) - 1], zeros outside: float64."""
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  side = len(kernel)
  height, width = (size + 3 - side for size in x.shape[1:3])
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(side) for j in range(side))


def enlarged(x):
  return np.repeat(np.repeat(np.asarray(x), 2, axis=1), 2, axis=2)


CASES = {
  "none": reference,
  "up": lambda x, kernel: reference(enlarged(x), kernel),
  "down": lambda x, kernel: reference(x, kernel)[:, 1::2, 1::2],
  "down_symmetric": lambda x, kernel: reference(x, kernel)[:, ::2, ::2],
  "4x4_down": lambda x, kernel: reference(x, kernel)[:, ::2, ::2],
  "4x4": reference,
}


def shape_of_kernel(case, channels, features):
  return (*((4, 4) if case.startswith("4x4") else (3, 3)), channels, features)


@pytest.fixture(params=[(2, 6, 10, 3, 4), (1, 2, 4, 1, 2), (3, 8, 8, 4, 1)], ids=str)
def arrays(request, case):
  batch, height, width, channels, features = request.param
  keys = jax.random.split(jax.random.key(0), 4)
  x, dx = (jax.random.normal(key, (batch, height, width, channels)) for key in keys[:2])
  kernel, dkernel = (jax.random.normal(key, shape_of_kernel(case, channels, features)) for key in keys[2:])
  return x, kernel, dx, dkernel


@pytest.mark.parametrize("case", CASES)
def test_values(case, arrays):
  x, kernel, *_ = arrays
  ours = jax.jit(lambda x, kernel: convolve(x, kernel, case))
  np.testing.assert_allclose(ours(x, kernel), CASES[case](x, kernel), atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_derivatives_forward_and_backward(case, arrays):
  x, kernel, dx, dkernel = arrays
  # Bilinear: the derivative is the function itself at the tangents.
  want = CASES[case](dx, kernel) + CASES[case](x, dkernel)
  derivative = jax.jit(lambda x, kernel: jax.jvp(lambda *a: convolve(*a, case), (x, kernel), (dx, dkernel))[1])
  np.testing.assert_allclose(derivative(x, kernel), want, atol=5e-5)

  y = jax.random.normal(jax.random.key(1), want.shape)
  mine, xlas = (
    jax.jit(lambda *arrays, f=f: jax.vjp(lambda *a: f(*a, case), *arrays)[1](y))(x, kernel)
    for f in (convolve, derivatives.plain)
  )
  for one, other in zip(mine, xlas, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
  ("resample", "dtype", "most"),
  [
    *((resample, "float64", 1e-13) for resample in derivatives.MODES),
    ("none", "float32", 2e-6),
    ("up", "bfloat16", 0.04),
    ("down", "bfloat16", 0.04),
  ],
)
def test_derivatives_of_both_orders_batched_or_not(resample, dtype, most):
  """Against XLA's convolution in float64, differentiated and batched by JAX's own rules."""
  found = derivatives.errors(resample, dtype)
  assert len(found) == 18
  assert {name: error for name, error in found.items() if not error < most} == {}


@pytest.mark.parametrize("resample", CASES)
def test_derivatives_within_shard_map(resample, monkeypatch):
  """Each device has its images, all have the kernel: its gradient is summed over the devices, as are second ones."""
  monkeypatch.setattr(convolution, "_PIXELS_AT_ONCE", 32)  # so that there is a loop over parts of the batch
  mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  keys = jax.random.split(jax.random.key(0), 3)
  shape = shape_of_kernel(resample, 3, 5)
  x, (kernel, dkernel) = jax.random.normal(keys[0], (8, 4, 4, 3)), jax.random.normal(keys[1], (2, *shape))

  def loss(kernel, x):
    return jnp.sum(jnp.square(convolve(x, kernel, resample)))

  def of_devices(check):
    function = lambda *arrays: jax.lax.psum(loss(*arrays), "d")  # noqa: E731
    specs = (PartitionSpec(), PartitionSpec("d"))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check)

  def gradient_and_hessian_vector(loss):
    return jax.jit(lambda kernel, x: jax.jvp(lambda k: jax.grad(loss)(k, x), (kernel,), (dkernel,)))(kernel, x)

  want = gradient_and_hessian_vector(loss)
  for check in (True, False):
    for one, other in zip(gradient_and_hessian_vector(of_devices(check)), want, strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


def test_images_that_are_batched_stay_on_their_devices():
  """Probes [P] of images [B], which are spread over devices, are convolved as B P images: nothing is sent around."""
  mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
  x = jax.ShapeDtypeStruct((3, 16, 4, 4, 2), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "d")))
  kernel = jax.ShapeDtypeStruct((3, 3, 2, 5), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
  function = jax.jit(jax.vmap(convolve, (0, None)), out_shardings=x.sharding)
  text = function.lower(x, kernel).compile().as_text()
  assert re.findall(r"all-\w+|collective-\w+|reduce-scatter", text) == [] and "convolution" in text


@pytest.mark.parametrize(
  ("x", "kernel"),
  [
    (jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 3, 5))),
    (jnp.zeros((1, 4, 4, 3), jnp.bfloat16), jnp.zeros((3, 3, 3, 5))),
  ],
)
def test_shapes_and_types_that_do_not_fit(x, kernel):
  with pytest.raises((TypeError, ValueError), match="conv_general_dilated"):
    convolve(x, kernel)


def test_a_sum_over_the_batch_is_not_forgotten():
  # With ones everywhere the gradient of the inner kernel entry counts pixels of all images.
  x, kernel = jnp.ones((5, 4, 4, 2)), jnp.zeros((3, 3, 2, 1))
  gradient = jax.grad(lambda kernel: jnp.sum(convolve(x, kernel)))(kernel)
  assert float(gradient[1, 1, 0, 0]) == 5 * 16
  assert float(gradient[0, 0, 1, 0]) == 5 * 9  # a corner entry misses one row and one column


@pytest.mark.parametrize("resample", CASES)
@pytest.mark.parametrize("by", [0, 1])
def test_other_devices_than_cpus_get_the_plain_convolution(resample, by):
  x, kernel = jnp.zeros((2, 4, 4, 3)), jnp.zeros(shape_of_kernel(resample, 3, 5))

  def gradient(x, kernel):
    return jax.grad(lambda *arrays: jnp.sum(convolve(*arrays, resample)), by)(x, kernel)

  texts = {
    platform: jax.jit(gradient).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    for platform in ("cpu", "tpu", "cuda")
  }
  assert texts["tpu"].count("stablehlo.convolution") == texts["cuda"].count("stablehlo.convolution") == 1
  assert "stablehlo.dot_general" not in texts["tpu"] + texts["cuda"]
  assert ("stablehlo.convolution" in texts["cpu"]) == (by == 0)
  assert "stride = [2, 2]" not in texts["cpu"] and "lhs_dilate = [2, 2]" not in texts["cpu"]


@pytest.mark.parametrize("resample", CASES)
def test_the_precision_is_that_of_the_call_wherever_it_is_lowered(resample):
  """As `jax.lax.conv_general_dilated` has it, in both derivatives too."""

  def gradients(x, kernel):
    def loss(x, kernel):
      with jax.default_matmul_precision("highest"):
        return jnp.sum(convolve(x, kernel, resample) ** 2)

    return loss(x, kernel), jax.grad(loss, (0, 1))(x, kernel)

  traced = jax.jit(gradients).trace(jnp.ones((1, 4, 4, 2)), jnp.ones(shape_of_kernel(resample, 2, 2)))
  lines = traced.lower(lowering_platforms=("tpu",)).as_text().splitlines()
  convolutions = [line for line in lines if "stablehlo.convolution" in line]
  assert len(convolutions) >= 3 and all("HIGHEST" in line for line in convolutions)


@pytest.mark.parametrize("resample", CASES)
def test_without_jit_and_of_nothing(resample):
  x, kernel = jax.random.normal(jax.random.key(0), (2, 4, 4, 3)), jnp.ones(shape_of_kernel(resample, 3, 2))
  with jax.disable_jit():
    y = convolve(x, kernel, resample)
  np.testing.assert_allclose(y, convolve(x, kernel, resample), atol=1e-5)
  for axes, arrays in (((0, None), (x[None][:0], kernel)), ((None, 0), (x, kernel[None][:0]))):
    nothing = jax.vmap(lambda x, kernel: convolve(x, kernel, resample), axes)(*arrays)
    assert nothing.shape == (0, *y.shape)
  assert jax.vmap(lambda x, kernel: convolve(x, kernel, resample))(x[None][:0], kernel[None][:0]).shape == (0, *y.shape)


@pytest.mark.parametrize("resample", CASES)
def test_a_gradient_in_parts_is_that_of_the_whole(resample, monkeypatch):
  """Few pixels at once: 6 images become parts of 3, 2 or 1."""
  keys = jax.random.split(jax.random.key(0), 2)
  x, kernel = jax.random.normal(keys[0], (6, 4, 4, 3)), jax.random.normal(keys[1], shape_of_kernel(resample, 3, 5))

  def gradient():
    return jax.jit(lambda: jax.grad(lambda kernel: jnp.sum(convolve(x, kernel, resample) ** 2))(kernel))()

  whole = gradient()
  for pixels in (3 * 25, 2 * 25, 1):
    monkeypatch.setattr(convolution, "_PIXELS_AT_ONCE", pixels)
    np.testing.assert_allclose(gradient(), whole, rtol=1e-4, atol=1e-4)


def test_in_a_loop_each_convolution_is_one_that_xla_has_fast_code_for():
  """XLA for CPUs puts convolutions in their usual form outside of loops alone; others are twenty times slower.

  Of images that are no smaller than the kernel: of others it exchanges the two.
  """
  x, kernels = jnp.ones((3, 2, 32, 32, 3)), {case: jnp.ones(shape_of_kernel(case, 3, 3)) for case in CASES}

  def total(kernels, x):
    for case in CASES:
      x = convolve(x, kernels[case], case)
    return jnp.sum(x)

  def gradients(kernels, x):
    def add(sums, x):
      return jax.tree.map(jnp.add, sums, jax.grad(total)(kernels, x)), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, kernels), x)[0]

  text = jax.jit(gradients).lower(kernels, x).compile().as_text()
  kinds = set(re.findall(r" convolution\(.*dim_labels=(\S+?)[,\s]", text))
  assert kinds <= {"b01f_01io->b01f"}, kinds
  assert "lhs_dilate" not in text and "rhs_dilate" not in text
