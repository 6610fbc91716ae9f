"""What a measure of samples is to be held against: the same measure of the data itself, of noise, and of no training.

A number by itself says little: in some features noise has a precision of 0.86. So each is reported beside three others:

- data: images of the data set against the others of it, what a perfect model would have, but for chance;
- noise: pixels that are drawn uniformly from 0..255;
- untrained: images that the same sampler draws with the network as it is initialised.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.data.sources import Source
from ddpm_jax.devices.hosts import any_host
from ddpm_jax.diffusion.denoiser import Cond, Denoiser, Params
from ddpm_jax.evaluation import by_class
from ddpm_jax.evaluation.comparison import LEAST_IMAGES, Seen, compare, look_up, near_duplicates_of, see
from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.moments import Moments, add, moments_by_class, no_moments
from ddpm_jax.evaluation.reference import Reference
from ddpm_jax.keys import seeded
from ddpm_jax.sampling.draw import bind_for_sampling, make_draw, table_of
from ddpm_jax.sampling.drawn import settings
from ddpm_jax.weights.load import Weights
from ddpm_jax.workdir.arrays import UnusableError, load_arrays, save_arrays

DRAWN = ("noise", "untrained")
MOST = 1_000  # images of noise, of an untrained network, and whose nearest images are looked for
_DRAWN_AT_ONCE = 200
_VERSION = 2  # to be counted up when something else is computed

# kind -> {"number": of images, "values": {name of a measure: value}}; of the data also "classes", as `by_class.Parts`
Yardsticks = dict[str, dict[str, Any]]
# Settings of a draw that an untrained network's images, and so the yardsticks, do not depend on.
_NO_MATTER = (
  *("checkpoint", "classes", "guidance_scale", "guidance_interval", "guide_with", "guide_sha256"),
  *("classifier", "classifier_scale", "classifier_sha256"),
)


class Data(NamedTuple):
  """Images, and what samples are compared with.

  Attributes:
    source: the images.
    reference: the statistics of their features; or those of `--reference_stats`, whose images are not at hand.
    identity: of what the statistics are of, a JSON value.
    labels: of the images, int32 [N], see `classes.labels_among`; None where they are not known, or the statistics are
      of a file.
  """

  source: Source
  reference: Reference
  identity: Any
  labels: np.ndarray | None = None

  @property
  def by_class(self) -> dict[int, Moments]:
    """The moments of each class, see `moments_by_class`, as far as features are kept."""
    if self.labels is None:
      return {}
    kept = self.labels[self.reference.index]
    return moments_by_class(self.reference.features[kept >= 0], kept[kept >= 0])


def untrained_denoiser(denoiser: Denoiser) -> Denoiser:
  """The denoiser before training, of any architecture and without parameters: the last layer of networks is zero."""
  return dataclasses.replace(denoiser, network=_zero_network)


def _zero_network(
  params: Params, x: jax.Array, time: jax.Array, cond: Cond, *, dropout_keys: jax.Array | None = None
) -> jax.Array:
  del params, time, cond, dropout_keys
  return jnp.zeros_like(x)


def measure_yardsticks(
  config: Config,
  weights: Weights,
  features: Features,
  data: Data,
  train: Data | None,
  *,
  labelled: tuple[Source, Sequence[str]] | None = None,
  cache: pathlib.Path,
  say: Callable[[str], None],
  beat: Callable[[str], None],
) -> Yardsticks:
  """The measures of samples that `config` names, of the three kinds. All processes must call it.

  They are kept in the cache under everything that they depend on, and so computed once.

  Args:
    config: names the measures, the number of samples and the sampler.
    weights: of the model; only what it is, not what it has learnt.
    features: the extractor.
    data: what samples are compared with.
    train: what they may be copies of; None if that is not asked for.
    labelled: images of the training and the names of their classes; None if the measure `classes` is not asked for.
    cache: folder of the cache, made if need be.
    say: takes a line.
    beat: called now and then. What it raises ends the work.
  """
  names, number = config.evaluate.measures, config.evaluate.evaluate_samples
  drawn = {name: value for name, value in settings(config, weights).items() if name not in _NO_MATTER}
  schedule = dataclasses.asdict(config.diffusion)
  del schedule["first_stage"]  # a path; what it holds is among the settings of the draw
  known = [(part.identity, part.source.fingerprint, len(part.source)) for part in (data, train or data)]
  of_all = [_VERSION, known, config.data.random_flip, features.identity, sorted(names), number, drawn, schedule, MOST]
  task = json.dumps(of_all + ([labelled[1]] if labelled else []), sort_keys=True)
  path = cache / f"yardsticks-{hashlib.sha256(task.encode()).hexdigest()[:16]}.safetensors"
  found = from_cache(path, task, say)
  if not any_host(found is None) and found is not None:
    return found
  say("measuring the data against itself, noise, and an untrained network")
  size = config.evaluate.evaluate_batch_size
  few = min(number, MOST)

  def of_images(images: np.ndarray) -> dict[str, Any]:
    seen = see(features, images, size, lambda done: beat(f"yardstick {done} of {len(images)}"))
    return {"number": len(images), "values": compare(names, features.name, data.reference, seen)}

  noise = np.random.default_rng(0).integers(0, 256, (few, *data.source.image_shape), np.uint8)
  found = {
    "data": _data_against_itself(names, features, data, number, size),
    "noise": of_images(noise),
    "untrained": of_images(_untrained(config, weights, few, beat)),
  }
  if train is not None and len(train.reference.index) >= 2 * LEAST_IMAGES["neighbours"]:
    found["data"]["values"] |= _copies_in_the_data(features, train, size, flips=config.data.random_flip, beat=beat)
  if labelled is not None:
    parts = _classes_of_the_data(features, data, *labelled, number, size)
    found["data"]["values"] |= parts.values
    found["data"]["classes"] = parts.each
  if jax.process_index() == 0:
    try:
      save_arrays(path, {}, {"of": task, "found": found})
    except OSError as error:
      say(f"warning: cannot keep {path} ({error.strerror}); it will be computed again")
  return found


def from_cache(path: pathlib.Path, task: str, say: Callable[[str], None]) -> Yardsticks | None:
  try:
    _, facts = load_arrays(path)
    if facts.get("of") != task:
      raise UnusableError("it is of other settings")
  except FileNotFoundError:
    return None
  except UnusableError as error:
    say(f"warning: {path} is damaged ({error}); computing it anew")
    return None
  return facts["found"]


def halves(length: int, number: int) -> tuple[np.ndarray, np.ndarray]:
  """Two random disjoint parts of 0..length-1, each in rising order: `number`, but at most half, and the rest."""
  order = np.random.default_rng(0).permutation(length)
  first = min(number, length // 2)
  return np.sort(order[:first]), np.sort(order[first:])


def part_of(reference: Reference, rows: np.ndarray) -> Reference:
  """Of some of the images whose features are kept."""
  kept = reference.features[rows]
  return Reference(add(no_moments(kept.shape[1]), kept), reference.index[rows], kept)


def _data_against_itself(
  names: Sequence[str], features: Features, data: Data, number: int, batch_size: int
) -> dict[str, Any]:
  ours, others = (part_of(data.reference, rows) for rows in halves(len(data.reference.index), number))
  names = [name for name in names if len(ours.index) >= LEAST_IMAGES.get(name, 1)]  # of a few images halves are too few
  probabilities = np.zeros((0, 0))
  if "score" in names:  # of classes, which are not kept
    rows = halves(len(data.source), min(number, MOST))[0]
    # Not in the order of the data set, which may be that of the classes: the score is a mean over runs of rows.
    images = data.source.read(np.random.default_rng(0).permutation(rows)).images
    probabilities = see(features, images, batch_size, lambda done: None).probabilities
  seen = Seen(ours.moments, probabilities, np.arange(len(ours.index)), ours.features)
  return {"number": len(ours.index), "values": compare(names, features.name, others, seen)}


def _classes_of_the_data(
  features: Features, data: Data, train: Source, names: Sequence[str], number: int, batch_size: int
) -> by_class.Parts:
  """The distance of each class between the parts of `_data_against_itself`, and how the classifier sees other images.

  The number of images of a class is that of the distance, and where there is none, of the classifier.
  """
  parts = by_class.Parts({}, {})
  if features.name == "classifier":
    labels, right = by_class.held_out_seen_as(features, train, names, batch_size)
    parts = by_class.measure(features.name, names, labels, {}, {}, right)
  if data.labels is None:
    return parts
  kept = data.labels[data.reference.index]
  rows_of_both = halves(len(kept), number)
  ours, others = (
    moments_by_class(data.reference.features[rows], kept[rows])
    for rows in (half[kept[half] >= 0] for half in rows_of_both)
  )
  distances = by_class.measure(features.name, names, kept[rows_of_both[0]], ours, others, None)
  each = {name: parts.each.get(name, {}) | distances.each.get(name, {}) for name in (*parts.each, *distances.each)}
  return by_class.Parts(parts.values | distances.values, each)


def _copies_in_the_data(
  features: Features, train: Data, batch_size: int, *, flips: bool, beat: Callable[[str], None]
) -> dict[str, float]:
  """How many images of the training are as near to another one as a copy would be."""
  ours, others = (part_of(train.reference, rows) for rows in halves(len(train.reference.index), MOST))
  images = train.source.read(ours.index).images
  rest = dataclasses.replace(
    train.source, length=len(others.index), read=lambda rows: train.source.read(others.index[rows])
  )
  seen = Seen(ours.moments, np.zeros((0, 0)), np.arange(len(images)), ours.features)
  facts, _ = look_up(
    images, seen, rest, others, features, batch_size, flips=flips, done=lambda done: beat(f"yardstick, image {done}")
  )
  return near_duplicates_of(facts)


def _untrained(config: Config, weights: Weights, number: int, beat: Callable[[str], None]) -> np.ndarray:
  """Images uint8 [number, H, W, C] of the sampler of `config`, before training."""
  run = weights.run
  draw = make_draw(
    bind_for_sampling(run._replace(denoiser=untrained_denoiser(run.denoiser)), config.sample),
    table_of(config.sample, run.schedule, config.diffusion.variance),
    first_stage=run.first_stage,
    mesh=run.mesh,
    stream="sample",
  )
  constants = seeded({}, config.sample.sample_seed, first_stage=run.stage_params)
  size, images = min(number, _DRAWN_AT_ONCE), []
  for first in range(0, number, size):
    index = np.arange(first, min(first + size, number), dtype=np.int32)
    images.append(draw(constants, index, size=size))
    beat(f"untrained image {first + len(index)} of {number}")
  return np.concatenate(images)
