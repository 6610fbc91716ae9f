"""The forward process q and its posterior (Ho et al. 2020, section 2), for one example and scalar t."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.schedules import Level, NoiseSchedule, at, posterior


def q_sample(x0: jax.Array, eps: jax.Array, level: Level) -> jax.Array:
  """x_t = alpha x_0 + sigma eps (Ho et al. eq. 4 and Algorithm 1, line 5).

  >>> q_sample(jnp.ones(2), jnp.asarray([0.0, 5.0]), Level(alpha=0.8, sigma=0.6, time=0)).tolist()
  [0.800000011920929, 3.799999952316284]

  Args:
    x0: one example, any shape, images in [-1, 1].
    eps: standard normal noise, the shape of x0.
    level: `NoiseSchedule.level(t)`, scalars; at t = 0 the result is x0.

  Returns:
    x_t, the shape of x0.
  """
  chex.assert_equal_shape([x0, eps])
  chex.assert_rank([level.alpha, level.sigma], 0)
  return level.alpha * x0 + level.sigma * eps


def q_marginal(schedule: NoiseSchedule, x0: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The mean (shape of x0) and the scalar variance of q(x_t | x_0) (Ho et al. eq. 4), t in 0..T."""
  return at(schedule.sqrt_alpha_bar, t) * x0, at(1.0 - schedule.alpha_bar, t)


def q_posterior(schedule: NoiseSchedule, x0: jax.Array, xt: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The mean (shape of x0) and the scalar variance of q(x_{t-1} | x_t, x_0) (Ho et al. eqs. 6 and 7), t in 1..T.

  At t = 1 the mean is x0 and the variance 0.
  """
  chex.assert_equal_shape([x0, xt])
  steps = np.arange(1, schedule.num_timesteps + 1)
  table = posterior(schedule, steps - 1, steps)
  mean = at(table.c_x0, t - 1) * x0 + at(table.c_xt, t - 1) * xt
  return mean, at(table.variance, t - 1)


def prior_kl(schedule: NoiseSchedule, x0: jax.Array) -> jax.Array:
  """L_T = KL(q(x_T | x_0) || N(0, I)) in bits per dimension, a scalar (Ho et al. eq. 5, first term)."""
  alpha_bar = schedule.alpha_bar[-1]
  # (var - log var - 1) / 2 with var = 1 - alpha_bar, in float64: in float32 it would be rounding noise.
  variance_part = 0.5 * (-np.log1p(-alpha_bar) - alpha_bar)
  nats = jnp.float32(variance_part) + 0.5 * jnp.float32(alpha_bar) * jnp.square(x0)
  return jnp.mean(nats) / np.float32(np.log(2.0))
