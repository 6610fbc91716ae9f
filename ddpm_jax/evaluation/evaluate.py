"""What is known of a trained model, as one tree of JSON values: the order of operations of an evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config, EvaluateConfig
from ddpm_jax.data.encoded import NoLabels
from ddpm_jax.data.sources import Source, has_split, open_source
from ddpm_jax.devices import make_mesh
from ddpm_jax.devices.batched import BatchedLoop
from ddpm_jax.devices.mesh import DeviceMesh
from ddpm_jax.diffusion.denoiser import Denoiser
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import by_class, estimate, inception, likelihood, reconstruction, statistics
from ddpm_jax.evaluation.classifier import classifier_features
from ddpm_jax.evaluation.comparison import LEAST_IMAGES, compare, look_up, see
from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.moments import Moments
from ddpm_jax.evaluation.network import network_features
from ddpm_jax.evaluation.reference import Reference, is_kept, measure_reference
from ddpm_jax.evaluation.results import earlier_results
from ddpm_jax.evaluation.surroundings import Surroundings
from ddpm_jax.evaluation.yardsticks import Data, measure_yardsticks, untrained_denoiser
from ddpm_jax.models.build import Params, build_denoiser
from ddpm_jax.models.classifier import FEATURES
from ddpm_jax.runtime import numerics
from ddpm_jax.sampling.classes import Classes, labels_among, numbers_among
from ddpm_jax.sampling.drawn import Drawn, check_room
from ddpm_jax.training.setup import noise_warning
from ddpm_jax.weights.load import Weights
from ddpm_jax.workdir import grids

_OF_SAMPLES = ("frechet", "kid", "score", "precision_recall", "density_coverage", "neighbours", "classes")
# What the measures are defined for: the k-th neighbour of precision, recall, density and coverage is another point.
_LEAST_SAMPLES = {"precision_recall": 4}
_LIKELIHOODS = {"bound": "bits_per_dim", "ode": "ode_bits_per_dim"}  # measure -> its key of the result
_UNTRAINED_EXAMPLES = 100  # for the likelihood of an untrained network, which hardly varies
_UNIFORM = math.log2(256)  # bits/dim of a model that finds all values of a pixel equally likely
_NORMAL = 0.5 * math.log2(2 * math.pi * math.e)  # of one for which latents, standardised, are normally distributed
_OF_GUIDANCE = ("guidance_interval", "guide_with", "guide_sha256")  # settings of a draw beside the scale
_SHOWN = 64  # samples in the picture
_WIDTHS = {"inception": inception.NUM_FEATURES, "classifier": FEATURES}  # known before there is an extractor


def measurable(config: Config, train: Source) -> tuple[Config, str]:
  """The features that are meant, and what can be measured, where nothing particular is asked for.

  As `_measurable_with_features`, `statistics.measurable` and `by_class.measurable`.
  """
  if config.model.stage == "autoencoder":
    return _measurable_of_autoencoder(config, train)
  kept, line = _measurable_with_features(config, train)
  kept, more = statistics.measurable(kept, asked=config)
  kept, last = by_class.measurable(kept, asked=config)
  return kept, "; ".join(filter(None, (line, more, last)))


def _measurable_with_features(config: Config, train: Source) -> tuple[Config, str]:
  """The features that are meant, and what can be measured with them, where nothing particular is asked for.

  Args:
    config: of the run. Where --measures names other than the defaults, all of them are wanted.
    train: the images of the training.

  Returns:
    The settings, with a kind of features instead of 'auto', and with those of --measures that can be measured; and a
    line that says which were left out and why, empty if none were.

  Raises:
    UserError: labels cannot be read, or that by which the best checkpoint is to be kept cannot be measured.
  """
  if not _needs_samples(config):
    return config, ""
  options = config.evaluate
  config, reason = _choose_features(config, train)
  without = {"score"} if config.evaluate.features == "network" else set(_OF_SAMPLES) if reason else set()
  if not without or options.measures != EvaluateConfig().measures:
    return config, ""
  if reason and config.train.evaluate_every and config.train.best_measure in _OF_SAMPLES:
    raise UserError(f"{reason}, or --best_measure=bound")
  left_out = ", ".join(name for name in options.measures if name in without)
  measures = tuple(name for name in options.measures if name not in without)
  reason = reason or "it needs classes, and these features have none"
  return config_lib.override(config, {"measures": measures}), f"left out: {left_out} ({reason})"


def _measurable_of_autoencoder(config: Config, train: Source) -> tuple[Config, str]:
  """As `_measurable_with_features`, with the measures of an autoencoder where nothing is named."""
  names = config_lib.measures(config)
  by_default = names != config.evaluate.measures
  config = config_lib.override(config, {"measures": names})
  if "frechet" not in names:
    return config, ""
  config, reason = _choose_features(config, train)
  if not reason or not by_default:
    return config, ""
  if config.train.evaluate_every:
    raise UserError(reason)
  return config_lib.override(
    config, {"measures": tuple(name for name in names if name != "frechet")}
  ), f"left out: frechet ({reason})"


def _choose_features(config: Config, train: Source) -> tuple[Config, str]:
  """The settings with a kind of features instead of 'auto', and why there are none, empty if there are."""
  auto = config.evaluate.features == "auto"
  if not auto and config.evaluate.features != "classifier":
    return config, ""
  try:
    _check_labels(train)
  except NoLabels as error:
    return (config_lib.override(config, {"features": "network"}), "") if auto else (config, str(error))
  return config_lib.override(config, {"features": "classifier"}), ""


def check(config: Config, workdir: pathlib.Path, train: Source, weights: Weights) -> Config:
  """Raises UserError for what would otherwise be found out hours later.

  Args:
    config: the settings.
    workdir: of the run.
    train: the images of the training.
    weights: of the model; of no matter are what they have learnt, and their values.

  Returns:
    The settings with what can be measured.
  """
  config, _ = measurable(config, train)
  options = config.evaluate
  if config.model.stage == "autoencoder":
    if "frechet" in options.measures:
      _check_features(config, train)
    reconstruction.check(config, workdir, dict(_splits(config, train)))
    return config
  if _needs_samples(config):
    by_class.asked_for(config, weights, train)
    number = options.evaluate_samples or estimate.LEAST
    check_room(
      "evaluate_samples", workdir, train.image_shape, number, copies=len(config.sample.guidance_scale)
    )  # those of all scales are kept until the end
    _check_features(config, train)
    reference, in_file = _split(config, train, options.reference_split), None
    if _reads_statistics(options):
      stats = statistics.read_statistics(options.reference_stats)
      statistics.check_name(stats, options, _WIDTHS.get(options.features))
      in_file = len(stats.features)
    _check_numbers(config, train, reference, number, in_file)
  if any(name in options.measures for name in _LIKELIHOODS):
    for _, source in _splits(config, train):
      _check_given(weights.class_names, source)
  return config


def _check_features(config: Config, train: Source) -> None:
  options = config.evaluate
  match options.features:
    case "inception":
      inception.read_weights(options.inception_weights)
    case "classifier":
      _check_labels(train)
    case _ if "score" in options.measures:
      raise UserError("measures: score needs classes, which features=network has none of; leave it out")


def _check_given(names: Sequence[str], source: Source) -> None:
  """Raises UserError if the likelihood of images given their classes is asked for, and the model cannot know these.

  names: of the classes of the model; empty, if it is unconditional.
  """
  labels = labels_among(names, source) if names else None
  what = "the likelihood of a conditional model is that of images given their classes"
  if names and labels is None:
    raise UserError(f"measures: {what}, and {source.name} has none; leave bound and ode out")
  if labels is not None and labels.min() < 0:
    raise UserError(f"measures: {what}: {by_class.strangers(names, source)}")


def _check_labels(source: Source) -> None:
  if source.labels is None:
    raise NoLabels(source.name)
  source.labels()


def _reads_statistics(options: EvaluateConfig) -> bool:
  return bool(options.reference_stats) and any(name in statistics.OF_REFERENCE for name in options.measures)


def _check_numbers(config: Config, train: Source, reference: Source, samples: int, in_file: int | None) -> None:
  """Raises UserError if there are fewer samples or images than a measure is defined for.

  in_file: how many images --reference_stats has the features of, if that is what samples are compared with.
  """
  options = config.evaluate
  for measure, number in _LEAST_SAMPLES.items():
    if measure in options.measures and samples < number:
      raise UserError(f"evaluate_samples: {samples} are too few for {measure}; use {number} or more")
  for measure, number in LEAST_IMAGES.items():
    name, images = (source := train if measure == "neighbours" else reference).name, len(source)
    if in_file is not None and measure in statistics.OF_REFERENCE:
      name, images = options.reference_stats, number if measure == "frechet" else in_file
    if measure in options.measures and images < number:
      raise UserError(f"measures: {measure} needs {number} images, and {name} has {images}; leave it out")


def evaluate(
  config: Config, weights: Weights, train: Source, around: Surroundings
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Measures what `--measures` names, of the defaults what can be measured. All processes must call it.

  Args:
    config: what to measure, and how to draw.
    weights: of the model.
    train: the images that it was trained on.
    around: where.

  Returns:
    The result, JSON values: what was measured, and under which conditions. And pictures uint8 [height, width, 3] by
    name.

  Raises:
    UserError: data, labels or weights are missing.
    Abandoned: by `around.beat`.
  """
  began = time.perf_counter()
  config, left_out = measurable(config, train)
  if left_out:
    around.say(left_out)
  result: dict[str, Any] = {
    "step": weights.step,
    "weights": weights.which,
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "version": ddpm_jax.__version__,
    **numerics.surroundings(),
  }
  is_autoencoder = config.model.stage == "autoencoder"
  found, pictures = (_of_autoencoder if is_autoencoder else _of_model)(config, weights, train, around)
  return result | found | {"seconds": round(time.perf_counter() - began, 1)}, pictures


