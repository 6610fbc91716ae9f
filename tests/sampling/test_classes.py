"""The classes of what is drawn: in turn, or in the proportions of a data set."""

from decimal import Decimal, getcontext

import numpy as np

from ddpm_jax.sampling.classes import Classes

COUNTS = np.array([500, 5, 250, 1, 244])
LABELS = np.repeat(np.arange(5, dtype=np.int32), COUNTS)
NAMES = ("a", "b", "c", "d", "e")
PROPORTIONAL = Classes(LABELS, NAMES, proportional=True)


def test_in_turn():
  classes = Classes(np.array([3, 1], np.int32), NAMES)
  np.testing.assert_array_equal(classes.of(np.arange(5)), [3, 1, 3, 1, 3])


def test_in_proportion_by_the_golden_ratio():
  """As arithmetic with fifty digits has it."""
  getcontext().prec = 50
  golden = (1 + Decimal(5).sqrt()) / 2
  wanted = [LABELS[int(len(LABELS) * ((i + 1) / golden % 1))] for i in (*range(300), 49_999, 2**31 - 1)]
  index = np.array([*range(300), 49_999, 2**31 - 1], np.int32)
  np.testing.assert_array_equal(PROPORTIONAL.of(index), wanted)
  assert PROPORTIONAL.of(index).dtype == np.int32


def test_any_number_of_images_has_the_proportions():
  """For a Fibonacci number the inequality of Denjoy and Koksma: less than the variation of an interval, which is 2."""
  labels = PROPORTIONAL.of(np.arange(50_000))
  shares = COUNTS / COUNTS.sum()
  fibonacci = [1, 2]
  while fibonacci[-1] < 40_000:
    fibonacci.append(fibonacci[-1] + fibonacci[-2])
  for number in fibonacci:
    assert np.abs(np.bincount(labels[:number], minlength=5) - number * shares).max() < 2, number
  for number in (100, 1_000, 5_000, 10_000, 50_000):
    assert np.abs(np.bincount(labels[:number], minlength=5) - number * shares).max() < 4, number


def test_what_labels_depend_on_has_another_identity():
  in_turn = PROPORTIONAL._replace(proportional=False)
  assert len({PROPORTIONAL.identity, in_turn.identity, Classes(LABELS[1:], NAMES).identity}) == 3
  assert PROPORTIONAL.identity == PROPORTIONAL._replace(names=NAMES[::-1]).identity
