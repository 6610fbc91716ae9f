"""Converts the FID's InceptionV3 from PyTorch's format to the file that --inception_weights reads. Run it once.

  pip install torch numpy safetensors
  python experiments/convert_inception.py pt_inception-2015-12-05-6726825d.pth inception.safetensors

The first file is at https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights (95,628,359 bytes). Its SHA-256 is
compared with the published one before anything in it is read. Needs nothing of ddpm_jax, so PyTorch may live in an
environment of its own.
"""

from __future__ import annotations

import hashlib
import pathlib
import sys
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save_file

SOURCE_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def file_sha256(path: pathlib.Path) -> str:
  """SHA-256 of a file. Raises OSError."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def read_source(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The float32 tensors of a state dict of PyTorch, without the counters of BatchNorm, which nothing uses."""
  import torch

  state = torch.load(path, map_location="cpu", weights_only=True)
  return {name: tensor.detach().numpy() for name, tensor in state.items() if not name.endswith(".num_batches_tracked")}


def tensors_sha256(tensors: Mapping[str, np.ndarray]) -> str:
  """SHA-256 over name, type, shape and little-endian bytes of each tensor, sorted by name; the reader's, too."""
  digest = hashlib.sha256()
  for name in sorted(tensors):
    tensor = np.asarray(tensors[name])
    digest.update(f"{name} {tensor.dtype.name} {list(tensor.shape)}\n".encode())
    digest.update(np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<")).data)
  return digest.hexdigest()


def write(tensors: Mapping[str, np.ndarray], source_sha256: str, path: pathlib.Path) -> None:
  """Writes the tensors with what they come from. Raises OSError."""
  whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
  temporary = path.with_name(f".{path.name}.tmp")
  save_file(whole, temporary, {"source_sha256": source_sha256, "tensors_sha256": tensors_sha256(whole)})
  temporary.replace(path)


def convert(source: pathlib.Path, target: pathlib.Path, source_sha256: str = SOURCE_SHA256) -> None:
  """Converts a file. Exits with a message if it is not the published one."""
  if not source.is_file():
    sys.exit(f"There is no file {source}.")
  found = file_sha256(source)
  if found != source_sha256:
    sys.exit(f"{source} has SHA-256 {found}, not {source_sha256}: it is another file, or not whole; download it again.")
  write(read_source(source), found, target)
  print(f"Written: {target}. Use it with --features=inception --inception_weights={target}")


if __name__ == "__main__":
  if len(sys.argv) != 3:
    sys.exit(__doc__)
  convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