def _of_autoencoder(
  config: Config, weights: Weights, train: Source, around: Surroundings
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """See `reconstruction.measure`."""
  is_compared = "frechet" in config.evaluate.measures
  features = _features(config, weights.run.mesh, train, around) if is_compared else None
  return reconstruction.measure(config, weights, dict(_splits(config, train)), features, around)


def _of_model(
  config: Config, weights: Weights, train: Source, around: Surroundings
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Parts of the result, and pictures, of a model that draws."""
  result: dict[str, Any] = {"warnings": [warning] if (warning := noise_warning(weights.run)) else []}
  pictures: dict[str, np.ndarray] = {}
  features = classes = None
  source, needed = train, []
  if _needs_samples(config):
    classes = by_class.asked_for(config, weights, train)
    features = _features(config, weights.run.mesh, train, around)
    source = _split(config, train, config.evaluate.reference_split)
    needed = [] if _reads_statistics(config.evaluate) else [source]
    needed += [train] * ("neighbours" in config.evaluate.measures and not (needed and source is train))
  names = [name for name in _LIKELIHOODS if name in config.evaluate.measures]
  splits = dict(_splits(config, train)) if names else {}
  likelihoods = [(name, len(source)) for name in names for source in splits.values()]
  config, how = _settle(config, weights, train, needed, features, likelihoods, around)
  result |= how
  with contextlib.ExitStack() as open_files:
    draws = []
    if features is not None:
      draws = _open_draws(config, weights, classes, around.workdir / "samples", open_files)
      found, pictures = _samples(config, weights, train, source, features, classes, around, draws)
      result |= found
    for name in names:
      likelihood_of = functools.partial(_likelihood, name, config, weights, around=around)
      kind = _LIKELIHOODS[name]
      kind = kind if weights.run.first_stage.identity else kind.replace("bits", "latent_bits")
      result[kind] = {split: likelihood_of(source) for split, source in splits.items()}
    for drawn in draws:  # not before: all that follows a draw may be stopped too, and then needs the images again
      drawn.forget()
  return result, pictures


def _settle(
  config: Config,
  weights: Weights,
  train: Source,
  needed: Sequence[Source],
  features: Features | None,
  likelihoods: Sequence[tuple[str, int]],
  around: Surroundings,
) -> tuple[Config, dict[str, Any]]:
  """The settings with what was left open, and what the result says of that; prints how long it will take.

  Args:
    config: the settings.
    weights: of the model.
    train: the images of the training, of which a batch is timed.
    needed: the images whose features are needed.
    features: the extractor; None if no samples are needed.
    likelihoods: (measure, images of the split) for each likelihood of each split.
    around: where, and how much time there is.
  """
  left = estimate.left_open(config, around.given, samples=features is not None, likelihoods=bool(likelihoods))
  config, still = estimate.as_before(config, left, earlier_results(around.workdir))
  config = estimate.few_evaluations(config, still)
  how: dict[str, Any] = {"chosen": [name for name, is_open in left._asdict().items() if is_open]}
  if not around.estimates and not any(still):
    return config, how
  reference = sum(len(source) for source in needed if features and not is_kept(source, features, around.cache))
  work = estimate.Work(reference, likelihoods)
  speed = estimate.measure_speed(config, weights, features, train)
  config = estimate.choose(config, weights, still, speed, work, around.budget_s)
  if any(left):
    around.say(estimate.chosen_line(config, left))
  if around.estimates:
    for line in estimate.lines(config, weights, speed, work):
      around.say(line)
    how["estimated_seconds"] = round(estimate.estimate(config, weights, speed, work).total, 1)
  around.beat("the estimate")
  return config, how


def _open_draws(
  config: Config, weights: Weights, classes: Classes | None, folder: pathlib.Path, open_files: contextlib.ExitStack
) -> list[Drawn]:
  """A draw for each guidance scale, of the same seeds and classes; all but that of scale 1 share one program."""
  draws: list[Drawn] = []
  programs: dict[bool, BatchedLoop] = {}
  for scale in config.sample.guidance_scale:
    off = {"guidance_interval": (), "guide_with": ""} if scale == 1.0 else {}
    one = config_lib.override(config, {"guidance_scale": (scale,)} | off)
    drawn = Drawn(weights if scale != 1.0 else weights._replace(guide=None), one, folder, classes, programs)
    draws.append(open_files.enter_context(contextlib.closing(drawn)))
  return draws


def _samples(
  config: Config,
  weights: Weights,
  train: Source,
  source: Source,
  features: Features,
  classes: Classes | None,
  around: Surroundings,
  draws: Sequence[Drawn],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Draws, and compares what was drawn with the images of `source`, or with `--reference_stats`.

  Of several draws the first gives the result, and all of them its list "guidance".
  """
  options, size = config.evaluate, config.evaluate.evaluate_batch_size
  reference, description = _compared_with(config, source, features, train, around)
  names = classes.names if classes is not None and "classes" in options.measures else ()
  labels = labels_among(names, source) if names and "file" not in description else None
  numbers = numbers_among(names, train) if names else None
  data, own = Data(source, reference, description.get("sha256", source.fingerprint), labels), None
  if "neighbours" in options.measures:
    # What could be remembered is what was trained on.
    same = source is train and "file" not in description
    own = data if same else Data(train, _reference(train, features, size, around), train.fingerprint)
  scales, of_classes, width = config.sample.guidance_scale, data.by_class, reference.features.shape[1]
  found, compared, pictures = [], [], {}
  for scale, drawn in zip(scales, draws, strict=True):
    of_scale = f" with guidance {scale:g}" if len(draws) > 1 else ""
    one, shown = _of_draw(config, features, data, own, classes, numbers, of_classes, around, drawn, of_scale)
    found.append(one)
    how = {name: drawn.settings[name] for name in _OF_GUIDANCE if name in drawn.settings}
    compared.append({"guidance_scale": scale} | how | {name: part for name, part in one.items() if name != "samples"})
    pictures |= {name if drawn is draws[0] else f"{name}_{scale:g}": picture for name, picture in shown.items()}
  if line := by_class.left_out(features.name, found[0].get("classes", {}), width):
    around.say(line)
  result = found[0] | {
    "reference": description,
    "features": features.about | {"name": features.name, "identity": features.identity, "width": width},
    "yardsticks": measure_yardsticks(
      config,
      weights,
      features,
      data,
      own,
      labelled=(train, names) if names else None,
      cache=around.cache,
      say=around.say,
      beat=around.beat,
    ),
  }
  if len(draws) > 1:
    result["guidance"] = compared
  multihost_utils.sync_global_devices("the images have been read")
  return result, pictures


def _of_draw(
  config: Config,
  features: Features,
  data: Data,
  own: Data | None,
  classes: Classes | None,
  numbers: np.ndarray | None,
  of_classes: Mapping[int, Moments],
  around: Surroundings,
  drawn: Drawn,
  of_scale: str,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """What is measured of one draw, and pictures.

  Args:
    config: the settings.
    features: the extractor.
    data: what samples are compared with.
    own: what they may be copies of; None if that is not asked for.
    classes: of the samples.
    numbers: that the classes of the images of the training have among these.
    of_classes: the moments of the classes of the data.
    around: where.
    drawn: the draw.
    of_scale: says for people which of several draws it is.
  """
  options, size, number = config.evaluate, config.evaluate.evaluate_batch_size, config.evaluate.evaluate_samples
  evaluations = len(drawn.table.t)
  around.say(f"drawing {number} images{of_scale}: {config.sample.sampler}, {evaluations} network evaluations each")
  with around.counted(f"drawing{of_scale}", "image", number) as done:
    drawn.draw(number, done=lambda at: done(at.images, str(at)), say=around.say)
  multihost_utils.sync_global_devices("the images are on disk")
  images = drawn.images(number)
  labels = classes.of(np.arange(number)) if classes is not None and "classes" in options.measures else None
  with around.counted(f"features of the samples{of_scale}", "image", number) as done:
    seen = see(features, images, size, done, labels)
  pictures = {"samples": grids.image_grid(np.asarray(images[:_SHOWN]))}
  how: dict[str, Any] = {"number": number, "evaluations": evaluations}
  if classes is not None:
    how["labels"] = "proportional" if classes.proportional else "uniform"
  result: dict[str, Any] = {
    "samples": drawn.settings | how,
    "measures": compare(options.measures, features.name, data.reference, seen),
  }
  if classes is not None and labels is not None:
    right = by_class.seen_as(features.name, seen.probabilities, labels, numbers)
    parts = by_class.measure(features.name, classes.names, labels, seen.by_class, of_classes, right)
    result["measures"] |= parts.values
    result["classes"] = parts.each
  around.beat("the measures")
  if own is not None:
    around.say(f"looking for the samples' nearest images among {len(own.source)}")
    with around.counted(f"nearest images{of_scale}", "training image", len(own.source)) as done:
      result["neighbours"], pictures["neighbours"] = look_up(
        images, seen, own.source, own.reference, features, size, flips=config.data.random_flip, done=done
      )
  return result, pictures


def _compared_with(
  config: Config, source: Source, features: Features, train: Source, around: Surroundings
) -> tuple[Reference, dict[str, Any]]:
  """What samples are compared with, and its description: the statistics of a file, or of the images of a source."""
  options = config.evaluate
  if not _reads_statistics(options):
    return _reference(source, features, options.evaluate_batch_size, around), {
      "dataset": source.name,
      "split": options.reference_split or config.data.split,
      "number": len(source),
      "fingerprint": source.fingerprint,
    }
  stats = statistics.read_statistics(options.reference_stats)
  width = features.extract(train.read(np.arange(1)).images).features.shape[1]
  statistics.check_features(stats, features, width)
  if line := statistics.unstated(stats, features.about, features.name):
    around.say(line)
  return stats.reference, stats.description


def _reference(source: Source, features: Features, size: int, around: Surroundings) -> Reference:
  with around.counted("features of the data", "image", len(source)) as done:
    reference = measure_reference(source, features, cache=around.cache, batch_size=size, say=around.say, done=done)
  around.beat("the statistics of the data set")
  return reference


def write_reference(config: Config, train: Source, path: pathlib.Path, around: Surroundings) -> None:
  """Writes the statistics of the images of the training, or of --reference_split, into a file.

  All processes must call it; process 0 writes.

  Raises:
    UserError: images, labels or weights of the features are missing.
    RunError: the file cannot be written.
  """
  config, _ = _choose_features(config, train)
  options = config.evaluate
  source = _split(config, train, options.reference_split)
  if len(source) < LEAST_IMAGES["frechet"]:
    raise UserError(f"write_reference: {source.name} has one image, which has no covariance; use more")
  mesh = make_mesh(config.train.parallel, matmul_precision=config.model.matmul_precision)
  features = _features(config, mesh, train, around)
  reference = _reference(source, features, options.evaluate_batch_size, around)
  if jax.process_index() == 0:
    statistics.write_statistics(path, source, options.reference_split or config.data.split, features, reference)


def _needs_samples(config: Config) -> bool:
  return any(name in _OF_SAMPLES for name in config.evaluate.measures)


def _features(config: Config, mesh: DeviceMesh, train: Source, around: Surroundings) -> Features:
  """The one place where names become extractors."""
  options = config.evaluate
  match options.features:
    case "inception":
      return inception.load_inception(
        options.inception_weights, options.inception_resize, mesh, options.evaluate_batch_size
      )
    case "classifier" | "network":
      make = classifier_features if options.features == "classifier" else network_features
      return make(
        train,
        cache=around.cache,
        mesh=mesh,
        batch_size=options.evaluate_batch_size,
        say=around.say,
        counted=functools.partial(around.counted, "training the features"),
      )
    case name:
      raise ValueError(f"unknown features {name!r}")


def _split(config: Config, train: Source, name: str) -> Source:
  """A split of the data set; that of the training if the name is empty. Raises UserError."""
  if name in ("", config.data.split):
    return train
  return open_source(dataclasses.replace(config.data, split=name))


def _splits(config: Config, train: Source) -> Iterator[tuple[str, Source]]:
  """The splits whose likelihood is measured."""
  own = config.data.split
  asked = [name.strip() for name in config.evaluate.likelihood_splits.split(",") if name.strip()]
  names = asked or [own]
  if not asked and own != "test" and has_split(config.data, "test"):
    names.append("test")
  for name in names:
    yield name, _split(config, train, name)


def _likelihood(name: str, config: Config, weights: Weights, source: Source, around: Surroundings) -> dict[str, Any]:
  """A likelihood of a split, with those of a uniform distribution and of an untrained network to hold it against."""
  options, run = config.evaluate, weights.run
  exact = dataclasses.replace(config.model, dtype="float32")  # of a float32 model, however it was trained and is drawn

  def measure(denoiser: Denoiser, params: Params, examples: int, done: Callable[[int], None]) -> dict[str, Any]:
    shared: dict[str, Any] = dict(
      source=source,
      labels=labels_among(weights.class_names, source) if run.conditional else None,
      examples=examples,
      batch_size=options.evaluate_batch_size,
      mesh=run.mesh,
      seed=config.sample.sample_seed,
      progress=done,
    )
    if name == "bound":
      timesteps = min(options.bound_timesteps, run.schedule.num_timesteps)
      return likelihood.bound(
        denoiser,
        params,
        run.schedule,
        run.first_stage,
        run.stage_params,
        variance=config.diffusion.variance,
        timesteps=timesteps,
        **shared,
      )
    steps = min(options.ode_steps, run.schedule.num_timesteps)
    return likelihood.ode(
      denoiser,
      params,
      run.schedule,
      run.first_stage,
      run.stage_params,
      steps=steps,
      probes=options.ode_probes,
      **shared,
    )

  number = min(options.likelihood_examples or len(source), len(source))
  given = " given their classes" if run.conditional else ""
  unit = "bits/dim" if run.first_stage.identity else "bits/dim of the latents"
  around.say(f"{name}: {unit} of {number} images of {source.name}{given}")
  with around.counted(f"{unit} ({name})", "image", number) as done:
    denoiser = build_denoiser(exact, config.diffusion.prediction, run.first_stage.latent_shape)
    found = measure(denoiser, weights.params, number, done)
  beat = lambda done: around.beat(f"image {done} of an untrained network")  # noqa: E731
  untrained = measure(untrained_denoiser(run.denoiser), {}, min(number, _UNTRAINED_EXAMPLES), beat)
  return (
    found
    | ({"given": "class"} if run.conditional else {})
    | ({"first_stage": run.first_stage_facts} if run.first_stage_facts else {})
    | {
      "dtype": exact.dtype,
      "matmul_precision": likelihood.PRECISION,
      "yardsticks": {"noise": _UNIFORM if run.first_stage.identity else _NORMAL, "untrained": untrained["total"]},
    }
  )
