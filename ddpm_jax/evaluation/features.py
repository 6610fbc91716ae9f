"""What images are compared by: a feature extractor, whichever it is."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Extracted(NamedTuple):
  """Of B images: `features` float32 [B, D] and `probabilities` float32 [B, K] of the extractor's K >= 0 classes."""

  features: np.ndarray
  probabilities: np.ndarray


class Features(NamedTuple):
  """A feature extractor.

  Attributes:
    name: 'inception', 'classifier' or 'network': which one is part of every result, as numbers of two extractors
      cannot be compared.
    identity: SHA-256, hexadecimal, of everything that its output depends on: weights and preprocessing.
    about: facts for the result, JSON values, such as where the weights come from.
    extract: uint8 [B, H, W, C] -> `Extracted`, for any B; the same on every process.
    weights: of one that was trained on the data set: path in the network -> float32 array.
  """

  name: str
  identity: str
  about: dict[str, str | int | float]
  extract: Callable[[np.ndarray], Extracted]
  weights: Mapping[str, np.ndarray] = types.MappingProxyType({})
