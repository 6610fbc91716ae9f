"""Trains a denoising diffusion model, draws images from one, measures it, exports it, or plans its training.

  python -m ddpm_jax.main --workdir=runs/digits
  python -m ddpm_jax.main --workdir=runs/cifar10 --flagfile=experiments/cifar10.flags
  python -m ddpm_jax.main --workdir=runs/cifar10 --mode=sample
  python -m ddpm_jax.main --workdir=runs/cifar10 --mode=evaluate
  python -m ddpm_jax.main --workdir=runs/cifar10 --mode=export --export_format=diffusers --export_dir=exported
  python -m ddpm_jax.main --flagfile=experiments/cifar10.flags --mode=plan --topology=v5e:4x4

The same command goes on where it stopped, and so does --workdir alone: flags win over the settings of the workdir.
"""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
import platform
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from absl import app
from absl import flags as absl_flags

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax import flags, presets
from ddpm_jax.config import Config
from ddpm_jax.errors import NonFiniteError, RunError, UserError, root_cause
from ddpm_jax.runtime import compilation, console, hugepages, terminal, watchdog
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.workdir import layout

if TYPE_CHECKING:
  from ddpm_jax.runtime.distributed import Job


_FAREWELL_S = 30.0  # from the line that says why a process ends to its end, at the latest


def resolve_config(mode: str, given: dict, folder: pathlib.Path | None) -> Config:
  """The run that a command means: its flags over the settings of the workdir, or over the defaults if it holds no run.

  With --init_from, what comes with the weights lies between the two. A plan may change everything, as it trains
  nothing, also by --init_from, and needs no workdir.

  Raises:
    UserError: if a flag would change what the workdir was trained with, or --init_from cannot be read.
  """
  run = folder if folder is not None and layout.holds_run(folder) else None
  if run and given.get("attention_resolutions") == config_lib.AUTO_ATTENTION:
    given = {name: value for name, value in given.items() if name != "attention_resolutions"}  # it is settled there
  defaults = _stored(run) if run and mode in ("train", "plan") else Config()
  if given.get("init_from"):
    from ddpm_jax.weights import initial  # with JAX

    given = given | {"init_from": initial.absolute(given["init_from"])}
    defaults = initial.beginning(given["init_from"], folder, defaults)
  if mode != "evaluate" and given.get("write_reference"):
    raise UserError("write_reference: is for --mode=evaluate; add that")
  if mode == "train" and run and "writers" not in given:
    before = layout.load_config(run).train.writers
    if ":" in before:
      console.warn(f"writers: {before} names a class, which counts for the command that names it; give --writers again")
  if mode in ("train", "plan"):
    return config_lib.override(defaults, given)  # what may not change is compared when the run starts
  if mode == "export":
    _check_one_model(given, folder, run)
  if folder is not None and (run or not given.get("init_from")):
    config = _over_stored_run(mode, given, folder)
  else:
    config = config_lib.override(defaults, given)
    if folder is not None:
      layout.check(folder, config)
  if _runs_the_network(mode, config):
    config_lib.check_variance(given, config)
  return config


def trains_on_own_images(mode: str, given: dict, folder: pathlib.Path | None) -> bool:
  """Whether a command begins a run on a folder of images: if it says nothing of how, a preset does.

  Args:
    mode: of the command; a plan is made as the run would be.
    given: its flags.
    folder: of the run.
  """
  new = not (folder and layout.holds_run(folder)) and mode in ("train", "plan")
  return new and str(given.get("dataset")).startswith(config_lib.FOLDER) and not given.get("init_from")


def _runs_the_network(mode: str, config: Config) -> bool:
  """False where parameters are only written in another format."""
  return mode != "export" or config.exchange.export_format == "jax"


def _stored(folder: pathlib.Path) -> Config:
  """The settings of a workdir, as a later command takes them up."""
  stored = config_lib.for_a_later_command(layout.load_config(folder))
  return config_lib.beyond_init_from(stored) if layout.has_checkpoints(folder) else stored


def _over_stored_run(mode: str, given: dict, folder: pathlib.Path) -> Config:
  stored = _stored(folder)
  config = config_lib.override(stored, given)
  for name, old, new in layout.changed(folder, stored, config, once_trained=_runs_the_network(mode, config)):
    raise UserError(
      f"{name}: {layout.history(folder, stored)} {config_lib.flag_text(old)!r}, not "
      f"{config_lib.flag_text(new)!r}; leave --{name} out"
    )
  return config


