"""Statistics of latents: closed forms and NumPy over all images at once."""

import numpy as np
import pytest
from scipy import integrate, stats

from ddpm_jax.evaluation.latents import (
  add_latents,
  channels,
  codebook_use,
  kl_from_normal,
  no_latents,
  perplexity,
)

RNG = np.random.default_rng(0)


def of_all(mean, log_variance=None, sizes=(1, 5, 14)):
  sums = no_latents(mean.shape[1:])
  for first, last in zip(np.cumsum((0, *sizes)), np.cumsum(sizes), strict=False):
    sums = add_latents(sums, mean[first:last], None if log_variance is None else log_variance[first:last])
  assert sums.count == len(mean)
  return channels(sums)


def test_kl_is_the_integral():
  for mean, log_variance in ((0.0, 0.0), (1.5, -3.0), (-0.4, 0.7)):
    q = stats.norm(mean, np.exp(log_variance / 2))
    area, _ = integrate.quad(lambda x: q.pdf(x) * (q.logpdf(x) - stats.norm.logpdf(x)), -12, 12)  # noqa: B023
    assert kl_from_normal(np.asarray(mean), np.asarray(log_variance)) == pytest.approx(area, abs=1e-8)


def test_channels_in_batches_are_those_of_all_images():
  offset, scale = np.asarray([300.0, 0, -2]), np.asarray([1e-3, 2, 1])  # a mean far from 0 costs no digits
  mean = (RNG.normal(size=(20, 4, 5, 3)) * scale + offset).astype(np.float32)
  log_variance = RNG.normal(-2, 1, mean.shape).astype(np.float32)
  found = of_all(mean, log_variance)
  exact, variance = mean.astype(np.float64), np.exp(log_variance.astype(np.float64))
  np.testing.assert_allclose(found.mean, exact.mean((0, 1, 2)), rtol=1e-12)
  # The law of total variance, of draws from the posteriors.
  np.testing.assert_allclose(found.std, np.sqrt(exact.var((0, 1, 2)) + variance.mean((0, 1, 2))), rtol=1e-9)
  kl = (exact**2 + variance - 1 - log_variance) / 2
  np.testing.assert_allclose(found.kl, kl.sum((1, 2)).mean(0), rtol=1e-6)
  assert found.active.tolist() == [0, 1, 1], "of the first channel no unit tells images apart"
  plain = of_all(mean)
  np.testing.assert_allclose(plain.std, exact.std((0, 1, 2)), rtol=1e-9)
  assert plain.kl.tolist() == [0, 0, 0]


def test_a_unit_is_active_if_its_mean_differs_between_images():
  mean = np.zeros((20, 2, 2, 1))
  mean[:, 0, 0, 0] = np.arange(20)
  mean[:, 0, 1, 0] = 7.0  # elsewhere than 0, but everywhere the same
  assert of_all(mean).active.tolist() == [0.25]
  with pytest.raises(ValueError, match="no images"):
    channels(no_latents((2, 2, 1)))
  with pytest.raises(ValueError, match="shape"):
    add_latents(no_latents((2, 2, 1)), mean[:, :1])


def test_perplexity_of_known_histograms():
  assert perplexity(np.full(8, 3)) == pytest.approx(8)
  assert perplexity(np.asarray([0, 9, 0])) == pytest.approx(1)
  assert perplexity(np.asarray([1, 2, 1, 0])) == pytest.approx(2**1.5), "H is 1.5 bits"
  assert codebook_use(np.asarray([1, 2, 1, 0])) == 0.75
  for function in (perplexity, codebook_use):
    with pytest.raises(ValueError, match="no code occurs"):
      function(np.zeros(3, int))
