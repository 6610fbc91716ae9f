"""The perceptual distance: closed forms and symmetries; `tests/interop` asks the authors' package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models import build, lpips

STAGES = lpips.STAGES


@pytest.fixture(scope="module")
def few():
  """A network with the layers of VGG16 and few channels, and random weights."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lpips, "STAGES", ((4, 4), (4, 4), (6, 6, 6), (8, 8, 8), (8, 8, 8)))
    rng = np.random.default_rng(0)

    def random(path, leaf):
      noise = rng.standard_normal(leaf.shape)
      scale = np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1
      return np.float32(np.abs(noise) if path[0].key != "vgg16" else scale * noise)

    params = jax.tree.map_with_path(random, lpips.abstract_params())
    yield params, jax.jit(build.lpips), jax.jit(jax.grad(lambda p, x, y: jnp.sum(build.lpips(p, x, y)), (1, 2)))


def images(seed, channels=3):
  return jax.random.uniform(jax.random.key(seed), (3, 24, 16, channels), minval=-1.0)


def test_it_is_a_distance_with_a_gradient(few):
  params, distance, gradient = few
  x, y = images(0), images(1)
  d = distance(params, x, y)
  assert d.shape == (3,) and d.dtype == jnp.float32 and (d > 0.05).all()
  np.testing.assert_array_equal(distance(params, x, x), 0.0)
  np.testing.assert_allclose(distance(params, y, x), d, rtol=1e-6)
  np.testing.assert_allclose(distance(params, x[1:2], y[1:2]), d[1:2], rtol=1e-5)  # each pair alone
  by_x, by_y = gradient(params, x, y)
  assert np.abs(by_x).max() > 1e-5 and np.abs(by_y).max() > 1e-5
  step = 1e-2 * by_x / jnp.abs(by_x).max()
  change = float(jnp.sum(distance(params, x + step, y)) - jnp.sum(d))
  np.testing.assert_allclose(change, float(jnp.sum(by_x * step)), rtol=0.1)


def test_grey_is_three_equal_colours(few):
  params, distance, _ = few
  x, y = images(2, 1), images(3, 1)
  colour = [jnp.repeat(z, 3, axis=-1) for z in (x, y)]
  np.testing.assert_allclose(distance(params, x, y), distance(params, *colour), rtol=1e-6)


def test_features_of_zero_have_a_finite_gradient(few):
  """With biases that silence whole layers; a plain division by the length gives NaN there."""
  params, distance, gradient = few
  x, y = images(4), images(5)
  for silent in ("conv1_2", "conv3_3", "conv5_3"):
    layer = params["vgg16"][silent]
    dead = params | {"vgg16": params["vgg16"] | {silent: layer | {"bias": layer["bias"] - 100.0}}}
    by_x, _ = gradient(dead, x, y)
    assert np.isfinite(distance(dead, x, y)).all() and np.isfinite(by_x).all()
  assert np.abs(by_x).max() > 1e-5  # the last one alone is silent: the others still tell


def test_the_distance_of_features_by_hand():
  one, other = jnp.asarray([[[[3.0, 4.0]]]]), jnp.asarray([[[[0.0, 2.0]]]])  # 1x1 pixels: (.6, .8) and (0, 1)
  zero = jnp.zeros((1, 2, 2, 2))
  distance = lpips.feature_distance([one, zero], [other, zero])
  np.testing.assert_allclose(distance, [0.36 + 0.04], rtol=1e-6)
  weighted = lpips.feature_distance([one], [other], [jnp.asarray([2.0, 10.0])])
  np.testing.assert_allclose(weighted, [0.72 + 0.4], rtol=1e-6)
  halved = lpips.feature_distance([jnp.concatenate([one, other], 1)], [jnp.concatenate([other, other], 1)])
  np.testing.assert_allclose(halved, [0.2], rtol=1e-6)  # the mean over two pixels
  gradient = jax.grad(lambda x: jnp.sum(lpips.feature_distance([x], [jnp.ones_like(x)])))(zero)
  assert not gradient.any()
  assert abs(float(jnp.linalg.norm(lpips.unit(one))) - 1) < 1e-6


def test_the_published_size(monkeypatch):
  monkeypatch.setattr(lpips, "STAGES", STAGES)
  shapes = lpips.abstract_params()
  assert build.num_params(shapes["vgg16"]) == 14_714_688
  assert build.num_params(shapes) == 14_714_688 + 1_472
  assert [name for name in lpips.tensor_names() if name.endswith("weight")][:4] == [
    *("features.0.weight", "features.2.weight", "lin0.model.1.weight", "features.5.weight")
  ]
