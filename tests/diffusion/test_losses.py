"""Pointwise losses by hand; weights by the error of x0 that they are defined on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.forward import q_sample
from ddpm_jax.diffusion.losses import loss_weights, pointwise_loss
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.diffusion.schedules import make_schedule

LINEAR = make_schedule("linear", 1000)


@pytest.mark.parametrize(
  ("loss", "expected"), [("l2", (0.25 + 4 + 9) / 3), ("l1", (0.5 + 2 + 3) / 3), ("huber", (0.125 + 1.5 + 2.5) / 3)]
)
def test_pointwise_losses(loss, expected):
  output, target = jnp.asarray([0.5, 2.0, -3.0]), jnp.zeros(3)
  np.testing.assert_allclose(pointwise_loss(loss, output, target), expected, rtol=1e-6)
  np.testing.assert_allclose(pointwise_loss(loss, output.astype(jnp.bfloat16), target), expected, rtol=1e-6)


@pytest.mark.parametrize("weighting", ["min_snr", "truncated_snr"])
@pytest.mark.parametrize("t", [1, 100, 250, 700])
def test_a_weighted_loss_is_the_same_whatever_is_predicted(weighting, t):
  """Three networks with the same wrong x0_hat pay the same, and pay w(SNR) times the squared error of x0."""
  x0 = jax.random.uniform(jax.random.key(0), (50,), minval=-1, maxval=1)
  eps = jax.random.normal(jax.random.key(1), x0.shape)
  level = LINEAR.level(t)
  xt = q_sample(x0, eps, level)
  x0_hat = x0 + 0.1 * jax.random.normal(jax.random.key(2), x0.shape)
  eps_hat = (xt - LINEAR.sqrt_alpha_bar[t] * x0_hat) / LINEAR.sqrt_one_minus_alpha_bar[t]
  snr = LINEAR.alpha_bar[t] / (1 - LINEAR.alpha_bar[t])
  weight = {"min_snr": min(snr, 5), "truncated_snr": max(snr, 1)}[weighting]
  expected = weight * np.mean((np.asarray(x0_hat) - np.asarray(x0)) ** 2)
  for parameterization in PARAMETERIZATIONS.values():
    output, target = parameterization.target(x0_hat, eps_hat, level), parameterization.target(x0, eps, level)
    loss = loss_weights(weighting, parameterization, LINEAR)[t] * pointwise_loss("l2", output, target)
    np.testing.assert_allclose(loss, expected, rtol=2e-2 if t == 1 else 1e-3)


def test_constant_weight_is_the_simple_loss():
  for parameterization in PARAMETERIZATIONS.values():
    weights = loss_weights("constant", parameterization, LINEAR)
    assert weights[0] == 0 and (weights[1:] == 1).all()


def test_min_snr_never_exceeds_one_for_eps():
  weights = loss_weights("min_snr", PARAMETERIZATIONS["eps"], LINEAR)
  assert weights.max() == pytest.approx(1, abs=1e-12)  # the wrong clamp direction gives max(SNR, 5) / SNR


def test_unknown_names():
  with pytest.raises(ValueError, match="'l3'"):
    pointwise_loss("l3", jnp.zeros(1), jnp.zeros(1))
  with pytest.raises(ValueError, match="'p2'"):
    loss_weights("p2", PARAMETERIZATIONS["eps"], LINEAR)
