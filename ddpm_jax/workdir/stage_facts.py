"""What is said of the first stage of a latent model, on the terminal, on pages and on cards."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_DIGITS = 12  # of a digest


class StageFacts(NamedTuple):
  """A first stage.

  Attributes:
    regularizer: 'kl' or 'vq'.
    codebook_size: vectors of 'vq'.
    latent_shape: h, w, z.
    sha256: of its parameters, hexadecimal; '' where it is not known.
  """

  regularizer: str
  codebook_size: int
  latent_shape: tuple[int, int, int]
  sha256: str = ""

  @property
  def kind(self) -> str:
    """'KL autoencoder', or how many vectors one with a codebook has."""
    return "KL autoencoder" if self.regularizer == "kl" else f"VQ autoencoder with {self.codebook_size:,} vectors"

  @property
  def shape(self) -> str:
    """Of the latents, such as '16x16x4'."""
    return "x".join(map(str, self.latent_shape))

  @property
  def digest(self) -> str:
    """The first digits of the digest."""
    return self.sha256[:_DIGITS]

  @property
  def text(self) -> str:
    """'16x16x4 of a KL autoencoder'."""
    return f"{self.shape} of a {self.kind}"


def facts_of_settings(settings: Any) -> StageFacts | None:
  """Those of `first_stage/settings.json`, parsed; None if anything else was found there.

  >>> network = {"regularizer": "vq", "codebook_size": 512, "latent_channels": 3, "channel_multipliers": [1, 2]}
  >>> facts_of_settings({"image_shape": [32, 48, 3], "network": network, "sha256": "70454eb832dbb4c0"}).text
  '16x24x3 of a VQ autoencoder with 512 vectors'
  """
  try:
    network, (height, width, _) = settings["network"], settings["image_shape"]
    factor, sha256 = 2 ** (len(network["channel_multipliers"]) - 1), settings["sha256"]
    numbers = network["codebook_size"], height // factor, width // factor, network["latent_channels"]
    known = network["regularizer"] in ("kl", "vq") and re.fullmatch("[0-9a-f]+", sha256)
    if not known or any(type(number) is not int for number in numbers):
      return None
  except (KeyError, TypeError, ValueError, IndexError):
    return None
  codebook_size, *shape = numbers
  return StageFacts(network["regularizer"], codebook_size, (shape[0], shape[1], shape[2]), sha256)
