"""The classes of what is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddpm_jax.config import SampleConfig, flag_text
from ddpm_jax.data.encoded import NoLabels
from ddpm_jax.data.labels import number_of
from ddpm_jax.data.sources import Source
from ddpm_jax.diffusion.guidance import within
from ddpm_jax.diffusion.schedules import Level
from ddpm_jax.errors import UserError
from ddpm_jax.weights.load import Weights

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio, rounded to an odd number


class Classes(NamedTuple):
  """The classes of the images of a draw.

  Attributes:
    turn: int32 [n], taken in turn: image i is of class turn[i % n].
    names: of all classes of the model.
    proportional: `turn` are the labels of a data set in rising order, n below 2^32, and image i is of class
      turn[floor(n u_i)] with u_i = frac((i + 1) / golden ratio). So any first N images have the proportions of the data
      set: a class with the share p has N p of them, but for less than 2 where N is a Fibonacci number (the inequality
      of Denjoy and Koksma), and less than 6 for any N up to 50,000.
  """

  turn: np.ndarray
  names: tuple[str, ...]
  proportional: bool = False

  def of(self, index: np.ndarray) -> np.ndarray:
    """The labels int32 [B] of images int [B]."""
    if not self.proportional:
      return self.turn[index % len(self.turn)]
    digits = (np.asarray(index, np.uint64) + np.uint64(1)) * _GOLDEN >> np.uint64(32)  # of u_i, the first 32 bits
    return self.turn[(digits * np.uint64(len(self.turn)) >> np.uint64(32)).astype(np.int64)]

  @property
  def identity(self) -> str:
    """SHA-256 of what the labels depend on."""
    return hashlib.sha256(self.turn.tobytes() + b"proportional" * self.proportional).hexdigest()

  def names_of(self, labels: np.ndarray) -> list[str]:
    """For people; a label beyond them is the null label."""
    return [self.names[label] if label < len(self.names) else "any" for label in labels.tolist()]


def wanted(options: SampleConfig, weights: Weights) -> Classes | None:
  """The classes that `--classes` names, or all; None for an unconditional model without a classifier.

  Raises:
    UserError: for a class that is not there, or any for an unconditional model; the nearest names are offered.
  """
  for name, guide in (("guide_with", weights.guide), ("classifier", weights.classifier)):
    if getattr(options, name) and guide is None:
      raise UserError(f"{name}: cannot guide what a training run draws; leave it out, and use --mode=evaluate")
  check_guidance(options, weights)
  known = known_by(weights)
  if known is None:
    if options.classes:
      raise UserError(
        f"classes: {','.join(options.classes)} has no effect, as the model is unconditional; leave it out, or train "
        "one with --conditioning=class"
      )
    return None
  names = known.class_names
  owner, everything = f"the {_owner(weights)}", range(known.num_drawn)
  numbers = [number_of(word, "classes", owner, names) for word in options.classes] or everything
  return Classes(np.array(numbers, np.int32), names)


def _owner(weights: Weights) -> str:
  """Of the classes, for people."""
  return "model" if weights.run.conditional else "classifier"


def known_by(weights: Weights) -> Weights | None:
  """Whose classes images are drawn by: the model's, else those of its classifier; None if it has none."""
  return weights if weights.run.conditional else weights.classifier


def labels_of(source: Source) -> np.ndarray | None:
  """The class of each image, int32 [N]; None if they have none. Raises UserError if they cannot be read."""
  try:
    return source.labels() if source.labels else None
  except NoLabels:
    return None


def numbers_among(names: Sequence[str], source: Source) -> np.ndarray | None:
  """The number that each class of a source has among `names`, int32 [K], or -1; None if its images have no classes.

  Classes go by their names; by number where none is known by both sides, and one of them has but numbers.
  """
  labels = labels_of(source)
  if labels is None:
    return None
  theirs = source.known_classes().names
  number = max(len(theirs), int(labels.max()) + 1)
  numbered = any(tuple(map(str, range(len(side)))) == tuple(side) for side in (theirs, names))
  if tuple(theirs) == tuple(names[: len(theirs)]) or (numbered and not {*theirs} & {*names}):
    return np.where(np.arange(number) < len(names), np.arange(number), -1).astype(np.int32)
  place = {name: index for index, name in reversed(list(enumerate(names)))}
  return np.array([place.get(name, -1) for name in theirs], np.int32)


def labels_among(names: Sequence[str], source: Source) -> np.ndarray | None:
  """As `labels_of`, but with the numbers that the classes have among `names`, and -1 for those that are none."""
  labels, numbers = labels_of(source), numbers_among(names, source)
  return None if labels is None or numbers is None else numbers[labels]


def of_given(options: SampleConfig, weights: Weights, labels: np.ndarray | None) -> Classes | None:
  """The classes of images that are given: those that `--classes` names, their own, or else the null label.

  Args:
    options: of drawing.
    weights: of the model.
    labels: int32 [N], their own, as of `labels_among`; None if they are not known.

  Raises:
    UserError: as `wanted`, or no class is known and the model, or its guide, has no null label.
  """
  classes = wanted(options, weights)
  if classes is None or options.classes:
    return classes
  if labels is None:
    told = [model.run for model in (weights, weights.guide) if model is not None and model.run.conditional]
    if weights.classifier is not None or any(run.null_label is None for run in told):
      raise UserError("classes: the model draws by class, and the images have none; name it with --classes")
    labels = np.array([weights.run.null_label], np.int32)
  if labels.min() < 0:
    raise UserError(
      f"classes: image {int(labels.argmin())} is of none of the {len(classes.names)} classes of the {_owner(weights)}; "
      "name some with --classes"
    )
  return classes._replace(turn=labels)


def check_guidance(options: SampleConfig, weights: Weights) -> None:
  """Raises UserError where there is nothing to guide by, neither a null label nor a guide of its own, or nowhere."""
  scale = next((scale for scale in options.guidance_scale if scale != 1.0), None)
  if scale is None:
    return
  sigma = np.sqrt(1 / weights.run.schedule.alpha_bar[1:] - 1)
  levels = Level(alpha=np.ones_like(sigma), sigma=sigma, time=0)
  if options.guidance_interval and not number_within(options.guidance_interval, levels):
    raise UserError(
      f"guidance_interval: {flag_text(options.guidance_interval)} holds none of the noise levels of this model, "
      f"{sigma[0]:.4g} to {sigma[-1]:.4g}; write two of these"
    )
  if weights.guide is not None or weights.run.null_label is not None:
    return
  why = "is unconditional" if not weights.run.conditional else "was trained without --label_dropout"
  raise UserError(
    f"guidance_scale: {scale} has no effect, as the model {why}; use 1, or name a worse model with --guide_with"
  )


def number_within(interval: Sequence[float], levels: Level) -> int:
  """How many of the levels, arrays [N], are in `--guidance_interval`; all of them where it is empty."""
  low, high = interval or (0.0, np.inf)
  return int(np.sum(within(levels, (low, high))))


def one_scale(options: SampleConfig) -> float:
  """The guidance scale. Raises UserError if there are several."""
  first, *others = options.guidance_scale
  if others:
    text = flag_text(options.guidance_scale)
    raise UserError(f"guidance_scale: {text} are several, which --mode=evaluate compares; name one to draw with")
  return first
