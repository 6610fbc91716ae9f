"""What measures are held against: the data itself, noise, an untrained network; each by a second path."""

import dataclasses

import numpy as np
import pytest

from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.evaluation import measures, yardsticks
from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.reference import measure_reference
from ddpm_jax.evaluation.yardsticks import Data, measure_yardsticks
from ddpm_jax.keys import seeded
from ddpm_jax.sampling import draw as draw_lib
from tests.evaluation.test_evaluate import config_of, pictures, summary_features, weights_of
from tests.training.tiny import IMAGE_SHAPE, random_batch, tiny_run

ALL = ("frechet", "kid", "score", "precision_recall", "density_coverage", "neighbours")


def features_of(images):
  return summary_features().extract(images).features


@pytest.fixture(scope="module")
def config():
  return config_of(measures=ALL, evaluate_samples=40, random_flip=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Two hundred pictures of which ten are there twice."""
  source = pictures(number=200)
  images = source.read(np.arange(200)).images
  images[190:] = images[:10]
  source = dataclasses.replace(source, read=DecodedRows(images, np.zeros(200, bool)).take)
  cache = tmp_path_factory.mktemp("reference")
  reference = measure_reference(source, summary_features(), cache=cache, batch_size=50, say=lambda line: None)
  return images, Data(source, reference, source.fingerprint)


def measure(config, data, cache, *, features=None, said=None, heard=None):
  return measure_yardsticks(
    config,
    weights_of(config),
    features or summary_features(),
    data,
    data,
    cache=cache,
    say=(said if said is not None else []).append,
    beat=(heard if heard is not None else []).append,
  )


@pytest.fixture(scope="module")
def found(config, data, tmp_path_factory):
  return measure(config, data[1], tmp_path_factory.mktemp("found"))


def distance(ours, others):
  first, second = features_of(ours), features_of(others)
  return measures.frechet_distance(first.mean(0), np.cov(first.T), second.mean(0), np.cov(second.T))


def test_the_data_against_itself(config, data, found):
  """Disjoint parts, as many images as there are samples; also where the data has less than twice as many."""
  images, _ = data
  ours, others = yardsticks.halves(200, 40)
  assert len(ours) == 40 and sorted([*ours, *others]) == list(range(200))
  values = found["data"]["values"]
  assert found["data"]["number"] == 40 and values["set_size"] == 40
  assert values["classifier_distance"] == pytest.approx(distance(images[ours], images[others]), rel=1e-4)
  real = features_of(images[others])[np.arange(40) * 160 // 40]
  assert (values["precision"], values["recall"]) == measures.precision_recall(real, features_of(images[ours]))
  ours, others = yardsticks.halves(200, 1_000)  # whose nearest images are looked for
  twins = [i for i in ours if (i < 10 and i + 190 in others) or (i >= 190 and i - 190 in others)]
  assert len(twins) > 0 and values["near_duplicates_pixels"] == pytest.approx(len(twins) / 100, abs=0.011)
  assert [len(part) for part in yardsticks.halves(37, 50)] == [18, 19]


def test_the_score_of_the_data_is_not_that_of_its_order(config, tmp_path):
  """Of four classes one after the other, as subfolders are: runs of one class each have a score of 1."""
  grey = np.repeat(np.array([10, 80, 160, 240], np.uint8), 50)
  images = np.broadcast_to(grey[:, None, None, None], (200, *IMAGE_SHAPE))

  def extract(images):
    levels = np.asarray(images).mean((1, 2, 3))
    return summary_features().extract(images)._replace(probabilities=np.eye(4)[(levels / 80).round().astype(int)])

  source = dataclasses.replace(pictures(number=200), read=DecodedRows(images, np.zeros(200, bool)).take)
  features = Features(*summary_features()[:3], extract)
  reference = measure_reference(source, features, cache=tmp_path, batch_size=50, say=lambda line: None)
  config = config_of(measures=("score",), evaluate_samples=100, random_flip=False)
  found = measure(config, Data(source, reference, source.fingerprint), tmp_path, features=features)
  assert found["data"]["values"]["classifier_score"] > 2.5


def test_noise_and_an_untrained_network_are_far_away(config, data, found):
  images, _ = data
  uniform = np.random.default_rng(0).integers(0, 256, (40, *IMAGE_SHAPE), np.uint8)
  assert found["noise"]["values"]["classifier_distance"] == pytest.approx(distance(uniform, images), rel=1e-4)
  weights = weights_of(config)
  draw = draw_lib.make_draw(
    draw_lib.bind_for_sampling(weights.run, config.sample),
    draw_lib.table_of(config.sample, weights.run.schedule, "fixed_large"),
    first_stage=weights.run.first_stage,
    mesh=weights.run.mesh,
    stream="sample",
  )
  drawn = draw(seeded(tiny_run(config).initial_state().params, 0), np.arange(40, dtype=np.int32))
  value = found["untrained"]["values"]["classifier_distance"]
  assert value == pytest.approx(distance(drawn, images), rel=1e-3)
  assert set(found["noise"]["values"]) == set(found["untrained"]["values"]) < set(found["data"]["values"])


def test_a_network_that_is_not_trained_answers_nothing(config):
  run, batch = tiny_run(config), random_batch(8)
  xt, level = batch["image"] / np.float32(127.5) - 1, run.schedule.level(np.arange(1, 9))
  found = run.denoiser.bind(run.initial_state().params)(xt, level)
  untrained = yardsticks.untrained_denoiser(run.denoiser).bind({})(xt, level)
  np.testing.assert_array_equal(found.x0, untrained.x0)


def test_computed_once_for_each_number_of_samples(config, data, tmp_path):
  def refuse(images):
    raise AssertionError("measured again")

  said, heard = [], []
  first = measure(config, data[1], tmp_path, said=said, heard=heard)
  assert len(said) == 1 and "untrained image 40 of 40" in heard
  dead = Features(*summary_features()[:3], refuse)
  assert measure(config, data[1], tmp_path, features=dead, said=said) == first and len(said) == 1
  with pytest.raises(AssertionError, match="measured again"):
    measure(config_of(measures=ALL, evaluate_samples=41, random_flip=False), data[1], tmp_path, features=dead)
  (path,) = tmp_path.iterdir()
  path.write_bytes(path.read_bytes()[:-1])
  assert measure(config, data[1], tmp_path, said=said) == first
  assert "is damaged" in said[1]


def test_of_a_few_images_only_what_halves_are_enough_for(config, tmp_path):
  source = pictures(number=7)
  reference = measure_reference(source, summary_features(), cache=tmp_path, batch_size=50, say=lambda line: None)
  found = measure(config, Data(source, reference, source.fingerprint), tmp_path)
  assert found["data"]["number"] == 3
  assert set(found["data"]["values"]) == {
    *("classifier_distance", "classifier_kid", "classifier_kid_std", "classifier_score", "classifier_score_std"),
    *("set_size", "near_duplicates_pixels", "near_duplicates_features"),
  }
  assert "coverage" in found["noise"]["values"]


def test_against_a_file_of_statistics(data, found, tmp_path):
  """The data itself has what halves of the features in the file have; without features nothing, but the rest stays."""
  _, (source, reference, *_) = data
  config = config_of(measures=("frechet", "score"), evaluate_samples=40, random_flip=False)
  whole = measure(config, Data(source, reference, "a"), tmp_path)
  for kind in ("data", "noise", "untrained"):
    assert whole[kind]["values"].items() <= found[kind]["values"].items()
  bare = reference._replace(features=reference.features[:0], index=reference.index[:0])
  less = measure(config, Data(source, bare, "b"), tmp_path)
  assert less["data"] == {"number": 0, "values": {}}
  assert less["noise"] == whole["noise"] and len(list(tmp_path.iterdir())) == 2, "kept apart by the file"
