"""How long an evaluation takes, from a timed batch, and how much of it fits where nobody says how much."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config, SampleConfig
from ddpm_jax.data.sources import Source
from ddpm_jax.devices.batched import BatchedFn
from ddpm_jax.devices.hosts import all_gather_host
from ddpm_jax.diffusion.guidance import classifier_gradient
from ddpm_jax.diffusion.likelihood import ode_evaluations
from ddpm_jax.evaluation import likelihood
from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.summary import LIKELIHOODS, duration, finite, part
from ddpm_jax.evaluation.yardsticks import DRAWN, MOST
from ddpm_jax.models.build import Params, UNetNetwork, build_model
from ddpm_jax.sampling.classes import number_within
from ddpm_jax.sampling.draw import fit_batch, table_of
from ddpm_jax.weights.load import Weights

LEAST = 1_000  # samples of a number that is chosen here
# Round numbers, so that a machine that is a little busier does not make results that cannot be compared.
NUMBERS = (LEAST, 2_000, 5_000, 10_000, 20_000, 50_000)
_EXAMPLES = (100, 200, 500, 1_000, 2_000, 5_000, 10_000)
_FEW = {"sampler": "dpmpp", "sampling_steps": 20}  # within a few per cent of all T, see docs/results/samplers.md
_OF_A_SAMPLER = ("sampler", "sampling_steps", "eta")
_SHARE = 2 / 3  # of the time, for the samples; the rest is for the likelihoods
_TIMED = {True: 16, False: 64}  # images a device, on CPUs and elsewhere
_RUNS = 3
_OF_PAPERS = 50_000
_TEXT = 1024  # bytes of settings that one process sends the others


class Speed(NamedTuple):
  """Seconds an image takes, over all devices.

  Attributes:
    drawing: of one network evaluation while images are drawn.
    likelihood: of one network evaluation of a likelihood.
    features: of the features; 0 where none are asked for.
    classifier: of the gradient of `--classifier`; 0 where there is none.
  """

  drawing: float
  likelihood: float
  features: float
  classifier: float = 0.0


class Work(NamedTuple):
  """What there is to do, in images.

  Attributes:
    reference: images of the data whose features are not in the cache.
    likelihoods: (measure, images of the split) for each likelihood of each split.
  """

  reference: int
  likelihoods: Sequence[tuple[str, int]]


class Open(NamedTuple):
  """Which settings are left open.

  Attributes:
    evaluate_samples: the number of samples.
    sampler: which one, with how many network evaluations.
    likelihood_examples: the number of images of each split for likelihoods.
  """

  evaluate_samples: bool
  sampler: bool
  likelihood_examples: bool


def left_open(config: Config, given: frozenset[str], *, samples: bool, likelihoods: bool) -> Open:
  """What of the settings this module has to choose.

  Args:
    config: the settings.
    given: flags of this command. A sampler that it names counts, also where it is the default one.
    samples: whether a measure needs samples.
    likelihoods: whether a likelihood is asked for.
  """
  options = config.evaluate
  number = samples and not options.evaluate_samples
  usual = all(getattr(config.sample, name) == getattr(SampleConfig(), name) for name in _OF_A_SAMPLER)
  examples = likelihoods and not options.evaluate_samples and not options.likelihood_examples
  return Open(
    number, number and usual and not given & {*_OF_A_SAMPLER}, examples and "likelihood_examples" not in given
  )


def as_before(config: Config, left: Open, earlier: Iterable[Mapping[str, Any]]) -> tuple[Config, Open]:
  """Takes from earlier results of the workdir what is left open, so that checkpoints can be compared.

  All processes must call it; what process 0 finds counts for all.

  Args:
    config: the settings.
    left: what is left open.
    earlier: the results, the one to be preferred first. A number of samples below `LEAST` was only a try.

  Returns:
    The settings with what could be taken, and what is still open.
  """
  if not any(left):
    return config, left
  changes: dict[str, Any] = {}
  for result in earlier:
    drawn, number = part(result, "samples"), finite(part(result, "samples").get("number"))
    sampler = {name: drawn.get(name) for name in _OF_A_SAMPLER}
    fits = left.sampler or sampler == {name: getattr(config.sample, name) for name in _OF_A_SAMPLER}
    if left.evaluate_samples and "evaluate_samples" not in changes and fits and number and number >= LEAST:
      changes |= {"evaluate_samples": int(number)} | (sampler if left.sampler else {})
    counts = [finite(part(result, kind, split).get("examples")) for kind in LIKELIHOODS for split in part(result, kind)]
    if left.likelihood_examples and "likelihood_examples" not in changes and any(counts):
      changes["likelihood_examples"] = int(max(count or 0 for count in counts))
  changes = _of_first_process(changes)
  number, examples = (
    left[i] and name not in changes for i, name in ((0, "evaluate_samples"), (2, "likelihood_examples"))
  )
  return config_lib.override(config, changes), Open(number, left.sampler and number, examples)


def _of_first_process(values: dict[str, Any]) -> dict[str, Any]:
  """A few JSON values, as process 0 has them."""
  text = json.dumps(values).ljust(_TEXT).encode()
  return json.loads(all_gather_host(np.frombuffer(text, np.uint8))[0].tobytes())


def few_evaluations(config: Config, left: Open) -> Config:
  """Where the sampler is left open: on CPUs one of few network evaluations, elsewhere all T as the papers have it."""
  if not left.sampler or jax.devices()[0].platform != "cpu":
    return config
  steps = min(_FEW["sampling_steps"], config.diffusion.num_timesteps)
  return config_lib.override(config, _FEW | {"sampling_steps": steps})


def measure_speed(config: Config, weights: Weights, features: Features | None, train: Source) -> Speed:
  """Times a batch of each. All processes must call it; what process 0 measures counts for all."""
  run = weights.run
  drawing = _seconds_of_network(config, weights, config.model.dtype, run.mesh.matmul_precision)
  exact = run.mesh.platform == "cpu" and config.model.dtype == "float32"
  of_likelihoods = drawing if exact else _seconds_of_network(config, weights, "float32", likelihood.PRECISION)
  of_features = 0.0
  if features is not None:
    images = train.read(np.arange(config.evaluate.evaluate_batch_size) % len(train)).images
    of_features = seconds(lambda: features.extract(images)) / len(images)
  of_classifier = (
    _seconds_of_classifier(weights, weights.classifier) if features is not None and weights.classifier else 0.0
  )
  first = all_gather_host(np.asarray([drawing, of_likelihoods, of_features, of_classifier]))[0]
  return Speed(*map(float, first))


def _seconds_of_classifier(weights: Weights, classifier: Weights) -> float:
  """Likewise of the gradient of a classifier."""
  run, network = weights.run, classifier.run.denoiser.network

  def gradient(params: Params, xt: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
    logits = lambda xt, level: jax.nn.log_softmax(network(params, xt, level.time, None))  # noqa: E731
    return classifier_gradient(logits, label)(xt, run.schedule.level(t))

  rows = BatchedFn(gradient, run.mesh)
  one = np.zeros((1, *run.image_shape), np.float32), np.ones(1, np.int32), np.zeros(1, np.int32)
  most = _TIMED[jax.devices()[0].platform == "cpu"] * jax.device_count()
  size = fit_batch(rows, classifier.params, *one, number=most)
  return seconds(lambda: rows(classifier.params, *one, size=size)) / size


def _seconds_of_network(config: Config, weights: Weights, dtype: str, matmul_precision: str) -> float:
  """Seconds an image takes of one network evaluation in a batch of moderate size."""
  run = weights.run
  network = UNetNetwork(
    build_model(dataclasses.replace(config.model, dtype=dtype), run.first_stage.latent_shape), run.mesh.attention
  )
  rows = BatchedFn(
    lambda params, xt, t, label=None: network(params, xt, t, label), run.mesh, matmul_precision=matmul_precision
  )
  one = np.zeros((1, *run.first_stage.latent_shape), np.float32), np.ones(1, np.int32)
  one = (*one, np.zeros(1, np.int32)) if run.conditional else one
  most = _TIMED[jax.devices()[0].platform == "cpu"] * jax.device_count()
  size = fit_batch(rows, weights.params, *one, number=most)
  return seconds(lambda: rows(weights.params, *one, size=size)) / size


def seconds(work: Callable[[], Any]) -> float:
  """How long it takes, but for the compilation: the mean of a few runs after the first."""
  work()
  began = time.perf_counter()
  for _ in range(_RUNS):
    work()
  return (time.perf_counter() - began) / _RUNS


def choose(config: Config, weights: Weights, left: Open, speed: Speed, work: Work, budget_s: float) -> Config:
  """The settings with what is left open: as many samples and images as fit into about `budget_s` seconds."""
  changes: dict[str, Any] = {}
  if left.evaluate_samples:
    one = _of_sample(config, weights, speed) + len(config.sample.guidance_scale) * speed.features
    changes["evaluate_samples"] = largest(NUMBERS, _SHARE * budget_s / one)
  if left.likelihood_examples:
    one = sum(_of_likelihood(config, weights, name) * speed.likelihood for name, _ in work.likelihoods)
    changes["likelihood_examples"] = largest(_EXAMPLES, (1 - _SHARE) * budget_s / one)
  return config_lib.override(config, changes)


def largest(numbers: Sequence[int], most: float) -> int:
  """The largest of rising numbers that is at most `most`; the first one if none is."""
  return max((number for number in numbers if number <= most), default=numbers[0])


class Estimate(NamedTuple):
  """Seconds of the parts of an evaluation."""

  drawing: float
  features: float
  likelihoods: float

  @property
  def total(self) -> float:
    """Of all of it."""
    return sum(self)


def estimate(config: Config, weights: Weights, speed: Speed, work: Work) -> Estimate:
  """How long it will take; without compilation, and without what is computed from the features."""
  number = config.evaluate.evaluate_samples if speed.features else 0
  return Estimate(
    number * _of_sample(config, weights, speed),
    (number * len(config.sample.guidance_scale) + work.reference + len(DRAWN) * min(number, MOST)) * speed.features,
    sum(_examples(config, size) * _of_likelihood(config, weights, name) for name, size in work.likelihoods)
    * speed.likelihood,
  )


def _evaluations(config: Config, weights: Weights) -> int:
  """Of the network, for one sample."""
  return len(table_of(config.sample, weights.run.schedule, config.diffusion.variance).t)


def _guided(config: Config, weights: Weights) -> int:
  """How many of these are two passes where there is guidance: those at a noise level in `--guidance_interval`."""
  level = table_of(config.sample, weights.run.schedule, config.diffusion.variance).level
  return number_within(config.sample.guidance_interval, level)


def _passes(config: Config, weights: Weights) -> int:
  """Through a network, for one sample of each guidance scale; a guide of its own counts like the model."""
  scales = config.sample.guidance_scale
  is_guided = sum(scale != 1.0 for scale in scales)
  return len(scales) * _evaluations(config, weights) + is_guided * _guided(config, weights)


def _of_sample(config: Config, weights: Weights, speed: Speed) -> float:
  """Seconds that a sample of each guidance scale takes to draw."""
  evaluations = len(config.sample.guidance_scale) * _evaluations(config, weights)
  return _passes(config, weights) * speed.drawing + evaluations * speed.classifier


def _of_likelihood(config: Config, weights: Weights, name: str) -> float:
  """What the likelihood of one image costs, in network evaluations."""
  options, timesteps = config.evaluate, weights.run.schedule.num_timesteps
  if name == "bound":
    return min(options.bound_timesteps, timesteps) or timesteps
  return ode_evaluations(min(options.ode_steps, timesteps)) * (1 + 2 * options.ode_probes)


def chosen_line(config: Config, left: Open) -> str:
  """What was chosen where it was left open, as flags, for a person."""
  chosen = [name for name, is_open in left._asdict().items() if is_open] + ["sampling_steps"] * left.sampler
  values = config_lib.values(config)
  flags = " ".join(f"--{name}={values[name]}" for name in chosen)
  return f"chosen to fit this machine, and kept for later checkpoints: {flags}"


def lines(config: Config, weights: Weights, speed: Speed, work: Work) -> list[str]:
  """The lines printed before it begins: how long it will take, and what papers measure."""
  options, found = config.evaluate, estimate(config, weights, speed, work)
  evaluations, timesteps = _evaluations(config, weights), weights.run.schedule.num_timesteps
  parts = []
  if speed.features:
    scales = config.sample.guidance_scale
    at = f" at each of {len(scales)} guidance scales" if len(scales) > 1 else ""
    more = f", {_guided(config, weights):,} of them twice for guidance," if config_lib.guided(config.sample) else ""
    parts.append(
      f"drawing {options.evaluate_samples:,} images{at} with {evaluations:,} network evaluations each{more} "
      f"{duration(found.drawing)}, features {duration(found.features)}"
    )
  if work.likelihoods:
    number = sum(_examples(config, size) for _, size in work.likelihoods)
    names = " and ".join(dict.fromkeys(name for name, _ in work.likelihoods))
    parts.append(f"{names} of {number:,} images {duration(found.likelihoods)}")
  said = [f"estimate, from a timed batch: about {duration(found.total)} ({', '.join(parts)})"]
  as_in_papers = options.evaluate_samples == _OF_PAPERS and evaluations == timesteps and options.features == "inception"
  if speed.features and not as_in_papers:
    said.append(
      f"papers measure {_OF_PAPERS:,} images, drawn with all {timesteps:,} steps, by Inception's features; drawing "
      f"them takes about {duration(_OF_PAPERS * timesteps * speed.drawing)} here: --evaluate_samples={_OF_PAPERS} "
      f"--sampler=ddpm --sampling_steps={timesteps} --features=inception --inception_weights=FILE"
    )
  return said


def _examples(config: Config, size: int) -> int:
  """Of a split of that many images, those whose likelihood is measured."""
  asked = config.evaluate.likelihood_examples
  return min(asked, size) if asked > 0 else size
