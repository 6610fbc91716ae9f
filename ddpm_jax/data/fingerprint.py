"""A fingerprint of the data, kept in each checkpoint: it must be the same when a run is resumed.

It has all that the pixels depend on and that is cheap to know, and nothing else: not where the data lie, how they are
read, or by how many processes.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ddpm_jax.data.encoded import DecodedRows, EncodedImages

Fingerprint = dict[str, str | int]

_PROBES = 256
_PARTS = 4  # of the probe, each read by one call


def take(
  encoded: EncodedImages, read: Callable[[np.ndarray], DecodedRows], everything: Iterable[np.ndarray] | None = None
) -> Fingerprint:
  """The fingerprint of a data set.

  A file that is replaced by another of the same size shows in "pixels", but where the set is not in memory only if it
  is one of the 256 images of the probe. Another version of Pillow may decode a JPEG to other pixels, which shows too.

  Args:
    encoded: the data set.
    read: its images as training sees them, bad ones replaced.
    everything: all its images, each uint8 [H, W, C] and contiguous, where they are in memory.

  Returns:
    "dataset": its resolved name; "images": how many; "shape": "HxWxC"; and SHA-256 digests in hexadecimal: "listing" of
    what is known of each record without reading it, "probe" of the pixels of at most 256 images, evenly spaced, and,
    with `everything` only, "pixels" of all.

  Raises:
    UserError: an image of the probe cannot be read.
  """
  count = min(_PROBES, encoded.length)
  indices = np.arange(count) * encoded.length // count
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # 256 large JPEGs take seconds on one core
    parts = pool.map(lambda part: read(part).images.data, np.array_split(indices, min(_PARTS, count)))
    probe = _sha256(parts)
  found: Fingerprint = {
    "dataset": encoded.identity,
    "images": encoded.length,
    "shape": "x".join(map(str, encoded.shape)),
    "listing": encoded.listing,
    "probe": probe,
  }
  if everything is not None:
    found["pixels"] = _sha256(part.data for part in everything)
  return found


def of_classes(classes: np.ndarray) -> str:
  """SHA-256 of the classes int32 [N] of the images, in hexadecimal."""
  return _sha256([np.ascontiguousarray(classes, "<i4").data])


def of_array(name: str, images: np.ndarray) -> Fingerprint:
  """The fingerprint of images uint8 [N, H, W, C] that a person has made: all of their pixels."""
  shape = "x".join(map(str, images.shape[1:]))
  return {"dataset": name, "images": len(images), "shape": shape, "pixels": _sha256([images.data])}


def differences(
  before: Mapping[str, Any], after: Mapping[str, Any], *, labels: bool = False
) -> list[tuple[str, Any, Any]]:
  """The fields in which two fingerprints differ, each as (field, before, after); None for one that is not there.

  "pixels" is compared only where both have it, as `cache_gib` may change between two starts, and so is "labels", only
  where that is asked for.
  """
  both = ("pixels", "labels")
  fields = [name for name in dict.fromkeys((*before, *after)) if name not in both or (name in before and name in after)]
  if not labels:
    fields = [name for name in fields if name != "labels"]
  return [(name, before.get(name), after.get(name)) for name in fields if before.get(name) != after.get(name)]


def digest(parts: Iterable[str]) -> str:
  """SHA-256 of a list of strings without NUL, in hexadecimal; file names that are no text keep their bytes."""
  return _sha256(os.fsencode(part) + b"\0" for part in parts)


def _sha256(parts: Iterable[bytes | memoryview]) -> str:
  total = hashlib.sha256()
  for part in parts:
    total.update(part)
  return total.hexdigest()
