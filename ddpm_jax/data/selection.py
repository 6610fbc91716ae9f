"""The images of some classes alone, `--only=CLASS,...`."""

from __future__ import annotations

import dataclasses

import numpy as np

from ddpm_jax.data import fingerprint, labels
from ddpm_jax.data.encoded import EncodedImages, Labels, NoLabels
from ddpm_jax.errors import UserError


def select(encoded: EncodedImages, only: str) -> EncodedImages:
  """The images of the classes that `only` names, in their order; the classes are numbered anew from 0, in theirs.

  Raises:
    UserError: the images have no classes, none of such a name, or no image is of one of these.
  """
  try:
    if encoded.classes is None:
      raise NoLabels(encoded.name)
    classes, names = encoded.classes()
  except NoLabels as error:
    raise UserError(f"only: {only!r} chooses by class, and {encoded.name} {error.why}; leave --only out") from None
  numbers = labels.numbers_of(only, encoded.name, names)
  places = np.flatnonzero(np.isin(classes, numbers))
  chosen, own = np.searchsorted(numbers, classes[places]).astype(np.int32), tuple(names[number] for number in numbers)
  if not len(places):
    raise UserError(f"only: no image of {encoded.name} is of class {' or '.join(own)}; choose others")

  def selected() -> Labels:
    if len(own) < 2:
      raise NoLabels(encoded.name, f"has one class alone with --only={only}")
    return Labels(chosen, own)

  def listing(rows: np.ndarray) -> str:
    if encoded.part_listing:
      return encoded.part_listing(places[rows])
    return fingerprint.digest([encoded.listing, *map(str, places[rows].tolist())])

  fetch, label, file_name = encoded.fetch, encoded.label, encoded.file_name
  return dataclasses.replace(
    encoded,
    length=len(places),
    listing=listing(np.arange(len(places))),
    fetch=lambda indices: fetch(places[indices].tolist()),
    label=lambda index: label(int(places[index])),
    classes=selected,
    class_names=own if len(own) < 2 else None,  # else `selected` has them, and reads nothing
    part_listing=listing,
    file_name=file_name and (lambda index: file_name(int(places[index]))),
  )
