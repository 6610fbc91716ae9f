"""Guidance against closed forms, for every sampler and without a network: class data N(m, c^2), all data N(0, C^2).

With the noise level u = (sigma / alpha)^2 and x / alpha for x, all denoisers here are linear, and a sampler integrates
dx / d ln u = p (x - D), p = 1/2 for those of the ODE, 1 for ancestral sampling, with (2 p - 1) du of noise.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import reference, samplers
from ddpm_jax.diffusion.denoiser import Denoiser, from_x0, thresholded
from ddpm_jax.diffusion.guidance import classifier_gradient, classifier_guided, guided, mean_shift, pair_of, within
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.diffusion.schedules import make_schedule

LINEAR = make_schedule("linear", 2000, beta_start=5e-5, beta_end=0.0086888)  # that ends at a noise level of 80
SHORT = make_schedule("linear", 60, beta_start=1e-3, beta_end=0.2)
M, SMALL, LARGE = 1.3, 0.5, 0.8  # m, c, C
SCALE, INTERVAL = 2.0, (0.19, 1.61)


def at_each(level, xt):
  """alpha and sigma, to be broadcast to x_t."""
  return (jnp.reshape(value, jnp.shape(value) + (1,) * (xt.ndim - jnp.ndim(value))) for value in level[:2])


def gaussian(mean, std):
  """E[x_0 | x_t] for x_0 ~ N(mean, std^2), by Bayes' rule."""

  def denoise(xt, level):
    alpha, sigma = at_each(level, xt)
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return from_x0(mean + gain * (xt - alpha * mean), xt, level)

  return denoise


CLASS, ALL, WIDE = gaussian(M, SMALL), gaussian(0.0, SMALL), gaussian(0.0, LARGE)


# The closed forms.


def mean_of_draws(p, interval=(0.0, np.inf)):
  """With C = c, from x_T of mean 0: D is the denoiser of N(g m, c^2), outside of the interval that of N(m, c^2)."""
  r = lambda sigma: SMALL**2 + sigma**2  # noqa: E731
  low, high = interval[0], min(interval[1], 80.0)
  mean = M * (1 - (r(high) / r(80.0)) ** p)
  mean = SCALE * M + (mean - SCALE * M) * (r(low) / r(high)) ** p
  return M + (mean - M) * (r(0.0) / r(low)) ** p


def deviation_of_draws(p, std, guide):
  """Of two denoisers of mean 0: what is left of each noise, (c^2 / (c^2 + u))^(p g) (C^2 / (C^2 + u))^(p (1 - g))."""
  left = lambda u: (1 + u / std**2) ** (-p * SCALE) * (1 + u / guide**2) ** (-p * (1 - SCALE))  # noqa: E731
  u = np.append(0.0, np.geomspace(1e-9, 80.0**2, 100_000))
  return np.sqrt(left(u[-1]) ** 2 * (1 + u[-1]) + (2 * p - 1) * np.trapezoid(left(u) ** 2, u))


def test_the_closed_forms_are_those_of_the_literature():
  """Numbers that were found by integrating the ODE; with noise, p = 1, the integral in closed form."""
  assert mean_of_draws(0.5) == pytest.approx(SCALE * M * (1 - SMALL / np.hypot(SMALL, 80.0)), rel=1e-12)
  assert mean_of_draws(0.5, INTERVAL) == pytest.approx(2.12153, abs=5e-6)
  assert deviation_of_draws(0.5, SMALL, LARGE) == pytest.approx(0.3125, rel=1e-3)
  c2, d = SMALL**2, LARGE**2 - SMALL**2
  assert deviation_of_draws(1.0, SMALL, LARGE) == pytest.approx(SMALL * np.sqrt(c2**2 + d * c2 + d**2 / 3) / LARGE**2)
  for p in (0.5, 0.75, 1.0):
    assert deviation_of_draws(p, SMALL, SMALL) == pytest.approx(SMALL, rel=1e-3)


