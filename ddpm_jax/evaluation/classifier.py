"""Features of a small classifier that is trained on the data set's own labels, where there is no Inception network."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax.data.encoded import NoLabels
from ddpm_jax.data.sources import Source
from ddpm_jax.devices.mesh import DeviceMesh
from ddpm_jax.evaluation import trained
from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.trained import HOLD_OUT, TRAINING, Extract, Trained
from ddpm_jax.first_stage.pixels import to_float
from ddpm_jax.models.classifier import FEATURES, Classifier
from ddpm_jax.workdir.arrays import arrays_sha256

# What the features are computed by besides the weights. To be counted up when models/classifier.py changes.
_NETWORK = "classifier 1, x / 127.5 - 1"
_RECIPE = [_NETWORK, *TRAINING, HOLD_OUT, "adam, cosine"]
_EPOCHS, _LEAST, _MOST = 5, 300, 2000  # the number of training steps: that many epochs, but at least and at most
MARKS = ("right", "asked")


def classifier_features(
  source: Source,
  *,
  cache: pathlib.Path,
  mesh: DeviceMesh,
  batch_size: int,
  seed: int = 0,
  say: Callable[[str], None],
  counted: trained.Counted = trained.uncounted,
  num_steps: int = 0,
) -> Features:
  """Features and class probabilities of a classifier that is trained on `source`, or was before.

  A distance between these features is not an FID, and must not be called one. The FID is defined by one network, that
  was trained on ImageNet; this one is trained on the data set's own labels, so that its numbers have another scale for
  every data set and every training. They can be compared only where `identity` is the same: models of one data set,
  measured by one and the same classifier.

  All processes must call it. Each trains by itself, with the same code on its first device, and then takes over the
  weights of process 0, which alone reads and writes the cache: so they are the same, to the bit, on all.

  Args:
    source: the images of the training split with their labels. One in ten, spread over the classes, is held out.
    cache: folder for the weights, made if need be. They are found again by the fingerprint of the source, its labels,
      the recipe and the seed.
    mesh: the devices that extract.
    batch_size: images whose features are computed at once, over all devices.
    seed: of the first weights and of the order of the images.
    say: takes a line about what is done.
    counted: receives the number of training steps done, on every process alike; what it raises ends the training.
    num_steps: training steps of 128 images each; 0: a number that follows from that of the images.

  Returns:
    'classifier' with "classes", "accuracy" on the images held out, "trained_on" images, "updates". Images that are bad
    and skipped are neither trained on nor asked for.

  Raises:
    UserError: the images have no labels, or one cannot be read.
  """
  if source.labels is None:
    raise NoLabels(source.name)
  labels = source.labels()
  training, held_out = divide(labels)
  num_steps = num_steps or min(max(math.ceil(_EPOCHS * len(training) / trained.BATCH), _LEAST), _MOST)
  model = Classifier(num_classes=int(labels.max()) + 1)
  init = init_of(model, source.image_shape)
  extract = trained.extractor(forward_of(model), (FEATURES, model.num_classes), mesh, batch_size)

  def make() -> Trained:
    say(f"training a classifier of {model.num_classes} classes on {len(training)} images, {num_steps} training steps")
    began = time.perf_counter()
    weights = _train(model, init, source, labels, training, num_steps, seed, counted)
    found = trained.of_first_process(Trained(weights, dict.fromkeys(MARKS, 0.0)))
    found = found._replace(marks=_ask(source, labels, held_out, extract(found.weights), batch_size))
    took = time.perf_counter() - began
    say(
      f"it classifies {found.marks['right']:.0f} of {found.marks['asked']:.0f} images held out correctly; training it "
      f"took {took:.0f} s"
    )
    return found

  path = cache / f"classifier-{_task(source, labels, seed, num_steps)}.safetensors"
  found = trained.kept_or(path, trained.shapes_of(init), MARKS, make, say)
  about: dict[str, str | int | float] = {
    "classes": model.num_classes,
    "accuracy": found.marks["right"] / max(found.marks["asked"], 1),
    "trained_on": len(training),
    "updates": num_steps,
  }
  identity = arrays_sha256(found.weights, _NETWORK)
  return Features("classifier", identity, about, extract(found.weights), found.weights)


def divide(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The images that the classifier is trained on and those that are held out, int [..] each, in rising order.

  labels: int [N]. No class with enough images is left out of either.
  """
  return trained.divide(np.argsort(labels, kind="stable"))


def init_of(model: Classifier, image_shape: tuple[int, int, int]) -> trained.Init:
  """key -> fresh parameters for images [H, W, C]."""
  return lambda key: model.init(key, jnp.zeros((1, *image_shape), jnp.float32))["params"]


def forward_of(model: Classifier) -> trained.Forward:
  """(params, uint8 [B, H, W, C]) -> features [B, 64], probabilities [B, K]."""

  def forward(params: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
    features, logits = model.apply({"params": params}, to_float(batch))
    return jnp.asarray(features), jax.nn.softmax(jnp.asarray(logits))

  return forward


def _task(source: Source, labels: np.ndarray, seed: int, num_steps: int) -> str:
  """SHA-256 of everything that decides what is learnt."""
  of_labels = hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest()
  task = [source.fingerprint, source.image_shape, of_labels, int(labels.max()) + 1, _RECIPE, num_steps, seed]
  return hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()


def _train(
  model: Classifier,
  init: trained.Init,
  source: Source,
  labels: np.ndarray,
  training: np.ndarray,
  num_steps: int,
  seed: int,
  counted: trained.Counted,
) -> trained.Weights:
  """The weights after training on the images `training` int [N] of the source, on the first device of this process."""

  def loss_of(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    del key
    _, logits = model.apply({"params": params}, to_float(batch["image"]))
    losses = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), batch["label"])
    return jnp.mean(jnp.where(batch["replaced"], 0.0, losses))  # such an image is not that of its label

  return trained.train(
    init,
    source,
    training,
    loss_of,
    num_steps=num_steps,
    seed=seed,
    counted=counted,
    columns=lambda indices: {"label": labels[indices]},
  )


def _ask(
  source: Source,
  labels: np.ndarray,
  held_out: np.ndarray,
  extract: Extract,
  batch_size: int,
) -> dict[str, float]:
  """'right': how many of the images `held_out` int [N] are classified as labelled; 'asked': of how many."""
  right = asked = 0
  for start in range(0, len(held_out), batch_size):
    indices = held_out[start : start + batch_size]
    rows = source.read(indices)
    guessed = extract(rows.images).probabilities.argmax(-1)
    right += int(np.sum((guessed == labels[indices]) & ~rows.replaced))
    asked += int(np.sum(~rows.replaced))
  return {"right": right, "asked": asked}
