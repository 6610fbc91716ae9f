"""Prepares one TFDS data set as ArrayRecord files: `python -m ddpm_jax.data.prepare --dataset=NAME`.

The only module of the package in whose process TensorFlow may run, and does not for those of `originals`.
`sources.open_source` starts it where a data set is not prepared yet; from then on the files are read without
TensorFlow. Exit code 2: one line on standard output says what is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Iterator

import requests
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.download import download_manager, downloader, extractor, util

from ddpm_jax.config import DataConfig
from ddpm_jax.data import digits, originals, prepared
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import console
from ddpm_jax.runtime.paths import command, expanded

_OFFLINE = (requests.RequestException, util.DownloadError)
# A full disk, a package that a builder needs, files that are to be put into manual_dir by hand (TFDS says which, in an
# AssertionError), a damaged archive.
_FAILURES = (
  OSError,
  ImportError,
  AssertionError,
  ValueError,
  RuntimeError,
  extractor.ExtractError,
  extractor.UnsafeArchiveError,
)


def prepare(data: DataConfig) -> None:
  """Prepares `data.dataset` in `data.data_dir`; does nothing if that is done.

  Several processes may call this at once: the first works, the others wait and find it done.

  Raises:
    UserError: the folder cannot be written, a file of `data.manual_dir` is not the original, a downloaded file is
      damaged, or TFDS cannot download or build the data set.
  """
  builder = prepared.make_builder(data)
  originals.read_without_tensorflow(builder)
  manual_dir = os.path.abspath(expanded("manual_dir", data.manual_dir)) if data.manual_dir else None
  if manual_dir and not os.path.isdir(manual_dir):
    raise UserError(f"manual_dir: {data.manual_dir!r} is not a folder; name the one with the original files")
  with _only_one(builder):
    if prepared.is_prepared(builder):
      return
    if builder.data_path.exists():  # TFDS would take it for prepared
      raise UserError(f"data_dir: {builder.data_path} is not a complete data set; delete that folder")
    try:
      with console.stdout_to_stderr():  # standard output is for the one line of an error
        builder.download_and_prepare(
          file_format="array_record",
          download_config=tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False),
        )
    except download_manager.NonMatchingChecksumError as error:
      path = re.search("downloaded to (.*), has wrong checksum", str(error))
      field, remedy = (
        ("manual_dir", "replace it with the original")
        if manual_dir
        else ("dataset", "try again, or name a folder with the original in --manual_dir")
      )
      raise UserError(
        f"{field}: {path[1] if path else prepared.one_line(error)} is not the original file, its checksum differs from "
        f"TFDS's; {remedy}"
      ) from None
    except _OFFLINE as error:
      files = [info.filename for info in (builder.url_infos or {}).values() if info.filename]
      hint = f" ({', '.join(files)})" if 0 < len(files) <= 8 else ""
      raise UserError(
        f"dataset: {data.dataset!r} cannot be downloaded ({prepared.one_line(error)}); where there is no "
        f"network, name a folder with the original files{hint} in --manual_dir"
      ) from None
    except _FAILURES as error:
      raise UserError(
        f"dataset: {data.dataset!r} cannot be prepared: {type(error).__name__}: {prepared.one_line(error, 1000)}"
      ) from None


@contextlib.contextmanager
def _only_one(builder: tfds.core.DatasetBuilder) -> Iterator[None]:
  """Holds a file lock in the data folder: one process at a time prepares a data set. Raises UserError."""
  root = pathlib.Path(builder.data_dir_root)
  try:
    root.mkdir(parents=True, exist_ok=True)
    lock = os.open(root / f".{builder.name}.lock", os.O_WRONLY | os.O_CREAT, 0o666)
  except OSError as error:
    raise UserError(
      f"data_dir: {str(root)!r} cannot be written ({error.strerror}); name a folder that can with --data_dir"
    ) from None
  try:
    fcntl.lockf(lock, fcntl.LOCK_EX)  # released with the descriptor, also if this process is killed
    yield
  finally:
    os.close(lock)


def _end_with(parent: int) -> None:
  """Ends this process soon after the one that started it has ended; what is half prepared is under another name."""
  while os.getppid() == parent:
    time.sleep(1)
  os._exit(1)


def main() -> int:
  """Returns the exit code."""
  parser = argparse.ArgumentParser(
    prog=command(module="ddpm_jax.data.prepare"), description="Prepares one TFDS data set as ArrayRecord files."
  )
  parser.add_argument("--dataset", required=True, help="name of the data set, such as fashion_mnist")
  parser.add_argument("--data_dir", default="", help="where to put it (default: TFDS's own)")
  parser.add_argument("--manual_dir", default="", help="a folder that holds its original files already")
  parser.add_argument("--parent", type=int, default=0, help="end with this process, which has started this one")
  arguments = vars(parser.parse_args())
  if parent := arguments.pop("parent"):
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
  data = DataConfig(**arguments)
  if digits.is_digits(data):
    console.say("the digits come with ddpm_jax: there is nothing to prepare")
    return 0
  if not console.columns():
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
  downloader.MAX_RETRIES = 4  # a machine without a network fails in seconds, not minutes
  try:
    prepare(data)
  except UserError as error:
    console.say(str(error))
    return 2
  return 0


if __name__ == "__main__":
  console.protect_streams()
  sys.exit(main())
