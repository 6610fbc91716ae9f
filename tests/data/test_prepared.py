"""TFDS data sets, read and prepared without TensorFlow."""

import hashlib
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import checksums

from ddpm_jax.config import DataConfig
from ddpm_jax.data import prepare, prepared, sources
from ddpm_jax.errors import UserError
from tests.data import old_digits  # noqa: F401  TFDS knows the data set once this is imported

ROOT = pathlib.Path(__file__).resolve().parents[2]
URL = "https://example.org/stripes.bin"
ORIGINAL = bytes(range(60))
PREPARE = "import sys; from ddpm_jax.data import prepare; from tests.data import old_digits; sys.exit(prepare.main())"


def png(image):
  stream = io.BytesIO()
  Image.fromarray(image).save(stream, "PNG")
  return stream.getvalue()


class Stripes(tfds.core.GeneratorBasedBuilder):
  """Image i is 6 x 10 pixels, transparent but for the middle, which has the grey level i. Made from a download."""

  VERSION = tfds.core.Version("1.0.0")
  url_infos: ClassVar = {
    URL: checksums.UrlInfo(size=len(ORIGINAL), checksum=hashlib.sha256(ORIGINAL).hexdigest(), filename="stripes.bin")
  }

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "label": tfds.features.Scalar(np.int64),
          "picture": tfds.features.Image(shape=(None, None, 4)),
          "mask": tfds.features.Image(shape=(None, None, 1)),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    levels = dl_manager.download(URL).read_bytes()
    return {"train": self._generate_examples(levels[:40]), "test": self._generate_examples(levels[40:])}

  def _generate_examples(self, levels):
    for level in levels:
      picture = np.zeros((6, 10, 4), np.uint8)
      picture[:, 3:7] = [level, level, level, 255]
      yield level, {"label": level, "picture": png(picture), "mask": png(picture[..., 3])}


class Scenes(tfds.core.GeneratorBasedBuilder):
  """Image i has the grey level i and the class "b" if i is odd; those of `test` have no class, those of `same` one.

  Before it there is a number and a class inside another feature, after it a second class.
  """

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "number": tfds.features.Scalar(np.int64),
          "inside": {"kind": tfds.features.ClassLabel(num_classes=600)},
          "picture": tfds.features.Image(shape=(4, 4, 1)),
          "main": tfds.features.ClassLabel(names=["a", "b"]),
          "second": tfds.features.ClassLabel(num_classes=600),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {
      "train": self._generate_examples(range(300), ["a", "b"]),
      "test": self._generate_examples(range(10), ["a", -1]),
      "same": self._generate_examples(range(10), ["b", "b"]),
    }

  def _generate_examples(self, levels, names):
    for level in levels:
      picture = png(np.full((4, 4), level % 251, np.uint8))
      yield (
        level,
        {"number": level, "inside": {"kind": level}, "picture": picture, "main": names[level % 2], "second": level},
      )


