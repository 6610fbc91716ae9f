"""The order is a function of (seed, step): checked with a source whose image i is the number i."""

import concurrent.futures
import itertools
import threading
import time

import chex
import numpy as np
import pytest

from ddpm_jax.data import pipeline
from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import UserError

N, B = 50, 16  # an epoch is no whole number of batches


def numbers(length=N):
  def read(indices):
    assert isinstance(indices, np.ndarray)
    return DecodedRows(indices.astype(np.uint8).reshape(-1, 1, 1, 1), indices == 5)

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
  assert (batch["replaced"].dtype, batch["replaced"].shape) == (bool, (4,))


@pytest.mark.parametrize("count", [2, 4])
def test_the_shares_of_all_processes_are_the_batches_of_one(count):
  alone = take(9)
  shares = [take(9, process_index=p, process_count=count) for p in range(count)]
  for step, batch in enumerate(alone):
    for name in ("image", "index", "replaced"):
      together = np.concatenate([share[step][name] for share in shares])
      np.testing.assert_array_equal(together, batch[name])


@pytest.mark.parametrize("start", [1, 3, 1000])
def test_a_batch_does_not_depend_on_where_the_run_began(start):
  later = take(3, start_step=start)
  if start < 10:
    chex.assert_trees_all_equal(take(start + 3)[start:], later)
  for offset, batch in enumerate(later):
    chex.assert_trees_all_equal(take(1, start_step=start + offset), [batch])


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
  """A changed order would end the exact resume of every workdir there is: `shuffle.KIND` must change with it."""
  order = pipeline.order(10, batch_size=4, seed=3)
  np.testing.assert_array_equal([order[0], order[1]], [[6, 1, 8, 5], [2, 7, 9, 4]])


def test_the_source_says_which_rows_are_replaced():
  for batch in take(7):
    np.testing.assert_array_equal(batch["replaced"], batch["image"].ravel() == 5)


def test_records_and_labels_are_those_of_the_images_that_rows_show():
  """With what a source says of its rows, and without."""
  stand_ins = np.where(np.arange(N) == 5, 6, np.arange(N)).astype(np.int32)
  rows = DecodedRows(stand_ins.astype(np.uint8).reshape(-1, 1, 1, 1), np.arange(N) == 5, record=stand_ins)
  classes = np.random.default_rng(0).integers(0, 9, N).astype(np.int32)
  for read, labels in ((rows.take, True), (numbers().read, False)):
    source = Source("numbers", (1, 1, 1), N, read, labels=lambda: classes)
    for share in range(2):
      for batch in take(5, source, process_index=share, process_count=2, labels=labels):
        assert ("label" in batch) == labels and batch["record"].dtype == np.int32
        np.testing.assert_array_equal(batch["record"], batch["image"].ravel())
        if labels:
          assert batch["label"].dtype == np.int32
          np.testing.assert_array_equal(batch["label"], classes[batch["image"].ravel()])
  with pytest.raises(UserError, match="numbers has none"):
    take(1, labels=True)


class OfC(BaseException):
  """Something that no `except Exception` stops."""


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(
  ("error", "raised"),
  [
    (UserError("dataset: cat.png is broken"), UserError),
    (MemoryError("no memory for a batch"), MemoryError),
    (SystemError("returned a result with an exception set"), SystemError),
    (SystemExit(3), SystemExit),
    (OfC(), OfC),
    (concurrent.futures.CancelledError(), concurrent.futures.CancelledError),
    (StopIteration(), RuntimeError),  # as it is, it would end the batches without a word
  ],
  ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_kills_a_reader_thread_reaches_the_consumer_in_its_place(error, raised, threads):
  """Run in a thread of its own with a deadline, as a bug here is a hang."""
  third = set(pipeline.order(N, batch_size=B, seed=0)[3])

  def read(indices):
    if set(indices) == third:
      raise error
    return numbers().read(indices)

  source = Source(name="broken", image_shape=(1, 1, 1), length=N, read=read)
  seen, ended = [], []

  def consume():
    stream = pipeline.batches(source, batch_size=B, seed=0, start_step=0, threads=threads)
    try:
      for batch in stream:
        seen.append(batch)
    except (Exception, OfC, SystemExit) as caught:
      ended.append(caught)

  before = set(threading.enumerate())
  consumer = threading.Thread(target=consume, daemon=True)
  consumer.start()
  consumer.join(timeout=10)
  assert not consumer.is_alive()
  assert isinstance(ended[0], raised)
  assert error in (ended[0], ended[0].__cause__)
  assert len(seen) == 3  # the batches before it come first
  wait_for_the_end_of(set(threading.enumerate()) - before)


def wait_for_the_end_of(threads):
  deadline = time.monotonic() + 5
  for thread in threads:
    thread.join(timeout=max(0.0, deadline - time.monotonic()))
    assert not thread.is_alive()


def test_close_stops_the_threads():
  before = set(threading.enumerate())
  stream = pipeline.batches(numbers(), batch_size=B, seed=0, start_step=0)
  next(stream)
  started = set(threading.enumerate()) - before
  assert started
  stream.close()
  wait_for_the_end_of(started)


def test_close_does_not_wait_for_a_slow_read_and_no_other_follows_it():
  reads, go_on = [], threading.Event()
  first = set(pipeline.order(N, batch_size=B, seed=0)[0])

  def read(indices):
    reads.append(indices)
    if set(indices) != first:
      assert go_on.wait(timeout=30)
    return numbers().read(indices)

  before = set(threading.enumerate())
  source = Source(name="slow", image_shape=(1, 1, 1), length=N, read=read)
  stream = pipeline.batches(source, batch_size=B, seed=0, start_step=0, threads=3)
  next(stream)
  started = set(threading.enumerate()) - before
  deadline = time.monotonic() + 10
  while len(reads) < 4 and time.monotonic() < deadline:
    time.sleep(0.01)
  assert len(reads) == 4  # one is done, three are slow, and three or more wait for a thread
  begun = time.monotonic()
  stream.close()
  assert time.monotonic() - begun < 2
  go_on.set()
  wait_for_the_end_of(started)
  assert len(reads) == 4


def test_an_uneven_share_is_an_error():
  with pytest.raises(UserError, match=r"batch_size: 16 .* multiple of 3"):
    pipeline.batches(numbers(), batch_size=16, seed=0, start_step=0, process_count=3)
