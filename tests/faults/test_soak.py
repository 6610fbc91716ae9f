"""2,000 training steps with 40 checkpoints and 20 grids: memory, threads and open files stay as they are."""

import pytest

from tests.faults.soak import growth, soak

pytestmark = pytest.mark.slow


def test_a_long_run_takes_no_more_than_a_short_one(tmp_path):
  more = growth(soak(tmp_path, 2000))
  assert more.megabytes < 30, more
  assert more.threads <= 2 and more.files <= 4, more  # a save that is under way has some of its own
