"""Images that a task starts from: the user's files, or the first of the run's data set."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.data import folder, images
from ddpm_jax.data.sources import Source, open_source
from ddpm_jax.errors import UserError
from ddpm_jax.runtime.paths import expanded
from ddpm_jax.sampling.classes import labels_among


class Given(NamedTuple):
  """Images uint8 [N, H, W, C], and their classes int32 [N], see `classes.labels_among`; None if they are not known."""

  images: np.ndarray
  labels: np.ndarray | None = None


def given_images(
  config: Config,
  image_shape: tuple[int, int, int],
  number: int,
  accept: Callable[[Source], None] = lambda source: None,
  *,
  classes: Sequence[str] = (),
) -> Given:
  """`number` images of the shape that the model has, from `--input_images` or the data set.

  Files are resized like those of a data set where the run has `image_size`, to their centres; else they must fit.

  Args:
    config: of the run.
    image_shape: (H, W, C).
    number: of images.
    accept: called with the data set if the images are its, and raises if it is not to be used.
    classes: names of those that are drawn by; empty: none are.

  Raises:
    UserError: no such file, too few images, a broken one, or one of another size.
  """
  path = config.sample.input_images
  if not path:
    source = open_source(config.data)
    if source.image_shape != image_shape:
      raise UserError(
        f"dataset: the images of {source.name} are {_text(source.image_shape)}, the model draws {_text(image_shape)}; "
        "name some with --input_images"
      )
    if len(source) < number:
      raise UserError(f"num_samples: {number} images are needed, {source.name} has {len(source)}; lower --num_samples")
    accept(source)
    labels = labels_among(classes, source) if classes else None
    return Given(source.read(np.arange(number)).images, None if labels is None else labels[:number])
  root = pathlib.Path(expanded("input_images", path))
  files = [root] if root.is_file() else []
  if root.is_dir():
    files = folder.find_images(root, follow_links=config.data.follow_links).files
  if not files:
    raise UserError(f"input_images: {path!r} names no image file and no folder of some; use --input_images=PATH")
  if len(files) < number:
    raise UserError(
      f"num_samples: {number} images are needed, input_images={path} has {len(files)}; lower --num_samples"
    )
  size = image_shape[:2] if config.data.image_size else None
  how = images.resizing(config.data)._replace(crop="center")
  found = [images.decode(file, image_shape[-1], f"input_images: {file}", size, how) for file in files[:number]]
  for file, image in zip(files, found, strict=False):
    if image.shape != image_shape:
      raise UserError(
        f"input_images: {file} is {_text(image.shape)}, the model draws {_text(image_shape)}; resize the file"
      )
  return Given(np.stack(found))


def read_mask(config: Config, image_shape: tuple[int, int, int]) -> np.ndarray:
  """Bool [H, W], true where pixels are to be drawn: `--mask`, white there, or the middle quarter of the image.

  Raises:
    UserError: no such file, a broken one, one of another size, or one that covers nothing or everything.
  """
  path, (height, width, _) = config.sample.mask, image_shape
  if not path:
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return mask
  file = pathlib.Path(expanded("mask", path))
  if not file.is_file():
    raise UserError(f"mask: {path!r} is no file; name an image, white where pixels are to be drawn")
  mask = images.decode(file, 1, f"mask: {path}")[:, :, 0] > 127
  if mask.shape != (height, width):
    raise UserError(
      f"mask: {path} is {mask.shape[0]}x{mask.shape[1]}, the images are {height}x{width}; make it of their size"
    )
  if mask.all() or not mask.any():
    raise UserError(f"mask: {path} covers {'everything' if mask.all() else 'nothing'}; make the part to draw white")
  return mask


def _text(shape: tuple[int, ...]) -> str:
  return "x".join(map(str, shape))
