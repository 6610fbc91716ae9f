"""The run `sample`: draws images from a workdir's newest checkpoint and nothing else."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax import grids
from ddpm_jax.config import Config
from ddpm_jax.diffusion.samplers import make_sampler
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.progress import Progress
from ddpm_jax.run import Run, build_run
from ddpm_jax.sampling.draw import make_draw
from ddpm_jax.storage import write_whole
from ddpm_jax.training import resume
from ddpm_jax.training.checkpoint import Checkpoints, Restored
from ddpm_jax.training.manifest import Manifest
from ddpm_jax.training.parallel import Parallel
from ddpm_jax.training.state import TrainState

_GRID_IMAGES = 256  # more than that is no picture any more


def sample(config: Config, workdir: pathlib.Path) -> None:
  """Writes `samples/samples.npz` (`images` uint8 [N, H, W, C], `settings` JSON) and `samples/samples.png`.

  Earlier draws are kept as samples.1.npz, samples.2.npz and so on.

  Raises:
    UserError: if the workdir holds no checkpoint.
  """
  options, diffusion = config.sample, config.diffusion
  if not (workdir / "checkpoints").is_dir():
    raise UserError(f"workdir: {workdir} holds no checkpoint yet; train first")
  parallel = Parallel(config.train.parallel)
  run, (step, state, _, damaged) = _restore(config, workdir, parallel)
  is_first = jax.process_index() == 0
  if is_first:
    for number, reason in damaged.items():
      print(f"warning: checkpoint {number} is damaged: {reason}; drawing from {step}", file=sys.stderr, flush=True)

  schedule = run.schedule
  table = make_sampler(
    schedule, options.sampler, num_steps=options.sampling_steps, eta=options.eta, variance=diffusion.variance
  )
  draw = make_draw(
    run.network,
    schedule,
    table,
    prediction=diffusion.prediction,
    image_shape=run.image_shape,
    parallel=parallel,
    seed=options.sample_seed,
    stream="sample",
  )
  params = state.ema_params if options.sample_weights == "ema" else state.params
  progress = Progress("image", total=options.num_samples, quiet=not is_first)
  progress.say(
    f"drawing {options.num_samples} images {run.image_shape[0]}x{run.image_shape[1]}x{run.image_shape[2]} "
    f"with the {options.sample_weights} weights after update {step}: {options.sampler}, {len(table.t)} "
    f"network evaluations each, {min(options.sample_batch_size, options.num_samples)} images at once"
  )
  drawn, began = [], time.perf_counter()
  size = min(options.sample_batch_size, options.num_samples)
  for first in range(0, options.num_samples, size):
    index = np.arange(first, first + size)  # a full batch each time: one compilation
    drawn.append(draw(params, index)[: options.num_samples - first])
    done = sum(map(len, drawn))
    progress.advance(len(drawn[-1]))
    progress.report(done, {}, done / (time.perf_counter() - began))
  progress.close()
  if not is_first:
    return
  images = np.concatenate(drawn)
  settings = {field.name: value for section, field, value in config_lib.knobs(config) if section == "sample"}
  settings |= {"checkpoint": step, "variance": diffusion.variance}
  folder = workdir / "samples"
  _write(folder, images, settings)
  shown = "" if len(images) <= _GRID_IMAGES else f" (the first {_GRID_IMAGES})"
  print(f"done: {folder / 'samples.npz'} and {folder / 'samples.png'}{shown}")


def _restore(config: Config, workdir: pathlib.Path, parallel: Parallel) -> tuple[Run, Restored]:
  """The newest intact checkpoint of a workdir, and the run that it is of. Raises UserError if there is none."""
  runs = {}

  def expect(manifest: Manifest) -> TrainState:
    resume.check_config(manifest, config, workdir)
    run = runs[manifest["step"]] = build_run(config, tuple(manifest["image_shape"]), parallel)
    return run.abstract_state

  with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
    restored = checkpoints.restore(expect, on_corrupt=config.train.on_corrupt)
  if restored is None:
    raise UserError(f"workdir: {workdir} holds no checkpoint yet; train first")
  return runs[restored.step], restored


def _write(folder: pathlib.Path, images: np.ndarray, settings: dict[str, Any]) -> None:
  """Puts a draw where the earlier one was, which gets another name; or leaves the folder as it was. Raises RunError."""
  archive = io.BytesIO()
  np.savez_compressed(archive, images=images, settings=json.dumps(settings))
  new = {suffix: folder / f".samples{suffix}.new" for suffix in (".npz", ".png")}
  try:
    folder.mkdir(exist_ok=True)
    write_whole(new[".npz"], archive.getvalue())
    grids.save_png(new[".png"], grids.image_grid(images[:_GRID_IMAGES]))
    _set_aside(folder)
    for suffix, file in new.items():
      file.replace(folder / f"samples{suffix}")
  except OSError as error:
    for file in new.values():
      with contextlib.suppress(OSError):
        file.unlink()
    raise RunError(
      f"workdir: cannot write the samples into {folder} ({error.strerror}); make room and draw again"
    ) from error


def _set_aside(folder: pathlib.Path) -> None:
  """Renames an earlier draw: nothing that exists is overwritten."""
  number = 1
  while any((folder / f"samples.{number}{suffix}").exists() for suffix in (".npz", ".png")):
    number += 1
  for suffix in (".npz", ".png"):
    if (folder / f"samples{suffix}").exists():
      (folder / f"samples{suffix}").rename(folder / f"samples.{number}{suffix}")
