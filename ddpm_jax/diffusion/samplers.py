"""Samplers as coefficient tables, and the one `lax.scan` that runs any of them.

A step from t to s < t is  x_s = c_xt x_t + c_x0 x0_hat(x_t, t) + sigma z,  z ~ N(0, I).  A sampler is a table of these
numbers, computed in float64 on the host; what differs between samplers is the table alone.
"""

from __future__ import annotations

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.prediction import to_x0
from ddpm_jax.diffusion.schedules import NoiseSchedule, posterior, reverse_variance


class SamplerTable(typing.NamedTuple):
  """One row for each step, from t = T down to s = 0. `t` is int32 [N]; the coefficients are float64 [N]."""

  t: np.ndarray
  c_xt: np.ndarray
  c_x0: np.ndarray
  sigma: np.ndarray


def time_grid(num_timesteps: int, num_steps: int) -> np.ndarray:
  """num_steps + 1 whole timesteps, evenly spaced from T down to 0: int64 [num_steps + 1], strictly falling.

  The grid that is called "trailing": the first evaluation is at T, the last at about T / num_steps. Song et al. go on
  to t = 1 instead, and space CIFAR-10's steps quadratically; their FIDs are for those grids.

  Raises:
    ValueError: unless 1 <= num_steps <= num_timesteps.
  """
  if not 1 <= num_steps <= num_timesteps:
    raise ValueError(f"num_steps: {num_steps} is not in 1..{num_timesteps}")
  return np.round(np.linspace(num_timesteps, 0, num_steps + 1)).astype(np.int64)


def ancestral_table(schedule: NoiseSchedule, grid: np.ndarray, variance: str) -> SamplerTable:
  """Ancestral sampling, Algorithm 2 of Ho et al. 2020, on any falling grid of timesteps.

  The mean is that of the posterior with x0_hat for x_0 (eq. 7), which is line 4's
  (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_t); the variance is `schedules.reverse_variance`; the
  last step, to s = 0, adds no noise (line 3).
  """
  t, s = grid[:-1], grid[1:]
  q = posterior(schedule, s, t)
  sigma = np.sqrt(np.where(s == 0, 0.0, reverse_variance(schedule, variance, s, t)))
  return SamplerTable(t.astype(np.int32), q.c_xt, q.c_x0, sigma)


def ddim_table(schedule: NoiseSchedule, grid: np.ndarray, eta: float) -> SamplerTable:
  """DDIM, Song et al. 2021, eqs. 12 and 16, on any falling grid of timesteps.

  eta = 0 is deterministic; eta = 1 on the full grid is ancestral sampling with the posterior variance.
  """
  t, s = grid[:-1], grid[1:]
  sigma = eta * np.sqrt(posterior(schedule, s, t).variance)
  # x_s = sqrt(alpha_bar_s) x0_hat + direction * eps_hat + sigma z, with eps_hat written in terms of x_t and x0_hat.
  direction = np.sqrt(np.maximum(1.0 - schedule.alpha_bar[s] - sigma**2, 0.0))
  c_xt = direction / schedule.sqrt_one_minus_alpha_bar[t]
  return SamplerTable(t.astype(np.int32), c_xt, schedule.sqrt_alpha_bar[s] - c_xt * schedule.sqrt_alpha_bar[t], sigma)


def make_sampler(
  schedule: NoiseSchedule, name: str, *, num_steps: int = 0, eta: float = 0.0, variance: str = "fixed_large"
) -> SamplerTable:
  """The table of the sampler of that name ('ddpm', 'ddim'); the one place where names become samplers.

  Args:
    schedule: the noise schedule.
    name: 'ddpm' (uses `variance`) or 'ddim' (uses `eta`).
    num_steps: network evaluations, 1..T; 0 for all T.
    eta: noise of DDIM, 0..1.
    variance: 'fixed_small' or 'fixed_large'.
  """
  grid = time_grid(schedule.num_timesteps, num_steps or schedule.num_timesteps)
  match name:
    case "ddpm":
      return ancestral_table(schedule, grid, variance)
    case "ddim":
      return ddim_table(schedule, grid, eta)
    case _:
      raise ValueError(f"unknown sampler {name!r}")


def x0_predictor(
  network: Callable[[jax.Array, jax.Array], jax.Array], schedule: NoiseSchedule, prediction: str, *, clip: bool = True
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Turns a network (x_t [B, ...], t [B]) -> output into (x_t, t) -> x0_hat [B, ...].

  With `clip`, x0_hat is clipped to the range of the data, [-1, 1], as Ho et al. do when they sample.
  """
  convert = jax.vmap(lambda output, xt, t: to_x0(prediction, schedule, output, xt, t))

  def predict_x0(xt: jax.Array, t: jax.Array) -> jax.Array:
    x0_hat = convert(network(xt, t).astype(jnp.float32), xt, t)
    return jnp.clip(x0_hat, -1.0, 1.0) if clip else x0_hat

  return predict_x0


def sample(
  table: SamplerTable, predict_x0: Callable[[jax.Array, jax.Array], jax.Array], keys: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """Draws one example for each key.

  Args:
    table: which sampler.
    predict_x0: (x_t [B, *shape], t int32 [B]) -> x0_hat [B, *shape].
    keys: B random keys; image i depends on keys[i] alone, not on B.
    shape: of one example.

  Returns:
    float32 [B, *shape].
  """

  def noise(t: jax.Array | int) -> jax.Array:
    # Data has t = 0 and needs no noise of its own, so fold 0 is free for the prior's draw.
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), shape, jnp.float32))(keys)

  noisy = bool(table.sigma.any())

  def step(xt: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    t, c_xt, c_x0, sigma = row
    xs = c_xt * xt + c_x0 * predict_x0(xt, jnp.full(keys.shape, t))
    return (xs + sigma * noise(t) if noisy else xs), None

  coefficients = (jnp.asarray(column, jnp.float32) for column in (table.c_xt, table.c_x0, table.sigma))
  return jax.lax.scan(step, noise(0), (jnp.asarray(table.t), *coefficients))[0]