def moments(table, denoise, shift=None):
  """Mean and deviation of the draws of a linear denoiser, without their noise: x_0 by x_T and by the noise of each row.

  Number 0 begins with 0 and is never moved, number 1 begins with 1, and number 2 + i is moved as row i would move it.
  """
  rows = len(table.t)
  sigma = jnp.asarray(table.sigma, jnp.float32)
  start = jnp.zeros((1, rows + 2)).at[0, 1].set(1.0)
  moved = lambda xs, row: xs.at[0, 2 + row].add(sigma[row])  # noqa: E731
  still, key = table._replace(sigma=np.zeros(rows)), jax.random.split(jax.random.key(0), 1)
  draw = lambda: samplers.sample(still, denoise, key, (rows + 2,), start=start, after_row=moved, shift=shift)  # noqa: E731
  x0 = np.asarray(jax.jit(draw)()[0][0], np.float64)
  return x0[0], np.sqrt(np.sum((x0[1:] - x0[0]) ** 2))


SAMPLERS = [  # with p, see above
  ("ddpm", dict(variance="fixed_small"), 1.0),
  ("ddpm", dict(variance="fixed_large"), 1.0),
  ("ddim", dict(), 0.5),
  ("ddim", dict(num_steps=250), 0.5),
  ("ddim", dict(eta=0.5), 0.625),
  ("ddim", dict(eta=1.0), 1.0),
  ("dpmpp", dict(num_steps=100), 0.5),
  ("dpmpp", dict(num_steps=400, eta=0.5), 0.75),
  ("dpmpp", dict(num_steps=400, eta=1.0), 1.0),
  ("heun", dict(num_steps=299), 0.5),
]


@pytest.mark.parametrize(("name", "options", "p"), SAMPLERS)
def test_every_sampler_draws_what_guidance_makes_of_gaussians(name, options, p):
  table = samplers.make_sampler(LINEAR, name, **options)
  everywhere = moments(table, guided(CLASS, pair_of(CLASS, ALL), SCALE))
  np.testing.assert_allclose(everywhere, (mean_of_draws(p), SMALL), rtol=0.01)
  inside = moments(table, guided(CLASS, pair_of(CLASS, ALL), SCALE, INTERVAL))
  np.testing.assert_allclose(inside, (mean_of_draws(p, INTERVAL), SMALL), rtol=0.01)
  autoguided = moments(table, guided(ALL, pair_of(ALL, WIDE), SCALE))
  np.testing.assert_allclose(autoguided, (0.0, deviation_of_draws(p, SMALL, LARGE)), rtol=0.01)


# What is evaluated, and when.


def points(level=600, size=4):
  xt = jax.random.normal(jax.random.key(1), (size, 3))
  return xt, LINEAR.level(level)


def test_a_scale_of_1_is_the_main_model_itself():
  def never(xt, level):
    raise AssertionError("traced")

  for one in (1, 1.0, np.float32(1)):
    assert guided(CLASS, never, one) is CLASS
    assert guided(CLASS, never, one, INTERVAL) is CLASS


def test_a_scale_of_0_is_the_guide_bit_for_bit():
  table, keys = samplers.make_sampler(LINEAR, "ddpm", num_steps=20), jax.random.split(jax.random.key(0), 5)
  draw = lambda denoise: np.asarray(samplers.sample(table, denoise, keys, (3,))[0])  # noqa: E731
  np.testing.assert_array_equal(draw(guided(CLASS, pair_of(CLASS, WIDE), 0.0)), draw(WIDE))
  for mine, theirs in zip(guided(CLASS, pair_of(CLASS, WIDE), 0.0)(*points()), WIDE(*points()), strict=True):
    np.testing.assert_array_equal(mine, theirs)


class Counted:
  """A denoise function that counts how often it is evaluated when the program runs."""

  def __init__(self, denoise):
    self.denoise, self.times = denoise, 0

  def __call__(self, xt, level):
    jax.debug.callback(self._count)
    return self.denoise(xt, level)

  def _count(self):
    self.times += 1


