"""The folder of a run: which configuration it holds, and that it is only ever one."""

from __future__ import annotations

import os
import pathlib

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError

_UNFINISHED = (".config.json.tmp", ".flags.txt.tmp", "samples")  # what a kill inside `create` may leave behind


def load_config(workdir: pathlib.Path) -> Config:
  """The configuration of an existing run. Raises UserError if there is none."""
  path = workdir / "config.json"
  try:
    if not path.is_file():
      raise UserError(
        f"workdir: {workdir} holds no run (no config.json); train one with python -m ddpm_jax.main --workdir={workdir}"
      )
    text = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"workdir: cannot read {path} ({error}); use another --workdir") from error
  try:
    return config_lib.from_json(text)
  except UserError as error:
    raise UserError(f"workdir: {path}: {error}") from None


def check(workdir: pathlib.Path, config: Config) -> bool:
  """Whether `workdir` already holds this run. Writes nothing.

  Raises:
    UserError: if it holds another configuration, something else, or cannot be written.
  """
  try:
    return _check(workdir, config)
  except OSError as error:
    raise UserError(f"workdir: cannot look into {workdir} ({error.strerror}); use another --workdir") from error


def _check(workdir: pathlib.Path, config: Config) -> bool:
  if (workdir / "config.json").is_file():
    differences = config_lib.changed(load_config(workdir), config, on_resume=True)
    if differences:
      name, old, new = differences[0]
      others = (
        f" (and {len(differences) - 1} more: {', '.join(d[0] for d in differences[1:])})" if differences[1:] else ""
      )
      raise UserError(
        f"{name}: {workdir} was trained with {config_lib.flag_text(old)!r}, this command says "
        f"{config_lib.flag_text(new)!r}{others}; go on with --flagfile={workdir / 'flags.txt'} or use another --workdir"
      )
    _check_writable(workdir)
    return True
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f"workdir: {workdir} is a file; name a folder")
  if workdir.is_dir() and any(path.name not in _UNFINISHED for path in workdir.iterdir()):
    raise UserError(f"workdir: {workdir} is not empty and holds no run of ddpm_jax; use another --workdir")
  _check_writable(next(parent for parent in (workdir, *workdir.parents) if parent.exists()))
  return False


def create(workdir: pathlib.Path, config: Config) -> None:
  """Writes the configuration of a run, as `config.json` and as the flagfile `flags.txt`; its files may be renewed."""
  try:
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    for name, text in (("config.json", config_lib.to_json(config)), ("flags.txt", config_lib.to_flagfile(config))):
      temporary = workdir / f".{name}.tmp"
      temporary.write_text(text, encoding="utf-8")
      os.replace(temporary, workdir / name)
  except OSError as error:
    raise UserError(f"workdir: cannot write {workdir} ({error.strerror}); use another --workdir") from error


def _check_writable(folder: pathlib.Path) -> None:
  if not folder.is_dir():
    raise UserError(f"workdir: {folder} is a file, not a folder; use another --workdir")
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(f"workdir: {folder} cannot be written; use another --workdir")
