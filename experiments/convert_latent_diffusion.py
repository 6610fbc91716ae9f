"""Converts first stages of latent diffusion (Rombach et al. 2022) to the file that --first_stage reads.

  pip install torch
  python experiments/convert_latent_diffusion.py model.ckpt vq_f4.safetensors --preset=ldm_vq_f4
  python -m ddpm_jax.main --preset=ldm_celebahq256 --first_stage=vq_f4.safetensors --workdir=runs/ldm_celebahq256

Reads files of the released code (.ckpt, or as safetensors) of a KL or VQ autoencoder, or of a latent model, whose own
copy of its autoencoder is taken. What the autoencoder is, is for the flags of ddpm_jax to say, also of a --preset or
--flagfile. Every tensor must fit. Their norms have 32 groups whatever the width, and so has --norm_groups here unless
it is named.

Latents stay as they are: a model that is trained on them measures their mean and deviation. A published latent model is
converted in two steps, first its autoencoder, then with that as --first_stage its U-Net, which knows the scale of its
latents:

  python experiments/convert_latent_diffusion.py model.ckpt kl_f8.safetensors --preset=ldm_kl_f8
  python experiments/convert_openai.py model.ckpt church.safetensors --qkv_order=legacy --preset=ldm_church256 \
    --first_stage=kl_f8.safetensors

What else such a file holds, the loss with its discriminator among it, is left out, and said.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Mapping

import numpy as np
from absl import flags as absl_flags
from convert_openai import NORM_GROUPS, read  # beside this file

from ddpm_jax import config as config_lib
from ddpm_jax import flags
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.models.build import build_autoencoder
from ddpm_jax.weights.autoencoders import AutoencoderWeights, write_autoencoder_file
from ddpm_jax.weights.names import autoencoder_table, from_diffusers
from ddpm_jax.weights.stage_folder import as_used

PREFIX = "first_stage_model."  # in the file of a latent model
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
# Theirs -> those of diffusers, one after the other. Levels of the decoder are turned around in between.
NAMES = {
  r"^encoder\.down\.(\d+)\.": r"encoder.down_blocks.\1.",
  r"^decoder\.up\.(\d+)\.": r"decoder.up_blocks.\1.",
  r"\.mid\.block_1\.": ".mid_block.resnets.0.",
  r"\.mid\.block_2\.": ".mid_block.resnets.1.",
  r"\.mid\.attn_1\.": ".mid_block.attentions.0.",
  r"\.block\.(\d+)\.": r".resnets.\1.",
  r"\.attn\.(\d+)\.": r".attentions.\1.",
  r"\.nin_shortcut\.": ".conv_shortcut.",
  r"\.downsample\.conv\.": ".downsamplers.0.conv.",
  r"\.upsample\.conv\.": ".upsamplers.0.conv.",
  r"\.norm_out\.": ".conv_norm_out.",
  r"(\.attentions\.\d+)\.norm\.": r"\1.group_norm.",
  r"(\.attentions\.\d+)\.([qkv])\.": r"\1.to_\2.",
  r"(\.attentions\.\d+)\.proj_out\.": r"\1.to_out.0.",
}


def select(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
  """The tensors of the autoencoder, without a prefix, and what else there is, by the first part of the names.

  Raises:
    UserError: there is no autoencoder.
  """
  inner = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
  found = {name: tensor for name, tensor in (inner or tensors).items() if name.startswith(PARTS)}
  if "encoder.conv_in.weight" not in found:
    raise UserError(
      "these are no weights of an autoencoder of latent diffusion, as there is no encoder.conv_in.weight; name another "
      "file"
    )
  taken = {(PREFIX if inner else "") + name for name in found}
  firsts = [name.removeprefix(PREFIX).split(".")[0] for name in tensors if name not in taken]
  return found, ", ".join(f"{first} ({firsts.count(first)} tensors)" for first in dict.fromkeys(firsts))


def in_names_of_diffusers(tensors: Mapping[str, np.ndarray], levels: int) -> dict[str, np.ndarray]:
  """The tensors under the names that diffusers' AutoencoderKL or VQModel with so many levels has for them."""
  found = {}
  for name, tensor in tensors.items():
    name = re.sub(r"^(decoder\.up)\.(\d+)", lambda match: f"{match[1]}.{levels - 1 - int(match[2])}", name)
    for theirs, ours in NAMES.items():
      name = re.sub(theirs, ours, name)
    is_matrix = ".to_" in name and tensor.ndim == 4  # a convolution of one pixel
    found[name] = tensor.reshape(tensor.shape[:2]) if is_matrix else tensor
  return found


def convert(tensors: Mapping[str, np.ndarray], config: Config) -> AutoencoderWeights:
  """The autoencoder of these tensors, as `select` returns them. Raises UserError, which lists what does not fit.

  Args:
    tensors: under their names.
    config: says what the network is, and the size of its images.
  """
  channels = tensors["encoder.conv_in.weight"].shape[1]
  shape = (*config_lib.height_and_width(config.data.image_size), channels)
  network = as_used(build_autoencoder(config.model, config.autoencoder, shape))
  renamed = in_names_of_diffusers(tensors, len(network.model.channel_multipliers))
  params, size = from_diffusers(renamed, autoencoder_table(network, shape)), network.model.latent_channels
  return AutoencoderWeights(network, params, shape, np.zeros(size, np.float32), np.ones(size, np.float32))


def main(arguments: list[str]) -> None:
  """The command. Exits with a message where it cannot go on."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("source", type=pathlib.Path)
  parser.add_argument("target", type=pathlib.Path)
  own, rest = parser.parse_known_args(arguments)
  registry = absl_flags.FlagValues()
  flags.define(registry)
  try:
    registry(["", *flags.expand_flagfiles(rest)])
    config = config_lib.override(Config(), flags.given(registry) | {"stage": "autoencoder"})
    if not config.data.image_size:
      raise UserError("image_size: missing, as the file does not say it; name it, or a --preset such as ldm_kl_f8")
    if not config.model.norm_groups:
      config = config_lib.override(config, {"norm_groups": NORM_GROUPS})
    tensors, others = select(read(own.source))
    write_autoencoder_file(own.target, convert(tensors, config), {})
  except (UserError, OSError, absl_flags.Error) as error:
    sys.exit(str(error))
  if others:
    print(f"Left out: {others}")
  print(f"Written: {own.target}. Use it with --first_stage={own.target}")


if __name__ == "__main__":
  main(sys.argv[1:])
