"""The workdir of a training run: taken before anything is written, described on the terminal, and finished."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import shlex

import jax
from jax.experimental import multihost_utils

from ddpm_jax import config as config_lib
from ddpm_jax.checkpoint import resume
from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.checkpoint.resume import Start
from ddpm_jax.config import Config, reset_weight_selectors
from ddpm_jax.data import summary
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import UserError
from ddpm_jax.first_stage.latents import Latents
from ddpm_jax.models.build import num_params
from ddpm_jax.runs.reports import write_pages
from ddpm_jax.runtime import console, numerics, paths
from ddpm_jax.runtime.distributed import Job
from ddpm_jax.sampling.draw import QUICK
from ddpm_jax.training.optimizer import decay_start
from ddpm_jax.training.setup import Run, copies_warning, noise_warning
from ddpm_jax.weights import first_stage, stage_folder
from ddpm_jax.workdir import layout
from ddpm_jax.workdir.lock import Lock


def take(run: Run, workdir: pathlib.Path, job: Job, cleanup: contextlib.ExitStack, note: str) -> Lock | None:
  """Makes the workdir of a new run, or checks that it is this run's, and locks it. All processes must call it.

  Args:
    run: the run.
    workdir: its folder.
    job: the processes that take part.
    cleanup: releases the lock.
    note: a line for the user, printed once the workdir is taken.

  Returns:
    The lock, in the first process; None in the others.

  Raises:
    UserError: if another process trains there, it holds another run, has no room, or is not shared by all processes.
  """
  lock, exists = None, layout.holds_run(workdir)
  if job.process == 0:
    if not exists:
      check_space(run, workdir, 0)
    lock = cleanup.enter_context(contextlib.closing(Lock(workdir)))
    exists = layout.check(workdir, run.config)  # only now, as another process may have been faster
    if not exists:
      layout.create(workdir, run.config, run.own)
    if note:
      console.say(note)
  multihost_utils.sync_global_devices("the workdir exists")
  try:
    resume.check_shared(workdir)
  except UserError:
    if lock and not exists:
      layout.discard(workdir)
    raise
  return lock


def set_aside_damaged(checkpoints: Checkpoints, start: Start, *, quiet: bool) -> None:
  """Moves damaged checkpoints to `damaged/`, and says so. All processes must call it."""
  for step, reason in start.damaged.items():
    moved = checkpoints.set_aside(step)
    if not quiet:
      console.warn(f"checkpoint {step} is damaged: {reason}; moved to {moved}")


def warn(run: Run, source: Source) -> None:
  """Warns of settings that are likely to disappoint."""
  if run.config.model.stage != "denoiser":
    return  # of draws
  for warning in filter(None, (noise_warning(run), copies_warning(run.config, len(source)))):
    console.warn(warning)


def renew(workdir: pathlib.Path, config: Config) -> None:
  """Writes the settings anew if they are others."""
  if config != layout.load_config(workdir):
    layout.create(workdir, config)


def finish(run: Run, workdir: pathlib.Path, last: int) -> None:
  """Writes the pages of the run, and says where its results are. `last` is the step of the last checkpoint."""
  try:
    renew(workdir, reset_weight_selectors(run.config))
    write_pages(workdir)
  except OSError as error:  # all that matters is saved
    console.warn(f"cannot write loss.png and report.html into {workdir} ({error.strerror})")
  except UserError as error:
    console.warn(f"{error}")
  console.say(_farewell(workdir, last, run.config))


def check_space(run: Run, workdir: pathlib.Path, start: int, leaving: int = 0) -> None:
  """Raises UserError if the checkpoints after step `start` will not find room. Before compression, to be sure.

  leaving: the number of those in `checkpoints/` that are about to be moved elsewhere.
  """
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.abstract_state))
  options = run.config.train
  saves = sum(
    (options.num_steps - start) // every + 1
    for every in (options.checkpoint_every, options.keep_every, options.evaluate_every)
    if every
  )
  for_good = (options.num_steps - start) // options.keep_every if options.keep_every else 0
  begin = decay_start(run.config.optimizer, options.num_steps)
  decay = begin is not None  # one more is kept, and written unless it exists
  saves += decay and begin > start
  layout.check_space(workdir, size, options.keep_checkpoints, saves, beside=decay + for_good + leaving)


def say_what(run: Run, source: Source, workdir: pathlib.Path, job: Job) -> None:
  """Says, in the first process, what is trained, on which images and machine."""
  height, width, channels = run.image_shape
  stage = run.config.model.stage
  usual = "U-Net" if stage == "denoiser" else stage
  networks, params = (run.own or {}).get("network", usual), run.abstract_state.params
  if run.pair and run.pair.discriminator:
    beside = f", discriminator of {num_params(params['discriminator']):,}"
    params = params["autoencoder"]
  else:
    beside = ""
  if job.process == 0:
    console.say(
      f"ddpm_jax: {len(source)} images {height}x{width}x{channels} of {source.name}, {networks} of "
      f"{num_params(params):,} parameters{beside}, {numerics.machine()} ({run.mesh.strategy})\n"
      f"{_latents(run, workdir)}{job.text}\n{summary.two_lines(source, run.config.data)}"
    )


def _latents(run: Run, workdir: pathlib.Path) -> str:
  """A line on the first stage of a latent run; '' for pixels."""
  if not isinstance(run.first_stage, Latents):
    return ""
  of = filter(None, (run.first_stage.facts().text, first_stage.taken_from(run.config, workdir)))
  return f"latents: {', '.join(of)} (kept in {workdir / stage_folder.FOLDER})\n"


def say_start(
  run: Run, workdir: pathlib.Path, start: int, job: Job, *, finished: bool, moved: pathlib.Path | None
) -> None:
  """Says, in the first process, where the run begins or goes on.

  start: the number of training steps made.
  moved: where the end of a shorter run is now, from which this one does not go on.
  """
  if job.process == 0:
    console.say(_start(run, workdir, start, finished=finished, moved=moved))


def _start(run: Run, workdir: pathlib.Path, start: int, *, finished: bool, moved: pathlib.Path | None) -> str:
  total, what = run.config.train.num_steps, ""
  if finished:
    return f"{workdir} already holds all {total} steps: nothing to do; raise --num_steps to train longer"
  if moved:
    what += (
      f"going back to step {start}, after which the learning rate decayed toward another --num_steps; later "
      f"checkpoints are kept in {moved}, which is a workdir\n"
    )
  if start and run.lr_restart == start:
    kind = run.config.optimizer.lr_schedule
    what += f"the {kind} learning rate restarts for the {total - start} training steps from here to {total}\n"
  if start:
    return what + f"resuming {workdir} after step {start} of {total}; compiling"
  first = f" from the weights of {run.config.exchange.init_from}" if run.config.exchange.init_from else ""
  return what + f"a new run: {total} training steps{first} in {workdir}; compiling"


# What of the data a model of latents must have in common with its first stage, beside options of reading.
_OF_IMAGES = ("dataset", "split", "only", "image_field", "image_size", "resize", "crop", "resample")


def _farewell(workdir: pathlib.Path, step: int, config: Config) -> str:
  total, stage = config.train.num_steps, config.model.stage
  done, quick = step >= total, min(QUICK, config.diffusion.num_timesteps)
  end = f"done: {step} training steps" if done else f"stopped on request after step {step} of {total}, saved"
  own = layout.own_parts(workdir)
  same = "ddpm_jax.train with the same arguments" if own else paths.command(f"--workdir={workdir}")
  again = "" if done else f"  to go on      {same}\n"
  metrics = f"{workdir / 'metrics.jsonl'}, loss.png and report.html beside it"
  if importlib.util.find_spec("tensorboard") and (workdir / "tensorboard").is_dir():
    metrics += f", and {shlex.join(['tensorboard', f'--logdir={workdir}'])}"
  draw = paths.command("--mode=sample", "--sampler=dpmpp", f"--sampling_steps={quick}", f"--workdir={workdir}")
  if "network" in own:
    draw = f"ddpm_jax.load({str(workdir)!r}, network={own['network']}).sample(64, sampler='dpmpp', steps={quick})"
  checkpoint = f"{end}\n  checkpoint    {workdir / 'checkpoints' / str(step)}\n"
  if stage == "autoencoder":
    own_images = config.data.dataset.startswith("own:")  # which the command does not have
    measure = "" if own_images else f"  measure       {paths.command('--mode=evaluate', f'--workdir={workdir}')}\n"
    options = config_lib.options(config)
    data = [
      f"--{field.name}={config_lib.flag_text(value)}"
      for _, field, value in options
      if field.name in _OF_IMAGES and value != field.default
    ]
    diffuse = paths.command(f"--first_stage={workdir}", *data, "--workdir=MODEL")
    if own_images:
      diffuse = f"ddpm_jax.train with the same images and first_stage={str(workdir)!r}"
    return f"""{checkpoint}  images        {workdir / "samples"}
  metrics       {metrics}
{again}{measure}  diffuse       {diffuse}"""
  if stage == "classifier":
    guide = paths.command("--mode=sample", f"--classifier={workdir}", "--workdir=MODEL")
    return f"{checkpoint}  metrics       {metrics}\n{again}  guide draws   {guide}"
  return f"""{checkpoint}  samples       {workdir / "samples"}
  metrics       {metrics}
{again}  draw images   {draw}"""
