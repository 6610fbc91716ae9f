"""Samplers as coefficient tables, and the one loop that runs any of them.

A row of a table evaluates the denoiser once, at x_t, and moves from t to s:

  x_s = c_xt x_t + c_x0 x0_hat(x_t, t) + c_prev x0_hat_prev + sigma z,   z ~ N(0, I),

with x0_hat_prev the estimate of the row before.  A sampler is a table of these numbers, computed in float64 on the
host; what differs between samplers, also between those of first and of second order, is the table alone.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.denoiser import DenoiseFn
from ddpm_jax.diffusion.schedules import Level, NoiseSchedule, cast, posterior, reverse_variance

# Center and width in log SNR of the time grid 'logistic', found by measuring (docs/results/time_grids.md).
# The correction of Heun's method grows with the ratio of sbar at the two ends of a step, so it needs shorter steps at
# high noise.
_CENTER_AND_WIDTH, _OF_HEUN = (0.0, 2.5), (-3.0, 3.0)
_LEAST_LOG_SNR = -10.2  # where it begins

Shift = Callable[[jax.Array, Level, jax.Array], jax.Array]  # (x_t, its level, number of the row) -> the shape of x_t


class SamplerTable(typing.NamedTuple):
  """One row for each network evaluation, in order. `t` and `s` are int [N], the others float64 [N]."""

  t: np.ndarray  # where the denoiser is evaluated, 1..T
  s: np.ndarray  # where the state is afterwards, 0..T
  level: Level  # of t
  c_xt: np.ndarray
  c_x0: np.ndarray
  c_prev: np.ndarray
  sigma: np.ndarray


def time_grid(
  schedule: NoiseSchedule, num_steps: int, kind: str = "trailing", first: int = 0, *, sampler: str = "ddim"
) -> np.ndarray:
  """num_steps + 1 whole timesteps from T, or from `first`, down to 0: int64 [num_steps + 1], strictly falling.

  'trailing' T, T - T/n, ..., T/n, 0 (Lin et al. 2024, section 3.3).
  'uniform' even from T to 1, then 0: Song et al. 2021's "linear", but beginning at T, where x is N(0, I).
  'quadratic' even in sqrt(t) from T to 1, then 0: Song et al.'s choice for CIFAR-10, again beginning at T.
  'logsnr' even in log SNR from T to 1, then 0: the choice of Lu et al. 2022 for DPM-Solver, but beginning at T.
  'logistic' even in the logistic function of (center - log SNR) / width, from its value at T to 0, that at t = 0. Half
    of the timesteps have a log SNR within 1.1 width of the center: 0 +- 2.7, or -3 +- 3.3 for the sampler 'heun'. (With
    0 and a width of 2 it is even in sigma / (1 + sigma), the time of a rectified flow, Liu et al. 2023.) Where log SNR
    falls below -10.2, as with the cosine schedule, it begins there, at t = 996 of 1,000: 0.6% of the image is left in
    x_t, and below that steps become so long that solvers of second order fail. The code of Lu et al. 2022 begins at
    0.9946 T there, that of diffusers where this does with `lambda_min_clipped=-5.1`.

  Raises:
    ValueError: unless 1 <= num_steps <= T, or `first`; or for an unknown kind.

  >>> from ddpm_jax.diffusion.schedules import make_schedule
  >>> time_grid(make_schedule("linear", 1000), 4).tolist()
  [1000, 750, 500, 250, 0]
  """
  last = first or schedule.num_timesteps
  if not 1 <= num_steps <= last:
    raise ValueError(f"num_steps: {num_steps} is not in 1..{last}")
  match kind:
    case "trailing":
      times = np.linspace(last, 0, num_steps + 1)[:-1]
    case "uniform":
      times = np.linspace(last, 1, num_steps)
    case "quadratic":
      times = np.linspace(np.sqrt(last), 1, num_steps) ** 2
    case "logsnr":
      log_snr = schedule.log_snr[1 : last + 1]  # falls in t
      times = np.interp(np.linspace(log_snr[-1], log_snr[0], num_steps), log_snr[::-1], np.arange(last, 0, -1))
    case "logistic":
      center, width = _OF_HEUN if sampler == "heun" else _CENTER_AND_WIDTH
      even = 1.0 / (1.0 + (schedule.snr[: last + 1] / np.exp(center)) ** (1.0 / width))  # rises in t from 0
      begin = max(1, int(np.sum(schedule.log_snr[: last + 1] >= _LEAST_LOG_SNR)) - 1)
      times = np.interp(np.linspace(even[begin], 0, num_steps + 1)[:-1], even, np.arange(last + 1))
    case _:
      raise ValueError(f"unknown time grid {kind!r}")
  # Where rounding makes two alike, the later ones are pushed down, and up again where there is no room left below.
  falling = np.arange(num_steps, 0, -1)
  whole = np.minimum.accumulate(np.round(times).astype(np.int64) - falling) + falling
  return np.append(np.maximum(whole, falling), 0)


def ancestral_table(schedule: NoiseSchedule, t: np.ndarray, s: np.ndarray, variance: str) -> SamplerTable:
  """Ancestral sampling, Algorithm 2 of Ho et al. 2020, for steps t -> s < t of any length.

  The mean is that of the posterior with x0_hat for x_0 (eq. 7), which is line 4's
  (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_t); the variance is `schedules.reverse_variance`; a
  step to s = 0 adds no noise (line 3).
  """
  q = posterior(schedule, s, t)
  sigma = np.sqrt(np.where(np.equal(s, 0), 0.0, reverse_variance(schedule, variance, s, t)))
  return SamplerTable(t, s, schedule.level(t), q.c_xt, q.c_x0, np.zeros(len(t)), sigma)


def ddim_table(schedule: NoiseSchedule, t: np.ndarray, s: np.ndarray, eta: float) -> SamplerTable:
  """DDIM, Song et al. 2021, eqs. 12 and 16, for steps t -> s < t of any length; with eta = 0 also for s > t.

  eta = 0 is deterministic; eta = 1 on the full grid is ancestral sampling with the posterior variance.
  """
  sigma = eta * np.sqrt(posterior(schedule, s, t).variance) if eta else np.zeros(len(t))
  # x_s = sqrt(alpha_bar_s) x0_hat + direction * eps_hat + sigma z, with eps_hat written in terms of x_t and x0_hat.
  direction = np.sqrt(np.maximum(1.0 - schedule.alpha_bar[s] - sigma**2, 0.0))
  c_xt = direction / schedule.sqrt_one_minus_alpha_bar[t]
  c_x0 = schedule.sqrt_alpha_bar[s] - c_xt * schedule.sqrt_alpha_bar[t]
  return SamplerTable(t, s, schedule.level(t), c_xt, c_x0, np.zeros(len(t)), sigma)


def encoding_table(schedule: NoiseSchedule, grid: np.ndarray) -> SamplerTable:
  """Deterministic DDIM backwards (Song et al. 2021, section 4.3): from an image x_0 up a falling `grid` to its noise.

  The network is not defined at t = 0: the first row evaluates it at x_0 with t = 1 and takes its eps_hat.
  """
  rising = np.asarray(grid)[::-1]
  t, s = rising[:-1], rising[1:]
  table = ddim_table(schedule, np.maximum(t, 1), s, eta=0.0)
  a, b = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar
  # x_s = a_s x_0 + b_s eps_hat with eps_hat = (x_0 - a_1 x0_hat) / b_1.
  table.c_xt[0], table.c_x0[0] = a[s[0]] + b[s[0]] / b[1], -b[s[0]] * a[1] / b[1]
  return table


def dpmpp_table(schedule: NoiseSchedule, t: np.ndarray, s: np.ndarray, eta: float = 0.0) -> SamplerTable:
  """DPM-Solver++(2M), Lu et al. 2022, Algorithm 2, and with eta = 1 SDE-DPM-Solver++(2M): multistep, data prediction.

  With lambda half the log SNR, h the step in it, r = h_before / h and D = (1 + 1/(2r)) x0_hat - 1/(2r) x0_hat_prev:
  x_s = (b_s / b_t) e^(-eta h) x_t + a_s (1 - e^(-(1 + eta) h)) D + b_s sqrt(1 - e^(-2 eta h)) z.
  Of second order for eta = 0. In the first step, and in that to s = 0, where h is infinite, D is x0_hat alone; for
  eta = 0 these are DDIM's.
  """
  a, b = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar
  shrink = a[t] * b[s] / (b[t] * a[s])  # e^-h
  with np.errstate(invalid="ignore", divide="ignore"):
    h = (schedule.log_snr[s] - schedule.log_snr[t]) / 2
    half_ratio = np.append(0.0, h[1:] / h[:-1]) / 2  # 1 / (2r)
  half_ratio = np.where(np.equal(s, 0), 0.0, half_ratio)
  weight = a[s] * (1 - shrink ** (1 + eta))
  sigma = b[s] * np.sqrt(1 - shrink ** (2 * eta))
  return SamplerTable(
    t, s, schedule.level(t), b[s] / b[t] * shrink**eta, weight * (1 + half_ratio), -weight * half_ratio, sigma
  )


def heun_table(schedule: NoiseSchedule, t: np.ndarray, s: np.ndarray) -> SamplerTable:
  """Heun's method on the probability-flow ODE, Karras et al. 2022, Algorithm 1: two evaluations a step, second order.

  In xbar = x / sqrt(alpha_bar) and sbar = sqrt((1 - alpha_bar) / alpha_bar) the ODE is d xbar / d sbar = eps_hat.
  First Euler's step from t to s, which is DDIM's, with eps_t; then, with eps_s at its end, half the step's length
  times (eps_s - eps_t) is added, which is (x0_hat_t - x0_hat_s) / sbar_s, as xbar_s - x0_hat_t = sbar_s eps_t. The
  step to s = 0, where the network is not defined, is Euler's alone.
  """
  predict = ddim_table(schedule, t, s, eta=0.0)
  inner = s[:-1]  # all but 0
  sbar = np.sqrt(1.0 / schedule.snr[inner])
  half = schedule.sqrt_alpha_bar[inner] * (sbar - np.sqrt(1.0 / schedule.snr[t[:-1]])) / (2 * sbar)
  correct = SamplerTable(inner, inner, schedule.level(inner), np.ones(len(inner)), -half, half, np.zeros(len(inner)))

  def alternate(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    both = np.empty(len(mine) + len(theirs), mine.dtype)
    both[0::2], both[1::2] = mine, theirs
    return both

  return jax.tree.map(alternate, predict, correct)


def steps_table(
  schedule: NoiseSchedule, name: str, t: np.ndarray, s: np.ndarray, *, eta: float, variance: str
) -> SamplerTable:
  """The steps t -> s of the sampler of that name; the one place where names become samplers.

  Args:
    schedule: the noise schedule.
    name: 'ddpm' (uses `variance`), 'ddim' or 'dpmpp' (use `eta`), or 'heun'.
    t: integers, where the steps begin.
    s: integers, where they end.
    eta: noise of DDIM and DPM-Solver++, 0..1.
    variance: 'fixed_small' or 'fixed_large'.
  """
  match name:
    case "ddpm":
      return ancestral_table(schedule, t, s, variance)
    case "ddim":
      return ddim_table(schedule, t, s, eta)
    case "dpmpp":
      return dpmpp_table(schedule, t, s, eta)
    case "heun":
      return heun_table(schedule, t, s)
    case _:
      raise ValueError(f"unknown sampler {name!r}")


def variances(schedule: NoiseSchedule, table: SamplerTable) -> np.ndarray:
  """The variance of p(x_s | x_t) in each row of an ancestral table, float64 [N]: sigma^2, where there is noise.

  In the step to s = 0, which adds none, the posterior variance of the step before it on the same grid, as in the
  authors' code, which makes of a grid a schedule of its own. Before the first row of all is pure noise, alpha_bar = 0.
  """
  alpha_bar = schedule.alpha_bar[table.t]
  before = np.append(0.0, alpha_bar[:-1])
  last = (1.0 - before / alpha_bar) * (1.0 - alpha_bar) / (1.0 - before)
  return np.where(np.equal(table.s, 0), last, table.sigma**2)


def grid_name(sampler: str, grid: str) -> str:
  """The time grid that 'auto' stands for, else `grid` itself."""
  if grid != "auto":
    return grid
  return "trailing" if sampler == "ddpm" else "logistic"


def sampler_grid(
  schedule: NoiseSchedule, name: str, *, num_steps: int = 0, grid: str = "auto", first: int = 0
) -> np.ndarray:
  """The falling timesteps of a sampler of that name: `time_grid` for the arguments of `make_sampler`."""
  first = first or schedule.num_timesteps
  evaluations = min(num_steps or first, first)
  steps = (evaluations + 1) // 2 if name == "heun" else evaluations
  return time_grid(schedule, steps, grid_name(name, grid), first, sampler=name)


def make_sampler(
  schedule: NoiseSchedule,
  name: str,
  *,
  num_steps: int = 0,
  grid: str = "auto",
  eta: float = 0.0,
  variance: str = "fixed_large",
  first: int = 0,
) -> SamplerTable:
  """The table of the sampler of that name, see `steps_table`.

  Args:
    schedule: the noise schedule.
    name: 'ddpm', 'ddim', 'dpmpp' or 'heun'.
    num_steps: network evaluations; 0 for T, and at most `first`. Heun's method makes one less if the number is even.
    grid: where they are, see `time_grid`; 'auto' is 'trailing' for 'ddpm', 'logistic' for the others.
    eta: noise of DDIM and DPM-Solver++, 0..1.
    variance: 'fixed_small' or 'fixed_large'.
    first: the timestep of the state that the sampler starts from; 0 for T. Limits num_steps.
  """
  times = sampler_grid(schedule, name, num_steps=num_steps, grid=grid, first=first)
  return steps_table(schedule, name, times[:-1], times[1:], eta=eta, variance=variance)


def numbered_noise(keys: jax.Array, shape: tuple[int, ...]) -> Callable[[jax.Array | int], jax.Array]:
  """number -> standard normal float32 [B, *shape]: the noise of that number of each of the B keys."""
  return lambda number: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape))(keys)


class State(typing.NamedTuple):
  """The state of B examples between two rows of a table.

  Attributes:
    xt: float32 [B, ...].
    x0_hat: of the row before, of the same shape.
    kept: float32 [B, K + 1, ...], the estimates of K rows that are kept, and a slot for all others; [B, 0, ...] if
      none is.
  """

  xt: jax.Array
  x0_hat: jax.Array
  kept: jax.Array


@dataclasses.dataclass(frozen=True)
class Trajectory:
  """The way of B examples down a table, one for each key: `begin`, then `advance` over all rows, then `end`.

  How the rows are divided among calls of `advance` does not change what comes out.

  Attributes:
    table: which sampler.
    denoise: of which x0 is used; it is given the level of a row, scalars, for all B examples.
    keys: B random keys; image i depends on keys[i] alone, not on B. Number 0 of `numbered_noise` is the prior's draw,
      i + 1 that of row i.
    shape: of one example.
    start: the state before the first row, float32 [B, *shape]; None: the prior's draw.
    keep: rows whose x0_hat is returned too.
    after_row: (x_s, number of the row) -> the state to go on with, for what steers a draw.
    shift: (x_t, its level, number of the row) -> what is added to the mean of x_s, see `guidance.mean_shift`.
  """

  table: SamplerTable
  denoise: DenoiseFn
  keys: jax.Array
  shape: tuple[int, ...]
  start: jax.Array | None = None
  keep: Sequence[int] = ()
  after_row: Callable[[jax.Array, jax.Array], jax.Array] | None = None
  shift: Shift | None = None

  def begin(self) -> State:
    """The state before the first row."""
    start = numbered_noise(self.keys, self.shape)(0) if self.start is None else self.start
    slots = len(self.keep) + 1 if len(self.keep) else 0
    return State(start, jnp.zeros_like(start), jnp.zeros((self.keys.shape[0], slots, *self.shape), jnp.float32))

  def advance(self, state: State, first: int | jax.Array, last: int | jax.Array) -> State:
    """The state after the rows `first` to `last` - 1, from that before `first`: whole numbers, or int32 scalars."""
    table, noise = self.table, numbered_noise(self.keys, self.shape)
    noisy = bool(table.sigma.any())
    # Kept estimates go into a slot of their own, all others into one more that is thrown away.
    slot = np.full(len(table.t), len(self.keep))
    slot[list(self.keep)] = np.arange(len(self.keep))
    columns = cast((table, slot))

    def step(number: jax.Array, state: State) -> State:
      row, where = jax.tree.map(lambda column: jax.lax.dynamic_index_in_dim(column, number, keepdims=False), columns)
      x0_hat = self.denoise(state.xt, row.level).x0
      xs = row.c_xt * state.xt + row.c_x0 * x0_hat + row.c_prev * state.x0_hat
      xs = xs + self.shift(state.xt, row.level, number) if self.shift else xs
      xs = xs + row.sigma * noise(number + 1) if noisy else xs
      xs = self.after_row(xs, number) if self.after_row else xs
      return State(xs, x0_hat, state.kept.at[:, where].set(x0_hat) if len(self.keep) else state.kept)

    return jax.lax.fori_loop(first, last, step, state)  # a scan where both are known, and then it has a gradient

  def end(self, state: State) -> tuple[jax.Array, jax.Array]:
    """x_0, float32 [B, *shape], and x0_hat at the kept rows, float32 [B, len(keep), *shape]."""
    return state.xt, state.kept[:, : len(self.keep)]


def sample(
  table: SamplerTable,
  denoise: DenoiseFn,
  keys: jax.Array,
  shape: tuple[int, ...],
  *,
  start: jax.Array | None = None,
  keep: Sequence[int] = (),
  after_row: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
  shift: Shift | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws one example for each key: `Trajectory`, whose arguments these are, from its begin to its end.

  Returns:
    float32 [B, *shape], and x0_hat at the kept rows, float32 [B, len(keep), *shape].
  """
  whole = Trajectory(table, denoise, keys, shape, start, keep, after_row, shift)
  return whole.end(whole.advance(whole.begin(), 0, len(table.t)))
