"""The simple loss of one example, and its weight by timestep."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.parameterization import Parameterization
from ddpm_jax.diffusion.schedules import NoiseSchedule

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, section 3.4


def pointwise_loss(loss: str, output: jax.Array, target: jax.Array) -> jax.Array:
  """The loss of one example, the mean over its dimensions: a float32 scalar.

  >>> float(pointwise_loss("huber", jnp.asarray([0.5, 3.0]), jnp.zeros(2)))  # (0.125 + 2.5) / 2
  1.3125

  Args:
    loss: 'l2' squared error (Ho et al. eq. 14), 'l1' absolute error, 'huber' quadratic below an error of 1 and linear
      above, equal to half the squared error below.
    output: the network's output, any shape.
    target: `Parameterization.target`, the same shape.
  """
  chex.assert_equal_shape([output, target])
  error = output.astype(jnp.float32) - target
  match loss:
    case "l2":
      return jnp.mean(jnp.square(error))
    case "l1":
      return jnp.mean(jnp.abs(error))
    case "huber":
      size = jnp.abs(error)
      return jnp.mean(jnp.where(size < 1.0, 0.5 * jnp.square(error), size - 0.5))
    case _:
      raise ValueError(f"unknown loss {loss!r}")


def loss_weights(weighting: str, parameterization: Parameterization, schedule: NoiseSchedule) -> np.ndarray:
  """The weight of the squared error at each timestep: float64 [T + 1]; entry 0 is 0, as t = 0 is never drawn.

  A weighting is a function of SNR in terms of the error of x0. That is c_out^2 times the squared error of the output
  (1 / SNR of eps, 1 / (SNR + 1) of v), a factor that makes the loss the same whatever the network predicts.

  Args:
    weighting: 'constant' (1 for every prediction: L_simple of Ho et al. for eps), 'min_snr' (min(SNR, 5) for x0; Hang
      et al. 2023), 'truncated_snr' (max(SNR, 1) for x0; Salimans and Ho 2022, section 4; for eps it is 1 / SNR at large
      t, 24,777 at T of the linear schedule: meant for x0 and v).
    parameterization: what the network predicts.
    schedule: the noise schedule.
  """
  snr = schedule.snr[1:]
  c_out = parameterization.c_out(schedule.level(np.arange(1, schedule.num_timesteps + 1)))
  match weighting:
    case "constant":
      weights = np.ones_like(snr)
    case "min_snr":
      weights = np.minimum(snr, MIN_SNR_GAMMA) * c_out**2
    case "truncated_snr":
      weights = np.maximum(snr, 1.0) * c_out**2
    case _:
      raise ValueError(f"unknown loss weighting {weighting!r}")
  return np.concatenate([[0.0], weights])
