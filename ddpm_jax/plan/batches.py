"""The largest batch that fits, found with few compilations: memory is nearly affine in the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

COMPILATIONS = 3  # beside that of the batch that was asked for
_FARTHEST = 64  # times the largest batch that fits so far: a small one may never leave the chip, and say little
_MOST = 2**31 - 1  # the index of an image in the batch is an int32


class Largest(NamedTuple):
  """The outcome.

  Attributes:
    size: the largest batch known to fit, compiled; 0 if none is.
    next_size: twice that, or the smallest batch if none fits.
    next_bytes: what that would need on each device, compiled or predicted; infinity if that is not known.
    settled: whether `next_size` does not fit, as far as is known; else the search ended before.
  """

  size: int
  next_size: int
  next_bytes: float
  settled: bool


def largest(
  known: dict[int, float], fixed: float, memory: Callable[[int], float], *, unit: int, limit: float
) -> Largest:
  """The largest batch that needs at most `limit` bytes on each device.

  Sizes are `unit` times powers of two, and those already known.

  Args:
    known: batch size -> bytes on each device, of one compilation or more; more than `limit`, or infinity, for one that
      was refused.
    fixed: bytes that do not grow with the batch, for a first guess from a single compilation.
    memory: compiles for another size.
    unit: the smallest size.
    limit: bytes that a device has.
  """
  known = dict(known)
  for _ in range(COMPILATIONS):
    size = _next(known, fixed, unit, limit)
    if not size:
      break
    known[size] = memory(size)
  best = max((size for size, needed in known.items() if needed <= limit), default=0)
  following = 2 * best or unit
  needed = known.get(following, _predicted(known, fixed, following, limit) if best else math.inf)
  return Largest(best, following, needed, settled=not _next(known, fixed, unit, limit))


def _next(known: dict[int, float], fixed: float, unit: int, limit: float) -> int:
  """The size to compile next; 0 if there is none between what fits and what does not."""
  low = max((size for size, needed in known.items() if needed <= limit), default=0)
  high = min((size for size, needed in known.items() if needed > limit), default=2 * _MOST)
  if low:
    rate = _rate(known, fixed, low, limit)
    guess = min(low + (limit - known[low]) / rate if rate > 0 else math.inf, _FARTHEST * low)
  else:
    guess = high * limit / known[high]
  size = _rounded(min(guess, (high - 1) if low else high / 2, _MOST), unit)
  if not low and not size and unit < high:
    size = unit
  if len(known) == 1 and low and size <= low:  # one compilation knows no slope: its guess is too small
    size = 2 * _rounded(low, unit) if low >= unit else unit
  return size if low < size < high else 0


def _rate(known: dict[int, float], fixed: float, low: int, limit: float) -> float:
  """Bytes for each image more, around the size `low`, which fits."""
  others = [size for size, needed in known.items() if size != low and math.isfinite(needed)]
  if not others:
    return (known[low] - fixed) / low
  other = min(others, key=lambda size: (known[size] <= limit, abs(size - low)))
  return (known[low] - known[other]) / (low - other)


def _predicted(known: dict[int, float], fixed: float, size: int, limit: float) -> float:
  low = max(size for size, needed in known.items() if needed <= limit)
  return known[low] + _rate(known, fixed, low, limit) * (size - low)


def _rounded(number: float, unit: int) -> int:
  """The largest unit x 2^k that is not above a number; 0 if there is none."""
  return unit * 2 ** int(math.log2(number / unit)) if number >= unit else 0
