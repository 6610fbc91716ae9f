"""Samplers against data whose perfect denoiser is known in closed form."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import reference, samplers
from ddpm_jax.diffusion.denoiser import Denoiser, from_x0, thresholded
from ddpm_jax.diffusion.forward import q_posterior
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.diffusion.schedules import make_schedule

LINEAR = make_schedule("linear", 1000)
MEAN, STD = 0.3, 0.2  # of Gaussian data


def gaussian(std):
  """E[x_0 | x_t] for x_0 ~ N(MEAN, std^2): the perfect denoiser, by Bayes' rule."""

  def denoise(xt, level):
    gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
    return from_x0(MEAN + gain * (xt - level.alpha * MEAN), xt, level)

  return denoise


def draw(table, number=4000, seed=0):
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(number))
  return np.asarray(jax.jit(lambda: samplers.sample(table, gaussian(STD), keys, (1,))[0])())


def denoiser(network, prediction):
  """Of a network (x_t, time) -> output that has no parameters."""
  return Denoiser(lambda params, x, time, cond, **_: network(x, time), PARAMETERIZATIONS[prediction]).bind({})


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
  images = draw(samplers.make_sampler(LINEAR, name, **options))
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


def test_the_last_step_adds_no_noise_and_returns_x0_hat():
  for name in ("ddpm", "ddim"):
    for num_steps in (0, 10, 1):
      table = samplers.make_sampler(LINEAR, name, num_steps=num_steps, **({"eta": 1.0} if name == "ddim" else {}))
      assert table.sigma[-1] == 0
      np.testing.assert_allclose([table.c_xt[-1], table.c_x0[-1]], [0, 1], atol=1e-12)


def test_image_i_depends_on_key_i_alone():
  table = samplers.make_sampler(LINEAR, "ddpm", num_steps=20)
  few, many = draw(table, number=3), draw(table, number=8)
  chex.assert_trees_all_close(few, many[:3], rtol=1e-5)
  assert len(np.unique(many)) == 8
  assert not np.allclose(draw(table, number=3, seed=1), few)


def test_clipping():
  network = lambda xt, time: jnp.zeros_like(xt)  # noqa: E731  says: no noise in x_t, so x0_hat = x_t / sqrt(alpha_bar)
  xt, level = jnp.full((2, 1), 0.5), LINEAR.level(jnp.asarray([1, 1000]))
  free = denoiser(network, "eps")
  clipped = thresholded(free, "static")(xt, level).x0
  np.testing.assert_allclose(clipped[:, 0], [0.5 / np.sqrt(0.9999), 1.0], rtol=1e-6)
  np.testing.assert_allclose(thresholded(free, "static")(-xt, level).x0, -clipped)
  for denoise in (free, thresholded(free, "none")):
    np.testing.assert_allclose(denoise(xt, level).x0[1, 0], 0.5 / np.sqrt(LINEAR.alpha_bar[1000]), rtol=1e-5)


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
    table = samplers.make_sampler(LINEAR, name, num_steps=100, grid="trailing")
    assert table.t.tolist() == list(range(1000, 0, -10))


def test_prior_and_steps_have_noise_of_their_own():
  """A table that only adds: the sample is the sum of the prior's draw (number 0) and of those of its rows (1, 2)."""
  zeros, ones, t = np.zeros(2), np.ones(2), np.array([1000, 500])
  table = samplers.SamplerTable(t, np.array([500, 0]), LINEAR.level(t), ones, zeros, zeros, ones)
  keys = jax.random.split(jax.random.key(0), 3)
  got = samplers.sample(table, gaussian(STD), keys, (2,))[0]
  for i in range(3):
    parts = [jax.random.normal(jax.random.fold_in(keys[i], number), (2,)) for number in (0, 1, 2)]
    np.testing.assert_allclose(got[i], sum(parts), rtol=1e-5)


