"""What an autoencoder makes of its latents over a data set: pure functions in float64 on the host."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ACTIVE = 0.01  # of Burda et al. 2016, section 5


class LatentSums(NamedTuple):
  """What is known of the latents of `count` images, for each unit [h, w, z].

  Attributes:
    count: how many images.
    mean: float64 [h, w, z], of the means of the posteriors.
    m2: the sum of the squared deviations from `mean`.
    variance: the sum of the variances of the posteriors; 0 where there are none.
    kl: the sum of their divergences from N(0, 1), in nats; 0 where there are none.
  """

  count: int
  mean: np.ndarray
  m2: np.ndarray
  variance: np.ndarray
  kl: np.ndarray


def no_latents(shape: tuple[int, int, int]) -> LatentSums:
  """The sums over no images. shape: h, w, z."""
  return LatentSums(0, *(np.zeros(shape) for _ in range(4)))


def kl_from_normal(mean: np.ndarray, log_variance: np.ndarray) -> np.ndarray:
  """KL(N(mu, e^l) || N(0, 1)) = (mu^2 + e^l - 1 - l) / 2 of each unit, in nats (Kingma and Welling 2014, app. B)."""
  return (np.square(mean) + np.expm1(log_variance) - log_variance) / 2


def add_latents(sums: LatentSums, mean: np.ndarray, log_variance: np.ndarray | None = None) -> LatentSums:
  """The sums after another batch, of any B > 0.

  Args:
    sums: of the images before.
    mean: of the posteriors, [B, h, w, z]; of a codebook, what is quantised.
    log_variance: theirs, alike; None: there are no posteriors.

  Raises:
    ValueError: the shapes do not fit.
  """
  mean = np.asarray(mean, np.float64)
  if mean.shape[1:] != sums.mean.shape or not len(mean):
    raise ValueError(f"latents of shape {mean.shape} instead of {['B', *sums.mean.shape]}")
  variance, kl = np.zeros(()), np.zeros(())
  if log_variance is not None:
    log_variance = np.asarray(log_variance, np.float64)
    variance, kl = np.exp(log_variance).sum(0), kl_from_normal(mean, log_variance).sum(0)
  of_batch = mean.mean(0)
  step, count = of_batch - sums.mean, sums.count + len(mean)
  m2 = sums.m2 + np.square(mean - of_batch).sum(0) + np.square(step) * (sums.count * len(mean) / count)
  return LatentSums(count, sums.mean + step * (len(mean) / count), m2, sums.variance + variance, sums.kl + kl)


class Channels(NamedTuple):
  """Of the latents of each channel, float64 [z]; units are the places [h, w] of a channel.

  Attributes:
    mean: over images and units.
    std: likewise, of what is sampled from the posteriors: the root of Var(mu) + E(sigma^2).
    kl: nats of an image.
    active: the share of units whose mean says something of the image: Var(mu) > 0.01 over the images.
  """

  mean: np.ndarray
  std: np.ndarray
  kl: np.ndarray
  active: np.ndarray


def channels(sums: LatentSums) -> Channels:
  """Numbers of each channel. Raises ValueError if there were no images."""
  if not sums.count:
    raise ValueError("no images, so no latents")
  mean = sums.mean.mean((0, 1))
  of_units = sums.m2 / sums.count  # variances over the images
  variance = (of_units + np.square(sums.mean - mean) + sums.variance / sums.count).mean((0, 1))
  return Channels(mean, np.sqrt(variance), sums.kl.sum((0, 1)) / sums.count, (of_units > ACTIVE).mean((0, 1)))


def codebook_use(counts: np.ndarray) -> float:
  """The share of the codes that occur at all, of how often each does, int [K]. Raises ValueError if none does."""
  if not np.sum(counts):
    raise ValueError("no code occurs")
  return float(np.mean(np.asarray(counts) > 0))


def perplexity(counts: np.ndarray) -> float:
  """exp(H) of how often each code occurs, int [K]: K if all occur equally often, 1 if there is one only.

  Over few images it is bounded by their number of latent pixels.

  Raises:
    ValueError: none occurs.
  """
  counts = np.asarray(counts, np.float64)
  if not counts.sum():
    raise ValueError("no code occurs")
  shares = counts[counts > 0] / counts.sum()
  return float(np.exp(-(shares * np.log(shares)).sum()))
