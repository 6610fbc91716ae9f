"""What is found to differ when a run is resumed with other data, and what is not."""

import hashlib
import json
import os
import re
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data import fingerprint, prepare, sources
from ddpm_jax.data.encoded import DecodedRows, EncodedImages
from tests.data import old_digits

N = 300  # more than the probe has, so that there are images outside of it


@pytest.fixture
def folder(tmp_path):
  """Image i is filled with grey i % 251. Written without compression, so that all files have one size."""
  (tmp_path / "x" / "sub").mkdir(parents=True)
  for index in range(N):
    write(tmp_path / "x", index, index % 251)
  assert len({file.stat().st_size for file in (tmp_path / "x").rglob("*.png")}) == 1
  return tmp_path / "x"


def write(folder, index, value, size=4):
  path = folder / ("sub" if index % 2 else "") / f"{index:03}.png"
  Image.new("L", (size, size), value).save(path, compress_level=0)
  return path


def take(folder, **options):
  found = sources.open_source(DataConfig(dataset=f"folder:{folder}", **options)).fingerprint
  assert json.loads(json.dumps(found)) == found
  return found


def names(before, after):
  listed = fingerprint.differences(before, after)
  assert listed == [(name, before.get(name), after.get(name)) for name, *_ in listed]
  return {name for name, *_ in listed}