def test_the_arithmetic_is_float32_also_for_a_bfloat16_network():
  output = jnp.asarray([[0.3], [0.7]], jnp.bfloat16)
  x0, eps = denoiser(lambda xt, time: output, "x0")(jnp.zeros((2, 1)), LINEAR.level(jnp.asarray([1, 2])))
  assert x0.dtype == eps.dtype == jnp.float32
  eps_x0 = denoiser(lambda xt, time: output, "eps")(jnp.full((2, 1), 0.4), LINEAR.level(5)).x0
  a, b = LINEAR.sqrt_alpha_bar[5], LINEAR.sqrt_one_minus_alpha_bar[5]
  np.testing.assert_allclose(eps_x0, (0.4 - b * np.asarray(output, np.float64)) / a, rtol=1e-6)


GRIDS = ["trailing", "uniform", "quadratic", "logsnr", "logistic"]


def test_time_grids_fall_strictly_from_first_to_0():
  for kind, num_steps, first in itertools.product(GRIDS, (1, 2, 7, 50, 599, 600), (0, 600)):
    grid = samplers.time_grid(LINEAR, num_steps, kind, first)
    ends = (len(grid), grid[0], grid[-1]) == (num_steps + 1, first or 1000, 0)
    assert ends and (np.diff(grid) < 0).all(), (kind, num_steps, first)


def test_time_grids_are_even_in_what_they_say():
  trailing, uniform, quadratic, logsnr = (samplers.time_grid(LINEAR, 10, kind) for kind in GRIDS[:4])
  assert trailing.tolist() == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
  assert uniform.tolist() == [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1, 0]
  root = np.sqrt(quadratic[:-1])
  assert np.ptp(np.diff(root[:-2])) < 0.06 and quadratic[-2] == 1 and root[0] == np.sqrt(1000)
  steps = np.diff(LINEAR.log_snr[logsnr[:-1]])
  assert logsnr[-2] == 1 and np.ptp(steps[:-3]) < 0.05 * steps[0]  # whole timesteps are coarse near 1
  for sampler, center, width in (("ddim", 0, 2.5), ("heun", -3, 3)):
    logistic = samplers.time_grid(LINEAR, 100, "logistic", sampler=sampler)
    place = 1 / (1 + np.exp((LINEAR.log_snr[logistic] - center) / width))
    assert place[-1] == 0 and np.ptp(np.diff(place[:80])) < 0.005  # whole timesteps are coarse near 1
    within = np.abs(LINEAR.log_snr[logistic] - center) < width * np.log(3)
    assert within.mean() == pytest.approx(0.5, abs=0.05)


def test_impossible_requests():
  for num_steps in (0, 1001):
    with pytest.raises(ValueError, match="num_steps"):
      samplers.time_grid(LINEAR, num_steps)
  with pytest.raises(ValueError, match="'euler'"):
    samplers.make_sampler(LINEAR, "euler")
  with pytest.raises(ValueError, match="'even'"):
    samplers.time_grid(LINEAR, 10, "even")


# Order of convergence, against the exact solution of the probability-flow ODE.

FINE = make_schedule("linear", 4000, beta_start=2.5e-5, beta_end=0.005)  # 1000 steps of LINEAR are no limit here
WIDE = 0.5  # deviation of the data


def on_the_flow(schedule, u, t):
  """The state at t of the solution that ends at x_0 = MEAN + WIDE u: it keeps its place in the marginal."""
  alpha_bar = schedule.alpha_bar[t]
  return np.sqrt(alpha_bar) * MEAN + np.sqrt(alpha_bar * WIDE**2 + 1 - alpha_bar) * u


PLACES = np.linspace(-2, 2, 32)[:, None]


def flow_error(name, num_steps, first=0):
  """Root mean square error of x_0, from the same x_T (or x_first), for a number of steps (not of evaluations)."""
  evaluations = 2 * num_steps - 1 if name == "heun" else num_steps
  table = samplers.make_sampler(FINE, name, num_steps=evaluations, grid="logsnr", first=first)
  assert len(table.t) == evaluations
  start = jnp.asarray(on_the_flow(FINE, PLACES, first or 4000), jnp.float32)
  keys = jax.random.split(jax.random.key(0), len(PLACES))
  got = jax.jit(lambda start: samplers.sample(table, gaussian(WIDE), keys, (1,), start=start)[0])(start)
  return np.sqrt(np.mean((np.asarray(got) - (MEAN + WIDE * PLACES)) ** 2))


