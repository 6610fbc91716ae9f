import statistics

import pytest

from benchmarks.alternate import Block, Spread, block_size, cpu_seconds, rates, run_blocks, speed_ratio, spread, turns
from tests.benchmarks.fake import Machine


def test_spread_is_median_and_quartiles():
  assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(2.0, 3.0, 4.0)
  assert spread([1.0, 2.0]) == Spread(1.25, 1.5, 1.75)
  assert spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_two_settings_run_as_a_b_b_a():
  assert "".join(name for _, name in turns("AB", 4)) == "ABBAABBA"
  assert [number for number, _ in turns("AB", 2)] == [0, 0, 1, 1]
  assert "".join(name for _, name in turns("ABC", 2)) == "ABCCBA"


def test_blocks_are_run_in_turn_with_their_own_counts():
  machine = Machine()
  runs = {"A": machine.run("A", 100), "B": machine.run("B", 200)}
  blocks = run_blocks(runs, {"A": 3, "B": 6}, 2)
  assert machine.turns == [("A", 3), ("B", 6), ("B", 6), ("A", 3)]
  assert [block[:3] for block in blocks] == [(0, "A", 3), (0, "B", 6), (1, "B", 6), (1, "A", 3)]
  assert rates(blocks, "B").median == pytest.approx(200)


def test_a_machine_that_slows_down_does_not_decide():
  machine = Machine(drift=1.05)  # every block 5% slower than the one before
  runs = {"A": machine.run("A", 100), "B": machine.run("B", 130)}
  blocks = run_blocks(runs, {"A": 1, "B": 1}, 8)
  ratio = speed_ratio(blocks, "B", "A")
  assert ratio.median == pytest.approx(1.3, rel=0.002)
  assert ratio.low == pytest.approx(1.3 / 1.05, rel=0.01)
  assert ratio.high == pytest.approx(1.3 * 1.05, rel=0.01)
  by_name = {name: statistics.median(block.rate for block in blocks if block.setting == name) for name in "AB"}
  assert rates(blocks, "A").median == by_name["A"] < 75  # what a comparison over time would have said
  assert cpu_seconds(blocks, "A").median == pytest.approx(1 / 100)


def test_a_ratio_takes_the_blocks_of_a_round():
  def block(number, name, seconds):
    return Block(number, name, 1, {"seconds": seconds, "images": 1})

  blocks = [
    block(0, "A", 1),
    block(0, "B", 2),
    block(1, "B", 20),
    block(1, "A", 10),
    block(2, "A", 1),
    block(2, "B", 4),
  ]
  assert speed_ratio(blocks, "A", "B") == Spread(2.0, 2.0, 3.0)


@pytest.mark.parametrize("rate", [0.3, 7.0, 1e3, 1e5])
def test_a_block_takes_about_as_long_as_asked(rate):
  machine = Machine()
  count = block_size(machine.run("A", rate, size=1), 4.0)
  assert count == max(1, round(4 * rate)) or count == 100_000
  assert machine.turns[:2] == [("A", 1), ("A", 1)]  # the first to be warm
  assert len(machine.turns) < 20


def test_a_block_is_never_endless():
  assert block_size(lambda count: {"seconds": 1e-12}, 4.0) == 100_000


def test_what_was_read_ahead_does_not_make_a_block_huge():
  """The first four units are there already; each of the others takes a second."""
  counts = []

  def run(count):
    counts.append(count)
    return {"seconds": max(0, count - 4) + 1e-6}

  assert block_size(run, 4.0) <= 8
  assert max(counts) <= 8
