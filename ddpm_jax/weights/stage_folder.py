"""The folder `first_stage/` of a latent model's workdir: its autoencoder, and the statistics of its latents."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax.errors import RunError, UserError
from ddpm_jax.first_stage.latents import FixedStage, Latents
from ddpm_jax.keys import stream_key
from ddpm_jax.models.build import AutoencoderNetwork, Params, autoencoder_of_settings, autoencoder_settings
from ddpm_jax.weights.names import from_flat_as, to_flat
from ddpm_jax.weights.tensors import read_tensors, write_tensors
from ddpm_jax.workdir.arrays import UnusableError, arrays_sha256
from ddpm_jax.workdir.storage import remedy, write_whole

FOLDER = "first_stage"
_WEIGHTS, _SETTINGS = "weights.safetensors", "settings.json"
_FORMAT = 1
ImageShape = tuple[int, int, int]


class Autoencoder(NamedTuple):
  """A trained autoencoder.

  Attributes:
    network: the autoencoder.
    params: its parameters, NumPy arrays.
    image_shape: of the images that it was trained on; None where it does not say.
    mean, std: of its latents over the images of a run, float32 [z] each; None where they are not known.
  """

  network: AutoencoderNetwork
  params: Params
  image_shape: ImageShape | None = None
  mean: np.ndarray | None = None
  std: np.ndarray | None = None

  @property
  def sha256(self) -> str:
    """Of the parameters, hexadecimal."""
    return arrays_sha256(to_flat(self.params), "")

  def fixed(self, image_shape: ImageShape) -> FixedStage:
    """The first stage of a model of images of that shape."""
    known = {} if self.mean is None or self.std is None else {"mean": self.mean, "std": self.std}
    latents = Latents(as_used(self.network), image_shape)
    return FixedStage(latents, {"autoencoder": self.params, **known}, self.sha256)


def as_used(network: AutoencoderNetwork) -> AutoencoderNetwork:
  """The network as a first stage: in float32, in which neither half loses or overflows, and without dropout."""
  model = network.model.clone(dtype=np.dtype(np.float32), dropout=0.0, remat="none")
  return dataclasses.replace(network, model=model)


def keep(workdir: pathlib.Path, stage: FixedStage, about: Mapping[str, Any]) -> None:
  """Writes the folder; its settings last, which say that it is whole.

  Args:
    workdir: of the run.
    stage: with statistics.
    about: what these are of, JSON values.

  Raises:
    RunError: if it cannot be written.
  """
  settings = {
    "format": _FORMAT,
    "network": autoencoder_settings(stage.latents.network),
    "image_shape": list(stage.latents.image_shape),
    **stage.facts,
    "statistics": dict(about),
  }
  folder = workdir / FOLDER
  try:
    folder.mkdir(exist_ok=True)
    write_tensors(folder / _WEIGHTS, to_flat(stage.params), settings)
    write_whole(folder / _SETTINGS, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
  except OSError as error:
    raise RunError(f"workdir: cannot write {error.filename or folder} ({error.strerror}); {remedy(error)}") from error


def is_kept(workdir: pathlib.Path) -> bool:
  """Whether the folder is there, whole."""
  return (workdir / FOLDER / _SETTINGS).is_file()


def read_kept(workdir: pathlib.Path) -> Autoencoder:
  """The autoencoder that a workdir keeps, with statistics. Raises UserError if it is not all there."""
  folder = workdir / FOLDER
  try:
    settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    form = settings["format"]
    if form != _FORMAT:
      raise UserError(
        f"first_stage: {folder} is of format {form}, this version of ddpm_jax reads {_FORMAT}; use the version that "
        "wrote it"
      )
    arrays, facts = read_tensors(folder / _WEIGHTS)
    if facts != settings:
      raise UnusableError(f"does not go with {_SETTINGS} beside it")
    height, width, channels = settings["image_shape"]
    network = autoencoder_of_settings(settings["network"], (height, width, channels))
    params = from_flat_as(arrays, abstract_params(network, (height, width, channels)))
  except FileNotFoundError as error:
    raise UserError(
      f"first_stage: {error.filename} is missing, without which there are no latents; restore it from a copy of the run"
    ) from None
  except UnusableError as error:
    raise UserError(f"first_stage: {folder / _WEIGHTS} {error}; restore {folder}") from error
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"first_stage: {folder / _SETTINGS} cannot be read ({error}); restore {folder}") from error
  except UserError as error:
    raise UserError(f"first_stage: {folder}: {str(error).removeprefix('first_stage: ')}") from None
  return Autoencoder(network, params["autoencoder"], (height, width, channels), params["mean"], params["std"])


def abstract_params(network: AutoencoderNetwork, image_shape: ImageShape) -> Params:
  """Shapes of the parameters of `Latents`."""
  (*_, z) = network.latent_shape(image_shape)
  of_channels = jax.ShapeDtypeStruct((z,), np.float32)
  params = jax.eval_shape(lambda: network.init(stream_key(0, "init"), image_shape))
  return {"autoencoder": params, "mean": of_channels, "std": of_channels}
