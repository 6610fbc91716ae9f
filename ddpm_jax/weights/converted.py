"""Published weights of networks that only measure, in files that a converter under experiments/ makes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ddpm_jax.errors import UserError


class Weights(NamedTuple):
  """What a file of weights holds.

  Attributes:
    tensors: float32, with the names and shapes that were asked for.
    digest: their `tensors_sha256`.
    source: SHA-256 of the files that they come from.
  """

  tensors: dict[str, np.ndarray]
  digest: str
  source: str


def tensors_sha256(tensors: Mapping[str, np.ndarray]) -> str:
  """SHA-256 over name, type, shape and little-endian bytes of each tensor, sorted by name; the converters', too."""
  digest = hashlib.sha256()
  for name in sorted(tensors):
    tensor = np.asarray(tensors[name])
    digest.update(f"{name} {tensor.dtype.name} {list(tensor.shape)}\n".encode())
    digest.update(np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<")).data)
  return digest.hexdigest()


def read_converted(
  option: str,
  path: str,
  shapes: Mapping[str, tuple[int, ...]],
  source_sha256: str,
  what: str,
  make: str,
  fetch: str,
) -> Weights:
  """Reads and verifies a file of weights.

  Args:
    option: that names it.
    path: of a safetensors file.
    shapes: of each tensor.
    source_sha256: what it must have been made from.
    what: whose weights those are, such as 'of the FID'.
    make: what makes the file.
    fetch: the same, and where to get what it is made from.

  Raises:
    UserError: if there is no such file, or anything in it is not as it was published.
  """
  try:
    with safe_open(path, framework="numpy") as file:
      metadata = file.metadata() or {}
      slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict, not iterable
      found = {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}
      if problem := _misfit(path, found, shapes):
        raise UserError(f"{option}: {problem}; {make}")
      tensors = {name: file.get_tensor(name) for name in slices}
  except FileNotFoundError as error:
    raise UserError(f"{option}: there is no file {path}; {fetch}") from error
  except OSError as error:
    raise UserError(f"{option}: {path} cannot be read ({error.strerror or error}); {make}") from error
  except SafetensorError as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"{option}: {path} is no whole safetensors file ({reason}); {make}") from error
  digest, source = tensors_sha256(tensors), metadata.get("source_sha256")
  if source is None or "tensors_sha256" not in metadata:
    raise UserError(f"{option}: {path} does not say what it was made from; {make}")
  if digest != metadata["tensors_sha256"]:
    raise UserError(f"{option}: {path} is damaged, its tensors are not those that it was made with; {make}")
  if source != source_sha256:
    raise UserError(f"{option}: {path} holds other weights than those {what} (source {source}); {make}")
  return Weights(tensors, digest, source)


def _misfit(
  path: str, found: Mapping[str, tuple[str, tuple[int, ...]]], expected: Mapping[str, tuple[int, ...]]
) -> str:
  """The first name, type or shape of a tensor that is not the network's; empty: there is none."""
  for problem, names in (("lacks", expected.keys() - found.keys()), ("has too much:", found.keys() - expected.keys())):
    if names:
      more = f" and {len(names) - 1} more" if len(names) > 1 else ""
      return f"{path} {problem} {min(names)}{more}"
  for name, shape in expected.items():
    dtype, dimensions = found[name]
    if (dtype, dimensions) != ("F32", shape):
      return f"{name} in {path} is {dtype} {list(dimensions)}, not F32 {list(shape)}"
  return ""
