"""The perceptual distance against the package of its authors, with their weights of channels and a random VGG16.

pip install torch lpips
python -m pytest tests/interop/test_lpips.py

That package takes the layers of VGG16 from torchvision, and nothing else; they are made here.
"""

import hashlib
import pathlib
import sys
import types
import warnings

import jax
import numpy as np
import pytest

from ddpm_jax.models import build
from ddpm_jax.weights import perceptual
from tests.weights.make_diffusers_golden import nchw, network_input
from tests.weights.test_perceptual import convert_lpips

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  import torch
  from torch import nn


def vgg16(**_) -> types.SimpleNamespace:
  """`torchvision.models.vgg16`, its `features` alone: configuration D of Simonyan and Zisserman 2015."""
  layers: list[nn.Module] = []
  channels = 3
  for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
    layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)] if width else [nn.MaxPool2d(2, 2)]
    channels = width or channels
  return types.SimpleNamespace(features=nn.Sequential(*layers))


@pytest.fixture(scope="module")
def lpips():
  models = types.ModuleType("torchvision.models")
  models.vgg16 = vgg16  # pyright: ignore[reportAttributeAccessIssue]
  package = types.ModuleType("torchvision")
  package.models = models  # pyright: ignore[reportAttributeAccessIssue]
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "torchvision", package)
    patch.setitem(sys.modules, "torchvision.models", models)
    import lpips

    yield lpips


pytestmark = pytest.mark.filterwarnings("ignore")  # what others warn of is theirs


def test_the_distance_is_that_of_the_authors(tmp_path, lpips):
  """Through the converter: the files that it is given are of the real shapes; values and gradients agree."""
  torch.manual_seed(0)
  heads = pathlib.Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
  state = {f"features.{name}": tensor.clone() for name, tensor in vgg16().features.state_dict().items()}
  state = {name: 1.7 * t if t.ndim > 1 else 0.1 * torch.randn(t.shape) for name, t in state.items()}
  torch.save(state | {"classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")
  digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "vgg16.pth", heads)]
  assert digests[1] == convert_lpips.SOURCE_SHA256[1]
  convert_lpips.convert([tmp_path / "vgg16.pth", heads], tmp_path / "lpips.safetensors", digests)
  params, _ = perceptual.load_lpips(str(tmp_path / "lpips.safetensors"), " ".join(digests))

  theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
  own = theirs.net.state_dict()
  theirs.net.load_state_dict({name: state[f"features.{name.split('.', 1)[1]}"] for name in own})
  x, y = (np.tanh(network_input(name, (48, 40, 3))) for name in ("x", "y"))
  y = 0.7 * x + 0.3 * y
  one, other = (nchw(each).requires_grad_() for each in (x, y))
  expected = theirs(one, other)
  expected.sum().backward()
  gradient = jax.grad(lambda y: build.lpips(params, x, y).sum())(y)
  ours = build.lpips(params, x, y)
  found = expected.detach().numpy().ravel()
  print(f"distances {found}, relative error {np.abs(ours / found - 1).max():.1e}")
  assert (found > 0.01).all()
  np.testing.assert_allclose(ours, found, rtol=1e-4)
  assert other.grad is not None
  theirs_gradient = other.grad.numpy().transpose(0, 2, 3, 1)
  assert np.abs(gradient - theirs_gradient).max() < 1e-3 * np.abs(theirs_gradient).max()
