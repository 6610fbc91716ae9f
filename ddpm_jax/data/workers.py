"""Batches read ahead by Grain: by threads of this process, or by worker processes.

Grain's `mp_prefetch` does the reading. This module adds what Grain 0.2.18 leaves to its caller, each with a test that
fails without it: workers block the signals of a terminal (Ctrl-C reaches all its processes, and the trainer needs
batches until it has saved), end with a parent that is killed, and `close()` ends even where a read hangs. Workers are
spawned, not forked, as JAX has threads here.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator
from typing import Any

import grain

from ddpm_jax.errors import RunError

_DIED = "Worker process was terminated unexpectedly"  # Grain's message for one that did not end by itself
_GRACE_S = 5.0  # a worker may finish what it reads, but a read may hang


def read_ahead(dataset: grain.MapDataset, *, workers: int, threads: int) -> Generator[Any, None, None]:
  """Yields the elements of an endless `dataset` in their order, read ahead.

  Threads or workers start with the first `next` and stop with the generator's `close()`. Grain wants absl's flags
  parsed before workers start.

  Args:
    dataset: pickled if there are workers; of W workers, worker w reads every W-th element from w on.
    workers: number of processes; 0: threads of this process.
    threads: of each process; at most twice as many elements wait to be used (with workers, plus one for each).

  Raises:
    RunError: a worker has died.

  Any other error is raised in place of the element that was read.
  """
  ahead = dataset.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads if workers else 2 * threads)
  )
  if workers:
    ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_watch_parent)
  iterator = iter(ahead)
  others = set(multiprocessing.active_children())
  try:
    if workers:
      _start(iterator)
    while True:
      yield _next(iterator)
  finally:
    _close(iterator, others)


def _start(iterator: grain.DatasetIterator) -> None:
  """Starts all workers with the signals of a terminal blocked from their first moment on: they inherit the mask."""
  # Python's resource tracker frees the shared memory that a killed process leaves, and should do so silently.
  silence = "ignore:resource_tracker:UserWarning"
  if silence not in sys.warnoptions:
    sys.warnoptions.append(silence)
  iterator.get_state()  # makes what `start_prefetch` starts; and the tracker, whose start unblocks signals
  blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
  try:
    iterator.start_prefetch()
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _watch_parent(_worker: int, _workers: int) -> None:
  """Runs first in a worker, which would wait for ever for a parent that was killed."""

  def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # only a worker comes here
    parent.join()
    os._exit(1)

  threading.Thread(target=end_with_parent, name="parent", daemon=True).start()


def _next(iterator: grain.DatasetIterator) -> Any:
  try:
    return next(iterator)
  except RuntimeError as error:
    if not str(error).startswith(_DIED):
      raise
    raise RunError(
      f"data_workers: a process that reads images has died ({str(error).partition('. ')[0]}), as the system lets it "
      "where memory is short; use fewer --data_workers or --data_threads, or --data_workers=0"
    ) from None


def _close(iterator: grain.DatasetIterator, others: set[Any]) -> None:
  """Stops threads and workers, and kills workers that do not end in time; `others` are children from before."""
  if sys.is_finalizing():
    return  # never closed: Python's exit has ended the workers by now, and starts no thread any more

  def kill() -> None:
    for child in multiprocessing.active_children():
      if child not in others:
        child.kill()

  late = threading.Timer(_GRACE_S, kill)
  late.daemon = True
  late.start()
  iterator.close()
  late.cancel()
