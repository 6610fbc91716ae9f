"""Data sets of TensorFlow Datasets, read from ArrayRecord files without TensorFlow."""

from __future__ import annotations

import bisect
import difflib
import functools
import importlib.util
import itertools
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format, message

from ddpm_jax.config import OWN_IMAGES, DataConfig
from ddpm_jax.data import fingerprint, originals
from ddpm_jax.data.encoded import EncodedImages, Labels, NoLabels, decoded_size, stand_ins
from ddpm_jax.data.images import OF_THE_PROCESS, BadRecord
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.runtime import console
from ddpm_jax.runtime.paths import command, expanded, home

# Of a damaged record: the reader of ArrayRecord raises RuntimeError for whatever it finds, the rest is TFDS's parser.
_DAMAGED = (RuntimeError, ValueError, KeyError, AttributeError, message.DecodeError)
_CHUNK = 256  # labels to read at once
_OWN = f"{', '.join(f'{kind}:PATH' for kind in OWN_IMAGES[:-1])} or {OWN_IMAGES[-1]}:PATH"
_NOWHERE = pathlib.Path(os.devnull)  # for a user without a home: nothing is in it, and nothing can be created


def open_prepared(data: DataConfig) -> EncodedImages:
  """The images of a TFDS data set: those of its first image feature. Prepares the data set if need be.

  Raises:
    UserError: no such data set, configuration, version or split; no images in it; images of different sizes where
      `data.image_size` is 0; or the data set cannot be prepared.
  """
  builder = _prepared_builder(data)
  feature_name, (height, width, channels) = _image_feature(data, builder)
  size = decoded_size(data.dataset, (height, width), data.image_size)
  shards = shards_of(data, builder.info.splits)
  records = _open_split(data, builder)
  label, remedy = _label(data, shards), f"move {builder.data_path} away to prepare it again"
  class_feature = _class_feature(data, builder)
  return EncodedImages(
    name=data.dataset,
    length=len(records),
    shape=(*size, _decoded_channels(channels)),
    resize=bool(data.image_size),
    identity=f"{builder.info.full_name} {data.split}",
    listing=listing(builder.info.full_name, data.split, shards),
    fetch=_fetch(records, feature_name, bytes, label, remedy),
    label=label,
    classes=functools.partial(_classes, data, builder, class_feature, label, remedy) if class_feature else None,
    class_names=tuple(_features(builder)[class_feature].names) if class_feature else None,
    stored=f"{height}x{width}" if height and width else "different sizes",
  )


def listing(full_name: str, split: str, shards: Sequence[Any]) -> str:
  """A digest of what is known of the records of a split without reading them. Arguments: TFDS's, of `shards_of`."""
  return fingerprint.digest(
    [full_name, split, *(f"{shard.skip} {shard.take} {shard.examples_in_shard}" for shard in shards)]
  )


def image_shape(data: DataConfig) -> tuple[int, int, int]:
  """(H, W, C) of the decoded images, as the builder describes them: the data set need not be prepared.

  Raises:
    UserError: no such data set, no images in it; images of different sizes where `data.image_size` is 0.
  """
  _, (height, width, channels) = _image_feature(data, make_builder(data))
  return (*decoded_size(data.dataset, (height, width), data.image_size), _decoded_channels(channels))


def class_names(data: DataConfig) -> tuple[str, ...]:
  """Of the classes, as the builder describes them, none if it has none: the data set need not be prepared."""
  builder = make_builder(data)
  feature = _class_feature(data, builder)
  return tuple(_features(builder)[feature].names) if feature else ()


def _decoded_channels(stored: int | None) -> int:
  """Grey stays grey, transparency goes, and everything else becomes RGB."""
  return 1 if stored in (1, 2) else 3


def split_names(data: DataConfig) -> list[str]:
  """The splits of a TFDS data set, which is prepared if need be. Raises UserError."""
  return list(_prepared_builder(data).info.splits)


def _prepared_builder(data: DataConfig) -> tfds.core.DatasetBuilder:
  """The builder of the data set, which is prepared if need be. Raises UserError."""
  builder = make_builder(data)
  _, (height, width, _) = _image_feature(data, builder)
  decoded_size(data.dataset, (height, width), data.image_size)  # what it refuses, before hours of preparing
  if not is_prepared(builder):
    _prepare(data, builder)
    builder = make_builder(data)  # a builder reads the folder's splits and file format when it is made
  return builder


