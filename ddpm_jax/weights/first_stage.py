"""Where the first stage of a latent model comes from, --first_stage=PATH, and how it is settled when a run begins.

PATH is the workdir of a run of --stage=autoencoder, that of a latent model, a folder of diffusers, or a safetensors
file. It is read when a run begins; from then on the copy in the workdir counts, see `stage_folder`.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config, SampleConfig
from ddpm_jax.data.sources import Source
from ddpm_jax.devices.hosts import all_gather_host, gather
from ddpm_jax.errors import UserError
from ddpm_jax.first_stage import statistics
from ddpm_jax.first_stage.latents import FixedStage
from ddpm_jax.models.build import autoencoder_settings, build_autoencoder
from ddpm_jax.runtime import console, paths
from ddpm_jax.runtime.progress import counted
from ddpm_jax.training.setup import Run, with_first_stage
from ddpm_jax.weights import diffusers, file
from ddpm_jax.weights.autoencoders import read_autoencoder
from ddpm_jax.weights.load import load_weights
from ddpm_jax.weights.stage_folder import Autoencoder, ImageShape, is_kept, keep, read_kept
from ddpm_jax.workdir import layout
from ddpm_jax.workdir.arrays import UnusableError, load_arrays, save_arrays

_VERSION = 1  # of the statistics; to be counted up when something else is computed


def find(config: Config, workdir: pathlib.Path, *, given: bool = False) -> Autoencoder | None:
  """The first stage of a run: the copy in its workdir, or what --first_stage names; None for pixels.

  All processes must call it.

  Args:
    config: of the run.
    workdir: its folder; may not exist yet.
    given: whether the command names the first stage.

  Raises:
    UserError: there is none, or the command names another than the run began with.
  """
  path = config.diffusion.first_stage
  if not path:
    return None
  if not is_kept(workdir):
    if layout.has_checkpoints(workdir, ["checkpoints"]):
      return read_kept(workdir)  # which says what is missing
    named = read_named(path, config)
    # The statistics are of the images of a run; weights that go on being trained go on with theirs.
    return named if path == config.exchange.init_from else named._replace(mean=None, std=None)
  kept = read_kept(workdir)
  other = path != layout.load_config(workdir).diffusion.first_stage
  if other or (given and pathlib.Path(path).exists()):
    named = read_named(path, config)
    if named.sha256 != kept.sha256:
      raise UserError(
        f"first_stage: {path} holds another first stage, {named.sha256[:12]}, than the run in {workdir} began with, "
        f"{kept.sha256[:12]}; leave --first_stage out to go on with that, or use another --workdir"
      )
  return kept


def read_named(path: str, config: Config) -> Autoencoder:
  """What PATH holds; the same on all processes, which must all call it. Raises UserError."""
  try:
    found = _read(pathlib.Path(path), config)
  except UserError as error:
    raise UserError(f"first_stage: {path}: {str(error).removeprefix('first_stage: ')}") from None
  except OSError as error:
    raise UserError(f"first_stage: {error.filename or path} cannot be read ({error.strerror}); name another") from error
  digest = np.frombuffer(bytes.fromhex(found.sha256), np.uint8)
  if np.any(all_gather_host(digest) != digest[None]):
    raise UserError(f"first_stage: {path} does not hold the same weights for all processes; give every host a copy")
  return found


def _read(place: pathlib.Path, config: Config) -> Autoencoder:
  if not place.exists():
    raise UserError("there is nothing; train one with --stage=autoencoder, and name its workdir")
  if not layout.holds_run(place) or diffusers.is_folder_of_diffusers(place):
    return _of_others(place, config)
  stored = layout.load_config(place)
  if stored.diffusion.first_stage:
    return read_kept(place)
  if stored.model.stage != "autoencoder":
    kind = "classifier" if stored.model.stage == "classifier" else "model of pixels"
    raise UserError(f"it holds a {kind}; name the workdir of a run of --stage=autoencoder")
  newest = {name: getattr(SampleConfig(), name) for name in config_lib.NAMES_WEIGHTS}
  weights = load_weights(config_lib.override(stored, newest | {"parallel": config.train.parallel}), place)
  params = jax.tree.map(gather, weights.params["autoencoder"])
  shape = weights.run.image_shape
  return Autoencoder(build_autoencoder(stored.model, stored.autoencoder, shape), params, shape)


def _of_others(place: pathlib.Path, config: Config) -> Autoencoder:
  """That of diffusers, or of a safetensors file, for the images of the run."""
  if not place.is_dir() and file.holds_model(place):
    return file.read_first_stage(place)
  size = config_lib.height_and_width(config.data.image_size) if config.data.image_size else None
  found = read_autoencoder(place, size)
  if jax.process_index() == 0:
    for note in found.notes:
      console.warn(f"first_stage: {place}: {note}")
  return Autoencoder(found.network, found.params, found.image_shape, found.mean, found.std)


def fixed_for(autoencoder: Autoencoder, source_shape: ImageShape, name: str) -> FixedStage:
  """The first stage for images of that shape.

  Args:
    autoencoder: what was read.
    source_shape: H, W, C of the images.
    name: of the data set, for people.

  Raises:
    UserError: it was trained on others, or its levels do not divide them.
  """
  theirs = autoencoder.image_shape
  channels = autoencoder.network.model.out_channels
  if (theirs or (*source_shape[:2], channels)) != source_shape:
    of = "x".join(map(str, theirs)) if theirs else f"{channels} channels"
    size = (
      f", or use --image_size={config_lib.image_size(*theirs[:2])}" if theirs and theirs[2] == source_shape[2] else ""
    )
    raise UserError(
      f"first_stage: it is of images of {of}, those of {name} are {'x'.join(map(str, source_shape))}; name one that "
      f"was trained on such{size}"
    )
  return autoencoder.fixed(source_shape)


def settle(
  run: Run, stage: FixedStage, workdir: pathlib.Path, source: Source, *, beat: Callable[[str], None] = lambda what: None
) -> Run:
  """The run with the statistics of its latents: those that the workdir keeps, or measured now and kept.

  They are measured once for each data set and first stage, and kept in the user's cache. All processes must call it.

  Args:
    run: whose first stage may have no statistics yet.
    stage: its first stage.
    workdir: its folder, which exists.
    source: the images of the training.
    beat: called now and then with what was done.

  Raises:
    RunError: if they cannot be written.
  """
  if is_kept(workdir):
    return run
  flips, first = run.config.data.random_flip, jax.process_index() == 0
  if "std" not in stage.params:
    task = json.dumps(
      [_VERSION, source.fingerprint, len(source), stage.sha256, autoencoder_settings(stage.latents.network), flips],
      sort_keys=True,
    )
    mean, std = _measured(run, stage, source, task, beat)
    stage = stage._replace(params=stage.params | {"mean": mean, "std": std})
    run = with_first_stage(run, stage)
  if first:
    keep(workdir, stage, {"dataset": source.name, "images": len(source), "random_flip": flips})
  return run


def _measured(
  run: Run, stage: FixedStage, source: Source, task: str, beat: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation of each channel, float32 [z] each, of the cache of process 0, or computed by all."""
  first, cache = jax.process_index() == 0, paths.cache_folder()
  path = cache and cache / "first_stage" / f"{hashlib.sha256(task.encode()).hexdigest()[:32]}.safetensors"
  found = _from_cache(path, task) if first and path else None
  if not all_gather_host(np.asarray(found is not None))[0]:
    with counted("image", total=len(source), quiet=not first) as (done, say):
      say(f"measuring the latents of {len(source)} images")

      def both(number: int) -> None:
        done(number)
        beat(f"latents of image {number}")

      found = statistics.measure(
        stage.latents, run.frozen, source, run.mesh, flips=run.config.data.random_flip, done=both
      )
    if first and path:
      try:
        save_arrays(path, {"mean": found[0], "std": found[1]}, {"of": task})
      except OSError as error:
        console.note(f"{path} cannot be written ({error.strerror}); the latents will be measured anew next time")
  (*_, z) = stage.latents.latent_shape
  own = np.stack(found) if found else np.zeros((2, z), np.float32)
  mean, std = all_gather_host(own)[0]  # to the bit those of process 0
  return mean, std


def _from_cache(path: pathlib.Path, task: str) -> tuple[np.ndarray, np.ndarray] | None:
  try:
    arrays, facts = load_arrays(path)
  except FileNotFoundError:
    return None
  except UnusableError as error:
    console.note(f"{path} cannot be used ({error}); the latents are measured anew")
    return None
  return (arrays["mean"], arrays["std"]) if facts.get("of") == task else None
