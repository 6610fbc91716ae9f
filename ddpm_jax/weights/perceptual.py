"""The weights of LPIPS, from the file that experiments/convert_lpips.py makes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.models.build import Params
from ddpm_jax.models.lpips import abstract_params, tensor_names
from ddpm_jax.weights.converted import read_converted
from ddpm_jax.weights.names import leaves_of, tree_of

# vgg16-397923af.pth of torchvision, and weights/v0.1/vgg.pth of the package lpips 0.1.4.
SOURCE_SHA256 = (
  "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0 "
  "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
)
_MAKE = "python experiments/convert_lpips.py makes it from vgg16-397923af.pth and the vgg.pth of the package lpips"
_FETCH = f"{_MAKE}, and says where they are"


class PerceptualWeights(NamedTuple):
  """LPIPS.

  Attributes:
    params: of `models.build.lpips`, float32 NumPy arrays.
    digest: SHA-256 of the tensors.
  """

  params: Params
  digest: str


def load_lpips(path: str, source_sha256: str = SOURCE_SHA256) -> PerceptualWeights:
  """Reads and verifies the file of --lpips_weights.

  Args:
    path: of a safetensors file that experiments/convert_lpips.py made.
    source_sha256: what it must have been made from, two digests.

  Raises:
    UserError: if there is no such file, or anything in it is not as it was published.
  """
  if not path:
    raise UserError(f"lpips_weights: none are given; use --lpips_weights=FILE, and {_FETCH}")
  weights = read_converted("lpips_weights", path, tensor_shapes(), source_sha256, "of LPIPS", _MAKE, _FETCH)
  return PerceptualWeights(params_of(weights.tensors), weights.digest)


def tensor_shapes() -> dict[str, tuple[int, ...]]:
  """Name -> shape of each tensor in the files that the weights come from, which are PyTorch's."""
  shapes, found = {path: leaf.shape for path, leaf in leaves_of(abstract_params()).items()}, {}
  for name, path in tensor_names().items():
    shape = shapes[path]
    kernel = tuple(shape[i] for i in (3, 2, 0, 1)) if len(shape) == 4 else shape
    found[name] = (1, *shape, 1, 1) if _is_weights(path) else kernel  # of the channels of a layer: a 1x1 convolution
  return found


def params_of(tensors: dict[str, np.ndarray]) -> Params:
  """The parameters of the module from tensors with the names and shapes of `tensor_shapes`."""
  leaves = {}
  for name, path in tensor_names().items():
    tensor = tensors[name].ravel() if _is_weights(path) else tensors[name]
    leaves[path] = np.ascontiguousarray(tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor)
  return tree_of(leaves)


def _is_weights(path: tuple[str, ...]) -> bool:
  return path[0] != "vgg16"
