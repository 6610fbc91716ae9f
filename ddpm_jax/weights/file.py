"""One safetensors file of our own: the parameters under our names, and the settings that they were trained with."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config, ModelConfig
from ddpm_jax.errors import UserError
from ddpm_jax.first_stage.latents import FixedStage
from ddpm_jax.models.build import Params, autoencoder_of_settings, autoencoder_settings
from ddpm_jax.weights.names import from_flat, from_flat_as, to_flat
from ddpm_jax.weights.stage_folder import Autoencoder, abstract_params
from ddpm_jax.weights.tensors import read_facts, read_tensors, write_tensors
from ddpm_jax.workdir.arrays import UnusableError

NAME = "model.safetensors"
_STAGE = "first_stage."  # before the names of the parameters of a first stage
_FORMAT = 1
# What a file says of its run: these sections, without folders of the machine and what was measured on the way.
_SECTIONS = ("data", "diffusion", "model", "autoencoder", "optimizer", "train")
_LEFT_OUT = ("data_dir", "manual_dir", "compilation_cache", "evaluate_every", "best_measure", "writers")
_PLACES = ("first_stage", "lpips_weights")
# Settings of drawing that are a part of the model all the same: its estimates were kept in range so.
THRESHOLD = ("threshold", "threshold_quantile")


def write_file(
  path: pathlib.Path,
  facts: Mapping[str, Any],
  image_shape: tuple[int, int, int],
  params: Params,
  stage: FixedStage | None = None,
) -> None:
  """Writes it, whole or not at all.

  Args:
    path: of the file.
    facts: the settings as `config`, and more to say beside them; JSON values.
    image_shape: H, W, C.
    params: a tree of NumPy arrays.
    stage: the first stage of a latent model, with NumPy arrays; None: pixels.

  Raises:
    OSError: if it cannot be written.
  """
  arrays = to_flat(params)
  if stage:
    arrays |= {_STAGE + name: leaf for name, leaf in to_flat(stage.params).items()}
    facts = {**facts, "first_stage": autoencoder_settings(stage.latents.network)}
  write_tensors(path, arrays, {**facts, "ddpm_jax": _FORMAT, "image_shape": list(image_shape)})


def settings_of_run(config: Config) -> dict[str, Any]:
  """Section -> option -> value of a run that was trained here, as JSON values; no folder of this machine is named."""
  return config_lib.to_tree(without_paths(config))


def settings_of_weights(config: Config) -> dict[str, dict[str, Any]]:
  """Section -> option -> value of what comes with weights, wherever they were trained.

  That is the network, the diffusion, how estimates were kept in range, and a number of preview steps that T allows.
  """
  settings: dict[str, dict[str, Any]] = {}
  for section, field, value in config_lib.options(config):
    if section in ("model", "diffusion") or field.name in (*THRESHOLD, "preview_steps", "conditioning"):
      settings.setdefault(section, {})[field.name] = value
  return settings


def holds_model(path: pathlib.Path) -> bool:
  """Whether it is a file of `write_file`; false of one that cannot be read."""
  try:
    return "ddpm_jax" in read_facts(path)
  except UnusableError:
    return False


def describe(path: pathlib.Path) -> tuple[Config, tuple[int, int, int], tuple[str, ...]]:
  """The settings, the shape of the images (H, W, C), and names of classes, without reading the parameters.

  Raises:
    UserError: if it is no file of ours.
  """
  try:
    facts = read_facts(path)
  except UnusableError as error:
    raise UserError(f"{path} {error}") from error
  if facts.get("ddpm_jax") != _FORMAT:
    raise UserError(
      f"{path} was not written by --export_format=safetensors of this version; name a file that was, or the folder of "
      "a whole pipeline of diffusers"
    )
  shape = facts.get("image_shape")
  if not isinstance(shape, list) or len(shape) != 3 or any(type(side) is not int or side < 1 for side in shape):
    raise UserError(f"{path}: its image_shape {shape!r} is none; get the file again")
  classes = facts.get("classes", [])
  if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
    raise UserError(f"{path}: its classes are no list of names; get the file again")
  try:
    return config_lib.from_json(json.dumps(facts.get("config"))), (shape[0], shape[1], shape[2]), tuple(classes)
  except UserError as error:
    raise UserError(f"{path}: {error}") from None


def read_params(path: pathlib.Path, model: ModelConfig, image_shape: tuple[int, int, int]) -> Params:
  """The parameters of the network as a tree of float32 NumPy arrays.

  Args:
    path: of the file.
    model: the network.
    image_shape: of what it draws, images or latents.

  Raises:
    UserError: if they are not what was written, or do not fit the network of `model`; names all that do not.
  """
  try:
    arrays = read_tensors(path).arrays
    return from_flat({name: leaf for name, leaf in arrays.items() if not name.startswith(_STAGE)}, model, image_shape)
  except (UnusableError, UserError) as error:
    raise UserError(f"{path} {error}" if isinstance(error, UnusableError) else f"{path}: {error}") from error


def read_first_stage(path: pathlib.Path) -> Autoencoder:
  """The first stage of a latent model, with the statistics of its latents.

  Raises:
    UserError: if it is no file of a latent model, or does not hold what was written.
  """
  _, image_shape, _ = describe(path)
  settings = read_facts(path).get("first_stage")
  if settings is None:
    raise UserError(f"{path} holds a model of pixels; name one of latents, or an autoencoder")
  try:
    network = autoencoder_of_settings(settings, image_shape)
    arrays = read_tensors(path).arrays.items()
    of_stage = {name.removeprefix(_STAGE): leaf for name, leaf in arrays if name.startswith(_STAGE)}
    params = from_flat_as(of_stage, abstract_params(network, image_shape))
  except (UnusableError, UserError) as error:
    raise UserError(f"{path} {error}" if isinstance(error, UnusableError) else f"{path}: {error}") from error
  return Autoencoder(network, params["autoencoder"], image_shape, params["mean"], params["std"])


def without_paths(config: Config) -> Config:
  """The same settings for others to read: no folder of this machine is named in them, and nothing of how to draw."""
  changes = {
    field.name: field.default
    for section, field, _ in config_lib.options(config)
    if field.name in _LEFT_OUT or (section not in _SECTIONS and field.name not in THRESHOLD)
  }
  if own := config_lib.own_images(config.data.dataset):
    kind, place = own
    changes["dataset"] = f"{kind}:{pathlib.PurePath(place).name}"
  return config_lib.override(without_places(config), changes)


def without_places(config: Config) -> Config:
  """The same settings, in which a first stage and weights of LPIPS have their names, and no folder of this machine."""
  values = config_lib.values(config)
  return config_lib.override(config, {name: pathlib.PurePath(values[name]).name for name in _PLACES})
