"""Folders of diffusers' DDPMPipeline: read, and written without PyTorch.

Two layouts are read: that of `save_pretrained`, with `unet/` and `scheduler/`, and that of the published google/ddpm-*
models, where all lies side by side.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ddpm_jax.config import Config, ModelConfig
from ddpm_jax.errors import UserError
from ddpm_jax.models.build import Params
from ddpm_jax.weights.names import from_diffusers, table, to_diffusers
from ddpm_jax.weights.options import diffusion_settings, model_settings, scheduler_options, unet_options
from ddpm_jax.weights.tensors import read_tensors, write_tensors
from ddpm_jax.workdir.arrays import UnusableError
from ddpm_jax.workdir.storage import write_whole

_PIPELINES = ("DDPMPipeline", "DDIMPipeline")
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PICKLE = "diffusion_pytorch_model.bin"
_VERSION = "0.35.0"  # of diffusers: the first that these folders were tried with
_CLASSES = "_classes"  # ours, in the config.json of the network; diffusers passes it over


class Description(NamedTuple):
  """What a folder says of its model."""

  settings: dict[str, Any]  # of the sections model and diffusion, and the threshold of drawing
  image_shape: tuple[int, int, int]  # H, W, C
  classes: tuple[str, ...]  # names of the classes of a conditional model, as far as it says them


def is_folder_of_diffusers(folder: pathlib.Path) -> bool:
  """Whether there is a model of diffusers, of whatever kind."""
  if (folder / "model_index.json").exists():
    return True
  config = folder / "config.json"
  return config.exists() and "_class_name" in _read_json(folder, config)


def describe(folder: pathlib.Path) -> Description:
  """Reads the architecture, the diffusion and the size of the images.

  Raises:
    UserError: if it is another kind of model, or has an option that is not supported; names file and option.
  """
  unet, scheduler = _parts(folder)
  options = _read_json(folder, unet / "config.json")
  try:
    settings, image_shape = model_settings(options)
    classes = _class_names(options)
  except UserError as error:
    raise UserError(f"{unet / 'config.json'}: {error}") from None
  options = _read_json(folder, scheduler)
  try:
    return Description(settings | diffusion_settings(options), image_shape, classes)
  except UserError as error:
    raise UserError(f"{scheduler}: {error}") from None


def read_params(folder: pathlib.Path, model: ModelConfig, image_shape: tuple[int, int, int]) -> Params:
  """The weights as a tree of float32 NumPy arrays.

  Raises:
    UserError: if they cannot be read, or do not fit the network of `model`; names all tensors that do not.
  """
  unet, _ = _parts(folder)
  path = unet / _WEIGHTS
  if not path.exists():
    if (unet / f"{_WEIGHTS}.index.json").exists():
      raise UserError(f"{unet / _WEIGHTS}.index.json: weights in several files are not supported; save them in one")
    if (unet / _PICKLE).exists():
      raise UserError(
        f"{unet / _PICKLE} is a pickle, which is not opened, as it may run anything; let diffusers convert it: "
        f"DDPMPipeline.from_pretrained({str(folder)!r}).save_pretrained('converted'), and name that folder"
      )
    raise UserError(f"{unet} has no {_WEIGHTS}")
  try:
    tensors = read_tensors(_inside(folder, path))
  except UnusableError as error:
    raise UserError(f"{path} {error}") from error
  try:
    return from_diffusers(tensors.arrays, table(model, image_shape))
  except UserError as error:
    raise UserError(f"{path}: {error}") from None


def write_folder(
  folder: pathlib.Path,
  config: Config,
  image_shape: tuple[int, int, int],
  params: Params,
  classes: Sequence[str] = (),
) -> None:
  """Writes all that `DDPMPipeline.from_pretrained(folder)` needs into an empty folder.

  Args:
    folder: exists.
    config: of the run.
    image_shape: H, W, C.
    params: a tree of NumPy arrays.
    classes: names of the classes of a conditional model.

  Raises:
    UserError: if diffusers has no such network.
    OSError: if they cannot be written.
  """
  options = unet_options(config.model, image_shape) | ({_CLASSES: list(classes)} if classes else {})
  (folder / "unet").mkdir()
  (folder / "scheduler").mkdir()
  parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
  _write_json(folder / "model_index.json", "DDPMPipeline", parts)
  _write_json(folder / "unet" / "config.json", "UNet2DModel", options)
  _write_json(folder / "scheduler" / "scheduler_config.json", "DDPMScheduler", scheduler_options(config))
  write_tensors(folder / "unet" / _WEIGHTS, to_diffusers(params, table(config.model, image_shape)), {})


def _class_names(options: Mapping[str, Any]) -> tuple[str, ...]:
  names = options.get(_CLASSES, [])
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise UserError(f"{_CLASSES}: {names!r} is no list of names")
  return tuple(names)


def _parts(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """The folder of the U-Net, and the file of the scheduler. Raises UserError for another pipeline."""
  index = folder / "model_index.json"
  if index.exists():
    kind = _read_json(folder, index).get("_class_name")
    if kind not in _PIPELINES:
      raise UserError(f"{index}: a {kind} is another kind of model, only {' and '.join(_PIPELINES)} are supported")
  if (folder / "unet").is_dir():
    return folder / "unet", folder / "scheduler" / "scheduler_config.json"
  return folder, folder / "scheduler_config.json"


def _inside(folder: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
  """The same path. Raises UserError if it is a link that leads out of the folder.

  The Hub's cache is an exception, whose folders snapshots/REVISION are made of links to files in blobs/ beside them.
  """
  root = pathlib.Path(os.path.realpath(folder))
  target = pathlib.Path(os.path.realpath(path))
  allowed = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
  if not any(target.is_relative_to(place) for place in allowed):
    raise UserError(f"{path} is a link that leads outside, to {target}; name a folder that holds its files")
  return path


def _read_json(folder: pathlib.Path, path: pathlib.Path) -> dict[str, Any]:
  try:
    tree = json.loads(_inside(folder, path).read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(f"there is no {path}; name the folder of a whole pipeline") from error
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror})") from error
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is no JSON; get it again") from error
  if not isinstance(tree, dict):
    raise UserError(f"{path} is no JSON object; get it again")
  return tree


def _write_json(path: pathlib.Path, kind: str, options: Mapping[str, Any]) -> None:
  tree = {"_class_name": kind, "_diffusers_version": _VERSION, **options}
  write_whole(path, (json.dumps(tree, indent=2) + "\n").encode())
