"""Noise schedules: float64 NumPy tables over t = 0..T, made once on the host.

Near t = 0 the quantity 1 - alpha_bar is a small difference: computed in float32 it is off by a relative 1.7e-4 at
t = 1 of the linear schedule. So every table is computed in float64 and cast to float32 where it is read (`at`).
"""

from __future__ import annotations

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

Tables = typing.TypeVar("Tables")  # a tree of NumPy arrays


class Level(typing.NamedTuple):
  """The noise level of x = alpha x_0 + sigma eps, for one example (scalars) or a batch ([B] each).

  Attributes:
    alpha: the factor of x_0, > 0.
    sigma: the standard deviation of the noise, >= 0.
    time: the number that the network is given for it.
  """

  alpha: typing.Any
  sigma: typing.Any
  time: typing.Any


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
  """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), for t = 0..T (Ho et al. 2020, eq. 4).

  Attributes:
    betas: float64 [T + 1]; betas[t] is beta_t, betas[0] = 0.
  """

  betas: np.ndarray

  def __post_init__(self):
    if self.betas.dtype != np.float64 or self.betas.ndim != 1 or self.betas[0] != 0:
      raise ValueError("betas must be a float64 vector over t = 0..T with betas[0] = 0")
    if not ((self.betas[1:] > 0) & (self.betas[1:] < 1)).all():
      raise ValueError("every beta_t with t >= 1 must lie strictly between 0 and 1")

  @property
  def num_timesteps(self) -> int:
    """T."""
    return len(self.betas) - 1

  @functools.cached_property
  def alpha_bar(self) -> np.ndarray:
    """float64 [T + 1]: the product of (1 - beta_i) for i = 1..t; alpha_bar[0] = 1."""
    return np.cumprod(1.0 - self.betas)

  @functools.cached_property
  def sqrt_alpha_bar(self) -> np.ndarray:
    """float64 [T + 1]: the share of x_0 in x_t."""
    return np.sqrt(self.alpha_bar)

  @functools.cached_property
  def sqrt_one_minus_alpha_bar(self) -> np.ndarray:
    """float64 [T + 1]: the standard deviation of the noise in x_t."""
    return np.sqrt(1.0 - self.alpha_bar)

  @functools.cached_property
  def snr(self) -> np.ndarray:
    """float64 [T + 1]: alpha_bar / (1 - alpha_bar), falling in t; infinite at t = 0."""
    with np.errstate(divide="ignore"):
      return self.alpha_bar / (1.0 - self.alpha_bar)

  @functools.cached_property
  def log_snr(self) -> np.ndarray:
    """float64 [T + 1]: twice DPM-Solver's lambda; the negative of VDM's gamma."""
    return np.log(self.snr)

  def level(self, t: jax.Array | np.ndarray | int) -> Level:
    """The level of timestep t; the one place that says what a network gets for t: t - 1, as published weights are.

    >>> make_schedule("linear", 1000).level(1)
    Level(alpha=Array(0.99995, dtype=float32), sigma=Array(0.01, dtype=float32), time=0)

    Args:
      t: integers in 0..T of any shape; at t = 0 x is data, and no network is defined.

    Returns:
      float32 arrays of JAX; for a NumPy t float64 arrays of NumPy, for tables.
    """
    alpha, sigma = self.sqrt_alpha_bar, self.sqrt_one_minus_alpha_bar
    if isinstance(t, np.ndarray):
      return Level(alpha[t], sigma[t], t - 1)
    return Level(at(alpha, t), at(sigma, t), t - 1)


class Posterior(typing.NamedTuple):
  """q(x_s | x_t, x_0) = N(c_x0 x_0 + c_xt x_t, variance I), one entry for each pair (s, t).

  With s = t - 1 (Ho et al. eq. 7): c_x0 = sqrt(alpha_bar_s) beta_t / (1 - alpha_bar_t),
  c_xt = sqrt(alpha_t) (1 - alpha_bar_s) / (1 - alpha_bar_t), variance = beta_t (1 - alpha_bar_s) / (1 - alpha_bar_t).
  """

  c_x0: np.ndarray
  c_xt: np.ndarray
  variance: np.ndarray


