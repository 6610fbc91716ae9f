"""Four data sets of TFDS, prepared from small files in their original formats, without TensorFlow.

The oracle is TFDS's own builder: it reads the same files with its own code, for which a few functions of TensorFlow are
replaced by those of Python and Pillow.
"""

import gzip
import hashlib
import http.server
import io
import json
import shutil
import sys
import tarfile
import threading
import types

import chex
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import checksums, extractor
from tensorflow_datasets.core.features import image_feature

from ddpm_jax.config import DataConfig
from ddpm_jax.data import originals, prepare, sources
from ddpm_jax.errors import UserError

TRAIN, TEST = 25, 10  # images of train (in five files: CIFAR-10) and of test


def idx(array):
  """The format as LeCun describes it."""
  return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def mnist_files():
  rng = np.random.default_rng(0)
  files = {}
  for prefix, count in (("train", TRAIN), ("t10k", TEST)):
    images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, count, dtype=np.uint8)
    files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(idx(images), mtime=0)
    files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(idx(labels), mtime=0)
  return files


def cifar_files(name):
  """The binary version, as its page describes it: <label> <1,024 red> <1,024 green> <1,024 blue>, row by row."""
  rng = np.random.default_rng(1)

  def records(count):
    labels = [rng.integers(0, limit, count, dtype=np.uint8) for limit in ((10,) if name == "cifar10" else (20, 100))]
    pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    return np.concatenate([np.stack(labels, 1), pixels], 1).tobytes()

  if name == "cifar10":
    folder = "cifar-10-batches-bin"
    members = {f"data_batch_{number}.bin": records(TRAIN // 5) for number in range(1, 6)}
    members |= {"test_batch.bin": records(TEST), "readme.html": b"<html>"}
    members["batches.meta.txt"] = "".join(f"kind_{label}\n" for label in range(10)).encode() + b"\n"
  else:
    folder = "cifar-100-binary"
    members = {"train.bin": records(TRAIN), "test.bin": records(TEST)}
    members["fine_label_names.txt"] = "".join(f"fine_{label}\n" for label in range(100)).encode()
    members["coarse_label_names.txt"] = "".join(f"coarse_{label}\n" for label in range(20)).encode()
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode="w:gz") as archive:
    entry = tarfile.TarInfo(folder)
    entry.type = tarfile.DIRTYPE
    archive.addfile(entry)
    for member in sorted(members):
      entry = tarfile.TarInfo(f"{folder}/{member}")
      entry.size = len(members[member])
      archive.addfile(entry, io.BytesIO(members[member]))
  return {f"{name.replace('cifar', 'cifar-')}-binary.tar.gz": stream.getvalue()}


def write_originals(name, folder, monkeypatch):
  """Writes small original files into a new folder, with whose checksums TFDS is content. Returns the folder."""
  files = cifar_files(name) if name.startswith("cifar") else mnist_files()
  folder.mkdir(parents=True)
  for file, content in files.items():
    (folder / file).write_bytes(content)
  cls = tfds.builder_cls(name)
  urls = {info.filename: url for url, info in cls.url_infos.items()}
  expect(cls, {urls[file]: file for file in files}, folder, monkeypatch)
  return folder


def expect(cls, urls, folder, monkeypatch):
  """Tells TFDS the checksums of the files that lie in a folder, as those of a data set. urls: URL -> file."""
  infos = {}
  for url, file in urls.items():
    content = (folder / file).read_bytes()
    infos[url] = checksums.UrlInfo(len(content), hashlib.sha256(content).hexdigest(), file)
  monkeypatch.setattr(cls, "url_infos", infos)


def prepare_with_tfds(name, data_dir, manual_dir, monkeypatch):
  """TFDS's own builder, with Python's functions for those of TensorFlow; its PNG files are not compressed."""
  cls = tfds.builder_cls(name)
  module = sys.modules[cls.__module__]
  gfile = types.SimpleNamespace(GFile=open)
  tensorflow = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile), compat=types.SimpleNamespace(as_text=str))

  def encode(_, image):
    stream = io.BytesIO()
    Image.fromarray(image.squeeze()).save(stream, "PNG", compress_level=0)
    return stream.getvalue()

  with monkeypatch.context() as patch:
    for user in (module, extractor):
      patch.setattr(user, "tf", tensorflow)
    patch.setattr(image_feature._ImageEncoder, "_encode_image", encode)
    if "mnist" in name:
      patch.setattr(module, "_TRAIN_EXAMPLES", TRAIN)
      patch.setattr(module, "_TEST_EXAMPLES", TEST)
    tfds.builder(name, data_dir=data_dir).download_and_prepare(
      file_format="array_record", download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
    )


