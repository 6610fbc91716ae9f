"""The folder of a run: which configuration it holds, and that it is only ever one."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import paths
from ddpm_jax.workdir import lock
from ddpm_jax.workdir.storage import size_text, write_whole

# Everything that a run writes, by name. Whatever else lies in a workdir (a log, lost+found, .DS_Store) is not touched.
WRITTEN = re.compile(
  r"config\.json|flags\.txt|classes\.json|metrics\.jsonl|loss\.png|report\.html|stuck\.\d+\.txt|"
  r"lock|first_stage|perceptual\.safetensors|checkpoints|best|damaged|earlier|samples|eval|tensorboard|profile|wandb_id\.txt"
)
# Backslashes, and patterns of shells: Orbax writes elsewhere, or cannot read what it wrote, without an error.
_NOT_IN_PATHS = "\\*?["


def load_config(workdir: pathlib.Path) -> Config:
  """The configuration of an existing run. Raises UserError if there is none, or a link of it leads outside."""
  _check_name(workdir)
  path = workdir / "config.json"
  try:
    if os.path.lexists(path):
      _check_links(workdir)
    if not path.is_file():
      raise no_run(workdir)
    text = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"workdir: cannot read {path} ({error}); use another --workdir") from error
  try:
    return config_lib.from_json(text)
  except UserError as error:
    raise UserError(f"workdir: {path}: {error}") from None


def no_run(workdir: pathlib.Path) -> UserError:
  """The error that a command names a folder without a run."""
  return UserError(
    f"workdir: {workdir} holds no run (no config.json){_run_near(workdir)}; name the folder of a run, or train "
    f"one there first, such as the digits, by {paths.command(f'--workdir={workdir}')}"
  )


def _run_near(workdir: pathlib.Path) -> str:
  """The run that may have been meant, by its name, as part of a message."""
  beside = [path.parent.name for path in workdir.parent.glob("*/config.json")]
  near = difflib.get_close_matches(workdir.name, beside, n=1)
  return f" (did you mean {workdir.parent / near[0]}?)" if near else ""


def holds_run(workdir: pathlib.Path) -> bool:
  """Whether there is a configuration. Raises UserError if that cannot be seen."""
  return paths.exists("workdir", workdir / "config.json")


def has_checkpoints(workdir: pathlib.Path, folders: Sequence[str] = ("checkpoints", "best")) -> bool:
  """Whether a run was trained there, as far as a checkpoint in one of `folders`.

  Training goes on from those in checkpoints/ alone.

  Raises:
    UserError: if that cannot be seen.
  """
  try:
    found = [folder for name in folders if (folder := workdir / name).is_dir()]
    return any(path.name.isdecimal() for folder in found for path in folder.iterdir())
  except OSError as error:
    raise UserError(f"workdir: cannot look into {workdir} ({error.strerror}); use another --workdir") from error


def has_begun(workdir: pathlib.Path) -> bool:
  """Whether training was started there, if not as far as a checkpoint. Raises UserError if that cannot be seen."""
  return paths.exists("workdir", workdir / "metrics.jsonl")


class StoredRun(NamedTuple):
  """What the folder of a run holds, read once."""

  folder: pathlib.Path
  config: Config  # as it was written
  has_checkpoints: bool
  trained: bool  # False only where it holds weights of --init_from with which no training has begun


def read_run(workdir: pathlib.Path) -> StoredRun | None:
  """The run in `workdir`; None if it holds none. Raises UserError if that cannot be seen, or it cannot be read."""
  if not holds_run(workdir):
    return None
  config, saved = load_config(workdir), has_checkpoints(workdir)
  return StoredRun(workdir, config, saved, not config.exchange.init_from or saved or has_begun(workdir))


def newest_facts(workdir: pathlib.Path) -> tuple[int, dict[str, Any]]:
  """The number of the newest checkpoint and what its manifest says, unverified; 0 and {} where there is none to read.

  For messages, which checkpoints make more exact, before JAX is imported.
  """
  found = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
  for path in sorted(found, key=lambda path: -int(path.name)):
    with contextlib.suppress(OSError, ValueError):
      facts = json.loads((path / "manifest" / "metadata").read_bytes())
      if isinstance(facts, dict):
        return int(path.name), facts
  return 0, {}


def _check_not_edited(run: StoredRun, name: str, value: Any) -> None:
  """Raises UserError if config.json says something else of an option than the newest checkpoint does."""
  step, facts = newest_facts(run.folder)
  sections = facts.get("config")
  for section in sections.values() if isinstance(sections, dict) else ():
    if isinstance(section, dict) and name in section and section[name] != json.loads(json.dumps(value)):
      raise UserError(
        f"{name}: config.json of {run.folder} says {config_lib.flag_text(value)!r}, its checkpoint {step} "
        f"{config_lib.flag_text(section[name])!r}; restore config.json"
      )


def own_parts(workdir: pathlib.Path) -> dict[str, str]:
  """What of a run is not as its settings say, but a person's own: 'network' and 'objective', with their names."""
  path = workdir / "config.json"
  return config_lib.own_parts(path.read_text(encoding="utf-8")) if path.is_file() else {}