@pytest.mark.parametrize(
  ("name", "low", "high", "last"), [("ddim", 0.95, 1.05, 1e-2), ("dpmpp", 1.85, 2.4, 2e-4), ("heun", 1.95, 2.4, 4e-4)]
)
def test_order_of_convergence(name, low, high, last):
  errors = np.array([flow_error(name, num_steps) for num_steps in (20, 40, 80, 160)])
  slopes = np.log2(errors[:-1] / errors[1:])
  assert (low < slopes).all() and (slopes < high).all(), slopes
  assert errors[-1] < last


@pytest.mark.parametrize(("name", "most"), [("ddim", 0.02), ("dpmpp", 1e-3), ("heun", 2e-3)])
def test_a_draw_may_begin_in_the_middle(name, most):
  assert flow_error(name, 60, first=1500) < most
  table = samplers.make_sampler(FINE, name, first=1500, num_steps=50)
  assert table.t[0] == 1500 and table.s[-1] == 0 and len(table.t) == (49 if name == "heun" else 50)
  assert len(samplers.make_sampler(FINE, name, first=7, num_steps=50).t) == 7  # there are no more timesteps
  assert len(samplers.make_sampler(FINE, name, first=7).t) == 7


# A mixture, which no linear denoiser can draw: every sampler, every prediction.

SHORT = make_schedule("linear", 250, beta_start=4e-4, beta_end=0.08)
WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([-0.6, 0.5]), np.array([0.1, 0.15])


def mixture_x0(alpha_bar, xt, xp=np):
  """E[x_0 | x_t] for the mixture: x_t [...], alpha_bar broadcastable to it."""
  alpha_bar, xt = alpha_bar[..., None], xt[..., None]
  variance = alpha_bar * STDS**2 + 1 - alpha_bar
  away = xt - xp.sqrt(alpha_bar) * MEANS
  logs = xp.log(WEIGHTS) - away**2 / (2 * variance) - xp.log(variance) / 2
  shares = xp.exp(logs - logs.max(-1, keepdims=True))
  shares = shares / shares.sum(-1, keepdims=True)
  return (shares * (MEANS + xp.sqrt(alpha_bar) * STDS**2 / variance * away)).sum(-1)


def mixture_network(prediction):
  """A network that says what the closed form knows, as the prediction has it."""

  def network(xt, time):
    a, b, _ = (value[:, None] for value in SHORT.level(time + 1))
    with jax.numpy_rank_promotion("allow"):
      x0 = mixture_x0(a**2, xt, jnp)
    eps = (xt - a * x0) / b
    return {"x0": x0, "eps": eps, "v": a * eps - b * x0}[prediction]

  return network


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("ddpm", dict(variance="fixed_small")),
    ("ddpm", dict(variance="fixed_large")),
    ("ddim", dict(eta=0.0, num_steps=150)),
    ("ddim", dict(eta=0.5, num_steps=200)),
    ("ddim", dict(eta=1.0)),
    ("dpmpp", dict(num_steps=40)),
    ("dpmpp", dict(num_steps=60, eta=0.5)),
    ("dpmpp", dict(num_steps=100, eta=1.0)),
    ("heun", dict(num_steps=79)),
  ],
)
def test_every_sampler_draws_a_mixture_whatever_the_network_predicts(name, options):
  table, number = samplers.make_sampler(SHORT, name, **options), 4000
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(number))

  def run():
    denoisers = [thresholded(denoiser(mixture_network(kind), kind), "static") for kind in ("eps", "x0", "v")]
    return [samplers.sample(table, denoise, keys, (1,))[0][:, 0] for denoise in denoisers]

  eps, x0, v = map(np.asarray, jax.jit(run)())
  # Between the two hills a rounding decides which one a draw falls to.
  for other in (x0, v):
    assert np.mean(np.abs(other - eps) > 2e-3) < 2e-3
  left = eps < 0
  assert abs(left.mean() - 0.3) < 4 * np.sqrt(0.21 / number)
  for hill, mean, std in ((eps[left], *(MEANS[0], STDS[0])), (eps[~left], *(MEANS[1], STDS[1]))):
    assert abs(hill.mean() - mean) < 4 * std / np.sqrt(len(hill)) + 0.005
    assert abs(hill.std() / std - 1) < 4 / np.sqrt(2 * len(hill)) + 0.03


