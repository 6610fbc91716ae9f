"""Where the first stage of a latent model comes from, --first_stage=PATH, and how it is settled when a run begins.

PATH is the workdir of a run of --stage=autoencoder, that of a latent model, a folder of diffusers, or a safetensors
file. It is read when a run begins; from then on the copy in the workdir counts, see `stage_folder`.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax.checkpoint import manifest
from ddpm_jax.config import Config, SampleConfig
from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.devices import make_mesh
from ddpm_jax.devices.hosts import all_gather_host, any_host, gather
from ddpm_jax.errors import UserError
from ddpm_jax.first_stage.latents import FixedStage
from ddpm_jax.first_stage.statistics import Encoded, cached_bytes, encoded, standard
from ddpm_jax.models.build import autoencoder_settings, build_autoencoder, config_of_autoencoder
from ddpm_jax.runtime import console, paths, terminal
from ddpm_jax.runtime.progress import counted
from ddpm_jax.training.setup import Run, build_run, with_first_stage
from ddpm_jax.weights import diffusers, file
from ddpm_jax.weights.autoencoders import read_autoencoder
from ddpm_jax.weights.load import Weights, identity_of, load_weights
from ddpm_jax.weights.stage_folder import Autoencoder, ImageShape, is_kept, keep, read_kept
from ddpm_jax.workdir import layout
from ddpm_jax.workdir.arrays import UnusableError, load_arrays, save_arrays

_VERSION = 1  # of what is cached; to be counted up when something else is computed
_MOST_ON_DISK = 2**31  # bytes of a file in the cache


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
    return read_named(path, config)._replace(mean=None, std=None)  # of the images of another run, if there are any
  kept = read_kept(workdir)
  other = path != layout.load_config(workdir).diffusion.first_stage
  # Where a host has it no longer, none reads it: those that did would wait for that one's part in it.
  if other or (given and not any_host(not pathlib.Path(path).exists())):
    named = read_named(path, config)
    if named.sha256 != kept.sha256:
      raise UserError(
        f"first_stage: {path} holds another first stage, {named.sha256[:12]}, than the run in {workdir} began with, "
        f"{kept.sha256[:12]}; leave --first_stage out to go on with that, or use another --workdir"
      )
  return kept


def taken_from(config: Config, workdir: pathlib.Path) -> str:
  """In words, where the first stage of a latent run is taken from; '' once its workdir keeps a copy."""
  if is_kept(workdir):
    return ""
  place = pathlib.Path(config.diffusion.first_stage)
  theirs = ", where it is the first stage of a latent model" if _holds_latent_run(place) else ""
  return f"taken from {place}{theirs}"


def read_named(path: str, config: Config) -> Autoencoder:
  """What PATH holds; the same on all processes, which must all call it. Raises UserError."""
  try:
    found = _read(pathlib.Path(path), config)
  except UserError as error:
    message = str(error).removeprefix("first_stage: ")
    raise UserError(f"first_stage: {message}" if path in message else f"first_stage: {path}: {message}") from None
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
  with terminal.errors_alone():
    return _of_weights(load_weights(config_lib.override(stored, newest | {"parallel": config.train.parallel}), place))


def _of_weights(weights: Weights) -> Autoencoder:
  """That of a run of --stage=autoencoder."""
  config, shape = weights.run.config, weights.run.image_shape
  params = jax.tree.map(gather, weights.params["autoencoder"])
  return Autoencoder(build_autoencoder(config.model, config.autoencoder, shape), params, shape)


def load_alone(config: Config, workdir: pathlib.Path) -> Weights:
  """The weights of a run of --stage=autoencoder, without its discriminator, to encode and decode with.

  They are the first stage of the run that is returned. There are no statistics of a data set: its latents stay as they
  are, as with mean 0 and deviation 1.

  Raises:
    UserError: if the workdir holds no such checkpoint.
  """
  weights = load_weights(config, workdir)
  found, size = _of_weights(weights), config.autoencoder.latent_channels
  as_they_are = found._replace(mean=np.zeros(size, np.float32), std=np.ones(size, np.float32))
  stage = as_they_are.fixed(weights.run.image_shape)
  run = with_first_stage(weights.run._replace(first_stage=stage.latents), stage)
  return weights._replace(run=run, params=weights.params["autoencoder"])


def load_other_alone(place: pathlib.Path, config: Config) -> Weights:
  """Likewise those of a folder of diffusers with an autoencoder and no more, or of a file that one was exported to.

  Its latents are standardised as it says: by its scaling_factor, or by the mean and deviation of its file.

  Args:
    place: of the folder, or the file.
    config: how it computes; the settings of the network are those of the place.

  Raises:
    UserError: if it cannot be read.
  """
  try:
    found = read_named(str(place), config)
  except UserError as error:
    raise UserError(str(error).removeprefix("first_stage: ")) from None
  assert found.image_shape is not None, "a folder and a file say it"
  try:
    config = config_lib.override(config, config_of_autoencoder(found.network, found.image_shape))
  except UserError as error:
    raise UserError(f"{place}: {error}") from None
  mesh = make_mesh(config.train.parallel, matmul_precision=config.model.matmul_precision)
  stage = found.fixed(found.image_shape)
  run = build_run(config, found.image_shape, mesh)._replace(first_stage=stage.latents)
  params = run.place(found.params)
  return Weights(
    with_first_stage(run, stage), params, 0, config.sample.sample_weights, identity_of(manifest.describe(params))
  )


def _holds_latent_run(place: pathlib.Path) -> bool:
  ours = layout.holds_run(place) and not diffusers.is_folder_of_diffusers(place)
  return ours and bool(layout.load_config(place).diffusion.first_stage)


def _of_others(place: pathlib.Path, config: Config) -> Autoencoder:
  """That of diffusers, or of a safetensors file, for the images of the run."""
  if not place.is_dir() and file.holds_model(place):
    return file.read_first_stage(place)
  size = config_lib.height_and_width(config.data.image_size) if config.data.image_size else None
  found = read_autoencoder(place, size)
  if jax.process_index() == 0:
    for note in found.notes:
      console.warn(f"{place}: {note}")
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
      f", or use --image_size={config_lib.image_size(*theirs[:2])}"
      if theirs and theirs[2] == source_shape[2]
      else ", or name its images with --dataset"
    )
    raise UserError(
      f"first_stage: it is of images of {of}, those of {name} are {'x'.join(map(str, source_shape))}; name one that "
      f"was trained on such{size}"
    )
  return autoencoder.fixed(source_shape)


def settle(
  run: Run,
  stage: FixedStage,
  workdir: pathlib.Path,
  source: Source,
  all_encoded: Callable[[], Encoded | None],
  *,
  beat: Callable[[str], None],
) -> Run:
  """The run with the statistics of its latents: those that the workdir keeps, or measured now and kept.

  They are measured once for each data set and first stage, and kept in the user's cache. All processes must call it.

  Args:
    run: whose first stage may have no statistics yet.
    stage: its first stage.
    workdir: its folder, which exists.
    source: the images of the training.
    all_encoded: of `encode_all`.
    beat: called now and then with what was done.

  Raises:
    RunError: if they cannot be written.
  """
  if is_kept(workdir):
    return run
  if "std" not in stage.params:
    mean, std = _statistics(run, stage, source, all_encoded, beat)
    stage = stage._replace(params=stage.params | {"mean": mean, "std": std})
    run = with_first_stage(run, stage)
  if jax.process_index() == 0:
    about = {"dataset": source.name, "images": len(source), "random_flip": run.config.data.random_flip}
    keep(workdir, stage, about)
  return run


def encode_all(run: Run, stage: FixedStage, source: Source, *, beat: Callable[[str], None]) -> Encoded | None:
  """The moments of all images, of both orientations with --random_flip; None where --cache_gib has no room for them.

  All processes must call it. One process alone keeps them in the user's cache.
  """
  data = run.config.data
  if cached_bytes(stage.latents, source, flips=data.random_flip) > data.cache_gib * 2**30:
    return None
  task = _task("moments", run, stage, source)
  path = _cache_path(task) if jax.process_count() == 1 else None
  found = _from_cache(path, task)
  if found is None:
    parts = list(_encoded(run, stage, source, beat))
    found = {"moments": np.concatenate([part.moments for part in parts])}
    found["replaced"] = np.concatenate([part.rows.replaced for part in parts])
    found["record"] = np.concatenate([part.rows.record for part in parts if part.rows.record is not None])
    _to_cache(path, task, found)
  else:
    console.say(f"latents taken from {path}")  # of one process alone
  rows = DecodedRows(found["moments"], found["replaced"], record=found["record"])
  return Encoded(found["moments"], rows)


def _statistics(
  run: Run,
  stage: FixedStage,
  source: Source,
  all_encoded: Callable[[], Encoded | None],
  beat: Callable[[str], None],
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation of each channel, float32 [z] each, of the cache of process 0, or computed by all."""
  first, task = jax.process_index() == 0, _task("statistics", run, stage, source)
  path = _cache_path(task) if first else None
  found = _from_cache(path, task)
  if not all_gather_host(np.asarray(found is not None))[0]:
    everything = all_encoded()
    parts = (
      _encoded(run, stage, source, beat)
      if everything is None
      else (Encoded(part, everything.rows) for part in np.array_split(everything.moments, -(-len(source) // 1024)))
    )
    mean, std = standard(stage.latents, (part.moments for part in parts))
    found = {"mean": mean, "std": std}
    _to_cache(path, task, found)
  (*_, z) = stage.latents.latent_shape
  own = np.stack([found["mean"], found["std"]]) if found else np.zeros((2, z), np.float32)
  mean, std = all_gather_host(own)[0]  # to the bit those of process 0
  return mean, std


def _encoded(run: Run, stage: FixedStage, source: Source, beat: Callable[[str], None]) -> Iterator[Encoded]:
  """`encoded`, with progress."""
  with counted("image", total=len(source), quiet=jax.process_index() != 0) as (done, say):
    say(f"encoding the {len(source)} images of {source.name}")
    number = 0
    for part in encoded(stage.latents, run.frozen, source, run.mesh, flips=run.config.data.random_flip):
      yield part
      number += len(part.moments)
      done(number)
      beat(f"latents of image {number}")


def _task(what: str, run: Run, stage: FixedStage, source: Source) -> str:
  """What is computed, as text."""
  return json.dumps(
    [
      *(_VERSION, what, source.fingerprint, len(source), run.config.data.random_flip, stage.sha256),
      *(autoencoder_settings(stage.latents.network), jax.devices()[0].device_kind),
    ],
    sort_keys=True,
  )


def _cache_path(task: str) -> pathlib.Path | None:
  folder = paths.cache_folder()
  return folder and folder / "latents" / f"{hashlib.sha256(task.encode()).hexdigest()[:32]}.safetensors"


def _from_cache(path: pathlib.Path | None, task: str) -> dict[str, np.ndarray] | None:
  try:
    arrays, facts = load_arrays(path) if path else ({}, {})
  except FileNotFoundError:
    return None
  except UnusableError as error:
    console.note(f"{path} cannot be used ({error}); the images are encoded anew")
    return None
  return arrays if facts.get("of") == task else None


def _to_cache(path: pathlib.Path | None, task: str, arrays: dict[str, np.ndarray]) -> None:
  if path and sum(array.nbytes for array in arrays.values()) <= _MOST_ON_DISK:
    try:
      save_arrays(path, arrays, {"of": task})
    except OSError as error:
      console.note(f"{path} cannot be written ({error.strerror}); the images will be encoded anew next time")
