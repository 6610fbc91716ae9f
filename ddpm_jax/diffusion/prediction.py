"""What a network may predict - eps, x0 or v - and the one conversion between them, for one example and scalar t.

All three are linear in (x_0, eps) at a given x_t:  v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0
(Salimans and Ho 2022, section 4), so that  x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v.
"""

from __future__ import annotations

import chex
import jax

from ddpm_jax.diffusion.schedules import NoiseSchedule, at


def training_target(prediction: str, schedule: NoiseSchedule, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
  """What the network should say about x_t = q_sample(x0, t, eps), for a prediction 'eps', 'x0' or 'v'. Shape of x0."""
  match prediction:
    case "eps":
      return eps
    case "x0":
      return x0
    case "v":
      return at(schedule.sqrt_alpha_bar, t) * eps - at(schedule.sqrt_one_minus_alpha_bar, t) * x0
    case _:
      raise ValueError(f"unknown prediction {prediction!r}")


def to_x0(prediction: str, schedule: NoiseSchedule, output: jax.Array, xt: jax.Array, t: jax.Array) -> jax.Array:
  """The estimate x0_hat that a network's output stands for (for eps: Ho et al. eq. 15), t in 1..T. Shape of xt."""
  chex.assert_equal_shape([output, xt])
  a, b = at(schedule.sqrt_alpha_bar, t), at(schedule.sqrt_one_minus_alpha_bar, t)
  match prediction:
    case "eps":
      return (xt - b * output) / a
    case "x0":
      return output
    case "v":
      return a * xt - b * output
    case _:
      raise ValueError(f"unknown prediction {prediction!r}")


def to_eps(schedule: NoiseSchedule, x0_hat: jax.Array, xt: jax.Array, t: jax.Array) -> jax.Array:
  """The noise that x_t holds if its image is x0_hat, t in 1..T: q_sample solved for eps. Shape of xt."""
  return (xt - at(schedule.sqrt_alpha_bar, t) * x0_hat) / at(schedule.sqrt_one_minus_alpha_bar, t)