# The papers' algorithms, in float64, with a denoiser that is not linear.


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_ddpm_is_algorithm_2_of_ho_et_al(variance):
  z = np.random.default_rng(0).standard_normal((251, 7))
  check("ddpm", lambda x: reference.ddpm_sample(eps_theta, SHORT.betas, x, z, variance), z[:0:-1], variance=variance)


@pytest.mark.parametrize(("num_steps", "eta"), [(0, 0.0), (10, 0.0), (10, 0.7), (0, 1.0), (1, 1.0)])
def test_ddim_is_equation_12_of_song_et_al(num_steps, eta):
  z, times = (
    np.random.default_rng(0).standard_normal((250, 7)),
    samplers.sampler_grid(SHORT, "ddim", num_steps=num_steps),
  )
  expected = lambda x: reference.ddim(eps_theta, SHORT.alpha_bar, times, x, z, eta)  # noqa: E731
  check("ddim", expected, z, num_steps=num_steps, eta=eta)


def test_dpmpp_is_algorithm_2_of_lu_et_al():
  times = samplers.time_grid(SHORT, 6, "logistic")
  alpha, sigma = np.sqrt(SHORT.alpha_bar), np.sqrt(1 - SHORT.alpha_bar)
  check("dpmpp", lambda x: reference.dpm_solver_pp_2m(x_theta, alpha, sigma, times, x), num_steps=6)


@pytest.mark.parametrize("num_steps", [1, 2, 9, 10])
def test_heun_is_algorithm_1_of_karras_et_al(num_steps):
  """On x_t / sqrt(alpha_bar_t). Even numbers of evaluations are one less: the last step takes one."""
  times = samplers.sampler_grid(SHORT, "heun", num_steps=num_steps)
  alpha, sigmas, evaluated = np.sqrt(SHORT.alpha_bar), np.sqrt(1 / SHORT.alpha_bar - 1), []

  def D(x, sigma):
    evaluated.append(int(np.argmin(abs(sigmas - sigma))))
    return x_theta(x * alpha[evaluated[-1]], evaluated[-1])

  check("heun", lambda x: reference.heun(D, sigmas[times], x / alpha[times[0]]), num_steps=num_steps)
  assert evaluated == samplers.make_sampler(SHORT, "heun", num_steps=num_steps).t.tolist()
  assert len(evaluated) == num_steps - (num_steps % 2 == 0)


def x_theta(x, t):
  return mixture_x0(SHORT.alpha_bar[t], x)


def eps_theta(x, t):
  return (x - np.sqrt(SHORT.alpha_bar[t]) * x_theta(x, t)) / np.sqrt(1 - SHORT.alpha_bar[t])


