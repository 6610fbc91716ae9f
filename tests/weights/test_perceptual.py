"""The weights of LPIPS: from the files of others by the converter to the parameters, and what is refused."""

import hashlib
import importlib.util
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.models import lpips
from ddpm_jax.weights import perceptual
from tests.weights.make_diffusers_golden import random_tensor

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "convert_lpips.py"
SPEC = importlib.util.spec_from_file_location("convert_lpips", SCRIPT)
assert SPEC and SPEC.loader
convert_lpips = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(convert_lpips)


@pytest.fixture
def tensors(monkeypatch) -> Mapping[str, np.ndarray]:
  """Random weights with few channels."""
  monkeypatch.setattr(lpips, "STAGES", ((2, 3), (3, 3), (4, 4, 4), (5, 5, 5), (5, 5, 5)))
  return {name: random_tensor(name, shape) for name, shape in perceptual.tensor_shapes().items()}


def test_the_way_of_the_weights(tmp_path, monkeypatch, tensors):
  """Two files of PyTorch, whose reading is stood in for, become one; of it the parameters."""
  sources, target = [tmp_path / "vgg16.pth", tmp_path / "vgg.pth"], tmp_path / "lpips.safetensors"
  for source in sources:
    source.write_text(source.name)
  halves = {
    "vgg16.pth": {name: tensor for name, tensor in tensors.items() if name.startswith("features.")},
    "vgg.pth": {name: tensor for name, tensor in tensors.items() if name.startswith("lin")},
  }
  monkeypatch.setattr(convert_lpips, "read_source", lambda path: halves[path.name])
  digests = [hashlib.sha256(source.name.encode()).hexdigest() for source in sources]
  convert_lpips.convert(sources, target, digests)
  params, digest = perceptual.load_lpips(str(target), " ".join(digests))
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, lpips.abstract_params())
  kernel = tensors["features.17.weight"]
  assert params["vgg16"]["conv4_1"]["kernel"][1, 2, 3, 4] == kernel[4, 3, 1, 2]
  np.testing.assert_array_equal(params["vgg16"]["conv5_3"]["bias"], tensors["features.28.bias"])
  np.testing.assert_array_equal(params["weights2"], tensors["lin1.model.1.weight"][0, :, 0, 0])
  assert digest == convert_lpips.tensors_sha256(tensors)
  with pytest.raises(SystemExit, match=r"vgg.pth has SHA-256 .* get it again"):
    convert_lpips.convert(sources, target, [digests[0], "0" * 64])
  with pytest.raises(SystemExit, match="There is no file"):
    convert_lpips.convert([tmp_path / "nothing", sources[1]], target, digests)


def test_what_is_no_such_file(tmp_path, tensors):
  """One line for each, which names the option, the file and the remedy."""
  path = tmp_path / "lpips.safetensors"
  cases = {
    "there is no file": lambda: None,
    "holds other weights than those of LPIPS": lambda: convert_lpips.write(tensors, "0" * 64, path),
    "lacks lin4.model.1.weight": lambda: convert_lpips.write(
      {name: tensor for name, tensor in tensors.items() if "lin4" not in name}, perceptual.SOURCE_SHA256, path
    ),
    "not F32 [2]": lambda: convert_lpips.write(
      tensors | {"features.0.bias": np.zeros(7, np.float32)}, perceptual.SOURCE_SHA256, path
    ),
    "no whole safetensors file": lambda: path.write_bytes(path.read_bytes()[:50]),
  }
  wrong = {}
  for words, prepare in cases.items():
    prepare()
    with pytest.raises(UserError) as caught:
      perceptual.load_lpips(str(path))
    message = str(caught.value)
    named = message.startswith("lpips_weights: ") and "experiments/convert_lpips.py" in message and str(path) in message
    if words not in message or "\n" in message or not named:
      wrong[words] = message
  assert wrong == {}
  with pytest.raises(UserError, match="--lpips_weights=FILE"):
    perceptual.load_lpips("")
  convert_lpips.write(tensors, perceptual.SOURCE_SHA256, path)
  assert perceptual.load_lpips(str(path)).digest
  assert " ".join(convert_lpips.SOURCE_SHA256) == perceptual.SOURCE_SHA256