def _check_one_model(given: dict, folder: pathlib.Path | None, run: pathlib.Path | None) -> None:
  """Raises UserError unless an export is of a run, with what it began with or not, or of weights of elsewhere."""
  path = given.get("init_from")
  began_with_it = path and run and layout.load_config(run).exchange.init_from == path
  if not began_with_it and (folder is None) == (not path):
    raise UserError("workdir: name either a run to export, --workdir, or weights of elsewhere, --init_from")


def _needs_workdir(mode: str) -> bool:
  """Whether there is nothing to be done without one. Statistics of a data set are of no run."""
  return mode not in ("plan", "export") and not (mode == "evaluate" and "write_reference" in flags.given())


def main(argv: Sequence[str]) -> int:
  """Runs the mode that the flags name. Returns the exit code."""
  mode = absl_flags.FLAGS.mode
  # Before training has something to save, nothing is lost by a stop: the same command does the same again.
  with StopRequest(exit_code=absl_flags.FLAGS.stop_exit_code if mode == "train" else None) as stop:
    try:
      if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value")
      if not absl_flags.FLAGS["verbosity"].present:
        terminal.quiet()
      folder = flags.workdir() if _needs_workdir(mode) or flags.has_workdir() else None
      compilation.set_xla_flags()
      config = _before_jax(mode, folder)
      if mode == "train":
        stop.exit_code = config.train.stop_exit_code
      from ddpm_jax.runtime import (
        distributed,
        numerics,  # with JAX: after what can be said without it
      )

      numerics.check_options(config.model.matmul_precision)
      compilation.keep_compiled_programs("off" if mode == "plan" else config.train.compilation_cache)  # writes no file
      together = "off" if mode in ("plan", "export") else config.train.distributed
      job = distributed.initialize(together, config.train.heartbeat_timeout)
      config, preset = _for_own_images(mode, config, folder)
      chosen = _choices(mode, config, preset, folder)
    except (UserError, RunError) as error:
      return _exit_code(error)
    stop.again()
    sys.excepthook = functools.partial(_leave_with_traceback, job, sys.excepthook)
    try:
      code = _run(mode, config, folder, stop, job, chosen)
    except (UserError, RunError, NonFiniteError) as error:
      if preset and isinstance(error, UserError) and str(error).partition(":")[0] in flags.of_preset(preset):
        error = _with_preset(error, preset)
      job.wait_for_verdict(root_cause(error))
      code = _exit_code(error)
      job.leave(code)
    else:
      job.leave(0)  # whatever the code is: after a stop, too, all processes have come to the same end
  return code


def _before_jax(mode: str, folder: pathlib.Path | None) -> Config:
  """`resolve_config` of this command; with own images by a preset whose settings go with the flags.

  Which preset it will be is for the device to say, and what is read before JAX is imported is the same in all.
  """
  given = flags.given()
  if flags.preset() is not None or not trains_on_own_images(mode, given, folder):
    return resolve_config(mode, given, folder)
  refused = []
  for name in presets.OWN_IMAGES:
    try:
      return resolve_config(mode, flags.of_preset(name) | given, folder)
    except UserError as error:
      refused.append(_with_preset(error, name))
  raise refused[0]


def _with_preset(error: UserError, name: str) -> UserError:
  """The same of a setting that the command may not have named."""
  return UserError(f"{error} (own images take --preset={name} on {_device(name)}; --preset=none leaves the defaults)")


def _device(preset: str) -> str:
  """Where own images take it."""
  return "a CPU" if preset == presets.for_own_images("cpu") else "an accelerator"


def _for_own_images(mode: str, config: Config, folder: pathlib.Path | None) -> tuple[Config, str]:
  """`config`, over the preset for this device where a new run on own images leaves it open, and that preset's name."""
  import jax

  given = flags.given()
  if flags.preset() is not None or not trains_on_own_images(mode, given, folder):
    return config, ""
  planned = "cpu" if config.plan.topology == "cpu" else "tpu"
  platform = planned if mode == "plan" else jax.default_backend()  # a plan leaves the devices of this machine alone
  name = presets.for_own_images(platform)
  try:
    return resolve_config(mode, flags.of_preset(name) | given, folder), name
  except UserError as error:
    raise _with_preset(error, name) from None


