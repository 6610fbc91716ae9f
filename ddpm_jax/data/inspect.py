"""Shows what a data set holds before it is trained on: `python -m ddpm_jax.data.inspect DATASET [--image_size=...]`.

DATASET is a value of --dataset; all flags of training are taken, so that --dataset and --workdir alone have to change
places in a command. Every image is read and decoded once. The picture is the first batch as the first training step
sees it. Exit code 2: one line on standard error says what is wrong.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import math
import os
import pathlib
import re
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax import flags, presets
from ddpm_jax.config import Config, DataConfig
from ddpm_jax.data import images, pipeline, sources, summary
from ddpm_jax.data.encoded import EncodedImages, NoLabels, on_demand
from ddpm_jax.data.images import BadRecord
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.keys import indexed_keys, stream_key
from ddpm_jax.runtime import console
from ddpm_jax.runtime.paths import absolute, check_name
from ddpm_jax.runtime.paths import command as command_text
from ddpm_jax.workdir import grids

_CHUNK = 32  # images a task
_MOST_LINES = 5  # of bad records, or of duplicates
_MOST_SIZES = 8  # that are listed; more are counted by ranges
_MOST_TILES = 64  # of the picture
_BAR, _WIDTH = 30, 90  # characters
_ANY_SIZE = 64  # pixels: of the picture where --image_size must be set, and is not


class _Image(NamedTuple):
  """What is known of one image: its size, whether it is grey, and digests of its file and of its pixels."""

  size: tuple[int, int]
  grey: bool
  file: bytes
  pixels: bytes


def inspect(config: Config, output: pathlib.Path, chosen: str = "") -> None:
  """Says what the data set holds, and writes the picture of a batch. `chosen`: a line about the settings, said first.

  Raises:
    UserError: no such data set, split or class, labels that contradict each other, or no image that can be decoded.
    OSError: the picture cannot be written.
  """
  data = dataclasses.replace(config.data, on_bad_record="skip")
  encoded, sized, refused = _open(data)
  if chosen:
    console.note(chosen)
  found = _read_all(encoded)
  good = [image for image in found if isinstance(image, _Image)]
  bad = [image.what for image in found if isinstance(image, BadRecord)]
  if not good:
    raise UserError(f"dataset: none of the {len(bad)} images of {encoded.name} can be decoded ({bad[0]})")
  console.say(f"{encoded.name}: {len(found):,} image{'s' * (len(found) != 1)} of {data.split}")
  _say("splits", [", ".join(sources.split_names(sized))])
  _say("sizes", _sizes(good))
  grey = sum(image.grey for image in good)
  colour = f"{'grey' if encoded.shape[2] == 1 else 'colour'}, {encoded.shape[2]} in a batch"
  _say("channels", [f"{colour}{f'; {grey:,} images are grey' * (0 < grey < len(good))}"])
  labels, captions = _labels(encoded)
  _say("classes", textwrap.wrap(labels, _WIDTH, break_long_words=False, break_on_hyphens=False))
  left_out = re.sub(rf"{re.escape(encoded.name)}: \d+ images?; left out: ", "", encoded.remark)
  _say("left out", [left_out or "nothing"])
  more = [f"and {len(bad) - _MOST_LINES:,} more"] * (len(bad) > _MOST_LINES)
  _say("bad", [f"{len(bad):,} cannot be read:", *bad[:_MOST_LINES], *more] if bad else ["none"])
  _say("duplicates", _duplicates(encoded, found))
  if bad and config.data.on_bad_record == "fail":
    refused = refused or "on_bad_record: fail, the default; repair or remove the bad images, or use skip"
  if not refused:
    try:
      config_lib.check_size(config.model, *encoded.shape[:2])
    except UserError as error:
      refused = str(error)
  if refused:
    _say("training", [f"would be refused: {refused}"])
  seen, rows = first_batch(encoded, config)
  seen, rows = seen[:_MOST_TILES], rows[:_MOST_TILES]
  text = [captions[row] for row in rows.tolist()] if captions else None
  facts = {"dataset": encoded.name, "split": data.split, "records": rows.tolist()}
  grids.save_png(output, grids.image_grid(seen, captions=text), facts)
  size, way = f"{seen.shape[1]}x{seen.shape[2]}", summary.way_text(config.data, encoded.stored)
  of = f"{len(seen)} of {config.data.batch_size}" if len(seen) < config.data.batch_size else f"all {len(seen)}"
  _say("batch", [f"{of} images, {size}{f', {way}' * bool(way)}: {output}"])
  with contextlib.suppress(OSError):
    console.show_png(output)


def _open(data: DataConfig) -> tuple[EncodedImages, DataConfig, str]:
  """The images, and why they could not be trained on as they are: they differ in size, and --image_size is not set.

  Then it is, in what is returned in the place of `data`.
  """
  try:
    return sources.open_encoded(data), data, ""
  except UserError as error:
    if data.image_size or not str(error).startswith("image_size:"):
      raise
    sized = dataclasses.replace(data, image_size=_ANY_SIZE)
    return sources.open_encoded(sized), sized, str(error)


def _read_all(encoded: EncodedImages) -> list[_Image | BadRecord]:
  """Decodes all images, on all cores."""

  def look(start: int) -> list[_Image | BadRecord]:
    rows = list(range(start, min(start + _CHUNK, encoded.length)))
    return [_look(encoded, row, file) for row, file in zip(rows, encoded.fetch(rows), strict=True)]

  progress = console.bar(
    total=encoded.length, desc=f"reading {encoded.name}", unit=" images", leave=False, disable=not console.columns()
  )
  found = []
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, progress:
    for part in pool.map(look, range(0, encoded.length, _CHUNK)):
      found += part
      progress.update(len(part))
  return found


def _look(encoded: EncodedImages, row: int, file: images.File | BadRecord) -> _Image | BadRecord:
  """One image at its own size, or why it is bad."""
  name = encoded.label(row)
  try:
    if isinstance(file, BadRecord):
      raise file
    content = file if isinstance(file, bytes) else images.read(file, name)
    height, width, grey = images.read_header(content, name)
    pixels = images.decode(content, encoded.shape[2], name)
  except BadRecord as error:
    return error
  return _Image((height, width), grey, _digest(content), _digest(repr(pixels.shape).encode() + pixels.tobytes()))


def _digest(content: bytes) -> bytes:
  return hashlib.blake2b(content, digest_size=16).digest()


def _say(what: str, lines: list[str]) -> None:
  for first, line in zip([what, *[""] * len(lines)], lines, strict=False):
    console.say(f"  {first:<12}{console.one_line(line)}")


def _sizes(good: list[_Image]) -> list[str]:
  """A histogram of the sizes, or of the shorter sides where there are many sizes."""
  counted = collections.Counter(image.size for image in good)
  lines = [images.sizes_text(np.array(list(counted)))]
  if len(counted) == 1:
    return lines
  if len(counted) <= _MOST_SIZES:
    rows = {"x".join(map(str, size)): count for size, count in counted.most_common()}
  else:
    shorter = collections.Counter(min(image.size).bit_length() for image in good)
    rows = {f"side {2 ** (bits - 1)}..{2**bits - 1}": shorter[bits] for bits in sorted(shorter)}
    lines[0] += "; by the shorter side:"
  wide, most = max(map(len, rows)), max(rows.values())
  return lines + [f"{row:<{wide}} {count:>9,} {'#' * math.ceil(_BAR * count / most)}" for row, count in rows.items()]


def _labels(encoded: EncodedImages) -> tuple[str, list[str]]:
  """A line about the classes, and the name of the class of each image; none if there are no classes."""
  try:
    if encoded.classes is None:
      raise NoLabels(encoded.name)
    classes, names = encoded.classes()
  except NoLabels as error:
    return f"none: the data set {error.why}", []
  counts = np.bincount(classes, minlength=len(names)).tolist()
  shown = [console.one_line(name) for name in names]  # a line of the picture, too
  return summary.classes_text(names, counts), [shown[number] for number in classes.tolist()]


def _duplicates(encoded: EncodedImages, found: list[_Image | BadRecord]) -> list[str]:
  """Images with the pixels of an earlier one; where there is one with the same bytes, that one is named."""
  of_pixels: dict[bytes, int] = {}
  of_file: dict[bytes, int] = {}
  lines, files = [], 0
  for row, image in enumerate(found):
    if isinstance(image, BadRecord):
      continue
    by_pixels, by_file = of_pixels.setdefault(image.pixels, row), of_file.setdefault(image.file, row)
    files += by_file != row
    if by_pixels != row:
      how, earlier = ("bytes", by_file) if by_file != row else ("pixels", by_pixels)
      lines.append(f"{encoded.label(row)} = {encoded.label(earlier)} ({how})")
  if not lines:
    return ["none"]
  more = [f"and {len(lines) - _MOST_LINES:,} more"] * (len(lines) > _MOST_LINES)
  return [
    f"{len(lines):,} equal an earlier image in every pixel, {files:,} in every byte:",
    *lines[:_MOST_LINES],
    *more,
  ]


def first_batch(encoded: EncodedImages, config: Config) -> tuple[np.ndarray, np.ndarray]:
  """The images uint8 [B, H, W, C] of the first training step, flipped as it does, and which they are, int32 [B]."""
  source = sources.Source(
    name=encoded.name,
    image_shape=encoded.shape,
    length=encoded.length,
    read=on_demand(encoded, skip=True, report=lambda *_: None),
    random_crop=encoded.random_crop,
  )
  seed = config.train.seed
  with contextlib.closing(
    pipeline.batches(source, batch_size=config.data.batch_size, seed=seed, start_step=0)
  ) as stream:
    batch = next(stream)
  seen = batch["image"]
  if config.data.random_flip:
    keys = indexed_keys(jax.random.fold_in(stream_key(seed, "train"), 0), jnp.asarray(batch["index"]))
    seen = np.asarray(jax.vmap(_flipped)(keys, jnp.asarray(seen)))
  return seen, batch["record"]


def _flipped(key: jax.Array, image: jax.Array) -> jax.Array:
  """As the training step does with the third of the four keys of an example."""
  _, _, flip_key, _ = jax.random.split(key, 4)
  return images.random_flip(flip_key, image)


def main() -> int:
  """Returns the exit code."""
  parser = flags.ToolParser(
    prog=command_text(module="ddpm_jax.data.inspect"),
    description="Shows what a data set holds, without training, and draws a batch as the training step sees it.",
    epilog="Takes all flags of training; those of the data, --batch_size and --seed matter.",
    allow_abbrev=False,
  )
  parser.add_argument("source", metavar="DATASET", help="as --dataset takes it")
  parser.add_argument(
    "--output", default="inspect.png", metavar="PNG", help="the picture (default: %(default)s); replaced if it is there"
  )
  try:
    arguments, given, preset = parser.parse(sys.argv[1:])
    output = absolute("output", arguments.output, "name a file on disk")
    check_name("output", output)
    if output.is_dir() or not output.parent.is_dir():  # what would be found only after all images are read
      raise UserError(f"output: {arguments.output!r} is no file in a folder that exists; name another with --output")
    chosen = ""
    if preset is None and config_lib.own_images(given["dataset"]):  # as a new run does
      preset = presets.for_own_images(jax.default_backend())
      given = flags.of_preset(preset) | given
      chosen = f"own images, with the settings that a new run takes here: --preset={preset}; --preset=none: without"
    inspect(config_lib.override(Config(), given), output, chosen)
  except (UserError, RunError) as error:
    console.error(str(error))
    return 2 if isinstance(error, UserError) else 1
  except OSError as error:
    console.error(f"output: {arguments.output} cannot be written ({error.strerror}); name another file with --output")
    return 2
  return 0


if __name__ == "__main__":
  console.protect_streams()
  sys.exit(main())
