"""The lines of `metrics.jsonl`: their timing fields, and the seconds of training.

A line has `step`; `images`, those seen so far; `time`, seconds since the epoch; `seconds`, those of training so far,
over all resumes, without compilation, checkpoints, sample grids and evaluations; `loss`, the mean of the training steps
since the line before; and what was measured at that step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

# The only fields that may differ between two runs of the same training steps.
TIMES = ("time", "seconds", "steps_per_second", "images_per_second")


def training_seconds(rows: Iterable[Mapping[str, Any]]) -> list[float]:
  """Seconds of training up to each line.

  The lines of release 0.1.0 have no `seconds`: there they follow from the speed. Lines without either, as of an
  evaluation, have the seconds of the line before.

  Args:
    rows: the lines, in order; a value that is not a number counts as missing.

  Returns:
    A number for each line, never falling.
  """
  found, seconds, before = [], 0.0, 0.0
  for row in rows:
    step, given, speed = (_number(row.get(name)) for name in ("step", "seconds", "steps_per_second"))
    if given is not None:
      seconds = max(seconds, given)
    elif speed is not None and speed > 0 and step is not None:
      seconds += max(0.0, step - before) / speed
    if step is not None and (given is not None or speed is not None):
      before = step
    found.append(seconds)
  return found


def _number(value: Any) -> float | None:
  is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
  return float(value) if is_number else None
