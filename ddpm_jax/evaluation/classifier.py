"""Features of a small classifier that is trained on the data set's own labels, where there is no Inception network."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from ddpm_jax.data import images, pipeline
from ddpm_jax.data.encoded import NoLabels
from ddpm_jax.data.sources import Source
from ddpm_jax.evaluation.arrays import UnusableError, arrays_sha256, load_arrays, save_arrays
from ddpm_jax.evaluation.features import Extracted, Features
from ddpm_jax.keys import stream_key
from ddpm_jax.models.classifier import FEATURES, Classifier
from ddpm_jax.training.parallel import Parallel, from_all_processes

Weights = dict[str, np.ndarray]  # path in the network -> float32 array

# What the features are computed by besides the weights. To be counted up when models/classifier.py changes.
_NETWORK = "classifier 1, x / 127.5 - 1"
_BATCH = 128
_EPOCHS, _LEAST, _MOST = 5, 300, 2000  # the number of updates: that many epochs, but at least and at most
_RATE, _WARMUP = 3e-3, 50
_HOLD_OUT = 10  # one image of that many
_BEAT_EVERY = 50  # updates
_RECIPE = [_NETWORK, _BATCH, _RATE, _WARMUP, _HOLD_OUT, "adam, cosine"]


class _Trained(NamedTuple):
  """A trained classifier, and how many of how many held-out images it knows."""

  weights: Weights
  right: int
  asked: int


def classifier_features(
  source: Source,
  *,
  cache: pathlib.Path,
  parallel: Parallel,
  batch_size: int,
  seed: int = 0,
  say: Callable[[str], None],
  beat: Callable[[str], None] = lambda what: None,
  updates: int = 0,
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
    parallel: the devices that extract.
    batch_size: images whose features are computed at once, over all devices.
    seed: of the first weights and of the order of the images.
    say: takes a line about what is done.
    beat: called now and then while it trains, on every process alike; what it raises ends the training.
    updates: of 128 images each; 0: a number that follows from that of the images.

  Returns:
    'classifier' with "classes", "accuracy" on the images held out, "trained_on" images, "updates". Images that are bad
    and skipped are neither trained on nor asked for.

  Raises:
    UserError: the images have no labels, or one cannot be read.
  """
  if source.labels is None:
    raise NoLabels(source.name)
  labels = source.labels()
  training, held_out = _divide(labels)
  updates = updates or min(max(math.ceil(_EPOCHS * len(training) / _BATCH), _LEAST), _MOST)
  model = Classifier(num_classes=int(labels.max()) + 1)
  shapes = _flat(jax.eval_shape(lambda: _init(model, source.image_shape, seed)))
  path = cache / f"classifier-{_task(source, labels, seed, updates)}.safetensors"

  trained = _load(path, shapes, say) if jax.process_index() == 0 else None
  if from_all_processes(np.asarray(trained is not None))[0]:
    trained = trained or _Trained({name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}, 0, 0)
    trained = _from_first_process(trained)
    extract = _extractor(model, trained.weights, parallel, batch_size)
  else:
    say(f"training a classifier of {model.num_classes} classes on {len(training)} images, {updates} updates")
    began = time.perf_counter()
    weights = _train(model, source, labels, training, updates, seed, beat)
    trained = _from_first_process(_Trained(weights, 0, 0))
    extract = _extractor(model, trained.weights, parallel, batch_size)
    trained = trained._replace(**_ask(source, labels, held_out, extract, batch_size))
    say(f"it knows {trained.right} of {trained.asked} other images; that took {time.perf_counter() - began:.0f} s")
    if jax.process_index() == 0:
      _save(path, trained, say)
  about: dict[str, str | int | float] = {
    "classes": model.num_classes,
    "accuracy": trained.right / max(trained.asked, 1),
    "trained_on": len(training),
    "updates": updates,
  }
  return Features("classifier", arrays_sha256(trained.weights, _NETWORK), about, extract)


