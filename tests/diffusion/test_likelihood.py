"""The bound and the ODE's density against data whose entropy and whose perfect denoiser are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from scipy import special, stats

from ddpm_jax.diffusion import likelihood
from ddpm_jax.diffusion.denoiser import Denoiser, Prediction
from ddpm_jax.diffusion.forward import prior_kl, q_sample
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.diffusion.schedules import make_schedule

LINEAR = make_schedule("linear", 1000)
COSINE = make_schedule("cosine", 1000)
PIXELS = np.arange(256) / 127.5 - 1
HALF = 1 / 255  # of a bin


def variances(schedule, t):
  """The variances of q(x_{t-1} | x_t, x_0) and of p, written out: Ho et al. section 3.2 and eq. 7."""
  beta, ab = schedule.betas, schedule.alpha_bar
  small = beta[t] * (1 - ab[t - 1]) / (1 - ab[t])
  return small, {"fixed_small": small, "fixed_large": beta[t]}


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("t", [2, 3, 300, 1000])
def test_kl_of_two_gaussians(variance, t):
  """By quadrature of q log(q / p), with the means of Ho et al. eq. 7, which know x_t."""
  x0, x0_hat, xt = np.asarray([0.3, -0.2]), np.asarray([0.25, 0.6]), np.asarray([-0.7, 0.9])
  beta, ab = LINEAR.betas[t], LINEAR.alpha_bar
  q_variance, p_variance = variances(LINEAR, t)
  of_x0, of_xt = np.sqrt(ab[t - 1]) * beta, np.sqrt(1 - beta) * (1 - ab[t - 1])
  nats = []
  for start, estimate, now in zip(x0, x0_hat, xt, strict=True):
    q = stats.norm((of_x0 * start + of_xt * now) / (1 - ab[t]), np.sqrt(q_variance))
    p = stats.norm((of_x0 * estimate + of_xt * now) / (1 - ab[t]), np.sqrt(p_variance[variance]))
    grid = np.linspace(*q.interval(1 - 1e-15), 20001)
    nats.append(np.trapezoid(q.pdf(grid) * (q.logpdf(grid) - p.logpdf(grid)), grid))
  got = likelihood.posterior_kl(LINEAR, variance, jnp.asarray(x0), t, jnp.asarray(x0_hat))
  np.testing.assert_allclose(got, np.mean(nats) / np.log(2), rtol=1e-5)


def test_kl_of_a_perfect_estimate():
  small, large = (
    likelihood.posterior_kl(LINEAR, kind, jnp.ones(2), 2, jnp.ones(2)) for kind in ("fixed_small", "fixed_large")
  )
  q, p = variances(LINEAR, 2)
  assert small == 0
  np.testing.assert_allclose(
    large, (np.log(p["fixed_large"] / q) + q / p["fixed_large"] - 1) / 2 / np.log(2), rtol=1e-6
  )


def decoder_log_p(x0, mean, sigma):
  """log of the integral of N(mean, sigma^2) over the bin of x0, in float64: a quadrature that never underflows."""
  if x0 == -1 or x0 == 1:
    return stats.norm.logcdf(HALF + x0 * (mean - x0), scale=sigma)
  nodes, weights = np.polynomial.legendre.leggauss(200)
  return special.logsumexp(stats.norm.logpdf(x0 + HALF * nodes, mean, sigma), b=HALF * weights)


def decoder_bits(schedule, variance, x0, means):
  """float64 [len(x0), len(means)]."""
  one = lambda x, mean: likelihood.decoder_bits(schedule, variance, jnp.full(2, x), jnp.full(2, mean))  # noqa: E731
  function = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
  return np.asarray(function(jnp.asarray(x0, jnp.float32), jnp.asarray(means, jnp.float32)), np.float64)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, make_schedule("cosine", 10)])
def test_decoder_also_far_from_the_mean(schedule):
  beta, ab = schedule.betas, schedule.alpha_bar
  sigma = np.sqrt(beta[2] * (1 - ab[1]) / (1 - ab[2]))
  assert (schedule is not LINEAR) or abs(sigma - 0.0073845) < 1e-6  # up to 270 sigma from 1 to -1
  x0, means = PIXELS[[0, 1, 127, 200, 254, 255]], (-1.0, -0.999, -0.3, PIXELS[200] + 0.001, 0.57, 0.75, 1.0)
  got = decoder_bits(schedule, "fixed_large", x0, means)
  expected = [[-decoder_log_p(x, mean, sigma) / np.log(2) for mean in means] for x in x0]
  np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("schedule", "variance"), [(LINEAR, "fixed_small"), (make_schedule("cosine", 9), "fixed_large")]
)
def test_decoder_is_a_distribution_over_256_values(schedule, variance):
  bits = decoder_bits(schedule, variance, PIXELS, (-1.0, -0.9985, 0.1234, 1.0))
  np.testing.assert_allclose(np.sum(2.0**-bits, axis=0), 1, rtol=1e-5)


def test_bound_term_is_the_decoder_at_1_and_a_kl_from_2():
  x0, x0_hat = jnp.asarray([1.0, -1.0, PIXELS[100]], jnp.float32), jnp.asarray([-1.0, 0.5, -0.2])
  terms = [likelihood.bound_term(LINEAR, "fixed_large", x0, t, x0_hat) for t in (1, 2, 1000)]
  assert np.isfinite(terms).all()
  assert terms[0] == likelihood.decoder_bits(LINEAR, "fixed_large", x0, x0_hat)
  assert terms[1] == likelihood.posterior_kl(LINEAR, "fixed_large", x0, 2, x0_hat)
  assert terms[2] == likelihood.posterior_kl(LINEAR, "fixed_large", x0, 1000, x0_hat)


@pytest.mark.parametrize(("num_timesteps", "number"), [(1000, 0), (1000, 1000), (10, 100), (1, 0), (1, 5), (2, 1)])
def test_every_timestep_is_a_stratum(num_timesteps, number):
  assert likelihood.strata(num_timesteps, number).tolist() == list(range(1, num_timesteps + 2))


@pytest.mark.parametrize(("num_timesteps", "number"), [(1000, 100), (1000, 2), (1000, 999), (4000, 7), (3, 2), (10, 9)])
def test_strata_cover_each_timestep_once_and_grow(num_timesteps, number):
  edges = likelihood.strata(num_timesteps, number)
  assert edges.dtype == np.int64 and len(edges) == number + 1
  assert edges[:2].tolist() == [1, 2] and edges[-1] == num_timesteps + 1
  sizes = np.diff(edges)
  assert sizes.min() == 1 and (np.diff(sizes) >= -1).all()  # up to rounding
  # The last of them is r^(number - 1), r the growth with 1 + r + ... + r^(number - 1) = T.
  growth = sizes[-1] ** (1 / (number - 1))
  np.testing.assert_allclose(np.sum(growth ** np.arange(number)), num_timesteps, rtol=0.02, atol=1)
  np.testing.assert_allclose(sizes, growth ** np.arange(number), atol=1 + 0.01 * sizes[-1])


def test_one_stratum_is_too_few_to_have_the_decoder_exact():
  assert likelihood.strata(1000, 1).tolist() == [1, 2, 1001]


def of_eps(eps):
  """The denoise function of (x_t, level) -> eps_hat."""

  def denoise(xt, level):
    eps_hat = eps(xt, level)
    return Prediction((xt - level.sigma * eps_hat) / level.alpha, eps_hat)

  return denoise


def gaussian(mean, std):
  """eps_hat = -sigma times the score of N(alpha mean, alpha^2 std^2 + sigma^2)."""
  return of_eps(lambda xt, a: a.sigma * (xt - a.alpha * mean) / (a.alpha**2 * std**2 + a.sigma**2))


@pytest.mark.parametrize(
  ("schedule", "variance", "gap"),
  [(LINEAR, "fixed_large", 0.122), (LINEAR, "fixed_small", 0.750), (COSINE, "fixed_small", 0.647)],
)
def test_bound_of_gaussian_pixels_is_just_above_their_entropy(schedule, variance, gap):
  """All 1,000 terms with the perfect denoiser of N(mean, std^2), against closed forms and the entropy.

  The gap to the entropy is that of the model, whose variance is too small for the first steps, not of the estimate:
  `fixed_large` is close to the true one.
  """
  mean, std, number = 0.1, 0.25, 1000
  edges = np.concatenate([[-np.inf], PIXELS[1:] - HALF, [np.inf]])
  p = np.diff(stats.norm.cdf(edges, mean, std))
  entropy = -np.sum(special.xlogy(p, p)) / np.log(2)
  quantiles = (np.arange(number) + 0.5) / number
  half = PIXELS[np.searchsorted(np.cumsum(p), quantiles)]
  x0 = jnp.asarray(np.concatenate([half, half]), jnp.float32)
  normal = stats.norm.ppf(quantiles)
  normal = jax.random.permutation(jax.random.key(0), jnp.asarray(normal / normal.std(), jnp.float32))
  denoise = gaussian(mean, std)

  def term(t):
    eps = jnp.roll(normal, t)  # a variance of exactly 1, and, with both signs, no correlation with x0
    xt = q_sample(x0, jnp.concatenate([eps, -eps]), schedule.level(t))
    return likelihood.bound_term(schedule, variance, x0, t, jnp.clip(denoise(xt, schedule.level(t)).x0, -1, 1))

  terms = np.asarray(jax.jit(lambda: jax.lax.map(term, jnp.arange(1, 1001)))(), np.float64)
  # The mean squared error of a perfect estimate is the variance of x_0 given x_t.
  t = np.arange(1, 1001)
  ab, (q, both) = schedule.alpha_bar, variances(schedule, t[1:])
  mse = 1 / (1 / std**2 + ab[t] / (1 - ab[t]))
  weight = ab[t - 1] * (schedule.betas[t] / (1 - ab[t])) ** 2
  ratio = q / both[variance]
  expected = (ratio - 1 - np.log(ratio) + weight[1:] * mse[1:] / both[variance]) / 2 / np.log(2)
  np.testing.assert_allclose(terms[1:], expected, rtol=0.05)
  np.testing.assert_allclose(terms[1:].sum(), expected.sum(), rtol=1e-3)
  error, sigma = np.sqrt(mse[0]) * stats.norm.ppf(quantiles), np.sqrt(q[0])
  inside = np.log2(stats.norm.cdf((error + HALF) / sigma) - stats.norm.cdf((error - HALF) / sigma))
  np.testing.assert_allclose(terms[0], -inside.mean(), rtol=5e-3)
  total = terms.sum() + float(prior_kl(schedule, x0))
  assert entropy < total
  np.testing.assert_allclose(total - entropy, gap, atol=0.005)


def evaluate(schedule, denoise, x0, num_steps, num_probes=1, seed=0):
  keys = jax.random.split(jax.random.key(seed), len(x0))
  function = jax.jit(
    lambda x: likelihood.ode_log_density(schedule, denoise, x, keys, num_steps=num_steps, num_probes=num_probes)
  )
  return np.asarray(function(jnp.asarray(x0, jnp.float32)), np.float64)


def test_ode_of_gaussian_data_is_its_density_to_second_order():
  """Three pixels, which do not depend on each other; their Jacobian is diagonal and Hutchinson's estimate exact.

  The exact flow: xbar - mean grows as the deviation of the data and noise does, sqrt(std^2 + sbar^2). Up to sbar_1,
  where the ODE keeps eps_hat as it is at t = 1, it grows as e^(sbar / sbar_1 G).
  """
  mean, std = 0.2, 0.3
  x0 = mean + std * np.asarray([[0.0, 1.0, -1.0], [0.5, 2.0, 0.1], [-1.5, -1.0, 1.0]])
  first, last = np.sqrt(1 / LINEAR.snr[[1, 1000]])
  scale = np.exp(first**2 / (std**2 + first**2)) * np.hypot(std, last) / np.hypot(std, first)
  a = LINEAR.sqrt_alpha_bar[1000]
  expected = (stats.norm.logpdf(a * (mean + (x0 - mean) * scale)) + np.log(a * scale)).sum(axis=1)
  # Beside the part up to sbar_1 there is the prior, as x_T is not quite N(0, I).
  np.testing.assert_allclose(expected, stats.norm.logpdf(x0, mean, std).sum(axis=1), atol=0.01)
  steps = np.asarray([25, 50, 100])
  denoise = gaussian(mean, std)
  errors = [np.abs(evaluate(LINEAR, denoise, x0, n) - expected).max() for n in steps]
  slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
  assert -2.2 < slope < -1.8
  assert errors[-1] < 0.006  # nats, of 3 dimensions
  np.testing.assert_allclose(evaluate(LINEAR, denoise, x0, 1000), expected, atol=6e-4)


def test_ode_of_a_mixture_is_its_density():
  """0.3 N(-0.5, 0.2^2) + 0.7 N(0.4, 0.1^2): the network is the exact score; the density is known, and is one.

  With the cosine schedule, whose last steps are so long in sbar that the trapezoidal rule in it is 12 nats off.
  """
  schedule = COSINE
  weights, means, stds = (jnp.asarray(v) for v in ([0.3, 0.7], [-0.5, 0.4], [0.2, 0.1]))

  def log_p(x, ab, noise):
    return jax.nn.logsumexp(
      jax.scipy.stats.norm.logpdf(x, jnp.sqrt(ab) * means, jnp.sqrt(ab * stds**2 + noise)), b=weights
    )

  def eps(xt, level):
    score = jax.vmap(jax.grad(log_p), (0, None, None))(xt[:, 0], level.alpha**2, level.sigma**2)
    return (-level.sigma * score)[:, None]

  x0 = np.linspace(-2, 2, 401)[:, None]
  got = evaluate(schedule, of_eps(eps), x0, 200)
  expected = np.asarray(jax.vmap(log_p, (0, None, None))(jnp.asarray(x0[:, 0]), 1.0, 0.0))
  likely = np.exp(expected) > 0.05
  np.testing.assert_allclose(got[likely], expected[likely], atol=0.02)
  np.testing.assert_allclose(np.trapezoid(np.exp(got), x0[:, 0]), 1, atol=2e-3)


VARIANCES = np.asarray([0.7, 0.2])
TURN = np.asarray([[0.8, -0.6], [0.6, 0.8]])


@of_eps
def correlated(xt, level):
  """For N(0, C), C with the eigenvalues VARIANCES and the eigenvectors TURN: its Jacobian is not diagonal."""
  turn, variances = jnp.asarray(TURN, jnp.float32), jnp.asarray(VARIANCES, jnp.float32)[None]
  return (level.sigma * (xt @ turn) / (level.alpha**2 * variances + level.sigma**2)) @ turn.T


def test_hutchinsons_estimate_is_unbiased_and_more_probes_are_more_exact():
  """In two dimensions v . J v is J_11 + J_22 + 2 J_12 or J_11 + J_22 - 2 J_12: the middle of the two is the trace."""
  x0 = np.tile([0.4, -0.6], (400, 1))
  expected = stats.multivariate_normal.logpdf(x0[0], np.zeros(2), TURN @ np.diag(VARIANCES) @ TURN.T)
  one, eight = (evaluate(LINEAR, correlated, x0, 100, probes) for probes in (1, 8))
  low, high = one.min(), one.max()
  assert high - low > 1 and np.minimum(one - low, high - one).max() < 1e-3
  np.testing.assert_allclose((low + high) / 2, expected, atol=0.01)
  assert abs(np.mean(one > expected) - 0.5) < 4 * 0.5 / np.sqrt(len(x0))
  np.testing.assert_allclose(one.std() / eight.std(), np.sqrt(8), rtol=0.2)


def test_probes_share_one_evaluation_of_the_network():
  """Of each step's two, each of all examples once, however many probes there are."""

  def evaluations(jaxpr, times=1):
    for equation in jaxpr.eqns:
      if equation.primitive.name == "tanh":
        yield equation.outvars[0].aval.shape, times
      for inner in jaxprs_in_params(equation.params):
        yield from evaluations(inner, times * equation.params.get("length", 1))

  def density(x0):
    keys = jax.random.split(jax.random.key(0), len(x0))
    return likelihood.ode_log_density(LINEAR, of_eps(lambda xt, _: jnp.tanh(xt)), x0, keys, num_steps=4, num_probes=5)

  found = list(evaluations(jax.make_jaxpr(density)(jnp.zeros((3, 2))).jaxpr))
  assert found == [((3, 2), likelihood.ode_evaluations(4) // 2)] * 2


def test_density_of_an_example_depends_on_its_own_key_alone():
  x0 = jnp.asarray([[0.4, -0.6], [0.4, -0.6], [0.1, 0.3], [0.4, -0.6]])
  keys = jax.random.split(jax.random.key(3), 4)

  @jax.jit
  def density(rows):
    arguments = dict(num_steps=3, num_probes=5)
    return likelihood.ode_log_density(LINEAR, correlated, x0[rows], keys[rows], **arguments)

  got = density(jnp.arange(4))
  np.testing.assert_allclose(density(jnp.asarray([3, 0, 2, 2])), got[np.asarray([3, 0, 2, 2])], rtol=1e-5)
  assert len(np.unique(np.round(got, 3))) > 2


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_eps_is_the_same_whatever_is_predicted(prediction):
  """Also where x0_hat is far outside [-1, 1]."""
  parameterization, denoise = PARAMETERIZATIONS[prediction], gaussian(0.2, 0.8)

  def network(params, x, time, cond):
    return jax.vmap(lambda x, level: parameterization.target(*denoise(x, level), level))(x, LINEAR.level(time + 1))

  xt, level = jax.random.normal(jax.random.key(0), (3, 5)) * 3, LINEAR.level(jnp.asarray([1, 400, 1000]))
  eps = Denoiser(network, parameterization).bind({})(xt, level).eps
  np.testing.assert_allclose(eps, jax.vmap(denoise)(xt, level).eps, atol=1e-4)


def test_the_grid_of_the_ode():
  table = likelihood.ode_table(LINEAR, 60)
  t = table.level.time + 1
  assert (t[:8] == 1).all()  # the network is not defined at 0
  times = t[8:]
  assert len(times) == 60 and (np.diff(times) > 0).all() and times[0] == 1 and times[-1] == 1000
  sbar = np.concatenate([[0], np.cumsum(table.step)[:-1]])
  np.testing.assert_allclose(sbar[8:], np.sqrt((1 - LINEAR.alpha_bar) / LINEAR.alpha_bar)[times], rtol=1e-9)
  np.testing.assert_allclose(sbar[:9], sbar[8] * np.arange(9) / 8, rtol=1e-9)
  np.testing.assert_allclose(table.scale[8:], LINEAR.sqrt_alpha_bar[times])
  np.testing.assert_allclose(table.scale[:8], 1 / np.sqrt(1 + sbar[:8] ** 2))
  assert table.step[-1] == 0
  # Exact for a divergence of 1 / sbar, whose integral over [sbar_1, sbar_T] is a logarithm, and of 1 / sbar_1 before.
  inverse = np.concatenate([np.full(8, 1 / sbar[8]), 1 / sbar[8:]])
  np.testing.assert_allclose(np.sum(table.weight * inverse), 1 + np.log(sbar[-1] / sbar[8]), rtol=1e-9)
  assert len(likelihood.ode_table(LINEAR, 1).step) == 9
  with pytest.raises(ValueError, match="num_steps"):
    likelihood.ode_table(LINEAR, 1001)


@pytest.mark.parametrize("std", [0.0, 0.01, 0.1])
def test_ode_of_pixels_that_hardly_vary_is_a_density(std):
  """The network of t = 1 is steep there. The integral over all x_0 is 1, whatever the network says below t = 1."""
  x0 = np.linspace(-1, 1, 2001)[:, None] * max(6 * std, 0.06)
  got = evaluate(LINEAR, gaussian(0.0, std), x0, 200)
  np.testing.assert_allclose(np.trapezoid(np.exp(got), x0[:, 0]), 1, atol=6e-3)


def test_density_of_no_noise_at_all():
  """A network that predicts 0 leaves xbar where it is: x_0 ~ N(0, I / alpha_bar_T)."""
  x0 = np.asarray([[0.5, -0.5, 100.0]])
  expected = stats.norm.logpdf(x0, scale=1 / LINEAR.sqrt_alpha_bar[-1]).sum()
  got = evaluate(LINEAR, of_eps(lambda xt, _: jnp.zeros_like(xt)), x0, 4)
  np.testing.assert_allclose(got, [expected], rtol=1e-6)


def test_dequantised_pixels_fill_their_bins():
  x0 = jnp.tile(jnp.asarray([-1.0, PIXELS[77], 1.0], jnp.float32), 2000)
  spread = np.asarray(likelihood.dequantise(jax.random.key(0), x0) - x0, np.float64)
  assert np.abs(spread).max() <= HALF + 1e-6
  assert stats.kstest(spread, stats.uniform(-HALF, 2 * HALF).cdf).pvalue > 0.01


def test_bits_of_a_density():
  """Uniform over the 256 bins: 8 bits. A wide Gaussian: the probabilities of its bins, which are narrow."""
  shape = (4, 4, 3)
  uniform = np.full(2, -np.log(256 * 2 * HALF) * 48)
  np.testing.assert_allclose(likelihood.density_to_bits(uniform, 48), [8, 8], rtol=1e-12)
  x0 = np.random.default_rng(0).choice(PIXELS, size=(5, *shape))
  log_density = stats.norm.logpdf(x0).sum(axis=(1, 2, 3))
  p = stats.norm.cdf(x0 + HALF) - stats.norm.cdf(x0 - HALF)
  np.testing.assert_allclose(likelihood.density_to_bits(log_density, 48), -np.log2(p).mean(axis=(1, 2, 3)), rtol=1e-5)
