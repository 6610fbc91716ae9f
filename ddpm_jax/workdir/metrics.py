"""The lines of `metrics.jsonl`: what of them is time, and how long training took.

A line has `step`; `images`, those seen so far; `time`, seconds since the epoch; `seconds`, those of training so far,
over all resumes, without compilation, checkpoints, sample grids and evaluations; `loss`, the mean of the training steps
since the line before; and what was measured at that step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

# All that may differ between the lines of two runs whose training steps are the same.
TIMES = ("time", "seconds", "steps_per_second", "images_per_second")


def training_seconds(rows: Iterable[Mapping[str, Any]]) -> list[float]:
  """Seconds of training up to each line.

  The lines of release 0.1.0 have no `seconds`: there they follow from the speed. Lines without either, as of an
  evaluation, have the seconds of the line before.

  Args:
    rows: the lines, in order; whatever stands in them that is no number counts as missing.

  Returns:
    A number for each line, never falling.
  """
  found, seconds, before = [], 0.0, 0.0
  for row in rows:
    step, told, speed = (_number(row.get(name)) for name in ("step", "seconds", "steps_per_second"))
    if told is not None:
      seconds = max(seconds, told)
    elif speed is not None and speed > 0 and step is not None:
      seconds += max(0.0, step - before) / speed
    if step is not None and (told is not None or speed is not None):
      before = step
    found.append(seconds)
  return found


def _number(value: Any) -> float | None:
  is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
  return float(value) if is_number else None
