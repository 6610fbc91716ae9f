"""Samples of a conditional model by class: the distance of each, and the share that is seen as asked for.

With Inception's features the mean distance over the classes is the intra-FID of Miyato and Koyama 2018, section 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config, EvaluateConfig
from ddpm_jax.data.labels import listed
from ddpm_jax.data.sources import Source, class_names
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import measures
from ddpm_jax.evaluation.classifier import divide
from ddpm_jax.evaluation.comparison import NAMES
from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.moments import Moments, covariance
from ddpm_jax.sampling.classes import Classes, labels_among, numbers_among, wanted
from ddpm_jax.weights.load import Weights

ACCURACY = "class_accuracy"


class Parts(NamedTuple):
  """The measure `classes` of some images.

  Attributes:
    values: over all classes: the mean distance, where every class has one, and the accuracy; by the name of a measure.
    each: name of a class -> the same of its images, and their number.
  """

  values: dict[str, float]
  each: dict[str, dict[str, float | int]]


def measurable(config: Config, asked: Config) -> tuple[Config, str]:
  """The settings with the measure `classes`, where it is wanted and can be measured.

  Args:
    config: of the run, with what is about to be measured.
    asked: with what the command names. With the default measures a model that draws by class has this one too.

  Returns:
    The settings, and a line that says why it was left out; empty if it was not.

  Raises:
    UserError: it is named and cannot be measured.
  """
  options, is_named = config.evaluate, "classes" in config.evaluate.measures
  by_default = asked.evaluate.measures == EvaluateConfig().measures and "frechet" in options.measures
  if not config_lib.draws_by_class(config) or not (is_named or by_default):
    return config, ""
  if options.reference_stats and options.features != "classifier":
    reason = f"{options.reference_stats} has no classes, and features={options.features} sees none"
    if is_named:
      raise UserError(f"measures: classes cannot be measured, as {reason}; leave it out, or --reference_stats")
    return config, f"left out: classes ({reason})"
  return (config if is_named else config_lib.override(config, {"measures": (*options.measures, "classes")})), ""


def asked_for(config: Config, weights: Weights, train: Source) -> Classes | None:
  """The classes of the samples: those of `--classes` in turn, else as `--evaluate_labels` says.

  Returns:
    None for an unconditional model without a classifier.

  Raises:
    UserError: for a class that is not there, and where proportions are not known.
  """
  classes = wanted(config.sample, weights)
  if classes is None or config.sample.classes or config.evaluate.evaluate_labels == "uniform":
    return classes
  labels = labels_among(classes.names, train)
  if labels is None:
    raise UserError(
      f"evaluate_labels: proportional needs the class of each image, and {train.name} has none; use "
      "--evaluate_labels=uniform"
    )
  if labels.min() < 0:
    raise UserError(f"evaluate_labels: {strangers(classes.names, train)}, or --evaluate_labels=uniform")
  return classes._replace(turn=np.sort(labels), proportional=True)


def strangers(names: Sequence[str], source: Source) -> str:
  """For an error: that not all classes of a source are among `names`, and a remedy."""
  numbers = numbers_among(names, source)
  assert numbers is not None
  theirs = class_names(source, len(numbers))
  unknown = [name for name, number in zip(theirs, numbers.tolist(), strict=True) if number < 0]
  return (
    f"{source.name} has classes that the model does not know, {listed(unknown)}; use images of its {len(names)} classes"
  )


def measure(
  extractor: str,
  names: Sequence[str],
  labels: np.ndarray,
  ours: Mapping[int, Moments],
  others: Mapping[int, Moments],
  right: np.ndarray | None,
) -> Parts:
  """The measure `classes` of images with labels int [N].

  Args:
    extractor: the name of the features.
    names: of all classes.
    labels: which class was asked for; those below 0 are of no class.
    ours: moments of the images of a class, see `moments_by_class`.
    others: the same of what they are compared with.
    right: of each image, see `seen_as`.
  """
  distance, each = NAMES[extractor]["frechet"], {}
  for label in np.unique(labels[labels >= 0]).tolist():
    rows = labels == label
    found: dict[str, float | int] = {"number": int(rows.sum())}
    name = names[label]
    each[name if names.count(name) == 1 else f"{name} ({label})"] = found  # of ImageNet's two are cranes
    if label in ours and label in others:
      (a, b) = ours[label], others[label]
      found[distance] = measures.frechet_distance(a.mean, covariance(a), b.mean, covariance(b))
    if right is not None and not np.isnan(right[rows]).any():
      found[ACCURACY] = float(right[rows].mean())
  values: dict[str, float] = {}
  if each and all(distance in found for found in each.values()):
    values[NAMES[extractor]["classes"]] = float(np.mean([found[distance] for found in each.values()]))
  if right is not None and not np.isnan(right).all():
    values[ACCURACY] = float(np.nanmean(right))
  return Parts(values, each)


def left_out(extractor: str, each: Mapping[str, Mapping[str, float]], width: int) -> str:
  """A line that says which classes of `Parts.each` have no distance; empty if all have one. width: features."""
  missing = [name for name, found in each.items() if NAMES[extractor]["frechet"] not in found]
  if not missing:
    return ""
  return (
    f"left out: the distance of {len(missing)} of {len(each)} classes ({listed(missing)}), as {width + 1} samples and "
    "as many images of a class are needed"
  )


def seen_as(
  extractor: str, probabilities: np.ndarray, labels: np.ndarray, numbers: np.ndarray | None = None
) -> np.ndarray | None:
  """Of each image 1 if the classifier sees its class in it, 0 if not, NaN if it does not know the class: float64 [N].

  Args:
    extractor: the name of the features. Those without the classes of the data set give None.
    probabilities: [N, K] of the classifier's classes.
    labels: of the images, int [N].
    numbers: that its classes have among the labels, see `classes.numbers_among`; None: their own.
  """
  if extractor != "classifier":
    return None
  own = np.arange(probabilities.shape[1])
  known = own if numbers is None else np.where(own < len(numbers), np.resize(numbers, len(own)), -1)
  return np.where(np.isin(labels, known) & (labels >= 0), known[probabilities.argmax(-1)] == labels, np.nan)


def held_out_seen_as(
  features: Features, train: Source, names: Sequence[str], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Of the images of the training that the classifier was not trained on, labels int32 [N], and `seen_as` of them.

  Those that stand for a bad one are left out, as they are not of that class, and those of no class among `names`.
  """
  assert train.labels is not None  # as there is a classifier
  labels = train.labels()
  _, held_out = divide(labels)
  of_all, probabilities = [], []
  for first in range(0, len(held_out), batch_size):
    index = held_out[first : first + batch_size]
    rows = train.read(index)
    of_all.append(labels[index[~rows.replaced]])
    probabilities.append(features.extract(rows.images).probabilities[~rows.replaced])
  numbers = numbers_among(names, train)
  assert numbers is not None
  of_held_out = numbers[np.concatenate(of_all)]
  right = seen_as(features.name, np.concatenate(probabilities), of_held_out, numbers)
  assert right is not None
  return of_held_out[of_held_out >= 0], right[of_held_out >= 0]
