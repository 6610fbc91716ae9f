"""Arrays in files that say by themselves whether they are still what was written: safetensors with a digest."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from ddpm_jax.workdir.storage import write_whole

Arrays = dict[str, np.ndarray]


class UnusableError(Exception):
  """A file of arrays is not what was written; the message says why, on one line."""


def arrays_sha256(arrays: Mapping[str, np.ndarray], facts: str) -> str:
  """SHA-256 over the facts, and name, type, shape and little-endian bytes of each array, sorted by name."""
  digest = hashlib.sha256(f"{facts}\n".encode())
  for name in sorted(arrays):
    array = np.asarray(arrays[name])
    digest.update(f"{name} {array.dtype.name} {list(array.shape)}\n".encode())
    digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
  return digest.hexdigest()


def save_arrays(path: pathlib.Path, arrays: Arrays, facts: Mapping[str, Any]) -> None:
  """Writes a safetensors file, whole or not at all; `facts` are JSON values. Raises OSError."""
  text = json.dumps(dict(facts), sort_keys=True)
  arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}  # safetensors takes the bytes as such
  metadata = {"facts": text, "sha256": arrays_sha256(arrays, text)}
  path.parent.mkdir(parents=True, exist_ok=True)
  write_whole(path, safetensors.numpy.save(arrays, metadata))


def load_arrays(path: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
  """What `save_arrays` wrote.

  Raises:
    FileNotFoundError: there is no such file.
    UnusableError: it is damaged, or something else.
  """
  try:
    with safe_open(path, framework="numpy") as file:
      metadata = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
  except FileNotFoundError:
    raise
  except (OSError, SafetensorError) as error:
    raise UnusableError(f"no whole safetensors file: {str(error).splitlines()[0]}") from error
  text = metadata.get("facts", "")
  if metadata.get("sha256") != arrays_sha256(arrays, text):
    raise UnusableError("it does not hold what was written (SHA-256)")
  return arrays, json.loads(text)
