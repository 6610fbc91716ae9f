"""The settings of a command: its flags over those of the workdir, over the defaults, by one table for all modes.

Each of these wins over those before it:

  1. the defaults; for a new run on own images, a preset that fits the device (`--preset` and flagfiles turn
     that off)
  2. the settings of the run in `--workdir`, if it holds one
  3. what comes with the weights of `--init_from`
  4. flagfiles and `--preset`, the later one over the earlier one
  5. flags on the command line
"""

from __future__ import annotations

import enum
import pathlib
from typing import Any, NamedTuple

from ddpm_jax import config as config_lib
from ddpm_jax import flags, presets
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import console, paths
from ddpm_jax.workdir import layout
from ddpm_jax.workdir.layout import StoredRun


class Change(enum.Enum):
  """The options in which a command may differ from the run in its workdir."""

  ANY = enum.auto()  # nothing is trained or drawn
  RESUMED = enum.auto()  # `may_change`; compared by `layout.check` when the run starts, under its lock
  USED = enum.auto()  # `may_change_once_trained`, where the network runs; else `may_change`


class Rules(NamedTuple):
  """What makes the config of a mode."""

  new_run: bool  # where the workdir holds no run, the settings are the defaults, or come with --init_from
  change: Change
  needs_workdir: bool


MODES = {
  "train": Rules(new_run=True, change=Change.RESUMED, needs_workdir=True),
  "sample": Rules(new_run=False, change=Change.USED, needs_workdir=True),
  "evaluate": Rules(new_run=False, change=Change.USED, needs_workdir=True),  # not with --write_reference
  "export": Rules(new_run=False, change=Change.USED, needs_workdir=False),  # but that or --init_from
  "plan": Rules(new_run=True, change=Change.ANY, needs_workdir=False),
}


class Command(NamedTuple):
  """What a person asked for."""

  mode: str
  given: dict[str, Any]  # the options that flags and flagfiles name
  preset: str | None = None  # the value of --preset; 'none' if a flagfile was named after it
  folder: pathlib.Path | None = None  # --workdir


def needs_workdir(mode: str, given: dict[str, Any]) -> bool:
  """Whether there is nothing to be done without one. Statistics of a data set are of no run."""
  return MODES[mode].needs_workdir and not (mode == "evaluate" and "write_reference" in given)


# Modes of a workdir that holds no model that draws.
_OF_STAGES = {("autoencoder", "evaluate"), ("autoencoder", "export")}


def _a(stage: str) -> str:
  """The stage with its article."""
  return f"{'an' if stage == 'autoencoder' else 'a'} {stage}"


def resolve_config(mode: str, given: dict[str, Any], folder: pathlib.Path | None) -> Config:
  """The config of a command.

  Args:
    mode: a key of `MODES`.
    given: the options that its flags name.
    folder: of the run; None: the command names none.

  Raises:
    UserError: if a value is out of range, a flag would change what the workdir was trained with, or --init_from cannot
      be read.
  """
  rules, run = MODES[mode], layout.read_run(folder) if folder is not None else None
  if run:
    layout.check_own(run.folder, {}, ("network", "objective") if mode == "train" else ("network",))
  stage = run.config.model.stage if run else "denoiser"
  if run and given.get("stage", stage) != stage:
    raise UserError(f"stage: {run.folder} holds {_a(stage)}, and no {given['stage']}; use another --workdir")
  if run and stage != "denoiser" and not rules.new_run and (stage, mode) not in _OF_STAGES:
    option = "first_stage" if stage == "autoencoder" else "classifier"
    measured = "; --mode=evaluate measures it" if stage == "autoencoder" else ""
    raise UserError(
      f"mode: {mode} is of models that draw, and {run.folder} holds {_a(stage)}; name the workdir of such a "
      f"model, and this one as --{option}{measured}"
    )
  given = _settled(given, run)
  if (trained := given.get("stage", stage)) != "denoiser" and given.get("init_from"):  # before its settings say more
    raise UserError(f"init_from: {given['init_from']} has no effect with stage={trained}; leave it out")
  base = _base(rules, given, run)
  if mode != "evaluate" and given.get("write_reference"):
    raise UserError("write_reference: is for --mode=evaluate; add that")
  if mode == "train" and run and ":" in run.config.train.writers and "writers" not in given:
    console.warn(
      f"writers: {run.config.train.writers} names a class, which counts for the command that names it; give --writers "
      "again"
    )
  if mode == "export":
    _check_one_model(given, folder, run)
  if not rules.new_run and folder is not None and not run and not given.get("init_from"):
    raise layout.no_run(folder)
  try:
    config = config_lib.override(base, given)
  except UserError:
    if run and rules.change is not Change.ANY:
      _check_one_by_one(run, given)
    raise
  if rules.change is Change.USED:
    if run and (kept := run.config.diffusion.first_stage) and given.get("first_stage", kept) != kept:
      raise UserError(f"first_stage: {run.folder} has its own, in first_stage/; leave --first_stage out")
    runs_network = mode != "export" or config.exchange.export_format == "jax"  # else parameters are only written
    if run:
      _check_unchanged(run, config, once_trained=runs_network)
    elif folder is not None:
      layout.check(folder, config)
    if runs_network:
      config_lib.check_variance(given, config)
  return config


