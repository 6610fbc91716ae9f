"""q_sample and the posterior against the chain they summarise and against Bayes' rule."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.forward import q_marginal, q_posterior, q_sample
from ddpm_jax.diffusion.schedules import make_schedule

LINEAR = make_schedule("linear", 1000)


def test_q_sample_numbers():
  x0, eps = jnp.asarray([1.0, -1.0, 0.0]), jnp.asarray([0.0, 2.0, -1.0])
  # alpha_bar at t = 501 is 0.0777966584 (golden); its root 0.2789205, the root of the rest 0.9603142.
  expected = [0.2789205, -0.2789205 + 2 * 0.9603142, -0.9603142]
  for function in (q_sample, jax.jit(q_sample)):
    np.testing.assert_allclose(function(x0, eps, LINEAR.level(501)), expected, atol=1e-6)
  chex.assert_trees_all_equal(q_sample(x0, eps, LINEAR.level(0)), x0)  # t = 0 is data


def test_q_sample_batches_by_vmap():
  x0 = jax.random.normal(jax.random.key(0), (4, 3, 3, 1))
  eps = jax.random.normal(jax.random.key(1), x0.shape)
  levels = LINEAR.level(jnp.asarray([1, 10, 500, 1000]))
  batch = jax.vmap(q_sample)(x0, eps, levels)
  for i, t in enumerate([1, 10, 500, 1000]):
    chex.assert_trees_all_close(batch[i], q_sample(x0[i], eps[i], LINEAR.level(t)), rtol=1e-6)
  with pytest.raises(AssertionError):
    q_sample(x0, eps, levels)  # a batched level is a mistake, not a broadcast


@pytest.mark.parametrize("name", ["linear", "quadratic", "cosine", "sigmoid"])
def test_marginal_is_what_the_chain_of_steps_leads_to(name):
  """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z, applied t times, moves mean and variance to those of eq. 4."""
  schedule = make_schedule(name, 200)
  mean, variance = 1.0, 0.0
  for t in range(1, 201):
    beta = schedule.betas[t]
    mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    got_mean, got_variance = q_marginal(schedule, jnp.ones(()), t)
    np.testing.assert_allclose([got_mean, got_variance], [mean, variance], rtol=2e-6)


@pytest.mark.parametrize("t", [2, 3, 500, 1000])
def test_posterior_is_bayes_rule(t):
  """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions and pulls add."""
  x0, xt = 0.3, -1.7
  beta, ab = LINEAR.betas[t], LINEAR.alpha_bar[t - 1]
  precision = (1 - beta) / beta + 1 / (1 - ab)
  mean = (np.sqrt(1 - beta) * xt / beta + np.sqrt(ab) * x0 / (1 - ab)) / precision
  got_mean, got_variance = q_posterior(LINEAR, jnp.asarray(x0), jnp.asarray(xt), t)
  np.testing.assert_allclose([got_mean, got_variance], [mean, 1 / precision], rtol=1e-5)


def test_posterior_of_the_first_step_is_the_image_itself():
  x0, xt = jnp.asarray([0.25, -1.0]), jnp.asarray([3.0, 3.0])
  mean, variance = q_posterior(LINEAR, x0, xt, 1)
  chex.assert_trees_all_equal(mean, x0)
  assert variance == 0
