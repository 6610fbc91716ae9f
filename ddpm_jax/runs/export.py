"""The run `export`: the weights of a workdir, or of --init_from, for other programs."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.devices.hosts import gather
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.export.card import PICTURE, autoencoder_card, card, find_samples, how_to_draw
from ddpm_jax.export.program import write_program
from ddpm_jax.first_stage.latents import FixedStage, Latents
from ddpm_jax.models.build import build_autoencoder
from ddpm_jax.runtime import console, paths
from ddpm_jax.weights import diffusers, file
from ddpm_jax.weights.autoencoders import NAME as AUTOENCODER
from ddpm_jax.weights.autoencoders import AutoencoderWeights, write_autoencoder, write_autoencoder_file
from ddpm_jax.weights.initial import find_weights
from ddpm_jax.weights.load import Weights
from ddpm_jax.weights.stage_folder import as_used
from ddpm_jax.workdir.storage import remedy, sync_file, write_whole


def export(config: Config, workdir: pathlib.Path | None) -> None:
  """Makes the folder `--export_dir`, whole or not at all.

  Args:
    config: of the run.
    workdir: its folder; None: the weights are those of --init_from.

  Raises:
    UserError: if there are no such weights, something is in the way, or the format cannot express the network.
    RunError: if the folder cannot be written.
  """
  target = _target(config.exchange.export_dir, workdir)
  is_autoencoder = config.model.stage == "autoencoder"
  if is_autoencoder and config.exchange.export_format == "jax":
    raise UserError(
      "export_format: jax writes a sampler, and an autoencoder draws nothing; use --export_format=diffusers or "
      "safetensors"
    )
  weights = find_weights(config, workdir)
  with _whole_folder(target) as folder:
    match config.exchange.export_format:
      case "diffusers" if is_autoencoder:
        _write_autoencoder(folder, config, weights, workdir)
      case "safetensors" if is_autoencoder:
        write_autoencoder_file(folder / AUTOENCODER, _autoencoder(weights), _told(config, weights))
      case "diffusers":
        _write_diffusers(folder, config, weights, workdir)
      case "safetensors":
        params = jax.tree.map(gather, weights.params)
        shape, stage = weights.run.image_shape, _first_stage(weights)
        file.write_file(folder / file.NAME, _told(config, weights), shape, params, stage)
      case "jax":
        write_program(config, weights, folder)
      case name:
        raise ValueError(f"unknown format {name!r}")
  console.say(f"done: {target} holds {weights.text}")


def _write_diffusers(folder: pathlib.Path, config: Config, weights: Weights, workdir: pathlib.Path | None) -> None:
  classes = weights.class_names if weights.run.conditional else ()
  params, stage = jax.tree.map(gather, weights.params), _first_stage(weights)
  diffusers.write_folder(folder, config, weights.run.image_shape, params, classes, stage)
  if classes:
    console.say("no pipeline of diffusers draws by class: the README.md has the lines that do")
  trained = workdir if weights.step else None
  found = find_samples(trained, weights) if trained else None
  if trained and not found:
    console.say(
      f"no picture: nothing is drawn of {weights.text} yet; {how_to_draw(config, weights)} does, then export into "
      "another --export_dir"
    )
  _write_card(folder, card(config, weights, trained, found[1] if found else ""), found)


def _write_autoencoder(folder: pathlib.Path, config: Config, weights: Weights, workdir: pathlib.Path | None) -> None:
  assert workdir is not None, "weights of elsewhere are those of models that draw"
  found, own = find_samples(workdir, weights), _autoencoder(weights)
  write_autoencoder(folder, own.network, own.params, own.mean, own.std, own.image_shape[:2])
  _write_card(folder, autoencoder_card(config, weights, workdir, found[1] if found else ""), found)


def _write_card(folder: pathlib.Path, text: str, picture: tuple[pathlib.Path, str] | None) -> None:
  if picture:
    shutil.copyfile(picture[0], folder / PICTURE)
    sync_file(folder / PICTURE)
  write_whole(folder / "README.md", text.encode())


def _autoencoder(weights: Weights) -> AutoencoderWeights:
  """The autoencoder of a run of --stage=autoencoder, which knows nothing of the images of a later one."""
  config, shape = weights.run.config, weights.run.image_shape
  network = as_used(build_autoencoder(config.model, config.autoencoder, shape))
  params, size = jax.tree.map(gather, weights.params["autoencoder"]), config.autoencoder.latent_channels
  return AutoencoderWeights(network, params, shape, np.zeros(size, np.float32), np.ones(size, np.float32))


def _first_stage(weights: Weights) -> FixedStage | None:
  """The first stage of a latent model, on the host; None: pixels."""
  run = weights.run
  if run.first_stage_facts is None:
    return None
  assert isinstance(run.first_stage, Latents)
  return FixedStage(run.first_stage, jax.tree.map(gather, run.frozen), run.first_stage_facts["sha256"])


def _told(config: Config, weights: Weights) -> dict[str, Any]:
  """What a safetensors file says of a run; of weights that come from elsewhere no more than came with them."""
  classes = {"classes": list(weights.class_names)} if weights.run.conditional else {}
  if not weights.step:
    return {"config": file.settings_of_weights(file.without_places(config))} | classes
  return {"config": file.settings_of_run(config), "step": weights.step, "weights": weights.which} | classes


def _target(text: str, workdir: pathlib.Path | None) -> pathlib.Path:
  """The absolute path of --export_dir. Raises UserError if it is missing, or something is there."""
  if not text:
    raise UserError("export_dir: missing; name the folder to make, such as --export_dir=exported")
  target = paths.absolute("export_dir", text, "name a folder, and copy it afterwards")
  if workdir is not None and target.resolve().is_relative_to(workdir.resolve()):
    raise UserError(f"export_dir: {target} is in the workdir, where only the run writes; name a folder outside")
  try:
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
      raise UserError(f"export_dir: {target} exists and is not an empty folder; name another")
  except OSError as error:
    raise UserError(f"export_dir: cannot look into {target} ({error.strerror}); name another folder") from error
  return target


@contextlib.contextmanager
def _whole_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to write into, which becomes `target` at the end. What a kill leaves has another name. Raises RunError."""
  new = target.with_name(f".{target.name}.new")
  try:
    if new.exists():
      shutil.rmtree(new)  # of an earlier try
    new.mkdir(parents=True)
    yield new
    new.replace(target)
  except OSError as error:
    shutil.rmtree(new, ignore_errors=True)
    raise RunError(
      f"export_dir: cannot write {error.filename or target} ({error.strerror}); {remedy(error)}"
    ) from error
  except UserError:
    shutil.rmtree(new, ignore_errors=True)
    raise