def _label(data: DataConfig, shards: Sequence[Any]) -> Callable[[int], str]:
  """Returns a function that names image i: the shard and the place in it, to find a damaged file. shards: TFDS's."""
  ends = list(itertools.accumulate(shard.take for shard in shards))

  def label(index: int) -> str:
    number = bisect.bisect_right(ends, index)
    shard = shards[number]
    record = shard.skip + index - (ends[number] - shard.take)
    return f"image {index} of {data.dataset}, {data.split} (record {record} of {shard.filename})"

  return label


def _fetch(
  records: Any, feature_name: str, kind: type, label: Callable[[int], str], remedy: str
) -> Callable[[list[int]], list[Any]]:
  """A function that reads one feature by index, a BadRecord where it is not of that kind. Raises RunError."""

  def fetch_one(index: int) -> Any:
    try:
      value = records[index][feature_name]
    except _DAMAGED as error:
      if any(os.strerror(code) in str(error) for code in OF_THE_PROCESS):
        raise RunError(
          f"dataset: {label(index)} cannot be opened ({one_line(error)}); raise that limit of the process"
        ) from None
      return BadRecord(f"{label(index)} cannot be read ({one_line(error)})", remedy)
    # The reader gives empty records for the part of a file that was cut off after it had been opened.
    return value if isinstance(value, kind) else BadRecord(f"{label(index)} is empty", remedy)

  def fetch(indices: list[int]) -> list[Any]:
    try:
      found = [example[feature_name] for example in records.__getitems__(indices)]
    except _DAMAGED:  # one bad record fails them all
      found = []
    whole = len(found) == len(indices) and all(isinstance(value, kind) for value in found)
    return found if whole else [fetch_one(index) for index in indices]

  return fetch


def _classes(
  data: DataConfig,
  builder: tfds.core.DatasetBuilder,
  feature_name: str,
  label: Callable[[int], str],
  remedy: str,
) -> Labels:
  """The class of each image; a record that is bad, and to be skipped, has that of the next good one.

  Raises:
    UserError: a record is bad, and not to be skipped; or as `checked_classes`.
  """
  records = _open_split(data, builder)  # once more: a data set that has been decoded keeps no file open
  fetch, length = _fetch(records, feature_name, int, label, remedy), len(records)
  found = [
    value for start in range(0, length, _CHUNK) for value in fetch(list(range(start, min(start + _CHUNK, length))))
  ]
  bad = np.array([isinstance(value, BadRecord) for value in found])
  if bad.any() and (data.on_bad_record != "skip" or bad.all()):
    raise found[int(np.argmax(bad))]
  classes = np.array([-1 if skipped else int(value) for value, skipped in zip(found, bad, strict=True)], np.int32)
  classes[bad] = classes[stand_ins(bad)]
  return Labels(checked_classes(data, classes), tuple(_features(builder)[feature_name].names))


def checked_classes(data: DataConfig, classes: np.ndarray) -> np.ndarray:
  """The classes int32 [N] of a split. Raises UserError where an image has none (-1, as in TFDS), or all the same."""
  if classes.min() < 0:
    raise NoLabels(data.dataset, f"has none for image {int(np.argmin(classes))} of {data.split}")
  if classes.max() == classes.min():
    raise NoLabels(data.dataset, f"has one and the same for all images of {data.split}")
  return classes