def test_the_guide_is_evaluated_within_the_interval_alone():
  """Its lower end is outside, its upper end inside; a scale of 1 in a compiled program leaves it out everywhere."""
  table = samplers.make_sampler(LINEAR, "ddim", num_steps=50)
  noise = np.asarray(jnp.asarray(table.level.sigma, jnp.float32) / jnp.asarray(table.level.alpha, jnp.float32))
  interval = (float(noise[30]), float(noise[20]))
  guide, keys = Counted(WIDE), jax.random.split(jax.random.key(0), 2)

  @functools.partial(jax.jit, static_argnames="interval")
  def draw(scale, interval=None):
    return samplers.sample(table, guided(CLASS, pair_of(CLASS, guide), scale, interval), keys, (1,))[0]

  def times(*arguments):
    guide.times = 0
    draw(*arguments).block_until_ready()
    jax.effects_barrier()
    return guide.times

  assert [times(2.0, interval), times(1.0, interval), times(1.0), times(2.0)] == [10, 0, 0, 50]
  unguided = jax.jit(lambda: samplers.sample(table, CLASS, keys, (1,))[0])()
  np.testing.assert_allclose(draw(1.0), unguided, rtol=1e-6)
  by_number = samplers.sample(table, guided(CLASS, pair_of(CLASS, WIDE), 2.0, interval), keys, (1,))[0]
  np.testing.assert_allclose(draw(2.0, interval), by_number, rtol=1e-5)


def test_an_end_of_an_interval_that_is_a_level_is_that_level():
  """Computed in float64 as the manual shows: as LO it is outside, as HI inside, whatever float32 makes of it."""
  t, sigma = np.arange(1, LINEAR.num_timesteps + 1), np.sqrt(1 / LINEAR.alpha_bar[1:] - 1)
  for level in (LINEAR.level(t), LINEAR.level(jnp.asarray(t))):  # in float64, and in float32
    for ends in (sigma, jnp.asarray(sigma, jnp.float32)):
      assert np.all(within(level, (0.0, ends)))
      assert not np.any(within(level, (ends, np.inf)))
      above = LINEAR.level(t[1:]) if isinstance(level.alpha, np.ndarray) else LINEAR.level(jnp.asarray(t[1:]))
      assert np.all(within(above, (ends[:-1], ends[1:])))
      assert not np.any(within(above, (0.0, ends[:-1])))


def test_levels_of_each_example_are_guided_each_by_its_own():
  xt, _ = points()
  t = jnp.asarray([60, 200, 600, 1800])  # two of them within
  each = guided(CLASS, pair_of(CLASS, WIDE), SCALE, INTERVAL)(xt, LINEAR.level(t))
  for i, inside in enumerate((False, True, True, False)):
    alone, level = xt[i : i + 1], LINEAR.level(t[i])
    expected = guided(CLASS, pair_of(CLASS, WIDE), SCALE)(alone, level) if inside else CLASS(alone, level)
    for mine, theirs in zip(each, expected, strict=True):
      np.testing.assert_allclose(mine[i : i + 1], theirs, rtol=1e-6, err_msg=f"example {i}")


def test_guidance_can_be_differentiated_and_batched():
  """By the scale D_main - D_guide, by x_t the slopes of the two combined; over scales as one after the other."""
  xt, level = points()
  main, guide = CLASS(xt, level).x0, WIDE(xt, level).x0
  slope = lambda std: level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)  # noqa: E731

  def x0(scale, xt, interval):
    return guided(CLASS, pair_of(CLASS, WIDE), scale, interval)(xt, level).x0

  for interval in (None, INTERVAL):
    by_scale, by_xt = jax.jacfwd(x0), jax.jit(jax.grad(lambda xt, i=interval: x0(SCALE, xt, i).sum()))
    np.testing.assert_allclose(by_scale(jnp.float32(SCALE), xt, interval), main - guide, rtol=1e-5)
    np.testing.assert_allclose(by_xt(xt), np.full(xt.shape, 2 * slope(SMALL) - slope(LARGE)), rtol=1e-4)
    scales = jnp.asarray([0.0, 1.0, 2.5])
    for scale, mine in zip(
      scales, jax.vmap(functools.partial(x0, interval=interval), (0, None))(scales, xt), strict=True
    ):
      np.testing.assert_allclose(mine, guide + scale * (main - guide), rtol=1e-5, atol=1e-6)


