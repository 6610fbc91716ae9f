"""The weights of a workdir, for drawing and measuring: a checkpoint and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from ddpm_jax import config as config_lib
from ddpm_jax.checkpoint import resume
from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.checkpoint.manifest import Manifest
from ddpm_jax.checkpoint.saver import first_checkpoint
from ddpm_jax.config import Config
from ddpm_jax.data.sources import Source
from ddpm_jax.devices import make_mesh
from ddpm_jax.errors import UserError
from ddpm_jax.models.build import Params, TrainableNetwork
from ddpm_jax.runtime import console, paths
from ddpm_jax.training.setup import Run, build_run
from ddpm_jax.weights.stage_folder import read_kept
from ddpm_jax.workdir import layout, lock


class Weights(NamedTuple):
  """What was trained, and how far."""

  run: Run
  params: Params
  step: int  # the number of training steps; 0 if nothing was trained here
  which: str  # 'ema' or 'raw'
  identity: str  # SHA-256, see `identity_of`
  manifest: Manifest | None = None  # of the checkpoint that they were read from, if they were
  classes: tuple[str, ...] = ()  # names of the classes, as far as they are known
  guide: Weights | None = None  # what --guide_with names
  classifier: Weights | None = None  # what --classifier names

  @property
  def class_names(self) -> tuple[str, ...]:
    """Of all classes that the network knows; numbers where there is no name."""
    return self.classes + tuple(map(str, range(len(self.classes), self.run.config.model.num_classes)))

  @property
  def num_drawn(self) -> int:
    """How many of the classes are drawn where none is named: those with a name, which the others await; or all."""
    return len(self.classes) or len(self.class_names)

  @property
  def text(self) -> str:
    """What they are, for people."""
    return f"the {self.which} weights after step {self.step}" if self.step else "the weights of --init_from"


def load_weights(config: Config, workdir: pathlib.Path, network: TrainableNetwork | None = None) -> Weights:
  """The weights that `--checkpoint` and `--sample_weights` name. Says which newer checkpoints are damaged.

  Args:
    config: of the run.
    workdir: its folder.
    network: in the place of that of the settings.

  Raises:
    UserError: if the workdir holds no such checkpoint, or one of another run.
  """
  name = config.sample.checkpoint
  folder = workdir / ("best" if name == "best" else "checkpoints")
  if not folder.is_dir():
    raise UserError(_missing(name, workdir))
  mesh = make_mesh(config.train.parallel, matmul_precision=config.model.matmul_precision)
  first_stage = read_kept(workdir) if config.diffusion.first_stage else None
  with contextlib.closing(Checkpoints(folder)) as checkpoints:
    only = int(name) if name.isdecimal() else None
    candidates = checkpoints.candidates(on_corrupt=config.train.on_corrupt, only=only)
    for candidate in candidates:
      resume.check_config(candidate.manifest, config, workdir, once_trained=True)
      image_shape = tuple(candidate.manifest["image_shape"])
      run = build_run(config, image_shape, mesh, network, first_stage and first_stage.fixed(image_shape))
      resume.check_first_stage(candidate.manifest, run, workdir)
      state = candidate.restore(run.abstract_state)
      if state is not None:
        break
    else:
      raise UserError(_missing(name, workdir))
  step, manifest = candidate.step, candidate.manifest
  if jax.process_index() == 0:
    for number, reason in candidates.damaged.items():
      console.warn(f"checkpoint {number} is damaged: {reason}; using {step}")
  which = config.sample.sample_weights
  field, params = ("ema_params", state.ema["ema"]) if which == "ema" else ("params", state.params)
  leaves = {
    name.removeprefix(f"{field}/"): leaf for name, leaf in manifest["leaves"].items() if name.startswith(f"{field}/")
  }
  return Weights(run, params, step, which, identity_of(leaves), manifest, tuple(manifest.get("classes", ())))


def _missing(name: str, workdir: pathlib.Path) -> str:
  """Why a workdir has no checkpoint of this name, and what to do."""
  if name == "best":
    return f"workdir: {workdir} holds no best checkpoint yet; let training keep one with --evaluate_every"
  stored, begin = layout.load_config(workdir), paths.command(f"--workdir={workdir}")
  every, total = stored.train.checkpoint_every, stored.train.num_steps
  first = f"the first is written after step {first_checkpoint(stored)} of {total} (--checkpoint_every={every})"
  if trainer := lock.holder(workdir):
    return (
      f"workdir: {workdir} holds no checkpoint yet, as it is being trained, by {trainer}: {first}; wait for it, or "
      "stop the training, which saves one, and give its command again with a smaller --checkpoint_every"
    )
  if layout.has_begun(workdir):
    return (
      f"workdir: {workdir} holds no checkpoint: training has ended before there was one, or they were deleted; "
      f"{first}; begin anew with {begin}, with a smaller --checkpoint_every if need be"
    )
  return f"workdir: {workdir} holds no checkpoint yet, as it was never trained; train first, with {begin}"


def keep_place(config: Config, workdir: pathlib.Path, weights: Weights, source: Source) -> None:
  """Where a command says that the images of a run lie elsewhere: checks that, and keeps it in the workdir.

  Args:
    config: of the command.
    workdir: of the run.
    weights: of the run.
    source: the images that the command names.

  Raises:
    UserError: if they are other images, and --allow_data_change is not given, or the workdir cannot be written.
  """
  if not layout.holds_run(workdir):
    return
  stored = layout.load_config(workdir)
  place = {name: getattr(config.data, name) for name in ("dataset", "follow_links")}
  if config_lib.override(stored, place) == stored:
    return
  if weights.manifest and not config.data.allow_data_change:
    resume.check_images(weights.manifest, source, workdir)
  if jax.process_index() == 0 and not config.data.allow_data_change:
    layout.create(workdir, config_lib.override(stored, place))


def identity_of(leaves: Mapping[str, Mapping[str, Any]]) -> str:
  """SHA-256 over weights, from what `manifest.describe` says of them."""
  text = json.dumps({name: leaf["sha256"] for name, leaf in leaves.items()}, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
