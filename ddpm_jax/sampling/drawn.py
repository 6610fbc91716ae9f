"""Drawing many images so that a stop loses little: each batch is on disk before the next one is drawn."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.devices.batched import BatchedLoop
from ddpm_jax.devices.hosts import all_gather_host
from ddpm_jax.diffusion.samplers import grid_name
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.keys import Seeded
from ddpm_jax.runtime.progress import Drawing
from ddpm_jax.sampling.classes import Classes
from ddpm_jax.sampling.draw import bind_weights, constants_of, fit_batch, make_long_draw, table_of
from ddpm_jax.weights.load import Weights
from ddpm_jax.workdir.storage import Records, remedy, size_text

# Options of the section `sample` that do not change image i.
_NOT_IN_IMAGES = (
  *("num_samples", "sample_batch_size", "sample_png_dir", "checkpoint", "sample_task", "sample_weights"),
  *("classes", "guide_with", "classifier"),  # what these come to is
)

_PATHS = ("sample_png_dir", "input_images", "mask", "guide_with", "classifier")


class Drawn:
  """Images 0, 1, 2, ... of a draw, in a file that grows; what an earlier process drew of them is taken over.

  The file is named by a digest of everything that the images depend on. Process 0 writes it.
  """

  def __init__(
    self,
    weights: Weights,
    config: Config,
    folder: pathlib.Path,
    classes: Classes | None = None,
    programs: dict[bool, BatchedLoop] | None = None,
  ):
    """Opens or creates the file in `folder`.

    Args:
      weights: of the model.
      config: how to draw.
      folder: where.
      classes: of the images; None for an unconditional model.
      programs: the compiled draw with guidance and without; shared by draws that differ in seed, classes and guidance
        scale alone, and filled by them. None: its own.

    Raises:
      RunError: if it cannot be opened.
      UserError: if another process draws there.
    """
    self._weights, self._config, self._classes = weights, config, classes
    self._programs = {} if programs is None else programs
    self.settings = settings(config, weights)
    run = weights.run
    own = {name: value for name, value in self.settings.items() if name not in _NOT_IN_IMAGES}
    about = [weights.identity, run.image_shape, own]
    if classes is not None:
      about.append(classes.identity)
    text = json.dumps(about, sort_keys=True)
    self.path = folder / f".drawn-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    self.table = table_of(config.sample, run.schedule, config.diffusion.variance)
    self.evaluations = len(self.table.t)  # of the network, for each image
    self._image_bytes = math.prod(run.image_shape)
    self._records, self._done = None, 0
    if jax.process_index() == 0:
      try:
        folder.mkdir(exist_ok=True)
        self._records = Records(self.path, unit=self._image_bytes, exclusive=True)
        self._done = self.path.stat().st_size // self._image_bytes
      except BlockingIOError:
        raise UserError(
          f"workdir: another process is drawing the same images in {folder}; wait for it, or use another --sample_seed"
        ) from None
      except OSError as error:
        raise cannot_write(folder, error) from error
    self._done = int(all_gather_host(np.asarray(self._done))[0])

  def draw(self, number: int, *, done: Callable[[Drawing], None], say: Callable[[str], None]) -> None:
    """Draws until there are `number` images.

    Args:
      number: of images.
      done: called with how far the draw is: first, about twice a second, and after each batch. What it raises ends the
        draw, which can go on after the last whole batch.
      say: takes a line.

    Raises:
      RunError: if they cannot be written.
    """
    options = self._config.sample
    constants = constants_of(self._weights, options)
    before = min(self._done, number)
    if before:
      say(f"{before} of them were drawn before")
    if before == number:
      done(Drawing(number, 0, number, self.evaluations, self.evaluations))
      return
    run, is_guided = self._weights.run, constants.guidance_scale is not None
    if is_guided not in self._programs:
      self._programs[is_guided] = make_long_draw(
        bind_weights(self._weights, options),
        self.table,
        first_stage=run.first_stage,
        mesh=run.mesh,
        stream="sample",
      )
    draw = self._programs[is_guided]
    size = self._batch_size(draw, constants, number - before)
    say(f"{size} images at once")
    done(Drawing(number, before, min(size, number - before), 0, self.evaluations))
    for first in range(before, number, size):
      index = np.arange(first, min(first + size, number), dtype=np.int32)

      def made(rows: int, first: int = first, count: int = len(index)) -> None:
        if rows < self.evaluations:  # the last one counts once the images are on disk
          done(Drawing(number, first, count, rows, self.evaluations))

      images = draw(constants, *self._columns(index), size=size, done=made)
      if self._records is not None:
        try:
          self._records.add(images.tobytes())
          self._records.sync()
        except OSError as error:
          raise cannot_write(self.path.parent, error) from error
      self._done = first + len(index)
      done(Drawing(number, first, len(index), self.evaluations, self.evaluations))

  def _batch_size(self, draw: BatchedLoop, constants: Seeded, number: int) -> int:
    asked = self._config.sample.sample_batch_size
    one = self._columns(np.zeros(1, np.int32))
    return min(asked, number) if asked else fit_batch(draw, constants, *one, number=number)

  def _columns(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
    """What a draw takes of each image: its index and, of a conditional model, its label."""
    return (index,) if self._classes is None else (index, self._classes.of(index))

  def images(self, number: int) -> np.ndarray:
    """The first `number` images, uint8 [number, H, W, C], read from disk as they are used."""
    return np.memmap(self.path, np.uint8, "r", shape=(number, *self._weights.run.image_shape))

  def forget(self) -> None:
    """Closes and removes the file."""
    self.close()
    if jax.process_index() == 0:
      with contextlib.suppress(OSError):
        self.path.unlink()

  def close(self) -> None:
    """Closes the file and leaves it for the next time."""
    if self._records is not None:
      self._records.close()
      self._records = None


def settings(config: Config, weights: Weights) -> dict[str, Any]:
  """The settings of a draw, JSON values: the options of the section `sample` and what else the images depend on."""
  sample = ((field.name, value) for section, field, value in config_lib.options(config) if section == "sample")
  own = {name: list(value) if isinstance(value, tuple) else value for name, value in sample}
  # 'auto' may once mean another one
  own["time_grid"] = grid_name(config.sample.sampler, config.sample.time_grid)
  own["threshold"] = config_lib.threshold_of(config.sample, latent=not weights.run.first_stage.identity)
  return own | {
    "checkpoint": weights.step,
    "variance": config.diffusion.variance,
    "dtype": config.model.dtype,
    "matmul_precision": config.model.matmul_precision,
    "device": jax.devices()[0].device_kind,
    **({"guide_sha256": weights.guide.identity} if weights.guide else {}),
    **({"classifier_sha256": weights.classifier.identity} if weights.classifier else {}),
    **({"first_stage": weights.run.first_stage_facts} if weights.run.first_stage_facts else {}),
  }


def facts_of_picture(settings: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
  """The metadata of a picture. Pictures are passed on, so no path of this machine is among it."""
  described = {name: value for name, value in settings.items() if name not in _PATHS}
  return described | {"weights_sha256": weights.identity}


def check_room(flag: str, folder: pathlib.Path, image_shape: tuple[int, ...], number: int, copies: int) -> None:
  """Raises UserError, which names the flag, if the disk has no room for `copies` of that many images."""
  needed = number * math.prod(image_shape) * copies
  exists = next(parent for parent in (folder, *folder.parents) if parent.exists())
  free = shutil.disk_usage(exists).free
  if free < needed:
    raise UserError(
      f"{flag}: {number} images need up to {size_text(needed)} in {folder}, which has {size_text(free)}; draw fewer, "
      "or make room"
    )


def cannot_write(folder: pathlib.Path, error: OSError) -> RunError:
  """The error of a `folder` that takes no more samples."""
  return RunError(f"workdir: cannot write the samples into {folder} ({error.strerror}); {remedy(error)} and draw again")
