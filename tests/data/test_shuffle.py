"""The endless shuffle: permutations that are fair, and stay what they are."""

import collections
import itertools

import numpy as np
import pytest

from ddpm_jax.data.shuffle import shuffled


def epoch(number, length, seed=0):
  return shuffled(np.arange(number * length, (number + 1) * length), length, seed)


@pytest.mark.parametrize("length", [1, 2, 1797])
def test_an_epoch_is_a_permutation(length):
  for number in (0, 1, 10**6):
    np.testing.assert_array_equal(np.sort(epoch(number, length)), np.arange(length))


def test_epochs_and_seeds_have_orders_of_their_own():
  orders = {tuple(epoch(number, 50, seed)) for number in range(4) for seed in (0, 1, 2**32 - 1)}
  assert len(orders | {tuple(range(50))}) == 13


def test_every_permutation_is_as_likely_as_any_other():
  """Chi-squared over the 24 orders of four images: below 49.7 with probability 0.999."""
  counts = collections.Counter(tuple(epoch(number, 4)) for number in range(4800))
  assert set(counts) == set(itertools.permutations(range(4)))
  assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7


def test_rows_are_looked_up_one_by_one():
  """In any order, from any epochs, more than the cache of permutations holds."""
  rows = np.random.default_rng(0).integers(0, 70, 200)
  whole = np.concatenate([epoch(number, 7) for number in range(10)])
  np.testing.assert_array_equal(shuffled(rows, 7, 0), whole[rows])


def test_it_is_sorted_words_of_philox():
  """Philox 4x64 with ten rounds and the key (seed, epoch), by hand: Salmon et al. 2011, table 2 and figure 2."""
  m0, m1, w0, w1 = 0xD2E7470EE14C6C93, 0xCA5A826395121157, 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
  mask, words = 2**64 - 1, []
  for counter in (1, 2):  # NumPy counts up before it computes a block
    c, k0, k1 = [counter, 0, 0, 0], 3, 5
    for _ in range(10):
      p0, p1 = m0 * c[0], m1 * c[2]
      c = [(p1 >> 64) ^ c[1] ^ k0, p1 & mask, (p0 >> 64) ^ c[3] ^ k1, p0 & mask]
      k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    words += c
  np.testing.assert_array_equal(epoch(5, 8, seed=3), sorted(range(8), key=words.__getitem__))
