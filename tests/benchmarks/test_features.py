import numpy as np
import pytest

from benchmarks import features
from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import UserError

SHAPE = (8, 8, 3)


def pictures(number=60):
  images = np.random.default_rng(0).integers(40, 200, (number, *SHAPE), dtype=np.uint8)
  labels = np.arange(number, dtype=np.int32) % 10
  return Source("pictures", SHAPE, number, DecodedRows(images, np.zeros(number, bool)).take, {}, lambda: labels)


def test_halves_share_nothing():
  first, second = features.halves(pictures())
  rows = [part.read(np.arange(30)).images.reshape(30, -1) for part in (first, second)]
  assert len(np.unique(np.concatenate(rows), axis=0)) == 60
  images, labels = pictures().read(np.arange(60)).images, pictures().labels()
  for part in (first, second):
    places = [np.flatnonzero((images == row).all(axis=(1, 2, 3)))[0] for row in part.read(np.arange(30)).images]
    np.testing.assert_array_equal(labels[places], part.labels())


def test_damage_is_what_it_is_called():
  """Each kind of a size that can be counted; none at all where nothing is to be damaged."""
  source = pictures()
  images, labels = source.read(np.arange(60)).images, source.labels()
  changed = {name: features.damage(name, sizes[2], images, labels) for name, sizes in features.SIZES.items()}
  assert {found.shape for found in changed.values()} == {images.shape}
  difference = {name: found.astype(int) - images for name, found in changed.items()}
  assert difference["noise"].std() == pytest.approx(8, rel=0.1) and abs(difference["noise"].mean()) < 1
  assert (difference["colour"][..., 0] == 16).all() or (difference["colour"][..., 0] == -16).all()
  assert not difference["colour"][..., 1:].any()
  assert changed["blur"].std() < 0.6 * images.std() and abs(difference["blur"].mean()) < 1
  assert len(np.unique(labels[[(images == row).all(axis=(1, 2, 3)).argmax() for row in changed["missing"]]])) == 6
  assert (difference["swap"].any(axis=(1, 2, 3)).sum(), difference["swap"][:, :4].any()) == (24, False)
  assert ((changed["hide"] == 128).all(axis=3).sum(axis=(1, 2)) >= 4).all()
  assert len(np.unique(features.damage("repeat", 5, images, labels), axis=0)) <= 5
  clouds = features.damage("clouds", 1, images, labels).reshape(60, -1)
  assert abs(clouds.mean() - images.mean()) < 2 and clouds.std() == pytest.approx(images.std(), rel=0.15)


def test_the_table():
  """Distances of the means of pixels, by a second path; more damage is farther away, and the rank says so."""
  source = pictures()
  images = source.read(np.arange(60)).images
  damaged = {("colour", size): features.damage("colour", size, images, None) for size in features.SIZES["colour"]}
  found = features.measure(lambda batch: batch.mean(axis=(1, 2)), source, images, damaged)
  assert found["none", 0.0] == pytest.approx(0, abs=1e-9)
  for size in features.SIZES["colour"][:2]:
    assert found["colour", size] == pytest.approx(size**2, rel=1e-6)
  lines = features.text({"network": found | {("none", 0.0): 1.0}}).splitlines()
  assert len(lines) == 3 and lines[2].split()[:2] == ["colour", "network"] and lines[2].split()[-1] == "1.00"
  assert features.rank_correlation([5, 4, 3, 2, 1]) == -1
  assert features.rank_correlation([1, 3, 2, 4, 5]) == pytest.approx(0.9)


def test_wrong_input():
  for kinds, model, message in (
    ("vgg", "", "kinds: 'vgg' is none of"),
    ("unet", "", "model: "),
    ("network", "x", "model: "),
  ):
    with pytest.raises(UserError, match=message):
      features.parse_kinds(kinds, model)
