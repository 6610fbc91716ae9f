"""Samples beside data: each number is the measure of what its name says."""

import functools

import numpy as np
import pytest

from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.evaluation import comparison, measures, neighbours
from ddpm_jax.evaluation.comparison import NAMES, Seen, compare, look_up, see
from ddpm_jax.evaluation.features import Extracted, Features
from ddpm_jax.evaluation.moments import add, no_moments
from ddpm_jax.evaluation.reference import Reference, measure_reference

SHAPE = (4, 4, 1)
PROJECT = np.random.default_rng(1).normal(size=(16, 3)) / 255
ALL = ("frechet", "kid", "score", "precision_recall", "density_coverage", "neighbours")


def project(images):
  return (images.reshape(len(images), -1) @ PROJECT).astype(np.float32)


def guess(images):
  odds = np.exp(project(images))
  return (odds / odds.sum(1, keepdims=True)).astype(np.float32)


FEATURES = Features("classifier", "", {}, lambda images: Extracted(project(images), guess(images)))


def random_images(number, seed, low=0):
  return np.random.default_rng(seed).integers(low, 256, (number, *SHAPE), dtype=np.uint8)


def source_of(images):
  return Source("pictures", images.shape[1:], len(images), DecodedRows(images, np.zeros(len(images), bool)).take, {})


def reference_of(images, tmp_path):
  return measure_reference(source_of(images), FEATURES, cache=tmp_path, batch_size=16, say=lambda line: None)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """Data and samples, and what is seen of them."""
  real, fake = random_images(60, 0), random_images(45, 1, low=60)
  return real, fake, reference_of(real, tmp_path_factory.mktemp("cache")), see(FEATURES, fake, 8, lambda number: None)


@pytest.mark.parametrize("batch_size", [1, 8, 45, 100])
def test_all_samples_are_seen(both, batch_size):
  _, fake, _, _ = both
  told = []
  seen = see(FEATURES, fake, batch_size, told.append)
  assert seen.moments.count == 45 and told[-1] == 45 and told == sorted(set(told))
  np.testing.assert_allclose(seen.moments.mean, project(fake).mean(0, np.float64), rtol=1e-12)
  np.testing.assert_array_equal(seen.features, project(fake))
  np.testing.assert_array_equal(seen.probabilities, guess(fake))
  np.testing.assert_array_equal(seen.index, np.arange(45))


def test_no_images():
  with pytest.raises(ValueError, match="no images"):
    see(FEATURES, np.empty((0, *SHAPE), np.uint8), 8, lambda number: None)


def test_only_so_many_features_are_kept_of_either_side(both, monkeypatch):
  _, fake, reference, _ = both
  monkeypatch.setattr(comparison, "MOST", 10)
  seen = see(FEATURES, fake, 8, lambda number: None)
  np.testing.assert_array_equal(seen.index, [0, 4, 9, 13, 18, 22, 27, 31, 36, 40])
  np.testing.assert_array_equal(seen.features, project(fake)[seen.index])
  assert seen.moments.count == len(seen.probabilities) == 45, "moments and scores are of all"
  found = compare(["kid", "precision_recall"], "classifier", reference, seen)
  real = reference.features[np.arange(10) * 6]
  assert found["classifier_kid"] == measures.kid(seen.features, real, subset_size=5)[0]
  assert (found["precision"], found["recall"]) == measures.precision_recall(real, seen.features)
  assert found["set_size"] == 10


