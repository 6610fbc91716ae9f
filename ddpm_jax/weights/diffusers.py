"""Folders of diffusers' DDPMPipeline and, of latent models, LDMPipeline: read, and written without PyTorch.

Two layouts are read: that of `save_pretrained`, with `unet/` and `scheduler/`, and `vqvae/` of a latent model; and that
of the published google/ddpm-* models, where all lies side by side.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ddpm_jax.config import Config, ModelConfig
from ddpm_jax.errors import UserError
from ddpm_jax.first_stage.latents import FixedStage
from ddpm_jax.models.build import Params
from ddpm_jax.weights.autoencoders import CLASSES, describe_autoencoder, write_autoencoder
from ddpm_jax.weights.folders import WEIGHTS, read_json, read_weights, write_json
from ddpm_jax.weights.names import from_diffusers, table, to_diffusers
from ddpm_jax.weights.options import diffusion_settings, model_settings, scheduler_options, unet_options
from ddpm_jax.weights.tensors import write_tensors

_LATENT = "LDMPipeline"
_PIPELINES = ("DDPMPipeline", "DDIMPipeline", _LATENT)
_CLASSES = "_classes"  # ours, in the config.json of the network; diffusers passes it over


class Description(NamedTuple):
  """What a folder says of its model."""

  settings: dict[str, Any]  # of the sections model and diffusion, and the threshold; `first_stage` is the folder itself
  image_shape: tuple[int, int, int]  # H, W, C
  classes: tuple[str, ...]  # names of the classes of a conditional model, as far as it says them


def is_folder_of_diffusers(folder: pathlib.Path) -> bool:
  """Whether there is a model of diffusers, of whatever kind."""
  if (folder / "model_index.json").exists():
    return True
  config = folder / "config.json"
  return config.exists() and "_class_name" in read_json(folder, config)


def describe(folder: pathlib.Path) -> Description:
  """Reads the architecture, the diffusion and the size of the images.

  Raises:
    UserError: if it is another kind of model, or has an option that is not supported; names file and option.
  """
  unet, scheduler = _parts(folder)
  options = read_json(folder, unet / "config.json")
  if options.get("_class_name") in CLASSES.values():
    raise UserError(f"{folder} holds an autoencoder, which draws nothing; name it as --first_stage")
  try:
    settings, image_shape = model_settings(options)
    classes = _class_names(options)
  except UserError as error:
    raise UserError(f"{unet / 'config.json'}: {error}") from None
  options = read_json(folder, scheduler)
  try:
    settings |= diffusion_settings(options)
  except UserError as error:
    raise UserError(f"{scheduler}: {error}") from None
  if not is_latent(folder):
    return Description(settings, image_shape, classes)
  return Description(settings | {"first_stage": str(folder)}, _decoded(folder, unet, image_shape), classes)


def is_latent(folder: pathlib.Path) -> bool:
  """Whether it is a whole latent model. Raises UserError if its description cannot be read."""
  index = folder / "model_index.json"
  return index.exists() and read_json(folder, index).get("_class_name") == _LATENT


def _decoded(folder: pathlib.Path, unet: pathlib.Path, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
  """The shape of the images that latents are decoded to. Raises UserError if the two networks do not fit together."""
  network, _ = describe_autoencoder(folder)
  height, width, channels = latent_shape
  if channels != network.model.latent_channels:
    raise UserError(
      f"{unet / 'config.json'}: in_channels: {channels} are not the {network.model.latent_channels} channels of the "
      "latents of the autoencoder beside it; get the folder again"
    )
  return height * network.factor, width * network.factor, network.model.out_channels


def read_params(folder: pathlib.Path, model: ModelConfig, image_shape: tuple[int, int, int]) -> Params:
  """The weights as a tree of float32 NumPy arrays.

  Raises:
    UserError: if they cannot be read, or do not fit the network of `model`; names all tensors that do not.
  """
  unet, _ = _parts(folder)
  tensors = read_weights(folder, unet, f"DDPMPipeline.from_pretrained({str(folder)!r})")
  try:
    return from_diffusers(tensors, table(model, image_shape))
  except UserError as error:
    raise UserError(f"{unet / WEIGHTS}: {error}") from None


def write_folder(
  folder: pathlib.Path,
  config: Config,
  image_shape: tuple[int, int, int],
  params: Params,
  classes: Sequence[str] = (),
  stage: FixedStage | None = None,
) -> None:
  """Writes all that `DDPMPipeline.from_pretrained(folder)`, of latents `LDMPipeline`'s, needs into an empty folder.

  Args:
    folder: exists.
    config: of the run.
    image_shape: H, W, C.
    params: a tree of NumPy arrays.
    classes: names of the classes of a conditional model.
    stage: the first stage of a latent model, with NumPy arrays; None: pixels.

  Raises:
    UserError: if diffusers has no such network.
    OSError: if they cannot be written.
  """
  diffused = stage.latents.latent_shape if stage else image_shape
  options = unet_options(config.model, diffused) | ({_CLASSES: list(classes)} if classes else {})
  (folder / "unet").mkdir()
  (folder / "scheduler").mkdir()
  pipeline, scheduler = (_LATENT, "DDIMScheduler") if stage else ("DDPMPipeline", "DDPMScheduler")
  parts = {"scheduler": ["diffusers", scheduler], "unet": ["diffusers", "UNet2DModel"]}
  if stage:
    network, of_stage = stage.latents.network, stage.params
    parts["vqvae"] = ["diffusers", CLASSES[network.regularizer]]  # the pipeline's name for it, whatever it is
    (folder / "vqvae").mkdir()
    write_autoencoder(
      folder / "vqvae", network, of_stage["autoencoder"], of_stage["mean"], of_stage["std"], image_shape[:2]
    )
  write_json(folder / "model_index.json", pipeline, parts)
  write_json(folder / "unet" / "config.json", "UNet2DModel", options)
  about = scheduler_options(config, scheduler, latent=stage is not None)
  write_json(folder / "scheduler" / "scheduler_config.json", scheduler, about)
  write_tensors(folder / "unet" / WEIGHTS, to_diffusers(params, table(config.model, diffused)), {})


def _class_names(options: Mapping[str, Any]) -> tuple[str, ...]:
  names = options.get(_CLASSES, [])
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise UserError(f"{_CLASSES}: {names!r} is no list of names")
  return tuple(names)


def _parts(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """The folder of the U-Net, and the file of the scheduler. Raises UserError for another pipeline."""
  index = folder / "model_index.json"
  if index.exists():
    kind = read_json(folder, index).get("_class_name")
    if kind not in _PIPELINES:
      raise UserError(f"{index}: a {kind} is another kind of model, only {' and '.join(_PIPELINES)} are supported")
  if (folder / "unet").is_dir():
    return folder / "unet", folder / "scheduler" / "scheduler_config.json"
  return folder, folder / "scheduler_config.json"
