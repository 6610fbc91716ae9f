"""Streamed moments against np.mean and np.cov of everything at once."""

import functools

import numpy as np
import pytest

from ddpm_jax.evaluation.moments import Moments, add, covariance, merge, no_moments

PARTITIONS = [[200], [100, 100], [1] * 200, [1, 199], [199, 1], [7, 0, 93, 64, 36], [0, 200, 0]]


def features(number: int = 200, width: int = 5, offset: float = 0.0) -> np.ndarray:
  """Correlated, of different scales, and skewed."""
  random = np.random.default_rng(0)
  return random.exponential(size=(number, width)) @ random.standard_normal((width, width)) + offset


def streamed(rows: np.ndarray, sizes: list[int]) -> Moments:
  parts = np.split(rows, np.cumsum(sizes)[:-1])
  assert [len(part) for part in parts] == sizes
  return functools.reduce(add, parts, no_moments(rows.shape[1]))


def assert_same(one: Moments, other: Moments) -> None:
  assert one.count == other.count
  np.testing.assert_allclose(one.mean, other.mean, rtol=1e-13)
  np.testing.assert_allclose(one.m2, other.m2, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sizes", PARTITIONS)
def test_any_partition_is_the_whole(sizes):
  rows = features()
  moments = streamed(rows, sizes)
  assert moments.count == 200
  np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-13)
  np.testing.assert_allclose(covariance(moments), np.cov(rows, rowvar=False), rtol=1e-11)


def test_by_hand():
  moments = add(add(no_moments(2), np.asarray([[1.0, 0.0], [3.0, 2.0]])), np.asarray([[5.0, 1.0]]))
  assert moments.count == 3
  np.testing.assert_allclose(moments.mean, [3, 1], rtol=1e-15)
  np.testing.assert_allclose(moments.m2, [[8, 2], [2, 2]], rtol=1e-15)
  np.testing.assert_allclose(covariance(moments), [[4, 1], [1, 1]], rtol=1e-15)


@pytest.mark.parametrize("sizes", PARTITIONS)
def test_a_mean_far_from_zero_costs_no_digits(sizes):
  """With E x x^T - mean mean^T, four digits would be left at an offset of 1e6, and none at 1e9."""
  exact = np.cov(features(), rowvar=False)
  np.testing.assert_allclose(covariance(streamed(features(offset=1e6), sizes)), exact, rtol=1e-8)
  np.testing.assert_allclose(covariance(streamed(features(offset=1e9), sizes)), exact, rtol=1e-5)


@pytest.mark.parametrize("at", [0, 1, 77, 200])
def test_merging_is_adding(at):
  rows = features()
  first, second = add(no_moments(5), rows[:at]), add(no_moments(5), rows[at:])
  assert_same(merge(first, second), add(first, rows[at:]))
  assert_same(merge(first, second), add(no_moments(5), rows))
  assert_same(merge(first, second), merge(second, first))


def test_nothing_is_changed_in_place():
  rows = features()
  first = add(no_moments(5), rows[:50])
  before = first.mean.copy(), first.m2.copy(), rows.copy()
  add(first, rows[50:])
  for now, then in zip((first.mean, first.m2, rows), before, strict=True):
    np.testing.assert_array_equal(now, then)


def test_float32_batches_are_summed_in_float64():
  rows = features(offset=100.0).astype(np.float32)
  moments = streamed(rows, [50] * 4)
  assert moments.mean.dtype == moments.m2.dtype == np.float64
  np.testing.assert_allclose(covariance(moments), np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-10)


def test_the_covariance_of_one_vector_is_refused():
  for number in (0, 1):
    with pytest.raises(ValueError, match=f"not {number}"):
      covariance(add(no_moments(5), features(number)))
  np.testing.assert_array_equal(covariance(add(no_moments(2), np.asarray([[1, 2], [3, 2]]))), [[2, 0], [0, 0]])


def test_wrong_shapes_are_refused():
  for wrong in (np.zeros(5), np.zeros((2, 1)), np.zeros((2, 6)), np.zeros((2, 5, 1))):
    with pytest.raises(ValueError, match=r"instead of \[B, 5\]"):
      add(no_moments(5), wrong)
  with pytest.raises(ValueError, match="4 and of 5"):
    merge(no_moments(4), add(no_moments(5), features()))
