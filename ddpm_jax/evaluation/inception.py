"""The features of the FID and the classes of the Inception Score: images -> InceptionV3, with weights from a file.

Two ways from pixels to the network, which must not be mixed:

- fid: pixels / 255, bilinear without antialiasing, 2x - 1, as pytorch-fid 0.3.0 does.
- clean: Pillow's bicubic with antialiasing, without rounding to integers, clipped to [0, 255], (x - 128) / 128, as
  clean-fid 0.1.35 does (Parmar et al. 2022).

Class probabilities are without the bias of the last layer, as in the code of the Inception Score's authors.
"""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.devices.batched import BatchedFn
from ddpm_jax.devices.mesh import DeviceMesh
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.features import Extracted, Features
from ddpm_jax.models.inception import NUM_CLASSES, NUM_FEATURES, SIZE, InceptionV3, tensor_shapes, variables_of
from ddpm_jax.weights.converted import Weights, read_converted

# pt_inception-2015-12-05-6726825d.pth, 95,628,359 bytes, of github.com/mseitzer/pytorch-fid/releases/tag/fid_weights.
SOURCE_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_MAKE = "python experiments/convert_inception.py makes it from pt_inception-2015-12-05-6726825d.pth"
_FETCH = f"{_MAKE} (https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights)"
_PREPROCESSING = "1"  # another one where `preprocess` gives other numbers


def load_inception(path: str, resize: str, mesh: DeviceMesh, batch_size: int) -> Features:
  """The InceptionV3 of the FID as an extractor of features [B, 2048] and probabilities [B, 1008].

  Args:
    path: of a safetensors file that experiments/convert_inception.py made.
    resize: 'fid' or 'clean'.
    mesh: the devices that share the images.
    batch_size: images of one call of the compiled function.

  Raises:
    UserError: if there is no such file, or anything in it is not as it was published.
  """
  return inception_features(read_weights(path), resize, mesh, batch_size)


def inception_features(weights: Weights, resize: str, mesh: DeviceMesh, batch_size: int) -> Features:
  """The extractor of `load_inception`, from weights that are read already."""
  model = InceptionV3(output_bias=False)
  variables = jax.tree.map(
    lambda leaf: jax.make_array_from_callback(leaf.shape, mesh.replicated, lambda piece: leaf[piece]),
    variables_of(weights.tensors),
  )

  def measure(variables: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    features, logits = model.apply(variables, preprocess(images, resize))
    assert isinstance(logits, jax.Array)
    return features, jax.nn.softmax(logits)

  rows = BatchedFn(measure, mesh, matmul_precision="highest")

  def extract(images: np.ndarray) -> Extracted:
    if images.dtype != np.uint8 or images.ndim != 4:
      raise ValueError(f"not uint8 [B, H, W, C]: {images.dtype} {images.shape}")
    if images.shape[-1] not in (1, 3):
      raise UserError(f"features: inception takes images of 1 or 3 channels, not {images.shape[-1]}; use another one")
    parts = [
      rows(variables, images[start : start + batch_size], size=batch_size)
      for start in range(0, len(images), batch_size)
    ]
    none = (np.zeros((0, NUM_FEATURES), np.float32), np.zeros((0, NUM_CLASSES), np.float32))
    return Extracted(*(np.concatenate(columns) for columns in zip(none, *parts, strict=True)))

  # Release 0.1 multiplied with the bits that are the default, which on CPUs alone are the same.
  precision = "" if mesh.platform == "cpu" else " highest"
  identity = hashlib.sha256(f"{weights.digest} {resize} {_PREPROCESSING}{precision}".encode()).hexdigest()
  return Features("inception", identity, {"resize": resize, "source_sha256": weights.source}, extract)


def preprocess(images: jax.Array, resize: str) -> jax.Array:
  """Pixels as the network takes them.

  Args:
    images: uint8 [B, H, W, 1 or 3]; grey is repeated, as by Pillow's conversion to RGB in both references.
    resize: 'fid' or 'clean'.

  Returns:
    float32 [B, 299, 299, 3] in [-1, 1].
  """
  rows, columns = (jnp.asarray(resize_matrix(resize, size), jnp.float32) for size in images.shape[1:3])
  x = images.astype(jnp.float32)
  x = jnp.einsum("jw,bhwc->bhjc", columns, x, precision=jax.lax.Precision.HIGHEST)
  x = jnp.einsum("ih,bhjc->bijc", rows, x, precision=jax.lax.Precision.HIGHEST)
  x = 2.0 * (x / 255.0) - 1.0 if resize == "fid" else (jnp.clip(x, 0.0, 255.0) - 128.0) / 128.0
  return jnp.broadcast_to(x, (*x.shape[:3], 3))


def resize_matrix(resize: str, size: int) -> np.ndarray:
  """How `size` pixels in a line become 299: float64 [299, size], each row sums to 1.

  Raises:
    ValueError: for an unknown `resize`.
  """
  match resize:
    case "fid":
      return _bilinear(size)
    case "clean":
      return _bicubic(size)
    case _:
      raise ValueError(f"unknown resize {resize!r}")


def _bilinear(size: int) -> np.ndarray:
  """torch.nn.functional.interpolate(mode='bilinear', align_corners=False): two pixels, also where it shrinks.

  PyTorch keeps the step and the positions in float32, so they are rounded to it here: at 640 pixels that changes
  the result by 7e-5, and it is part of the reference.
  """
  step = np.float64(np.float32(size) / np.float32(SIZE))
  positions = np.maximum(step * (np.arange(SIZE) + 0.5) - 0.5, 0.0).astype(np.float32).astype(np.float64)
  low = positions.astype(np.int64)
  matrix = np.zeros((SIZE, size))
  matrix[np.arange(SIZE), low] += 1.0 - (positions - low)
  matrix[np.arange(SIZE), np.minimum(low + 1, size - 1)] += positions - low
  return matrix


def _bicubic(size: int) -> np.ndarray:
  """Pillow's BICUBIC: Keys' kernel with a = -0.5, as wide as the step where it shrinks, normalised at the border."""
  step = size / SIZE
  centers = (np.arange(SIZE) + 0.5) * step
  x = np.abs(np.arange(size) + 0.5 - centers[:, None]) / max(step, 1.0)
  near = (1.5 * x - 2.5) * x**2 + 1.0
  far = -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0)
  matrix = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
  return matrix / matrix.sum(axis=1, keepdims=True)


def read_weights(path: str, source_sha256: str = SOURCE_SHA256) -> Weights:
  """Reads and verifies a file of weights.

  Args:
    path: of a safetensors file that experiments/convert_inception.py made.
    source_sha256: what it must have been made from.

  Raises:
    UserError: as `load_inception`.
  """
  if not path:
    raise UserError(f"inception_weights: none are given; use --inception_weights=FILE, and {_FETCH}")
  return read_converted("inception_weights", path, tensor_shapes(), source_sha256, "of the FID", _MAKE, _FETCH)
