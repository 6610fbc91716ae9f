"""Packs the images of any data set: `python -m ddpm_jax.data.pack SOURCE zip:PATH|webdataset:PATH [--image_size=...]`.

SOURCE is a value of --dataset, and the flags of the data mean what they mean in training. Files are copied as they are,
under their names, so that what they are packed into is the same data set. With --image_size they are resized, and
written as PNG. A command that was stopped, in whatever way, goes on when it is given again. Exit code 2: one line on
standard error says what is wrong.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config, DataConfig, own_images
from ddpm_jax.data import files, fingerprint, images, targets
from ddpm_jax.data import labels as labels_lib
from ddpm_jax.data.encoded import HAS_NONE, EncodedImages, Labels, NoLabels, on_demand
from ddpm_jax.data.images import BadRecord
from ddpm_jax.data.sources import open_encoded
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.flags import ToolParser
from ddpm_jax.runtime import console
from ddpm_jax.runtime.paths import absolute, check_name
from ddpm_jax.runtime.paths import command as command_text

_CHUNK = 32  # images a task
_PROBE = 32  # pixels: of images that are only copied, the size in which those of the fingerprint are compared
_SHARD_SIZE = 10_000
_FORMAT = 1  # of what is written
# What chooses images, and how they come to their size; the rest of a training's flags has no meaning here.
_OPTIONS = frozenset({
  *("dataset", "split", "only", "label_field", "image_field", "data_dir", "manual_dir", "follow_links", "formats"),
  *("image_size", "resize", "crop", "resample", "cache_gib", "on_bad_record"),
})  # fmt: skip


def pack(data: DataConfig, target: str, shard_size: int) -> targets.Written:
  """Packs the images of `data` into `target`, zip:PATH or webdataset:PATH, the latter in shards of so many images.

  Raises:
    UserError: as `sources.open_source`; another file is there; or the images have labels that cannot be used.
    OSError: the target cannot be written.
  """
  kind, path = own_images(target) or ("", "")
  if kind not in ("zip", "webdataset") or not path:
    raise UserError(f"TARGET: {target!r} is neither zip:PATH nor webdataset:PATH; name one of them")
  folder = path.endswith("/")
  path = absolute("TARGET", path, "name a file on disk")
  check_name("TARGET", path)
  if kind == "zip" and (folder or path.is_dir()):
    raise UserError(f"TARGET: {target!r} is a folder; name the zip, such as zip:{path / 'images.zip'}")
  path = f"{path}{'/' * folder}"
  if kind == "webdataset":
    targets.shards_of(path)
  if data.crop == "random":
    raise UserError("crop: random takes another part each time, and is for training; leave it out")
  copy = not data.image_size
  encoded = open_encoded(dataclasses.replace(data, image_size=_PROBE) if copy else data)
  if encoded.remark:
    console.note(encoded.remark)
  labels = _labels(encoded)
  names, why_numbered = _names(encoded, kind, target, labels, copy)
  if why_numbered:
    console.note(f"{encoded.name}: {why_numbered}; the images are numbered in {target}, in their order")
  comment = _comment(encoded, labels, [kind, names is None, copy, *([shard_size] if kind == "webdataset" else [])])
  progress = console.bar(
    total=encoded.length, desc=f"packing {encoded.name}", unit=" images", leave=False, disable=not console.columns()
  )
  with progress:
    job = targets.Job(
      number=encoded.length,
      comment=comment,
      name=(lambda index, content: names[index]) if names is not None else _numbered_name,
      is_name=(lambda index, name: names[index] == name) if names is not None else _is_numbered_name,
      labels=labels,
      contents=lambda first, stop: _contents(encoded, range(first, stop), copy, skip=data.on_bad_record == "skip"),
      progress=lambda done: progress.update(done - progress.n),
    )
    return targets.write_zip(path, job) if kind == "zip" else targets.write_shards(path, job, shard_size)


def _labels(encoded: EncodedImages) -> Labels | None:
  """The classes of the images; None if they have none. Raises UserError for labels that cannot be used."""
  try:
    return encoded.classes() if encoded.classes else None
  except NoLabels as error:
    if error.why != HAS_NONE:
      console.note(f"no classes are packed: {encoded.name} {error.why}")
    return None


def _comment(encoded: EncodedImages, labels: Labels | None, options: Sequence[Any]) -> str:
  """What a target carries of the job that made it: a digest of all that its bytes depend on."""
  found = fingerprint.take(encoded, on_demand(encoded, skip=True, report=lambda *_: None))
  classes = labels and [fingerprint.of_classes(labels.classes), labels.names]
  text = json.dumps([_FORMAT, found, encoded.how, classes, *options])
  return f"ddpm_jax.data.pack {hashlib.sha256(text.encode()).hexdigest()}"


# Names.


def _names(
  encoded: EncodedImages, kind: str, target: str, labels: Labels | None, copy: bool
) -> tuple[Sequence[str] | None, str]:
  """The names of the images in the target, None if they are numbered, and why they lost those that they had."""
  if encoded.file_name is None:
    return None, ""
  found = [encoded.file_name(index) for index in range(encoded.length)]
  if not copy:
    found = [f"{os.path.splitext(name)[0]}.png" for name in found]
  problem = _problem(found, kind)
  if not problem and kind == "zip" and labels is not None:
    text = json.dumps({"labels": [list(pair) for pair in zip(found, labels.classes.tolist(), strict=True)]}).encode()
    try:
      labels_lib.of_files(target, found, text)
    except UserError:
      problem = "their folders say other classes than their labels"
  return (None, problem) if problem else (found, "")


def _problem(names: Sequence[str], kind: str) -> str:
  """Why a target of that kind cannot have such names; empty if it can."""
  keys = names if kind == "zip" else [os.path.splitext(name)[0] for name in names]
  if len(set(keys)) < len(keys):
    return "two files have one name" if kind == "zip" else "two files have one name but for its end"
  for name in names:
    parts = name.split("/")
    unfit = ".." in parts or not parts[0] or re.search(r"[\\:\0]", name) or _too_long(name)
    if unfit or files.kind_of(name, images.SUFFIXES):
      return f"{name!r} is no name of an image there"
    if kind == "webdataset" and parts[-1].count(".") != 1:
      return f"{name!r} has more than one dot, and the name of an example ends at the first"
  return ""


def _too_long(name: str) -> bool:
  """True also for a name that is no text."""
  try:
    return len(name.encode()) > 2**15
  except UnicodeEncodeError:
    return True


def _numbered(index: int) -> str:
  return f"{index // 1000:05d}/img{index:08d}"  # as EDM's converter names them


def _numbered_name(index: int, content: bytes) -> str:
  return _numbered(index) + _suffix(content)


def _is_numbered_name(index: int, name: str) -> bool:
  return os.path.splitext(name)[0] == _numbered(index)


def _suffix(content: bytes) -> str:
  """The suffix of a sound image, by its format."""
  with Image.open(io.BytesIO(content)) as image:
    kind = str(image.format)
  usual = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "HEIF": ".heic", "JPEG2000": ".jp2"}
  suffix = usual.get(kind, f".{kind.lower()}")
  return suffix if suffix in images.SUFFIXES else ".png"  # one by which it is known as an image: its content says which


# Contents.


def _contents(encoded: EncodedImages, rows: range, copy: bool, *, skip: bool) -> Iterator[tuple[int, bytes]]:
  """Yields index and file of the good images of `rows`, made by all cores, a bounded number of them ahead."""
  threads = os.cpu_count() or 1
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    waiting: collections.deque[tuple[range, concurrent.futures.Future]] = collections.deque()
    try:
      for start in (*rows[::_CHUNK], None):
        if start is not None:
          part = range(start, min(start + _CHUNK, rows.stop))
          waiting.append((part, pool.submit(_converted, encoded, part, copy)))
        while waiting and (start is None or len(waiting) > 2 * threads):
          part, future = waiting.popleft()
          for index, found in zip(part, future.result(), strict=True):
            if not isinstance(found, BadRecord):
              yield index, found
            elif not skip:
              raise found
            else:
              console.note(f"left out: {found.what}")
    finally:
      pool.shutdown(cancel_futures=True)


def _converted(encoded: EncodedImages, rows: range, copy: bool) -> list[bytes | BadRecord]:
  """The files of the target, or why there is none: whatever cannot be decoded is no image."""
  made = []
  for row, file in zip(rows, encoded.fetch(list(rows)), strict=True):
    try:
      made.append(_convert(encoded, row, file, copy))
    except BadRecord as error:
      made.append(error)
  return made


def _convert(encoded: EncodedImages, row: int, file: images.File | BadRecord, copy: bool) -> bytes:
  """Raises BadRecord, RunError."""
  if isinstance(file, BadRecord):
    raise file
  (height, width, channels), name = encoded.shape, encoded.label(row)
  if copy:
    content = file if isinstance(file, bytes) else images.read(file, name)
    pixels = images.decode(content, channels, name)
    # Files are all grey or not by their headers, images that are no files by what their data set says.
    fits = encoded.file_name is not None or images.read_header(content, name)[2] == (channels == 1)
    return content if fits else images.png(pixels)
  return images.png(images.decode(file, channels, name, (height, width), encoded.how))


def main() -> int:
  """Returns the exit code."""
  parser = ToolParser(
    prog=command_text(module="ddpm_jax.data.pack"),
    description="Packs the images of a data set into a zip (layout of EDM), or into tar shards (WebDataset).",
    epilog=f"Flags of training: {', '.join(f'--{name}' for name in sorted(_OPTIONS - {'dataset'}))}.",
    allow_abbrev=False,
  )
  parser.add_argument("source", metavar="SOURCE", help="a data set, as --dataset takes it")
  parser.add_argument("target", metavar="TARGET", help="zip:PATH, or webdataset:PATH, for PATH-000000.tar, ...")
  parser.add_argument("--shard_size", type=int, metavar="N", help=f"images in a shard (default: {_SHARD_SIZE})")
  try:
    arguments, given, _ = parser.parse(sys.argv[1:])
    _check(arguments, given)
    data = config_lib.override(Config(), given).data
    written = pack(data, arguments.target, arguments.shard_size or _SHARD_SIZE)
  except (UserError, RunError) as error:
    console.error(str(error))
    return 2 if isinstance(error, UserError) else 1
  except OSError as error:
    console.error(
      f"TARGET: {error.filename or arguments.target} cannot be written ({error.strerror}); make room, or name another; "
      "the same command goes on"
    )
    return 2
  if written.what:
    console.say(f"done: {written.what}, --dataset={written.dataset}")
  else:
    console.say(f"--dataset={written.dataset} is finished already: nothing to do")
  return 0


def _check(arguments: argparse.Namespace, given: dict[str, Any]) -> None:
  """Raises UserError for flags that have no meaning here."""
  for name in sorted(given.keys() - _OPTIONS):
    raise UserError(f"{name}: has no effect on packing; leave it out")
  if arguments.shard_size is not None:
    if arguments.target.startswith("zip:"):
      raise UserError("shard_size: has no effect on a zip; leave it out")
    if arguments.shard_size < 1:
      raise UserError(f"shard_size: {arguments.shard_size} must be at least 1; use {_SHARD_SIZE}")


if __name__ == "__main__":
  console.protect_streams()
  sys.exit(main())
