"""Autoencoders of diffusers here, and ours in diffusers: the same numbers. The discriminator in PyTorch.

pip install -e '.[test,interop]'
python -m pytest tests/interop
"""

import json
import warnings

import jax
import numpy as np
import pytest

from ddpm_jax.models.build import build_discriminator, num_params
from ddpm_jax.weights.autoencoders import read_autoencoder, write_autoencoder
from tests.weights.make_autoencoders_golden import (
  KL,
  VQ,
  image_shape,
  options,
  outputs_of,
  random_autoencoder,
)
from tests.weights.make_diffusers_golden import nchw, network_input

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  import diffusers
  import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # what others warn of is theirs

# The published ones (Rombach et al. 2022) with their parameters, on small images, and small ones.
LARGE = {
  "KL-f8": (options(KL, 64, 3, [128, 256, 512, 512], "----", 2, latent_channels=4, norm_num_groups=32), 83_653_863),
  "VQ-f4": (
    options(VQ, 32, 3, [128, 256, 512], "---", 2, norm_num_groups=32, num_vq_embeddings=8192, scaling_factor=1.0),
    55_322_782,
  ),
}
SMALL = {
  "one level": options(KL, 8, 3, [8], "-", 1),
  "attention everywhere, grey": options(KL, 16, 1, [12, 24, 36], "AAA", 2, norm_num_groups=3, latent_channels=2),
  "not square": options(KL, 8, 3, [8, 16], "-A", 1) | {"sample_size": [8, 16]},
  "no attention": options(VQ, 8, 3, [8, 16], "--", 1, mid_block_add_attention=False, scaling_factor=1.0),
  "wider, then narrower": options(VQ, 16, 3, [8, 24, 16], "-A-", 1, num_vq_embeddings=40, scaling_factor=1.0),
  "no quant convolutions": options(KL, 8, 3, [8, 16], "--", 1, use_quant_conv=False, use_post_quant_conv=False),
}


def relative(ours, theirs) -> float:
  return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def shape_of(kwargs):
  size = kwargs["sample_size"]
  return (*size, kwargs["in_channels"]) if isinstance(size, list) else image_shape(kwargs)


@pytest.mark.parametrize(
  ("kwargs", "parameters"), [*LARGE.values(), *((each, None) for each in SMALL.values())], ids=[*LARGE, *SMALL]
)
def test_one_autoencoder(tmp_path, kwargs, parameters):
  """Theirs to ours: moments, quantiser, decoder agree. Ours to theirs, with another scale: the same images."""
  theirs, shape = random_autoencoder(kwargs), shape_of(kwargs)
  theirs.save_pretrained(tmp_path / "theirs")
  network, params, found, _, _, notes = read_autoencoder(tmp_path / "theirs")
  assert found == shape and notes == () and (parameters is None or num_params(params) == parameters)
  x = network_input("x", shape)[: 1 if parameters else 2]
  expected, size = outputs_of(theirs, x), network.model.latent_channels
  moments = jax.jit(network.moments)(params, x)
  errors, z = {"moments": relative(moments, expected["moments"])}, moments[..., :size]
  if network.regularizer == "vq":
    z, indices = jax.jit(network.quantize)(params, z)
    assert (np.asarray(indices) == expected["indices"]).mean() > 0.999  # one that is as near to rounding may differ
    z = expected["quantized"]
  errors["decoded"] = relative(jax.jit(network.decode)(params, z), expected["decoded"])
  print({name: f"{error:.1e}" for name, error in errors.items()})
  assert expected["decoded"].std() > 0.05 and max(errors.values()) < 1e-5

  rng = np.random.default_rng(0)
  mean = rng.normal(size=size)
  std = np.exp(rng.normal(size=size)) if network.regularizer == "kl" else np.full(size, 0.4)
  (tmp_path / "ours").mkdir()
  write_autoencoder(tmp_path / "ours", network, params, mean, std, shape[:2])
  again = getattr(diffusers, kwargs["_class_name"]).from_pretrained(tmp_path / "ours").eval()
  written = json.loads((tmp_path / "ours" / "config.json").read_text())
  assert {name: again.config[name] for name in written} == written and again.config.scaling_factor == 1
  standard = outputs_of(again, x)
  np.testing.assert_allclose(standard["moments"][..., :size], (np.asarray(moments)[..., :size] - mean) / std, atol=1e-4)
  assert relative(standard["decoded"], expected["decoded"]) < 3e-5


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_discriminator(layers):
  """Its layers in PyTorch, as taming-transformers has them, with GroupNorm for BatchNorm."""
  network = build_discriminator(layers, (32, 32, 3))
  params = jax.jit(network.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: np.asarray(leaf + 0.05 * rng.standard_normal(leaf.shape), np.float32), params)
  modules, width = [torch.nn.Conv2d(3, 64, 4, 2, 1), torch.nn.LeakyReLU(0.2)], 64
  names = ["conv0", ""]
  for i in range(1, layers + 1):
    before, width = width, 64 * min(2**i, 8)
    modules += [
      torch.nn.Conv2d(before, width, 4, 2 if i < layers else 1, 1, bias=False),
      torch.nn.GroupNorm(32, width),
      torch.nn.LeakyReLU(0.2),
    ]
    names += [f"conv{i}", f"norm{i}", ""]
  modules.append(torch.nn.Conv2d(width, 1, 4, 1, 1))
  for name, module in zip([*names, "conv_out"], modules, strict=True):
    tensors = params.get(name, {})
    state = {"bias": tensors["bias"]} if "bias" in tensors else {}
    if name:
      weight = tensors["kernel"].transpose(3, 2, 0, 1) if "kernel" in tensors else tensors["scale"]
      module.load_state_dict({key: torch.tensor(value) for key, value in (state | {"weight": weight}).items()})
  x = network_input("x", (32, 32, 3))
  with torch.no_grad():
    expected = torch.nn.Sequential(*modules)(nchw(x))[:, 0].numpy()
  assert expected.std() > 0.1
  np.testing.assert_allclose(jax.jit(network)(params, x), expected, atol=2e-5 * np.abs(expected).max())
