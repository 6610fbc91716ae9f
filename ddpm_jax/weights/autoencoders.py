"""Autoencoders in and out: diffusers' AutoencoderKL and VQModel, read and written without PyTorch; a file of ours."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.models.build import AutoencoderNetwork, Params, autoencoder_of_settings, autoencoder_settings
from ddpm_jax.weights.checks import (
  Options,
  check_class,
  check_known,
  check_value,
  image_shape_of,
  whole_number,
  whole_numbers,
)
from ddpm_jax.weights.folders import WEIGHTS, read_json, read_weights, write_json
from ddpm_jax.weights.names import autoencoder_table, check_shapes, from_diffusers, leaves_of, to_diffusers, tree_of
from ddpm_jax.weights.tensors import read_facts, read_tensors, write_tensors
from ddpm_jax.workdir.arrays import UnusableError

CLASSES = {"kl": "AutoencoderKL", "vq": "VQModel"}  # of diffusers, by regularizer
_PARTS = ("vae", "vqvae")  # folders of a pipeline that hold one
_SCALING_FACTOR = 0.18215  # the default of diffusers: that of Stable Diffusion

# Options of these classes that our network has not: its default there, and the values that leave nothing of it.
_ONLY = {
  "kl": {"act_fn": ("silu", ("silu", "swish"))},
  "vq": {
    "act_fn": ("silu", ("silu", "swish")),
    "norm_type": ("group", ("group",)),
    "lookup_from_codebook": (False, (False,)),
  },
}
_SHARED = {
  *("in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block"),
  *("latent_channels", "norm_num_groups", "sample_size", "scaling_factor", "mid_block_add_attention"),
  "force_upcast",  # to float32 and not half precision: ours is float32 always
}
_UNDERSTOOD = {
  "kl": _SHARED | {"shift_factor", "latents_mean", "latents_std", "use_quant_conv", "use_post_quant_conv"},
  "vq": _SHARED | {"num_vq_embeddings", "vq_embed_dim"},
}
_FORMAT = 1  # of a file of ours
NAME = "autoencoder.safetensors"  # of such a file, in the folder of an export


class AutoencoderWeights(NamedTuple):
  """An autoencoder and the scale of its latents.

  Attributes:
    network: with its activations in float32.
    params: a tree of float32 NumPy arrays.
    image_shape: (H, W, C), of the images that it was made for, or that were asked for.
    mean, std: float32 [z], by which latents become (z - mean) / std.
    notes: sentences on what had to be guessed.
  """

  network: AutoencoderNetwork
  params: Params
  image_shape: tuple[int, int, int]
  mean: np.ndarray
  std: np.ndarray
  notes: tuple[str, ...] = ()


def is_autoencoder(path: pathlib.Path) -> bool:
  """Whether there is one by itself, no pipeline that draws.

  Raises:
    UserError: config.json is not JSON.
  """
  config = path / "config.json"
  try:
    if path.is_file():
      return "ddpm_jax_autoencoder" in read_facts(path)
    return config.is_file() and read_json(path, config).get("_class_name") in CLASSES.values()
  except (UnusableError, OSError):  # others say what is wrong
    return False


def read_autoencoder(path: pathlib.Path, size: tuple[int, int] | None = None) -> AutoencoderWeights:
  """Reads an autoencoder.

  Args:
    path: a folder of diffusers with an AutoencoderKL or a VQModel, or with a pipeline that has one; or a file of
      `write_autoencoder_file`.
    size: height and width of the images that it will get; None: those that it was made for.

  Raises:
    UserError: if there is none, it is another kind of model, or has an option or a tensor that is not supported; names
      the file and all that is wrong with it.
  """
  if not path.exists():
    raise UserError(f"there is no {path}; name a folder of diffusers, or a safetensors file")
  return _read_folder(path, size) if path.is_dir() else _read_file(path, size)


def write_autoencoder(
  folder: pathlib.Path,
  network: AutoencoderNetwork,
  params: Params,
  mean: np.ndarray,
  std: np.ndarray,
  size: tuple[int, int],
) -> None:
  """Writes all that `from_pretrained(folder)` of AutoencoderKL or VQModel needs into a folder.

  Mean and deviation of the latents are folded into its layers, see `folded`, and its scaling_factor is 1.

  Args:
    folder: exists.
    network: the autoencoder.
    params: a tree of NumPy arrays.
    mean: of the latents, [z].
    std: likewise; of 'vq' all are equal.
    size: height and width of the images.

  Raises:
    UserError: if diffusers has no such network.
    OSError: if they cannot be written.
  """
  options = autoencoder_options(network, size)
  write_json(folder / "config.json", CLASSES[network.regularizer], options)
  rows = autoencoder_table(network, (*size, network.model.out_channels))
  write_tensors(folder / WEIGHTS, to_diffusers(folded(params, mean, std), rows), {})


def write_autoencoder_file(path: pathlib.Path, weights: AutoencoderWeights, facts: Mapping[str, Any]) -> None:
  """Writes one safetensors file, whole or not at all, with more to say beside it; JSON values. Raises OSError."""
  own = {
    "ddpm_jax_autoencoder": _FORMAT,
    "autoencoder": autoencoder_settings(weights.network),
    "image_shape": list(weights.image_shape),
    "mean": np.asarray(weights.mean, np.float64).tolist(),
    "std": np.asarray(weights.std, np.float64).tolist(),
  }
  write_tensors(path, {".".join(name): leaf for name, leaf in leaves_of(weights.params).items()}, {**facts, **own})


def folded(params: Params, mean: np.ndarray, std: np.ndarray) -> Params:
  """The parameters whose latents are (z - mean) / std, and which decode those to the same images.

  A linear layer takes the scale: quant_conv of the encoder, post_quant_conv of the decoder, and the codebook, of which
  the nearest vector stays the nearest as all channels have one scale. What differs is where the log-variance of the
  posterior is kept within its bounds.

  Args:
    params: a tree of NumPy arrays.
    mean: [z].
    std: likewise; of 'vq' all are equal.
  """
  mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
  encoder, decoder = params["encoder"], params["decoder"]
  shift, scale, log_scale = mean, std, np.zeros_like(std)
  if "codebook" not in params:  # the log-variances follow
    shift, scale = np.concatenate([mean, np.zeros_like(mean)]), np.concatenate([std, np.ones_like(std)])
    log_scale = np.concatenate([np.zeros_like(std), 2 * np.log(std)])
  quant, post = (
    {name: np.asarray(leaf, np.float64) for name, leaf in layer.items()}
    for layer in (encoder["quant_conv"], decoder["post_quant_conv"])
  )
  changed = {
    "encoder": encoder
    | {"quant_conv": {"kernel": quant["kernel"] / scale, "bias": (quant["bias"] - shift) / scale - log_scale}},
    "decoder": decoder
    | {
      "post_quant_conv": {
        "kernel": std[:, None] * post["kernel"],
        "bias": post["bias"] + mean @ post["kernel"],
      }
    },
  }
  if "codebook" in params:
    assert np.ptp(std) == 0, "a codebook has one scale"
    changed["codebook"] = {"embedding": (np.asarray(params["codebook"]["embedding"], np.float64) - mean) / std}
  return tree_of({path: np.asarray(leaf, np.float32) for path, leaf in leaves_of(changed).items()})


def autoencoder_options(network: AutoencoderNetwork, size: tuple[int, int]) -> dict[str, Any]:
  """What makes of diffusers' class the autoencoder for images of that height and width; its scaling factor is 1.

  Raises:
    UserError: if it cannot be made of it.
  """
  model, (height, width) = network.model, size
  if model.channel_multipliers[0] != 1:
    raise UserError(
      f"channel_multipliers: the first is {model.channel_multipliers[0]}, and 1 in every autoencoder of diffusers; use "
      "--export_format=safetensors"
    )
  attention = [height >> level in model.attention_resolutions for level in range(len(model.channel_multipliers))]
  vq = {"num_vq_embeddings": model.codebook_size, "vq_embed_dim": model.latent_channels}
  return {
    "sample_size": height if height == width else [height, width],
    "in_channels": model.out_channels,
    "out_channels": model.out_channels,
    "block_out_channels": [model.channels * multiplier for multiplier in model.channel_multipliers],
    "down_block_types": [_block_type("Down", has) for has in attention],
    "up_block_types": [_block_type("Up", has) for has in reversed(attention)],
    "layers_per_block": model.num_res_blocks,
    "norm_num_groups": model.num_groups,
    "latent_channels": model.latent_channels,
    "mid_block_add_attention": model.middle_attention,
    "scaling_factor": 1.0,
    **(vq if model.regularizer == "vq" else {}),
    **{name: values[0] for name, (_, values) in _ONLY[model.regularizer].items()},
  }


def settings_of(options: Options, size: tuple[int, int] | None = None) -> tuple[dict[str, Any], tuple[int, int, int]]:
  """Settings of `models.build.autoencoder_of_settings`, and the shape (H, W, C) of the images.

  Args:
    options: of a config.json.
    size: see `read_autoencoder`.

  Raises:
    UserError: names the option that is unknown, missing, or of a value that our networks do not have.
  """
  check_class(options, tuple(CLASSES.values()))
  regularizer = next(name for name, theirs in CLASSES.items() if theirs == options["_class_name"])
  check_known(options, _UNDERSTOOD[regularizer], _ONLY[regularizer])
  widths = whole_numbers(options, "block_out_channels", (64,))
  channels = widths[0]
  if any(width % channels for width in widths):
    raise UserError(f"block_out_channels: {list(widths)} are not multiples of the first")
  groups = whole_number(options, "norm_num_groups", 32)
  if channels % groups:
    raise UserError(f"norm_num_groups: {groups} does not divide {channels} channels")
  latent_channels = whole_number(options, "latent_channels", 4 if regularizer == "kl" else 3)
  if regularizer == "vq":
    check_value(options, "vq_embed_dim", None, (None, latent_channels))
  for name in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"):
    check_value(options, name, True, (True, False))
  image_shape = image_shape_of({"sample_size": 32} | dict(options))
  image_shape = image_shape if size is None else (*size, image_shape[2])
  attention = _attention(options, len(widths))
  return {
    "out_channels": image_shape[2],
    "channels": channels,
    "channel_multipliers": [width // channels for width in widths],
    "num_res_blocks": whole_number(options, "layers_per_block", 1),
    "attention_resolutions": [image_shape[0] >> level for level, has in enumerate(attention) if has],
    "latent_channels": latent_channels,
    "regularizer": regularizer,
    "codebook_size": whole_number(options, "num_vq_embeddings", 256) if regularizer == "vq" else 0,
    "num_groups": groups,
    "middle_attention": options.get("mid_block_add_attention", True),
  }, image_shape


def scale_of(options: Options) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
  """Mean and deviation [z] of the latents that diffusers makes standard ones of, and what had to be guessed.

  A scaling factor that is missing is 0.18215 there, in both classes. An AutoencoderKL without it is one of Stable
  Diffusion's, for which that is right. A VQModel without it is older than the option, and its latents were not scaled;
  copies of it that were saved later say 0.18215 as if it were meant.

  Raises:
    UserError: names the option that is no such number.
  """
  vq = options["_class_name"] == CLASSES["vq"]
  size, notes = whole_number(options, "latent_channels", 3 if vq else 4), []
  factor = options.get("scaling_factor", 1.0 if vq else _SCALING_FACTOR)
  if type(factor) not in (int, float) or not 0 < factor < float("inf"):
    raise UserError(f"scaling_factor: {factor!r} is no number above 0")
  if "scaling_factor" not in options:
    notes.append(f"scaling_factor is missing, and taken for {factor}" + (", that of VQModel until 0.12" if vq else ""))
  elif vq and factor == _SCALING_FACTOR:
    notes.append(
      f"scaling_factor is {factor}, which newer versions of diffusers write into older VQModels whose latents were "
      "never scaled; if this is one, write 1.0 there"
    )
  notes = [f"{note}. A model that begins on its latents measures mean and deviation itself" for note in notes]
  mean = _latents(options, "latents_mean", size)
  std = _latents(options, "latents_std", size)
  shift = options.get("shift_factor")
  if shift is not None:
    if type(shift) not in (int, float) or mean is not None:
      raise UserError(f"shift_factor: {shift!r} is no number, or latents_mean is given too; only one of them is")
    mean = np.full(size, shift, np.float32)
  mean = np.zeros(size, np.float32) if mean is None else mean
  std = np.ones(size, np.float32) if std is None else std
  if not (std > 0).all():
    raise UserError(f"latents_std: {std.tolist()} are not above 0")
  return mean, np.asarray(std / factor, np.float32), tuple(notes)


def _latents(options: Options, name: str, size: int) -> np.ndarray | None:
  values = options.get(name)
  if values is None:
    return None
  if not isinstance(values, list) or len(values) != size or any(type(value) not in (int, float) for value in values):
    raise UserError(f"{name}: {values!r} is no list of {size} numbers, one for each channel of the latents")
  return np.asarray(values, np.float32)


def _block_type(way: str, attention: bool) -> str:
  return f"{'Attn' if attention else ''}{way}{'En' if way == 'Down' else 'De'}coderBlock2D"


def _attention(options: Options, levels: int) -> list[bool]:
  """Which levels have attention. Raises UserError."""
  found = {}
  for way, name in (("Down", "down_block_types"), ("Up", "up_block_types")):
    kinds, known = options.get(name, [_block_type(way, False)]), [_block_type(way, has) for has in (False, True)]
    if not isinstance(kinds, list | tuple) or len(kinds) != levels:
      raise UserError(f"{name}: {kinds!r} is no list of {levels} blocks, as many as block_out_channels has")
    for kind in kinds:
      if kind not in known:
        raise UserError(f"{name}: {kind!r} is not supported, only {' and '.join(known)} are")
    found[way] = [kind == known[True] for kind in kinds]
  if found["Up"] != found["Down"][::-1]:
    raise UserError("up_block_types: attention is not at the levels of down_block_types, which is not supported")
  return found["Down"]


def describe_autoencoder(
  folder: pathlib.Path, size: tuple[int, int] | None = None
) -> tuple[AutoencoderNetwork, tuple[int, int, int]]:
  """The network of a folder of diffusers, and the shape (H, W, C) of its images. Raises as `read_autoencoder`."""
  part = _part(folder)
  return _network_of(part, read_json(folder, part / "config.json"), size)


def _part(folder: pathlib.Path) -> pathlib.Path:
  """Where the autoencoder of a folder lies. Raises UserError."""
  inside = () if is_autoencoder(folder) else _PARTS
  part = next((folder / name for name in inside if (folder / name).is_dir()), folder)
  if not (part / "config.json").exists():
    files = sorted(folder.glob("*.safetensors"))
    remedy = f"name {files[0]}" if files else "name a folder of diffusers with an AutoencoderKL or a VQModel"
    raise UserError(
      f"{folder} holds no autoencoder: neither config.json, nor {' or '.join(f'{name}/' for name in _PARTS)}; {remedy}"
    )
  return part


def _network_of(
  part: pathlib.Path, options: Options, size: tuple[int, int] | None
) -> tuple[AutoencoderNetwork, tuple[int, int, int]]:
  try:
    settings, image_shape = settings_of(options, size)
    return autoencoder_of_settings(settings, image_shape), image_shape
  except UserError as error:
    raise UserError(f"{part / 'config.json'}: {error}") from None


def _read_folder(folder: pathlib.Path, size: tuple[int, int] | None) -> AutoencoderWeights:
  part = _part(folder)
  options = read_json(folder, part / "config.json")
  network, image_shape = _network_of(part, options, size)
  try:
    mean, std, notes = scale_of(options)
    if size is None and "sample_size" not in options:
      notes += ("sample_size is missing, and taken for 32",)
  except UserError as error:
    raise UserError(f"{part / 'config.json'}: {error}") from None
  tensors = read_weights(folder, part, f"{options['_class_name']}.from_pretrained({str(part)!r})")
  identities = _identities(options, network.model.latent_channels)
  try:
    if named := sorted(identities.keys() & tensors.keys()):
      raise UserError(f"the weights do not fit the network: {', '.join(named)} is there, and config.json denies it")
    params = from_diffusers(tensors | identities, autoencoder_table(network, image_shape))
  except UserError as error:
    raise UserError(f"{part / WEIGHTS}: {error}") from None
  return AutoencoderWeights(network, params, image_shape, mean, std, notes)


def _identities(options: Options, size: int) -> dict[str, np.ndarray]:
  """The quant convolutions that a model does without (Stable Diffusion 3, Flux), as such that change nothing."""
  found = {}
  for name, width in (("quant_conv", 2 * size), ("post_quant_conv", size)):
    if not options.get(f"use_{name}", True):
      found[f"{name}.weight"] = np.eye(width, dtype=np.float32)[:, :, None, None]
      found[f"{name}.bias"] = np.zeros(width, np.float32)
  return found


def _read_file(path: pathlib.Path, size: tuple[int, int] | None) -> AutoencoderWeights:
  try:
    facts = read_facts(path)
    if facts.get("ddpm_jax_autoencoder") != _FORMAT:
      raise UserError(
        f"{path} is no autoencoder that this version exported; name a file that is, or the folder of one of diffusers"
      )
    arrays = read_tensors(path).arrays
  except UnusableError as error:
    raise UserError(f"{path} {error}; name an autoencoder that was exported, or a folder of diffusers") from error
  try:
    shape = facts.get("image_shape")
    if not isinstance(shape, list) or len(shape) != 3 or any(type(side) is not int or side < 1 for side in shape):
      raise UserError(f"image_shape: {shape!r} is none")
    height, width, channels = shape
    network = autoencoder_of_settings(facts.get("autoencoder"), (height, width, channels))
    rows, columns = size or (height, width)
    image_shape = (rows, columns, channels)
    levels = [height >> level for level in range(len(network.model.channel_multipliers))]
    moved = [rows >> levels.index(row) for row in network.model.attention_resolutions if row in levels]
    settings = autoencoder_settings(network) | {"attention_resolutions": moved}
    network = autoencoder_of_settings(settings, image_shape)
    table = autoencoder_table(network, image_shape)
    check_shapes(arrays, {".".join(row.path): row.shape for row in table})
    mean, std = (_latents(facts, name, network.model.latent_channels) for name in ("mean", "std"))
    if mean is None or std is None or not (std > 0).all():
      raise UserError("mean, std: they are not those of latents")
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  params = tree_of({row.path: arrays[".".join(row.path)] for row in table})
  return AutoencoderWeights(network, params, image_shape, mean, std)
