"""Samples beside the data: what an extractor of features says of both, in numbers and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.data.sources import Source
from ddpm_jax.evaluation import measures, neighbours
from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.moments import Moments, add, covariance, moments_by_class, no_moments
from ddpm_jax.evaluation.reference import Reference, batches_of, evenly_spaced

MOST = 10_000  # features of either side, as Naeem et al. 2020 take; Kynkäänniemi et al. 2019 take 50,000
_LOOKED_UP = 1_000  # samples whose nearest training images are looked for
_SHOWN, _NEAREST = 8, 7  # rows and neighbours of the picture
# By extractor: what a number is called; "reconstruction" is the distance of images from their reconstructions. Only
# Inception's are an FID and an Inception Score.
NAMES = {
  "inception": {
    "frechet": "fid",
    "kid": "kid",
    "score": "inception_score",
    "classes": "intra_fid",
    "reconstruction": "rfid",
  },
  "classifier": {
    "frechet": "classifier_distance",
    "kid": "classifier_kid",
    "score": "classifier_score",
    "classes": "classifier_intra_distance",
    "reconstruction": "classifier_reconstruction_distance",
  },
  "network": {
    "frechet": "network_distance",
    "kid": "network_kid",
    "classes": "network_intra_distance",
    "reconstruction": "network_reconstruction_distance",
  },
}
# Images of the data that a measure is defined for: the k-th neighbour is another point.
LEAST_IMAGES = {"frechet": 2, "kid": 2, "precision_recall": 4, "density_coverage": 6, "neighbours": 2}


class Seen(NamedTuple):
  """Samples as an extractor sees them.

  Attributes:
    moments: of the features of all.
    probabilities: float32 [N, K], of the extractor's classes, of all.
    index: int64 [S], samples whose features are kept: all, or 10,000 evenly spaced.
    features: float32 [S, D], theirs.
    by_class: of all features of a class, see `moments_by_class`; {} where that is not asked for.
  """

  moments: Moments
  probabilities: np.ndarray
  index: np.ndarray
  features: np.ndarray
  by_class: Mapping[int, Moments] = {}


def see(
  features: Features,
  images: np.ndarray,
  batch_size: int,
  done: Callable[[int], None],
  labels: np.ndarray | None = None,
) -> Seen:
  """Extracts the features of images.

  Args:
    features: the extractor.
    images: uint8 [N, H, W, C].
    batch_size: images at once.
    done: called with the number done, after each batch.
    labels: int [N], for the moments by class; None: these are not asked for.
  """
  index, moments, kept, probabilities, every = evenly_spaced(len(images), MOST), None, [], [], []
  for first in range(0, len(images), batch_size):
    extracted = features.extract(np.asarray(images[first : first + batch_size]))
    if moments is None:
      moments = no_moments(extracted.features.shape[1])
    moments = add(moments, extracted.features)
    probabilities.append(extracted.probabilities)
    kept.append(extracted.features[index[(index >= first) & (index < first + batch_size)] - first])
    every += [] if labels is None else [extracted.features]
    done(min(first + batch_size, len(images)))
  if moments is None:
    raise ValueError("no images")
  of_classes = {} if labels is None else moments_by_class(np.concatenate(every), labels)
  return Seen(moments, np.concatenate(probabilities), index, np.concatenate(kept), of_classes)


def compare(names: Sequence[str], extractor: str, reference: Reference, seen: Seen) -> dict[str, float | int]:
  """The measures `names` between samples and data, under names that say which extractor they are of.

  KID, precision, recall, density and coverage compare sets of features of equal size, "set_size": with more real ones
  than samples, most would have no sample near, and coverage and recall would say how many samples there are.
  """
  found: dict[str, float | int] = {}
  called = NAMES[extractor]
  # In two steps, so that a file of reference statistics, which has as many, gives the same.
  kept = reference.features[evenly_spaced(len(reference.features), MOST)]
  size = min(len(kept), len(seen.features))
  real, fake = (features[evenly_spaced(len(features), size)] for features in (kept, seen.features))
  if "frechet" in names:
    found[called["frechet"]] = measures.frechet_distance(
      seen.moments.mean, covariance(seen.moments), reference.moments.mean, covariance(reference.moments)
    )
  if "kid" in names:
    # Subsets smaller than the sets, or their spread would be nothing.
    mean, deviation = measures.kid(fake, real, subset_size=min(1000, max(2, size // 2)))
    found |= {called["kid"]: mean, f"{called['kid']}_std": deviation}
  if "score" in names:
    mean, deviation = measures.inception_score(seen.probabilities)
    found |= {called["score"]: mean, f"{called['score']}_std": deviation}
  if "precision_recall" in names:
    found["precision"], found["recall"] = measures.precision_recall(real, fake)
  if "density_coverage" in names:
    found["density"], found["coverage"] = measures.density_coverage(real, fake)
  if any(name in names for name in ("kid", "precision_recall", "density_coverage")):
    found["set_size"] = size
  return found


def look_up(
  images: np.ndarray,
  seen: Seen,
  train: Source,
  reference: Reference,
  features: Features,
  batch_size: int,
  *,
  flips: bool,
  done: Callable[[int], None] = lambda number: None,
) -> tuple[dict[str, Any], np.ndarray]:
  """The training images nearest to samples, by pixels and by features: is the model only remembering?

  A model that was trained with flips has seen each image in two orientations, and may copy either. So there each sample
  is looked up twice, as it is and mirrored, and a training image is as near as the nearer of the two: by pixels that is
  the distance to the nearer orientation of the training image.

  Args:
    images: the samples, uint8 [N, H, W, C].
    seen: their features.
    train: the images of the training.
    reference: their features.
    features: the extractor of both.
    batch_size: images at once.
    flips: whether training mirrored images.
    done: called with the number of training images compared so far, now and then. What it raises ends the work.

  Returns:
    For "pixels" and "features": the share of near-duplicates (see `neighbours.near_duplicates`), the median distance
    to the nearest, the number of samples, of training images, and of orientations that were looked up. And a picture
    of samples, those nearest by pixels of all first, with their nearest training images by pixels, in the orientation
    that is nearer.
  """
  chosen = evenly_spaced(len(seen.index), _LOOKED_UP)
  samples = np.asarray(images[seen.index[chosen]])
  nearest = min(_NEAREST, len(train), len(reference.features))
  if nearest < 2:
    raise ValueError("a training set of one image has no second nearest")

  def blocks() -> Iterator[tuple[int, np.ndarray]]:
    for first, block in batches_of(train, np.arange(len(train)), batch_size):
      yield first, block.reshape(len(block), -1)
      done(first + len(block))

  queries = [samples, samples[:, :, ::-1]] if flips else [samples]  # uint8 [S, H, W, C]: the third axis is the width
  by_features, by_pixels = [seen.features[chosen]], np.concatenate(queries)
  for mirrored in queries[1:]:
    parts = [mirrored[first : first + batch_size] for first in range(0, len(mirrored), batch_size)]
    by_features.append(np.concatenate([features.extract(part).features for part in parts]))
  pixel_distances, where, mirrored = _nearest(by_pixels, len(samples), blocks(), nearest)
  feature_distances, _, _ = _nearest(np.concatenate(by_features), len(samples), [(0, reference.features)], nearest)
  order = np.argsort(pixel_distances[:, 0], kind="stable")[:_SHOWN]
  shown = train.read(where[order].ravel()).images.reshape(len(order), nearest, *train.image_shape)
  shown = np.where(mirrored[order][..., None, None, None], shown[:, :, :, ::-1], shown)
  facts = {
    space: {
      "near_duplicates": float(neighbours.near_duplicates(distances).mean()),
      "median_distance": float(np.median(distances[:, 0])),
      "number": len(samples),
      "training_images": number,
      "orientations": len(queries),
    }
    for space, distances, number in (
      ("pixels", pixel_distances, len(train)),
      ("features", feature_distances, len(reference.features)),
    )
  }
  return facts, neighbours.picture(samples[order], shown, mirrored[order] if flips else None)


def near_duplicates_of(facts: Mapping[str, Any]) -> dict[str, float]:
  """The shares of near-duplicates that `look_up` found, by name."""
  return {f"near_duplicates_{space}": found["near_duplicates"] for space, found in facts.items()}


def _nearest(
  queries: np.ndarray, number: int, references: Iterable[tuple[int, np.ndarray]], k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Distances, indices, and whether mirrored, each [number, k], of `number` queries that may be there mirrored too."""
  distances, indices = neighbours.nearest(queries.reshape(len(queries), -1), references, k)
  given, mirrored = ((distances[part], indices[part]) for part in (slice(number), slice(number, None)))
  if not len(mirrored[0]):
    return *given, np.zeros(given[0].shape, bool)
  return neighbours.nearer_orientation(given, mirrored)
