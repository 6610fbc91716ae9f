"""Features of a small network that is trained without labels, to recognise by how much an image is turned."""

from __future__ import annotations

import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax.data import images
from ddpm_jax.data.sources import Source
from ddpm_jax.evaluation import trained
from ddpm_jax.evaluation.arrays import arrays_sha256
from ddpm_jax.evaluation.features import Extracted, Features
from ddpm_jax.evaluation.trained import NETWORK, TRAINING, Extract, Trained
from ddpm_jax.models.classifier import Classifier
from ddpm_jax.training.parallel import Parallel

_HOLD_OUT = 10  # one image of that many
_RECIPE = [NETWORK, *TRAINING, _HOLD_OUT, "adam, cosine", "turns 1"]
COUNTS = ("right", "asked")


def network_features(
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
  """Features of a network that is trained on `source` without labels, or was before.

  It is that of `classifier_features`, and learns to say by how many quarters an image was turned (Gidaris et al. 2018),
  for which it has to know what the images show. It depends on the data set and on nothing of a run: so checkpoints, and
  runs on the same data, can be compared, which the features of a run's own U-Net would not allow. What was measured to
  choose it is in docs/measuring.md.

  As with the classifier, a distance between these features is not an FID, and can be compared only where `identity` is
  the same. All processes must call it, and have the same network afterwards.

  Args:
    source: the images of the training split. One in ten is held out.
    cache: folder for the weights, made if need be. They are found again by the fingerprint of the source, the recipe
      and the seed.
    parallel: the devices that extract.
    batch_size: images whose features are computed at once, over all devices.
    seed: of the first weights, of the order of the images, and of the turns.
    say: takes a line about what is done.
    beat: called now and then while it trains, on every process alike; what it raises ends the training.
    updates: of 128 images each; 0: a number that follows from that of the images.

  Returns:
    'network' with "accuracy", the share of turned images among those held out whose turn it recognises, "trained_on"
    images, "updates". Its probabilities are [B, 0], as it knows no classes of images.

  Raises:
    UserError: an image cannot be read.
  """
  number, (height, width, _) = len(source), source.image_shape
  turns = (0, 1, 2, 3) if height == width else (0, 2)
  is_held_out = np.arange(number) % _HOLD_OUT == _HOLD_OUT // 2
  training, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
  updates = updates or trained.usual_updates(len(training))
  model = Classifier(num_classes=len(turns))
  extract = trained.extractor(model, parallel, batch_size)

  def make() -> Trained:
    say(f"training a network for the features on {len(training)} images without labels, {updates} updates")
    began = time.perf_counter()
    loss_of = _loss(model, turns)
    weights = trained.train(model, source, training, loss_of, updates=updates, seed=seed, beat=beat)
    found = trained.of_first_process(Trained(weights, dict.fromkeys(COUNTS, 0)))
    found = found._replace(counts=_ask(source, held_out, turns, extract(found.weights), batch_size))
    took = time.perf_counter() - began
    say(f"it knows how {found.counts['right']} of {found.counts['asked']} images were turned; that took {took:.0f} s")
    return found

  task = json.dumps([source.fingerprint, source.image_shape, _RECIPE, updates, seed], sort_keys=True)
  path = cache / f"network-{hashlib.sha256(task.encode()).hexdigest()}.safetensors"
  found = trained.kept_or(path, trained.shapes_of(model, source.image_shape), COUNTS, make, say)
  about: dict[str, str | int | float] = {
    "accuracy": found.counts["right"] / max(found.counts["asked"], 1),
    "trained_on": len(training),
    "updates": updates,
  }
  with_turns = extract(found.weights)

  def without_turns(batch: np.ndarray) -> Extracted:
    return Extracted(with_turns(batch).features, np.zeros((len(batch), 0), np.float32))

  return Features("network", arrays_sha256(found.weights, NETWORK), about, without_turns)


def _loss(model: Classifier, turns: tuple[int, ...]) -> trained.Loss:
  """The cross-entropy of the turns, of images that are each turned by one of them."""

  def loss_of(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    x = images.to_float(batch["image"])
    turn = jax.random.randint(key, (len(x),), 0, len(turns))
    turned = jnp.stack([jnp.rot90(x, quarters, axes=(1, 2)) for quarters in turns])[turn, jnp.arange(len(x))]
    _, logits = model.apply({"params": params}, turned)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), turn))

  return loss_of


def _ask(
  source: Source, held_out: np.ndarray, turns: tuple[int, ...], extract: Extract, batch_size: int
) -> dict[str, int]:
  """'right': of how many of the images `held_out` int [N], each turned in all ways, the turn is known; 'asked'."""
  right = 0
  for start in range(0, len(held_out), batch_size):
    rows = source.read(held_out[start : start + batch_size]).images
    for place, quarters in enumerate(turns):
      guessed = extract(np.rot90(rows, quarters, axes=(1, 2))).probabilities.argmax(-1)
      right += int(np.sum(guessed == place))
  return {"right": right, "asked": len(held_out) * len(turns)}