def test_values_are_those_of_the_measures(both):
  real, fake, reference, seen = both
  a, b = project(fake).astype(np.float64), project(real).astype(np.float64)
  found = compare(ALL, "inception", reference, seen)
  assert found["fid"] == pytest.approx(measures.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)))
  as_many = project(real)[np.arange(45) * len(real) // 45]
  assert (found["kid"], found["kid_std"]) == measures.kid(project(fake), as_many, subset_size=22)
  assert (found["inception_score"], found["inception_score_std"]) == measures.inception_score(guess(fake))
  assert (found["precision"], found["recall"]) == measures.precision_recall(as_many, project(fake))
  assert (found["density"], found["coverage"]) == measures.density_coverage(as_many, project(fake))
  assert found["set_size"] == 45
  assert len(found) == 10 and all(type(value) in (int, float) for value in found.values())


def test_coverage_does_not_tell_how_many_samples_there_are():
  """Of one and the same distribution nearly all is covered, also by few samples beside many images."""
  rng = np.random.default_rng(0)
  real, fake = (rng.standard_normal((number, 8)).astype(np.float32) for number in (5000, 200))
  reference = Reference(add(no_moments(8), real), np.arange(5000), real)
  seen = Seen(add(no_moments(8), fake), np.full((200, 2), 0.5, np.float32), np.arange(200), fake)
  found = compare(["density_coverage", "precision_recall"], "classifier", reference, seen)
  assert found["coverage"] > 0.9 and found["recall"] > 0.8 and found["set_size"] == 200


def test_only_inception_gives_an_fid(both):
  _, _, reference, seen = both
  found = compare(ALL, "classifier", reference, seen)
  assert set(found) == {
    *("classifier_distance", "classifier_kid", "classifier_kid_std", "classifier_score", "classifier_score_std"),
    *("precision", "recall", "density", "coverage", "set_size"),
  }
  assert not any("fid" in name or "inception" in name for name in found)
  assert NAMES["classifier"].keys() == NAMES["inception"].keys()


def test_only_what_is_asked_for(both):
  _, _, reference, seen = both
  assert set(compare(["frechet"], "inception", reference, seen)) == {"fid"}
  assert compare(["neighbours", "bound"], "inception", reference, seen) == {}


def test_copies_are_found(tmp_path):
  """Twelve of forty samples are training images, one of them a near one."""
  train, samples = random_images(300, 0), random_images(40, 1)
  copied = np.arange(3, 39, 3)
  samples[copied] = train[copied * 7]
  samples[3, 0, 0, 0] ^= 1
  told = []
  seen = see(FEATURES, samples, 16, lambda number: None)
  facts, picture = look_up(
    samples, seen, source_of(train), reference_of(train, tmp_path), FEATURES, 64, flips=False, done=told.append
  )
  assert facts["pixels"]["near_duplicates"] == 12 / 40
  assert facts["features"]["near_duplicates"] >= 11 / 40, "in three dimensions there are coincidences"
  for space in ("pixels", "features"):
    assert (facts[space]["number"], facts[space]["training_images"]) == (40, 300)
  distances = np.linalg.norm(samples.reshape(40, 1, -1).astype(float) - train.reshape(1, 300, -1), axis=2)
  assert facts["pixels"]["median_distance"] == pytest.approx(np.median(distances.min(1)))
  assert told == [64, 128, 192, 256, 300]
  # The picture: eight exact copies with their nearest.
  shown = np.arange(6, 28, 3)
  nearest = np.argsort(distances[shown], axis=1, kind="stable")[:, :7]
  assert (nearest[:, 0] == 7 * shown).all()
  np.testing.assert_array_equal(picture, neighbours.picture(samples[shown], train[nearest]))
  assert picture.dtype == np.uint8


@pytest.mark.parametrize("flips", [False, True])
def test_mirrored_copies_count_where_training_mirrors(tmp_path, monkeypatch, flips):
  """All samples are copies, half of them mirrored; one training image is its own mirror image.

  Then the two smallest distances to all images in both orientations are of that one image, and say nothing.
  """
  train = random_images(60, 0)
  train[0] = np.maximum(train[0], train[0][:, ::-1])
  samples = train[:40].copy()
  samples[::2] = samples[::2, :, ::-1]
  samples[:, 0, 0, 0] ^= 1  # close, but not exact copies
  seen = see(FEATURES, samples, 16, lambda number: None)
  monkeypatch.setattr(comparison, "_SHOWN", len(samples))
  look = functools.partial(look_up, samples, seen, source_of(train), reference_of(train, tmp_path), FEATURES, 16)
  facts, picture = look(flips=flips)
  near = 1.0 if flips else 21 / 40  # 20 are not mirrored, and image 0 is its own mirror image
  assert facts["pixels"]["near_duplicates"] == near
  assert facts["pixels"]["orientations"] == facts["features"]["orientations"] == 1 + flips
  # By a second path: every training image in both orientations, the nearer of each.
  ways = np.stack([train, train[:, :, ::-1]] if flips else [train]).astype(float)
  each = np.linalg.norm((samples[None, :, None] - ways[:, None]).reshape(len(ways), 40, 60, -1), axis=-1)
  assert facts["pixels"]["median_distance"] == pytest.approx(np.median(each.min((0, 2))))
  each_features = [
    np.linalg.norm(project(queries)[:, None] - project(train), axis=2)
    for queries in (samples, samples[:, :, ::-1])[: len(ways)]
  ]
  by_features = np.sort(np.min(each_features, axis=0), axis=1)
  assert facts["features"]["median_distance"] == pytest.approx(np.median(by_features[:, 0]), rel=1e-4, abs=1e-4)
  assert facts["features"]["near_duplicates"] == neighbours.near_duplicates(by_features).mean()
  order = np.argsort(each.min((0, 2)), kind="stable")
  nearest = np.argsort(each.min(0)[order], axis=1, kind="stable")[:, :7]
  way = each.argmin(0)[order[:, None], nearest]
  shown = ways[way, nearest].astype(np.uint8)
  np.testing.assert_array_equal(picture, neighbours.picture(samples[order], shown, way == 1 if flips else None))


def test_a_few_samples_are_looked_up_and_a_small_set(tmp_path, monkeypatch):
  monkeypatch.setattr(comparison, "_LOOKED_UP", 4)
  train, samples = random_images(3, 0), random_images(10, 1)
  samples[2] = train[1]
  seen = see(FEATURES, samples, 16, lambda number: None)
  facts, picture = look_up(samples, seen, source_of(train), reference_of(train, tmp_path), FEATURES, 64, flips=False)
  assert (facts["pixels"]["number"], facts["pixels"]["training_images"]) == (4, 3)
  assert facts["pixels"]["near_duplicates"] == 1 / 4, "samples 0, 2, 5 and 7 are looked up"
  assert picture.shape[0] >= 4 * 66


def test_one_image_has_no_second_nearest(tmp_path):
  train = random_images(1, 0)
  seen = see(FEATURES, train, 16, lambda number: None)
  with pytest.raises(ValueError, match="no second nearest"):
    look_up(train, seen, source_of(train), reference_of(train, tmp_path), FEATURES, 64, flips=False)
