"""Settings take turns, so that a noisy machine disturbs all alike: A B, B A, A B, ...; medians, quartiles, ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Run = Callable[[int], dict[str, Any]]  # count -> measurement with at least `seconds` and `images`
_MOST = 100_000  # units of work in a block


class Spread(NamedTuple):
  """The middle of some values, and the quartiles around it."""

  low: float
  median: float
  high: float


class Block(NamedTuple):
  """One turn of one setting."""

  round: int
  setting: str
  count: int
  measured: dict[str, Any]

  @property
  def rate(self) -> float:
    """Images a second."""
    return self.measured["images"] / self.measured["seconds"]


def spread(values: Sequence[float]) -> Spread:
  """Lower quartile, median, upper quartile of at least one value."""
  if len(values) == 1:
    return Spread(values[0], values[0], values[0])
  low, median, high = statistics.quantiles(values, n=4, method="inclusive")
  return Spread(low, median, high)


def turns(settings: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
  """(round, setting): every round has each setting once, in turn forwards and backwards: A B B A A B B A ..."""
  for number in range(rounds):
    for setting in settings if number % 2 == 0 else reversed(settings):
      yield number, setting


def block_size(run: Run, seconds: float) -> int:
  """Units of work that take about that long; runs one to be warm and more to find out."""
  run(1)
  count = 1
  while True:
    took = run(count)["seconds"]
    if took >= seconds / 4 or count >= _MOST:
      return max(1, min(_MOST, round(count * seconds / took)))
    # No more than eight times as many: the first few may have been read ahead, and take no time.
    count = min(_MOST, 8 * count, max(2 * count, math.ceil(count * seconds / 4 / max(took, 1e-9))))


def run_blocks(runs: dict[str, Run], counts: dict[str, int], rounds: int) -> list[Block]:
  """Lets the settings take turns. runs, counts: for each setting, how to run a block and how large it is."""
  return [
    Block(number, setting, counts[setting], runs[setting](counts[setting]))
    for number, setting in turns(list(runs), rounds)
  ]


def rates(blocks: Sequence[Block], setting: str) -> Spread:
  """Images a second of a setting, over its blocks."""
  return spread([block.rate for block in blocks if block.setting == setting])


def cpu_seconds(blocks: Sequence[Block], setting: str) -> Spread:
  """Time of all cores for an image, over the blocks of a setting. Other work on the machine hardly changes it."""
  own = [block.measured for block in blocks if block.setting == setting]
  return spread([measured["cpu_seconds"] / measured["images"] for measured in own])


def speed_ratio(blocks: Sequence[Block], over: str, under: str) -> Spread:
  """How many times as fast `over` is as `under`: the median and quartiles of the ratios of the rounds.

  The two blocks of a round are neighbours in time, so what slows the machine down for longer cancels.
  """
  by_turn = {(block.round, block.setting): block.rate for block in blocks}
  numbers = sorted({block.round for block in blocks})
  return spread([by_turn[number, over] / by_turn[number, under] for number in numbers])