def check(name, expected, z=None, **options):
  """The table and the loop of a sampler against the reference, from seven x_T and with the given noise of the rows."""
  table, start = samplers.make_sampler(SHORT, name, **options), np.linspace(-1.5, 1.5, 7)
  z = np.zeros((len(table.t), 7)) if z is None else z[: len(table.t)]
  wanted = expected(start)
  np.testing.assert_allclose(run_in_float64(table, start, z), wanted, rtol=1e-7, atol=1e-9)
  np.testing.assert_allclose(run_sample(table, start, z), wanted, atol=3e-5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_dpmpp_with_noise_by_hand(eta):
  """SDE-DPM-Solver++(2M) of Lu et al. for eta = 1; for others as in k-diffusion's sample_dpmpp_2m_sde (midpoint)."""
  times = samplers.time_grid(SHORT, 6, "logistic")
  table = samplers.make_sampler(SHORT, "dpmpp", num_steps=6, eta=eta)
  alpha, sigma = np.sqrt(SHORT.alpha_bar), np.sqrt(1 - SHORT.alpha_bar)
  lam = np.log(alpha[times[:-1]] / sigma[times[:-1]])
  for row in range(5):
    before, now, h = times[row], times[row + 1], lam[row + 1] - lam[row]
    assert (table.t[row], table.s[row]) == (before, now)
    share = (lam[row + 1] - lam[row]) / (lam[row] - lam[row - 1]) / 2 if row else 0.0  # 1 / (2r)
    reach = alpha[now] * (1 - np.exp(-(1 + eta) * h))
    np.testing.assert_allclose(table.c_xt[row], sigma[now] / sigma[before] * np.exp(-eta * h), rtol=1e-9)
    np.testing.assert_allclose(table.c_x0[row], reach * (1 + share), rtol=1e-9)
    np.testing.assert_allclose(table.c_prev[row], -reach * share, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(table.sigma[row] ** 2, sigma[now] ** 2 * (1 - np.exp(-2 * eta * h)), rtol=1e-9)
  last = (table.c_xt[5], table.c_x0[5], table.c_prev[5], table.sigma[5])
  np.testing.assert_allclose(last, [0, 1, 0, 0], atol=1e-15)


def test_the_first_order_of_dpmpp_with_eta_1_is_the_posterior():
  """Both keep the exact marginals of one point: mean and variance of q(x_s | x_t, x_0)."""
  table = samplers.make_sampler(SHORT, "dpmpp", num_steps=6, eta=1.0)
  ddpm = samplers.ancestral_table(SHORT, table.t[:1], table.s[:1], "fixed_small")
  for name in ("c_xt", "c_x0", "sigma"):
    np.testing.assert_allclose(getattr(table, name)[0], getattr(ddpm, name)[0], rtol=1e-9)


def run_in_float64(table, x, z):
  """What a table says, row by row: x_s = c_xt x_t + c_x0 x0_hat + c_prev x0_hat_prev + sigma z."""
  previous = 0.0
  columns = (table.t, table.c_xt, table.c_x0, table.c_prev, table.sigma, z)
  for t, c_xt, c_x0, c_prev, sigma, noise in zip(*columns, strict=True):
    x0_hat = x_theta(x, t)
    x, previous = c_xt * x + c_x0 * x0_hat + c_prev * previous + sigma * noise, x0_hat
  return x


def run_sample(table, start, z):
  """What `sample` draws; the noise is added after the rows, in place of its own."""
  denoise = denoiser(mixture_network("x0"), "x0")
  keys = jax.random.split(jax.random.key(0), len(start))
  noise = jnp.asarray(table.sigma[:, None] * z, jnp.float32)
  return samplers.sample(
    table._replace(sigma=np.zeros(len(z))),
    denoise,
    keys,
    (1,),
    start=jnp.asarray(start[:, None], jnp.float32),
    after_row=lambda xs, row: xs + noise[row][:, None],
  )[0][:, 0]


# There and back.


@pytest.mark.parametrize("kind", ["uniform", "trailing"])
def test_encoding_and_decoding_give_the_image_back_to_first_order(kind):
  images = jnp.asarray(MEAN + WIDE * PLACES, jnp.float32)
  keys, denoise = jax.random.split(jax.random.key(0), len(PLACES)), gaussian(WIDE)
  there, back = [], []
  for num_steps in (50, 100, 200, 400):
    times = samplers.time_grid(FINE, num_steps, kind)
    up, down = samplers.encoding_table(FINE, times), samplers.ddim_table(FINE, times[:-1], times[1:], eta=0.0)
    assert up.t.min() == 1 and up.s.tolist() == times[-2::-1].tolist() and not up.sigma.any()

    def both(start, up=up, down=down):
      noise, _ = samplers.sample(up, denoise, keys, (1,), start=start)
      return noise, samplers.sample(down, denoise, keys, (1,), start=noise)[0]

    noise, again = map(np.asarray, jax.jit(both)(images))
    there.append(np.sqrt(np.mean((noise - on_the_flow(FINE, PLACES, 4000)) ** 2)))
    back.append(np.sqrt(np.mean((again - images) ** 2)))
  for errors, most in ((there, 0.03), (back, 0.02)):
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (slopes > 0.85).all() and (slopes < 1.6).all(), (slopes, errors)
    assert errors[-1] < most


def test_the_first_row_of_an_encoding_takes_eps_at_t_1():
  """x_s = a_s x_0 + b_s eps_hat(x_0, 1): Song et al.'s eq. 13 with alpha_bar_0 = 1, written out."""
  up = samplers.encoding_table(LINEAR, np.array([1000, 300, 0]))
  x0, x0_hat, b_1 = 0.7, 0.65, LINEAR.sqrt_one_minus_alpha_bar[1]
  eps_hat = (x0 - LINEAR.sqrt_alpha_bar[1] * x0_hat) / b_1
  expected = LINEAR.sqrt_alpha_bar[300] * x0 + LINEAR.sqrt_one_minus_alpha_bar[300] * eps_hat
  assert (up.t.tolist(), up.s.tolist()) == ([1, 300], [300, 1000])
  np.testing.assert_allclose(up.c_xt[0] * x0 + up.c_x0[0] * x0_hat, expected, rtol=1e-12)


# What else `sample` does.


def test_kept_estimates_are_those_of_their_rows():
  table = samplers.make_sampler(LINEAR, "ddpm", num_steps=5)
  keys = jax.random.split(jax.random.key(1), 3)
  x0_hats, xt = [], jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (2,)))(keys)
  for row in range(5):
    x0_hats.append(gaussian(STD)(xt, LINEAR.level(table.t[row])).x0)
    z = jax.vmap(lambda key, n=row + 1: jax.random.normal(jax.random.fold_in(key, n), (2,)))(keys)
    xt = table.c_xt[row] * xt + table.c_x0[row] * x0_hats[-1] + table.sigma[row] * z
  for keep in ([], [0, 2, 3], [4, 1]):
    x0, kept = samplers.sample(table, gaussian(STD), keys, (2,), keep=keep)
    np.testing.assert_allclose(x0, xt, rtol=1e-5, atol=1e-6)
    assert kept.shape == (3, len(keep), 2)
    for place, row in enumerate(keep):
      np.testing.assert_allclose(kept[:, place], x0_hats[row], rtol=1e-5, atol=1e-6)


