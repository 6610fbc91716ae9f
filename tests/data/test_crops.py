"""Random crops are a function of (seed, step, index): images whose pixels are the numbers of their columns."""

import itertools

import chex
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data import crops, pipeline, sources

N, B, SIZE, LONG = 30, 8, 4, 20  # images of 4 x 20 pixels, or 20 x 4, of which 4 x 4 are taken
FREE = LONG - SIZE + 1
ROWS = np.arange(LONG, dtype=np.uint8)[None].repeat(SIZE, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Image i has the pixels 5 i + column, or + row if i is odd. Image 4 is a square: there is nothing to choose."""
  path = tmp_path_factory.mktemp("columns")
  for i in range(N):
    pixels = np.full((SIZE, SIZE), 5 * i, np.uint8) if i == 4 else 5 * i + ROWS
    Image.fromarray(pixels.T if i % 2 else pixels).save(path / f"{i:02d}.png")
  return path


def open_folder(folder, **options):
  options = {"image_size": SIZE, "crop": "random"} | options
  return sources.open_source(DataConfig(dataset=f"folder:{folder}", **options))


def take(source, count, **options):
  stream = pipeline.batches(source, **{"batch_size": B, "seed": 3, "start_step": 0} | options)
  try:
    return list(itertools.islice(stream, count))
  finally:
    stream.close()


def expected(step, seed=3, size=B):
  """The images of a batch, uint8 [B, 4, 4, 1], from the places of their crops."""
  numbers = pipeline.order(N, batch_size=size, seed=seed)[step]
  first = (crops.random_places(seed, step, np.arange(size)) * FREE).astype(int) * (numbers != 4)
  pixels = 5 * numbers[:, None, None] + first[:, None, None] + np.arange(SIZE) * (numbers != 4)[:, None, None]
  pixels = np.repeat(pixels, SIZE, axis=1)
  return np.where(numbers[:, None, None] % 2 == 1, pixels.swapaxes(1, 2), pixels)[..., None]


def philox(counter, key):
  """Philox4x64-10 (Salmon et al. 2011) with Python's whole numbers."""
  (c, k), mask = (list(counter), list(key)), 2**64 - 1
  for _ in range(10):
    a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
    c = [(b >> 64) ^ c[1] ^ k[0], b & mask, (a >> 64) ^ c[3] ^ k[1], a & mask]
    k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
  return c


def test_places_are_words_of_philox_under_seed_step_and_index():
  """They are part of a run that is resumed, and must stay: NumPy counts on before it makes four words."""
  index = np.array([5, 0, 2, 9])
  for seed, step in ((0, 0), (2**32 - 1, 7)):
    words = [philox([1 + i // 4, step, 0, 0], [seed, 2**64 - 1])[i % 4] for i in index.tolist()]
    np.testing.assert_array_equal(crops.random_places(seed, step, index), [(word >> 11) / 2**53 for word in words])


def test_every_place_is_as_likely_and_none_lies_outside():
  places = np.concatenate([crops.random_places(0, step, np.arange(64)) for step in range(200)])
  counts = np.bincount((places * FREE).astype(int), minlength=FREE)
  assert len(counts) == FREE and abs(counts / len(places) * FREE - 1).max() < 5 * (FREE / len(places)) ** 0.5
  assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 5 / len(places) ** 0.5
  image = np.arange(12, dtype=np.uint8).reshape(2, 6, 1)
  for place, first in ((0.0, 0), (0.199, 0), (0.2, 1), (1 - 2**-53, 4), (None, 2)):
    assert crops.crop(image, (2, 2, 1), place)[:, :, 0].tolist() == [[first, first + 1], [first + 6, first + 7]]


@pytest.mark.parametrize("gib", [4.0, 0.0, 1000 / 2**30])
def test_a_batch_follows_from_seed_step_and_index(folder, gib, capsys):
  """In memory, from disk, and where it turns out that 2,336 bytes are too many for memory, though 480 are not."""
  source = open_folder(folder, cache_gib=gib)
  assert ("more before it is cropped" in capsys.readouterr().err) == (0 < gib < 1)
  assert (source.remote is None) == (gib == 4.0) and ("pixels" in source.fingerprint) == (gib == 4.0)
  batches = take(source, 9)
  for step, batch in enumerate(batches):
    np.testing.assert_array_equal(batch["image"], expected(step))
  chex.assert_trees_all_equal(take(source, 9, threads=5), batches)
  chex.assert_trees_all_equal(take(source, 2, start_step=7), batches[7:])
  for p in range(2):
    rows = slice(4 * p, 4 * p + 4)
    for mine, whole in zip(take(source, 9, process_index=p, process_count=2), batches, strict=True):
      chex.assert_trees_all_equal(mine, {name: value[rows] for name, value in whole.items()})


def test_whoever_reads_without_places_gets_the_centre(folder):
  """As evaluations do."""
  cached, on_demand = (open_folder(folder, cache_gib=gib).read(np.arange(N)) for gib in (4.0, 0.0))
  chex.assert_trees_all_equal(cached, on_demand)
  np.testing.assert_array_equal(cached.images, open_folder(folder, crop="center").read(np.arange(N)).images)
  assert cached.images[0, 0, :, 0].tolist() == [8, 9, 10, 11]


def test_the_short_side_is_resized_and_the_whole_is_kept(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (9, 31, 3), np.uint8)
  Image.fromarray(noise).save(tmp_path / "a.png")
  cover = np.asarray(Image.fromarray(noise).resize((14, 4), Image.Resampling.BICUBIC))  # 31 * 4 / 9 is 13.8
  source = open_folder(tmp_path)
  for place, left in ((0.0, 0), (0.5, 5), (0.99, 10)):
    np.testing.assert_array_equal(source.read(np.array([0]), np.array([place])).images[0], cover[:, left : left + 4])


def test_a_stand_in_is_cropped_where_the_bad_one_would_be(folder, tmp_path):
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(b"no image" if path.name in ("02.png", "29.png") else path.read_bytes())
  places = np.linspace(0, 0.99, N)
  sound = open_folder(folder).read(np.array([*range(2), 3, *range(3, 29), 0]), places).images
  for gib in (4.0, 0.0):
    rows = open_folder(tmp_path, cache_gib=gib, on_bad_record="skip").read(np.arange(N), places)
    np.testing.assert_array_equal(rows.images, sound)
    assert np.flatnonzero(rows.replaced).tolist() == [2, 29]