def _settled(given: dict[str, Any], run: StoredRun | None) -> dict[str, Any]:
  """`given` without what the run has settled, and paths of models as absolute ones."""
  if run:
    left_open = config_lib.LEFT_TO_IMAGES.items()
    given = {name: value for name, value in given.items() if (name, value) not in left_open}
  return with_absolute_models(given)


def with_absolute_models(given: dict[str, Any]) -> dict[str, Any]:
  """The options with paths of models as absolute ones. Raises UserError for one that a workdir cannot keep."""
  if given.get("init_from"):
    from ddpm_jax.weights import initial  # with JAX

    given = given | {"init_from": initial.absolute(given["init_from"])}
  if given.get("first_stage"):
    path = paths.absolute("first_stage", given["first_stage"], "get the autoencoder first and name its folder")
    paths.check_name("first_stage", path)
    given = given | {"first_stage": str(path)}
  for name in ("guide_with", "classifier"):
    text = given.get(name, "")
    if text not in ("", "raw") and not text.isdecimal():
      given = given | {name: str(paths.absolute(name, text, "get the model first and name its folder"))}
  return given


def _base(rules: Rules, given: dict[str, Any], run: StoredRun | None) -> Config:
  """What flags win over."""
  base = Config()
  if run:
    base = config_lib.without_one_time_options(run.config)
    base = config_lib.reset_weight_selectors(base) if run.has_checkpoints else base
  path = given.get("init_from")
  if path and (rules.new_run or not run):
    from ddpm_jax.weights import initial

    base = initial.base_config(path, run.config if run else None, base)
    if rules.new_run and not run:  # how many classes there are is for the images to say
      base = config_lib.override(base, {"num_classes": 0})
  return base


def _check_unchanged(run: StoredRun, config: Config, *, once_trained: bool) -> None:
  for name, old, new in layout.changed(run, config, once_trained=once_trained):
    raise UserError(
      f"{name}: {layout.history(run)} {config_lib.flag_text(old)!r}, not {config_lib.flag_text(new)!r}; leave "
      f"--{name} out"
    )


def _check_one_by_one(run: StoredRun, given: dict[str, Any]) -> None:
  """Raises UserError for an option that alone may not be what it is, whatever it would mean beside the others."""
  for _, field, old in config_lib.options(run.config):
    new = given.get(field.name, old)
    if run.trained and new != old and not field.metadata["may_change_once_trained"] and field.name != "dataset":
      raise UserError(
        f"{field.name}: {layout.history(run)} {config_lib.flag_text(old)!r}, not {config_lib.flag_text(new)!r}; leave "
        f"--{field.name} out, or use another --workdir"
      )


def _check_one_model(given: dict[str, Any], folder: pathlib.Path | None, run: StoredRun | None) -> None:
  """Raises UserError unless an export is of a run, with what it began with or not, or of weights of elsewhere."""
  path = given.get("init_from")
  began_with_it = path and run and run.config.exchange.init_from == path
  if not began_with_it and (folder is None) == (not path):
    raise UserError("workdir: name either a run to export, --workdir, or weights of elsewhere, --init_from")


def takes_preset_of_device(command: Command) -> bool:
  """Whether a command begins a run on own images, and says nothing of how: then a preset does."""
  if command.preset is not None or not MODES[command.mode].new_run:
    return False
  own_images = config_lib.own_images(command.given.get("dataset", "")) and not command.given.get("init_from")
  return bool(own_images) and not (command.folder and layout.holds_run(command.folder))


