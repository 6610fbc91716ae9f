"""Exchange between the processes of a job: values of the host, and global arrays as NumPy."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils


def all_gather_host(value: np.ndarray) -> np.ndarray:
  """[processes, ...]: an array of the same shape and type from every process, on every process; all must call it."""
  if jax.process_count() == 1:
    return value[None]
  # As bytes: JAX would make 32-bit numbers of 64-bit ones.
  raw = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
  gathered = np.asarray(multihost_utils.process_allgather(raw))
  return np.frombuffer(gathered.tobytes(), value.dtype).reshape(-1, *value.shape)


def any_host(flag: bool) -> bool:
  """True where `flag` is true on any process; all must call it."""
  return bool(np.any(all_gather_host(np.asarray(flag))))


def gather(array: jax.Array) -> np.ndarray:
  """A global array of any placement as NumPy, whole, on every process; all must call it, in the same order."""
  if array.is_fully_replicated:
    return to_host(array)
  if array.is_fully_addressable:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def to_host(array: jax.Array) -> np.ndarray:
  """A replicated array as NumPy, on every process. Waits for it to be computed."""
  return jax.device_get(array.addressable_shards[0].data)
