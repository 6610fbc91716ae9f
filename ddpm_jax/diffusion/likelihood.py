"""Likelihoods: the variational bound of Ho et al. 2020, and the density of the probability-flow ODE.

Both are of images whose pixels are 256 values, 2/255 apart, in [-1, 1]; both are given in bits per dimension, the
number of bits that a pixel's colour takes when the model is used to compress.
"""

from __future__ import annotations

import math
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from ddpm_jax.diffusion.denoiser import DenoiseFn
from ddpm_jax.diffusion.samplers import time_grid
from ddpm_jax.diffusion.schedules import Level, NoiseSchedule, at, cast, posterior, reverse_variance

BIN = 2.0 / 255.0  # the distance of two values of a pixel in [-1, 1], and the width of the bin around each
_LOG_2 = math.log(2.0)


def posterior_kl(schedule: NoiseSchedule, variance: str, x0: jax.Array, t: jax.Array, x0_hat: jax.Array) -> jax.Array:
  """L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of Ho et al. eq. 5, in bits per dimension.

  Both are Gaussian, with means c_x0 x_0 + c_xt x_t and c_x0 x0_hat + c_xt x_t, so that x_t itself drops out:
  (log(v_p / v_q) + v_q / v_p - 1 + c_x0^2 (x_0 - x0_hat)^2 / v_p) / 2, averaged over the dimensions.

  Args:
    schedule: the noise schedule.
    variance: of p: 'fixed_small' or 'fixed_large', see `schedules.reverse_variance`.
    x0: one example, any shape.
    t: integer scalar in 2..T; below 2 the result is 0.
    x0_hat: the estimate of x0 from x_t, the same shape.

  Returns:
    A float32 scalar, at least 0.
  """
  chex.assert_equal_shape([x0, x0_hat])
  chex.assert_rank(t, 0)
  steps = np.arange(2, schedule.num_timesteps + 1)
  q, p_variance = posterior(schedule, steps - 1, steps), reverse_variance(schedule, variance, steps - 1, steps)
  ratio = q.variance / p_variance
  # In float64, as it is a small difference; exactly 0 for fixed_small. Entries 0 and 1 are not used.
  constant = np.pad((ratio - 1.0 - np.log(ratio)) / 2, (2, 0))
  weight = np.pad(q.c_x0**2 / p_variance / 2, (2, 0))
  return (at(constant, t) + at(weight, t) * jnp.mean(jnp.square(x0 - x0_hat))) / _LOG_2


def decoder_bits(schedule: NoiseSchedule, variance: str, x0: jax.Array, x0_hat: jax.Array) -> jax.Array:
  """L_0 = -log p(x_0 | x_1), the discretised Gaussian decoder of Ho et al. eq. 13, in bits per dimension.

  The probability of a pixel is that of its bin, of width `BIN` around it, under N(x0_hat, sigma_1^2); the bins of -1
  and of 1 reach to infinity, so that the 256 probabilities add up to 1.

  Args:
    schedule: the noise schedule, T >= 2.
    variance: 'fixed_small' or 'fixed_large', which give the same sigma_1, that of t = 2.
    x0: one example, any shape, values k / 127.5 - 1 with k in 0..255.
    x0_hat: the estimate of x0 from x_1, the same shape: the mean of p(x_0 | x_1).

  Returns:
    A float32 scalar, at least 0.
  """
  chex.assert_equal_shape([x0, x0_hat])
  sigma = jnp.float32(np.sqrt(reverse_variance(schedule, variance, np.asarray(0), np.asarray(1))))
  difference = x0 - x0_hat
  # The Gaussian is symmetric: the bin may as well lie on the left, where the logarithms of both of its ends are exact
  # and the larger is that of the end nearer to the mean. Differences of the cdf itself would be 0 after 6 sigma.
  distance = jnp.abs(difference)
  near, far = log_ndtr((BIN / 2 - distance) / sigma), log_ndtr((-BIN / 2 - distance) / sigma)
  inside = near + jax.nn.log1mexp(near - far)
  lowest, highest = log_ndtr((difference + BIN / 2) / sigma), log_ndtr((BIN / 2 - difference) / sigma)
  log_p = jnp.where(x0 < -1 + BIN / 2, lowest, jnp.where(x0 > 1 - BIN / 2, highest, inside))
  return -jnp.mean(log_p) / _LOG_2


def density_decoder_bits(schedule: NoiseSchedule, variance: str, x0: jax.Array, x0_hat: jax.Array) -> jax.Array:
  """L_0 = -log N(x_0; x0_hat, sigma_1^2), the Gaussian decoder of an x_0 that is continuous, in bits per dimension.

  Arguments: as of `decoder_bits`, but x0 is any. Returns a float32 scalar, of either sign: it is a density.
  """
  chex.assert_equal_shape([x0, x0_hat])
  variance_1 = reverse_variance(schedule, variance, np.asarray(0), np.asarray(1))
  constant = jnp.float32(0.5 * np.log(2 * np.pi * variance_1))
  return (constant + jnp.float32(0.5 / variance_1) * jnp.mean(jnp.square(x0 - x0_hat))) / _LOG_2


