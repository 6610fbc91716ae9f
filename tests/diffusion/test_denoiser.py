"""A network that knows the truth leads to the truth, whatever it predicts; what keeps x0 in range."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.denoiser import Denoiser, thresholded
from ddpm_jax.diffusion.forward import q_sample
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.diffusion.schedules import Level, make_schedule

LINEAR = make_schedule("linear", 1000)
NAMES = sorted(PARAMETERIZATIONS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t", [1, 17, 500, 900])
def test_the_target_leads_back_to_x0_and_eps(name, t):
  x0 = jax.random.uniform(jax.random.key(0), (3, 5, 5, 1), minval=-1, maxval=1)
  eps, level = jax.random.normal(jax.random.key(1), x0.shape), LINEAR.level(t)
  xt = jax.vmap(q_sample, (0, 0, None))(x0, eps, level)
  network = lambda *_, **__: PARAMETERIZATIONS[name].target(x0, eps, level)  # noqa: E731
  for given in (level, LINEAR.level(jnp.full(3, t))):
    found = Denoiser(network, PARAMETERIZATIONS[name]).bind({})(xt, given)
    ratio = float(1 / np.sqrt(LINEAR.snr[t]))
    chex.assert_trees_all_close(found.x0, x0, atol=1e-6 * max(1, 5 * ratio))
    chex.assert_trees_all_close(found.eps, eps, atol=1e-5 * max(1, 5 / ratio))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_linear_and_its_functions_are_inverse(name):
  """x0_hat = c_skip x_t + c_out F and target = (x_0 - c_skip x_t) / c_out (Karras et al. 2022, eq. 7), in float64."""
  row, level = PARAMETERIZATIONS[name], Level(np.float64(0.8), np.float64(0.6), 0)
  c_skip, c_out = row.x0_hat(0.0, 1.0, level), row.c_out(level)
  x0, eps, output = np.random.default_rng(0).standard_normal((3, 50))
  xt = level.alpha * x0 + level.sigma * eps
  np.testing.assert_allclose(row.x0_hat(output, xt, level), c_skip * xt + c_out * output, rtol=1e-12)
  np.testing.assert_allclose(row.target(x0, eps, level), (x0 - c_skip * xt) / c_out, rtol=1e-9, atol=1e-12)


def test_v_is_the_velocity_on_the_circle():
  """With alpha = cos(phi), sigma = sin(phi): v = d x_t / d phi (Salimans and Ho 2022, appendix D)."""
  level, x0, eps = LINEAR.level(np.asarray(300)), 0.7, -1.2
  phi = np.arccos(level.alpha)
  x = lambda p: np.cos(p) * x0 + np.sin(p) * eps  # noqa: E731
  derivative = (x(phi + 1e-6) - x(phi - 1e-6)) / 2e-6
  np.testing.assert_allclose(PARAMETERIZATIONS["v"].target(x0, eps, level), derivative, rtol=1e-5)


def test_what_the_network_is_given():
  """The parameters, x_t, the time of each example, counted from 0 for t = 1, and the condition; no dropout."""
  seen = []

  def network(params, x, time, cond, *, dropout_keys=None):
    seen.append((params, x, time, cond, dropout_keys))
    return x

  xt = jnp.ones((2, 3))
  denoise = Denoiser(network, PARAMETERIZATIONS["x0"]).bind({"w": 1}, cond="label")
  denoise(xt, LINEAR.level(7))
  denoise(xt, LINEAR.level(jnp.asarray([1, 1000])))
  for (params, x, time, cond, keys), expected in zip(seen, ([6, 6], [0, 999]), strict=True):
    assert (params, cond, keys) == ({"w": 1}, "label", None) and x is xt
    assert time.tolist() == expected


def test_denoisers_are_equal_by_value():
  network = lambda *_: None  # noqa: E731
  one, same, other = (Denoiser(network, PARAMETERIZATIONS[name]) for name in ("eps", "eps", "v"))
  assert one == same and hash(one) == hash(same) and one != other


def test_thresholds():
  x0 = np.random.default_rng(0).normal(0, [[0.3], [1.5]], (2, 400)).astype(np.float32).reshape(2, 20, 20)
  xt, level = jnp.ones((2, 20, 20)), LINEAR.level(500)
  denoise = Denoiser(lambda *_, **__: jnp.asarray(x0), PARAMETERIZATIONS["x0"]).bind({})
  keep = lambda how, quantile=0.9: np.asarray(thresholded(denoise, how, quantile)(xt, level).x0)  # noqa: E731
  np.testing.assert_array_equal(keep("none"), x0)
  np.testing.assert_array_equal(keep("static"), x0.clip(-1, 1))
  for quantile in (0.5, 0.9, 0.995, 1.0):
    limits = [max(1.0, np.quantile(np.abs(x), quantile)) for x in x0]
    assert quantile == 0.5 or (limits[1] > 1.05 and (limits[0] == 1.0 or quantile == 1.0))
    expected = np.stack([x.clip(-limit, limit) / limit for x, limit in zip(x0, limits, strict=True)])
    np.testing.assert_allclose(keep("dynamic", quantile), expected, rtol=2e-6, atol=1e-7)
  with pytest.raises(ValueError, match="'soft'"):
    keep("soft")


def test_eps_follows_a_threshold_and_comes_after_the_conversion_to_x0():
  """alpha x0 + sigma eps is x_t again. Of v, at x_t = 0: x0 = -sigma v."""
  level, xt = LINEAR.level(jnp.asarray([5, 600])), jnp.zeros((2, 3))
  network = lambda *_, **__: jnp.asarray([[0.1, 0.2, 0.3], [1.0, 2.0, 4.0]]) / -level.sigma[:, None]  # noqa: E731
  found = thresholded(Denoiser(network, PARAMETERIZATIONS["v"]).bind({}), "dynamic", 0.5)(xt, level)
  np.testing.assert_allclose(found.x0, [[0.1, 0.2, 0.3], [0.5, 1.0, 1.0]], rtol=1e-6)
  a, b = level.alpha[:, None], level.sigma[:, None]
  np.testing.assert_allclose(a * found.x0 + b * found.eps, xt, atol=1e-6)
