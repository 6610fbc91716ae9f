"""Files in folders of diffusers, whatever the model: JSON objects and weights, none of them a way to run anything."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.weights.tensors import read_tensors
from ddpm_jax.workdir.arrays import UnusableError
from ddpm_jax.workdir.storage import write_whole

WEIGHTS = "diffusion_pytorch_model.safetensors"
_PICKLE = "diffusion_pytorch_model.bin"
VERSION = "0.35.0"  # of diffusers: the first that these folders were tried with


def read_weights(folder: pathlib.Path, part: pathlib.Path, load: str) -> dict[str, np.ndarray]:
  """The tensors of one network, float32.

  Args:
    folder: of the whole model.
    part: of the network: it, or a folder in it.
    load: what loads the model in Python.

  Raises:
    UserError: if they cannot be read.
  """
  path = part / WEIGHTS
  if not path.exists():
    if (part / f"{WEIGHTS}.index.json").exists():
      raise UserError(f"{part / WEIGHTS}.index.json: weights in several files are not supported; save them in one")
    if (part / _PICKLE).exists():
      raise UserError(
        f"{part / _PICKLE} is a pickle, which is not opened, as it may run anything; let diffusers convert it: "
        f"{load}.save_pretrained('converted'), and name that folder"
      )
    raise UserError(f"{part} has no {WEIGHTS}")
  try:
    return read_tensors(inside(folder, path)).arrays
  except UnusableError as error:
    raise UserError(f"{path} {error}") from error


def inside(folder: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
  """The same path. Raises UserError if it is a link that leads out of the folder.

  The Hub's cache is an exception, whose folders snapshots/REVISION, and those in them, are made of links to files in
  blobs/ beside them.
  """
  root = pathlib.Path(os.path.realpath(folder))
  target = pathlib.Path(os.path.realpath(path))
  revision = next((place for place in (root, root.parent) if place.parent.name == "snapshots"), None)
  allowed = [root] if revision is None else [root, revision.parents[1] / "blobs"]
  if not any(target.is_relative_to(place) for place in allowed):
    raise UserError(f"{path} is a link that leads outside, to {target}; name a folder that holds its files")
  return path


def read_json(folder: pathlib.Path, path: pathlib.Path) -> dict[str, Any]:
  """The JSON object in a file of a folder. Raises UserError."""
  try:
    tree = json.loads(inside(folder, path).read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(f"there is no {path}; name the folder of a whole pipeline") from error
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror})") from error
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is no JSON; get it again") from error
  if not isinstance(tree, dict):
    raise UserError(f"{path} is no JSON object; get it again")
  return tree


def write_json(path: pathlib.Path, kind: str, options: Mapping[str, Any]) -> None:
  """Writes a file that describes a model of that class. Raises OSError."""
  tree = {"_class_name": kind, "_diffusers_version": VERSION, **options}
  write_whole(path, (json.dumps(tree, indent=2) + "\n").encode())