def _choices(mode: str, config: Config, preset: str, folder: pathlib.Path | None) -> str:
  """A line on what the command leaves open, or nothing. A name that was misspelt begins a run, too."""
  if preset:
    size = f"{config.data.image_size}x{config.data.image_size}" if config.data.image_size else "of any size"
    return (
      f"own images, chosen for {_device(preset)}: --preset={preset} (images {size}, batches of "
      f"{config.data.batch_size}, {config.train.num_steps:,} training steps"
      f"{', mirrored at random, see --norandom_flip' if config.data.random_flip else ''}); flags win over it"
    )
  if mode == "train" and folder and not layout.holds_run(folder) and flags.preset() is None:
    given = flags.given()
    if not (given.get("dataset") or given.get("init_from")):
      return f"{folder} holds no run yet: a new one begins there, on the digits (see --dataset, --preset)"
  return ""


def _run(mode: str, config: Config, folder: pathlib.Path | None, stop: StopRequest, job: Job, chosen: str) -> int:
  """Returns the exit code."""
  match mode:
    case "plan":
      from ddpm_jax.runs import plan

      if chosen:
        console.say(chosen)
      plan.plan(config)
      return 0
    case "export":
      from ddpm_jax.runs import export

      export.export(config, folder)
      return 0
    case "evaluate":
      from ddpm_jax.runs import evaluate

      evaluate.evaluate(config, folder, flags.given())
      return 0
  assert folder  # the others do not go without
  match mode:
    case "train":
      from ddpm_jax.runs import train

      if job.processes > 1:
        stop.defer()  # the others wait for this one: all stop together, after an update
      invocation = train.Invocation(stop, job, chosen, frozenset(flags.given()))
      finished = train.train(config, folder, invocation)
      return 0 if finished else config.train.stop_exit_code
    case "sample":
      from ddpm_jax.runs import sample

      sample.sample(config, folder)
  return 0


def _exit_code(error: UserError | RunError | NonFiniteError) -> int:
  """Tells what ended the run on purpose, in one line. Returns the exit code."""
  console.error(str(error))
  return next(code for kind, code in ((UserError, 2), (RunError, 1), (NonFiniteError, 3)) if isinstance(error, kind))


def _leave_with_traceback(job: Job, usual: Callable, kind: type, error: BaseException, trace: TracebackType) -> None:
  """What Python does last with an error that nobody expected: it may be the end of another process."""
  job.wait_for_verdict(root_cause(error))
  usual(kind, error, trace)
  job.leave(1)


def _parse_flags(argv: Sequence[str]) -> list[str]:
  try:
    left = absl_flags.FLAGS([argv[0], *flags.expand_flagfiles(argv[1:])])
  except SystemExit:
    sys.exit(0)  # --help has been printed, which absl ends with 1
  except absl_flags.Error as error:
    sys.exit(_exit_code(UserError(f"{flags.one_line(error)}; --help lists the flags")))
  except UserError as error:
    sys.exit(_exit_code(error))
  if absl_flags.FLAGS.version:
    console.say(_versions())
    sys.exit(0)
  return left


def _versions() -> str:
  """What --version prints: a line for each of this package, JAX, jaxlib and Python, which is not slow to find out."""
  installed = {name: importlib.metadata.version(name.lower()) for name in ("JAX", "jaxlib")}
  versions = {"ddpm_jax": ddpm_jax.__version__, **installed, "Python": platform.python_version()}
  return "\n".join(f"{name} {version}" for name, version in versions.items())


def _command(argv: Sequence[str]) -> int:
  """`main` of a process of its own. Its output is a log, unless it is a plan, which is a page of tables."""
  if absl_flags.FLAGS.mode != "plan":
    console.add_times()
  code = main(argv)
  if code:
    watchdog.exit_within(_FAREWELL_S, code)  # a save that was under way may hold the interpreter up for ever
  return code


if __name__ == "__main__":
  console.protect_streams()
  hugepages.restart_with_huge_pages("ddpm_jax.main")
  compilation.seldom_look_for_garbage()
  flags.define()
  absl_flags.adopt_module_key_flags(flags)  # so that --help lists them
  app.run(_command, flags_parser=_parse_flags)
