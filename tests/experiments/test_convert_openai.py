"""The converter of OpenAI's U-Nets against a forward pass that follows the names of its files, in float64 NumPy."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.models.build import UNetNetwork, build_autoencoder, build_model
from ddpm_jax.weights import file
from ddpm_jax.weights.autoencoders import AutoencoderWeights, write_autoencoder_file
from tests.models import reference


def converter():
  path = pathlib.Path(__file__).parents[2] / "experiments" / "convert_openai.py"
  spec = importlib.util.spec_from_file_location("convert_openai", path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


convert_openai = converter()
SIZES = {
  "channels": 8,
  "channel_multipliers": (1, 2),
  "num_res_blocks": 1,
  "attention_resolutions": (4,),
  "norm_groups": 2,  # theirs has 32
}
FLAGS = ["--channels=8", "--channel_multipliers=1,2", "--num_res_blocks=1", "--attention_resolutions=4"]
FLAGS += ["--norm_groups=2"]


def tensors(block: str, classes: int = 0, outputs: int = 3) -> dict[str, np.ndarray]:
  """A state dict of UNetModel of guided_diffusion/unet.py with the sizes of `SIZES`, as its constructor makes it."""
  shapes, width, ups = {}, 8, {"ldm": 1, "iddpm": 2, "adm": 2}[block]

  def res(name, inputs, out):
    shapes.update({f"{name}.in_layers.0.weight": (inputs,), f"{name}.in_layers.2.weight": (out, inputs, 3, 3)})
    shapes.update({f"{name}.emb_layers.1.weight": (ups * out, 4 * width), f"{name}.out_layers.0.weight": (out,)})
    shapes[f"{name}.out_layers.3.weight"] = (out, out, 3, 3)
    if inputs != out:
      shapes[f"{name}.skip_connection.weight"] = (out, inputs, 1, 1)

  def attention(name, out):
    shapes.update({f"{name}.norm.weight": (out,), f"{name}.qkv.weight": (3 * out, out, 1)})
    shapes[f"{name}.proj_out.weight"] = (out, out, 1)

  def resample(name, out, conv):
    if block == "adm":
      res(name, out, out)
    else:
      shapes[f"{name}.{conv}.weight"] = (out, out, 3, 3)

  shapes.update({"time_embed.0.weight": (32, 8), "time_embed.2.weight": (32, 32)})
  shapes["input_blocks.0.0.weight"] = (8, 3, 3, 3)
  res("input_blocks.1.0", 8, 8)
  resample("input_blocks.2.0", 8, "op")
  res("input_blocks.3.0", 8, 16)
  attention("input_blocks.3.1", 16)
  res("middle_block.0", 16, 16)
  attention("middle_block.1", 16)
  res("middle_block.2", 16, 16)
  for i, inputs in enumerate((32, 24)):
    res(f"output_blocks.{i}.0", inputs, 16)
    attention(f"output_blocks.{i}.1", 16)
  resample("output_blocks.1.2", 16, "conv")
  for i, inputs in enumerate((24, 16)):
    res(f"output_blocks.{i + 2}.0", inputs, 8)
  shapes.update({"out.0.weight": (8,), "out.2.weight": (outputs, 8, 3, 3)})
  shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
  if classes:
    shapes["label_emb.weight"] = (classes, 32)
  rng = np.random.default_rng(0)
  return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def forward(state, x, timesteps, y, block: str, heads: int, order: str) -> np.ndarray:
  """`UNetModel.forward`, of which each module is what its tensors say that it is."""
  state = {name: tensor.astype(np.float64) for name, tensor in state.items()}
  left = set(state)

  def layer(name):  # as `reference` takes it
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    if weight.ndim == 1:
      return {"scale": weight, "bias": bias}
    pixels = weight.ndim == 4 and weight.shape[-1] == 3
    kernel = weight.transpose(2, 3, 1, 0) if pixels else weight.reshape(weight.shape[:2]).T
    return {"kernel": kernel, "bias": bias}

  def attend(h, name):
    batch, height, width, channels = h.shape
    qkv = reference.dense(reference.group_norm(h, layer(f"{name}.norm"), 2, 1e-5), layer(f"{name}.qkv"))
    qkv = qkv.reshape(batch, height * width, *{"legacy": (heads, 3, -1), "new": (3, heads, channels // heads)}[order])
    q, k, v = np.moveaxis(qkv, {"legacy": 3, "new": 2}[order], 0)  # [B, positions, heads, size]
    weight = np.exp(np.einsum("bthc,bshc->bhts", q, k) / np.sqrt(channels // heads))
    a = np.einsum("bhts,bshc->bthc", weight / weight.sum(-1, keepdims=True), v).reshape(h.shape)
    return h + reference.dense(a, layer(f"{name}.proj_out"))

  def module(h, name):
    if f"{name}.qkv.weight" in state:
      return attend(h, name)
    if f"{name}.op.weight" in state:
      return reference.conv(h, layer(f"{name}.op"), stride=2, around=(1, 1))
    if f"{name}.conv.weight" in state:
      return reference.conv(reference.repeat(h), layer(f"{name}.conv"))
    if f"{name}.weight" in state:
      return reference.conv(h, layer(name))
    down, up = name == "input_blocks.2.0", name == "output_blocks.1.2"
    move = reference.mean_of_four if down else reference.repeat if up else lambda x: x
    parts = {"norm1": "in_layers.0", "conv1": "in_layers.2", "temb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    p = {ours: layer(f"{name}.{theirs}") for ours, theirs in parts.items()} | {"conv2": layer(f"{name}.out_layers.3")}
    if f"{name}.skip_connection.weight" in state:
      p["shortcut"] = layer(f"{name}.skip_connection")
    return reference.openai_res_block(h, emb, p, 2, block != "ldm", move)

  def sequence(h, name):
    while any(tensor.startswith(f"{name}.") for tensor in left):
      first = min(tensor for tensor in left if tensor.startswith(f"{name}."))
      part = ".".join(first.split(".")[: name.count(".") + 2])
      h = module(h, part)
      left.difference_update([tensor for tensor in left if tensor.startswith(f"{part}.")])
    return h

  angles = timesteps[:, None] * np.exp(-np.log(10000) * np.arange(4) / 4)
  emb = np.concatenate([np.cos(angles), np.sin(angles)], 1)
  emb = reference.dense(reference.swish(reference.dense(emb, layer("time_embed.0"))), layer("time_embed.2"))
  emb = emb if y is None else emb + state["label_emb.weight"][y]
  hs, h = [], x
  for i in range(4):
    h = sequence(h, f"input_blocks.{i}")
    hs.append(h)
  h = sequence(h, "middle_block")
  for i in range(4):
    h = sequence(np.concatenate([h, hs.pop()], -1), f"output_blocks.{i}")
  return reference.conv(reference.swish(reference.group_norm(h, layer("out.0"), 2, 1e-5)), layer("out.2"))


def converted(tmp_path, state, *arguments):
  """What the command makes of the tensors: (config, shape of the images, parameters)."""
  source, target = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
  source.write_bytes(safetensors.numpy.save(state))
  convert_openai.main([str(source), str(target), "--image_size=8", *FLAGS, *arguments])
  config, shape, _ = file.describe(target)
  return config, shape, file.read_params(target, config.model, shape)


@pytest.mark.parametrize(
  ("block", "order", "classes", "outputs"),
  [("ldm", "legacy", 0, 3), ("iddpm", "legacy", 0, 6), ("adm", "new", 3, 3), ("adm", "legacy", 0, 6)],
)
def test_the_converted_network_is_the_same(block, order, classes, outputs, tmp_path):
  """With two heads of eight channels; of outputs for learned variances the first half is left."""
  state = tensors(block, classes, outputs)
  options = [f"--block={block}", "--head_channels=8", f"--qkv_order={order}", "--beta_schedule=cosine"]
  options += ["--conditioning=class", f"--num_classes={classes}"] if classes else []
  config, shape, params = converted(tmp_path, state, *options)
  assert shape == (8, 8, 3) and config.diffusion.beta_schedule == "cosine"
  assert (
    config.model
    == config_lib.override(
      Config(), SIZES | {"block": block, "head_channels": 8, "conditioning": "class", "num_classes": classes}
    ).model
  )
  rng = np.random.default_rng(1)
  x, timesteps, y = rng.standard_normal((2, 8, 8, 3)), np.array([2, 976]), np.array([2, 0]) if classes else None
  expected = {each: forward(state, x, timesteps, y, block, 2, each)[..., :3] for each in ("legacy", "new")}
  network = UNetNetwork(build_model(config.model, shape))
  got = jax.jit(network)(params, jnp.asarray(x, jnp.float32), jnp.asarray(timesteps), y)
  np.testing.assert_allclose(got, expected.pop(order), atol=1e-4 * np.abs(got).max())
  (other,) = expected.values()
  assert np.abs(got - other).max() > 0.01 * np.abs(got).max()


def test_timesteps_that_are_not_rescaled_may_be_of_any_number(tmp_path):
  options = ["--block=adm", "--qkv_order=new", "--num_heads=2", "--num_timesteps=4000", "--rescale_timesteps=False"]
  assert converted(tmp_path, tensors("adm"), *options)[0].diffusion.num_timesteps == 4000


def first_stage(folder: pathlib.Path) -> pathlib.Path:
  """A file of an autoencoder that makes latents of 8x8x3 of 16x16 pixels."""
  sizes = {"stage": "autoencoder", "channels": 4, "channel_multipliers": (1, 2), "latent_channels": 3}
  config, shape, path = config_lib.override(Config(), sizes), (16, 16, 3), folder / "autoencoder.safetensors"
  network = build_autoencoder(config.model, config.autoencoder, shape)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), shape))
  params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), shapes)
  weights = AutoencoderWeights(network, params, shape, np.ones(3, np.float32), np.full(3, 2, np.float32))
  write_autoencoder_file(path, weights, {})
  return path


def of_latent_diffusion() -> dict[str, np.ndarray]:
  """A file of theirs: the moving average beside weights of zeros, and what is no part of the U-Net."""
  state = tensors("ldm")
  theirs = {f"model.diffusion_model.{name}": np.zeros_like(tensor) for name, tensor in state.items()}
  theirs |= {f"model_ema.diffusion_model{name.replace('.', '')}": tensor for name, tensor in state.items()}
  return theirs | {"first_stage_model.quant_conv.bias": np.zeros(3, np.float32), "betas": np.zeros(9, np.float32)}


def test_of_latent_diffusion_the_moving_average_is_taken_with_the_first_stage(tmp_path, capsys):
  path, flags = first_stage(tmp_path), ["--block=ldm", "--num_heads=2", "--qkv_order=legacy"]
  _, _, plain = converted(tmp_path, tensors("ldm"), *flags)
  latent = [*flags, "--image_size=16", f"--first_stage={path}"]
  for scale, mean, std in ((None, 1.0, 2.0), (0.25, 0.0, 4.0)):  # that of their file takes the place of the other
    theirs = of_latent_diffusion() | ({} if scale is None else {"scale_factor": np.array(scale, np.float32)})
    source, target = tmp_path / "theirs.safetensors", tmp_path / "latent.safetensors"
    source.write_bytes(safetensors.numpy.save(theirs))
    convert_openai.main([str(source), str(target), *FLAGS, *latent])
    config, shape, _ = file.describe(target)
    assert shape == (16, 16, 3) and config.diffusion.first_stage == path.name  # no folder of this machine
    average, stage = file.read_params(target, config.model, (8, 8, 3)), file.read_first_stage(target)
    assert jax.tree.all(jax.tree.map(np.array_equal, plain, average))
    assert (stage.mean, stage.std) == (pytest.approx(np.full(3, mean)), pytest.approx(np.full(3, std)))
    assert all((leaf == np.float32(0.1)).all() for leaf in jax.tree.leaves(stage.params))
    assert "Left out: betas (1 tensors), first_stage_model (1 tensors)" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("more", "part"),
  [({}, "first_stage: missing"), ({"input_blocks.1.1.transformer_blocks.0.norm1.weight"}, "spatial transformers")],
)
def test_what_of_latent_diffusion_is_refused(tmp_path, more, part):
  theirs = of_latent_diffusion() | {f"model.diffusion_model.{name}": np.zeros(8, np.float32) for name in more}
  given = [f"--first_stage={first_stage(tmp_path)}"] if more else []
  with pytest.raises(SystemExit, match=part) as caught:
    converted(tmp_path, theirs, "--block=ldm", "--num_heads=2", "--qkv_order=legacy", "--image_size=16", *given)
  assert "\n" not in str(caught.value) and not (tmp_path / "ours.safetensors").exists()


@pytest.mark.parametrize(
  ("arguments", "parts"),
  [
    (["--block=ldm"], ["input_blocks.2.0.op.weight is missing", "input_blocks.2.0.in_layers.0.weight is too much"]),
    (["--block=adm", "--channels=16"], ["do not fit", "conv_in.kernel is [3, 3, 3, 8], not [3, 3, 3, 16]"]),
    (["--block=adm", "--image_size=0"], ["image_size: missing"]),
    (["--block=adm", "--chanels=8"], ["chanels"]),
    (["--block=adm", "--norm_groups=0"], ["norm_groups: 32 does not divide channels=8"]),
    (["--block=adm", "--num_timesteps=4000"], ["rescale_timesteps: missing", "4000"]),
    (["--block=adm", "--num_timesteps=4000", "--rescale_timesteps=True"], ["told 1000 / 4000 of the timestep"]),
  ],
)
def test_what_does_not_fit_is_said_in_one_line(arguments, parts, tmp_path):
  with pytest.raises(SystemExit) as caught:
    converted(tmp_path, tensors("adm"), "--qkv_order=new", *arguments)
  text = str(caught.value)
  assert "\n" not in text and all(part in text for part in parts)
  assert not (tmp_path / "ours.safetensors").exists()
