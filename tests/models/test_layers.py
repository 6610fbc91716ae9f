"""The 3x3 convolution of the U-Net beside `flax.linen.Conv`, and what takes its place on CPUs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models.build import fast_convolutions
from ddpm_jax.models.layers import Conv3x3, LabelEmbedding

RESAMPLE = ("none", "up", "down", "down_symmetric")


@pytest.fixture(params=[False, True], ids=["plain", "fast"])
def convolutions(request):
  """The convolution as the layer says it, and as `UNetNetwork` has it."""
  if not request.param:
    yield
    return
  with nn.intercept_methods(fast_convolutions):
    yield


@pytest.mark.parametrize("resample", RESAMPLE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_and_types_are_those_of_flax(resample, dtype, convolutions):
  init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
  x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
  strides, padding = 2 if resample.startswith("down") else 1, 1 if resample == "down_symmetric" else "SAME"
  ours, theirs = Conv3x3(5, init, dtype, resample), nn.Conv(5, (3, 3), strides, padding, kernel_init=init, dtype=dtype)
  params = ours.init(jax.random.key(1), x)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, theirs.init(jax.random.key(1), x)))
  params = jax.tree.map(lambda leaf: leaf + 0.5, params)  # a bias that counts
  y, want = (
    ours.apply(params, x),
    theirs.apply(params, jnp.repeat(jnp.repeat(x, 2, 1), 2, 2) if resample == "up" else x),
  )
  assert y.dtype == want.dtype == dtype
  np.testing.assert_allclose(
    np.asarray(y, np.float32), np.asarray(want, np.float32), atol=1e-5 if dtype == jnp.float32 else 0.15
  )


@pytest.mark.parametrize("resample", RESAMPLE)
def test_the_gradient_by_a_bias_is_summed_in_float32(resample, convolutions):
  """That of a sum over the output is the number of pixels; bfloat16 counts to 256."""
  conv, x = Conv3x3(2, nn.initializers.ones_init(), jnp.bfloat16, resample), jnp.zeros((2, 200, 250, 1))
  params = conv.init(jax.random.key(0), x[:1, :2, :2])
  gradient = jax.jit(jax.grad(lambda params: jnp.sum(conv.apply(params, x).astype(jnp.float32))))(params)
  pixels = {"none": 1e5, "up": 4e5, "down": 2.5e4, "down_symmetric": 2.5e4}
  np.testing.assert_array_equal(gradient["params"]["bias"], pixels[resample])


@pytest.mark.parametrize("resample", RESAMPLE)
def test_the_fast_convolution_is_the_one_that_runs(resample, convolutions, request):
  conv, x = Conv3x3(2, nn.initializers.ones_init(), jnp.float32, resample), jnp.zeros((1, 4, 4, 1))
  text = str(jax.make_jaxpr(conv.apply)(conv.init(jax.random.key(0), x), x))
  fast = "fast" in request.node.callspec.id
  assert ("convolution_3x3" in text) == fast and ("conv_general_dilated" in text) != fast


def test_a_label_is_a_row_of_its_embedding():
  """To the last bit; the gradient of a row is the sum over the examples of its label."""
  layer, label = LabelEmbedding(4, 6), jnp.asarray([2, 0, 2, 3])
  params = layer.init(jax.random.key(0), label)
  rows = np.asarray(params["params"]["embedding"])
  assert rows.shape == (4, 6) and rows.dtype == np.float32
  np.testing.assert_array_equal(layer.apply(params, label), rows[[2, 0, 2, 3]])
  weights = np.arange(24, dtype=np.float32).reshape(4, 6)
  gradient = jax.grad(lambda params: jnp.sum(layer.apply(params, label) * weights))(params)["params"]["embedding"]
  np.testing.assert_array_equal(gradient, [weights[1], np.zeros(6), weights[0] + weights[2], weights[3]])
