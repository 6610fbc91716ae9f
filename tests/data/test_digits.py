"""The embedded digits: those of UCI, and those that releases up to 0.1.0 prepared, in the same order."""

import csv
import gzip
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from ddpm_jax.config import DataConfig
from ddpm_jax.data import digits, prepared, sources
from ddpm_jax.data.encoded import decode_all
from ddpm_jax.errors import UserError
from tests.data import old_digits

ROOT = pathlib.Path(__file__).parents[2]
SPLITS = ("train", "train[:90%]", "train[90%:]", "train[100:300]+train[-5:]", "train[7:8]+train", "train[-1:]")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Where the digits are prepared as release 0.1.0 did."""
  folder = tmp_path_factory.mktemp("data")
  old_digits.Digits(data_dir=str(folder)).download_and_prepare(file_format="array_record")
  return folder


@pytest.mark.parametrize("image_size", [0, 6])
def test_they_are_those_that_release_0_1_0_prepared(data_dir, monkeypatch, image_size):
  """Images, order, labels and fingerprint, for every way to write a split: its runs go on."""
  for split in SPLITS:
    data = DataConfig(split=split, data_dir=str(data_dir), image_size=image_size)
    old, new = prepared.open_prepared(data), digits.open_digits(data)
    assert (new.name, new.length, new.shape, new.resize) == (old.name, old.length, old.shape, old.resize)
    np.testing.assert_array_equal(decode_all(new, skip=False).images, decode_all(old, skip=False).images)
    if new.length > 1:
      np.testing.assert_array_equal(new.classes().classes, old.classes().classes)
      assert new.classes().classes.dtype == old.classes().classes.dtype
      assert new.classes().names == old.classes().names == tuple("0123456789")
      assert old.class_names == old.classes().names and new.class_names is None
    after = sources.open_source(data).fingerprint
    with monkeypatch.context() as patch:
      patch.setattr(sources.digits, "is_digits", lambda _: False)
      assert sources.open_source(data).fingerprint == after
  assert prepared.image_shape(data) == sources.image_shape(data)


def test_what_is_refused_is_refused_in_the_same_words(data_dir):
  for split in ("test", "train[", "train[:0]", "train[7:8]", ""):
    told = []
    for opener in (prepared.open_prepared, digits.open_digits):
      with pytest.raises(UserError) as caught:
        opener(DataConfig(split=split, data_dir=str(data_dir))).classes()
      told.append(str(caught.value))
    assert told[0] == told[1], split
  for version in ("digits:2.0.0", "digits:", "digits:1"):
    with pytest.raises(UserError, match=rf"^dataset: '{version}' is unknown; use digits, which has version 1\.0\.0"):
      sources.open_source(DataConfig(dataset=version))
  assert sources.open_source(DataConfig(dataset="digits:1.0.0")).fingerprint["dataset"] == "digits/1.0.0 train"


def test_they_are_those_of_uci():
  """Counts and the first line of optdigits.tes, as published with the data set."""
  source = sources.open_source(DataConfig())
  assert (source.name, source.image_shape, len(source)) == ("digits", (8, 8, 1), 1797)
  labels = source.labels()
  np.testing.assert_array_equal(np.bincount(labels), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
  first = np.array(
    [
      [0, 0, 5, 13, 9, 1, 0, 0],
      [0, 0, 13, 15, 10, 15, 5, 0],
      [0, 3, 15, 2, 0, 11, 8, 0],
      [0, 4, 12, 0, 0, 8, 8, 0],
      [0, 5, 8, 0, 0, 9, 8, 0],
      [0, 4, 11, 0, 1, 12, 7, 0],
      [0, 2, 14, 5, 10, 12, 0, 0],
      [0, 0, 6, 13, 10, 0, 0, 0],
    ]
  )
  pixels = source.read(np.arange(1797)).images
  assert pixels.dtype == np.uint8
  (places,) = np.nonzero((np.abs(pixels[..., 0] - first * 255 / 16) <= 0.5).all((1, 2)))
  assert len(places) == 1
  assert labels[places[0]] == 0
  levels = np.unique(pixels)
  assert (len(levels), levels[0], levels[-1]) == (17, 0, 255)


def test_each_has_the_label_of_its_line():
  with gzip.open(old_digits.FILE, "rt") as file:
    lines = np.array(list(csv.reader(file)), int)
  expected = {np.round(line[:64] * 255 / 16).astype(np.uint8).tobytes(): line[64] for line in lines}
  assert len(expected) == 1797
  for options in ({}, {"cache_gib": 0.0}, {"split": "train[100:300]+train[-5:]"}):
    source = sources.open_source(DataConfig(**options))
    pixels = source.read(np.arange(len(source))).images
    np.testing.assert_array_equal(source.labels(), [expected[image.tobytes()] for image in pixels])


@pytest.mark.parametrize("home", [None, "/dev/null/home"])
def test_they_need_no_folder_that_can_be_written(monkeypatch, home):
  """Nothing can be made in these, whoever tries."""
  monkeypatch.delenv("HOME", raising=False)
  if home:
    monkeypatch.setenv("HOME", home)
  for name in ("TFDS_DATA_DIR", "XDG_CACHE_HOME", "TMPDIR"):
    monkeypatch.setenv(name, "/dev/null/nothing")
  monkeypatch.setattr(tempfile, "tempdir", "/dev/null/nothing")
  for data_dir in ("", "/dev/null/data", "gs://bucket/data"):
    data = DataConfig(data_dir=data_dir)
    assert len(sources.open_source(data)) == 1797
    assert sources.image_shape(data) == (8, 8, 1)
    assert sources.has_split(data, "train") and not sources.has_split(data, "test")


def test_there_is_nothing_to_prepare(tmp_path):
  command = [sys.executable, "-m", "ddpm_jax.data.prepare", "--dataset=digits", f"--data_dir={tmp_path}"]
  done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
  assert done.stdout == "the digits come with ddpm_jax: there is nothing to prepare\n"
  assert list(tmp_path.iterdir()) == []
