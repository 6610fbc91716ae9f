"""Metrics on disk: `metrics.jsonl`, one JSON object a line, and TensorBoard files, written without TensorFlow."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import tensorboardX


class MetricsWriter:
  """Appends to a workdir's metrics; each step at most once, also after a crash and a resume."""

  def __init__(self, workdir: pathlib.Path, *, resume_step: int = 0):
    """Opens the files, forgetting what was written after `resume_step`: those updates are about to be made again."""
    path = workdir / "metrics.jsonl"
    _forget_after(path, resume_step)
    self._lines = path.open("a", encoding="utf-8")
    self._tensorboard = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"), purge_step=resume_step + 1, filename_suffix=f".{resume_step:08d}"
    )  # two files of one second would otherwise have one name

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one line for `step`; the line is on disk (in the kernel's hands) when this returns."""
    self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
    self._lines.flush()
    for name, value in metrics.items():
      self._tensorboard.add_scalar(name, value, step)

  def write_image(self, step: int, name: str, picture: np.ndarray) -> None:
    """Adds a picture uint8 [height, width, 3] to TensorBoard."""
    self._tensorboard.add_image(name, picture, step, dataformats="HWC")

  def close(self) -> None:
    """Flushes and closes both."""
    self._lines.close()
    self._tensorboard.close()


def _forget_after(path: pathlib.Path, step: int) -> None:
  """Drops the lines after `step`, and a last line that a kill cut short."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
    try:
      if json.loads(line)["step"] <= step and line.endswith("\n"):
        kept.append(line)
    except json.JSONDecodeError:
      continue  # only a line that was cut short fails to parse
  temporary = path.with_suffix(".jsonl.tmp")
  temporary.write_text("".join(kept), encoding="utf-8")
  os.replace(temporary, path)