# Whatever is predicted, by one network or by two.


def network(prediction, log=None):
  """A network that knows the class, m times the label, and says so in a prediction of this kind."""

  def call(params, x, time, cond, **_):
    if log is not None:
      log.append(len(x))
    level = LINEAR.level(time + 1)
    x0, eps = gaussian(params["m"] * cond["label"][:, None], SMALL)(x, level)
    return jax.vmap(PARAMETERIZATIONS[prediction].target)(x0, eps, level)

  return call


LABELS = {"label": jnp.asarray([1.0, 2.0, 3.0, 4.0])}
NULL = {"label": jnp.zeros(4)}


def test_guidance_of_eps_x0_and_v_agree_and_are_what_the_papers_print():
  xt, level = points()
  for name, row in PARAMETERIZATIONS.items():
    pair = Denoiser(network(name), row).bind_pair({"m": 0.3}, LABELS, NULL, one_batch=True)
    denoise = guided(lambda xt, level, pair=pair: pair(xt, level)[0], pair, SCALE)
    time = jnp.full(4, level.time)
    outputs = [network(name)({"m": 0.3}, xt, time, cond) for cond in (LABELS, NULL)]
    extrapolated = row.x0_hat(outputs[1] + SCALE * (outputs[0] - outputs[1]), xt, level)
    x0, eps = denoise(xt, level)
    np.testing.assert_allclose(x0, extrapolated, rtol=1e-4, atol=1e-5, err_msg=name)
    of = [gaussian(m, SMALL)(xt, level).eps for m in (0.3 * LABELS["label"][:, None], 0.0)]
    printed = reference.classifier_free(lambda x, t, of=of: of[0], lambda x, t, of=of: of[1], SCALE - 1)(xt, 600)
    np.testing.assert_allclose(eps, printed, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("one_batch", [True, False])
def test_a_pair_is_the_main_prediction_and_then_that_of_the_null_condition(one_batch):
  xt, _ = points()
  calls = []
  denoiser = Denoiser(network("v", calls), PARAMETERIZATIONS["v"])
  for level in (LINEAR.level(600), LINEAR.level(jnp.asarray([5, 200, 1000, 2000]))):
    expected = [denoiser.bind({"m": 0.3}, cond)(xt, level) for cond in (LABELS, NULL)]
    calls.clear()
    pair = denoiser.bind_pair({"m": 0.3}, LABELS, NULL, one_batch=one_batch)(xt, level)
    assert calls == ([8] if one_batch else [4, 4])
    for mine, theirs in zip(jax.tree.leaves(pair), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)


def test_the_interval_is_that_of_the_reference():
  """In Heun's method, on x_t / alpha, with a sigma for each evaluation."""
  times = samplers.sampler_grid(LINEAR, "heun", num_steps=39)
  alpha, sigmas = np.sqrt(LINEAR.alpha_bar), np.sqrt(1 / LINEAR.alpha_bar - 1)
  D = lambda mean, std: lambda x, sigma: mean + std**2 / (std**2 + sigma**2) * (x - mean)  # noqa: E731
  D_w = reference.in_interval(D(M, SMALL), D(0.0, LARGE), SCALE, *INTERVAL)
  start = np.linspace(-1.5, 1.5, 7)
  expected = reference.heun(D_w, sigmas[times], start / alpha[times[0]])
  table, keys = samplers.make_sampler(LINEAR, "heun", num_steps=39), jax.random.split(jax.random.key(0), 7)
  denoise = guided(CLASS, pair_of(CLASS, WIDE), SCALE, INTERVAL)
  got = samplers.sample(table, denoise, keys, (1,), start=jnp.asarray(start[:, None], jnp.float32))[0][:, 0]
  np.testing.assert_allclose(got, expected, rtol=1e-4)


# Classifiers that know: of N(m, c^2) among N(0, C^2), and of three classes.


def ratio_gradient(xt, level):
  """Of log N(x_t; class) - log N(x_t; all), which is log p(class | x_t) and a constant."""
  of_class = (xt - level.alpha * M) / (level.alpha**2 * SMALL**2 + level.sigma**2)
  return xt / (level.alpha**2 * LARGE**2 + level.sigma**2) - of_class


@pytest.mark.parametrize(("name", "options", "p"), SAMPLERS)
def test_every_sampler_draws_the_class_that_an_exact_classifier_asks_for(name, options, p):
  """From the denoiser of all data. Of ancestral sampling the mean moves by its variance."""
  table = samplers.make_sampler(LINEAR, name, **options)
  if name == "ddpm":
    got = moments(table, WIDE, mean_shift(ratio_gradient, samplers.variances(LINEAR, table), 1.0))
  else:
    got = moments(table, classifier_guided(WIDE, ratio_gradient, 1.0))
  np.testing.assert_allclose(got, (M * (1 - (SMALL / np.hypot(SMALL, 80.0)) ** (2 * p)), SMALL), rtol=0.01)


MEANS, STDS = np.array([-0.9, 0.2, 0.7]), np.array([0.1, 0.3, 0.2])


def log_probabilities(xt, level):
  """log p(y | x_t) of three equally likely classes N(mean, std^2), for x_t [B, 1]: [B, 3]."""
  alpha, sigma = at_each(level, xt)
  with jax.numpy_rank_promotion("allow"):
    variance = alpha**2 * STDS**2 + sigma**2
    return jax.nn.log_softmax(-((xt - alpha * MEANS) ** 2) / (2 * variance) - jnp.log(variance) / 2)


def of_three(xt, level):
  """E[x_0 | x_t] of the three together."""
  shares = jnp.exp(log_probabilities(xt, level))
  each = [gaussian(mean, std)(xt, level).x0[:, 0] for mean, std in zip(MEANS, STDS, strict=True)]
  return from_x0((shares * jnp.stack(each, 1)).sum(1, keepdims=True), xt, level)


def test_an_exact_classifier_makes_the_score_of_the_class():
  labels = jnp.asarray([2, 0, 1, 0, 2])
  xt, gradient = jnp.linspace(-1.5, 1.5, 5)[:, None], classifier_gradient(log_probabilities, labels)
  for t in (40, 600):
    level = LINEAR.level(t)
    got = classifier_guided(of_three, gradient, 1.0)(xt, level)
    expected = [gaussian(MEANS[y], STDS[y])(xt[i : i + 1], level) for i, y in enumerate(labels)]
    for mine, theirs in zip(got, zip(*expected, strict=True), strict=True):
      np.testing.assert_allclose(mine, jnp.concatenate(theirs), rtol=1e-3, atol=2e-3, err_msg=f"t = {t}")
    for scale in (0.0, 3.0):  # by as many times as much
      moved = classifier_guided(of_three, gradient, scale)(xt, level).x0 - of_three(xt, level).x0
      np.testing.assert_allclose(moved, scale * (got.x0 - of_three(xt, level).x0), rtol=1e-3, atol=1e-5)
    at_each = classifier_guided(WIDE, gradient, 1.0)(xt, jax.tree.map(lambda v: jnp.full(5, v), level)).x0
    np.testing.assert_allclose(at_each, classifier_guided(WIDE, gradient, 1.0)(xt, level).x0, rtol=1e-5)


def test_a_classifier_comes_after_the_threshold():
  xt, level = jnp.full((1, 1), 1.5), LINEAR.level(20)
  move = lambda xt, level: jnp.full_like(xt, 100.0)  # noqa: E731
  got = classifier_guided(thresholded(CLASS, "static"), move, 1.0)(xt, level).x0
  np.testing.assert_allclose(got, 1.0 + 100 * (1 - LINEAR.alpha_bar[20]) / np.sqrt(LINEAR.alpha_bar[20]), rtol=1e-4)


START, TO_THE_LAST = np.linspace(-1.5, 1.5, 7), classifier_gradient(log_probabilities, jnp.full(7, 2))


@jax.jit
def known(x, t):
  """eps_theta and the gradient of the last class at x [7] and t."""
  level = SHORT.level(t)
  return of_three(x[:, None], level).eps[:, 0], TO_THE_LAST(x[:, None], level)[:, 0]


def eps_theta(x, t):
  return np.asarray(known(x.astype(np.float32), t)[0], np.float64)


def gradient_at(x, t):
  return np.asarray(known(x.astype(np.float32), t)[1], np.float64)


def run(table, denoise, z=None, **options):
  """What `sample` draws from START; the noise z [N, 7] is added after the rows, in place of its own."""
  sigma, rows = jnp.asarray(table.sigma, jnp.float32), len(table.t)
  z = jnp.zeros((rows, 7)) if z is None else jnp.asarray(z, jnp.float32)
  keys, start = jax.random.split(jax.random.key(0), 7), jnp.asarray(START[:, None], jnp.float32)
  added = lambda xs, row: xs + (sigma[row] * z[row])[:, None]  # noqa: E731
  still = table._replace(sigma=np.zeros(rows))
  return jax.jit(
    lambda: samplers.sample(still, denoise, keys, (1,), start=start, after_row=added, **options)[0][:, 0]
  )()


def on_grid(steps):
  """Times of ancestral sampling, 0 first, with the betas that lead from one to the next: `SpacedDiffusion`."""
  times = samplers.sampler_grid(SHORT, "ddpm", num_steps=steps)[::-1]
  return times, np.append(0.0, 1 - SHORT.alpha_bar[times[1:]] / SHORT.alpha_bar[times[:-1]])


@pytest.mark.parametrize("steps", [60, 12])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_ancestral_sampling_is_algorithm_1_of_dhariwal_and_nichol(variance, steps):
  """Of fewer steps with the schedule of these, from which also the variance of the last step is."""
  table = samplers.make_sampler(SHORT, "ddpm", variance=variance, num_steps=steps)
  z = np.random.default_rng(0).standard_normal((steps + 1, 7))
  z[1] = 0
  times, beta = on_grid(steps)
  alpha_bar = np.cumprod(1 - beta)
  posterior = beta[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])  # of t = 1, ..., Ho et al. 2020, eq. 7
  following = {"fixed_large": beta[2:], "fixed_small": posterior[1:]}[variance]
  Sigma = np.concatenate([[0.0], posterior[1:2], following])  # "posterior_variance[1]" at their index 0

  def mu(x, t):  # Ho et al. 2020, eq. 11
    return (x - beta[t] / np.sqrt(1 - alpha_bar[t]) * eps_theta(x, times[t])) / np.sqrt(1 - beta[t])

  wanted = reference.classifier_guided(mu, Sigma, lambda x, t: gradient_at(x, times[t]), 1.5, START, z)
  got = run(table, of_three, z[:0:-1], shift=mean_shift(TO_THE_LAST, samplers.variances(SHORT, table), 1.5))
  np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_the_variance_of_a_single_step_is_that_from_pure_noise():
  """Its mean then moves as far as that of Tweedie's formula, but for a factor of sqrt(alpha_bar)."""
  table = samplers.make_sampler(SHORT, "ddpm", num_steps=1)
  np.testing.assert_allclose(samplers.variances(SHORT, table), 1 - SHORT.alpha_bar[[60]], rtol=1e-12)


def test_ddim_is_algorithm_2_of_dhariwal_and_nichol():
  wanted = reference.classifier_guided_ddim(eps_theta, SHORT.alpha_bar, gradient_at, 1.5, START)
  got = run(samplers.make_sampler(SHORT, "ddim"), classifier_guided(of_three, TO_THE_LAST, 1.5))
  np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)