def describe_own(part: Any) -> str:
  """The class of an own network or objective, with those of its fields that are plain values: 'Huber(c=0.03)'."""
  plain = (bool, int, float, str)
  fields = dataclasses.fields(part) if dataclasses.is_dataclass(part) else ()
  values = {field.name: getattr(part, field.name) for field in fields}
  text = ", ".join(f"{name}={value!r}" for name, value in values.items() if isinstance(value, plain))
  return f"{type(part).__qualname__}({text})"


def check_own(workdir: pathlib.Path, own: dict[str, str], parts: Sequence[str] = ("network", "objective")) -> None:
  """Raises UserError unless the run in `workdir`, if there is one, has these own parts, of those that are named."""
  if not holds_run(workdir):
    return
  stored = own_parts(workdir)
  for part in parts:
    has, given = stored.get(part, ""), own.get(part, "")
    if has and not given:
      where = "ddpm_jax.train or ddpm_jax.load" if part == "network" else "ddpm_jax.train"
      raise UserError(f"{part}: {workdir} was trained with an own {part}, {has}; in Python, give it to {where}")
    if has != given:
      raise UserError(
        f"{part}: {workdir} was trained with {has or 'that of its settings'}, not {given}; use another workdir"
      )


def changed(run: StoredRun, config: Config, *, once_trained: bool = False) -> list[tuple[str, Any, Any]]:
  """The options that a command would change of `run`, and may not, as (name, before, after).

  once_trained: the command only uses its weights, see `config.changed`.

  Where the weights of --init_from were only drawn with or measured, that is the model alone: nothing was trained yet.
  """
  differences = config_lib.changed(run.config, config, on_resume=True, once_trained=once_trained)
  if run.trained:
    return differences
  model = {field.name for section, field, _ in config_lib.options(config) if section in ("model", "diffusion")}
  return [difference for difference in differences if difference[0] in model | {"init_from"}]


def history(run: StoredRun) -> str:
  """How a run got its settings, for the message that another has others."""
  return f"{run.folder} was {'trained' if run.trained else 'made'} with"


def check(workdir: pathlib.Path, config: Config) -> bool:
  """Whether `workdir` already holds this run. Writes nothing.

  A folder that holds other things, and nothing under a name that a run writes, is a new workdir. Another process may
  be about to change the answer: ask again under the `Lock`.

  Raises:
    UserError: if it holds another configuration, something that a run would write over or a link that leads outside,
      cannot be written, or is new and lies where its pictures would be taken for images of the data set.
  """
  _check_name(workdir)
  try:
    return _check(workdir, config)
  except OSError as error:
    raise UserError(f"workdir: cannot look into {workdir} ({error.strerror}); use another --workdir") from error


def _check(workdir: pathlib.Path, config: Config) -> bool:
  run = read_run(workdir) if (workdir / "config.json").is_file() else None
  if run:
    differences = changed(run, config)
    if differences:
      name, old, new = differences[0]
      _check_not_edited(run, name, old)
      others = (
        f" (and {len(differences) - 1} more: {', '.join(d[0] for d in differences[1:])})" if differences[1:] else ""
      )
      raise UserError(
        f"{name}: {history(run)} {config_lib.flag_text(old)!r}, this command says "
        f"{config_lib.flag_text(new)!r}{others}; leave --{name} out, or use another --workdir"
      )
    for name in ("", "checkpoints", "samples", "tensorboard"):
      if not name or (workdir / name).exists():
        check_writable(workdir / name)
    return True
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f"workdir: {workdir} is a file; name a folder")
  if workdir.is_dir():
    _check_links(workdir)
    step, facts = newest_facts(workdir)
    if "config" in facts:
      raise UserError(
        f"workdir: config.json of {workdir} is missing; checkpoints/{step}/manifest/metadata has its text under "
        '"config": write that there, or move the folder away'
      )
    for path in sorted(workdir.iterdir()):
      # A kill between the lock and the end of `create` leaves a lock and an empty folder.
      if WRITTEN.fullmatch(path.name) and path.name != lock.NAME and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(
          f"workdir: {workdir} holds no run, but has {path.name}, which a run would overwrite; move it away, or use "
          "another --workdir"
        )
  _check_outside_images(workdir, config.data.dataset)
  check_writable(workdir)
  return False


def create(workdir: pathlib.Path, config: Config, own: dict[str, str] | None = None) -> None:
  """Writes the configuration of a run, as `config.json` and as the flagfile `flags.txt`; its files may be renewed.

  own: see `own_parts`; None: as it was.
  """
  try:
    own = own_parts(workdir) if own is None else own
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    for name, text in (("config.json", config_lib.to_json(config, own)), ("flags.txt", config_lib.to_flagfile(config))):
      write_whole(workdir / name, text.encode())
  except OSError as error:
    raise UserError(f"workdir: cannot write {workdir} ({error.strerror}); use another --workdir") from error


