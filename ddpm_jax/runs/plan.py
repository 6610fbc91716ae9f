"""The run `plan`: compiles the training step for hardware that is not here, and says what it needs and could do."""

from __future__ import annotations

import math
import pathlib
import time

import jax

from ddpm_jax import config as config_lib
from ddpm_jax import flags, presets
from ddpm_jax.config import Config
from ddpm_jax.data.sources import class_count, image_shape
from ddpm_jax.devices import make_mesh
from ddpm_jax.first_stage.latents import FixedStage, Latents
from ddpm_jax.models.build import build_autoencoder, lpips
from ddpm_jax.models.lpips import abstract_params as lpips_shapes
from ddpm_jax.plan import report, topology
from ddpm_jax.plan.batches import Largest, largest
from ddpm_jax.plan.compiling import CompiledStep, compile_step
from ddpm_jax.plan.hardware import peaks
from ddpm_jax.plan.roofline import roofline
from ddpm_jax.plan.topology import OutOfMemory, Topology
from ddpm_jax.runtime import console
from ddpm_jax.training.autoencoder import Perceptual
from ddpm_jax.training.setup import Run, build_run
from ddpm_jax.weights import first_stage as stages
from ddpm_jax.weights.stage_folder import abstract_params, as_used


def plan(config: Config) -> None:
  """Prints the plan of a run on `config.plan.topology`. Trains nothing and writes no file.

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
  run = build_run(config, shape, mesh, stage=_first_stage(config, shape)).with_perceptual(_perceptual(config))
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


def _first_stage(config: Config, image_shape: tuple[int, int, int]) -> FixedStage | None:
  """The first stage of a latent model, as shapes; None for pixels.

  Where nothing is at --first_stage yet, one that is called as a preset of a first stage is that of the preset: so is
  what a preset of a latent model names.

  Raises:
    UserError: there is nothing, or it is not of such images.
  """
  path = config.diffusion.first_stage
  if not path:
    return None
  name, known = pathlib.PurePath(path).name, {}
  if not pathlib.Path(path).exists() and name in presets.names():
    known = flags.of_preset(name)
  if known.get("stage") == "autoencoder":
    theirs = config_lib.override(Config(), known)
    network = as_used(build_autoencoder(theirs.model, theirs.autoencoder, image_shape))
    console.note(f"there is no {path} yet: planned with the first stage of --preset={name}")
  else:
    network = stages.fixed_for(stages.read_named(path, config), image_shape, config.data.dataset).latents.network
  return FixedStage(Latents(network, image_shape), abstract_params(network, image_shape), "")


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
  step = compile_step(run, size)
  console.note(f"{time.monotonic() - start:.0f} s")
  return step
