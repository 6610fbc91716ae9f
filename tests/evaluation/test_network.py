"""The network without labels: what it learns, what is kept of it, and that it needs no labels."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.devices import make_mesh
from ddpm_jax.evaluation import network, trained
from ddpm_jax.evaluation.network import network_features, network_for
from ddpm_jax.workdir.arrays import load_arrays


def slopes(number=80, shape=(4, 4, 1), seed=0):
  """Images that grow lighter from left to right."""
  rng = np.random.default_rng(seed)
  ramp = np.linspace(20, 200, shape[1])[None, None, :, None]
  pixels = (ramp + rng.integers(0, 50, (number, *shape))).astype(np.uint8)
  return Source("slopes", shape, number, DecodedRows(pixels, np.zeros(number, bool)).take, {"seed": seed})


def features_of(source, cache, *, said=None, batch_size=16, updates=3, **options):
  say = (said if said is not None else []).append
  mesh = make_mesh("pmap")
  return network_features(source, cache=cache, mesh=mesh, batch_size=batch_size, say=say, updates=updates, **options)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
  said, source, cache = [], slopes(), tmp_path_factory.mktemp("learnt")
  return source, features_of(source, cache, said=said, updates=40), said, cache


def test_it_learns_to_remove_noise_without_labels(learnt):
  source, features, said, _ = learnt
  assert features.name == "network" and 0.3 < features.about["explained"] < 1
  assert (features.about["trained_on"], features.about["updates"]) == (72, 40)
  assert said[0] == "training a network for the features on 72 images without labels, 40 updates"
  share = round(100 * features.about["explained"])
  assert said[1].startswith(f"it predicts {share}% of the noise in 8 other images; that took ")
  found = features.extract(source.read(np.arange(37)).images)
  assert found.features.shape == (37, 66) and found.probabilities.shape == (37, 0)
  assert np.isfinite(found.features).all() and np.linalg.matrix_rank(found.features) > 30


def test_before_it_is_trained_it_explains_nothing():
  """As its last layer is zero, it predicts the mean of the noise."""
  source, unet = slopes(), network_for((4, 4, 1))
  weights = trained.flat(trained.fresh(unet.init, 0))
  (share,) = network._ask(unet, source, np.arange(5, 80, 10), weights, make_mesh("pmap"), 16).values()
  assert share == pytest.approx(0, abs=4 * np.sqrt(2 / (64 * 16)))  # the variance of that of 64 images of 16 pixels


def test_features_are_means_and_deviations_of_its_maps(learnt):
  """By a second path, from the file: of an image in [-1, 1] times sqrt(alpha_bar_100) of the cosine schedule."""
  source, features, _, cache = learnt
  weights, _ = load_arrays(next(cache.iterdir()))
  f = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731  Nichol and Dhariwal 2021, eq. 17
  images = source.read(np.arange(9)).images
  x = np.sqrt(f(100) / f(0)) * (images / 127.5 - 1)
  unet = network_for((4, 4, 1))
  with jax.default_matmul_precision("highest"):
    apply = jax.jit(
      lambda x, t: unet.model.apply({"params": trained.nested(weights)}, x, t, capture_intermediates=True)
    )
    noise, state = apply(x.astype(np.float32), jnp.full(9, 99))
  low, full = (np.asarray(state["intermediates"][f"up{i}_block1"]["__call__"][0], np.float64) for i in (1, 0))
  parts = low.mean((1, 2)), full.mean((1, 2)), full.std((1, 2)), noise.mean((1, 2)), noise.std((1, 2))
  expected = np.concatenate(parts, axis=1)
  np.testing.assert_allclose(features.extract(images).features, expected, atol=2e-5)


@pytest.mark.parametrize(
  ("shape", "patch", "taken"),
  [
    ((8, 8, 1), 1, (8, 8, 1)),
    ((7, 1, 2), 1, (8, 2, 2)),
    ((28, 28, 1), 2, (14, 14, 4)),
    ((33, 32, 3), 3, (12, 12, 27)),
    ((256, 256, 3), 16, (16, 16, 768)),
    ((4096, 16, 1), 16, (256, 2, 256)),
  ],
)
def test_large_images_are_cut_into_patches(shape, patch, taken):
  """Every pixel is there once, what is added repeats the edge, and neighbours stay neighbours."""
  unet = network_for(shape)
  assert (unet.patch, unet.shape) == (patch, taken)
  images = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
  found = np.asarray(unet.scaled(images))
  (rows, columns, _), channels = taken, shape[2]
  blocks = found.reshape(2, rows, columns, patch, patch, channels)
  whole = np.stack([np.concatenate([np.concatenate(list(row), axis=1) for row in image]) for image in blocks])
  top, left = (rows * patch - shape[0]) // 2, (columns * patch - shape[1]) // 2
  inner = whole[:, top : top + shape[0], left : left + shape[1]]
  np.testing.assert_allclose(inner, images / 127.5 - 1, atol=1e-6)
  np.testing.assert_array_equal(whole[:, 0, left : left + shape[1]], inner[:, 0])
  np.testing.assert_array_equal(whole[:, top : top + shape[0], -1], inner[:, :, -1])


def test_it_is_kept_and_found_again_by_what_it_depends_on(tmp_path, monkeypatch):
  source = slopes()
  first = features_of(source, tmp_path)
  monkeypatch.setattr(trained, "train", lambda *_, **__: pytest.fail("it trains"))
  again = features_of(source, tmp_path)
  assert json.dumps(again[:3]) == json.dumps(first[:3])
  images = source.read(np.arange(9)).images
  np.testing.assert_array_equal(again.extract(images).features, first.extract(images).features)
  for other, changed in ((slopes(seed=1), {}), (source, dict(updates=4)), (source, dict(seed=1))):
    with pytest.raises(pytest.fail.Exception, match="it trains"):
      features_of(other, tmp_path, **changed)
  monkeypatch.setattr(network, "_RECIPE", [*network._RECIPE, "another"])
  with pytest.raises(pytest.fail.Exception, match="it trains"):
    features_of(source, tmp_path)


def test_images_held_out_are_not_learnt_from(tmp_path):
  source = slopes()
  pixels = source.read(np.arange(80)).images
  pixels[5::10] = 255 - pixels[5::10]
  other = dataclasses.replace(source, read=DecodedRows(pixels, np.zeros(80, bool)).take)
  first, second = features_of(source, tmp_path / "a"), features_of(other, tmp_path / "b")
  assert first.identity == second.identity and first.about["explained"] != second.about["explained"]


def test_of_one_image_none_is_held_out(tmp_path):
  said = []
  features = features_of(slopes(1), tmp_path, said=said)
  assert features.about["explained"] == 0 and "0% of the noise in 0 other images" in said[1]


def test_it_tells_how_far_it_is_and_can_be_stopped(tmp_path):
  heard = []

  @contextlib.contextmanager
  def counted(what, total):
    def done(number):
      heard.append((what, total, number))
      if number == 20:
        raise KeyboardInterrupt

    yield done

  with pytest.raises(KeyboardInterrupt):
    features_of(slopes(), tmp_path, updates=20, counted=counted)
  assert heard == [("update", 20, number) for number in (0, 10, 20)]
  assert not list(tmp_path.iterdir())


def test_the_noise_of_each_channel_is_told_apart():
  """Over all pixels, wherever a pixel of the U-Net's is a patch of the image."""
  unet, source = network_for((18, 18, 3)), slopes(shape=(18, 18, 3))
  params = trained.fresh(unet.init, 0)
  params["conv_out"]["kernel"] = jax.random.normal(jax.random.key(0), params["conv_out"]["kernel"].shape)
  images = source.read(np.arange(2)).images
  x = np.float32(network._SCHEDULE.sqrt_alpha_bar[100]) * unet.scaled(images)
  (found, _), noise = jax.jit(
    lambda: (unet.forward(params, images), unet.model.apply({"params": params}, x, jnp.full(2, 99)))
  )()
  noise = np.asarray(noise)
  assert found.shape == (2, 70) and unet.shape == (10, 10, 12)
  for channel in range(3):
    pixels = noise[..., channel::3].reshape(2, -1)
    np.testing.assert_allclose(found[:, 64 + channel], pixels.mean(1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found[:, 67 + channel], pixels.std(1), rtol=1e-3)
