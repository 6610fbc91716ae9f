"""Worker processes that read batches: Grain's, and what it takes that they neither disturb nor outlive this process.

A worker is spawned, not forked, as JAX has threads here. It hears no signal: Ctrl-C goes to all processes of a
terminal, and this one still needs batches to come to its end. It ends when it is told to, and when this process is
gone.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np

from ddpm_jax.errors import RunError

_NAME = "grain-process-prefetch"  # what Grain calls its workers
_DIED = "Worker process was terminated unexpectedly"  # what it says of one that did not end by itself
_GRACE_S = 5.0  # a worker may finish what it reads, but a read may hang


def read_ahead(dataset: grain.MapDataset, *, workers: int, threads: int) -> Generator[dict[str, Any], None, None]:
  """Yields the elements of an endless `dataset` in their order: of n workers, worker w reads every n-th from w on.

  The workers start with the first `next` and stop with the generator's `close()`. Grain wants absl's flags parsed.

  Args:
    dataset: dictionaries with arrays in them; is pickled.
    workers: how many processes, at least 1.
    threads: of each; at most two elements more than it has threads wait there to be used.

  Raises:
    RunError: a worker has died.

  Whatever else is raised while an element is read is raised here too, in place of that element.
  """
  reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  # One worker for each iterator: Grain would start several one by one, and end them one by one.
  alone = grain.MultiprocessingOptions(num_workers=1)
  parts = (dataset[worker::workers].to_iter_dataset(reading) for worker in range(workers))
  iterators = [iter(part.mp_prefetch(alone, worker_init_fn=_begin)) for part in parts]
  others = set(multiprocessing.active_children())
  try:
    _start(iterators)
    for iterator in itertools.cycle(iterators):
      yield _next(iterator)
  finally:
    _end(iterators, others)


def _start(iterators: list[grain.DatasetIterator]) -> None:
  """Starts all workers at once, deaf to signals from their first moment on: they inherit what is blocked here."""
  # Shared memory that nobody gives back, as the worker or this process was killed, is given back by a process of
  # Python's, which should do so without a word. It unblocks signals here when it starts, so it starts first.
  silence = "ignore:resource_tracker:UserWarning"
  if silence not in sys.warnoptions:
    sys.warnoptions.append(silence)
  resource_tracker.ensure_running()
  for iterator in iterators:
    iterator.get_state()  # Grain makes here what it starts
  blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
  try:
    for iterator in iterators:
      iterator.start_prefetch()
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _begin(_worker: int, _workers: int) -> None:
  """What a worker does first: it sees to it that it ends when its parent is gone, killed for one."""
  threading.Thread(target=_end_with_the_parent, name="parent", daemon=True).start()


def _end_with_the_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None  # only a worker comes here
  parent.join()
  os._exit(1)


def _next(iterator: grain.DatasetIterator) -> dict[str, Any]:
  try:
    element = next(iterator)
  except RuntimeError as error:
    if not str(error).startswith(_DIED):
      raise
    raise RunError(
      f"data_workers: a process that reads images has died ({str(error).partition('. ')[0]}), as the system lets it "
      "where memory is short; use fewer --data_workers or --data_threads, or --data_workers=0"
    ) from None
  # Arrays of this process: the memory that it shares with the worker is free again at once.
  return {name: np.array(part) if isinstance(part, np.ndarray) else part for name, part in element.items()}


def _end(iterators: list[grain.DatasetIterator], others: set[Any]) -> None:
  """Tells the workers to end, and kills those that do not in time; `others` are children of this process before."""
  if sys.is_finalizing():
    return  # never closed: Python's exit has ended the workers by now, and starts no thread any more

  def kill() -> None:
    for child in multiprocessing.active_children():
      if child not in others and child.name.startswith(_NAME):
        child.kill()

  late = threading.Timer(_GRACE_S, kill)
  late.daemon = True
  late.start()
  with concurrent.futures.ThreadPoolExecutor(len(iterators)) as pool:
    list(pool.map(lambda iterator: iterator.close(), iterators))
  late.cancel()