def make_builder(data: DataConfig) -> tfds.core.DatasetBuilder:
  """The TFDS builder of `data.dataset`. Touches no network. Raises UserError."""
  name = data.dataset
  base = re.split("[/:]", name)[0]
  if "://" in data.data_dir:
    raise UserError(
      f"data_dir: {data.data_dir!r} is not a local path; copy the prepared data set to a local disk, or "
      "mount the bucket"
    )
  if name.startswith("own:"):  # see `ddpm_jax.train`
    raise UserError(
      f"dataset: this run is of images that Python gave it, {name.removeprefix('own:')!r}; give them to ddpm_jax.train "
      "again, as source"
    )
  if (near := difflib.get_close_matches(base.lower(), OWN_IMAGES, n=1, cutoff=0.75)) and ":" in name:
    raise UserError(f"dataset: {base!r} of {name!r} is no kind of own images; did you mean {near[0]}:PATH?")
  if re.match(r"\w+:\D", name):  # NAME:1.2.3 is a version, SPACE:NAME needs TensorFlow and a network to be looked up
    raise UserError(
      f"dataset: {name!r} is a community data set, which TFDS cannot read without TensorFlow; save its images as "
      f"files and use {_OWN}"
    )
  try:
    if not re.match(r"\w+($|[/:])", name):
      raise tfds.core.DatasetNotFoundError
    return tfds.builder(name, data_dir=_data_dir(data))
  except tfds.core.DatasetNotFoundError:
    known = ["digits", *tfds.list_builders(with_community_datasets=False)]
    near = difflib.get_close_matches(base.lower(), known, n=3)
    if kind := _kind_of_path(expanded("dataset", name)):
      near = [f"{kind}:{name}"]
    hint = f"did you mean {' or '.join(near)}? Use" if near else "use"
    raise UserError(f"dataset: {name!r} is unknown; {hint} digits, a name from the TFDS catalog, or {_OWN}") from None
  except json_format.ParseError as error:
    raise UserError(
      f"data_dir: the files that describe {name!r} in {data.data_dir or 'the folder of TFDS'} are damaged "
      f"({one_line(error)}); move the folder of {base} away, and it is prepared again"
    ) from None
  except (ValueError, AssertionError, ImportError, TypeError, PermissionError) as error:
    reason = one_line(error).split('}": ')[-1].split(" Here are")[0]  # without the arguments that TFDS repeats
    known = base in tfds.list_builders(with_community_datasets=False)
    all_configs = tfds.builder_cls(base).builder_configs if known else {}
    configs = difflib.get_close_matches(name.partition("/")[2], all_configs, n=5, cutoff=0)
    hint = f"one of its configurations, such as {', '.join(configs)}" if configs else "NAME[/CONFIG][:X.Y.Z]"
    raise UserError(f"dataset: {name!r} cannot be opened ({reason}); use {hint}") from None


def _kind_of_path(path: str) -> str:
  """The kind of own images that a path may be; empty if there is none."""
  if os.path.isdir(path):
    return "folder"
  kinds = {".zip": "zip", ".tar": "webdataset", ".parquet": "parquet"}
  return kinds.get(os.path.splitext(path)[1].lower(), "") if os.path.isfile(path) else ""


def _data_dir(data: DataConfig) -> str:
  """The folder of prepared data sets: `data.data_dir`, TFDS_DATA_DIR, or `tensorflow_datasets` in the home folder."""
  if data.data_dir:
    return expanded("data_dir", data.data_dir)
  if chosen := os.environ.get("TFDS_DATA_DIR"):
    return expanded("TFDS_DATA_DIR", chosen)
  return str((home() or _NOWHERE) / "tensorflow_datasets")


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
  """Returns True if the data set lies in its folder. `builder.is_prepared` does, with a warning if it does not."""
  return (builder.data_path / "dataset_info.json").exists()


def one_line(error: BaseException, limit: int = 300) -> str:
  """The message of an error without line breaks, cut to `limit` characters."""
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= limit else text[:limit] + "..."


def _prepare(data: DataConfig, builder: tfds.core.DatasetBuilder) -> None:
  """Prepares the data set in a process of its own, so that TensorFlow never enters this one. Raises UserError.

  Those of `originals` need no TensorFlow, and what they need is the memory of that process.
  """
  if not data.data_dir and not os.environ.get("TFDS_DATA_DIR") and home() is None:
    raise UserError(
      f"data_dir: {data.dataset!r} is to be prepared, and this user has no home folder; name a folder with --data_dir"
    )
  if builder.name not in originals.NAMES and importlib.util.find_spec("tensorflow") is None:
    raise UserError(
      f"dataset: {data.dataset!r} is not prepared in {builder.data_path}, and preparing it needs "
      "TensorFlow, once; run: pip install 'ddpm_jax[prepare]'"
    )
  here = pathlib.Path(__file__).resolve().parents[2]
  environment = dict(os.environ)
  environment.update(
    PYTHONPATH=os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])]),
    CUDA_VISIBLE_DEVICES="-1",  # the GPU belongs to the training process
    TF_CPP_MIN_LOG_LEVEL="3",
    TF_ENABLE_ONEDNN_OPTS="0",
  )
  words = [
    sys.executable,
    "-m",
    "ddpm_jax.data.prepare",
    f"--dataset={data.dataset}",
    f"--data_dir={data.data_dir}",
    f"--manual_dir={data.manual_dir}",
    f"--parent={os.getpid()}",
  ]
  # On a terminal its progress bars are worth seeing; elsewhere what it writes is noise, unless it dies.
  process = subprocess.run(
    words,
    env=environment,
    text=True,
    check=False,
    stdout=subprocess.PIPE,
    stderr=None if console.columns() else subprocess.PIPE,
  )
  if process.returncode:
    lines = (process.stdout or process.stderr or "").strip().splitlines()
    raise UserError(
      lines[-1]
      if lines
      else f"dataset: {data.dataset!r}: preparing it ended with exit code {process.returncode}; run "
      f"{command(f'--dataset={data.dataset}', module='ddpm_jax.data.prepare')} to see why"
    )


