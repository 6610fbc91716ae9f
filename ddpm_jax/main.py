"""Trains a denoising diffusion model, draws images from one, measures it, exports it, or plans its training.

  python -m ddpm_jax.main --workdir=runs/digits
  python -m ddpm_jax.main --workdir=runs/cifar10 --flagfile=experiments/cifar10.flags
  python -m ddpm_jax.main --workdir=runs/cifar10 --mode=sample
  python -m ddpm_jax.main --workdir=runs/cifar10 --mode=evaluate
  python -m ddpm_jax.main --workdir=runs/cifar10 --mode=export --export_format=diffusers --export_dir=exported
  python -m ddpm_jax.main --flagfile=experiments/cifar10.flags --mode=plan --topology=v5e:4x4

The same command goes on where it stopped, and so does --workdir alone: flags win over the settings of the workdir.
Installed, it is also the command `ddpm`: `ddpm sample ...` is --mode=sample; `ddpm compare RUN RUN` makes one page of
several runs, `ddpm prepare --dataset=NAME` a data set of TFDS and `ddpm pack DATASET zip:PATH` a zip of any, which
`ddpm inspect DATASET` shows.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from absl import app
from absl import flags as absl_flags

import ddpm_jax
from ddpm_jax import flags, resolve
from ddpm_jax.config import Config
from ddpm_jax.errors import NonFiniteError, RunError, UserError, root_cause
from ddpm_jax.resolve import Command
from ddpm_jax.runtime import compilation, console, hugepages, paths, terminal, watchdog
from ddpm_jax.runtime.stop import StopRequest

if TYPE_CHECKING:
  from ddpm_jax.runtime.distributed import Job


_FAREWELL_S = 30.0  # from the line that says why a process ends to its end, at the latest


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
      given = flags.given()
      folder = flags.workdir() if resolve.needs_workdir(mode, given) or flags.has_workdir() else None
      command = Command(mode, given, flags.preset(), folder)
      compilation.set_xla_flags()
      config = resolve.resolve_before_jax(command)
      if mode == "train":
        stop.exit_code = config.train.stop_exit_code
      from ddpm_jax.runtime import (
        distributed,
        numerics,  # with JAX: after what can be said without it
      )

      numerics.check_options(config.model.matmul_precision)
      compilation.enable_compilation_cache(
        "off" if mode == "plan" else config.train.compilation_cache
      )  # writes no file
      together = "off" if mode in ("plan", "export") else config.train.distributed
      job = distributed.initialize(together, config.train.heartbeat_timeout)
      config, preset = resolve.resolve_for_device(command, config)
      chosen = resolve.describe_choices(command, config, preset)
    except (UserError, RunError) as error:
      return _exit_code(error)
    stop.reinstall()
    sys.excepthook = functools.partial(_leave_with_traceback, job, sys.excepthook)
    try:
      code = _run(command, config, stop, job, chosen)
    except (UserError, RunError, NonFiniteError) as error:
      if preset and isinstance(error, UserError) and str(error).partition(":")[0] in flags.of_preset(preset):
        error = resolve.with_preset(error, preset)
      elif isinstance(error, UserError):
        error = resolve.with_named_preset(error, command)
      job.wait_for_verdict(root_cause(error))
      code = _exit_code(error)
      job.leave(code)
    else:
      job.leave(0)  # whatever the code is: after a stop, too, all processes have come to the same end
  return code


def _run(command: Command, config: Config, stop: StopRequest, job: Job, chosen: str) -> int:
  """Returns the exit code."""
  folder = command.folder
  match command.mode:
    case "plan":
      from ddpm_jax.runs import plan

      if chosen:
        console.say(chosen)
      plan.plan(config, folder)
      return 0
    case "export":
      from ddpm_jax.runs import export

      export.export(config, folder)
      return 0
    case "evaluate":
      from ddpm_jax.runs import evaluate

      evaluate.evaluate(config, folder, command.given)
      return 0
  assert folder  # the others do not go without
  match command.mode:
    case "train":
      from ddpm_jax.runs import train

      if job.processes > 1:
        stop.defer()  # the others wait for this one: all stop together, after a training step
      invocation = train.Invocation(stop, job, chosen, frozenset(command.given))
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


def start() -> NoReturn:
  """The whole program. Ends the process with the exit code."""
  hugepages.restart_with_huge_pages("ddpm_jax.main")
  compilation.relax_gc()
  flags.define()
  for flag in absl_flags.FLAGS.get_flags_for_module(flags.__name__):  # what --help lists, after this docstring
    absl_flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  sys.modules["__main__"].__doc__ = str(__doc__).replace("python -m ddpm_jax.main", paths.command())
  sys.exit(app.run(_command, flags_parser=_parse_flags))


if __name__ == "__main__":
  console.protect_streams()
  start()
