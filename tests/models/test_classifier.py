"""The small classifier against a second implementation in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models.classifier import Classifier
from tests.models.reference import conv, group_norm, swish


def build(shape, num_classes=5):
  """The network and its parameters, of which none is at its first value."""
  model = Classifier(num_classes)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), params)
  return jax.jit(lambda x: model.apply({"params": params}, x)), params


def random_images(number, shape):
  return np.random.default_rng(1).uniform(-1, 1, (number, *shape)).astype(np.float32)


def test_forward_pass_is_that_of_the_reference():
  forward, params = build((12, 12, 3))
  x = random_images(3, (12, 12, 3))
  h, p = x.astype(np.float64), jax.tree.map(np.float64, params)
  for name, stride, groups in (("conv1", 1, 4), ("conv2", 2, 8), ("conv3", 2, 16)):
    h = swish(group_norm(conv(h, p[name], stride), p[f"{name}_norm"], groups))
  features = swish(h.reshape(3, -1) @ p["features"]["kernel"] + p["features"]["bias"])
  got_features, got_logits = forward(x)
  np.testing.assert_allclose(got_features, features, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(got_logits, features @ p["logits"]["kernel"] + p["logits"]["bias"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("shape", "flat"),
  [
    ((4, 4, 1), 1),
    ((5, 4, 3), 2),
    ((8, 8, 1), 4),
    ((16, 16, 1), 16),
    ((17, 17, 3), 9),
    ((28, 28, 1), 16),
    ((32, 32, 3), 16),
    ((100, 64, 3), 28),
    ((256, 256, 3), 16),
  ],
)
def test_any_size(shape, flat):
  model = Classifier(7)
  features, logits = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, *shape)))[0]
  assert (features.shape, features.dtype) == ((2, 64), jnp.float32)
  assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, *shape)))["params"]
  assert params["features"]["kernel"].shape == (64 * flat, 64)


@pytest.mark.parametrize(("shape", "most"), [((28, 28, 1), 1.5e6), ((32, 32, 3), 2e6), ((256, 256, 3), 10e6)])
def test_it_is_cheap(shape, most):
  """Floating-point operations for an image, as XLA counts them."""
  forward, _ = build(shape)
  assert 1e5 < forward.lower(jnp.zeros((1, *shape))).compile().cost_analysis()["flops"] < most


def test_each_example_is_alone():
  forward, _ = build((8, 8, 1))
  x = random_images(6, (8, 8, 1))
  together = forward(x)
  other = x.copy()
  other[3] = 1.0
  for mine, alone, changed in zip(together, forward(x[2:3]), forward(other), strict=True):
    assert np.ptp(mine, axis=0).min() > 1e-3
    np.testing.assert_allclose(mine[2:3], alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.delete(mine, 3, 0), np.delete(changed, 3, 0))
