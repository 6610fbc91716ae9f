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
from collections.abc import Callable, Mapping

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
    """Opens the files, forgetting what was written after `resume_step`: those updates are about to be made again.

    Args:
      workdir: where they are.
      resume_step: the number of training steps made before.
      tensorboard: write TensorBoard's files too.

    Raises:
      RunError: if they cannot be written; `metrics.jsonl` is then as it was.
    """
    self._last = resume_step
    path = self._path = workdir / "metrics.jsonl"
    try:
      _forget_after(path, resume_step)
      self.trained_before = _trained_before(path)
      with contextlib.ExitStack() as opened:
        self._lines = opened.enter_context(contextlib.closing(Records(path)))
        self._events: Records | None = None
        if tensorboard:
          self._events = opened.enter_context(contextlib.closing(_event_file(workdir / "tensorboard", resume_step)))
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
      facts = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
      self._lines.add(json.dumps({"step": step, **facts}, allow_nan=False).encode() + b"\n")
      if self._events:
        self._events.add(_scalars(step, metrics))
    _each(*(file.write for file in self._files))

  @property
  def _files(self) -> list[Records]:
    return [self._lines, self._events] if self._events else [self._lines]

  def amend(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds what became known later to the line of `step`, which is the last; one is written if there is none.

    Raises:
      OSError: if it cannot be written; the line is then as it was.
    """
    self._lines.write()
    lines = self._path.read_bytes().splitlines(keepends=True)
    last = lines[-1] if lines else b""
    if last and _step(last) == step:
      facts = json.loads(last) | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
      self._lines.replace_last(last, json.dumps(facts, allow_nan=False).encode() + b"\n")
      if self._events:
        self._events.add(_scalars(step, metrics))
        self._events.write()
    else:
      self._last = min(self._last, step - 1)
      self.write(step, metrics)

  def write_image(self, step: int, name: str, picture: np.ndarray) -> None:
    """Adds a picture uint8 [height, width, 3] to TensorBoard. Raises OSError if it cannot, and forgets it."""
    if not self._events:
      return
    image = summary.image(name, picture, dataformats="HWC")
    self._events.write_or_drop(_record(Event(wall_time=time.time(), step=step, summary=image)))

  def flush(self) -> None:
    """Returns once everything is where a loss of power cannot take it. Raises OSError, and keeps what is left."""
    _each(*(file.sync for file in self._files))

  def close(self) -> None:
    """Closes the files. What could not be written by now is lost: `flush` before this to know."""
    for file in self._files:
      file.close()


def _each(*actions: Callable[[], None]) -> None:
  """Does them all, whichever fails. Raises the first OSError."""
  errors = []
  for action in actions:
    try:
      action()
    except OSError as error:
      errors.append(error)
  if errors:
    raise errors[0]


def _forget_after(path: pathlib.Path, step: int) -> None:
  """Drops the lines after `step`, and a last line that a kill cut short."""
  if not path.exists():
    return
  before = path.read_bytes()
  kept = b"".join(line for line in before.splitlines(keepends=True) if line.endswith(b"\n") and _step(line) <= step)
  if kept != before:
    write_whole(path, kept)


def _trained_before(path: pathlib.Path) -> tuple[int, float]:
  """The step of the last line, and the seconds of training up to it; 0, 0 if there is none."""
  rows = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
  return (rows[-1]["step"], training_seconds(rows)[-1]) if rows else (0, 0.0)


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
