"""PSNR and SSIM: closed forms, and SSIM as its paper prints it, window by window in float64."""

import jax
import numpy as np
import pytest

from ddpm_jax.evaluation.similarity import psnr, ssim

RNG = np.random.default_rng(0)


def image(shape=(17, 14, 3)):
  return RNG.integers(0, 256, shape).astype(np.uint8)


def constant(value, shape=(12, 13, 1)):
  return np.full(shape, value, np.uint8)


def ssim_of_the_paper(x, y):
  """Wang et al. 2004, eqs. 13 to 16: a loop over windows and channels."""
  i = np.arange(11) - 5
  w = np.exp(-(i[:, None] ** 2 + i[None] ** 2) / (2 * 1.5**2))
  w /= w.sum()
  x, y, found = x / 255, y / 255, []
  for channel in range(x.shape[2]):
    for top in range(x.shape[0] - 10):
      for left in range(x.shape[1] - 10):
        a, b = (v[top : top + 11, left : left + 11, channel] for v in (x, y))
        m, n = (w * a).sum(), (w * b).sum()
        s, t, c = (w * (a - m) ** 2).sum(), (w * (b - n) ** 2).sum(), (w * (a - m) * (b - n)).sum()
        found.append((2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (s + t + 9e-4)))
  return np.mean(found)


def test_psnr_of_an_offset_and_of_equal_images():
  x = RNG.integers(0, 200, (5, 7, 3)).astype(np.uint8)
  for offset in (1, 12, 51):
    assert float(psnr(x, x + np.uint8(offset))) == pytest.approx(-20 * np.log10(offset / 255), rel=1e-6)
    assert float(psnr(x + np.uint8(offset), x)) == float(psnr(x, x + np.uint8(offset))), "uint8 does not wrap around"
  off_by_one = x.copy()
  off_by_one[2, 3, 1] += 1
  assert float(psnr(x, x)) == float(psnr(x, off_by_one)) == pytest.approx(10 * np.log10(255**2 * x.size), rel=1e-6)


def test_ssim_is_that_of_the_paper():
  x = image()
  smooth = np.clip(100 + 60 * np.sin(np.arange(17 * 14 * 3).reshape(17, 14, 3) / 40), 0, 255).astype(np.uint8)
  flat = np.full_like(x, 250)
  flat[8, 8] = 251  # bright and nearly flat: where the digits of a variance are few
  pairs = [(x, image()), (x, x // 2), (smooth, smooth[::-1]), (smooth, x), (flat, np.full_like(x, 250))]
  for a, b in pairs:
    assert float(ssim(a, b)) == pytest.approx(ssim_of_the_paper(a, b), abs=5e-6)
  batch = jax.jit(jax.vmap(ssim))(*(np.stack(images) for images in zip(*pairs, strict=True)))
  np.testing.assert_allclose(batch, [ssim(a, b) for a, b in pairs], atol=5e-6)


def test_ssim_of_equal_and_of_constant_images():
  x = image((11, 11, 1))
  assert float(ssim(x, x)) == pytest.approx(1, abs=1e-6)
  for a, b in ((0, 255), (10, 12), (200, 90)):
    p, q = a / 255, b / 255
    wanted = (2 * p * q + 1e-4) / (p * p + q * q + 1e-4)
    assert float(ssim(constant(a), constant(b))) == pytest.approx(wanted, abs=1e-5)
  with pytest.raises(ValueError, match="10x20 are smaller than the 11 pixels"):
    ssim(image((10, 20, 1)), image((10, 20, 1)))
