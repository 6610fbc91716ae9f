"""One safetensors file of our own: the parameters under our names, and the settings that they were trained with."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config, ModelConfig
from ddpm_jax.errors import UserError
from ddpm_jax.models.build import Params
from ddpm_jax.weights.names import from_flat, to_flat
from ddpm_jax.weights.tensors import read_facts, read_tensors, write_tensors
from ddpm_jax.workdir.arrays import UnusableError

NAME = "model.safetensors"
_FORMAT = 1
# What a file says of its run: these sections, without folders of the machine and what was measured on the way.
_SECTIONS = ("data", "diffusion", "model", "optimizer", "train")
_LEFT_OUT = ("data_dir", "manual_dir", "compilation_cache", "evaluate_every", "best_measure", "writers")
# Settings of drawing that are a part of the model all the same: its estimates were kept in range so.
THRESHOLD = ("threshold", "threshold_quantile")


def write_file(path: pathlib.Path, facts: Mapping[str, Any], image_shape: tuple[int, int, int], params: Params) -> None:
  """Writes it, whole or not at all.

  Args:
    path: of the file.
    facts: the settings as `config`, and more to say beside them; JSON values.
    image_shape: H, W, C.
    params: a tree of NumPy arrays.

  Raises:
    OSError: if it cannot be written.
  """
  write_tensors(path, to_flat(params), {**facts, "ddpm_jax": _FORMAT, "image_shape": list(image_shape)})


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
  """The parameters as a tree of float32 NumPy arrays.

  Raises:
    UserError: if they are not what was written, or do not fit the network of `model`; names all that do not.
  """
  try:
    return from_flat(read_tensors(path).arrays, model, image_shape)
  except (UnusableError, UserError) as error:
    raise UserError(f"{path} {error}" if isinstance(error, UnusableError) else f"{path}: {error}") from error


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
  return config_lib.override(config, changes)
