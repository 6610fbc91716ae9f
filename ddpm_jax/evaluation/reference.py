"""Statistics of a data set under an extractor of features: computed once, from images as they are, and cached."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax.data.sources import Source
from ddpm_jax.devices.hosts import any_host
from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.moments import Moments, add, no_moments
from ddpm_jax.workdir.arrays import UnusableError, load_arrays, save_arrays

_KEPT_NUMBERS = 2**28  # of features in memory and in the cache, 1 GiB


class Reference(NamedTuple):
  """A data set as an extractor sees it.

  Attributes:
    moments: of the features of all images.
    index: int64 [K], the images whose features are kept: all, or as many as take 1 GiB, evenly spaced.
    features: float32 [K, D], theirs.
  """

  moments: Moments
  index: np.ndarray
  features: np.ndarray


def evenly_spaced(number: int, most: int) -> np.ndarray:
  """At most `most` of the indices 0..number-1, evenly spaced: int64, rising, without repeats."""
  return np.arange(number) if number <= most else np.arange(most) * number // most


def batches_of(source: Source, index: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
  """(place in `index`, images uint8 [B, H, W, C]), B at most `size`."""
  for first in range(0, len(index), size):
    yield first, source.read(index[first : first + size]).images


def measure_reference(
  source: Source,
  features: Features,
  *,
  cache: pathlib.Path,
  batch_size: int,
  say: Callable[[str], None],
  done: Callable[[int], None] = lambda number: None,
) -> Reference:
  """The statistics of all images of a source, without augmentation, from the cache if they are there.

  They are found again by the fingerprint of the data and the identity of the extractor, so that they are computed anew
  when either changes. All processes must call it; process 0 writes the cache.

  Args:
    source: the images.
    features: what they are compared by.
    cache: folder of the cache, made if need be.
    batch_size: images at once.
    say: takes a line about what is done.
    done: told how many images after each batch. What it raises ends the work.
  """
  task, path = _task(source, features, cache)
  found = _from_cache(path, task, say)
  if not any_host(found is None) and found is not None:
    return found
  say(f"computing the features of {len(source)} images of {source.name}")
  moments, kept, index = None, [], np.empty(0, np.int64)
  for first, images in batches_of(source, np.arange(len(source)), batch_size):
    extracted = features.extract(images).features
    if moments is None:
      moments = no_moments(extracted.shape[1])
      index = evenly_spaced(len(source), _KEPT_NUMBERS // extracted.shape[1])
    moments = add(moments, extracted)
    here = index[(index >= first) & (index < first + len(images))] - first
    kept.append(extracted[here])
    done(first + len(images))
  assert moments is not None  # a source holds at least one image
  reference = Reference(moments, index, np.concatenate(kept))
  if jax.process_index() == 0:
    arrays = {"mean": moments.mean, "m2": moments.m2, "index": index, "features": reference.features}
    try:
      save_arrays(path, arrays, {"count": moments.count, "of": task})
    except OSError as error:
      say(f"warning: cannot keep the statistics in {path} ({error.strerror}); they will be computed again")
  return reference


def is_kept(source: Source, features: Features, cache: pathlib.Path) -> bool:
  """Whether the cache has the statistics of a source."""
  return _task(source, features, cache)[1].exists()


def _task(source: Source, features: Features, cache: pathlib.Path) -> tuple[str, pathlib.Path]:
  """What is computed, as text, and where it is kept."""
  task = json.dumps([source.fingerprint, len(source), features.identity], sort_keys=True)
  return task, cache / f"reference-{hashlib.sha256(task.encode()).hexdigest()[:16]}.safetensors"


def _from_cache(path: pathlib.Path, task: str, say: Callable[[str], None]) -> Reference | None:
  try:
    arrays, facts = load_arrays(path)
    if facts.get("of") != task:
      raise UnusableError("it is of other images or another extractor")
  except FileNotFoundError:
    return None
  except UnusableError as error:
    say(f"warning: {path} is damaged ({error}); computing it anew")
    return None
  return Reference(Moments(facts["count"], arrays["mean"], arrays["m2"]), arrays["index"], arrays["features"])
