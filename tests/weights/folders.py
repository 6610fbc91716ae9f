"""Folders of diffusers as it writes them, made from the golden file without it."""

import json
import pathlib

import numpy as np
import safetensors.numpy

from tests.weights.make_diffusers_golden import GOLDEN, random_tensor

OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def golden(name: str) -> np.ndarray:
  with np.load(GOLDEN) as archive:
    return archive[name]


def golden_json(name: str) -> dict:
  return json.loads(str(golden(name)))


def state_of(network: str, older: bool = False) -> dict[str, np.ndarray]:
  """diffusers' names and shapes with random weights; `older`: as attention was called in the published files."""
  state = {name: random_tensor(name, tuple(shape)) for name, shape in golden_json(f"{network}/shapes").items()}
  if older:
    for today, once in OLDER.items():
      state = {name.replace(f".{today}.", f".{once}."): tensor for name, tensor in state.items()}
  return state


def published(folder: pathlib.Path, network: str = "attention_at_two_levels", **changes) -> pathlib.Path:
  """The layout of google/ddpm-cifar10-32: everything at the root, no index needed, older names."""
  folder.mkdir()
  write_json(folder / "config.json", golden_json(f"{network}/config") | changes)
  write_json(folder / "scheduler_config.json", golden_json("scheduler"))
  write_tensors(folder / "diffusion_pytorch_model.safetensors", state_of(network, older=True))
  return folder


def saved(folder: pathlib.Path, network: str = "attention_at_two_levels") -> pathlib.Path:
  """The layout of `save_pretrained`."""
  for part in ("unet", "scheduler"):
    (folder / part).mkdir(parents=True)
  index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
  write_json(folder / "model_index.json", index | {"scheduler": ["diffusers", "DDPMScheduler"]})
  write_json(folder / "unet" / "config.json", golden_json(f"{network}/config"))
  write_json(folder / "scheduler" / "scheduler_config.json", golden_json("scheduler"))
  write_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", state_of(network))
  return folder


def write_json(path: pathlib.Path, tree: dict) -> None:
  path.write_text(json.dumps(tree))


def change_json(path: pathlib.Path, **changes) -> None:
  write_json(path, json.loads(path.read_text()) | changes)


def write_tensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  path.write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  return safetensors.numpy.load(path.read_bytes())


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  """Every file below a folder, hidden ones too."""
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