def step_beta(schedule: NoiseSchedule, s: np.ndarray, t: np.ndarray) -> np.ndarray:
  """The variance 1 - alpha_bar_t / alpha_bar_s of q(x_t | x_s), s < t; beta_t where s = t - 1. float64, shape of t."""
  return 1.0 - schedule.alpha_bar[t] / schedule.alpha_bar[s]


def posterior(schedule: NoiseSchedule, s: np.ndarray, t: np.ndarray) -> Posterior:
  """The posterior of x_s given x_t and x_0 for integer arrays 0 <= s < t <= T (Ho et al. eqs. 6 and 7 at s = t - 1).

  At s = 0 the variance is exactly 0 and the mean exactly x_0: the last step needs no mask.

  >>> posterior(make_schedule("linear", 1000), np.asarray([0]), np.asarray([1]))
  Posterior(c_x0=array([1.]), c_xt=array([0.]), variance=array([0.]))
  """
  beta = step_beta(schedule, s, t)
  one_minus_t = 1.0 - schedule.alpha_bar[t]
  one_minus_s = 1.0 - schedule.alpha_bar[s]
  return Posterior(
    c_x0=np.where(np.equal(s, 0), 1.0, schedule.sqrt_alpha_bar[s] * beta / one_minus_t),
    c_xt=np.sqrt(1.0 - beta) * one_minus_s / one_minus_t,
    variance=beta * one_minus_s / one_minus_t,
  )


def reverse_variance(schedule: NoiseSchedule, kind: str, s: np.ndarray, t: np.ndarray) -> np.ndarray:
  """The variance of p(x_s | x_t), one of the two fixed choices of Ho et al. 2020, section 3.2. float64, shape of t.

  Args:
    schedule: the noise schedule.
    kind: 'fixed_small', the posterior variance, or 'fixed_large', beta_t.
    s: integers, 0 <= s < t.
    t: integers, 1..T.

  Returns:
    The variance. At s = 0, where sampling adds no noise but the decoder's likelihood needs a width, both are the
    posterior variance of the step before (t = 2 of the full chain, T >= 2), as in the authors' code
    (diffusion_utils_2.py: index 0 <- index 1).
  """
  first = posterior(
    schedule, np.asarray(min(1, schedule.num_timesteps - 1)), np.asarray(min(2, schedule.num_timesteps))
  )
  table = {"fixed_small": posterior(schedule, s, t).variance, "fixed_large": step_beta(schedule, s, t)}
  return np.where(np.equal(s, 0), first.variance, table[kind])


def cast(tables: Tables) -> Tables:
  """Host tables as arrays of JAX: float64 becomes float32, here and nowhere else, and integers int32."""

  def of_type(table: np.ndarray) -> jax.Array:
    return jnp.asarray(table, jnp.int32 if np.issubdtype(table.dtype, np.integer) else jnp.float32)

  return jax.tree.map(of_type, tables)


def at(table: np.ndarray, t: jax.Array | int) -> jax.Array:
  """Reads a float64 host table at timestep t on the device: float32, the shape of t."""
  return cast(table)[t]


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
  """beta_t linear in t from beta_1 to beta_T (Ho et al. 2020, section 4). float64 [T]."""
  return np.linspace(beta_start, beta_end, num_timesteps, dtype=np.float64)


def sqrt_linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
  """sqrt(beta_t) linear in t: "quad" of Ho et al.'s code, "linear" of Latent Diffusion's. float64 [T]."""
  return np.linspace(np.sqrt(beta_start), np.sqrt(beta_end), num_timesteps, dtype=np.float64) ** 2


def sigmoid_betas(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
  """beta_t on a logistic curve over [-6, 6] from beta_start to beta_end (diffusers' "sigmoid"). float64 [T]."""
  curve = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, num_timesteps, dtype=np.float64)))
  return beta_start + (beta_end - beta_start) * curve


def cosine_betas(num_timesteps: int) -> np.ndarray:
  """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + 0.008) / 1.008 pi/2), beta_t <= 0.999. float64 [T].

  Nichol and Dhariwal 2021, eq. 17.
  """
  u = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
  f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
  return np.minimum(1.0 - f[1:] / f[:-1], 0.999)


