"""Samplers against data whose perfect denoiser is known in closed form."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion.forward import q_posterior
from ddpm_jax.diffusion.schedules import at, make_schedule

LINEAR = make_schedule("linear", 1000)
MEAN, STD = 0.3, 0.2  # of Gaussian data


def gaussian_x0(schedule):
  """E[x_0 | x_t] for x_0 ~ N(MEAN, STD^2): the perfect denoiser, by Bayes' rule."""

  def predict_x0(xt, t):
    alpha_bar = at(schedule.alpha_bar, t)[:, None]
    gain = jnp.sqrt(alpha_bar) * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
    return MEAN + gain * (xt - jnp.sqrt(alpha_bar) * MEAN)

  return predict_x0


def draw(table, schedule, number=4000, seed=0):
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(number))
  return np.asarray(jax.jit(lambda: samplers.sample(table, gaussian_x0(schedule), keys, (1,))[0])())


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("ddpm", dict(variance="fixed_small")),
    ("ddpm", dict(variance="fixed_large")),
    ("ddim", dict(eta=0.0)),
    ("ddim", dict(eta=0.5)),
    ("ddim", dict(eta=1.0)),
    ("ddim", dict(eta=0.0, num_steps=100)),
  ],
)
def test_samples_of_gaussian_data_have_its_mean_and_deviation(name, options):
  images = draw(samplers.make_sampler(LINEAR, name, **options), LINEAR)
  # Four standard errors of 4,000 draws, and the discretisation error of the shorter chain (first order in its step).
  assert abs(images.mean() - MEAN) < 4 * STD / np.sqrt(4000)
  assert abs(images.std() / STD - 1) < 4 / np.sqrt(2 * 4000) + (0.06 if "num_steps" in options else 0.005)


def test_ddim_with_eta_1_on_the_full_grid_is_the_ancestral_posterior():
  table = samplers.make_sampler(LINEAR, "ddim", eta=1.0)
  ancestral = samplers.make_sampler(LINEAR, "ddpm", variance="fixed_small")
  for mine, theirs in zip(table, ancestral, strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-8, atol=1e-12)
  x0, xt = jnp.asarray(0.3), jnp.asarray(-0.8)
  for row in (0, 499, 998, 999):
    mean, variance = q_posterior(LINEAR, x0, xt, int(table.t[row]))
    np.testing.assert_allclose(table.c_xt[row] * xt + table.c_x0[row] * x0, mean, rtol=1e-5)
    np.testing.assert_allclose(table.sigma[row] ** 2, variance, rtol=1e-5, atol=1e-12)


def test_ddpm_mean_is_the_formula_of_algorithm_2():
  """mu = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_t): line 4, in terms of eps."""
  table = samplers.make_sampler(LINEAR, "ddpm", variance="fixed_large")
  xt, eps_hat = -0.8, 0.6
  for row in (0, 300, 998):
    t = int(table.t[row])
    beta, ab = LINEAR.betas[t], LINEAR.alpha_bar[t]
    mu = (xt - beta / np.sqrt(1 - ab) * eps_hat) / np.sqrt(1 - beta)
    x0_hat = (xt - np.sqrt(1 - ab) * eps_hat) / np.sqrt(ab)
    np.testing.assert_allclose(table.c_xt[row] * xt + table.c_x0[row] * x0_hat, mu, rtol=1e-9)
    np.testing.assert_allclose(table.sigma[row] ** 2, beta)


def test_the_last_step_adds_no_noise_and_returns_x0_hat():
  for name in ("ddpm", "ddim"):
    for num_steps in (0, 10, 1):
      table = samplers.make_sampler(LINEAR, name, num_steps=num_steps, **({"eta": 1.0} if name == "ddim" else {}))
      assert table.sigma[-1] == 0
      np.testing.assert_allclose([table.c_xt[-1], table.c_x0[-1]], [0, 1], atol=1e-12)


def test_ddim_step_numbers():
  """One DDIM step by Song et al.'s eq. 12, written out."""
  t, s, xt, x0_hat, eta = 600, 400, 0.9, -0.4, 0.7
  ab_t, ab_s = LINEAR.alpha_bar[t], LINEAR.alpha_bar[s]
  sigma = eta * np.sqrt((1 - ab_s) / (1 - ab_t)) * np.sqrt(1 - ab_t / ab_s)
  eps_hat = (xt - np.sqrt(ab_t) * x0_hat) / np.sqrt(1 - ab_t)
  expected = np.sqrt(ab_s) * x0_hat + np.sqrt(1 - ab_s - sigma**2) * eps_hat
  table = samplers.ddim_table(LINEAR, np.array([t]), np.array([s]), eta)
  np.testing.assert_allclose(table.c_xt[0] * xt + table.c_x0[0] * x0_hat, expected)
  np.testing.assert_allclose(table.sigma[0], sigma)


def test_image_i_depends_on_key_i_alone():
  table = samplers.make_sampler(LINEAR, "ddpm", num_steps=20)
  few, many = draw(table, LINEAR, number=3), draw(table, LINEAR, number=8)
  chex.assert_trees_all_close(few, many[:3], rtol=1e-5)
  assert len(np.unique(many)) == 8
  assert not np.allclose(draw(table, LINEAR, number=3, seed=1), few)