def bound_term(
  schedule: NoiseSchedule,
  variance: str,
  x0: jax.Array,
  t: jax.Array,
  x0_hat: jax.Array,
  bin_width: float | None = BIN,
) -> jax.Array:
  """The term of the bound that belongs to t: L_{t-1}, in bits per dimension, a float32 scalar.

  Their sum over t = 1..T and `forward.prior_kl`, L_T, is Ho et al. eq. 5.

  Args:
    schedule: the noise schedule, T >= 2.
    variance: 'fixed_small' or 'fixed_large'.
    x0: one example, any shape, values k / 127.5 - 1 with k in 0..255.
    t: integer scalar in 1..T.
    x0_hat: the estimate of x0 from x_t ~ q(x_t | x_0), the same shape; the authors clip it to [-1, 1].
    bin_width: `BIN`; None: x0 is continuous, with any values, and L_0 a density.

  Raises:
    ValueError: another bin_width.
  """
  if bin_width not in (None, BIN):
    raise ValueError(f"bin_width {bin_width} is not that of pixels")
  decoder_of = density_decoder_bits if bin_width is None else decoder_bits
  kl, decoder = posterior_kl(schedule, variance, x0, t, x0_hat), decoder_of(schedule, variance, x0, x0_hat)
  return jnp.where(t == 1, decoder, kl)  # either is finite for any t


def strata(num_timesteps: int, number: int) -> np.ndarray:
  """Divides 1..T into strata: one t drawn uniformly from each, weighted by its size, estimates a sum over t.

  The first stratum is t = 1 alone, as L_0 is of another kind than the rest, and the sizes grow geometrically, as
  L_{t-1} falls about as 1 / t.

  Args:
    num_timesteps: T.
    number: of strata; 0, or T and more: T of them, each a single t. With T > 1 there are at least 2.

  Returns:
    int64 [strata + 1]: stratum i is edges[i] .. edges[i + 1] - 1; edges[0] = 1, edges[-1] = T + 1.

  >>> strata(1000, 5).tolist()
  [1, 2, 7, 36, 188, 1001]
  """
  if number == 0 or number >= num_timesteps:
    return np.arange(1, num_timesteps + 2)
  number = max(number, 2)
  powers = np.arange(number)
  # The growth r with 1 + r + ... + r^(number - 1) = T, by bisection; r^(number - 1) < T.
  low, high = 1.0, num_timesteps ** (1.0 / (number - 1))
  for _ in range(100):
    middle = (low + high) / 2
    low, high = (middle, high) if np.sum(middle**powers) < num_timesteps else (low, middle)
  # The sizes are at least 1, so that rounded up from a half the edges still rise.
  return np.append(1, np.floor(1.5 + np.cumsum(high**powers)).astype(np.int64))


_BELOW_1 = 8  # steps on [0, sbar_1]


class OdeTable(typing.NamedTuple):
  """The steps of the ODE solver. One row for each of the n + 8 points of the grid, sbar = 0 first and sbar_T last.

  At row i the state is xbar_i. float64 [n + 8] each.
  """

  level: Level  # where the denoiser is evaluated: that of t, of t = 1 also below it
  scale: np.ndarray  # 1 / sqrt(1 + sbar^2), which is sqrt(alpha_bar): x_t = scale xbar
  step: np.ndarray  # sbar of the next row minus that of this one; 0 in the last row
  weight: np.ndarray  # of the divergence at this point in its integral over sbar


def ode_table(schedule: NoiseSchedule, num_steps: int) -> OdeTable:
  """8 steps on [0, sbar_1] and n - 1 from t = 1 to T, even in log SNR as far as whole timesteps are.

  The integral of the divergence is by the trapezoidal rule in log sbar, in which sbar times the divergence goes from
  one constant to another: its error is far below that of the rule in sbar. On [0, sbar_1] there is no logarithm: there
  it is in sbar, and the network, which is not defined at t = 0, is that of t = 1. Of pixels that hardly vary it is
  steep there: with one step the result would be 0.12 bits/dim away from that of a density, with 8 it is 0.003.

  Raises:
    ValueError: unless 1 <= num_steps <= T.
  """
  times = time_grid(schedule, num_steps, "logsnr")[-2::-1]
  sbar_above = np.sqrt(1.0 / schedule.snr[times])
  sbar_below = sbar_above[0] * np.arange(_BELOW_1) / _BELOW_1
  sbar = np.concatenate([sbar_below, sbar_above])
  t = np.concatenate([np.ones(_BELOW_1, np.int64), times])
  width = np.diff(np.log(sbar_above)) / 2
  weight = np.zeros(len(sbar))
  weight[:_BELOW_1] += sbar_above[0] / _BELOW_1 / 2
  weight[1 : _BELOW_1 + 1] += sbar_above[0] / _BELOW_1 / 2
  weight[_BELOW_1:-1] += width * sbar_above[:-1]
  weight[_BELOW_1 + 1 :] += width * sbar_above[1:]
  return OdeTable(schedule.level(t), 1.0 / np.sqrt(1.0 + sbar**2), np.diff(sbar, append=sbar[-1]), weight)