def make_schedule(name: str, num_timesteps: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
  """The schedule of that name; the one place where names become schedules.

  >>> make_schedule("linear", 1000).alpha_bar[[0, 1, 1000]].round(6).tolist()
  [1.0, 0.9999, 4e-05]

  Args:
    name: 'linear', 'quadratic' or 'scaled_linear' (one formula, two names), 'sigmoid', 'cosine'.
    num_timesteps: T >= 1.
    beta_start: beta_1; not used by 'cosine'.
    beta_end: beta_T; not used by 'cosine'.

  Raises:
    ValueError: for an unknown name or betas outside (0, 1).
  """
  match name:
    case "linear":
      betas = linear_betas(num_timesteps, beta_start, beta_end)
    case "quadratic" | "scaled_linear":
      betas = sqrt_linear_betas(num_timesteps, beta_start, beta_end)
    case "sigmoid":
      betas = sigmoid_betas(num_timesteps, beta_start, beta_end)
    case "cosine":
      betas = cosine_betas(num_timesteps)
    case _:
      raise ValueError(f"unknown beta schedule {name!r}")
  return NoiseSchedule(betas=np.concatenate([[0.0], betas]))


# The most of an image that may be left in x_T, as sqrt(alpha_bar_T): one of its 256 grey levels. Drawing begins with
# N(0, I), as if nothing were left. The paper's linear betas leave 0.8 of a level (L_T = 0.00002 bits/dim).
SEEN_SIGNAL = 2.0 / 255.0
# The same of latents, whose deviation is 1 and which have no grey levels. The schedules of Rombach et al. 2022 leave
# 0.012 and 0.026; that of Stable Diffusion leaves 0.068, which is seen (Lin et al. 2024, "Common Diffusion Noise
# Schedules and Sample Steps are Flawed").
SEEN_SIGNAL_OF_LATENTS = 0.05
_LARGEST_BETA = 0.99  # that is proposed: 1 would be a step after which nothing is left


def reaches_noise(schedule: NoiseSchedule, seen: float = SEEN_SIGNAL) -> bool:
  """True if x_T holds at most `seen` of x_0, as sqrt(alpha_bar_T), so that N(0, I) may replace it."""
  return bool(schedule.sqrt_alpha_bar[-1] <= seen)


def largest_prior_kl(schedule: NoiseSchedule) -> float:
  """The largest L_T (`forward.prior_kl`) of any image in [-1, 1], in bits per dimension: -log2(1 - alpha_bar_T) / 2.

  It is also the mean L_T of latents of deviation 1.
  """
  return float(-np.log1p(-schedule.alpha_bar[-1]) / (2 * np.log(2.0)))


def betas_that_reach_noise(
  name: str, num_timesteps: int, beta_start: float, beta_end: float, seen: float = SEEN_SIGNAL
) -> tuple[float, float] | None:
  """The smallest multiple of beta_1 and beta_T with which a schedule `reaches_noise`, both rounded up to three digits.

  With the linear schedule and T < 1000 that is somewhat less than the 1000 / T of Nichol and Dhariwal 2021's code.

  Args:
    name: of a schedule that has these two parameters, see `make_schedule`.
    num_timesteps: T.
    beta_start: beta_1.
    beta_end: beta_T.
    seen: of `reaches_noise`.

  Returns:
    beta_1 and beta_T; None if with this few timesteps there is no such multiple below `_LARGEST_BETA`.
  """

  def multiple(factor: float) -> tuple[float, float]:
    return _rounded_up(factor * beta_start), _rounded_up(factor * beta_end)

  def enough(factor: float) -> bool:
    start, end = multiple(factor)
    return reaches_noise(make_schedule(name, num_timesteps, beta_start=start, beta_end=end), seen)

  low, high = 1.0, _LARGEST_BETA / beta_end
  if high < low or not enough(high):
    return None
  for _ in range(30):
    middle = (low + high) / 2
    low, high = (low, middle) if enough(middle) else (middle, high)
  return multiple(high)


def _rounded_up(value: float) -> float:
  """To three significant digits."""
  unit = 10.0 ** (np.floor(np.log10(value)) - 2)
  return float(f"{np.ceil(value / unit - 1e-9) * unit:.3g}")
