"""Where weights come from: --init_from=PATH, or the checkpoints of a workdir.

PATH is a folder of diffusers, a safetensors file that --mode=export wrote, or a workdir. It decides the architecture
and the diffusion wherever flags say nothing, and is read before anything is written. Once a run has a checkpoint of its
own, nobody looks at PATH any more.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax.checkpoint import manifest
from ddpm_jax.config import Config, ModelConfig, SampleConfig, TrainConfig
from ddpm_jax.data.labels import listed
from ddpm_jax.devices import make_mesh
from ddpm_jax.devices.hosts import all_gather_host, gather
from ddpm_jax.errors import UserError
from ddpm_jax.models.build import AutoencoderNetwork, Params, TrainableNetwork, null_label
from ddpm_jax.runtime import console, paths
from ddpm_jax.training.setup import build_run
from ddpm_jax.weights import diffusers, file, stage_folder
from ddpm_jax.weights import first_stage as stages
from ddpm_jax.weights.autoencoders import NAME as AUTOENCODER
from ddpm_jax.weights.load import Weights, identity_of, load_weights
from ddpm_jax.weights.names import from_flat, to_flat
from ddpm_jax.weights.stage_folder import Autoencoder
from ddpm_jax.workdir import layout
from ddpm_jax.workdir.arrays import arrays_sha256

ImageShape = tuple[int, int, int]  # H, W, C


class WeightSource(NamedTuple):
  """What PATH says of its model."""

  path: pathlib.Path
  kind: str  # 'diffusers', 'file' or 'workdir'
  settings: dict[str, Any]  # the settings that come with it
  image_shape: ImageShape | None  # None: a workdir's checkpoints say it
  classes: tuple[str, ...] = ()  # names of the classes of a conditional model, as far as it says them


def absolute(text: str) -> str:
  """--init_from as it is kept in a workdir; the empty text stays.

  Raises:
    UserError: if it is an address, or a path that no file of a workdir can hold.
  """
  if not text:
    return ""
  path = paths.absolute("init_from", text, "get the model first and name its folder")
  paths.check_name("init_from", path)
  return str(path)


def base_config(path: str, stored: Config | None = None, base: Config | None = None) -> Config:
  """The settings that flags win over where weights come from PATH: `base` with those that come with them.

  Args:
    path: as `absolute` makes it.
    stored: the settings of the run that the workdir holds. One that began with PATH has them too, and PATH may be gone.
    base: what they are laid over; None: the defaults.

  Raises:
    UserError: if PATH is no model that can be read.
  """
  try:
    if stored and stored.exchange.init_from == path:
      return config_lib.override(base or Config(), _settings_of(stored))
    source = inspect_source(path)
    if source.kind == "workdir":
      layout.check_own(source.path, {}, ["network"])
    return config_lib.override(base or Config(), source.settings)
  except UserError as error:
    raise UserError(f"init_from: {error}") from None


def inspect_source(path: str, *, autoencoders: bool = False) -> WeightSource:
  """Reads what PATH says of itself, and none of its weights.

  Args:
    path: as `absolute` makes it.
    autoencoders: whether the workdir of an autoencoder will do, which draws nothing.

  Raises:
    UserError: if it is no such model; names the file.
  """
  place = pathlib.Path(path)
  try:
    return _inspect(place, autoencoders)
  except OSError as error:
    raise UserError(f"{error.filename or place} cannot be looked at ({error.strerror}); name another path") from error


def _inspect(place: pathlib.Path, autoencoders: bool) -> WeightSource:
  if not place.exists():
    raise UserError(f"there is no {place}; nothing is downloaded, so get the model first and name its folder")
  if not place.is_dir():
    config, image_shape, classes = file.describe(place)
    kept = {"first_stage": str(place)} if config.diffusion.first_stage else {}  # in the file, too
    return WeightSource(place, "file", _settings_of(config) | kept, image_shape, classes)
  if diffusers.is_folder_of_diffusers(place):
    settings, image_shape, classes = diffusers.describe(place)
    few = settings["num_timesteps"] < TrainConfig().preview_steps
    few_steps = {"preview_steps": settings["num_timesteps"]} if few else {}
    return WeightSource(place, "diffusers", settings | few_steps, image_shape, classes)
  if (place / "config.json").exists():
    config = layout.load_config(place)
    if config.model.stage == "classifier":
      raise UserError(f"{place} holds a classifier, which draws nothing; name it as --classifier of a draw")
    if config.model.stage == "autoencoder" and not autoencoders:
      raise UserError(f"{place} holds an autoencoder, which draws nothing; name it as --first_stage")
    # Its first stage lies in the workdir, wherever it came from.
    kept = {"first_stage": str(place)} if config.diffusion.first_stage else {}
    return WeightSource(place, "workdir", _settings_of(config) | kept, None, _classes_of(config, place))
  for name in (file.NAME, AUTOENCODER):
    if (place / name).exists():
      raise UserError(f"{place} holds {name}; name that file")
  raise UserError(f"{place} is no folder of diffusers (no model_index.json) and no workdir (no config.json)")


def read_params(
  config: Config,
  image_shape: ImageShape | None = None,
  classes: Sequence[str] = (),
  first_stage: AutoencoderNetwork | None = None,
) -> tuple[Params, ImageShape]:
  """The weights of `config.exchange.init_from`. All processes must call it.

  Args:
    config: of the run.
    image_shape: of the images that the run draws; None: of those that the weights were trained on.
    classes: names of all that a conditional run will be trained with; empty: those of the weights.
    first_stage: of a latent model; None: pixels.

  Returns:
    A tree of float32 NumPy arrays that fits the network of `config`, and the shape of the images.

  Raises:
    UserError: if they cannot be read, do not fit (all that do not are named), or differ among the processes.
  """
  try:
    params, shape = _read(config, inspect_source(config.exchange.init_from), image_shape, classes, first_stage)
  except UserError as error:
    raise UserError(f"init_from: {error}") from error
  digest = np.frombuffer(bytes.fromhex(arrays_sha256(to_flat(params), "")), np.uint8)
  if np.any(all_gather_host(digest) != digest[None]):
    raise UserError(
      f"init_from: {config.exchange.init_from} does not hold the same weights for all processes; give every host a copy"
    )
  return params, shape


def _read(
  config: Config,
  source: WeightSource,
  image_shape: ImageShape | None,
  classes: Sequence[str],
  first_stage: AutoencoderNetwork | None,
) -> tuple[Params, ImageShape]:
  if source.kind != "workdir":
    for name in config_lib.NAMES_WEIGHTS:
      value = getattr(config.sample, name)
      if value != getattr(SampleConfig(), name):
        raise UserError(f"{source.path} is no workdir, so --{name}={value} has no effect; leave it out")
  shape, model = image_shape or source.image_shape, _model_of(config.model, source, trains=bool(classes))
  if source.kind == "workdir":
    theirs = _weights_of_workdir(config, source.path)
    shape = shape or theirs.run.image_shape
    arrays = to_flat(jax.tree.map(gather, theirs.params))
    try:
      params = from_flat(arrays, model, first_stage.latent_shape(shape) if first_stage else shape)
    except UserError as error:
      raise UserError(f"{source.path}: {error}") from None
  else:
    assert shape is not None  # the others say it
    reader = diffusers if source.kind == "diffusers" else file
    params = reader.read_params(source.path, model, first_stage.latent_shape(shape) if first_stage else shape)
  return _with_labels(params, model, config.model, source.classes, classes or source.classes), shape


def _model_of(model: ModelConfig, source: WeightSource, *, trains: bool) -> ModelConfig:
  """The network of the weights: `model` with the labels that they have.

  Raises:
    UserError: `model` has other labels, and no training (`trains`) would teach it them.
  """
  theirs = {name: source.settings.get(name, 0) for name in ("num_classes", "label_dropout")}
  number = theirs["num_classes"]
  if number and not model.num_classes:
    raise UserError(f"{source.path} is a model of {number} classes; use --conditioning=class")
  if not trains and number != model.num_classes:
    raise UserError(
      f"{source.path} is a model of {number} classes, not {model.num_classes}; leave --num_classes out"
      if number
      else f"{source.path} is unconditional, and draws by class once it is trained to; leave --conditioning out"
    )
  return dataclasses.replace(model, **theirs)


def _with_labels(
  params: Params, model: ModelConfig, wanted: ModelConfig, theirs: Sequence[str], ours: Sequence[str]
) -> Params:
  """The weights of `model` with the labels of `wanted`, and a line about those that begin anew.

  The embedding of a class goes with its name. One that the weights do not have begins at the mean of theirs, or at
  zero, where they are unconditional: as if the network were not told.

  Args:
    params: the weights.
    model: their network.
    wanted: the network that they are for.
    theirs, ours: names of the classes of both; what is missing at their ends are numbers.
  """
  theirs, ours = (
    (*names, *map(str, range(len(names), network.num_classes))) for names, network in ((theirs, model), (ours, wanted))
  )
  has_null, wants_null = null_label(model) is not None, null_label(wanted) is not None
  if (theirs, has_null) == (ours, wants_null):
    return params
  rows = params["label_embedding"]["embedding"] if theirs else np.zeros((1, 4 * wanted.channels), np.float32)
  mean = rows[: len(theirs) or 1].mean(0)
  embedding = [rows[theirs.index(name)] if name in theirs else mean for name in ours]
  embedding += [rows[-1] if has_null else mean] * wants_null
  anew = [name for name in ours if name not in theirs] + ["(no class)"] * (wants_null and not has_null)
  gone = [name for name in theirs if name not in ours] + ["(no class)"] * (has_null and not wants_null)
  if jax.process_index() == 0:
    for names, what in (
      (anew, f"begin anew, at {'the mean of the others' if theirs else 'zero'}"),
      (gone, "are left out"),
    ):
      if names:
        console.note(f"the labels of --init_from: {listed(names)} {what}")
  return {**params, "label_embedding": {"embedding": np.stack(embedding)}}


def _weights_of_workdir(config: Config, workdir: pathlib.Path) -> Weights:
  """Of another run's workdir, those that --checkpoint and --sample_weights name."""
  how = (*config_lib.NAMES_WEIGHTS, "parallel", "on_corrupt")
  given = {name: value for name, value in config_lib.values(config).items() if name in how}
  return load_weights(config_lib.override(layout.load_config(workdir), given), workdir)


