"""The perceptual distance that an autoencoder is trained with, --perceptual: chosen once, and kept by the workdir."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.checkpoint.manifest import Manifest
from ddpm_jax.config import Config
from ddpm_jax.data.encoded import NoLabels
from ddpm_jax.data.sources import Source
from ddpm_jax.devices.hosts import any_host
from ddpm_jax.devices.mesh import DeviceMesh
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.evaluation import trained
from ddpm_jax.evaluation.classifier import classifier_features
from ddpm_jax.evaluation.network import network_features, network_for
from ddpm_jax.models import build
from ddpm_jax.models.build import Params
from ddpm_jax.models.classifier import Classifier, maps
from ddpm_jax.models.lpips import feature_distance
from ddpm_jax.runtime import console
from ddpm_jax.runtime.progress import counted
from ddpm_jax.training.autoencoder import Distance, Perceptual
from ddpm_jax.weights.perceptual import load_lpips
from ddpm_jax.workdir.arrays import Arrays, UnusableError, arrays_sha256, load_arrays, save_arrays
from ddpm_jax.workdir.storage import remedy

NAME = "perceptual.safetensors"  # in the workdir
SMALLEST = 16  # pixels of a side that VGG16 still has some of after its last stage


def check(config: Config, workdir: pathlib.Path, image_shape: tuple[int, int, int], *, given: bool = False) -> None:
  """Raises UserError for a distance that cannot be had: weights that are missing or others, images too small.

  Args:
    config: of the run.
    workdir: its folder; may not exist yet.
    image_shape: H, W, C.
    given: whether the command names the weights; those that the workdir keeps must then be the same.
  """
  if config.autoencoder.perceptual != "lpips":
    return
  if min(image_shape[:2]) < SMALLEST or image_shape[2] not in (1, 3):
    raise UserError(
      f"perceptual: lpips is of images of at least {SMALLEST}x{SMALLEST} pixels in grey or colour, these are "
      f"{'x'.join(map(str, image_shape))}; use --perceptual=features"
    )
  path = config.autoencoder.lpips_weights
  if not (workdir / NAME).exists():
    load_lpips(path)
  elif given and pathlib.Path(path).exists():
    named, kept = (arrays_sha256(arrays, "") for arrays in (trained.flat(load_lpips(path).params), _kept(workdir)[0]))
    if named != kept:
      raise UserError(
        f"lpips_weights: {path} holds other weights than the run in {workdir} began with; leave --lpips_weights out to "
        "go on with those, or use another --workdir"
      )


def settle(
  config: Config, workdir: pathlib.Path, source: Source, mesh: DeviceMesh, beat: Callable[[str], None]
) -> Perceptual | None:
  """The distance that the workdir keeps; of a new run that of the settings, which is kept. None: there is to be none.

  All processes must call it. Where 'features' are meant, a small network is trained, unless the cache has it.

  Args:
    config: of the run.
    workdir: its folder, which exists.
    source: the images of the training.
    mesh: the devices.
    beat: called now and then with what was done.

  Raises:
    UserError: what the workdir keeps cannot be read.
    RunError: it cannot be written.
  """
  if config.autoencoder.perceptual == "none":
    return None
  path = workdir / NAME
  if any_host(not path.exists()):
    arrays, facts = _made(config, workdir, source, mesh, beat)
    if jax.process_index() == 0:
      try:
        save_arrays(path, arrays, facts)
      except OSError as error:
        raise RunError(f"workdir: cannot write {path} ({error.strerror}); {remedy(error)}") from error
  else:
    arrays, facts = _kept(workdir)
  return Perceptual(_distance(facts), trained.nested(arrays), arrays_sha256(arrays, ""))


def _kept(workdir: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
  """The weights that a workdir keeps, and what they are of."""
  try:
    return load_arrays(workdir / NAME)
  except UnusableError as error:
    raise UserError(f"perceptual: {workdir / NAME}: {error}; restore it") from None


def check_kept(manifest: Manifest, perceptual: Perceptual | None, workdir: pathlib.Path) -> None:
  """Raises UserError unless the distance of a run is that which a checkpoint was trained with."""
  before, now = manifest.get("perceptual"), perceptual and perceptual.sha256
  if manifest and before != now:
    raise UserError(
      f"perceptual: checkpoint {manifest['step']} in {workdir} was trained with other weights than {workdir / NAME} "
      "holds; restore that file"
    )


def _made(
  config: Config, workdir: pathlib.Path, source: Source, mesh: DeviceMesh, beat: Callable[[str], None]
) -> tuple[Arrays, dict[str, Any]]:
  """The weights, and what they are of."""
  if config.autoencoder.perceptual == "lpips":
    params = load_lpips(config.autoencoder.lpips_weights).params
    return trained.flat(params), {"kind": "lpips"}

  options: dict[str, Any] = {
    "cache": workdir / "eval" / "cache",  # where an evaluation has it
    "mesh": mesh,
    "batch_size": config.evaluate.evaluate_batch_size,
    "say": console.say if jax.process_index() == 0 else lambda line: None,
    "counted": functools.partial(_counted, beat),
  }
  try:
    features = classifier_features(source, **options)
  except NoLabels:
    features = network_features(source, **options)
  facts = {"kind": features.name, "image_shape": list(source.image_shape), "classes": features.about.get("classes", 0)}
  return dict(features.weights), facts


def lpips_to_measure(config: Config, workdir: pathlib.Path) -> tuple[Params, str] | None:
  """The weights of LPIPS for evaluations, and their SHA-256: those that the workdir keeps, else --lpips_weights.

  Returns:
    None where there are neither.

  Raises:
    UserError: they cannot be read.
  """
  if config.autoencoder.perceptual == "lpips" and (workdir / NAME).exists():
    params = trained.nested(_kept(workdir)[0])
  elif config.autoencoder.lpips_weights:
    params = load_lpips(config.autoencoder.lpips_weights).params
  else:
    return None
  return params, arrays_sha256(trained.flat(params), "")


@contextlib.contextmanager
def _counted(beat: Callable[[str], None], what: str, total: int) -> Iterator[Callable[[int], None]]:
  """A `trained.Counted` that the watchdog hears."""
  with counted(what, total=total, quiet=jax.process_index() > 0) as (done, _):

    def both(number: int) -> None:
      done(number)
      beat(f"{what} {number} of the perceptual distance")

    yield both


def _distance(facts: dict[str, Any]) -> Distance:
  """(parameters, x_hat, x) -> [B]: that of the weights which these facts are of."""
  match facts["kind"]:
    case "lpips":
      return build.lpips
    case "classifier":
      model = Classifier(num_classes=facts["classes"])
      return functools.partial(_between, functools.partial(maps, model))
    case "network":
      height, width, channels = facts["image_shape"]
      return functools.partial(_between, network_for((height, width, channels)).maps)
    case kind:
      raise UserError(f"perceptual: {kind!r} is no distance that this version of ddpm_jax knows; use the newest")


def _between(layers: Callable, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
  """`feature_distance` of what a network makes of both, in one pass."""
  halves = [jnp.split(layer, 2) for layer in layers(params, jnp.concatenate([x, y]))]
  return feature_distance([half for half, _ in halves], [half for _, half in halves])