def test_a_start_takes_the_place_of_the_priors_draw():
  table = samplers.make_sampler(LINEAR, "ddpm", num_steps=5)
  keys = jax.random.split(jax.random.key(1), 3)
  prior = samplers.numbered_noise(keys, (2,))(0)
  draw = lambda start: np.asarray(samplers.sample(table, gaussian(STD), keys, (2,), start=start)[0])  # noqa: E731
  np.testing.assert_array_equal(draw(prior), draw(None))
  # With the same noise in the rows, and a denoiser that is linear in x_t, a shift is multiplied in each row.
  ab = LINEAR.alpha_bar[table.t]
  left = np.prod(table.c_xt + table.c_x0 * np.sqrt(ab) * STD**2 / (ab * STD**2 + 1 - ab))
  np.testing.assert_allclose(draw(prior + 1000) - draw(None), 1000 * left, rtol=1e-3)


def test_what_is_done_after_a_row():
  """It sees x_s and the number of the row, and the next row goes on with what it gives."""
  zeros, ones, t = np.zeros(3), np.ones(3), np.array([900, 500, 100])
  table = samplers.SamplerTable(t, np.array([500, 100, 0]), LINEAR.level(t), 2 * ones, zeros, zeros, zeros)
  keys = jax.random.split(jax.random.key(1), 2)
  got, _ = samplers.sample(
    table,
    gaussian(STD),
    keys,
    (1,),
    start=jnp.ones((2, 1)),
    after_row=lambda xs, row: xs + 10.0 ** (row + 1),
  )
  np.testing.assert_allclose(got, 2 * (2 * (2 + 10) + 100) + 1000)


# Which grid is best, with data of many scales, for each of which the solution of the ODE is known in closed form.

SCALES = np.array([1.0, 0.6, 0.4, 0.25, 0.15, 0.08, 0.04, 0.02])  # deviations, as of the principal components of images
SCHEDULES = {name: make_schedule(name, 1000) for name in ("linear", "quadratic", "cosine", "sigmoid")}