def find_first_stage(config: Config, workdir: pathlib.Path | None, *, given: bool = False) -> Autoencoder | None:
  """The first stage of a command, see `first_stage.find`; of weights of elsewhere theirs, with its statistics.

  All processes must call it.

  Args:
    config: of the run.
    workdir: its folder; may not exist yet. None: there is none.
    given: whether the command names the first stage.

  Raises:
    UserError: there is none, or it is not the one that the run, or the weights of --init_from, began with.
  """
  path, named = config.exchange.init_from, config.diffusion.first_stage
  begun = workdir is not None and (stage_folder.is_kept(workdir) or layout.has_checkpoints(workdir, ["checkpoints"]))
  if workdir is not None and (begun or not path):
    return stages.find(config, workdir, given=given)
  try:
    own = inspect_source(path).settings.get("first_stage", "")
  except UserError as error:
    raise UserError(f"init_from: {error}") from None
  if not named and not own:
    return None
  if not own:
    raise UserError(f"first_stage: the weights of {path} are of pixels, not of the latents of {named}; leave it out")
  if not named:
    raise UserError(f"first_stage: empty, but the weights of {path} are of latents; use --first_stage={path}")
  theirs = stages.read_named(own, config)
  other = theirs if named == own else stages.read_named(named, config)
  if other.sha256 != theirs.sha256:
    raise UserError(
      f"first_stage: {named} holds another first stage, {other.sha256[:12]}, than the weights of {path} were trained "
      f"with, {theirs.sha256[:12]}; leave --first_stage out to go on with that"
    )
  return theirs  # with the mean and deviation that the weights know