def _features(builder: tfds.core.DatasetBuilder) -> dict[str, Any]:
  """The top-level features of an example, by name."""
  features = builder.info.features
  return dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}


def _image_feature(
  data: DataConfig, builder: tfds.core.DatasetBuilder
) -> tuple[str, tuple[int | None, int | None, int | None]]:
  """Name of the first image feature, and the shape (H, W, C) of its images. Raises UserError."""
  features = _features(builder)
  for name, feature in features.items():
    if data.image_field not in ("", name):
      continue
    if isinstance(feature, tfds.features.Image) and len(features[name].shape) == 3:  # four: an animated image
      dtype = np.dtype(features[name].np_dtype)
      if dtype.kind != "u":
        raise UserError(
          f"dataset: the images of {data.dataset!r} are {dtype}, not uint8 or uint16; save them as files "
          f"and use folder:PATH"
        )
      return name, features[name].shape
  if data.image_field:
    raise UserError(
      f"image_field: {data.image_field!r} is no image feature of {data.dataset!r}; it has {', '.join(features)}"
    )
  raise UserError(
    f"dataset: {data.dataset!r} has no image feature, only {', '.join(features)}; use a data set of images"
  )


def _class_feature(data: DataConfig, builder: tfds.core.DatasetBuilder) -> str | None:
  """Name of the feature that is a class: --label_field, or the first one, but none that lies inside another feature.

  Raises:
    UserError: --label_field names none.
  """
  features = _features(builder).items()
  classes = [name for name, feature in features if isinstance(feature, tfds.features.ClassLabel)]
  if data.label_field and data.label_field not in classes:
    raise UserError(
      f"label_field: {data.label_field!r} is no class of {data.dataset}; it has {', '.join(classes) or 'none'}"
    )
  return data.label_field or next(iter(classes), None)


def shards_of(data: DataConfig, splits: Any) -> Sequence[Any]:
  """The records of `data.split`, as TFDS's file instructions. Raises UserError if it is empty, or none of `splits`.

  A record i of one that skips S and takes T is record S + i of its file.
  """
  try:
    size = splits[data.split].num_examples
  except (ValueError, KeyError, AssertionError) as error:
    raise UserError(
      f"split: {data.split!r} is not a split of {data.dataset} ({one_line(error)}); it has "
      f"{', '.join(splits)}, and slices such as '{next(iter(splits), 'train')}[:90%]'"
    ) from None
  if not size:
    raise UserError(
      f"split: {data.split!r} of {data.dataset} is empty; choose another, such as "
      f"{', '.join(name for name in splits if splits[name].num_examples) or '(all are empty)'}"
    )
  return splits[data.split].file_instructions


def _open_split(data: DataConfig, builder: tfds.core.DatasetBuilder) -> Any:
  """TFDS's random-access reader of one split, image features left encoded. Raises UserError."""
  encoded = {
    name: tfds.decode.SkipDecoding()
    for name, feature in _features(builder).items()
    if isinstance(feature, tfds.features.Image | tfds.features.Video)
  }
  open_records: Any = builder.as_data_source  # TFDS's decorator hides its signature from type checkers
  try:
    return open_records(data.split, decoders=encoded, file_format="array_record")
  except (NotImplementedError, ValueError):
    stored: Any = builder.info.file_format
    raise UserError(
      f"data_dir: {builder.data_path} holds {data.dataset} in the format {stored.value}, which has no "
      "random access; use another --data_dir, where it will be prepared as array_record"
    ) from None
