"""The network without labels: what it learns, what is kept of it, and that it needs no labels."""

import dataclasses

import numpy as np
import pytest

from ddpm_jax.data.encoded import Rows
from ddpm_jax.data.sources import Source
from ddpm_jax.evaluation import network, trained
from ddpm_jax.evaluation.network import network_features
from ddpm_jax.training.parallel import Parallel


def slopes(number=80, shape=(6, 6, 1), seed=0):
  """Images that grow lighter from left to right, so that every turn can be seen."""
  rng = np.random.default_rng(seed)
  ramp = np.linspace(20, 200, shape[1])[None, None, :, None]
  pixels = (ramp + rng.integers(0, 50, (number, *shape))).astype(np.uint8)
  return Source("slopes", shape, number, Rows(pixels, np.zeros(number, bool)).take, {"seed": seed})


def features_of(source, cache, *, said=None, batch_size=16, updates=3, **options):
  say = (said if said is not None else []).append
  parallel = Parallel("pmap")
  return network_features(
    source, cache=cache, parallel=parallel, batch_size=batch_size, say=say, updates=updates, **options
  )


@pytest.mark.parametrize(("shape", "turns"), [((6, 6, 1), 4), ((6, 8, 3), 2)])
def test_it_learns_how_images_are_turned(tmp_path, shape, turns):
  """Without labels; images that are not square can only be turned by half."""
  said, source = [], slopes(shape=shape)
  features = features_of(source, tmp_path, said=said, updates=40)
  assert features.name == "network" and features.about["accuracy"] > 0.9
  assert (features.about["trained_on"], features.about["updates"]) == (72, 40)
  assert said[0] == "training a network for the features on 72 images without labels, 40 updates"
  right = round(features.about["accuracy"] * 8 * turns)
  assert said[1].startswith(f"it knows how {right} of {8 * turns} images were turned; that took ")
  found = features.extract(source.read(np.arange(37)).images)
  assert found.features.shape == (37, 64) and found.probabilities.shape == (37, 0)
  assert np.isfinite(found.features).all() and np.ptp(found.features, axis=0).max() > 0


def test_it_is_kept_and_found_again_by_what_it_depends_on(tmp_path, monkeypatch):
  source = slopes()
  first = features_of(source, tmp_path)
  other = features_of(slopes(seed=1), tmp_path)
  assert first.identity != other.identity and len(list(tmp_path.iterdir())) == 2
  assert features_of(source, tmp_path / "elsewhere").identity == first.identity, "of the data set and nothing else"
  monkeypatch.setattr(trained, "train", lambda *_, **__: pytest.fail("it trains"))
  again = features_of(source, tmp_path)
  assert again[:3] == first[:3]
  images = source.read(np.arange(9)).images
  np.testing.assert_array_equal(again.extract(images).features, first.extract(images).features)
  for changed in (dict(updates=4), dict(seed=1)):
    with pytest.raises(pytest.fail.Exception, match="it trains"):
      features_of(source, tmp_path, **changed)


def test_images_held_out_are_not_learnt_from(tmp_path):
  source = slopes()
  pixels = source.read(np.arange(80)).images
  pixels[5::10] = 255 - pixels[5::10]
  other = dataclasses.replace(source, read=Rows(pixels, np.zeros(80, bool)).take)
  first, second = features_of(source, tmp_path / "a", updates=20), features_of(other, tmp_path / "b", updates=20)
  assert first.identity == second.identity and first.about["accuracy"] != second.about["accuracy"]


def test_it_can_be_stopped(tmp_path):
  def beat(what):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    features_of(slopes(), tmp_path, beat=beat)
  assert not list(tmp_path.iterdir())


def test_every_turn_is_asked_for():
  """A guess of one class is right for one turn of each image."""
  source = slopes()

  def second(images):
    return trained.Extracted(np.zeros((len(images), 64)), np.tile([0, 1, 0, 0], (len(images), 1)))

  assert network._ask(source, np.arange(10), (0, 1, 2, 3), second, 4) == {"right": 10, "asked": 40}
