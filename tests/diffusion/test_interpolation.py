"""Ways between two points: where they begin and end, and how long what lies between is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.interpolation import lerp, slerp

START = jnp.asarray([[3.0, 0.0], [0.0, 4.0]])
END = jnp.asarray([[0.0, 5.0], [0.0, 0.0]])  # orthogonal, and as long
SHARES = np.linspace(0, 1, 9, dtype=np.float32)


def test_slerp_of_orthogonal_ends_of_one_length_keeps_it():
  """cos and sin of the share of a right angle."""
  for share in SHARES:
    got = slerp(START, END, share)
    np.testing.assert_allclose(got, np.cos(share * np.pi / 2) * START + np.sin(share * np.pi / 2) * END, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(got), 5.0, rtol=1e-6)


def test_slerp_turns_by_equal_angles():
  a, b = np.random.default_rng(0).standard_normal((2, 500))
  b *= np.linalg.norm(a) / np.linalg.norm(b)
  points = [np.asarray(slerp(jnp.asarray(a), jnp.asarray(b), share)) for share in SHARES]
  cosines = [p @ q / (np.linalg.norm(p) * np.linalg.norm(q)) for p, q in itertools.pairwise(points)]
  whole = np.arccos(a @ b / np.linalg.norm(a) ** 2)
  np.testing.assert_allclose(np.arccos(cosines), whole / 8, rtol=1e-3)
  np.testing.assert_allclose([np.linalg.norm(point) for point in points], np.linalg.norm(a), rtol=1e-5)


@pytest.mark.parametrize("way", [slerp, lerp])
def test_the_ends_are_the_ends(way):
  a, b = np.random.default_rng(1).standard_normal((2, 8, 8, 1)).astype(np.float32)
  np.testing.assert_allclose(way(jnp.asarray(a), jnp.asarray(b), 0.0), a, atol=1e-6)
  np.testing.assert_allclose(way(jnp.asarray(a), jnp.asarray(b), 1.0), b, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 1.00001, 2.0, -1.0, -0.5])
def test_slerp_of_parallel_and_opposite_ends_is_straight(factor):
  for share in SHARES:
    got = jax.jit(slerp)(START, factor * START, share)
    np.testing.assert_allclose(got, (1 - share + share * factor) * START, rtol=1e-5, atol=1e-5)


def test_slerp_near_the_parallel_is_continuous():
  for turn in (1e-5, 1e-4, 3e-4, 1e-3, 1e-2, np.pi - 1e-2):
    end = np.cos(turn) * START + np.sin(turn) * END
    got = np.asarray(slerp(START, end, 0.5))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, np.cos(turn / 2) * START + np.sin(turn / 2) * END, atol=2e-2)


def test_lerp_is_the_weighted_mean():
  np.testing.assert_allclose(lerp(START, END, 0.25), 0.75 * np.asarray(START) + 0.25 * np.asarray(END))
