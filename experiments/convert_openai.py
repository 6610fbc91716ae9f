"""Converts U-Nets of OpenAI's code and of latent diffusion to the file that --init_from reads.

  pip install torch
  python experiments/convert_openai.py 64x64_diffusion.pt imagenet64.safetensors --qkv_order=new --image_size=64 \
    --block=adm --channels=192 --channel_multipliers=1,2,3,4 --num_res_blocks=3 --attention_resolutions=32,16,8 \
    --head_channels=64 --dropout=0.1 --conditioning=class --num_classes=1000 --beta_schedule=cosine
  python -m ddpm_jax.main --mode=sample --init_from=imagenet64.safetensors --workdir=runs/imagenet64

Reads files of guided-diffusion and improved-diffusion (.pt, or as safetensors) and of latent-diffusion (.ckpt, of which
the moving average is taken where there is one). What the network and its diffusion are is for the flags of ddpm_jax to
say, also of a --preset or --flagfile. Every tensor must fit.

--qkv_order says how the rows of queries, keys and values lie: 'legacy', by head, in improved-diffusion,
latent-diffusion, most of guided-diffusion; 'new' where its flags have --use_new_attention_order True, as for ImageNet
64. With one head both are the same. The wrong one of several heads is not noticed, and the images are wrong.

Their norms have 32 groups whatever the width, and so has --norm_groups here unless it is named.

--rescale_timesteps, a flag of theirs, has to be said where --num_timesteps is not 1000. 'False', the default of
guided-diffusion: the network is told the timestep, as the one for ImageNet 64 by class of improved-diffusion. 'True',
the default there: it is told 1000 / T of it. Such a network would draw wrong images here, and is refused.

Of a network with learned variances the half of the last layer that predicts them is left out.

A U-Net of latent-diffusion sees latents. --first_stage is the autoencoder that they are of, such as a folder of
diffusers, and goes into the file with it; --image_size is that of the images:

  python experiments/convert_openai.py model.ckpt church.safetensors --qkv_order=legacy --preset=ldm_church256 \
    --first_stage=PATH

The scale_factor in a file of latent-diffusion takes the place of the scale of --first_stage. What else such a file
holds, its own copy of the autoencoder among it, is left out, and said. Networks with spatial transformers, such as that
of ImageNet, are refused.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator, Mapping

import numpy as np
from absl import flags as absl_flags

from ddpm_jax import config as config_lib
from ddpm_jax import flags
from ddpm_jax.config import Config, ModelConfig
from ddpm_jax.errors import UserError
from ddpm_jax.first_stage.latents import FixedStage
from ddpm_jax.models.build import Params, fitted
from ddpm_jax.weights import file
from ddpm_jax.weights.first_stage import read_named
from ddpm_jax.weights.names import from_flat, param_shapes
from ddpm_jax.weights.tensors import read_tensors
from ddpm_jax.workdir.arrays import UnusableError

# Layers of blocks, and those outside of any: ours -> theirs.
LAYERS = {
  "temb_dense1": "time_embed.0",
  "temb_dense2": "time_embed.2",
  "label_embedding": "label_emb",
  "norm1": "in_layers.0",
  "conv1": "in_layers.2",
  "temb_proj": "emb_layers.1",
  "norm2": "out_layers.0",
  "conv2": "out_layers.3",
  "shortcut": "skip_connection",
  "norm": "norm",
  "qkv": "qkv",
  "proj": "proj_out",
  "norm_out": "out.0",
  "conv_out": "out.2",
}
NORM_GROUPS = 32  # of `normalization` in nn.py, whatever the number of channels
PAPERS_TIMESTEPS = 1000  # to which --rescale_timesteps scales
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# Of latent-diffusion, and of its moving average, whose names have no more dots.
PREFIX, AVERAGE = "model.diffusion_model.", "model_ema.diffusion_model"
SCALE = "scale_factor"  # by which latents are multiplied
TRANSFORMER = ".transformer_blocks."


def block_names(model: ModelConfig, height: int) -> Iterator[tuple[str, str]]:
  """(ours, theirs) of each block, in the order of the network for images of that height."""
  yield "conv_in", "input_blocks.0.0"
  number, levels = 0, len(model.channel_multipliers)
  for level in range(levels):
    for i in range(model.num_res_blocks):
      number += 1
      yield f"down{level}_block{i}", f"input_blocks.{number}.0"
      yield f"down{level}_block{i}_attention", f"input_blocks.{number}.1"
    number += 1
    yield f"down{level}_downsample", f"input_blocks.{number}.0"
  yield from (("mid_block0", "middle_block.0"), ("mid_attention", "middle_block.1"), ("mid_block1", "middle_block.2"))
  number = -1
  for level in reversed(range(levels)):
    for i in range(model.num_res_blocks + 1):
      number += 1
      yield f"up{level}_block{i}", f"output_blocks.{number}.0"
      yield f"up{level}_block{i}_attention", f"output_blocks.{number}.1"
    attends = height >> level in model.attention_resolutions
    yield f"up{level}_upsample", f"output_blocks.{number}.{1 + attends}"


def their_name(path: tuple[str, ...], blocks: Mapping[str, str]) -> str:
  """Of the parameter at that path of our tree."""
  *folders, leaf = path
  if folders == ["conv_in"]:
    layer = blocks["conv_in"]
  elif len(folders) == 1:
    layer = LAYERS[folders[0]]
  else:
    block, inner = folders
    strided = {"downsample": "op", "upsample": "conv"}.get(block.split("_")[-1], "")
    layer = f"{blocks[block]}.{strided if inner == 'conv' else LAYERS[inner]}"
  return f"{layer}.{LEAVES[leaf]}"


def in_our_layout(path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
  """Theirs is [out, in, ...], where a convolution of one pixel, a matrix of ours, has axes of one element."""
  if path[-1] != "kernel":
    return tensor
  is_matrix = tensor.shape[2:] in ((), (1,), (1, 1))
  return tensor.reshape(tensor.shape[:2]).T if is_matrix else tensor.transpose(2, 3, 1, 0)


def with_order(tensors: Mapping[str, np.ndarray], order: str, model: ModelConfig) -> dict[str, np.ndarray]:
  """The tensors with rows [3, heads, size] of queries, keys and values; those of `legacy` are [heads, 3, size]."""

  def ordered(name: str, rows: np.ndarray) -> np.ndarray:
    if order == "new" or "qkv" not in name:
      return rows
    num_heads = len(rows) // (3 * model.head_channels) if model.head_channels else model.num_heads
    return rows.reshape(num_heads, 3, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)

  return {name: ordered(name, rows) for name, rows in tensors.items()}


def first_stage_of(tensors: Mapping[str, np.ndarray], config: Config) -> FixedStage | None:
  """The autoencoder of --first_stage, with the scale of its latents; None for pixels. Raises UserError."""
  if not config.diffusion.first_stage:
    if any(name.startswith(PREFIX) for name in tensors):
      raise UserError("first_stage: missing, as this U-Net sees latents; name the autoencoder that they are of")
    return None
  found = read_named(str(pathlib.Path(config.diffusion.first_stage).absolute()), config)
  size = found.network.model.latent_channels
  if SCALE in tensors:
    scale = float(tensors[SCALE])
    found = found._replace(mean=np.zeros(size, np.float32), std=np.full(size, 1 / scale, np.float32))
  if found.mean is None or found.std is None:
    raise UserError("first_stage: it does not say the scale of its latents, nor does the file; export it to diffusers")
  height, width = config_lib.height_and_width(config.data.image_size)
  return found.fixed((height, width, found.network.model.out_channels))


def left_out(tensors: Mapping[str, np.ndarray]) -> str:
  """What of a file of latent-diffusion is no part of the U-Net, by the first part of the names; or nothing."""
  if not any(name.startswith(PREFIX) for name in tensors):
    return ""
  others = [name for name in tensors if not name.startswith((PREFIX, "model_ema.")) and name != SCALE]
  parts = {first: sum(name.split(".")[0] == first for name in others) for first in (n.split(".")[0] for n in others)}
  return ", ".join(f"{first} ({number} tensors)" for first, number in parts.items())


def convert(
  tensors: Mapping[str, np.ndarray], config: Config, qkv_order: str, latent_shape: tuple[int, int, int] | None = None
) -> tuple[Params, tuple[int, int, int]]:
  """Their tensors as our tree, and the shape of what it draws. Raises UserError, which lists what does not fit.

  Args:
    tensors: of the file.
    config: with the size of the images.
    qkv_order: 'legacy' or 'new'.
    latent_shape: of the latents that the network sees; None: images.
  """
  found = select(tensors)
  if transformers := sum(TRANSFORMER in name for name in found):
    raise UserError(
      f"{transformers} tensors are of spatial transformers (such as {next(n for n in found if TRANSFORMER in n)}), "
      "which no network here has; --preset=ldm_imagenet256 trains one with an embedding of the class in their place"
    )
  found = with_order(found, qkv_order, config.model)
  if "input_blocks.0.0.weight" not in found:
    raise UserError("these are no weights of OpenAI's U-Net, as there is no input_blocks.0.0.weight; name another file")
  channels = found["input_blocks.0.0.weight"].shape[1]
  image_shape = latent_shape or (*config_lib.height_and_width(config.data.image_size), channels)
  model = fitted(config.model, image_shape)
  blocks, shapes = dict(block_names(model, image_shape[0])), param_shapes(model, image_shape)
  names = {path: their_name(path, blocks) for path in shapes}
  problems = [f"{name} is missing" for name in names.values() if name not in found]
  problems += [f"{name} is too much" for name in found if name not in names.values()]
  if problems:
    raise UserError(f"the weights do not fit the network that the flags describe: {', '.join(problems)}")
  flat = {}
  for path, name in names.items():
    tensor = found[name]
    if path[0] == "conv_out" and len(tensor) == 2 * channels:
      tensor = tensor[:channels]
    flat[".".join(path)] = in_our_layout(path, tensor)
  return from_flat(flat, model, image_shape), image_shape


def select(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Of a file of latent-diffusion those of the U-Net, as guided-diffusion names them; of another all."""
  inner = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
  averages = {name: tensors.get(AVERAGE + name.replace(".", "")) for name in inner}
  return {name: inner[name] if mean is None else mean for name, mean in averages.items()} or dict(tensors)


