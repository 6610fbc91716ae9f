"""The schedules against published numbers, an exact-arithmetic product and closed forms."""

import decimal

import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion.forward import prior_kl
from ddpm_jax.diffusion.schedules import at, make_schedule, posterior, reverse_variance

# Computed in float64 from the formulas of Ho et al. 2020 and of Nichol and Dhariwal 2021. Columns, with Ho's code
# counting from 0 and ours from 1: alpha_bar at t = 1, T/2 + 1 and T; the posterior variance at t = 2; the log of the
# fixed-large variance at t = 1; L_T for x0 = +-1 in bits/dim.
GOLDEN = {
  ("linear", 1000): (0.9999, 0.0777966584, 4.0358297654e-05, 5.4531876613e-05, -9.8167251353, 2.911e-05),
  ("linear", 4000): (0.999975, 0.0787464752, 4.2466522758e-05, 1.2803628616e-05, -11.2657819417, 3.063e-05),
  ("cosine", 1000): (0.9999587158, 0.4922851724, 2.4287669070e-09, 2.1789496146e-05, -10.7340825325, 1.752e-09),
  ("cosine", 4000): (0.9999901342, 0.4934539797, 1.5179804689e-10, 5.0076833952e-06, -12.2045371460, 1.095e-10),
}
ALL = ("linear", "quadratic", "scaled_linear", "cosine", "sigmoid")


def _golden_schedule(name, num_timesteps):
  scale = 1000 / num_timesteps  # the betas of a longer chain shrink with it (Nichol and Dhariwal)
  betas = dict(beta_start=1e-4 * scale, beta_end=0.02 * scale) if name == "linear" else {}
  return make_schedule(name, num_timesteps, **betas)


@pytest.mark.parametrize(("name", "num_timesteps"), GOLDEN)
def test_golden_numbers(name, num_timesteps):
  schedule = _golden_schedule(name, num_timesteps)
  first, middle, last, variance, log_variance, l_t = GOLDEN[name, num_timesteps]
  got = schedule.alpha_bar[[1, num_timesteps // 2 + 1, num_timesteps]]
  np.testing.assert_allclose(got, [first, middle, last], rtol=1e-9)
  np.testing.assert_allclose(posterior(schedule, 1, 2).variance, variance, rtol=1e-9)
  large = reverse_variance(schedule, "fixed_large", np.asarray(0), np.asarray(1))
  np.testing.assert_allclose(np.log(large), log_variance, rtol=1e-10)
  np.testing.assert_allclose(prior_kl(schedule, jnp.asarray([1.0, -1.0])), l_t, rtol=1e-3)


def test_alpha_bar_against_exact_arithmetic():
  decimal.getcontext().prec = 50
  start, end = decimal.Decimal("1e-4"), decimal.Decimal("0.02")
  product = decimal.Decimal(1)
  for i in range(1000):
    product *= 1 - (start + (end - start) * i / 999)
  table = make_schedule("linear", 1000).alpha_bar
  np.testing.assert_allclose(table[-1], float(product), rtol=1e-12)


def test_the_trap_of_float32():
  """1 - alpha_bar_1 = 1e-4 is off by a relative 1.7e-4 in float32; the tables are not."""
  single = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float32), dtype=np.float32)
  assert abs((1 - single[0]) / 1e-4 - 1) > 1.6e-4
  np.testing.assert_allclose(at(make_schedule("linear", 1000).sqrt_one_minus_alpha_bar, 1), 0.01, rtol=1e-7)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("num_timesteps", [1, 2, 50, 1000])
def test_tables_run_from_data_to_noise(name, num_timesteps):
  schedule = make_schedule(name, num_timesteps)
  assert schedule.num_timesteps == num_timesteps
  assert schedule.alpha_bar.dtype == np.float64 and schedule.alpha_bar.shape == (num_timesteps + 1,)
  assert schedule.alpha_bar[0] == 1 and schedule.betas[0] == 0
  assert (np.diff(schedule.alpha_bar) < 0).all() and (schedule.alpha_bar > 0).all()
  np.testing.assert_allclose(schedule.sqrt_alpha_bar**2 + schedule.sqrt_one_minus_alpha_bar**2, 1)
  np.testing.assert_allclose(np.exp(schedule.log_snr[1:]), schedule.snr[1:])


