"""The run `export`: the weights of a workdir, or of --init_from, for other programs."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

from ddpm_jax.config import Config
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.exchange.initial import find_weights


def export(config: Config, workdir: pathlib.Path | None) -> None:
  """Makes the folder `--export_dir`, whole or not at all.

  Args:
    config: of the run.
    workdir: its folder; None: the weights are those of --init_from.

  Raises:
    UserError: if there are no such weights, or the folder cannot be one of them.
    RunError: if it cannot be written.
  """
  target = _target(config.exchange.export_dir)
  weights = find_weights(config, workdir)
  with _whole_folder(target):
    match config.exchange.export_format:
      case "diffusers" | "safetensors" | "jax":
        raise UserError(f"export_format: {config.exchange.export_format} cannot be written yet ({weights.which})")
      case name:
        raise ValueError(f"unknown format {name!r}")
  print(f"done: {target}", flush=True)


def _target(text: str) -> pathlib.Path:
  """The absolute path of --export_dir. Raises UserError if it is missing, or something is there."""
  if not text:
    raise UserError("export_dir: missing; name the folder to make, such as --export_dir=exported")
  if "://" in text:
    raise UserError(f"export_dir: {text!r} is no path in a file system; name a folder, and copy it afterwards")
  target = pathlib.Path(text).expanduser().absolute()
  try:
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
      raise UserError(f"export_dir: {target} exists and is not an empty folder; name another")
  except OSError as error:
    raise UserError(f"export_dir: cannot look into {target} ({error.strerror}); name another folder") from error
  return target


@contextlib.contextmanager
def _whole_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to write into, which becomes `target` at the end; a kill leaves it under another name. Raises RunError."""
  new = target.with_name(f".{target.name}.new")
  try:
    if new.exists():
      shutil.rmtree(new)  # of an earlier try
    new.mkdir(parents=True)
    yield new
    new.replace(target)
  except OSError as error:
    raise RunError(f"export_dir: cannot write {error.filename or target} ({error.strerror}); make room") from error
  finally:
    shutil.rmtree(new, ignore_errors=True)
