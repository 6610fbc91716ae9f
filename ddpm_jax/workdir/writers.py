"""Metrics on disk: `metrics.jsonl`, one JSON object a line, and TensorBoard files, written without TensorFlow.

tensorboardX gives the format alone. Its SummaryWriter writes from a thread that dies on a full disk, after which the
caller waits for it for ever.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c

from ddpm_jax.errors import RunError
from ddpm_jax.workdir.metrics import training_seconds
from ddpm_jax.workdir.storage import Records, write_whole


class MetricsWriter:
  """Appends to a workdir's metrics; each step at most once, also after a crash and a resume, or on a full disk."""

  def __init__(self, workdir: pathlib.Path, *, resume_step: int = 0, tensorboard: bool = True):
    """Opens the files and drops what was written after `resume_step`: those training steps are about to be repeated.

    Args:
      workdir: their folder.
      resume_step: number of training steps done.
      tensorboard: write TensorBoard's files too.

    Raises:
      RunError: if they cannot be written; `metrics.jsonl` is then as it was.
    """
    self._last = resume_step
    path = self._path = workdir / "metrics.jsonl"
    try:
      self.trained_before = _forget_after(path, resume_step)
      with contextlib.ExitStack() as opened:
        self._lines = opened.enter_context(contextlib.closing(Records(path)))
        self._files = [self._lines]
        if tensorboard:
          self._files.append(
            opened.enter_context(contextlib.closing(_event_file(workdir / "tensorboard", resume_step)))
          )
        opened.pop_all()
    except OSError as error:
      raise RunError(
        f"workdir: cannot write {error.filename or workdir} ({error.strerror}); make room or mend the disk, and give "
        "the same command again"
      ) from error

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one line for `step`; the line is on disk (in the kernel's hands) when this returns.

    A step that was given before is not written again. JSON has no NaN and no infinity: they become null.

    Raises:
      OSError: if not everything could be written. What is left waits in memory for the next `write` or `flush`.
    """
    if step > self._last:
      self._last = step
      self._lines.add(_line({"step": step}, metrics))
      for events in self._files[1:]:
        events.add(_scalars(step, metrics))
    _call_all(file.write for file in self._files)

  def amend(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds later metrics, of an evaluation, to the line of `step`, which is the last; writes one if there is none.

    Raises:
      OSError: if it cannot be written; the line is then as it was.
    """
    self._lines.write()
    *lines, last = self._path.read_bytes().splitlines(keepends=True) or [b""]
    if _step(last) != step:
      self._last = min(self._last, step - 1)
      self.write(step, metrics)
      return
    self._lines.rewrite(b"".join([*lines, _line(json.loads(last), metrics)]))
    for events in self._files[1:]:
      events.add(_scalars(step, metrics))
      events.write()

  def write_image(self, step: int, name: str, picture: np.ndarray) -> None:
    """Adds a picture uint8 [height, width, 3] to TensorBoard. Raises OSError if it cannot, and forgets it."""
    for events in self._files[1:]:
      image = summary.image(name, picture, dataformats="HWC")
      events.write_or_drop(_record(Event(wall_time=time.time(), step=step, summary=image)))

  def flush(self) -> None:
    """Flushes everything to the disk. Raises OSError, and keeps what is left."""
    _call_all(file.sync for file in self._files)

  def close(self) -> None:
    """Closes the files. What could not be written by now is lost: `flush` before this to know."""
    for file in self._files:
      file.close()


def _call_all(actions: Iterable[Callable[[], None]]) -> None:
  """Calls them all, whichever fails, and raises the error of the first that does."""
  with contextlib.ExitStack() as stack:
    for action in reversed([*actions]):
      stack.callback(action)


def _forget_after(path: pathlib.Path, step: int) -> tuple[int, float]:
  """Drops the lines after `step`, and a last line that a kill cut short.

  Returns:
    The step of the last line that stays, and the seconds of training up to it; 0, 0 if there is none.
  """
  before = path.read_bytes() if path.exists() else b""
  kept = [line for line in before.splitlines(keepends=True) if line.endswith(b"\n") and _step(line) <= step]
  if (data := b"".join(kept)) != before:
    write_whole(path, data)
  rows = [json.loads(line) for line in kept]
  return (rows[-1]["step"], training_seconds(rows)[-1]) if rows else (0, 0.0)


def _line(row: Mapping[str, Any], metrics: Mapping[str, float]) -> bytes:
  facts = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
  return json.dumps({**row, **facts}, allow_nan=False).encode() + b"\n"


def _step(line: bytes) -> float:
  """The step of a line of `metrics.jsonl`, infinite for one that was cut short."""
  try:
    return json.loads(line)["step"]
  except (ValueError, TypeError, KeyError):
    return math.inf


def _event_file(folder: pathlib.Path, resume_step: int) -> Records:
  """A new event file. TensorBoard reads a folder's files in the order of their names."""
  folder.mkdir(exist_ok=True)
  stem = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{resume_step:08d}"
  number = 0
  while (folder / f"{stem}.{number:03d}").exists():
    number += 1  # a restart within a second
  events = Records(folder / f"{stem}.{number:03d}", os.O_EXCL)
  events.add(_record(Event(wall_time=time.time(), file_version="brain.Event:2")))
  # TensorBoard hides what an earlier file has from this step on.
  start = SessionLog(status=SessionLog.START)
  events.add(_record(Event(wall_time=time.time(), step=resume_step + 1, session_log=start)))
  try:
    events.write()
  except OSError:
    events.close()
    raise
  return events


def _scalars(step: int, metrics: Mapping[str, float]) -> bytes:
  # Every event has the time of its own; as a float32 it would be that of some minute.
  values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items() if name != "time"]
  return _record(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))


def _record(event: Event) -> bytes:
  """An event in the TFRecord format: length uint64, its checksum, the bytes, their checksum; little-endian."""
  data = event.SerializeToString()
  length = struct.pack("<Q", len(data))
  return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
