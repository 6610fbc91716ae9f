"""Distances between sets: closed forms, the definitions as loops, and cases by hand."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg

from ddpm_jax.evaluation.measures import (
  density_coverage,
  frechet_distance,
  inception_score,
  kid,
  precision_recall,
  squared_radii,
)


def normal(number: int, width: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal((number, width))


def random_cov(width: int, rank: int, seed: int) -> np.ndarray:
  factor = normal(width, rank, seed) * np.logspace(0, -2, rank)
  return factor @ factor.T


# --- Fréchet distance


def test_frechet_of_numbers():
  """In one dimension: (difference of the means)^2 + (difference of the standard deviations)^2."""
  one, four, nine = np.ones(1), np.full((1, 1), 4.0), np.full((1, 1), 9.0)
  assert frechet_distance(5 * one, four, 2 * one, nine) == pytest.approx(9 + 1, rel=1e-14)


def test_frechet_of_commuting_covariances():
  """Where both have the same eigenvectors: the sum of (difference of the roots of the eigenvalues)^2."""
  basis, _ = np.linalg.qr(normal(6, 6))
  p, q = np.asarray([9, 4, 1, 1e-6, 0, 2]), np.asarray([1, 4, 0, 4e-6, 0, 8])
  expected = np.sum((np.sqrt(p) - np.sqrt(q)) ** 2) + 6 * 0.25
  got = frechet_distance(np.full(6, 1.5), basis * p @ basis.T, np.ones(6), basis * q @ basis.T)
  assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("width", [2, 10, 50])
def test_frechet_against_the_matrix_root(width):
  a, b = (random_cov(width, width, seed) + 1e-2 * np.eye(width) for seed in (1, 2))
  mean_a, mean_b = normal(2, width)
  expected = np.sum((mean_a - mean_b) ** 2) + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
  assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(5, 30), (30, 5), (5, 7), (0, 30), (0, 0), (20, 20)])
def test_frechet_of_singular_covariances(rank_a, rank_b):
  """The root of a singular product: the limit of the regular ones, from the other order of factors."""
  a, b = random_cov(30, rank_a, 1), random_cov(30, rank_b, 2)
  root = normal(30, rank_a, 1) * np.logspace(0, -2, rank_a)  # a = root root^T, of `rank_a` columns
  values = np.linalg.eigvalsh(root.T @ b @ root) if rank_a else np.zeros(1)
  expected = np.trace(a) + np.trace(b) - 2 * np.sqrt(np.maximum(values, 0)).sum()
  zero = np.zeros(30)
  assert frechet_distance(zero, a, zero, b) == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_frechet_of_fewer_images_than_features():
  """As scipy says it with a small offset on the diagonal, the usual remedy."""
  a, b = (np.cov(normal(15, 40, seed), rowvar=False) for seed in (1, 2))
  offset = 1e-9 * np.eye(40)
  root = scipy.linalg.sqrtm((a + offset) @ (b + offset)).real
  expected = np.trace(a) + np.trace(b) - 2 * np.trace(root)
  assert frechet_distance(np.zeros(40), a, np.zeros(40), b) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 10, 40])
def test_frechet_of_equals_is_zero_and_never_negative(rank):
  for seed in range(5):
    cov, mean = random_cov(40, rank, seed), normal(1, 40, seed)[0]
    assert 0 <= frechet_distance(mean, cov, mean, cov) <= 1e-11 * np.trace(cov)
    assert 0 <= frechet_distance(mean, cov, mean, cov * (1 + 1e-15)) <= 1e-11 * np.trace(cov)


def test_frechet_is_symmetric_and_scales_as_a_square():
  a, b = random_cov(20, 12, 1), random_cov(20, 20, 2)
  mean_a, mean_b = normal(2, 20)
  there = frechet_distance(mean_a, a, mean_b, b)
  assert frechet_distance(mean_b, b, mean_a, a) == pytest.approx(there, rel=1e-12)
  assert frechet_distance(1e3 * mean_a, 1e6 * a, 1e3 * mean_b, 1e6 * b) == pytest.approx(1e6 * there, rel=1e-12)
  assert isinstance(there, float)


def test_frechet_takes_covariances_rounded_to_float32():
  a = random_cov(40, 10, 1)
  rounded = a.astype(np.float32)  # its 30 eigenvalues of 0 are now of both signs
  assert np.linalg.eigvalsh(rounded.astype(np.float64))[0] < 0
  assert 0 <= frechet_distance(np.zeros(40), rounded, np.zeros(40), a) < 1e-4 * np.trace(a)


def test_frechet_refuses_what_makes_no_sense():
  mean, cov = np.zeros(3), np.eye(3)
  for bad in (np.nan, np.inf):
    for i, part in itertools.product(range(4), (0, -1)):
      arguments = [mean.copy(), cov.copy(), mean.copy(), cov.copy()]
      arguments[i].flat[part] = bad
      with pytest.raises(ValueError, match="finite"):
        frechet_distance(*arguments)
  for wrong in ((mean[:2], cov, mean, cov), (mean, cov[:2], mean, cov), (mean, cov, mean, np.eye(4))):
    with pytest.raises(ValueError, match="do not fit"):
      frechet_distance(*wrong)
  for wrong in (np.diag([1.0, 1.0, -0.1]), -cov):
    with pytest.raises(ValueError, match="cov_b"):
      frechet_distance(mean, cov, mean, wrong)


# --- Kernel distance


def naive_kid(a: np.ndarray, b: np.ndarray) -> float:
  def kernel(x: np.ndarray, y: np.ndarray) -> float:
    return (sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

  aa = [kernel(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j]
  bb = [kernel(b[i], b[j]) for i in range(len(b)) for j in range(len(b)) if i != j]
  ab = [kernel(x, y) for x in a for y in b]
  return sum(aa) / len(aa) + sum(bb) / len(bb) - 2 * sum(ab) / len(ab)


def test_kid_of_everything_is_the_definition():
  a, b = normal(12, 3), normal(12, 3, 1) + 0.5
  mean, deviation = kid(a, b, subsets=3)
  assert mean == pytest.approx(naive_kid(a, b), rel=1e-12)
  assert deviation == pytest.approx(0, abs=1e-12)


def test_kid_by_hand():
  """Kernels of 0 and 1 with themselves: (0 + 1)^3; of 1 with 1: 8. Sets {0, 1} and {1, 1}."""
  assert kid(np.asarray([[0.0], [1.0]]), np.ones((2, 1)))[0] == pytest.approx(1 + 8 - 2 * (1 + 1 + 8 + 8) / 4)


def test_kid_of_a_subset_of_one_set():
  """With fewer rows in b, each subset is all of b and some of a: one of the few values that these can have."""
  a, b = normal(4, 2), normal(3, 2, 1)
  possible = [naive_kid(np.delete(a, i, axis=0), b) for i in range(4)]
  for seed in range(5):
    value, _ = kid(a, b, subsets=1, seed=seed)
    assert min(abs(value - other) for other in possible) < 1e-12
    assert kid(a, b, subsets=1, seed=seed) == kid(a, b, subsets=1, seed=seed)
  mean, deviation = kid(a, b, subsets=2000)
  assert mean == pytest.approx(np.mean(possible), abs=4 * np.std(possible) / math.sqrt(2000))
  assert deviation == pytest.approx(np.std(possible), rel=0.1)


def test_kid_subsets_have_their_size_and_differ():
  a, b = normal(50, 2), normal(60, 2, 1) + 1
  values = {kid(a, b, subsets=1, subset_size=10, seed=seed)[0] for seed in range(10)}
  assert len(values) == 10
  small, large = (kid(a, b, subset_size=size)[1] for size in (5, 40))
  assert small > 3 * large > 0


def test_kid_is_unbiased():
  """Of one distribution the mean is 0; the biased estimate would have more than ten standard errors."""
  values = [kid(normal(20, 4, 2 * i), normal(20, 4, 2 * i + 1), subsets=1)[0] for i in range(1000)]
  error = np.std(values) / math.sqrt(1000)
  assert abs(np.mean(values)) < 4 * error
  biased = 2 * (np.mean((np.square(normal(1000, 4)).mean(axis=1) + 1) ** 3) - 1) / 20
  assert biased > 10 * error


@pytest.mark.parametrize("shift", [0.5, 1.0])
def test_kid_of_a_shifted_gaussian(shift):
  """(xy + 1)^3 = 1 + 3 xy + 3 (xy)^2 + (xy)^3, so the squared distance is that of the first three moments."""
  expected = 3 * shift**2 + 3 * (shift**2) ** 2 + (3 * shift + shift**3) ** 2
  a, b = normal(50_000, 1), normal(50_000, 1, 1) + shift
  mean, deviation = kid(a, b, subsets=60, subset_size=300)
  assert mean == pytest.approx(expected, abs=4 * deviation / math.sqrt(60))
  assert deviation < 0.5 * expected


def test_kid_refuses_what_makes_no_sense():
  good = normal(5, 3)
  with pytest.raises(ValueError, match="finite"):
    kid(good, np.where(good == good[0, 0], np.nan, good))
  with pytest.raises(ValueError, match="3 and 2 features"):
    kid(good, good[:, :2])
  with pytest.raises(ValueError, match="two dimensions"):
    kid(good[0], good)
  with pytest.raises(ValueError, match="features_b: 1 rows"):
    kid(good, good[:1])
  for wrong in (dict(subsets=0), dict(subset_size=1)):
    with pytest.raises(ValueError, match="at least 2"):
      kid(good, good, **wrong)


# --- Inception score


def naive_score(rows: np.ndarray) -> float:
  marginal = [sum(row[k] for row in rows) / len(rows) for k in range(rows.shape[1])]
  total = sum(p * math.log(p / q) for row in rows for p, q in zip(row, marginal, strict=True) if p)
  return math.exp(total / len(rows))


def softmax(logits: np.ndarray) -> np.ndarray:
  exponentials = np.exp(logits)
  return exponentials / exponentials.sum(axis=1, keepdims=True)


def test_score_of_a_classifier_that_says_nothing_is_one():
  assert inception_score(np.full((50, 10), 0.1)) == (pytest.approx(1), pytest.approx(0))
  same = np.tile(softmax(normal(1, 10)), (50, 1))  # sure, but always of the same
  assert inception_score(same) == (pytest.approx(1), pytest.approx(0))
  assert inception_score(np.tile(np.eye(10)[3], (50, 1))) == (1, 0)


def test_score_of_all_classes_for_certain_is_their_number():
  """A part of ten images with one of each class; a class that never occurs does not count."""
  rows = np.tile(np.eye(12)[:10], (10, 1))
  assert inception_score(rows) == (pytest.approx(10), pytest.approx(0))
  assert inception_score(rows, splits=1) == (pytest.approx(10), 0)
  assert inception_score(rows.astype(np.float32), splits=5) == (pytest.approx(10), pytest.approx(0))
  by_class = np.repeat(np.eye(12)[:10], 10, axis=0)  # splits are consecutive rows, here of one class each
  assert inception_score(by_class) == (pytest.approx(1), pytest.approx(0))
  assert inception_score(by_class, splits=1) == (pytest.approx(10), 0)


@pytest.mark.parametrize(("number", "splits"), [(100, 10), (47, 4), (10, 10), (3, 2)])
def test_score_against_the_definition(number, splits):
  rows = softmax(3 * normal(number, 6))
  rows[0] = np.eye(6)[0]
  bounds = [i * number // splits for i in range(splits + 1)]  # as the authors cut
  scores = [naive_score(rows[first:last]) for first, last in itertools.pairwise(bounds)]
  assert inception_score(rows, splits) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores), abs=1e-12))


def test_score_of_few_images_has_fewer_splits():
  rows = softmax(normal(4, 3))
  assert inception_score(rows) == inception_score(rows, splits=4) == (pytest.approx(1), pytest.approx(0))
  assert inception_score(rows[:1]) == (1, 0)


def test_score_of_tiny_probabilities():
  rows = np.asarray([[1.0, 1e-320, 0], [1e-320, 1.0, 0]])
  assert inception_score(rows, splits=1) == (pytest.approx(2), 0)


def test_score_refuses_what_is_no_distribution():
  good = softmax(normal(5, 3))
  for wrong in (np.zeros((0, 3)), good * 1.1, good - 0.5, np.full((2, 2), np.nan), good[0], normal(5, 3)):
    with pytest.raises(ValueError, match="probabilities"):
      inception_score(wrong)
  with pytest.raises(ValueError, match="0 splits"):
    inception_score(good, splits=0)
  assert inception_score(good.astype(np.float32), 1)[0] == pytest.approx(naive_score(good), rel=1e-6)


# --- Neighbourhoods


def naive_radii(points: np.ndarray, k: int) -> list[float]:
  return [sorted(math.dist(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]


def naive_neighbourhoods(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
  """Precision, recall, density and coverage, from their definitions."""
  real_radii, fake_radii = naive_radii(real, k), naive_radii(fake, k)
  precise = [any(math.dist(y, x) <= r for x, r in zip(real, real_radii, strict=True)) for y in fake]
  recalled = [any(math.dist(y, x) <= r for y, r in zip(fake, fake_radii, strict=True)) for x in real]
  inside = [[math.dist(y, x) < r for y in fake] for x, r in zip(real, real_radii, strict=True)]
  density, coverage = np.sum(inside) / (k * len(fake)), np.mean([any(row) for row in inside])
  return float(np.mean(precise)), float(np.mean(recalled)), float(density), float(coverage)


def line(*values: float) -> np.ndarray:
  return np.asarray(values, np.float64)[:, None]


@pytest.mark.parametrize("block", [1, 3, 20, 1000])
@pytest.mark.parametrize("k", [1, 4, 19])
def test_radii(k, block):
  points = normal(20, 3)
  np.testing.assert_allclose(np.sqrt(squared_radii(points, k, block)), naive_radii(points, k), rtol=1e-12)


def test_radii_by_hand():
  """A point is not its own neighbour, but an equal one is."""
  np.testing.assert_array_equal(squared_radii(line(0, 1, 3, 3), 1), [1, 1, 0, 0])
  np.testing.assert_array_equal(squared_radii(line(0, 1, 3, 3), 2), [9, 4, 4, 4])
  for k in (0, 4):
    with pytest.raises(ValueError, match=f"no {k}-th"):
      squared_radii(line(0, 1, 3, 3), k)


def test_precision_and_recall_by_hand():
  """Real balls around 0, 1, 3 for k = 1 have radii 1, 1, 2: together [-1, 5]; fake ones around 2, 6, 20: 4, 4, 14."""
  real, fake = line(0, 1, 3), line(2, 6, 20)
  assert precision_recall(real, fake, k=1) == (pytest.approx(1 / 3), 2 / 3 + 1 / 3)
  assert precision_recall(fake, real, k=1) == (1, pytest.approx(1 / 3))
  assert precision_recall(line(0, 1, 3, 100), line(4, 4.5, 90), k=1) == (1, 0.25)


def test_the_surface_counts_for_precision_and_not_for_density():
  """Around 0, 1, 3, 10 the balls for k = 2 reach to [-3, 3], [-1, 3], [0, 6] and [1, 19]."""
  real = line(0, 1, 3, 10)
  assert precision_recall(real, line(-3, -30, 19), k=2)[0] == pytest.approx(2 / 3)
  assert density_coverage(real, line(-3), k=2) == (0, 0)
  assert density_coverage(real, line(3), k=2) == (2 / 2, 0.5)
  assert density_coverage(real, line(2, 2.5, 4, -50), k=2) == (pytest.approx((4 + 4 + 2) / 2 / 4), 1)


def test_more_real_than_fake_images_in_one_place():
  """Fake points without the diversity of the real ones: precise, dense, but of low recall and coverage."""
  real = np.concatenate([normal(60, 2), normal(60, 2, 1) + 100])
  fake = normal(50, 2, 2) * 0.5
  precision, recall = precision_recall(real, fake)
  density, coverage = density_coverage(real, fake)
  assert precision == 1 and recall < 0.5
  assert density > 1 and coverage < 0.5


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize(("real_number", "fake_number", "k"), [(30, 30, 3), (40, 17, 4), (11, 35, 1)])
def test_neighbourhoods_against_the_definitions(real_number, fake_number, k, block):
  real, fake = normal(real_number, 3), 0.9 * normal(fake_number, 3, 1) + 0.9
  expected = naive_neighbourhoods(real, fake, k)
  assert len(set(expected)) == 4, "a case that tells the four numbers apart"
  got = precision_recall(real, fake, k, block) + density_coverage(real, fake, k, block)
  np.testing.assert_allclose(got, expected, rtol=1e-13)
  assert all(isinstance(value, float) for value in got)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_same_set_twice(offset, block):
  """Exactly, although each point lies on the surface of one of the balls, and distances are rounded."""
  points = normal(90, 20) + offset
  for other in (points, points.copy(), points[::-1].copy()):
    assert precision_recall(points, other, block=block) == (1, 1)
    assert density_coverage(points, other, block=block) == (1, 1)


def test_disjoint_sets():
  real, fake = normal(40, 5), normal(30, 5, 1) + 1e3
  assert precision_recall(real, fake) == (0, 0)
  assert density_coverage(real, fake) == (0, 0)


def test_points_that_are_there_often():
  """Balls of radius 0: their centre is on them, and not inside."""
  point = normal(1, 50) * 7
  real = np.concatenate([np.tile(point, (8, 1)), normal(20, 50, 1)])
  assert precision_recall(real, np.tile(point, (9, 1)))[0] == 1
  assert precision_recall(np.tile(point, (9, 1)), real) == (8 / 28, 1)
  assert density_coverage(np.tile(point, (8, 1)), np.tile(point, (9, 1))) == (0, 0)
  assert precision_recall(np.zeros((8, 3)), np.zeros((9, 3))) == (1, 1)
  assert density_coverage(np.zeros((8, 3)), np.zeros((9, 3))) == (0, 0)


def test_one_far_point_does_not_change_the_others():
  real, fake = normal(40, 4), normal(40, 4, 1)
  far = np.concatenate([fake, np.full((1, 4), 1e7)])
  precision, _ = precision_recall(real, fake)
  density, coverage = density_coverage(real, fake)
  assert precision_recall(real, far)[0] == pytest.approx(precision * 40 / 41)
  assert density_coverage(real, far) == (pytest.approx(density * 40 / 41), coverage)


def test_expected_density_and_coverage_of_one_distribution():
  """Naeem et al., lemmas 1 and 2: 1, and 1 - (N - 1) ... (N - k) / ((2 N - 1) ... (2 N - k)) for equal sizes."""
  number, k = 30, 5
  pairs = [density_coverage(normal(number, 2, 2 * i), normal(number, 2, 2 * i + 1), k) for i in range(600)]
  density, coverage = np.mean(pairs, axis=0)
  error = np.std(pairs, axis=0) / math.sqrt(600)
  assert density == pytest.approx(1, abs=4 * error[0])
  expected = 1 - math.prod((number - i) / (2 * number - i) for i in range(1, k + 1))
  assert coverage == pytest.approx(expected, abs=4 * error[1])
  assert error.max() < 0.01


def test_neighbourhoods_of_float32_features():
  real, fake = normal(40, 30).astype(np.float32) + 1e3, normal(40, 30, 1).astype(np.float32) + 1e3
  wide = real.astype(np.float64), fake.astype(np.float64)
  assert precision_recall(real, fake) == precision_recall(*wide)
  assert density_coverage(real, fake) == density_coverage(*wide)


@pytest.mark.parametrize("measure", [precision_recall, density_coverage])
def test_neighbourhoods_refuse_what_makes_no_sense(measure):
  good = normal(10, 3)
  bad = good.copy()
  bad[3, 1] = np.inf
  with pytest.raises(ValueError, match="fake: not all values are finite"):
    measure(good, bad)
  with pytest.raises(ValueError, match="3 and 2 features"):
    measure(good, good[:, :2])
  with pytest.raises(ValueError, match="10-th"):
    measure(good, good, k=10)
  with pytest.raises(ValueError, match="fake: 0 rows"):
    measure(good, good[:0])