def test_clipping():
  network = lambda xt, t: jnp.zeros_like(xt)  # noqa: E731  says: no noise in x_t, so x0_hat = x_t / sqrt(alpha_bar)
  xt, t = jnp.full((2, 1), 0.5), jnp.asarray([1, 1000])
  clipped = samplers.x0_predictor(network, LINEAR, "eps")(xt, t)
  np.testing.assert_allclose(clipped[:, 0], [0.5 / np.sqrt(0.9999), 1.0], rtol=1e-6)
  np.testing.assert_allclose(samplers.x0_predictor(network, LINEAR, "eps")(-xt, t), -clipped)
  free = samplers.x0_predictor(network, LINEAR, "eps", threshold="none")(xt, t)
  np.testing.assert_allclose(free[1, 0], 0.5 / np.sqrt(LINEAR.alpha_bar[1000]), rtol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_strided_ancestral_step_by_hand(variance):
  t, s, xt, x0_hat = 600, 400, 0.9, -0.4
  ab_t, ab_s = LINEAR.alpha_bar[t], LINEAR.alpha_bar[s]
  beta = 1 - ab_t / ab_s
  mean = np.sqrt(ab_s) * beta / (1 - ab_t) * x0_hat + np.sqrt(1 - beta) * (1 - ab_s) / (1 - ab_t) * xt
  table = samplers.ancestral_table(LINEAR, np.array([t]), np.array([s]), variance)
  np.testing.assert_allclose(table.c_xt[0] * xt + table.c_x0[0] * x0_hat, mean)
  expected = {"fixed_small": beta * (1 - ab_s) / (1 - ab_t), "fixed_large": beta}[variance]
  np.testing.assert_allclose(table.sigma[0] ** 2, expected)


def test_the_number_of_steps_reaches_the_table():
  for name in ("ddpm", "ddim"):
    assert samplers.make_sampler(LINEAR, name, num_steps=100).t.tolist() == list(range(1000, 0, -10))


def test_prior_and_steps_have_noise_of_their_own():
  """A table that only adds: the sample is the sum of the prior's draw (number 0) and of those of its rows (1, 2)."""
  zeros, ones = np.zeros(2), np.ones(2)
  table = samplers.SamplerTable(np.array([1000, 500]), np.array([500, 0]), ones, zeros, zeros, ones)
  keys = jax.random.split(jax.random.key(0), 3)
  got = samplers.sample(table, gaussian_x0(LINEAR), keys, (2,))[0]
  for i in range(3):
    parts = [jax.random.normal(jax.random.fold_in(keys[i], number), (2,)) for number in (0, 1, 2)]
    np.testing.assert_allclose(got[i], sum(parts), rtol=1e-5)


def test_the_arithmetic_is_float32_also_for_a_bfloat16_network():
  output = jnp.asarray([[0.3], [0.7]], jnp.bfloat16)
  x0_hat = samplers.x0_predictor(lambda xt, t: output, LINEAR, "x0")(jnp.zeros((2, 1)), jnp.asarray([1, 2]))
  assert x0_hat.dtype == jnp.float32
  eps_x0 = samplers.x0_predictor(lambda xt, t: output, LINEAR, "eps")(jnp.full((2, 1), 0.4), jnp.asarray([5, 5]))
  a, b = LINEAR.sqrt_alpha_bar[5], LINEAR.sqrt_one_minus_alpha_bar[5]
  np.testing.assert_allclose(eps_x0, (0.4 - b * np.asarray(output, np.float64)) / a, rtol=1e-6)


GRIDS = ["trailing", "uniform", "quadratic", "logsnr"]


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 599, 600])
@pytest.mark.parametrize("first", [0, 600])
def test_time_grids_fall_strictly_from_first_to_0(kind, num_steps, first):
  grid = samplers.time_grid(LINEAR, num_steps, kind, first)
  assert len(grid) == num_steps + 1 and grid[0] == (first or 1000) and grid[-1] == 0
  assert (np.diff(grid) < 0).all()


def test_time_grids_are_even_in_what_they_say():
  trailing, uniform, quadratic, logsnr = (samplers.time_grid(LINEAR, 10, kind) for kind in GRIDS)
  assert trailing.tolist() == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
  assert uniform.tolist() == [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1, 0]
  root = np.sqrt(quadratic[:-1])
  assert np.ptp(np.diff(root[:-2])) < 0.06 and quadratic[-2] == 1 and root[0] == np.sqrt(1000)
  steps = np.diff(LINEAR.log_snr[logsnr[:-1]])
  assert logsnr[-2] == 1 and np.ptp(steps[:-3]) < 0.05 * steps[0]  # whole timesteps are coarse near 1


def test_impossible_requests():
  for num_steps in (0, 1001):
    with pytest.raises(ValueError, match="num_steps"):
      samplers.time_grid(LINEAR, num_steps)
  with pytest.raises(ValueError, match="'euler'"):
    samplers.make_sampler(LINEAR, "euler")
  with pytest.raises(ValueError, match="'even'"):
    samplers.time_grid(LINEAR, 10, "even")
  with pytest.raises(ValueError, match="'soft'"):
    samplers.threshold_x0(jnp.zeros(3), "soft", 0.9)
