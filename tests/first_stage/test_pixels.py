"""The range of values, and that pixels survive the first stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.first_stage.pixels import Pixels, to_float, to_uint8

ALL_VALUES = np.arange(256, dtype=np.uint8)


def test_range_is_minus_one_to_one():
  floats = to_float(ALL_VALUES)
  assert floats.dtype == jnp.float32
  np.testing.assert_allclose(floats, np.linspace(-1, 1, 256), atol=1e-7)
  assert floats[0] == -1
  assert floats[255] == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_all_256_values_survive_the_round_trip(compiled):
  def there_and_back(x):
    return to_uint8(to_float(x))

  result = (jax.jit(there_and_back) if compiled else there_and_back)(jnp.asarray(ALL_VALUES))
  assert result.dtype == jnp.uint8
  np.testing.assert_array_equal(result, ALL_VALUES)


def test_to_uint8_clips_and_rounds_to_the_nearest():
  values = jnp.array([-7.0, -1.001, 1.001, 7.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1])
  np.testing.assert_array_equal(to_uint8(values), [0, 0, 255, 255, 100, 101])


def test_the_first_stage_of_pixels_is_the_identity():
  stage, images = Pixels((4, 4, 3)), np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
  assert stage.image_shape == stage.latent_shape == (4, 4, 3)
  x0 = stage.x0(None, stage.moments(None, images))
  np.testing.assert_allclose(x0, images / 127.5 - 1, atol=1e-7)
  np.testing.assert_array_equal(stage.decode(None, x0), images)