def _divide(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The images to train on and those to hold out: every tenth in the order of the classes, so that none is left out.

  labels: int [N], N >= 2. Returns int [..] each, in rising order.
  """
  by_class = np.argsort(labels, kind="stable")
  is_held_out = np.zeros(len(labels), bool)
  is_held_out[by_class[_HOLD_OUT // 2 :: _HOLD_OUT] if len(labels) > _HOLD_OUT else by_class[:1]] = True
  return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _task(source: Source, labels: np.ndarray, seed: int, updates: int) -> str:
  """SHA-256 of everything that decides what is learnt."""
  of_labels = hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest()
  task = [source.fingerprint, source.image_shape, of_labels, int(labels.max()) + 1, _RECIPE, updates, seed]
  return hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()


def _init(model: Classifier, image_shape: tuple[int, int, int], seed: int) -> Any:
  """Fresh parameters, a nested dict."""
  key = jax.random.fold_in(stream_key(seed, "classifier"), 0)
  return model.init(key, jnp.zeros((1, *image_shape), jnp.float32))["params"]


def _flat(params: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(params, sep="/")


def _forward(model: Classifier, params: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
  """uint8 [B, H, W, C] -> features [B, 64], logits [B, K]."""
  features, logits = model.apply({"params": params}, images.to_float(batch))
  return jnp.asarray(features), jnp.asarray(logits)


def _train(
  model: Classifier,
  source: Source,
  labels: np.ndarray,
  training: np.ndarray,
  updates: int,
  seed: int,
  beat: Callable[[str], None],
) -> Weights:
  """The weights after training on the images `training` int [N] of the source, on the first device of this process."""
  optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, _RATE, min(_WARMUP, updates // 2), updates))

  def loss_of(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    _, logits = _forward(model, params, batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jnp.mean(jnp.where(batch["replaced"], 0.0, losses))  # such an image is not that of its label

  @jax.jit
  def update(params: Any, state: Any, batch: dict[str, jax.Array]) -> tuple[Any, Any, jax.Array]:
    loss, gradient = jax.value_and_grad(loss_of)(params, batch)
    changes, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, changes), state, loss

  part = dataclasses.replace(source, length=len(training), read=lambda indices: source.read(training[indices]))
  shuffle = int(jax.random.bits(jax.random.fold_in(stream_key(seed, "classifier"), 1)))
  order = pipeline.order(len(part), batch_size=_BATCH, seed=shuffle)
  with jax.default_device(jax.local_devices()[0]):
    params = jax.jit(lambda: _init(model, source.image_shape, seed))()
    state, loss = optimizer.init(params), jnp.zeros(())
    batches = pipeline.batches(part, batch_size=_BATCH, seed=shuffle, start_step=0)
    with contextlib.closing(batches):
      for step, batch in zip(range(updates), batches, strict=False):
        batch["label"] = labels[training[order[step]]]
        before = loss
        params, state, loss = update(params, state, batch)
        before.block_until_ready()  # one update runs ahead, and no more batches wait on the device
        if step % _BEAT_EVERY == 0:
          beat(f"update {step} of the classifier")
  return {name: np.asarray(leaf) for name, leaf in _flat(params).items()}


def _from_first_process(trained: _Trained) -> _Trained:
  """What process 0 has, on every process; all must call it, with arrays of the same shapes."""
  counts = from_all_processes(np.asarray([trained.right, trained.asked], np.int32))[0]
  weights = {name: from_all_processes(leaf)[0] for name, leaf in sorted(trained.weights.items())}
  return _Trained(weights, int(counts[0]), int(counts[1]))


def _extractor(
  model: Classifier, weights: Weights, parallel: Parallel, batch_size: int
) -> Callable[[np.ndarray], Extracted]:
  """`Features.extract`."""

  def forward(params: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
    features, logits = _forward(model, params, batch)
    return features, jax.nn.softmax(logits)

  params = jax.device_put(traverse_util.unflatten_dict(weights, sep="/"), parallel.replicated)
  compiled = parallel.by_rows(forward)

  def extract(batch: np.ndarray) -> Extracted:
    features = np.empty((len(batch), FEATURES), np.float32)
    probabilities = np.empty((len(batch), model.num_classes), np.float32)
    for start in range(0, len(batch), batch_size):
      rows = slice(start, start + batch_size)
      features[rows], probabilities[rows] = compiled(params, batch[rows], size=batch_size)
    return Extracted(features, probabilities)

  return extract


def _ask(
  source: Source,
  labels: np.ndarray,
  held_out: np.ndarray,
  extract: Callable[[np.ndarray], Extracted],
  batch_size: int,
) -> dict[str, int]:
  """'right': how many of the images `held_out` int [N] are classified as labelled; 'asked': of how many."""
  right = asked = 0
  for start in range(0, len(held_out), batch_size):
    indices = held_out[start : start + batch_size]
    rows = source.read(indices)
    guessed = extract(rows.images).probabilities.argmax(-1)
    right += int(np.sum((guessed == labels[indices]) & ~rows.replaced))
    asked += int(np.sum(~rows.replaced))
  return {"right": right, "asked": asked}


def _save(path: pathlib.Path, trained: _Trained, say: Callable[[str], None]) -> None:
  """Writes the classifier into the cache, or says that it could not."""
  arrays = {name: np.ascontiguousarray(leaf) for name, leaf in trained.weights.items()}
  try:
    save_arrays(path, arrays, {"right": trained.right, "asked": trained.asked})
  except OSError as error:
    say(f"{path} cannot be written ({error.strerror}); the classifier will be trained anew next time")


def _load(path: pathlib.Path, shapes: dict[str, Any], say: Callable[[str], None]) -> _Trained | None:
  """The classifier in the cache; None if there is none, or it is not what was saved, which is said.

  shapes: names of the weights -> what has their shapes and types.
  """
  try:
    weights, facts = load_arrays(path)
  except FileNotFoundError:
    return None
  except UnusableError as error:
    reason = str(error)
  else:
    if {n: (w.shape, w.dtype) for n, w in weights.items()} == {n: (s.shape, s.dtype) for n, s in shapes.items()}:
      return _Trained(weights, facts["right"], facts["asked"])
    reason = "it is of another network"
  say(f"{path} cannot be used ({reason}); training the classifier anew")
  return None
