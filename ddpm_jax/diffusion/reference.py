"""The papers' algorithms as they are printed, with their own symbols: plain loops in float64, slow.

The fast samplers are tested against them; nothing else uses them. A model is the function that the paper names,
eps_theta(x, t), x_theta(x, t) or D(x; sigma), and x a number, or an array of which each entry is treated alike. The
noise z is an argument, so that all is deterministic.

>>> alpha_bar = [1.0, 0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7]
>>> def eps_theta(x, t):  # the perfect model of data that are the one number 0.5
...   return (x - math.sqrt(alpha_bar[t]) * 0.5) / math.sqrt(1 - alpha_bar[t])
>>> round(ddim(eps_theta, alpha_bar, [3, 1, 0], x_T=1.7), 12)
0.5
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

X = Any  # a float, or a float64 array
Model = Callable[[X, int], X]  # (x, t)
Denoiser = Callable[[X, float], X]  # (x, sigma)


def ddpm_loss(eps_theta: Model, beta: Sequence[float], x_0: X, t: int, eps: X) -> X:
  """Ho et al. 2020, Algorithm 1, line 5: that of which training takes a gradient step.

  Args:
    eps_theta: the model.
    beta: beta_t for t = 0..T; beta[0] is not used.
    x_0: line 2.
    t: line 3, in 1..T.
    eps: line 4.
  """
  alpha_bar_t = math.prod(1 - beta[s] for s in range(1, t + 1))
  return (eps - eps_theta(math.sqrt(alpha_bar_t) * x_0 + math.sqrt(1 - alpha_bar_t) * eps, t)) ** 2


def ddpm_sample(eps_theta: Model, beta: Sequence[float], x_T: X, z: Sequence[X], variance: str = "fixed_large") -> X:
  """Ho et al. 2020, Algorithm 2, with one of the two variances of section 3.2.

  Args:
    eps_theta: the model.
    beta: beta_t for t = 0..T; beta[0] is not used.
    x_T: line 1.
    z: z_t for t = 0..T, line 3; z[0] and z[1] are not used.
    variance: sigma_t^2: 'fixed_large' is beta_t, 'fixed_small' the posterior's, eq. 7.

  Returns:
    x_0.
  """
  x = x_T
  for t in range(len(beta) - 1, 0, -1):
    alpha_t = 1 - beta[t]
    alpha_bar_t = math.prod(1 - beta[s] for s in range(1, t + 1))
    alpha_bar_before = math.prod(1 - beta[s] for s in range(1, t))
    large, small = beta[t], (1 - alpha_bar_before) / (1 - alpha_bar_t) * beta[t]
    sigma_t = math.sqrt({"fixed_large": large, "fixed_small": small}[variance])
    z_t = z[t] if t > 1 else 0.0
    x = 1 / math.sqrt(alpha_t) * (x - (1 - alpha_t) / math.sqrt(1 - alpha_bar_t) * eps_theta(x, t)) + sigma_t * z_t
  return x


def ddim(
  eps_theta: Model,
  alpha_bar: Sequence[float],
  times: Sequence[int],
  x_T: X,
  z: Sequence[X] | None = None,
  eta: float = 0.0,
) -> X:
  """Song et al. 2021, eq. 12 with the sigma of eq. 16, along a subsequence of the timesteps (section 4.2).

  Args:
    eps_theta: the model.
    alpha_bar: the cumulative product, which the paper calls alpha, for t = 0..T; alpha_bar[0] = 1.
    times: falling, with 0 at the end.
    x_T: the state at times[0].
    z: the noise of each step; None for none, as with eta = 0.
    eta: 0 for DDIM, 1 for DDPM.

  Returns:
    The state at times[-1].
  """
  x = x_T
  for i, (t, s) in enumerate(itertools.pairwise(times)):
    sigma = eta * math.sqrt((1 - alpha_bar[s]) / (1 - alpha_bar[t])) * math.sqrt(1 - alpha_bar[t] / alpha_bar[s])
    eps = eps_theta(x, t)
    predicted_x0 = (x - math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(alpha_bar[t])
    direction = math.sqrt(1 - alpha_bar[s] - sigma**2) * eps
    x = math.sqrt(alpha_bar[s]) * predicted_x0 + direction + (sigma * z[i] if z is not None else 0.0)
  return x


def dpm_solver_pp_2m(x_theta: Model, alpha: Sequence[float], sigma: Sequence[float], times: Sequence[int], x_T: X) -> X:
  """DPM-Solver++(2M): Lu et al. 2022 (DPM-Solver++), Algorithm 2.

  A step to t = 0, where lambda is infinite, is of first order, with e^(-h) = 0.

  Args:
    x_theta: the data prediction model.
    alpha: for t = 0..T.
    sigma: for t = 0..T.
    times: t_0 > t_1 > ... > t_M, where the last may be 0.
    x_T: the state at t_0.

  Returns:
    The state at t_M.
  """
  lam = [math.log(alpha[t] / sigma[t]) if sigma[t] else math.inf for t in times]
  x, Q = x_T, [x_theta(x_T, times[0])]  # the paper's buffer
  for i in range(1, len(times)):
    before, now, h = times[i - 1], times[i], lam[i] - lam[i - 1]
    if i == 1 or math.isinf(h):
      D = Q[-1]
    else:
      r = (lam[i - 1] - lam[i - 2]) / h
      D = (1 + 1 / (2 * r)) * Q[-1] - 1 / (2 * r) * Q[-2]
    x = sigma[now] / sigma[before] * x - alpha[now] * (math.exp(-h) - 1) * D
    if i < len(times) - 1:
      Q.append(x_theta(x, now))
  return x


def heun(D: Denoiser, sigmas: Sequence[float], x_0: X) -> X:
  """Karras et al. 2022, Algorithm 1, with sigma(t) = t and s(t) = 1, which makes the ODE dx/dt = (x - D(x; t)) / t.

  Args:
    D: the denoiser.
    sigmas: t_0 > ... > t_N = 0.
    x_0: the state at t_0.

  Returns:
    x_N.
  """
  x, t, N = x_0, sigmas, len(sigmas) - 1
  for i in range(N):
    d = (x - D(x, t[i])) / t[i]
    x_next = x + (t[i + 1] - t[i]) * d
    if t[i + 1] != 0:
      d_next = (x_next - D(x_next, t[i + 1])) / t[i + 1]
      x_next = x + (t[i + 1] - t[i]) * (d / 2 + d_next / 2)
    x = x_next
  return x


def classifier_free(eps_theta_c: Model, eps_theta: Model, w: float) -> Model:
  """Ho and Salimans 2022, eq. 6: the eps that their Algorithm 2 samples with.

  Args:
    eps_theta_c: the model of the condition c.
    eps_theta: the unconditional model.
    w: the strength of guidance; 0 for none.
  """
  return lambda x, t: (1 + w) * eps_theta_c(x, t) - w * eps_theta(x, t)


def in_interval(D_c: Denoiser, D: Denoiser, w: float, sigma_lo: float, sigma_hi: float) -> Denoiser:
  """Kynkaanniemi et al. 2024: guidance of weight w for sigma in (sigma_lo, sigma_hi], of weight 1 outside.

  Args:
    D_c: the denoiser of the condition c.
    D: the unconditional denoiser.
    w: the weight; 1 for no guidance.
    sigma_lo: is outside.
    sigma_hi: is inside.
  """

  def D_w(x: X, sigma: float) -> X:
    weight = w if sigma_lo < sigma <= sigma_hi else 1.0
    return weight * D_c(x, sigma) + (1 - weight) * D(x, sigma)

  return D_w


def classifier_guided(mu: Model, Sigma: Sequence[float], gradient: Model, s: float, x_T: X, z: Sequence[X]) -> X:
  """Dhariwal and Nichol 2021, Algorithm 1: classifier guided diffusion sampling.

  Args:
    mu: mu_theta(x, t).
    Sigma: the variance, for t = 0..T; Sigma[0] is not used.
    gradient: of log p_phi(y | x_t) by x_t.
    s: the gradient scale.
    x_T: line 1.
    z: the standard normal numbers that make the sample of each line 4, for t = 0..T; z[0] is not used. The authors'
      code has z[1] = 0.

  Returns:
    x_0.
  """
  x = x_T
  for t in range(len(Sigma) - 1, 0, -1):
    x = mu(x, t) + s * Sigma[t] * gradient(x, t) + math.sqrt(Sigma[t]) * z[t]
  return x


def classifier_guided_ddim(eps_theta: Model, alpha_bar: Sequence[float], gradient: Model, s: float, x_T: X) -> X:
  """Dhariwal and Nichol 2021, Algorithm 2: classifier guided DDIM sampling.

  Args:
    eps_theta: the model.
    alpha_bar: for t = 0..T; alpha_bar[0] = 1.
    gradient: of log p_phi(y | x_t) by x_t.
    s: the gradient scale, which the algorithm has among its inputs and the authors' code before the gradient.
    x_T: line 1.

  Returns:
    x_0.
  """
  x = x_T
  for t in range(len(alpha_bar) - 1, 0, -1):
    eps = eps_theta(x, t) - math.sqrt(1 - alpha_bar[t]) * s * gradient(x, t)
    predicted_x0 = (x - math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(alpha_bar[t])
    x = math.sqrt(alpha_bar[t - 1]) * predicted_x0 + math.sqrt(1 - alpha_bar[t - 1]) * eps
  return x
