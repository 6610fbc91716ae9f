"""Statistics of a data set: of every image once, and computed once."""

import numpy as np
import pytest

from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.evaluation import reference as reference_lib
from ddpm_jax.evaluation.features import Extracted, Features
from ddpm_jax.evaluation.moments import covariance
from ddpm_jax.evaluation.reference import batches_of, evenly_spaced, measure_reference

SHAPE = (4, 4, 1)
PROJECT = np.random.default_rng(1).normal(size=(16, 5))


def pictures(number=37, seed=0):
  images = np.random.default_rng(seed).integers(0, 256, (number, *SHAPE), dtype=np.uint8)
  return Source(
    "pictures", SHAPE, number, DecodedRows(images, np.zeros(number, bool)).take, {"probe": f"{seed}"}
  ), images


def sums(images):
  return (images.reshape(len(images), -1) @ PROJECT).astype(np.float32)


class Extractor:
  """Counts what it is asked for."""

  def __init__(self, identity="sums"):
    self.batches = []
    self.features = Features("classifier", identity, {}, self.extract)

  def extract(self, images):
    assert images.dtype == np.uint8
    self.batches.append(len(images))
    return Extracted(sums(images), np.ones((len(images), 1), np.float32))


def measure(source, extractor, cache, batch_size=10, said=None, **options):
  say = (said if said is not None else []).append
  return measure_reference(source, extractor.features, cache=cache, batch_size=batch_size, say=say, **options)


@pytest.mark.parametrize("batch_size", [1, 10, 37, 100])
def test_each_image_counts_once_whatever_the_batch(tmp_path, batch_size):
  source, images = pictures()
  found = measure(source, Extractor(), tmp_path, batch_size)
  wanted = sums(images).astype(np.float64)
  assert found.moments.count == 37
  np.testing.assert_allclose(found.moments.mean, wanted.mean(0), rtol=1e-12)
  np.testing.assert_allclose(covariance(found.moments), np.cov(wanted.T), rtol=1e-10)
  np.testing.assert_array_equal(found.index, np.arange(37))
  np.testing.assert_array_equal(found.features, sums(images))
  assert found.features.dtype == np.float32


def test_computed_once(tmp_path):
  source, _ = pictures()
  extractor, said, done = Extractor(), [], []
  first = measure(source, extractor, tmp_path / "cache", said=said, done=done.append)
  assert extractor.batches == [10, 10, 10, 7] and done == [10, 20, 30, 37]
  assert said == ["computing the features of 37 images of pictures"]
  again = measure(source, extractor, tmp_path / "cache", batch_size=4, said=said, done=done.append)
  assert len(extractor.batches) == 4 and len(said) == 1 and len(done) == 4
  assert again.moments.count == first.moments.count
  for one, two in ((again.moments[1], first.moments[1]), (again.moments[2], first.moments[2]), (again[1:], first[1:])):
    for a, b in zip(one, two, strict=True):
      assert a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize("other", ["images", "extractor"])
def test_other_images_or_another_extractor_anew(tmp_path, other):
  measure(pictures()[0], Extractor(), tmp_path)
  source, images = pictures(seed=1) if other == "images" else pictures()
  extractor = Extractor("other" if other == "extractor" else "sums")
  found = measure(source, extractor, tmp_path)
  assert sum(extractor.batches) == 37
  np.testing.assert_array_equal(found.features, sums(images))
  assert len(list(tmp_path.iterdir())) == 2, "both are kept"
  measure(source, extractor, tmp_path)
  assert sum(extractor.batches) == 37


def damage(path):
  data = bytearray(path.read_bytes())
  data[-5] ^= 4
  path.write_bytes(data)


@pytest.mark.parametrize("how", ["bit", "short", "other"])
def test_a_damaged_cache_is_computed_anew(tmp_path, how):
  source, images = pictures()
  measure(source, Extractor(), tmp_path)
  (path,) = tmp_path.iterdir()
  if how == "bit":
    damage(path)
  elif how == "short":
    path.write_bytes(path.read_bytes()[:100])
  else:  # intact, but under another's name
    measure(pictures(seed=1)[0], Extractor(), tmp_path / "other")
    (other,) = (tmp_path / "other").iterdir()
    other.rename(path)
    (tmp_path / "other").rmdir()
  extractor, said = Extractor(), []
  found = measure(source, extractor, tmp_path, said=said)
  np.testing.assert_array_equal(found.features, sums(images))
  assert sum(extractor.batches) == 37
  assert said[0].startswith(f"warning: {path} is damaged (") and said[0].endswith("; computing it anew")
  measure(source, extractor, tmp_path, said=said)
  assert sum(extractor.batches) == 37 and len(said) == 2


def test_a_cache_that_cannot_be_written(tmp_path):
  (tmp_path / "cache").write_text("a file")
  said = []
  assert measure(pictures()[0], Extractor(), tmp_path / "cache" / "deep", said=said).moments.count == 37
  assert said[-1].startswith("warning: cannot keep the statistics in ")


def test_as_many_features_as_there_is_room_for(tmp_path, monkeypatch):
  monkeypatch.setattr(reference_lib, "_KEPT_NUMBERS", 8 * 5 + 4)
  source, images = pictures()
  for cache in ("first", "first", "second"):
    found = measure(source, Extractor(), tmp_path / cache, batch_size=10 if cache == "first" else 3)
    np.testing.assert_array_equal(found.index, [0, 4, 9, 13, 18, 23, 27, 32])
    np.testing.assert_array_equal(found.features, sums(images)[found.index])
    assert found.moments.count == 37
    np.testing.assert_allclose(found.moments.mean, sums(images).mean(0, np.float64), rtol=1e-12)


def test_what_listens_may_end_it(tmp_path):
  def stop(number):
    if number == 20:
      raise InterruptedError

  extractor = Extractor()
  with pytest.raises(InterruptedError):
    measure(pictures()[0], extractor, tmp_path, done=stop)
  assert sum(extractor.batches) == 20 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "most"), [(1, 1), (5, 5), (5, 9), (10, 3), (1000, 7), (10**9, 4)])
def test_evenly_spaced(number, most):
  index = evenly_spaced(number, most)
  assert index.dtype == np.int64 and len(index) == min(number, most) and index[0] == 0 and index[-1] < number
  gaps = np.diff(index)
  assert (gaps > 0).all() and (not len(gaps) or gaps.max() - gaps.min() <= 1)


def test_batches_follow_the_index():
  source, images = pictures()
  index = np.array([3, 1, 30, 8, 9])
  found = list(batches_of(source, index, 2))
  assert [(first, len(part)) for first, part in found] == [(0, 2), (2, 2), (4, 1)]
  np.testing.assert_array_equal(np.concatenate([part for _, part in found]), images[index])
