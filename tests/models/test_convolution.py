"""The convolutions of CPUs against a plain sum in float64, against XLA's, and against `flax.linen.Conv`."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models import convolution
from ddpm_jax.models.convolution import Conv3x3, convolve


def reference(x, kernel):
  """y[p] = sum over the window of kernel[i, j] x[p + (i, j) - 1], zeros outside: float64."""
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  height, width = x.shape[1:3]
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))


def enlarged(x):
  return np.repeat(np.repeat(np.asarray(x), 2, axis=1), 2, axis=2)


CASES = {
  "none": reference,
  "up": lambda x, kernel: reference(enlarged(x), kernel),
  "down": lambda x, kernel: reference(x, kernel)[:, 1::2, 1::2],
}


def xla(x, kernel, resample):
  if resample == "up":
    x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
  strides = (2, 2) if resample == "down" else (1, 1)
  return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.fixture(params=[(2, 6, 10, 3, 4), (1, 2, 4, 1, 2), (3, 8, 8, 4, 1)], ids=str)
def arrays(request):
  batch, height, width, channels, features = request.param
  keys = jax.random.split(jax.random.key(0), 4)
  x, dx = (jax.random.normal(key, (batch, height, width, channels)) for key in keys[:2])
  kernel, dkernel = (jax.random.normal(key, (3, 3, channels, features)) for key in keys[2:])
  return x, kernel, dx, dkernel


@pytest.mark.parametrize("case", CASES)
def test_values(case, arrays):
  x, kernel, *_ = arrays
  ours = jax.jit(lambda x, kernel: convolve(x, kernel, case))
  np.testing.assert_allclose(ours(x, kernel), CASES[case](x, kernel), atol=2e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("by", ["x", "kernel", "both"])
def test_derivatives_forward_and_backward(case, by, arrays):
  plain = CASES[case]
  x, kernel, dx, dkernel = arrays
  dx, dkernel = (dx * (by != "kernel"), dkernel * (by != "x"))
  primals, tangents = {"x": ((x,), (dx,)), "kernel": ((kernel,), (dkernel,)), "both": ((x, kernel), (dx, dkernel))}[by]

  def of(function):
    return {
      "x": lambda x: function(x, kernel, case),
      "kernel": lambda kernel: function(x, kernel, case),
      "both": lambda x, kernel: function(x, kernel, case),
    }[by]

  # Bilinear: the derivative is the function itself at the tangents.
  want = plain(dx, kernel) + plain(x, dkernel)
  np.testing.assert_allclose(jax.jit(lambda: jax.jvp(of(convolve), primals, tangents)[1])(), want, atol=5e-5)

  y = jax.random.normal(jax.random.key(1), want.shape)
  mine, xlas = (jax.jit(lambda f=f: jax.vjp(of(f), *primals)[1](y))() for f in (convolve, xla))
  for one, other in zip(mine, xlas, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_sum_over_the_batch_is_not_forgotten():
  # With ones everywhere the gradient of the inner kernel entry counts pixels of all images.
  x, kernel = jnp.ones((5, 4, 4, 2)), jnp.zeros((3, 3, 2, 1))
  gradient = jax.grad(lambda kernel: jnp.sum(convolve(x, kernel)))(kernel)
  assert float(gradient[1, 1, 0, 0]) == 5 * 16
  assert float(gradient[0, 0, 1, 0]) == 5 * 9  # a corner entry misses one row and one column


@pytest.mark.parametrize("resample", CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_and_types_are_those_of_flax(resample, dtype):
  init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
  x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
  strides = 2 if resample == "down" else 1
  ours, theirs = Conv3x3(5, init, dtype, resample), nn.Conv(5, (3, 3), strides, kernel_init=init, dtype=dtype)
  params = ours.init(jax.random.key(1), x)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, theirs.init(jax.random.key(1), x)))
  params = jax.tree.map(lambda leaf: leaf + 0.5, params)  # a bias that counts
  y, want = ours.apply(params, x), theirs.apply(params, jnp.asarray(enlarged(x)) if resample == "up" else x)
  assert y.dtype == want.dtype == dtype
  np.testing.assert_allclose(
    np.asarray(y, np.float32), np.asarray(want, np.float32), atol=1e-5 if dtype == jnp.float32 else 0.15
  )


@pytest.mark.parametrize("resample", CASES)
@pytest.mark.parametrize("by", [0, 1])
def test_other_devices_than_cpus_get_the_plain_convolution(resample, by):
  x, kernel = jnp.zeros((2, 4, 4, 3)), jnp.zeros((3, 3, 3, 5))

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
def test_a_gradient_in_parts_is_that_of_the_whole(resample, monkeypatch):
  """Few pixels at once: 6 images become parts of 3, 2 or 1."""
  keys = jax.random.split(jax.random.key(0), 2)
  x, kernel = jax.random.normal(keys[0], (6, 4, 4, 3)), jax.random.normal(keys[1], (3, 3, 3, 5))

  def gradient():
    return jax.jit(lambda: jax.grad(lambda kernel: jnp.sum(convolve(x, kernel, resample) ** 2))(kernel))()

  whole = gradient()
  for pixels in (3 * 25, 2 * 25, 1):
    monkeypatch.setattr(convolution, "_PIXELS_AT_ONCE", pixels)
    np.testing.assert_allclose(gradient(), whole, rtol=1e-4, atol=1e-4)


def test_in_a_loop_each_convolution_is_one_that_xla_has_fast_code_for():
  """XLA for CPUs puts convolutions in their usual form outside of loops alone; others are twenty times slower."""
  x, kernel = jnp.ones((3, 2, 4, 4, 3)), jnp.ones((3, 3, 3, 3))

  def total(kernel, x):
    for resample in CASES:
      x = convolve(x, kernel, resample)
    return jnp.sum(x)

  def gradients(kernel, x):
    return jax.lax.scan(lambda sums, x: (sums + jax.grad(total)(kernel, x), None), jnp.zeros_like(kernel), x)[0]

  text = jax.jit(gradients).lower(kernel, x).compile().as_text()
  kinds = set(re.findall(r" convolution\(.*dim_labels=(\S+?)[,\s]", text))
  assert kinds <= {"b01f_01io->b01f"}, kinds
  assert "lhs_dilate" not in text and "rhs_dilate" not in text
