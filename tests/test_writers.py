import io
import json
import pathlib
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from ddpm_jax.writers import MetricsWriter


def read_lines(folder: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_events(path: pathlib.Path) -> list[Event]:
  """The records of a TFRecord file: length uint64, its checksum, the bytes, their checksum."""
  data, events = path.read_bytes(), []
  while data:
    (length,) = struct.unpack("<Q", data[:8])
    events.append(Event.FromString(data[12 : 12 + length]))
    data = data[16 + length :]
  return events


def shown(folder: pathlib.Path) -> list[tuple[int, str, float]]:
  """What TensorBoard shows: a session that starts at step s hides what was written from s on before it."""
  scalars = []
  for path in sorted((folder / "tensorboard").iterdir()):
    for event in read_events(path):
      if event.HasField("session_log") and event.session_log.status == SessionLog.START:
        scalars = [scalar for scalar in scalars if scalar[0] < event.step]
      scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
  return scalars


def write(folder: pathlib.Path, steps, *, resume_step: int = 0, loss: float = 1.0) -> None:
  writer = MetricsWriter(folder, resume_step=resume_step)
  for step in steps:
    writer.write(step, {"loss": loss, "grad_norm": 0.5})
  writer.close()


def test_one_object_a_line(tmp_path):
  write(tmp_path, [10, 20])
  lines = (tmp_path / "metrics.jsonl").read_text()
  assert lines.count("\n") == 2
  assert lines.endswith("\n")
  assert read_lines(tmp_path) == [{"step": step, "loss": 1.0, "grad_norm": 0.5} for step in (10, 20)]


def test_a_line_is_on_disk_when_write_returns(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"loss": 2.0})
  assert read_lines(tmp_path) == [{"step": 1, "loss": 2.0}]
  writer.close()


def test_tensorboard_files_hold_the_same_numbers(tmp_path):
  write(tmp_path, [10, 20], loss=0.25)
  assert shown(tmp_path) == [(step, *fact) for step in (10, 20) for fact in (("loss", 0.25), ("grad_norm", 0.5))]
  (path,) = (tmp_path / "tensorboard").iterdir()
  assert path.name.startswith("events.out.tfevents.")
  assert read_events(path)[0].file_version == "brain.Event:2"


def test_tensorboard_picture(tmp_path):
  picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  writer = MetricsWriter(tmp_path)
  writer.write_image(30, "samples", picture)
  writer.close()
  (path,) = (tmp_path / "tensorboard").iterdir()
  (event,) = [event for event in read_events(path) if event.summary.value]
  assert (event.step, event.summary.value[0].tag) == (30, "samples")
  with Image.open(io.BytesIO(event.summary.value[0].image.encoded_image_string)) as image:
    np.testing.assert_array_equal(np.asarray(image), picture)


def test_each_step_once_after_a_resume(tmp_path, monkeypatch):
  # Killed after update 40 with a checkpoint at 20: updates 21 to 40 are made again.
  monkeypatch.setattr("time.time", lambda: 1.7e9)
  write(tmp_path, [10, 20, 30, 40], loss=1.0)
  monkeypatch.setattr("time.time", lambda: 1.7e9 + 60)
  write(tmp_path, [30, 40, 50], resume_step=20, loss=2.0)
  expected = [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 2.0)]
  assert [(line["step"], line["loss"]) for line in read_lines(tmp_path)] == expected
  assert [(step, value) for step, tag, value in shown(tmp_path) if tag == "loss"] == expected


def test_a_restart_within_a_second_keeps_the_first_event_file(tmp_path, monkeypatch):
  monkeypatch.setattr("time.time", lambda: 1.7e9)
  write(tmp_path, [10])
  write(tmp_path, [20], resume_step=10)
  assert {step for step, _, _ in shown(tmp_path)} == {10, 20}


@pytest.mark.parametrize("tail", ['{"step": 30, "lo', "{", '{"step": 30, "loss": 1.0}', "\0\0\0", '{"step": 3'])
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path, tail):
  write(tmp_path, [10, 20])
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write(tail)
  write(tmp_path, [40], resume_step=30)
  assert [line["step"] for line in read_lines(tmp_path)] == [10, 20, 40]


def test_starting_over_forgets_everything(tmp_path):
  write(tmp_path, [10, 20])  # killed before the first checkpoint
  write(tmp_path, [10], resume_step=0, loss=3.0)
  assert [(line["step"], line["loss"]) for line in read_lines(tmp_path)] == [(10, 3.0)]


def test_nothing_else_is_left_behind(tmp_path):
  write(tmp_path, [10])
  write(tmp_path, [20], resume_step=10)
  assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}
