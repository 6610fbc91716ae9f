"""The order of the images, and the batches that a process reads: a function of (seed, step) and nothing else.

Batch k is rows k*B .. (k+1)*B - 1 of an endless global shuffle, in which every epoch is a permutation of its own.
Process p of n reads the p-th of n contiguous shares of each batch. So the position in the data is the step, and a run
goes on where it stopped on any number of hosts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence

import grain
import numpy as np

from ddpm_jax.data.encoded import DecodedRows, NoLabels, RemoteReader
from ddpm_jax.data.shuffle import shuffled
from ddpm_jax.data.sources import Source
from ddpm_jax.data.workers import read_ahead
from ddpm_jax.errors import UserError

Batch = dict[str, np.ndarray]

_WITHOUT_END = 2**40  # batches


def order(
  length: int, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
  """The images of each batch: `order(...)[k]` is int [B/n], this process's share of batch k.

  Args:
    length: number of images in the data set; may be smaller than a batch.
    batch_size: B, over all processes.
    seed: of the shuffle, in 0..2**32 - 1.
    process_index: p, in 0..n-1.
    process_count: n.

  Raises:
    UserError: the processes cannot share a batch evenly.
  """
  if batch_size % process_count:
    raise UserError(
      f"batch_size: {batch_size} cannot be shared evenly by {process_count} processes; use a multiple of "
      f"{process_count}"
    )
  share = batch_size // process_count

  def rows(step: int) -> np.ndarray:
    first = step * batch_size + process_index * share
    return shuffled(np.arange(first, first + share), length, seed)

  return grain.MapDataset.range(_WITHOUT_END).map(rows)


def images_of(source: Source, step: int, *, batch_size: int, seed: int) -> np.ndarray:
  """int [B]: the images of batch `step` (counted from 0), over all processes."""
  indices = order(len(source), batch_size=batch_size, seed=seed)[step]
  assert indices is not None  # only a filtered dataset has gaps
  return indices


def batches(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  start_step: int,
  process_index: int = 0,
  process_count: int = 1,
  threads: int = 2,
  workers: int = 0,
  labels: bool = False,
) -> Generator[Batch, None, None]:
  """Yields batches start_step, start_step + 1, ... without end, read ahead by threads of this process or by workers.

  They start with the first `next` and stop with the generator's `close()`. Their number does not change a batch.

  Args:
    source: the images.
    batch_size: B, over all processes.
    seed: of the shuffle, in 0..2**32 - 1.
    start_step: number of batches that came before.
    process_index: p, in 0..n-1.
    process_count: n.
    threads: number that read and decode; at most twice as many batches wait to be used.
    workers: number of processes that read instead, with as many threads each; unused for images in memory.
    labels: yield "label" too; `source.labels` is called once.

  Yields:
    "image": uint8 [B/n, H, W, C]; "index": int32 [B/n], the position of each row in the global batch; "replaced": bool
    [B/n], whether the row holds another image, as its own is bad (`on_bad_record=skip`); "record": int32 [B/n], the
    image of the data set that the row holds; with `labels` "label": int32 [B/n], the class of that image.

  Raises:
    UserError: the processes cannot share a batch evenly, an image cannot be decoded, or `labels`, and there are none.
    RunError: a worker was killed.

  Any other error of `source.read` is raised in place of the batch that was read.
  """
  share = dict(batch_size=batch_size, seed=seed, process_index=process_index, process_count=process_count)
  remote = source.remote if workers else None
  dataset = _dataset(remote.read if remote else source.read, len(source), **share)[start_step:]
  classes = None
  if labels:
    if source.labels is None:
      raise NoLabels(source.name)
    classes = source.labels()
  return _yield_batches(read_ahead(dataset, workers=workers if remote else 0, threads=threads), remote, classes)


def _dataset(
  read: Callable[[np.ndarray], DecodedRows],
  length: int,
  *,
  batch_size: int,
  seed: int,
  process_index: int,
  process_count: int,
) -> grain.MapDataset:
  """Each element: one process's share of a batch, and the bad images that are still to be reported."""
  share = batch_size // process_count
  index = process_index * share + np.arange(share, dtype=np.int32)

  def load(indices: np.ndarray) -> tuple[Batch, Sequence[tuple[int, str]]]:
    try:
      rows = read(indices)
    except StopIteration as error:  # as it is, it would pass for the end of the data, or of one worker's part
      raise RuntimeError("reading images raised StopIteration") from error
    record = (indices if rows.record is None else rows.record).astype(np.int32)
    return {"image": rows.images, "index": index.copy(), "replaced": rows.replaced, "record": record}, rows.skipped

  return order(length, batch_size=batch_size, seed=seed, process_index=process_index, process_count=process_count).map(
    load
  )


def _yield_batches(
  elements: Generator[tuple[Batch, Sequence[tuple[int, str]]], None, None],
  remote: RemoteReader | None,
  classes: np.ndarray | None,
) -> Generator[Batch, None, None]:
  with contextlib.closing(elements):
    for batch, skipped in elements:
      if remote is not None:
        for index, what in skipped:
          remote.report(index, what)
        # Arrays of this process: the memory that it shares with the worker is free again at once.
        batch = {name: np.array(value) for name, value in batch.items()}
      yield batch if classes is None else batch | {"label": classes[batch["record"]]}
