"""Tensors in safetensors files: read as float32 and only if whole, written with a digest of all that is in them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from ddpm_jax.workdir.arrays import UnusableError, arrays_sha256
from ddpm_jax.workdir.storage import write_whole

_LONGEST_HEADER = 100_000_000  # bytes; the limit of the format
_PICKLES = (b"PK\x03\x04", b"\x80")  # how torch.save and pickle begin


class Tensors(NamedTuple):
  """What a file holds."""

  arrays: dict[str, np.ndarray]  # float32
  facts: dict[str, Any]  # what it says beside them; empty if another program wrote it


def write_tensors(path: pathlib.Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
  """Writes float32 arrays, whole or not at all; `facts` are JSON values. Raises OSError."""
  text = json.dumps(dict(facts), sort_keys=True)
  arrays = {name: np.ascontiguousarray(array, np.dtype("<f4")) for name, array in arrays.items()}
  # diffusers needs the entry that the layout is PyTorch's.
  metadata = {"format": "pt", "facts": text, "sha256": arrays_sha256(arrays, text)}
  write_whole(path, safetensors.numpy.save(arrays, metadata))


def read_tensors(path: pathlib.Path) -> Tensors:
  """All tensors of a file as float32, by name; half precision is widened. A digest is compared where there is one.

  Raises:
    UnusableError: if it cannot be read, is not whole, or not what was written; or a tensor is of another type, or holds
      a number that is not finite.
  """
  try:
    contents = path.read_bytes()
  except OSError as error:
    raise UnusableError(f"cannot be read ({error.strerror})") from error
  _refuse_pickles(contents[:9])
  try:
    found = sorted(safetensors.deserialize(contents), key=lambda entry: entry[0])  # which gives them in any order
  except safetensors.SafetensorError as error:
    raise UnusableError(f"is no whole safetensors file ({str(error).splitlines()[0]})") from error
  arrays = {name: _float32(name, tensor) for name, tensor in found}
  metadata = _metadata(contents[8 : 8 + int.from_bytes(contents[:8], "little")])
  text = metadata.get("facts", "")
  ours = "facts" in metadata or "sha256" in metadata
  if ours and metadata.get("sha256") != arrays_sha256(arrays, text):
    raise UnusableError("does not hold what was written (SHA-256)")
  for name, array in arrays.items():
    if not np.isfinite(array).all():
      raise UnusableError(f"holds numbers that are not finite, in {name}")
  return Tensors(arrays, _facts(metadata))


def read_facts(path: pathlib.Path) -> dict[str, Any]:
  """What a file says beside its tensors, without reading these. Raises UnusableError."""
  try:
    with path.open("rb") as file:
      begin = file.read(9)
      _refuse_pickles(begin)
      length = int.from_bytes(begin[:8], "little")
      header = begin[8:] + file.read(length - 1) if 0 < length <= _LONGEST_HEADER else b""
  except OSError as error:
    raise UnusableError(f"cannot be read ({error.strerror})") from error
  if not header or len(header) != length:
    raise UnusableError("is no whole safetensors file (its header is cut short)")
  return _facts(_metadata(header))


def _refuse_pickles(begin: bytes) -> None:
  # The length of a header, with which safetensors files begin, may look the same; the header is a JSON object.
  if begin.startswith(_PICKLES) and begin[8:] != b"{":
    raise UnusableError("is a pickle, which is not opened, as it may run anything; convert it to safetensors first")


def _metadata(header: bytes) -> dict[str, str]:
  try:
    tree = json.loads(header)
  except (ValueError, RecursionError) as error:
    raise UnusableError("is no whole safetensors file (its header is no JSON)") from error
  metadata = tree.get("__metadata__", {}) if isinstance(tree, dict) else {}
  return metadata if isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values()) else {}


def _facts(metadata: Mapping[str, str]) -> dict[str, Any]:
  try:
    facts = json.loads(metadata.get("facts", "{}"))
  except (ValueError, RecursionError) as error:
    raise UnusableError("has metadata that are no JSON") from error
  return facts if isinstance(facts, dict) else {}


def _float32(name: str, tensor: Mapping[str, Any]) -> np.ndarray:
  match tensor["dtype"]:
    case "F32":
      array = np.frombuffer(tensor["data"], "<f4")
    case "F16":
      array = np.frombuffer(tensor["data"], "<f2").astype(np.float32)
    case "BF16":  # the upper half of a float32
      array = (np.frombuffer(tensor["data"], "<u2").astype(np.uint32) << 16).view(np.float32)
    case other:
      raise UnusableError(f"holds {name} as {other}; only F32, F16 and BF16 are weights")
  return array.reshape(tensor["shape"])