def test_the_digests_are_sha_256_of_what_they_say(folder):
  paths = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.png"))
  levels = [int(re.search(r"(\d+).png", path)[1]) % 251 for path in paths]
  pixels = np.repeat(np.array(levels, np.uint8), 16).reshape(N, 16)
  size = (folder / paths[0]).stat().st_size
  assert take(folder) == {
    "dataset": "folder",
    "images": N,
    "shape": "4x4x1",
    "listing": hashlib.sha256(b"".join(f"{path}\0{size}\0".encode() for path in paths)).hexdigest(),
    "probe": hashlib.sha256(pixels[[k * N // 256 for k in range(256)]]).hexdigest(),
    "pixels": hashlib.sha256(pixels).hexdigest(),
  }


def test_what_may_change(folder, tmp_path):
  before = take(folder)
  uncached = take(folder, cache_gib=0.0)
  assert set(before) - set(uncached) == {"pixels"}
  shutil.copytree(folder, tmp_path / "elsewhere" / "y")
  for path in (tmp_path / "elsewhere").rglob("*.png"):
    os.utime(path, (0, 0))
  others = [
    uncached,
    take(folder, data_threads=7, batch_size=3, on_bad_record="skip", cache_gib=0.0),
    take(tmp_path / "elsewhere" / "y"),
  ]
  for other in others:
    assert fingerprint.differences(before, other) == []
    assert fingerprint.differences(other, before) == []


def test_a_field_that_is_not_there_differs_unless_it_is_pixels():
  before = {"dataset": "folder", "images": 3, "pixels": "ab"}
  assert fingerprint.differences(before, {"dataset": "folder", "pixels": "ab"}) == [("images", 3, None)]
  assert fingerprint.differences({"dataset": "folder"}, before) == [("images", None, 3)]
  assert fingerprint.differences(before, before | {"pixels": "cd"}) == [("pixels", "ab", "cd")]


def test_labels_are_compared_where_that_is_asked_for_and_both_have_them():
  before, other = {"dataset": "folder", "labels": "ab"}, {"dataset": "folder", "labels": "cd"}
  assert fingerprint.differences(before, other) == []
  assert fingerprint.differences(before, other, labels=True) == [("labels", "ab", "cd")]
  assert fingerprint.differences({"dataset": "folder"}, other, labels=True) == []  # of an earlier release
  numbers = np.array([2, 0, 1], np.int64)
  assert fingerprint.of_classes(numbers) == hashlib.sha256(b"\2\0\0\0" + bytes(4) + b"\1\0\0\0").hexdigest()


def test_one_image_more_or_less(folder):
  before = take(folder)
  (folder / "298.png").unlink()
  assert names(before, take(folder)) == {"images", "listing", "probe", "pixels"}
  write(folder, 298, 298 % 251)
  assert names(before, take(folder)) == set()


def test_a_file_replaced_by_another_of_its_size(folder):
  before, uncached = take(folder), take(folder, cache_gib=0.0)
  order = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.png"))
  probed = {k * N // 256 for k in range(256)}
  inside, outside = 0, min(set(range(N)) - probed)
  for place, cached_names, uncached_names in [(outside, {"pixels"}, set()), (inside, {"pixels", "probe"}, {"probe"})]:
    path = folder / order[place]
    original = path.read_bytes()
    changed = np.array(Image.open(path))
    changed[3, 3] ^= 1
    Image.fromarray(changed).save(path, compress_level=0)
    assert path.stat().st_size == len(original)
    assert names(before, take(folder)) == cached_names
    assert names(uncached, take(folder, cache_gib=0.0)) == uncached_names
    path.write_bytes(original)


def test_a_renamed_file_and_another_order(folder):
  before = take(folder, cache_gib=0.0)
  (folder / "000.png").rename(folder / "000a.png")  # its place stays
  assert names(before, take(folder, cache_gib=0.0)) == {"listing"}
  (folder / "000a.png").rename(folder / "zzz.png")
  assert names(before, take(folder, cache_gib=0.0)) == {"listing", "probe"}
  (folder / "zzz.png").rename(folder / "000.png")
  (folder / "000.png").rename(folder / "swap")
  (folder / "002.png").rename(folder / "000.png")
  (folder / "swap").rename(folder / "002.png")
  assert names(before, take(folder, cache_gib=0.0)) == {"probe"}


def test_another_size_of_the_images(folder):
  assert names(take(folder), take(folder, image_size=2)) == {"shape", "probe", "pixels"}
  assert names(take(folder), take(folder, image_size=4)) == set()


def test_where_one_name_ends_and_the_next_begins():
  assert fingerprint.digest(["ab", "c"]) != fingerprint.digest(["a", "bc"])
  assert fingerprint.digest(["\udcff"]) != fingerprint.digest(["\udcfe"])  # bytes 255 and 254 in a file name


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_a_skipped_image_counts_as_what_takes_its_place(folder, cache_gib):
  whole = take(folder, cache_gib=cache_gib)
  content = (folder / "002.png").read_bytes()
  (folder / "000.png").write_bytes(b"x" * len(content))
  broken = take(folder, cache_gib=cache_gib, on_bad_record="skip")
  (folder / "000.png").write_bytes(content)
  assert names(broken, take(folder, cache_gib=cache_gib)) == set()
  assert names(whole, broken) == {"probe", "pixels"} & set(whole)


def test_a_data_set_of_tfds(tmp_path, monkeypatch):
  def take(folder, **options):
    return sources.open_source(DataConfig(dataset="old_digits", data_dir=str(tmp_path / folder), **options)).fingerprint

  prepare.prepare(DataConfig(dataset="old_digits", data_dir=str(tmp_path / "a")))
  before = take("a")
  assert before["dataset"] == "old_digits/1.0.0 train"
  assert (before["images"], before["shape"]) == (1797, "8x8x1")
  assert names(before, take("a", split="train[:90%]")) == {"dataset", "images", "listing", "probe", "pixels"}
  assert names(before, take("a", split="train[:1000]+train[1000:]")) == {"dataset", "listing"}
  (tmp_path / "a").rename(tmp_path / "b")
  assert names(before, take("b")) == set()
  assert names(before, take("b", cache_gib=0.0)) == set()
  monkeypatch.setattr(old_digits.OldDigits, "VERSION", tfds.core.Version("2.0.0"))  # with the same images
  prepare.prepare(DataConfig(dataset="old_digits", data_dir=str(tmp_path / "b")))
  after = take("b")
  assert after["dataset"] == "old_digits/2.0.0 train"
  assert names(before, after) == {"dataset", "listing"}


def test_one_pixel_in_a_cached_set():
  """Image 2 of 500 is outside of the probe, and its file may be as large as before."""
  pixels = np.random.default_rng(0).integers(0, 256, (500, 4, 4, 3), np.uint8)
  assert 2 not in {k * 500 // 256 for k in range(256)}

  def take(pixels, everything):
    rows = DecodedRows(pixels, np.zeros(500, bool))
    encoded = EncodedImages("n", 500, (4, 4, 3), False, "folder", "0", lambda _: [], str)
    return fingerprint.take(encoded, rows.take, everything)

  other = pixels.copy()
  other[2, 1, 1, 1] ^= 1
  assert names(take(pixels, pixels), take(other, other)) == {"pixels"}
  assert names(take(pixels, None), take(other, None)) == set()
