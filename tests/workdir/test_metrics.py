"""How long a run has trained, from its lines."""

import numpy as np

from ddpm_jax.workdir.metrics import TIMES, training_seconds


def test_seconds_are_those_of_the_lines():
  rows = [{"step": 10, "seconds": 1.5, "steps_per_second": 99}, {"step": 20, "seconds": 4.0}, {"step": 20, "kid": 1}]
  assert training_seconds(rows) == [1.5, 4.0, 4.0]


def test_seconds_of_release_0_1_0_follow_from_the_speed():
  """25 steps at 5 a second, 25 at 10; a line without a speed, as the first may be, counts with the next."""
  rows = [{"step": 5}, {"step": 25, "steps_per_second": 5}, {"step": 50, "steps_per_second": 10.0}]
  np.testing.assert_allclose(training_seconds(rows), [0, 5, 7.5])
  np.testing.assert_allclose(training_seconds([*rows, {"step": 75, "seconds": 9.0}]), [0, 5, 7.5, 9])


def test_whatever_stands_in_a_line():
  rows = [{"step": "x", "seconds": None}, {}, {"step": 3, "seconds": True}, {"step": 9, "steps_per_second": 0.0}]
  rows += [{"step": 10, "seconds": float("nan")}, {"step": 10, "seconds": -3}]
  assert training_seconds(rows) == [0.0] * 6
  assert training_seconds([]) == []
  assert "step" not in TIMES and "images" not in TIMES
