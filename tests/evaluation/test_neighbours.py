"""Nearest training images against all distances; which samples are copies; the picture of them."""

import math

import numpy as np
import pytest

from ddpm_jax.evaluation import neighbours
from ddpm_jax.evaluation.neighbours import near_duplicates, nearest, picture
from ddpm_jax.workdir import grids


def blocks(rows: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
  return [(start, rows[start : start + size]) for start in range(0, len(rows), size)]


def brute_force(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  ranked = [sorted((math.dist(query, row), i) for i, row in enumerate(rows))[:k] for query in queries]
  return np.asarray([[d for d, _ in one] for one in ranked]), np.asarray([[i for _, i in one] for one in ranked])


def normal(number: int, width: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal((number, width))


@pytest.mark.parametrize("size", [1, 2, 7, 60, 1000])
@pytest.mark.parametrize("k", [1, 3, 60])
def test_nearest_is_brute_force(k, size, monkeypatch):
  monkeypatch.setattr(neighbours, "_AT_ONCE", 5)
  monkeypatch.setattr(neighbours, "_NUMBERS", 20)
  queries, rows = normal(13, 4), normal(60, 4, 1)
  expected = brute_force(queries, rows, k)
  distances, indices = nearest(queries, iter(blocks(rows, size)), k)
  assert distances.dtype == np.float64 and indices.dtype == np.int64
  np.testing.assert_allclose(distances, expected[0], rtol=1e-14)
  np.testing.assert_array_equal(indices, expected[1])


def test_nearest_by_hand():
  queries, rows = np.asarray([[0, 0], [10, 10]], np.uint8), np.asarray([[3, 4], [10, 10], [0, 1]], np.uint8)
  distances, indices = nearest(queries, [(0, rows)], 2)
  np.testing.assert_allclose(distances, [[1, 5], [0, math.hypot(7, 6)]], rtol=1e-15)
  np.testing.assert_array_equal(indices, [[2, 0], [1, 0]])


@pytest.mark.parametrize("size", [1, 5, 64, 200])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_ties_go_to_the_lower_index_in_any_order_of_blocks(size, offset):
  """Points that no float holds exactly, each four times: a matrix product alone would round them apart."""
  distinct = normal(50, 30, 1) + offset
  rows = np.tile(distinct, (4, 1))
  queries = np.concatenate([distinct[:9], normal(8, 30) + offset])
  expected = brute_force(queries, rows, 6)
  for order in (blocks(rows, size), blocks(rows, size)[::-1]):
    distances, indices = nearest(queries, order, 6)
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_allclose(distances, expected[0], rtol=1e-13)
    assert (distances[:9, :4] == 0).all()
    assert (distances[:, 0] == distances[:, 3]).all()


def test_blocks_of_any_size_agree_to_the_last_bit():
  queries, rows = normal(20, 50), normal(300, 50, 1)
  whole = nearest(queries, [(0, rows)], 5)
  for size in (1, 33, 299):
    for got, expected in zip(nearest(queries, blocks(rows, size), 5), whole, strict=True):
      np.testing.assert_array_equal(got, expected)
  np.testing.assert_array_equal(whole[1], brute_force(queries, rows, 5)[1])


def test_the_start_of_a_block_counts():
  rows = normal(10, 3)
  _, indices = nearest(rows[:4], [(1_000, rows[:5]), (0, rows[5:])], 1)
  np.testing.assert_array_equal(indices[:, 0], [1_000, 1_001, 1_002, 1_003])


def test_pixels_and_empty_blocks():
  random = np.random.default_rng(0)
  rows = random.integers(0, 256, (40, 27), np.uint8)
  queries = rows[[7, 30]]
  distances, indices = nearest(queries, [(0, rows[:20]), (20, rows[:0]), (20, rows[20:])], 2)
  np.testing.assert_array_equal(indices[:, 0], [7, 30])
  np.testing.assert_array_equal(indices, brute_force(queries.astype(float), rows.astype(float), 2)[1])
  assert (distances[:, 0] == 0).all() and (distances[:, 1] > 0).all()
  empty = nearest(queries[:0], [(0, rows)], 2)
  assert empty[0].shape == empty[1].shape == (0, 2)


def test_inputs_are_left_alone():
  queries, rows = normal(5, 3), normal(9, 3, 1)
  before = queries.copy(), rows.copy()
  nearest(queries, [(0, rows)], 2)
  np.testing.assert_array_equal(queries, before[0])
  np.testing.assert_array_equal(rows, before[1])


def test_nearest_refuses_what_makes_no_sense():
  good, bad = normal(5, 3), normal(5, 3)
  bad[4, 2] = np.nan
  with pytest.raises(ValueError, match="6 nearest of 5"):
    nearest(good, blocks(good, 2), 6)
  with pytest.raises(ValueError, match="2 nearest of 0"):
    nearest(good, [], 2)
  with pytest.raises(ValueError, match="queries"):
    nearest(bad, blocks(good, 2), 1)
  with pytest.raises(ValueError, match="queries"):
    nearest(good, blocks(good, 2), 0)
  with pytest.raises(ValueError, match="references from 4"):
    nearest(good, blocks(bad, 2), 1)
  with pytest.raises(ValueError, match=r"finite \[B, 3\]"):
    nearest(good, blocks(good[:, :2], 2), 1)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_the_nearer_of_two_orientations_is_that_of_all_distances(k):
  """Among the references are near mirror images of themselves, and of each other."""
  random = np.random.default_rng(0)
  rows = random.integers(0, 3, (12, 4)).astype(float)
  rows[:3] = rows[:3, ::-1] + rows[:3]
  rows[5] = rows[4, ::-1]
  queries = np.concatenate([rows, random.integers(0, 3, (20, 4))])
  given, mirrored = (nearest(asked, [(0, rows)], k) for asked in (queries, queries[:, ::-1]))
  distances, indices, flipped = neighbours.nearer_orientation(given, mirrored)
  for query, *found in zip(queries, distances, indices, flipped, strict=True):
    both = [(math.dist(query, row), math.dist(query, row[::-1])) for row in rows]
    expected = sorted((min(pair), i) for i, pair in enumerate(both))[:k]
    np.testing.assert_allclose(found[0], [d for d, _ in expected], rtol=1e-14)
    assert found[1].tolist() == [i for _, i in expected]
    assert found[2].tolist() == [both[i][1] < both[i][0] for _, i in expected]


def test_near_duplicates_by_hand():
  distances = np.asarray([[1.0, 3.1], [1.0, 3.0], [1.0, 2.9], [0.0, 5.0], [0.0, 0.0], [2.0, 2.0], [9.0, 28.0]])
  np.testing.assert_array_equal(near_duplicates(distances), [True, False, False, True, True, False, True])
  np.testing.assert_array_equal(near_duplicates(distances, ratio=0.5), [True, True, True, True, True, False, True])


def test_more_neighbours_do_not_matter():
  distances = np.sort(np.abs(normal(100, 5)), axis=1)
  np.testing.assert_array_equal(near_duplicates(distances), distances[:, 0] / distances[:, 1] < 1 / 3)


def test_copies_of_an_image_that_is_there_twice():
  """The ratio of the distances is 1, or is 0 / 0, or noise; a sample between two different images is no copy."""
  rows = np.concatenate([normal(20, 10), normal(20, 10)])
  samples = np.concatenate([rows[:5], rows[:5] + 1e-9, rows[:5] + 0.1, normal(5, 10, 1)])
  distances, _ = nearest(samples, blocks(rows, 7), 2)
  np.testing.assert_array_equal(distances[:, 0], distances[:, 1])
  np.testing.assert_array_equal(near_duplicates(distances), [True] * 10 + [False] * 10)
  np.testing.assert_array_equal(near_duplicates(1e6 * distances), [True] * 10 + [False] * 10)


def test_all_copies_and_none():
  assert near_duplicates(np.zeros((3, 2))).all()
  assert near_duplicates(np.zeros((0, 2))).shape == (0,)
  assert not near_duplicates(np.full((3, 2), 1e-12)).any()  # small, but all alike: only the unit is


def test_near_duplicates_refuse_other_than_two_ascending_distances():
  for wrong in ([[1.0]], [1.0, 2.0], [[2.0, 1.0]], [[np.nan, 1.0]]):
    with pytest.raises(ValueError, match="ascending"):
      near_duplicates(np.asarray(wrong))


@pytest.mark.parametrize(("height", "width", "channels", "k"), [(28, 28, 1, 5), (8, 8, 1, 1), (70, 90, 3, 2)])
def test_picture(height, width, channels, k):
  random = np.random.default_rng(0)
  near = random.integers(0, 200, (4, k, height, width, channels), np.uint8)
  samples = random.integers(0, 200, (4, height, width, channels), np.uint8)
  page = picture(samples, near)
  scale = max(1, 64 // height)
  tall, wide = height * scale, width * scale
  left = max(wide + 4, 80)
  right = max(k * (wide + 2) + 2, 150)
  assert page.dtype == np.uint8
  assert page.shape == (18 + 4 * (tall + 2) + 2, left + 12 + right, 3)
  assert (page[:, left : left + 12] == 255).all()
  for caption in (page[:18, :left], page[:18, left + 12 :]):
    assert caption.min() < 100 and (caption[:, -3:] == 255).all(), "no caption, or cut off"
  for row in range(4):
    top = 18 + 2 + row * (tall + 2)
    tiles = [(2, samples[row])] + [(left + 14 + i * (wide + 2), near[row, i]) for i in range(k)]
    for at, image in tiles:
      tile = grids.image_grid(image[None])[2:-2, 2:-2]
      np.testing.assert_array_equal(page[top : top + tall, at : at + wide], tile)
  assert page[18:, left + 14 + k * (wide + 2) :].min(initial=255) == 255


def test_mirrored_neighbours_are_framed():
  """Nothing but the margin around them changes."""
  near, samples = np.full((2, 4, 64, 64, 3), 100, np.uint8), np.full((2, 64, 64, 3), 50, np.uint8)
  plain = picture(samples, near)
  page = picture(samples, near, np.array([[True, False, False, False], [False, False, True, False]]))
  coloured = (page[18:] != page[18:, :, :1]).any(axis=2)
  expected = np.zeros_like(coloured)
  for top, left in ((0, 80 + 12), (66, 80 + 12 + 2 * 66)):
    expected[top : top + 68, left : left + 68] = True
    expected[top + 2 : top + 66, left + 2 : left + 66] = False
  np.testing.assert_array_equal(coloured, expected)
  np.testing.assert_array_equal(page[18:][~coloured], plain[18:][~coloured])


def test_picture_refuses_other_shapes():
  samples = np.zeros((3, 8, 8, 1), np.uint8)
  for wrong in ((2, 4, 8, 8, 1), (3, 4, 8, 9, 1), (3, 8, 8, 1), (3, 4, 8, 8, 3)):
    with pytest.raises(ValueError, match="do not fit"):
      picture(samples, np.zeros(wrong, np.uint8))
