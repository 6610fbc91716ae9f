"""The run `export`: the weights of a workdir, or of --init_from, for other programs."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax

from ddpm_jax.config import Config
from ddpm_jax.devices.hosts import gather
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.export.card import PICTURE, card, find_samples, how_to_draw
from ddpm_jax.export.program import write_program
from ddpm_jax.runtime import console, paths
from ddpm_jax.weights import diffusers, file
from ddpm_jax.weights.initial import find_weights
from ddpm_jax.weights.load import Weights
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
  weights = find_weights(config, workdir)
  with _whole_folder(target) as folder:
    match config.exchange.export_format:
      case "diffusers":
        _write_diffusers(folder, config, weights, workdir)
      case "safetensors":
        params = jax.tree.map(gather, weights.params)
        file.write_file(folder / file.NAME, _told(config, weights), weights.run.image_shape, params)
      case "jax":
        write_program(config, weights, folder)
      case name:
        raise ValueError(f"unknown format {name!r}")
  console.say(f"done: {target} holds {weights.text}")


def _write_diffusers(folder: pathlib.Path, config: Config, weights: Weights, workdir: pathlib.Path | None) -> None:
  classes = weights.class_names if weights.run.conditional else ()
  diffusers.write_folder(folder, config, weights.run.image_shape, jax.tree.map(gather, weights.params), classes)
  if classes:
    console.say("no pipeline of diffusers draws by class: the README.md has the lines that do")
  trained = workdir if weights.step else None
  found = find_samples(trained, weights) if trained else None
  if trained and not found:
    console.say(
      f"no picture: nothing is drawn of {weights.text} yet; {how_to_draw(config, weights)} does, then export into "
      "another --export_dir"
    )
  if found:
    shutil.copyfile(found[0], folder / PICTURE)
    sync_file(folder / PICTURE)
  write_whole(folder / "README.md", card(config, weights, trained, found[1] if found else "").encode())


def _told(config: Config, weights: Weights) -> dict[str, Any]:
  """What a safetensors file says of a run; of weights that come from elsewhere no more than came with them."""
  classes = {"classes": list(weights.class_names)} if weights.run.conditional else {}
  if not weights.step:
    return {"config": file.settings_of_weights(config)} | classes
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