def resolve_before_jax(command: Command) -> Config:
  """The config of a command, but with any preset for own images whose settings go with its flags.

  Which preset it will be is for the device to say, and what is read before JAX is imported is the same in all.

  Raises:
    UserError: as `resolve_config`.
  """
  if not takes_preset_of_device(command):
    _check_data_of_preset(command)
    return resolve_config(command.mode, command.given, command.folder)
  refused = []
  for name in presets.OWN_IMAGES:
    try:
      return resolve_config(command.mode, _of_preset(name, command) | command.given, command.folder)
    except UserError as error:
      refused.append(with_preset(error, name))
  raise refused[0]


def resolve_for_device(command: Command, config: Config) -> tuple[Config, str]:
  """The config of a command, with the preset for this device where a new run on own images leaves it open.

  Args:
    command: what was asked for.
    config: of `resolve_before_jax`.

  Returns:
    The config, and the name of that preset or ''.

  Raises:
    UserError: if the flags do not go with it.
  """
  if not takes_preset_of_device(command):
    return config, ""
  import jax

  planned = "cpu" if config.plan.topology == "cpu" else "tpu"
  platform = planned if command.mode == "plan" else jax.default_backend()  # a plan leaves this machine's devices alone
  name = presets.for_own_images(platform)
  try:
    return resolve_config(command.mode, _of_preset(name, command) | command.given, command.folder), name
  except UserError as error:
    raise with_preset(error, name) from None


def _of_preset(name: str, command: Command) -> dict[str, Any]:
  """The options of a preset for own images. It is a denoiser's: another stage takes what it has a use for.

  An autoencoder takes no network of it either, whose levels would be far too many.
  """
  stage, settings = command.given.get("stage", "denoiser"), flags.of_preset(name)
  without = {*config_lib.WITHOUT_USE.get(stage, ())}
  if stage == "autoencoder":
    of = ("diffusion", "model", "sample")
    without |= {field.name for section, field, _ in config_lib.options(Config()) if section in of}
  return {name: value for name, value in settings.items() if name not in without}


def _check_data_of_preset(command: Command) -> None:
  """Raises UserError for a preset of the user's own images where the command does not say which: digits are not."""
  if command.preset in (None, presets.NONE) or not MODES[command.mode].new_run or "dataset" in command.given:
    return
  if command.given.get("init_from") or (command.folder and layout.holds_run(command.folder)):
    return
  raise UserError(
    f"dataset: --preset={command.preset} is for images of your own; name them, such as --dataset=folder:PATH"
  )


def with_preset(error: UserError, name: str) -> UserError:
  """The same of a setting that the command may not have named."""
  return UserError(f"{error} (own images take --preset={name} on {_device(name)}; --preset=none leaves the defaults)")


def with_named_preset(error: UserError, command: Command) -> UserError:
  """The same of a setting that the command did not name, but its --preset has."""
  name, _, _ = str(error).partition(":")
  if command.preset in (None, "none") or name not in command.given:
    return error
  of_preset = flags.of_preset(command.preset)
  said = name in of_preset and of_preset[name] == command.given[name]
  return UserError(f"{error} (--preset={command.preset} says so: leave that out)") if said else error


def _device(preset: str) -> str:
  """Where own images take it."""
  return "a CPU" if preset == presets.for_own_images("cpu") else "an accelerator"


def describe_choices(command: Command, config: Config, preset: str) -> str:
  """A line on what the command leaves open, or nothing. A name that was misspelt begins a run, too.

  preset: of `resolve_for_device`.
  """
  if preset:
    height, width = config_lib.height_and_width(config.data.image_size)
    size = f"{height}x{width}" if config.data.image_size else "of any size"
    return (
      f"own images, chosen for {_device(preset)}: --preset={preset} (images {size}, batches of "
      f"{config.data.batch_size}, {config.train.num_steps:,} training steps"
      f"{', mirrored at random, see --norandom_flip' if config.data.random_flip else ''}); flags win over it"
    )
  named = command.preset or command.given.get("dataset") or command.given.get("init_from")
  if command.mode == "train" and command.folder and not layout.holds_run(command.folder) and not named:
    return f"{command.folder} holds no run yet: a new one begins there, on the digits (see --dataset, --preset)"
  return ""
