"""The converter of latent diffusion's autoencoders: every tensor of such a file finds its place in ours."""

import importlib
import pathlib

import numpy as np
import pytest
import safetensors.numpy

import ddpm_jax


@pytest.fixture
def convert(monkeypatch):
  """The script, which imports another one beside it."""
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / "experiments")
  return importlib.import_module("convert_latent_diffusion")


FLAGS = ["--channels=4", "--channel_multipliers=1,2", "--num_res_blocks=1", "--attention_resolutions=4"]
FLAGS += ["--latent_channels=2", "--norm_groups=2", "--image_size=8"]
OF_KIND = {"kl": [], "vq": ["--regularizer=vq", "--codebook_size=5"]}


def tensors(kind: str) -> dict[str, np.ndarray]:
  """A state dict of AutoencoderKL or VQModel of ldm/models/autoencoder.py with these sizes, by its constructor.

  That is Encoder and Decoder of ldm/modules/diffusionmodules/model.py with ch=4, ch_mult=(1,2), num_res_blocks=1,
  attn_resolutions=(4,), resolution=8, z_channels=2.
  """
  shapes = {}

  def conv(name, inputs, out, kernel=3):
    shapes.update({f"{name}.weight": (out, inputs, kernel, kernel), f"{name}.bias": (out,)})

  def norm(name, width):
    shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

  def res(name, inputs, out):
    norm(f"{name}.norm1", inputs)
    conv(f"{name}.conv1", inputs, out)
    norm(f"{name}.norm2", out)
    conv(f"{name}.conv2", out, out)
    if inputs != out:
      conv(f"{name}.nin_shortcut", inputs, out, 1)

  def attention(name, width):
    norm(f"{name}.norm", width)
    for layer in ("q", "k", "v", "proj_out"):
      conv(f"{name}.{layer}", width, width, 1)

  def middle(name):
    res(f"{name}.mid.block_1", 8, 8)
    attention(f"{name}.mid.attn_1", 8)
    res(f"{name}.mid.block_2", 8, 8)

  moments = 4 if kind == "kl" else 2
  conv("encoder.conv_in", 3, 4)
  res("encoder.down.0.block.0", 4, 4)
  conv("encoder.down.0.downsample.conv", 4, 4)
  res("encoder.down.1.block.0", 4, 8)
  attention("encoder.down.1.attn.0", 8)
  middle("encoder")
  norm("encoder.norm_out", 8)
  conv("encoder.conv_out", 8, moments)
  conv("decoder.conv_in", 2, 8)
  middle("decoder")
  for i in (0, 1):
    res(f"decoder.up.1.block.{i}", 8, 8)
    attention(f"decoder.up.1.attn.{i}", 8)
  conv("decoder.up.1.upsample.conv", 8, 8)
  res("decoder.up.0.block.0", 8, 4)
  res("decoder.up.0.block.1", 4, 4)
  norm("decoder.norm_out", 4)
  conv("decoder.conv_out", 4, 3)
  conv("quant_conv", moments, moments, 1)
  conv("post_quant_conv", 2, 2, 1)
  if kind == "vq":
    shapes["quantize.embedding.weight"] = (5, 2)
  rng = np.random.default_rng(0)
  return {name: rng.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_every_tensor_has_a_place(convert, kind, prefix, tmp_path, capsys):
  """Of an autoencoder's own file, and of a latent model's; what is no part of it is said."""
  theirs, source, target = tensors(kind), tmp_path / "model.safetensors", tmp_path / "out.safetensors"
  others = {"loss.discriminator.main.0.weight": np.zeros(3, np.float32), "model_ema.decay": np.zeros(1, np.float32)}
  safetensors.numpy.save_file({prefix + name: tensor for name, tensor in (theirs | others).items()}, source)
  convert.main([str(source), str(target), *FLAGS, *OF_KIND[kind]])
  said = capsys.readouterr().out
  assert "Left out: loss (1 tensors), model_ema (1 tensors)" in said and f"--first_stage={target}" in said
  model = ddpm_jax.load(target)
  assert (model.image_shape, model.latent_shape) == ((8, 8, 3), (4, 4, 2))
  ours = dict(model.params)
  kernels = {
    "encoder.down.1.block.0.conv1.weight": ours["encoder"]["down1_block0"]["conv1"]["kernel"],
    "decoder.up.1.block.1.conv2.weight": ours["decoder"]["up1_block1"]["conv2"]["kernel"],
    "decoder.up.0.block.1.conv1.weight": ours["decoder"]["up0_block1"]["conv1"]["kernel"],
  }
  for name, kernel in kernels.items():
    np.testing.assert_array_equal(np.asarray(kernel).transpose(3, 2, 0, 1), theirs[name])
  assert model.decode(model.encode(np.zeros((1, 8, 8, 3), np.uint8))).shape == (1, 8, 8, 3)


def test_what_does_not_fit_is_named(convert, tmp_path):
  source, target = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
  theirs = tensors("kl")
  gone = {name: tensor for name, tensor in theirs.items() if name != "decoder.up.0.block.1.conv1.weight"}
  for found, flags, words in (
    ({"a": np.zeros(1, np.float32)}, FLAGS, "no weights of an autoencoder of latent diffusion"),
    (gone, FLAGS, "decoder.up_blocks.1.resnets.1.conv1.weight"),
    (theirs, [*FLAGS, "--num_res_blocks=2"], "encoder.down_blocks.0.resnets.1"),
    (theirs, FLAGS[:-1], "image_size: missing"),
    (theirs, ["--preset=ldm_celebahq256"], "has no effect with stage=autoencoder"),
  ):
    safetensors.numpy.save_file(found, source)
    with pytest.raises(SystemExit, match=words):
      convert.main([str(source), str(target), *flags])
    assert not target.exists()