@pytest.fixture
def without_tensorflow(tmp_path, monkeypatch):
  """Where importing TensorFlow, which is there, ends the test."""
  (tmp_path / "trap").mkdir()
  (tmp_path / "trap" / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
  monkeypatch.syspath_prepend(tmp_path / "trap")
  yield
  assert "tensorflow" not in sys.modules


def described(folder):
  """The files that describe a data set, without the size of the records, which depends on the compression."""
  found = {path.name: path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".txt")}
  info = json.loads(found["dataset_info.json"])
  assert [int(split.pop("numBytes")) > 0 for split in info["splits"]] == [True, True]
  return {**found, "dataset_info.json": info}


@pytest.mark.parametrize("name", sorted(originals.NAMES))
def test_it_is_the_data_set_that_tfds_prepares(name, tmp_path, monkeypatch, without_tensorflow):
  files = write_originals(name, tmp_path / "files", monkeypatch)
  prepare_with_tfds(name, tmp_path / "theirs", files, monkeypatch)
  prepare.prepare(DataConfig(dataset=name, data_dir=str(tmp_path / "ours"), manual_dir=str(files)))
  assert described(tmp_path / "ours" / name) == described(tmp_path / "theirs" / name)

  for split, count in (("train", TRAIN), ("test", TEST)):
    theirs, ours = (
      list(tfds.builder(name, data_dir=tmp_path / who).as_data_source(split)) for who in ("theirs", "ours")
    )
    assert len(ours) == count
    chex.assert_trees_all_equal(ours, theirs)
    opened = [
      sources.open_source(DataConfig(dataset=name, data_dir=str(tmp_path / who), split=split))
      for who in ("theirs", "ours")
    ]
    assert opened[0].fingerprint == opened[1].fingerprint
    np.testing.assert_array_equal(opened[0].labels(), opened[1].labels())


def test_the_files_are_downloaded_once_and_no_other_file_is_taken(tmp_path, monkeypatch, without_tensorflow):
  files = write_originals("cifar10", tmp_path / "files", monkeypatch)
  (file,) = (path.name for path in files.iterdir())
  asked = []

  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *arguments):
      super().__init__(*arguments, directory=files)

    def log_message(self, *_):
      asked.append(self.path)

  data = DataConfig(dataset="cifar10", data_dir=str(tmp_path / "data"))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever).start()
    url = f"http://127.0.0.1:{server.server_port}/{file}"
    expect(tfds.builder_cls("cifar10"), {url: file}, files, monkeypatch)
    try:
      content = (files / file).read_bytes()
      (files / file).write_bytes(content[:-1] + b"x")
      with pytest.raises(UserError, match=r"^dataset: [^\n]*\.gz is not the original file[^\n]* in --manual_dir$"):
        prepare.prepare(data)
      (files / file).write_bytes(content)
      prepare.prepare(data)
    finally:
      server.shutdown()
  assert asked == [f"/{file}"] * 2
  assert len(sources.open_source(data)) == TRAIN

  shutil.rmtree(tmp_path / "data" / "cifar10")  # what was downloaded is still there
  (downloaded,) = (tmp_path / "data" / "downloads").rglob("127*.gz")
  prepare.prepare(data)
  shutil.rmtree(tmp_path / "data" / "cifar10")
  downloaded.write_bytes(content[: len(content) // 2])
  with pytest.raises(UserError, match=rf"^dataset: {downloaded} is damaged \([^\n]*\); delete it, and [^\n]*$"):
    prepare.prepare(data)
  downloaded.unlink()
  monkeypatch.setattr(prepare.downloader, "MAX_RETRIES", 0)
  with pytest.raises(UserError, match=r"cannot be downloaded [^\n]* \(cifar-10-binary.tar.gz\) in --manual_dir"):
    prepare.prepare(data)


def test_a_damaged_idx_file(tmp_path):
  whole = idx(np.zeros((3, 28, 28), np.uint8))
  for content in (b"", b"no gzip", gzip.compress(whole)[:-9], gzip.compress(whole[:-1]), gzip.compress(whole[:3])):
    (tmp_path / "file.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"^dataset: [^\n]*file.gz is damaged \([^\n]+\); delete it[^\n]*$"):
      originals._idx(str(tmp_path / "file.gz"))