def find_weights(config: Config, workdir: pathlib.Path | None, network: TrainableNetwork | None = None) -> Weights:
  """The weights that a command means: of the workdir's checkpoints, or, where it has none, those of --init_from.

  Args:
    config: of the run.
    workdir: its folder; None: those of --init_from.
    network: in the place of that of the settings, for the weights of a workdir.

  Raises:
    UserError: if there are none, or they do not fit the network of `config`.
  """
  weights = _find_weights(config, workdir, network)
  if config.sample.guide_with:
    weights = weights._replace(guide=_find_guide(config, workdir, weights))
  if config.sample.classifier:
    weights = weights._replace(classifier=find_classifier(config.sample.classifier, weights))
  return weights


def _find_weights(config: Config, workdir: pathlib.Path | None, network: TrainableNetwork | None = None) -> Weights:
  if workdir is not None and (not config.exchange.init_from or layout.has_checkpoints(workdir)):
    return load_weights(config, workdir, network)
  theirs = find_first_stage(config, None)
  params, image_shape = read_params(config, first_stage=theirs and theirs.network)
  mesh = make_mesh(config.train.parallel, matmul_precision=config.model.matmul_precision)
  run = build_run(config, image_shape, mesh, stage=theirs and theirs.fixed(image_shape))
  params = run.place(params)
  classes = inspect_source(config.exchange.init_from).classes
  return Weights(run, params, 0, config.sample.sample_weights, identity_of(manifest.describe(params)), classes=classes)


