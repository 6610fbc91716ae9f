"""Guidance: of two denoise functions one, and the gradient of a classifier added to one.

Guidance by a second prediction, D = D_guide + g (D_main - D_guide), is linear, so that it is the same whether x_0, eps,
v or the score is extrapolated. What wraps a denoise function does so in this order: guidance, threshold, classifier.

>>> main, guide = (lambda xt, level, x0=x0: from_x0(jnp.full_like(xt, x0), xt, level) for x0 in (0.5, 0.25))
>>> level = Level(alpha=0.8, sigma=0.6, time=0)
>>> guided(main, pair_of(main, guide), 2.0)(jnp.zeros((1, 1)), level).x0.tolist()
[[0.75]]
"""

from __future__ import annotations

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.denoiser import DenoiseFn, PairFn, Prediction, for_each, from_x0
from ddpm_jax.diffusion.samplers import Shift
from ddpm_jax.diffusion.schedules import Level, cast

LogProbabilitiesFn = Callable[[jax.Array, Level], jax.Array]  # (x_t [B, ...], its level) -> log p(y | x_t) [B, K]
GradientFn = Callable[[jax.Array, Level], jax.Array]  # likewise -> the gradient by x_t of log p(y | x_t), [B, ...]

# By so much a noise level is taken lower where it is compared: rounded to float32 it may lie above or below the end of
# an interval that is the same in float64. Neighbouring levels of a schedule are hundreds of times as far apart.
_ROUNDING = 1e-6


def pair_of(main: DenoiseFn, guide: DenoiseFn) -> PairFn:
  """The pair of two denoise functions, as of two networks (autoguidance, Karras et al. 2024)."""
  return lambda xt, level: (main(xt, level), guide(xt, level))


def within(level: Level, interval: tuple[float, float]) -> typing.Any:
  """Whether a noise level is in (lo, hi] in sigma / alpha: bool, the shape of its arrays, of NumPy or JAX.

  An end that is the noise level of a timestep is that, whether it was computed in float64 or in float32.

  >>> within(Level(alpha=np.float32(0.8), sigma=np.float32(0.6), time=0), (0.75, 2.0)).tolist()
  False
  """
  noise = level.sigma / level.alpha * (1.0 - _ROUNDING)
  return (noise > interval[0]) & (noise <= interval[1])


def guided(
  main: DenoiseFn, pair: PairFn, scale: float | jax.Array, interval: tuple[float, float] | None = None
) -> DenoiseFn:
  """The denoise function D = D_guide + g (D_main - D_guide).

  With an unconditional guide this is classifier-free guidance (Ho and Salimans 2022, eq. 6, whose w is g - 1), with a
  worse model of the same condition autoguidance (Karras et al. 2024).

  Args:
    main: the model that is guided.
    pair: the same model and its guide.
    scale: g, a scalar; 1 is `main` alone, 0 the guide. Where it is 1 the pair is not evaluated: if it is a number, not
      even traced; if it is an array, left out when the program runs, so that its derivative there is 0.
    interval: (lo, hi] in sigma / alpha, the noise level of Karras et al. 2022, in which to guide (Kynkaanniemi et al.
      2024), see `within`; outside of it `main` is evaluated alone, unless the level is given for each example: then the
      pair is evaluated for all. None: everywhere.
  """
  if not isinstance(scale, jax.Array) and scale == 1.0:
    return main

  def both(xt: jax.Array, level: Level) -> tuple[Prediction, Prediction]:
    """The main prediction and the guided one."""
    of_main, of_guide = pair(xt, level)
    return of_main, from_x0(of_guide.x0 + scale * (of_main.x0 - of_guide.x0), xt, level)

  def denoise(xt: jax.Array, level: Level) -> Prediction:
    if interval is None and not isinstance(scale, jax.Array):
      return both(xt, level)[1]
    guide = jnp.asarray(scale != 1.0)
    if interval is not None:
      guide = guide & within(level, interval)
    if guide.ndim == 0:
      return jax.lax.cond(guide, lambda xt, level: both(xt, level)[1], main, xt, level)
    select = jax.vmap(jnp.where)
    return jax.tree.map(lambda of_main, result: select(guide, result, of_main), *both(xt, level))

  return denoise


def classifier_gradient(log_probabilities: LogProbabilitiesFn, labels: jax.Array) -> GradientFn:
  """The gradient of log p(y | x_t) by x_t, of all examples in one backward pass: of the sum of the selected entries.

  Args:
    log_probabilities: of a classifier of noisy images, each row of its own example alone.
    labels: y, int32 [B].
  """

  def selected(xt: jax.Array, level: Level) -> jax.Array:
    return jnp.sum(jnp.take_along_axis(log_probabilities(xt, level), labels[:, None], axis=1))

  return jax.grad(selected)


def classifier_guided(denoise: DenoiseFn, gradient: GradientFn, scale: float | jax.Array) -> DenoiseFn:
  """The denoise function of the score plus s times the gradient of a classifier (Dhariwal and Nichol 2021, Alg. 2).

  eps_hat - sigma s grad log p(y | x_t), in terms of x_0: x0_hat + sigma^2 / alpha s grad. Nothing is clipped
  afterwards, as in the authors' code (condition_score), which puts s, missing in Algorithm 2, before the gradient. For
  all samplers but the ancestral one, see `mean_shift`.

  Args:
    denoise: with what keeps x0 in range.
    gradient: (x_t, level) -> that of log p(y | x_t) by x_t.
    scale: s, a scalar.
  """

  def moved(xt: jax.Array, level: Level) -> Prediction:
    def of_one(x0: jax.Array, grad: jax.Array, level: Level) -> jax.Array:
      return x0 + scale * level.sigma**2 / level.alpha * grad

    x0 = jax.vmap(of_one)(denoise(xt, level).x0, gradient(xt, level), for_each(level, xt))
    return from_x0(x0, xt, level)

  return moved


def mean_shift(gradient: GradientFn, variances: np.ndarray, scale: float | jax.Array) -> Shift:
  """The `shift` of `samplers.Trajectory` for classifier guidance of ancestral sampling: variance s grad log p(y | x_t).

  Dhariwal and Nichol 2021, Algorithm 1, with the gradient at x_t, not at the mean, as in the authors' code
  (condition_mean), and also in the last row, which adds no noise.

  Args:
    gradient: (x_t, level) -> that of log p(y | x_t) by x_t.
    variances: of each row of the table, float64 [N], see `samplers.variances`.
    scale: s, a scalar.
  """
  column = cast(variances)
  return lambda xt, level, number: scale * column[number] * gradient(xt, level)
