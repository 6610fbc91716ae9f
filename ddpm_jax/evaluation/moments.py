"""Mean and covariance of features that arrive in batches, without keeping the features."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
  """What is known of `count` vectors of D features.

  Attributes:
    count: how many there were.
    mean: float64 [D]; zeros if there were none.
    m2: float64 [D, D], the sum of the outer products of the deviations from the mean.
  """

  count: int
  mean: np.ndarray
  m2: np.ndarray


def no_moments(width: int) -> Moments:
  """The moments of no vectors of `width` features."""
  return Moments(0, np.zeros(width), np.zeros((width, width)))


def merge(first: Moments, second: Moments) -> Moments:
  """The moments of two sets together (Chan, Golub and LeVeque 1983).

  Only deviations are multiplied, never the values, so that a mean far from 0 costs no digits of the covariance.

  Raises:
    ValueError: they are of vectors of different lengths.
  """
  if first.mean.shape != second.mean.shape:
    raise ValueError(f"moments of {first.mean.size} and of {second.mean.size} features do not go together")
  count = first.count + second.count
  if not first.count or not second.count:
    return first if first.count else second
  step = second.mean - first.mean
  mean = first.mean + step * (second.count / count)
  m2 = first.m2 + second.m2 + np.outer(step, step) * (first.count * second.count / count)
  return Moments(count, mean, m2)


def add(moments: Moments, features: np.ndarray) -> Moments:
  """The moments after another batch [B, D], of any float type and any B; the sums are in float64.

  Raises:
    ValueError: `features` is not [B, D].
  """
  features = np.asarray(features, np.float64)
  if features.ndim != 2 or features.shape[1] != moments.mean.size:
    raise ValueError(f"features of shape {features.shape} instead of [B, {moments.mean.size}]")
  if not len(features):
    return moments
  mean = features.mean(axis=0)
  deviations = features - mean
  return merge(moments, Moments(len(features), mean, deviations.T @ deviations))


def moments_by_class(features: np.ndarray, labels: np.ndarray) -> dict[int, Moments]:
  """The moments of each class of which there are more vectors than features: of fewer, the covariance is singular.

  Args:
    features: [N, D].
    labels: int [N].
  """
  classes, counts = np.unique(labels, return_counts=True)
  width = features.shape[1]
  enough = classes[counts > width].tolist()
  return {label: add(no_moments(width), features[labels == label]) for label in enough}


def covariance(moments: Moments) -> np.ndarray:
  """The unbiased covariance, float64 [D, D]: divided by N - 1, as `np.cov` and the usual code for FID do.

  Raises:
    ValueError: fewer than two vectors have no covariance.
  """
  if moments.count < 2:
    raise ValueError(f"a covariance needs at least 2 vectors, not {moments.count}")
  return moments.m2 / (moments.count - 1)
