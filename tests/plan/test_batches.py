"""The largest batch, with memory functions made up."""

import math

import pytest

from ddpm_jax.plan.batches import COMPILATIONS, largest


def search(memory, *, start=128, unit=16, limit=1000.0, fixed=100.0):
  """(the outcome, the sizes that were compiled after the first)."""
  compiled = []

  def compile_(size):
    compiled.append(size)
    return memory(size)

  found = largest({start: memory(start)}, fixed, compile_, unit=unit, limit=limit)
  assert len(compiled) == len(set(compiled)) <= COMPILATIONS and start not in compiled
  assert all(size % unit == 0 and math.log2(size / unit).is_integer() for size in compiled)
  return found, compiled


def affine(fixed, rate):
  return lambda size: fixed + rate * size


@pytest.mark.parametrize("rate", [0.001, 0.03, 0.2, 0.5, 0.9, 1.7, 3.4, 6.0])
@pytest.mark.parametrize("fixed", [0, 100, 700])
def test_affine_memory_is_found_exactly(fixed, rate):
  """Whatever the first guess thinks is fixed. The answer by trying every size."""
  memory = affine(fixed, rate)
  best = max((16 * 2**k for k in range(40) if memory(16 * 2**k) <= 1000), default=0)
  for guess in (0, 100, fixed):
    found, _ = search(memory, fixed=guess)
    if found.settled:
      assert (found.size, found.next_size) == (best, 2 * best if best else 16)
    else:
      assert found.size <= best
    if best <= 128 * 64:  # the farthest jump
      assert found.settled
      assert found.next_bytes == pytest.approx(memory(found.next_size))


def test_one_compilation_more_is_enough_where_the_guess_is_good():
  found, compiled = search(affine(100, 1.0), limit=1200)
  assert (found.size, found.settled, compiled) == (1024, True, [1024])
  assert found.next_size == 2048 and found.next_bytes == pytest.approx(2148)


def test_twice_as_much_is_tried_where_the_guess_says_no():
  """A single compilation takes the gradients, which are temporaries, for something that grows."""
  found, compiled = search(affine(700, 1.0), limit=1000)
  assert (found.size, compiled) == (256, [256]) and found.next_bytes == pytest.approx(1212)
  found, compiled = search(affine(100, 5.0), limit=1000)
  assert (found.size, compiled) == (128, [256])
  assert found.next_bytes == pytest.approx(100 + 5 * 256)


def test_a_batch_that_does_not_fit_leads_down():
  found, compiled = search(affine(100, 5.0), start=1024)
  assert (found.size, found.settled) == (128, True) and compiled[0] < 1024
  assert found.next_bytes == pytest.approx(100 + 5 * 256)


def test_a_refusal_without_numbers_leads_to_the_smallest():
  def refuses(size):
    return math.inf if size > 200 else 100 + 5.0 * size

  found, compiled = search(refuses, start=4096)
  assert compiled[0] == 16 and found.size == 128
  everything, compiled = search(lambda _: math.inf)
  assert everything == (0, 16, math.inf, True) and compiled == [16]


def test_the_smallest_is_refused_itself():
  assert search(lambda _: math.inf, start=16) == ((0, 16, math.inf, True), [])


def test_memory_that_does_not_grow_at_first():
  """All on the chip up to a size; then it grows."""

  def memory(size):
    return 150.0 if size <= 4096 else 150 + 0.05 * (size - 4096)

  found, compiled = search(memory, fixed=150.0)
  assert compiled[0] == 128 * 64 and (found.size, found.settled) == (16384, True)


def test_it_ends_where_the_index_of_an_image_does():
  found, _ = search(lambda _: 1.0, start=2**27, fixed=1.0)
  assert found.size == 2**30 and found.settled


def test_a_search_that_is_cut_short_says_so():
  found, compiled = search(lambda _: 1.0, start=16, fixed=1.0)
  assert len(compiled) == COMPILATIONS and found.size == 16 * 64**COMPILATIONS and not found.settled


def test_a_compiler_that_refuses_more_than_was_predicted():
  def memory(size):
    return 100 + 1.0 * size if size < 512 else math.inf

  found, compiled = search(memory, limit=2000)
  assert found.size == 256 and found.next_size == 512 and math.isinf(found.next_bytes) and compiled[0] == 1024


def test_a_first_size_that_is_no_power_of_two():
  found, compiled = search(affine(100, 1.0), start=96, limit=230)
  assert (found.size, compiled) == (128, [128])
  found, compiled = search(affine(100, 1.0), start=96, limit=200)
  assert (found.size, found.next_size, compiled) == (96, 192, [128])
