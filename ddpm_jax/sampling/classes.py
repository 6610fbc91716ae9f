"""The classes of what is drawn."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from ddpm_jax.config import SampleConfig, flag_text
from ddpm_jax.data.labels import number_of
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
  check_guidance(options, weights)
  if options.classifier and weights.classifier is None:
    raise UserError("classifier: cannot guide what a training run draws; leave it out, and use --mode=evaluate")
  known = weights if weights.run.conditional else weights.classifier
  if known is None:
    if options.classes:
      raise UserError(
        f"classes: {','.join(options.classes)} has no effect, as the model is unconditional; leave it out, or train "
        "one with --conditioning=class"
      )
    return None
  names = known.class_names
  numbers = [number_of(word, "classes", "the model", names) for word in options.classes] or range(known.num_drawn)
  return Classes(np.array(numbers, np.int32), names)


def of_given(options: SampleConfig, weights: Weights, labels: np.ndarray | None) -> Classes | None:
  """The classes of images that are given: those that `--classes` names, their own, or else the null label.

  Args:
    options: of drawing.
    weights: of the model.
    labels: int32 [N], their own; None if they are not known.

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
  return classes._replace(turn=labels)


def check_guidance(options: SampleConfig, weights: Weights) -> None:
  """Raises UserError where there is nothing to guide by: neither a null label nor a guide of its own."""
  scale = next((scale for scale in options.guidance_scale if scale != 1.0), None)
  if scale is None or weights.guide is not None or weights.run.null_label is not None:
    return
  why = "is unconditional" if not weights.run.conditional else "was trained without --label_dropout"
  raise UserError(
    f"guidance_scale: {scale} has no effect, as the model {why}; use 1, or name a worse model with --guide_with"
  )


def one_scale(options: SampleConfig) -> float:
  """The guidance scale. Raises UserError if there are several."""
  first, *others = options.guidance_scale
  if others:
    text = flag_text(options.guidance_scale)
    raise UserError(f"guidance_scale: {text} are several, which --mode=evaluate compares; name one to draw with")
  return first
