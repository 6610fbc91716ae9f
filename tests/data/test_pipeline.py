"""The order is a function of (seed, step): checked with a source whose image i is the number i."""

import itertools
import threading
import time

import chex
import numpy as np
import pytest

from ddpm_jax.data import pipeline
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import UserError

N, B = 50, 16  # an epoch is no whole number of batches


def numbers(length=N):
  def read(indices):
    assert isinstance(indices, np.ndarray)
    return indices.astype(np.uint8).reshape(-1, 1, 1, 1)

  return Source(name="numbers", image_shape=(1, 1, 1), length=length, read=read)


def take(count, source=None, *, batch_size=B, seed=0, start_step=0, **options):
  stream = pipeline.batches(source or numbers(), batch_size=batch_size, seed=seed, start_step=start_step, **options)
  try:
    return list(itertools.islice(stream, count))
  finally:
    stream.close()


def rows(batches):
  return np.concatenate([batch["image"].ravel() for batch in batches])


def test_shapes_and_types():
  (batch,) = take(1, process_index=3, process_count=4)
  chex.assert_shape(batch["image"], (4, 1, 1, 1))
  assert batch["image"].dtype == np.uint8
  assert batch["index"].dtype == np.int32
  np.testing.assert_array_equal(batch["index"], [12, 13, 14, 15])


@pytest.mark.parametrize("count", [2, 4])
def test_the_shares_of_all_processes_are_the_batches_of_one(count):
  alone = take(9)
  shares = [take(9, process_index=p, process_count=count) for p in range(count)]
  for step, batch in enumerate(alone):
    for name in ("image", "index"):
      together = np.concatenate([share[step][name] for share in shares])
      np.testing.assert_array_equal(together, batch[name])


@pytest.mark.parametrize("start", [1, 3, 1000])
def test_a_batch_does_not_depend_on_where_the_run_began(start):
  later = take(3, start_step=start)
  if start < 10:
    chex.assert_trees_all_equal(take(start + 3)[start:], later)
  for offset, batch in enumerate(later):
    chex.assert_trees_all_equal(pipeline.batch_at(numbers(), start + offset, batch_size=B, seed=0), batch)


@pytest.mark.parametrize("threads", [1, 5])
def test_the_number_of_threads_does_not_change_the_order(threads):
  chex.assert_trees_all_equal(take(20, threads=threads), take(20))


def test_every_epoch_holds_every_image_once_in_an_order_of_its_own():
  epochs = rows(take(4 * N // B + 1))[: 4 * N].reshape(4, N)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(N))
  assert len({tuple(epoch) for epoch in epochs} | {tuple(range(N))}) == 5


def test_seeds_give_different_orders():
  orders = {tuple(rows(take(3, seed=seed))) for seed in (0, 1, 2, 2**32 - 1)}
  assert len(orders) == 4


def test_a_data_set_smaller_than_a_batch():
  (batch,) = take(1, numbers(3), batch_size=7)
  assert batch["image"].shape == (7, 1, 1, 1)
  for epoch in (batch["image"][:3], batch["image"][3:6]):
    np.testing.assert_array_equal(np.sort(epoch.ravel()), [0, 1, 2])


def test_the_order_stays_what_it_is():
  """A changed order (a new Grain, say) would end the exact resume of every workdir there is: raise it as such."""
  order = pipeline.order(10, batch_size=4, seed=3)
  np.testing.assert_array_equal([order[0], order[1]], [[4, 6, 9, 7], [5, 3, 1, 8]])


def test_an_error_of_the_reader_reaches_the_consumer():
  def read(indices):
    raise UserError("dataset: cat.png is broken")

  source = Source(name="broken", image_shape=(1, 1, 1), length=N, read=read)
  started = time.monotonic()
  with pytest.raises(UserError, match=r"cat.png is broken"):
    take(1, source)
  assert time.monotonic() - started < 10


def test_close_stops_the_threads():
  before = set(threading.enumerate())
  stream = pipeline.batches(numbers(), batch_size=B, seed=0, start_step=0)
  next(stream)
  started = set(threading.enumerate()) - before
  assert started
  stream.close()
  for thread in started:
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_an_uneven_share_is_an_error():
  with pytest.raises(UserError, match=r"batch_size: 16 .* multiple of 3"):
    pipeline.batches(numbers(), batch_size=16, seed=0, start_step=0, process_count=3)