def ode_evaluations(num_steps: int) -> int:
  """The number of network evaluations of `ode_log_density`."""
  return 2 * (num_steps + _BELOW_1)


def ode_log_density(
  schedule: NoiseSchedule, denoise: DenoiseFn, x0: jax.Array, keys: jax.Array, *, num_steps: int, num_probes: int
) -> jax.Array:
  """log p(x_0) of the model that the probability-flow ODE defines (Song et al. 2021, section 4.3 and appendix D.2).

  With xbar = x_t / sqrt(alpha_bar_t) and sbar = sqrt((1 - alpha_bar_t) / alpha_bar_t) the ODE is
  d xbar / d sbar = eps_hat, and along it d log p / d sbar = -div eps_hat, the divergence with respect to xbar. So

    log p(x_0) = log N(x_T; 0, I) + D/2 log alpha_bar_T + integral of div eps_hat from sbar = 0 to sbar_T,

  the second term as x_T = sqrt(alpha_bar_T) xbar_T. The state moves by Heun's method; the divergence is Hutchinson's
  estimate (Grathwohl et al. 2019), E[v . J v] over vectors v of independent signs, the same all the way. On
  [0, sbar_1], where there is no network, it is that of t = 1.

  Args:
    schedule: the noise schedule.
    denoise: a denoise function that clips nothing, of which eps is used.
    x0: float32 [B, ...].
    keys: B random keys, for the vectors v; the result for x0[i] depends on keys[i] alone.
    num_steps: n in 1..T, see `ode_table`. `denoise` is evaluated `ode_evaluations(n)` times; half of these are
      linearised, once for all probes.
    num_probes: vectors v for each example.

  Returns:
    float32 [B], nats per example. Its error falls with the square of n, down to that of the steps on [0, sbar_1].
  """
  dimensions = tuple(range(1, x0.ndim))
  probes = jax.vmap(lambda key: jax.random.rademacher(key, (num_probes, *x0.shape[1:]), x0.dtype), out_axes=1)(keys)

  def move(carry: tuple[jax.Array, jax.Array], row: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
    xbar, integral = carry
    level, scale, level_next, scale_next, step, weight = row

    eps, along = jax.linearize(lambda xbar: denoise(scale * xbar, level).eps, xbar)
    derivative = jax.vmap(along)(probes)  # [P, B, ...]
    divergence = jnp.mean(jnp.sum(probes * derivative, axis=tuple(d + 1 for d in dimensions)), axis=0)
    ahead = denoise(scale_next * (xbar + step * eps), level_next).eps
    return (xbar + step / 2 * (eps + ahead), integral + weight * divergence), None

  table = ode_table(schedule, num_steps)
  level_next, scale_next = jax.tree.map(lambda column: np.append(column[1:], column[-1]), (table.level, table.scale))
  rows = cast((table.level, table.scale, level_next, scale_next, table.step, table.weight))
  (xbar, integral), _ = jax.lax.scan(move, (x0, jnp.zeros(len(x0))), rows)
  x_last = jnp.float32(table.scale[-1]) * xbar
  per_dimension = 0.5 * (np.log(schedule.alpha_bar[-1]) - np.log(2 * np.pi))
  return integral + jnp.sum(jnp.float32(per_dimension) - 0.5 * jnp.square(x_last), axis=dimensions)


def dequantise(key: jax.Array, x0: jax.Array) -> jax.Array:
  """One example, spread uniformly over the bin, of width `BIN`, around each of its values (Theis et al. 2016)."""
  return x0 + BIN * jax.random.uniform(key, x0.shape, minval=-0.5, maxval=0.5)


def density_to_bits(log_density: np.ndarray, dimensions: int, bin_width: float | None = BIN) -> np.ndarray:
  """Bits per dimension of discrete images from the density of `dequantise` of them.

  P(x_0) is the integral of the density over the bins around x_0, that is BIN^D times its mean there, and the mean of
  its logarithm is at most that of the mean (Theis et al. 2016): an upper bound, in expectation.

  Args:
    log_density: nats per example, any shape.
    dimensions: D, the numbers in an example.
    bin_width: of their values; None: the examples are continuous, and the bits those of their density.
  """
  log_bin = 0.0 if bin_width is None else np.log(bin_width)
  return -(np.asarray(log_density, np.float64) / dimensions + log_bin) / _LOG_2