def distance_to_the_solution(schedule, name, num_steps, grid):
  """Root mean square difference of x_0 over x_T ~ N(0, I), in float64: x_0 is linear in x_T, for all that is done."""
  table = samplers.make_sampler(schedule, name, num_steps=num_steps, grid=grid)
  slope, offset, slope_before, offset_before = np.ones(8), np.zeros(8), 0.0, 0.0  # x = slope x_T + offset
  for t, c_xt, c_x0, c_prev in zip(table.t, table.c_xt, table.c_x0, table.c_prev, strict=True):
    alpha_bar = schedule.alpha_bar[t]
    gain = np.sqrt(alpha_bar) * SCALES**2 / (alpha_bar * SCALES**2 + 1 - alpha_bar)  # of E[x_0 | x_t]
    slope_x0, offset_x0 = gain * slope, gain * offset + MEAN * (1 - gain * np.sqrt(alpha_bar))
    slope = c_xt * slope + c_x0 * slope_x0 + c_prev * slope_before
    offset = c_xt * offset + c_x0 * offset_x0 + c_prev * offset_before
    slope_before, offset_before = slope_x0, offset_x0
  alpha_bar = schedule.alpha_bar[-1]
  exact = SCALES / np.sqrt(alpha_bar * SCALES**2 + 1 - alpha_bar)
  return np.sqrt(np.mean((slope - exact) ** 2 + (offset - MEAN + exact * np.sqrt(alpha_bar) * MEAN) ** 2))


def test_auto_is_nearly_the_best_grid():
  """For each deterministic sampler: over schedules and numbers of evaluations nearly the best, and never far off.

  No grid is the best everywhere: errors of second order change their sign.
  """
  far = []
  for name, most in (("ddim", 1.25), ("dpmpp", 2.5), ("heun", 2.0)):
    cases = itertools.product(SCHEDULES.values(), (10, 20, 50))
    kinds = [kind for kind in GRIDS if kind != samplers.grid_name(name, "auto")]
    errors = np.array(
      [
        [distance_to_the_solution(schedule, name, number, kind) for kind in ("auto", *kinds)]
        for schedule, number in cases
      ]
    )
    over_best = errors / errors.min(axis=1, keepdims=True)
    means = np.exp(np.log(over_best).mean(axis=0))
    if over_best[:, 0].max() > most or means[0] > 1.15 * means.min():
      far.append((name, over_best[:, 0].round(2).tolist(), dict(zip(("auto", *kinds), means.round(2), strict=True))))
  assert not far, "\n".join(map(str, far))


def test_auto_spends_few_evaluations_where_there_is_only_noise():
  """Below log SNR -4, where 13% of the image are left: at most a quarter of them, of Heun's method a half."""
  for schedule in SCHEDULES.values():
    for name, most in (("ddim", 0.25), ("dpmpp", 0.25), ("heun", 0.5)):
      for num_steps in (10, 20, 50):
        t = samplers.make_sampler(schedule, name, num_steps=num_steps).t
        assert np.mean(schedule.log_snr[t] < -4) <= most, (name, t)


def test_logistic_begins_where_nothing_of_an_image_is_left():
  """At T, or where log SNR is -10.2; with all timesteps at T."""
  for kind, schedule in SCHEDULES.items():
    begin = samplers.time_grid(schedule, 20, "logistic")[0]
    assert begin == (996 if kind == "cosine" else 1000)
    assert schedule.sqrt_alpha_bar[begin] < 0.007 or begin == 1000
    assert samplers.time_grid(schedule, 1000, "logistic").tolist() == list(range(1000, -1, -1))


def test_the_grid_of_a_sampler():
  """auto: trailing for ddpm, logistic for the others; a named one is used by all."""
  for name, own in (("ddpm", "trailing"), ("ddim", "logistic"), ("dpmpp", "logistic")):
    table = samplers.make_sampler(LINEAR, name, num_steps=20)
    assert table.t.tolist() == samplers.time_grid(LINEAR, 20, own)[:-1].tolist()
    table = samplers.make_sampler(LINEAR, name, num_steps=20, grid="quadratic")
    assert table.t.tolist() == samplers.time_grid(LINEAR, 20, "quadratic")[:-1].tolist()
    assert table.s[:-1].tolist() == table.t[1:].tolist()
  assert (
    samplers.make_sampler(LINEAR, "heun", num_steps=9).t[::2].tolist()
    == samplers.time_grid(LINEAR, 5, "logistic", sampler="heun")[:-1].tolist()
  )