def test_shapes_of_the_schedules():
  t = np.arange(1000) / 999
  root = 0.01 + (0.02**0.5 - 0.01) * t
  np.testing.assert_allclose(make_schedule("quadratic", 1000).betas[1:], root**2)
  latent = make_schedule("scaled_linear", 1000, beta_start=0.0015, beta_end=0.0195).betas
  # Latent Diffusion's table: its square root is an arithmetic progression from sqrt(0.0015) to sqrt(0.0195).
  np.testing.assert_allclose(np.diff(np.sqrt(latent[1:])), (0.0195**0.5 - 0.0015**0.5) / 999)
  sigmoid = make_schedule("sigmoid", 1001).betas
  np.testing.assert_allclose(sigmoid[501], (1e-4 + 0.02) / 2)  # half-way at the middle
  np.testing.assert_allclose(sigmoid[1] - 1e-4, (0.02 - 1e-4) * 0.0024726231566)  # the logistic function at -6
  assert make_schedule("cosine", 1000).betas.max() == 0.999


def test_reverse_variance():
  schedule = make_schedule("linear", 1000)
  t = np.arange(1, 1001)
  large, small = (reverse_variance(schedule, kind, t - 1, t) for kind in ("fixed_large", "fixed_small"))
  np.testing.assert_allclose(large[1:], schedule.betas[2:])
  beta, ab = schedule.betas, schedule.alpha_bar
  np.testing.assert_allclose(small[1:], (beta[2:] * (1 - ab[1:-1]) / (1 - ab[2:])), rtol=1e-9)
  assert large[0] == small[0] == small[1] > 0  # index 0 <- index 1: the decoder's width
  assert (small[1:] < large[1:]).all()
  assert posterior(schedule, 0, 1).variance == 0


def test_a_step_over_several_timesteps_is_the_product_of_its_parts():
  schedule = make_schedule("linear", 1000)
  alphas = 1 - schedule.betas
  np.testing.assert_allclose(schedules.step_beta(schedule, 100, 110), 1 - np.prod(alphas[101:111]))


@pytest.mark.parametrize(
  "betas",
  [
    np.array([0.0, 1.0]),
    np.array([0.1, 0.1]),
    np.array([0.0, -0.1]),
    np.array([0.0, np.nan]),
    np.array([0.0, 0.1], np.float32),
  ],
)
def test_impossible_betas(betas):
  with pytest.raises(ValueError, match="beta"):
    schedules.NoiseSchedule(betas)


def test_unknown_schedule():
  with pytest.raises(ValueError, match="'lineal'"):
    make_schedule("lineal", 10)


def test_the_betas_that_are_proposed_reach_noise_for_every_length():
  """By the sum of log(1 - beta); 2% less would not do."""
  wrong, none = [], []
  for name in ("linear", "quadratic", "sigmoid"):
    for num_timesteps in [*range(10, 100), *range(100, 951, 25)]:
      found = schedules.betas_that_reach_noise(name, num_timesteps, 1e-4, 0.02)
      if found is None:
        none.append((name, num_timesteps))
        continue
      start, end = found
      log_signal = np.sum(np.log1p(-make_schedule(name, num_timesteps, beta_start=start, beta_end=end).betas)) / 2
      less = make_schedule(name, num_timesteps, beta_start=0.98 * start, beta_end=0.98 * end)
      largest = less.sqrt_alpha_bar[-1]
      if not (0 < start < end < 1 and np.exp(log_signal) <= 2 / 255 < largest):
        wrong.append((name, num_timesteps, found))
  assert not wrong
  assert none == [("quadratic", 10), ("quadratic", 11)]  # beta_T would have to be nearly 1
  assert all(schedules.reaches_noise(make_schedule("cosine", t)) for t in range(7, 1001))


def test_the_paper_reaches_noise_and_its_betas_with_fewer_steps_do_not():
  assert schedules.reaches_noise(make_schedule("linear", 1000))
  for num_timesteps in (10, 100, 900):
    schedule = make_schedule("linear", num_timesteps)
    assert not schedules.reaches_noise(schedule)
    x0 = jnp.asarray([1.0, -1.0])  # of which the most is left
    np.testing.assert_allclose(schedules.largest_prior_kl(schedule), prior_kl(schedule, x0), rtol=1e-5)
  np.testing.assert_allclose(make_schedule("linear", 100).sqrt_alpha_bar[-1], 0.603, atol=5e-4)