def check_timesteps(num_timesteps: int, rescaled: str | None) -> None:
  """Raises UserError unless the network was told the timesteps as they are. rescaled: 'True', 'False' or not said."""
  if num_timesteps == PAPERS_TIMESTEPS or rescaled == "False":
    return
  if rescaled is None:
    raise UserError(
      f"rescale_timesteps: missing, as num_timesteps={num_timesteps} is not {PAPERS_TIMESTEPS}; name it as in the "
      "training, whose default is True in improved-diffusion and False in guided-diffusion"
    )
  raise UserError(
    f"rescale_timesteps: a network that is told {PAPERS_TIMESTEPS} / {num_timesteps} of the timestep cannot be "
    "converted, as ours are told the timestep itself; use another file"
  )


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a file as float32. Raises UserError or OSError, and whatever PyTorch does."""
  if path.suffix == ".safetensors":
    try:
      return read_tensors(path).arrays
    except UnusableError as error:
      raise UserError(f"{path} {error}") from error
  import torch

  state = torch.load(path, map_location="cpu", weights_only=True)
  state = state.get("state_dict", state)
  return {name: tensor.float().numpy() for name, tensor in state.items()}


def main(arguments: list[str]) -> None:
  """The command. Exits with a message where it cannot go on."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("source", type=pathlib.Path)
  parser.add_argument("target", type=pathlib.Path)
  parser.add_argument("--qkv_order", choices=("legacy", "new"), required=True)
  parser.add_argument("--rescale_timesteps", choices=("True", "False"))
  own, rest = parser.parse_known_args(arguments)
  registry = absl_flags.FlagValues()
  flags.define(registry)
  try:
    registry(["", *flags.expand_flagfiles(rest)])
    config = config_lib.override(Config(), flags.given(registry))
    if not config.data.image_size:
      raise UserError("image_size: missing, as the file does not say it; name it, such as --image_size=64")
    check_timesteps(config.diffusion.num_timesteps, own.rescale_timesteps)
    if not config.model.norm_groups:
      config = config_lib.override(config, {"norm_groups": NORM_GROUPS})
    tensors = read(own.source)
    stage = first_stage_of(tensors, config)
    params, image_shape = convert(tensors, config, own.qkv_order, stage.latents.latent_shape if stage else None)
    facts = {"config": file.settings_of_weights(file.without_places(config))}
    file.write_file(own.target, facts, stage.latents.image_shape if stage else image_shape, params, stage)
  except (UserError, OSError, absl_flags.Error) as error:
    sys.exit(str(error))
  if others := left_out(tensors):
    print(f"Left out: {others}")
  print(f"Written: {own.target}. Use it with --init_from={own.target}")


if __name__ == "__main__":
  main(sys.argv[1:])
