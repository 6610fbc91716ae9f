"""Converts the weights of LPIPS from PyTorch's format to the file that --lpips_weights reads. Run it once.

  pip install torch numpy safetensors
  python experiments/convert_lpips.py vgg16-397923af.pth vgg.pth lpips.safetensors

The first file is torchvision's VGG16, https://download.pytorch.org/models/vgg16-397923af.pth, the second one
lpips/weights/v0.1/vgg.pth in the package `lpips` 0.1.4 (7,289 bytes). Their SHA-256 are compared with the published
ones before anything in them is read. Needs nothing of ddpm_jax, so PyTorch may live in an environment of its own.
"""

from __future__ import annotations

import hashlib
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from safetensors.numpy import save_file

# Of VGG16, and of the weights of its channels.
SOURCE_SHA256 = (
  "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
  "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
)


def file_sha256(path: pathlib.Path) -> str:
  """SHA-256 of a file. Raises OSError."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def read_source(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The float32 tensors of a state dict of PyTorch, without the classifier of VGG16, which nothing uses."""
  import torch

  state = torch.load(path, map_location="cpu", weights_only=True)
  return {name: tensor.detach().numpy() for name, tensor in state.items() if not name.startswith("classifier.")}


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


def convert(
  sources: Sequence[pathlib.Path], target: pathlib.Path, source_sha256: Sequence[str] = SOURCE_SHA256
) -> None:
  """Converts the two files. Exits with a message if one of them is not the published one."""
  for source, expected in zip(sources, source_sha256, strict=True):
    if not source.is_file():
      sys.exit(f"There is no file {source}.")
    if (found := file_sha256(source)) != expected:
      sys.exit(f"{source} has SHA-256 {found}, not {expected}: it is another file, or not whole; get it again.")
  tensors = read_source(sources[0]) | read_source(sources[1])
  write(tensors, " ".join(source_sha256), target)
  print(f"Written: {target}. Use it with --perceptual=lpips --lpips_weights={target}")


if __name__ == "__main__":
  if len(sys.argv) != 4:
    sys.exit(__doc__)
  convert([pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])], pathlib.Path(sys.argv[3]))
