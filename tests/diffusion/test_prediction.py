"""A network that knows the truth is converted to the truth, whatever it predicts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.forward import q_sample
from ddpm_jax.diffusion.prediction import to_eps, to_x0, training_target
from ddpm_jax.diffusion.schedules import make_schedule

LINEAR = make_schedule("linear", 1000)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("t", [1, 17, 500, 900])
def test_the_target_leads_back_to_x0_and_eps(prediction, t):
  x0 = jax.random.uniform(jax.random.key(0), (5, 5, 1), minval=-1, maxval=1)
  eps = jax.random.normal(jax.random.key(1), x0.shape)
  xt = q_sample(LINEAR, x0, t, eps)
  output = training_target(prediction, LINEAR, x0, eps, t)
  x0_hat = to_x0(prediction, LINEAR, output, xt, t)
  noise_to_signal = float(1 / np.sqrt(LINEAR.snr[t]))
  chex.assert_trees_all_close(x0_hat, x0, atol=1e-6 * max(1, 5 * noise_to_signal))
  chex.assert_trees_all_close(to_eps(LINEAR, x0, xt, t), eps, atol=2e-4)


def test_v_is_the_velocity_on_the_circle():
  """With alpha = cos(phi), sigma = sin(phi): v = d x_t / d phi (Salimans and Ho 2022, appendix D)."""
  t, x0, eps = 300, 0.7, -1.2
  phi = np.arccos(LINEAR.sqrt_alpha_bar[t])
  x = lambda p: np.cos(p) * x0 + np.sin(p) * eps  # noqa: E731
  derivative = (x(phi + 1e-6) - x(phi - 1e-6)) / 2e-6
  v = training_target("v", LINEAR, jnp.asarray(x0), jnp.asarray(eps), t)
  np.testing.assert_allclose(v, derivative, rtol=1e-5)


def test_unknown_prediction():
  with pytest.raises(ValueError, match="'score'"):
    training_target("score", LINEAR, jnp.zeros(1), jnp.zeros(1), 1)
  with pytest.raises(ValueError, match="'score'"):
    to_x0("score", LINEAR, jnp.zeros(1), jnp.zeros(1), 1)
