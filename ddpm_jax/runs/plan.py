"""The run `plan`: compiles the training step for hardware that is not here, and says what it needs and could do."""

from __future__ import annotations

import contextlib
import math
import pathlib
import threading
import time
from collections.abc import Iterator

import jax

from ddpm_jax import config as config_lib
from ddpm_jax import flags, presets
from ddpm_jax.config import Config
from ddpm_jax.data.sources import class_count, image_shape
from ddpm_jax.devices import make_mesh
from ddpm_jax.errors import UserError
from ddpm_jax.first_stage.latents import FixedStage, Latents
from ddpm_jax.models.build import AutoencoderNetwork, build_autoencoder, lpips
from ddpm_jax.models.lpips import abstract_params as lpips_shapes
from ddpm_jax.plan import report, topology
from ddpm_jax.plan.batches import COMPILATIONS, Largest, largest
from ddpm_jax.plan.compiling import CompiledStep, compile_step
from ddpm_jax.plan.hardware import peaks
from ddpm_jax.plan.roofline import roofline
from ddpm_jax.plan.topology import OutOfMemory, Topology
from ddpm_jax.runtime import console
from ddpm_jax.training.autoencoder import Perceptual
from ddpm_jax.training.setup import Run, build_run
from ddpm_jax.weights import first_stage as stages
from ddpm_jax.weights.stage_folder import abstract_params, as_used, is_kept, read_kept
from ddpm_jax.workdir import layout

_TICK_S = 30.0  # between two signs of life of a compilation
_SLOW_S = 300.0  # after which there is a word on how to compile faster


def plan(config: Config, folder: pathlib.Path | None = None) -> None:
  """Prints the plan of a run on `config.plan.topology`. Trains nothing and writes no file.

  Args:
    config: of the run.
    folder: its workdir, where the command names one; may not exist.

  Raises:
    UserError: an unknown topology, libtpu is missing, or the command does not fit the devices or the data.
  """
  jax.config.update("jax_platforms", "cpu")  # other devices of this machine are left to those who use them
  target = topology.find(config.plan.topology)
  mesh = make_mesh(config.train.parallel, target.devices, matmul_precision=config.model.matmul_precision)
  mesh.check_batch(config.data.batch_size, config.train.grad_accum_steps)
  shape = image_shape(config.data)
  if config_lib.reads_classes(config) and not config.model.num_classes:
    config = config_lib.override(config, {"num_classes": class_count(config.data)})
  run = build_run(config, shape, mesh, stage=_first_stage(config, shape, folder)).with_perceptual(_perceptual(config))
  best = peaks(target)
  console.say(report.headline(run, target, best))
  size = config.data.batch_size
  step = _compile(run, size)
  if isinstance(step, OutOfMemory):
    console.say(report.refusal(step))
  else:
    times = roofline(step, best) if best else None
    console.say(report.memory_table(step.memory, target))
    console.say(report.step_table(step, best, times))
    if times:
      console.say(report.bound(run, step, times))
  if target.memory is not None:
    _say_largest(run, target, target.memory, step)


def _first_stage(
  config: Config, image_shape: tuple[int, int, int], folder: pathlib.Path | None = None
) -> FixedStage | None:
  """The first stage of a latent model, as shapes; None for pixels.

  It is the copy that a workdir keeps, or what --first_stage names. Where nothing is there yet, and its last name is a
  preset of a first stage, it is that of the preset: so the presets of latent models name theirs.

  Raises:
    UserError: there is nothing, and no such preset, or it is not of such images.
  """
  path = config.diffusion.first_stage
  if not path:
    return None
  kept = folder if folder and is_kept(folder) and path == layout.load_config(folder).diffusion.first_stage else None
  if kept or pathlib.Path(path).exists():
    stage = read_kept(kept) if kept else stages.read_named(path, config)
    network = stages.fixed_for(stage, image_shape, config.data.dataset).latents.network
  else:
    network = _not_trained_yet(path, image_shape)
  return FixedStage(Latents(network, image_shape), abstract_params(network, image_shape), "")


def _not_trained_yet(path: str, image_shape: tuple[int, int, int]) -> AutoencoderNetwork:
  """The network of the preset that a path ends in. Raises UserError if it is none of a first stage."""
  known = {name: flags.of_preset(name) for name in presets.names()}
  known = {name: options for name, options in known.items() if options.get("stage") == "autoencoder"}
  name = pathlib.PurePath(path).name
  if name not in known:
    raise UserError(
      f"first_stage: there is nothing at {path}; to plan with a first stage that is not trained yet, end the path in "
      f"the name of its preset: {', '.join(known)}"
    )
  theirs = config_lib.override(Config(), known[name])
  console.note(f"there is no {path} yet: planned with the first stage of --preset={name}")
  return as_used(build_autoencoder(theirs.model, theirs.autoencoder, image_shape))


def _perceptual(config: Config) -> Perceptual | None:
  """The distance that an autoencoder is trained with, as shapes; None for none."""
  match config.autoencoder.perceptual:
    case "lpips":
      return Perceptual(lpips, lpips_shapes(), "")
    case "features":
      console.note("--perceptual=features is left out: its network is that of the images, which are not looked at")
  return None


def _say_largest(run: Run, target: Topology, limit: int, step: CompiledStep | OutOfMemory) -> None:
  devices, parts = len(target.devices), run.config.train.grad_accum_steps
  known = {run.config.data.batch_size: _bytes_of(step)}
  fixed = 0.0 if isinstance(step, OutOfMemory) else float(step.memory.fixed)

  def memory(size: int) -> float:
    known[size] = _bytes_of(_compile(run, size))
    return known[size]

  console.note(f"the largest batch that fits takes up to {COMPILATIONS} compilations more; Ctrl-C leaves it out")
  found: Largest = largest(dict(known), fixed, memory, unit=devices * parts, limit=limit)
  console.say(report.largest_text(found, devices, known, limit))


def _bytes_of(step: CompiledStep | OutOfMemory) -> float:
  """On each device; infinity where the compiler refuses and does not say how many."""
  if isinstance(step, CompiledStep):
    return float(step.memory.total)
  return math.inf if step.needed is None else float(step.needed)


def _compile(run: Run, size: int) -> CompiledStep | OutOfMemory:
  """Compiles, and says so where a person waits: this takes minutes for a large network."""
  console.note(f"compiling the step for a batch of {size} ...", end=" ")
  start = time.monotonic()
  with _signs_of_life(start):
    step = compile_step(run, size)
  console.note(f"{time.monotonic() - start:.0f} s")
  return step


@contextlib.contextmanager
def _signs_of_life(start: float) -> Iterator[None]:
  """Adds to the line, now and then, for how long it has been."""
  over = threading.Event()

  def tick() -> None:
    hint = "" if report.effort() else f"({report.LESS} before the command compiles in less time) ... "
    while not over.wait(_TICK_S):
      passed = time.monotonic() - start
      console.note(f"{passed:.0f} s ... {hint if passed > _SLOW_S else ''}", end="")
      hint = "" if passed > _SLOW_S else hint

  thread = threading.Thread(target=tick, name="compiling", daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