def _find_guide(config: Config, workdir: pathlib.Path | None, weights: Weights) -> Weights:
  """The weights that --guide_with names, of a model that can guide. Raises UserError."""
  text = config.sample.guide_with
  own = {"raw": {"sample_weights": "raw"}} | ({text: {"checkpoint": text}} if text.isdecimal() else {})
  try:
    if text in own:
      if workdir is None or not layout.has_checkpoints(workdir):
        raise UserError("there is no run whose weights that could be; name the path of a model")
      guide = load_weights(config_lib.override(config, own[text]), workdir)
    else:
      given = {"parallel": config.train.parallel, "init_from": text}
      theirs = config_lib.override(base_config(text), given)
      is_run = inspect_source(text).kind == "workdir"
      guide = _weights_of_workdir(theirs, pathlib.Path(text)) if is_run else _find_weights(theirs, None)
    check_guide(weights, guide)
  except UserError as error:
    raise _of_guide("guide_with", text, error) from None
  return guide


def _of_guide(option: str, text: str, error: UserError) -> UserError:
  """What is wrong with the model that an option names, which the message says once."""
  message = str(error)
  for name in ("init_from", "workdir", "checkpoint"):
    message = message.removeprefix(f"{name}: ")
  said = pathlib.Path(text).is_absolute() and text in message
  return UserError(f"{option}: {message}" if said else f"{option}: {text}: {message}")


def find_classifier(text: str, weights: Weights) -> Weights:
  """The newest average of a classifier of noisy images, of the same process and images, and of the same classes.

  Args:
    text: `--classifier`, its workdir.
    weights: what is guided; an unconditional model has no classes of its own.

  Raises:
    UserError: there is none, or it is of another kind.
  """
  try:
    place = pathlib.Path(absolute(text))
    if not layout.holds_run(place):
      raise UserError("there is no run; name the workdir of a classifier, see --stage")
    config = layout.load_config(place)
    if config.model.stage != "classifier":
      raise UserError("it holds no classifier; name the workdir of one, see --stage")
    newest = {name: getattr(SampleConfig(), name) for name in config_lib.NAMES_WEIGHTS}
    parallel = {"parallel": weights.run.config.train.parallel}
    classifier = load_weights(config_lib.override(config, newest | parallel), place)
    _check_alike(weights, classifier, classes=weights.run.conditional)
  except UserError as error:
    raise _of_guide("classifier", text, error) from None
  return classifier


def check_guide(weights: Weights, guide: Weights) -> None:
  """Raises UserError unless one model can guide another: images, noise and classes must be the same."""
  _check_alike(weights, guide, classes=guide.run.conditional)
  if weights.identity == guide.identity:
    raise UserError("it is the model itself, which cannot guide itself; name a worse one")


def _check_alike(weights: Weights, other: Weights, *, classes: bool) -> None:
  """Raises UserError unless both are of the same images and noise and, where that counts, of the same classes."""
  ours, theirs = weights.run, other.run
  if theirs.image_shape != ours.image_shape:
    shapes = ("x".join(map(str, shape)) for shape in (theirs.image_shape, ours.image_shape))
    raise UserError("it is of images of {}, the model of {}; name another".format(*shapes))
  if not np.array_equal(theirs.schedule.alpha_bar, ours.schedule.alpha_bar):
    raise UserError("its noise schedule is not that of the model; name one that was trained with the same")
  if theirs.first_stage_facts != ours.first_stage_facts:
    raise UserError("its first stage is not that of the model; name one that was trained with the same")
  if classes and other.class_names != weights.class_names:
    its, those = listed(other.class_names), listed(weights.class_names) or "none"
    raise UserError(f"its classes are {its}, those of the model {those}; name another")


def ensure_workdir(config: Config, workdir: pathlib.Path) -> None:
  """Makes the workdir of a model that was trained elsewhere, or renews its settings, once a command is found right.

  Does nothing where a run was trained, and where the settings stand already. Raises UserError if it cannot be written.
  """
  if not config.exchange.init_from or layout.has_checkpoints(workdir) or jax.process_index() != 0:
    return
  exists = layout.holds_run(workdir)
  if not exists or config_lib.changed(layout.load_config(workdir), config, on_resume=True, once_trained=True):
    layout.create(workdir, config)


def _classes_of(config: Config, workdir: pathlib.Path) -> tuple[str, ...]:
  """The names of the classes of a workdir's conditional model."""
  return layout.classes(workdir)[: config.model.num_classes]


def _settings_of(config: Config) -> dict[str, Any]:
  """Of a run's settings those that come with its weights."""
  return {name: value for part in file.settings_of_weights(config).values() for name, value in part.items()}