def keep_classes(workdir: pathlib.Path, names: Sequence[str]) -> None:
  """Writes the names of the classes of the images, in their order, as `classes.json`; nothing if there are none."""
  path, text = workdir / "classes.json", json.dumps(list(names), ensure_ascii=False) + "\n"
  try:
    if names and not (path.is_file() and path.read_bytes() == text.encode()):
      write_whole(path, text.encode())
  except OSError as error:
    raise UserError(f"workdir: cannot write {path} ({error.strerror}); use another --workdir") from error


def classes(workdir: pathlib.Path) -> tuple[str, ...]:
  """The names of the classes of its images, in their order; none where they are not known or cannot be read."""
  try:
    names = json.loads((workdir / "classes.json").read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return ()
  return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def discard(workdir: pathlib.Path) -> None:
  """Removes what `create` and the lock made, before a run wrote anything else there; the folder too, if it is empty."""
  with contextlib.suppress(OSError):
    for name in ("config.json", "flags.txt", lock.NAME):
      (workdir / name).unlink(missing_ok=True)
    (workdir / "samples").rmdir()
    workdir.rmdir()


def check_space(
  workdir: pathlib.Path, checkpoint_bytes: int, keep: int, saves: int | None = None, *, beside: int = 0
) -> None:
  """Whether the checkpoints will find room beside what `workdir` holds.

  Args:
    workdir: may not exist yet.
    checkpoint_bytes: of one checkpoint.
    keep: that many are kept; the oldest is deleted once one more is written.
    saves: how many this command will write, if that is known.
    beside: checkpoints that stay, or have been there, beside those that `keep` counts.

  Raises:
    UserError: if there is too little.
  """
  try:
    folder = workdir / "checkpoints"
    held = sum(path.name.isdecimal() for path in folder.iterdir()) if folder.is_dir() else 0
    disk = shutil.disk_usage(next(parent for parent in (workdir, *workdir.parents) if parent.exists()))
    unfinished = [path for part in folder.glob("*.orbax-checkpoint-tmp") for path in part.rglob("*") if path.is_file()]
    free = disk.free + sum(path.stat().st_size for path in unfinished)  # they are about to be removed
  except OSError as error:
    raise UserError(f"workdir: cannot look into {workdir} ({error.strerror}); use another --workdir") from error
  number = max(1, keep + beside + 1 - held)
  if saves is not None:
    number = min(number, saves)
  if disk.total and free < number * checkpoint_bytes:
    raise UserError(
      f"workdir: {workdir} has {size_text(free)} of free space, but {number} more checkpoints of "
      f"{size_text(checkpoint_bytes)} are to be written before an old one is deleted, "
      f"{size_text(number * checkpoint_bytes)}; make room, lower --keep_checkpoints={keep}, or use a --workdir on "
      "another disk"
    )


def _check_outside_images(workdir: pathlib.Path, dataset: str) -> None:
  """Raises UserError if sample grids would become images of the folder that is trained on."""
  kind, place = config_lib.own_images(dataset) or ("", "")
  if kind != "folder":
    return
  images = paths.expanded("dataset", place)
  inside = os.path.relpath(os.path.realpath(workdir), os.path.realpath(images)).split(os.sep)
  if inside[0] != os.pardir and not any(part.startswith(".") for part in inside if part != os.curdir):
    raise UserError(
      f"workdir: {workdir} lies inside the image folder {images}, so its pictures would become training images; use "
      "another --workdir"
    )


def _check_name(workdir: pathlib.Path) -> None:
  """Refuses paths that something in this package could not write to, or not print."""
  paths.check_name("workdir", workdir, _NOT_IN_PATHS)
  if any(part.endswith(":") for part in workdir.parts):
    raise UserError(f"workdir: {workdir} reads like an address; name a folder that does not end in a colon")


def _check_links(workdir: pathlib.Path) -> None:
  """Raises UserError for a symbolic link, at any depth, through which something outside could be overwritten."""
  root = os.path.realpath(workdir)
  folders = [root]
  while folders:
    folder = folders.pop()
    try:
      with os.scandir(folder) as entries:
        for entry in entries:
          if folder == root and not WRITTEN.fullmatch(entry.name):
            continue
          if entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
          elif entry.is_symlink() and os.path.commonpath([root, target := os.path.realpath(entry.path)]) != root:
            link = workdir / os.path.relpath(entry.path, root)
            raise UserError(
              f"workdir: {link} is a link that leads outside, to {target}; remove it, or use another --workdir"
            )
    except FileNotFoundError:
      continue  # an old checkpoint that a trainer deletes meanwhile


def check_writable(folder: pathlib.Path) -> None:
  """Raises UserError if nothing can be written into a folder, or into the first that exists above it."""
  folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
  if not folder.is_dir():
    raise UserError(f"workdir: {folder} is a file, not a folder; use another --workdir")
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(f"workdir: {folder} cannot be written; make it writable, or use another --workdir")