class Words(tfds.core.GeneratorBasedBuilder):
  """No image at all."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"word": tfds.features.Text()}))

  def _split_generators(self, dl_manager):
    raise AssertionError("not reached")

  def _generate_examples(self):
    raise AssertionError("not reached")


def open_source(dataset, data_dir, **options):
  return sources.open_source(DataConfig(dataset=dataset, data_dir=str(data_dir), **options))


def refuse(dataset, data_dir, match, **options):
  with pytest.raises(UserError, match=match) as caught:
    open_source(dataset, data_dir, **options)
  assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
  """Where another process, one in which importing TensorFlow fails, has prepared `old_digits` and read a batch."""
  folder = tmp_path_factory.mktemp("data")
  trap = tmp_path_factory.mktemp("trap")
  (trap / "tensorflow").mkdir()
  (trap / "tensorflow" / "__init__.py").write_text("raise SystemExit('TensorFlow was imported')")
  code = """if True:
    import sys
    from ddpm_jax.config import DataConfig
    from ddpm_jax.data import pipeline, prepare, sources
    from tests.data import old_digits
    data = DataConfig(dataset="old_digits", data_dir=sys.argv[1])
    prepare.prepare(data)
    source = sources.open_source(data)
    next(pipeline.batches(source, batch_size=8, seed=0, start_step=0))
    assert len(source.labels()) == len(source)
    assert "tensorflow" not in sys.modules
    print(len(source))
  """
  path = os.pathsep.join([str(trap), str(ROOT)])
  process = subprocess.run(
    [sys.executable, "-c", code, str(folder)],
    env={**os.environ, "PYTHONPATH": path},
    capture_output=True,
    text=True,
    check=False,
  )
  assert (process.returncode, process.stdout.splitlines()[-1:]) == (0, ["1797"]), (
    process.stderr
  )  # TFDS's bars are there
  return folder


@pytest.fixture(scope="module")
def scenes_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  prepare.prepare(DataConfig(dataset="scenes", data_dir=str(folder)))
  return folder


def test_the_first_class_at_the_top_is_the_label(scenes_dir):
  source = open_source("scenes", scenes_dir)
  levels = source.read(np.arange(300)).images[:, 0, 0, 0].astype(int)
  assert set(levels) == set(range(251))
  (first,) = np.nonzero(levels >= 49)  # below, it may be image 251 and on
  assert len(first) > 100
  np.testing.assert_array_equal(source.labels()[first], levels[first] % 2)


def test_images_without_a_class(scenes_dir, stripes_dir):
  """Its label is a number and no class."""
  assert open_source("stripes", stripes_dir, image_size=6).labels is None
  advice = "; use --features=network, or inception with --inception_weights$"
  for split, why in (
    ("test", "has none for image [0-9] of test"),
    ("same", "has one and the same for all images of same"),
  ):
    with pytest.raises(UserError, match=f"^features: 'classifier' needs labels, and scenes {why}{advice}"):
      open_source("scenes", scenes_dir, split=split).labels()


def test_opening_reads_no_label(scenes_dir, monkeypatch):
  before = open_source("scenes", scenes_dir)

  def read(*_):
    raise AssertionError("read")

  monkeypatch.setattr(prepared, "_classes", read)
  source = open_source("scenes", scenes_dir)
  assert source.fingerprint == before.fingerprint
  with pytest.raises(AssertionError, match="read"):
    source.labels()


def test_which_splits_there_are(digits_dir, scenes_dir, stripes_dir, tmp_path):
  def found(dataset, folder, *splits, **options):
    data = DataConfig(dataset=dataset, data_dir=str(folder), split="no such", **options)
    return [sources.has_split(data, split) for split in splits]

  assert found("old_digits", digits_dir, "train", "test", "tra", "") == [True, False, False, False]
  assert found("scenes", scenes_dir, "train", "test", "same", "validation") == [True, True, True, False]
  assert found("stripes", stripes_dir, "test", image_size=6) == [True]
  assert found("digits", tmp_path, "train", "test") == [True, False]
  with pytest.raises(UserError, match="'digit' is unknown"):
    found("digit", tmp_path, "train")


def test_cache_equals_reading_on_demand(digits_dir):
  indices = np.random.default_rng(0).integers(0, 1797, 200)
  cached, on_demand = (open_source("old_digits", digits_dir, cache_gib=gib).read(indices).images for gib in (1.0, 0.0))
  np.testing.assert_array_equal(cached, on_demand)


def test_slices_and_sums_of_splits(digits_dir):
  assert len(open_source("old_digits", digits_dir, split="train[:90%]")) == 1617
  assert len(open_source("old_digits", digits_dir, split="train[:10]+train[-5:]")) == 15


def test_image_size(digits_dir):
  source = open_source("old_digits", digits_dir, image_size=16)
  assert source.image_shape == (16, 16, 1)
  assert source.read(np.array([3])).images.shape == (1, 16, 16, 1)


def test_unknown_and_empty_splits(digits_dir):
  refuse("old_digits", digits_dir, "split: 'test' is not a split of old_digits .* it has train", split="test")
  refuse("old_digits", digits_dir, r"split: 'train\[' is not a split", split="train[")
  refuse("old_digits", digits_dir, r"split: 'train\[:0\]' of old_digits is empty", split="train[:0]")


def test_several_processes_may_prepare_the_same_data_set(tmp_path):
  command = [sys.executable, "-c", PREPARE, "--dataset=old_digits", f"--data_dir={tmp_path}"]
  processes = [
    subprocess.Popen(
      command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(3)
  ]
  assert [(process.communicate()[0], process.returncode) for process in processes] == [("", 0)] * 3
  assert len(open_source("old_digits", tmp_path)) == 1797


@pytest.fixture(scope="module")
def stripes_dir(tmp_path_factory):
  """Where the data set `stripes` is prepared, from a folder of original files and without a network."""
  folder = tmp_path_factory.mktemp("data")
  (folder / "original").mkdir()
  (folder / "original" / "stripes.bin").write_bytes(ORIGINAL)
  prepare.prepare(DataConfig(dataset="stripes", data_dir=str(folder), manual_dir=str(folder / "original")))
  return folder


def test_oblong_transparent_images_with_image_size(stripes_dir):
  source = open_source("stripes", stripes_dir, image_size=6)
  assert source.image_shape == (6, 6, 3)
  assert len(source) == 40
  pixels = source.read(np.arange(40)).images
  np.testing.assert_array_equal(np.sort(pixels[:, 3, 3, 0]), np.arange(40))
  expected = np.repeat(pixels[:, 3:4, 3:4], 6, axis=2)
  expected[:, :, [0, 5]] = 255  # columns 2 and 7 of the image, where it is transparent
  np.testing.assert_array_equal(pixels, np.repeat(expected, 6, axis=1))
  on_demand = open_source("stripes", stripes_dir, image_size=6, cache_gib=0.0)
  np.testing.assert_array_equal(on_demand.read(np.arange(40)).images, pixels)
  assert len(open_source("stripes", stripes_dir, image_size=6, split="test")) == 20


def test_oblong_images_without_image_size(stripes_dir):
  refuse("stripes", stripes_dir, "image_size: 0, .* set --image_size")


def test_a_file_that_is_not_the_original_is_refused(tmp_path):
  (tmp_path / "stripes.bin").write_bytes(ORIGINAL[:-1] + b"x")
  data = DataConfig(dataset="stripes", data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path))
  with pytest.raises(UserError, match=r"^manual_dir: [^\n]*stripes.bin is not the original file[^\n]*$"):
    prepare.prepare(data)
  (tmp_path / "stripes.bin").write_bytes(ORIGINAL)
  prepare.prepare(data)
  with pytest.raises(UserError, match="manual_dir: '/nowhere' is not a folder"):
    prepare.prepare(DataConfig(dataset="stripes", data_dir=str(tmp_path), manual_dir="/nowhere"))


def test_a_data_set_without_images_is_refused_before_it_is_prepared(tmp_path):
  refuse("words", tmp_path, r"dataset: 'words' has no image feature, only word")


def test_preparing_a_data_set_of_tfds_needs_tensorflow_and_says_how(tmp_path, monkeypatch):
  for name in ("kmnist", "cifar10", "lsun/bedroom"):  # TFDS imports its module once, and looks for TensorFlow then
    prepared.make_builder(DataConfig(dataset=name, data_dir=str(tmp_path)))
  monkeypatch.setitem(sys.modules, "tensorflow", None)  # find_spec then finds none, installed or not
  refuse("kmnist", tmp_path, r"dataset: 'kmnist' .*run: pip install 'ddpm_jax\[prepare\]'$")
  refuse("lsun/bedroom", tmp_path, "image_size: 0, but the images of lsun/bedroom have different sizes")
  assert not list(tmp_path.iterdir())
  refuse("cifar10", tmp_path, "manual_dir: '/nowhere' is not a folder", manual_dir="/nowhere")  # its process says so


@pytest.mark.parametrize(
  ("name", "match"),
  [
    ("fashion_mnits", "did you mean fashion_mnist"),
    ("digit", "did you mean digits"),
    (
      "qqqqqq",
      "'qqqqqq' is unknown; use digits, a name from the TFDS catalog, or folder:PATH, zip:PATH, web.* or parq",
    ),
    ("Zip:x.zip", "'Zip' of 'Zip:x.zip' is no kind of own images; did you mean zip:PATH"),
    (str(ROOT), "did you mean folder:/"),
    ("lsun/bedrom", "bedroom"),
    ("cifar10:1.0.0", "3.0.2"),
    ("huggingface:mnist", "community"),
  ],
)
def test_unknown_names(tmp_path, name, match):
  refuse(name, tmp_path, match)


def test_the_first_use_prepares_it_in_a_process_of_its_own(tmp_path, monkeypatch):
  """Where that fails, its one line is the error. The process has to be told of a builder that TFDS does not have."""
  run, find_spec = subprocess.run, importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorflow" or find_spec(name))

  def with_old_digits(words, **options):
    assert words[:3] == [sys.executable, "-m", "ddpm_jax.data.prepare"] and f"--parent={os.getpid()}" in words
    return run([sys.executable, "-c", PREPARE, *words[3:]], **options)

  monkeypatch.setattr(prepared.subprocess, "run", with_old_digits)
  (tmp_path / "file").write_text("")
  refuse("old_digits", tmp_path / "file" / "data", "^data_dir: .*/file/data' cannot be written .* with --data_dir$")
  assert len(open_source("old_digits", tmp_path / "data")) == 1797
  refuse("mnist", "gs://bucket/data", "data_dir: 'gs://bucket/data' is not a local path")


def test_a_format_without_random_access_is_refused(digits_dir, tmp_path):
  copy = tmp_path / "old_digits" / "1.0.0"
  copy.mkdir(parents=True)
  for file in (digits_dir / "old_digits" / "1.0.0").glob("*.json"):
    (copy / file.name).write_bytes(file.read_bytes())
  info = json.loads((copy / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  (copy / "dataset_info.json").write_text(json.dumps(info))
  refuse("old_digits", tmp_path, "data_dir: .* in the format tfrecord, which has no random access")
