import contextlib
import errno
import io
import json
import math
import os
import pathlib
import resource
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from ddpm_jax.errors import RunError
from ddpm_jax.workdir.storage import Records
from ddpm_jax.workdir.writers import MetricsWriter


def read_lines(folder: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_events(path: pathlib.Path) -> list[Event]:
  """The records of a TFRecord file: length uint64, its checksum, the bytes, their checksum."""
  data, events = path.read_bytes(), []
  while data:
    (length,) = struct.unpack("<Q", data[:8])
    assert len(data) >= 16 + length, "torn"
    assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
    assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked_crc32c(data[12 : 12 + length]),)
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


FULL = "File too large"  # what `files_of_at_most` makes of the next write


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
  """The kernel takes the bytes up to `size` and refuses those after it, as a full disk does, also for root."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def sizes(folder: pathlib.Path) -> tuple[int, int]:
  (events,) = (folder / "tensorboard").iterdir()
  return (folder / "metrics.jsonl").stat().st_size, events.stat().st_size


def losses(folder: pathlib.Path) -> list[tuple[int, float]]:
  """(step, loss) of metrics.jsonl and of TensorBoard, which must agree."""
  lines = [(line["step"], line["loss"]) for line in read_lines(folder)]
  assert [(step, value) for step, tag, value in shown(folder) if tag == "loss"] == lines
  return lines


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
  # Killed after step 40 with a checkpoint at 20: steps 21 to 40 are made again.
  monkeypatch.setattr("time.time", lambda: 1.7e9)
  write(tmp_path, [10, 20, 21, 30, 40], loss=1.0)
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


def test_a_kill_at_any_byte(tmp_path):
  write(tmp_path, [10, 20])
  data = (tmp_path / "metrics.jsonl").read_bytes()
  first = data.index(b"\n") + 1
  for cut in range(len(data) + 1):
    (tmp_path / "metrics.jsonl").write_bytes(data[:cut])
    MetricsWriter(tmp_path, resume_step=20).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == data[: cut // first * first], cut


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"3\n", b"null\n", b"{}\n", b"\0\0\0\n", b'"step"\n'])
def test_a_line_without_a_step_is_dropped_wherever_it_stands(tmp_path, line):
  write(tmp_path, [10, 20])
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(path.read_bytes().replace(b"\n", b"\n" + line, 1))
  write(tmp_path, [30], resume_step=20)
  assert [line["step"] for line in read_lines(tmp_path)] == [10, 20, 30]


def test_a_file_with_nothing_to_forget_is_left_alone(tmp_path):
  write(tmp_path, [10, 20])
  before = (tmp_path / "metrics.jsonl").stat()
  MetricsWriter(tmp_path, resume_step=20).close()
  assert (tmp_path / "metrics.jsonl").stat() == before


def test_a_step_is_written_once(tmp_path):
  writer = MetricsWriter(tmp_path, resume_step=10)
  for step in (10, 20, 20, 15, 30):
    writer.write(step, {"loss": float(step)})
  writer.close()
  assert losses(tmp_path) == [(20, 20.0), (30, 30.0)]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan(tmp_path, number):
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"loss": number, "grad_norm": 1.5})
  writer.close()
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": 1.5}\n'
  ((_, _, loss), (_, _, norm)) = shown(tmp_path)
  assert str(loss) == str(number) and norm == 1.5


def test_starting_over_forgets_everything(tmp_path):
  write(tmp_path, [10, 20])  # killed before the first checkpoint
  write(tmp_path, [10], resume_step=0, loss=3.0)
  assert [(line["step"], line["loss"]) for line in read_lines(tmp_path)] == [(10, 3.0)]


def test_nothing_else_is_left_behind(tmp_path):
  write(tmp_path, [10])
  write(tmp_path, [20], resume_step=10)
  assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("room", [0, 1, 20])
def test_a_full_disk(tmp_path, which, room):
  """Each write says so; what is there is whole at any time; all of it is there once there is room."""
  writer = MetricsWriter(tmp_path)
  for step in range(1, 6):
    writer.write(step, {"loss": float(step)})
  with files_of_at_most(sizes(tmp_path)[which] + room):  # metrics.jsonl is the smaller of the two
    for step in range(6, 36):  # more than a queue would hold
      with pytest.raises(OSError, match=FULL):
        writer.write(step, {"loss": float(step)})
  steps = [line["step"] for line in read_lines(tmp_path)]
  assert steps == list(range(1, len(steps) + 1))
  assert len(steps) == 5 if which == 0 else len(steps) > 5, "one file waits for the other"
  assert {step for step, _, _ in shown(tmp_path)} == set(range(1, 6))
  writer.write(36, {"loss": 36.0})
  assert losses(tmp_path) == [(step, float(step)) for step in range(1, 37)]
  writer.close()
  assert losses(tmp_path) == [(step, float(step)) for step in range(1, 37)]


@pytest.mark.parametrize("broken", ["metrics.jsonl", "events.out"])
def test_one_file_does_not_wait_for_the_other(tmp_path, monkeypatch, broken):
  writer, pwrite = MetricsWriter(tmp_path), os.pwrite

  def partly(file, data, offset):
    if broken in os.readlink(f"/proc/self/fd/{file}"):
      raise OSError(errno.ENOSPC, "No space left on device")
    return pwrite(file, data, offset)

  monkeypatch.setattr(os, "pwrite", partly)
  for step in (1, 2):
    with pytest.raises(OSError, match="No space"):
      writer.write(step, {"loss": 1.0})
  lines, events = [line["step"] for line in read_lines(tmp_path)], [step for step, _, _ in shown(tmp_path)]
  assert (lines, events) == (([], [1, 2]) if broken == "metrics.jsonl" else ([1, 2], []))
  monkeypatch.undo()
  writer.close()
  assert losses(tmp_path) == [(1, 1.0), (2, 1.0)]


def test_flush_writes_what_waits(tmp_path):
  writer = MetricsWriter(tmp_path)
  with files_of_at_most(10):
    for step in (1, 2):
      with pytest.raises(OSError, match=FULL):
        writer.write(step, {"loss": 1.0})
    with pytest.raises(OSError, match=FULL):
      writer.flush()
    with pytest.raises(OSError, match=FULL):
      writer.write(2, {"loss": 1.0})  # tried again, not twice
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
  writer.flush()
  assert losses(tmp_path) == [(1, 1.0), (2, 1.0)]
  writer.flush()
  writer.close()
  assert losses(tmp_path) == [(1, 1.0), (2, 1.0)]


def test_flush_reaches_the_disk(tmp_path, monkeypatch):
  writer, synced, fsync = MetricsWriter(tmp_path), [], os.fsync

  def watched(file):
    synced.append(os.readlink(f"/proc/self/fd/{file}"))
    fsync(file)

  writer.write(1, {"loss": 1.0})
  monkeypatch.setattr(os, "fsync", watched)
  writer.flush()
  assert sorted(map(os.path.basename, synced)) == sorted(
    ["metrics.jsonl", *(path.name for path in (tmp_path / "tensorboard").iterdir())]
  )
  writer.close()


def test_storage_that_fails_only_at_fsync(tmp_path, monkeypatch):
  """As network file systems do: what was written since the last time is not there."""
  writer, fsync = MetricsWriter(tmp_path), os.fsync
  writer.write(1, {"loss": 1.0})
  writer.flush()
  safe = sizes(tmp_path)
  writer.write(2, {"loss": 2.0})
  writer.write(3, {"loss": 3.0})

  def failing(file):
    for name, size in zip((tmp_path / "metrics.jsonl", *(tmp_path / "tensorboard").iterdir()), safe, strict=True):
      name.write_bytes(name.read_bytes()[:size] + bytes(7))
    raise OSError(errno.EDQUOT, "Disk quota exceeded")

  monkeypatch.setattr(os, "fsync", failing)
  for _ in range(2):
    with pytest.raises(OSError, match="quota"):
      writer.flush()
  monkeypatch.setattr(os, "fsync", fsync)
  writer.write(4, {"loss": 4.0})
  writer.flush()
  writer.close()
  assert losses(tmp_path) == [(step, float(step)) for step in (1, 2, 3, 4)]


def no_cut(file, size):
  raise OSError(errno.ENOSPC, "No space left on device")


def test_a_part_that_cannot_be_cut_off_at_once(tmp_path, monkeypatch):
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"loss": 1.0})
  with monkeypatch.context() as patch, files_of_at_most(sizes(tmp_path)[0] + 9):
    patch.setattr(os, "ftruncate", no_cut)
    for _ in range(2):
      with pytest.raises(OSError, match=r"File too large|No space"):
        writer.write(2, {"loss": 2.0})
  assert (tmp_path / "metrics.jsonl").read_text().endswith('\n{"step": ')  # what a reader sees for a while
  writer.write(3, {"loss": 3.0})
  assert losses(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0)]
  writer.close()


def test_a_part_of_a_picture_that_cannot_be_cut_off_at_once(tmp_path, monkeypatch):
  writer = MetricsWriter(tmp_path)
  with monkeypatch.context() as patch, files_of_at_most(sizes(tmp_path)[1] + 500):
    patch.setattr(os, "ftruncate", no_cut)
    with pytest.raises(OSError, match=FULL):
      writer.write_image(1, "samples", np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
  writer.write(2, {"loss": 2.0})  # shorter than what is left of the picture
  assert losses(tmp_path) == [(2, 2.0)]
  writer.close()


def test_writes_that_take_a_part_only(tmp_path, monkeypatch):
  pwrite = os.pwrite
  monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:7], offset))
  write(tmp_path, [10, 20])
  assert losses(tmp_path) == [(10, 1.0), (20, 1.0)]


def test_a_picture_that_finds_no_room_is_forgotten(tmp_path):
  pictures = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"loss": 1.0})
  with files_of_at_most(sizes(tmp_path)[1] + 60), pytest.raises(OSError, match=FULL):
    writer.write_image(10, "samples", pictures[0])
  shown(tmp_path)
  writer.write_image(20, "samples", pictures[1])
  writer.write(21, {"loss": 2.0})
  writer.close()
  (path,) = (tmp_path / "tensorboard").iterdir()
  assert [event.step for event in read_events(path) if event.summary.value] == [1, 20, 21]


def open_files(folder: pathlib.Path) -> list[str]:
  links = []
  for name in os.listdir("/proc/self/fd"):
    with contextlib.suppress(FileNotFoundError):
      links.append(os.readlink(f"/proc/self/fd/{name}"))
  return [link for link in links if link.startswith(str(folder))]


def test_closing_on_a_full_disk(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"loss": 1.0})
  with files_of_at_most(sizes(tmp_path)[0] + 5):
    with pytest.raises(OSError, match=FULL):
      writer.write(2, {"loss": 2.0})
    assert len(open_files(tmp_path)) == 2
    writer.close()
  assert open_files(tmp_path) == []
  assert losses(tmp_path) == [(1, 1.0)]


def test_closing_tries_once_more(tmp_path):
  writer = MetricsWriter(tmp_path)
  with files_of_at_most(5), pytest.raises(OSError, match=FULL):
    writer.write(2, {"loss": 2.0})
  writer.close()
  assert losses(tmp_path) == [(2, 2.0)]


@pytest.mark.parametrize("resume_step", [10, 20])  # something to forget, nothing to forget
@pytest.mark.parametrize("room", [0, 60])
def test_opening_on_a_full_disk(tmp_path, resume_step, room):
  write(tmp_path, [10, 20])
  before = (tmp_path / "metrics.jsonl").read_bytes()
  with files_of_at_most(room), pytest.raises(RunError) as caught:
    MetricsWriter(tmp_path, resume_step=resume_step)
  text = str(caught.value)
  assert text.startswith(f"workdir: cannot write {tmp_path}") and "(File too large)" in text and "\n" not in text
  if room < 60 or resume_step == 20:
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
  assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}
  assert open_files(tmp_path) == []
  write(tmp_path, [30], resume_step=resume_step)
  assert [step for step, _ in losses(tmp_path)] == [step for step in (10, 20) if step <= resume_step] + [30]


def test_a_restart_at_the_same_step_within_a_second(tmp_path, monkeypatch):
  monkeypatch.setattr("time.time", lambda: 1.7e9)
  write(tmp_path, [20], resume_step=10)
  write(tmp_path, [20], resume_step=10, loss=2.0)
  assert len(list((tmp_path / "tensorboard").iterdir())) == 2
  assert losses(tmp_path) == [(20, 2.0)]


def test_without_tensorboard(tmp_path):
  writer = MetricsWriter(tmp_path, tensorboard=False)
  writer.write(1, {"loss": 1.0})
  writer.amend(1, {"kid": 2.0})
  writer.write_image(1, "samples", np.zeros((2, 2, 3), np.uint8))
  writer.flush()
  writer.close()
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
  assert read_lines(tmp_path) == [{"step": 1, "loss": 1.0, "kid": 2.0}] and open_files(tmp_path) == []


def test_the_time_of_a_line_is_no_curve(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"loss": 1.0, "seconds": 2.0, "time": 1.7e9})
  writer.close()
  assert read_lines(tmp_path) == [{"step": 1, "loss": 1.0, "seconds": 2.0, "time": 1.7e9}]
  assert [tag for _, tag, _ in shown(tmp_path)] == ["loss", "seconds"]
  assert MetricsWriter(tmp_path, resume_step=9).trained_before == (1, 2.0)


# What becomes known later.


def test_a_file_is_rewritten_whole_or_not_at_all(tmp_path, monkeypatch):
  """And what comes after goes where it belongs, also where storage says only at fsync that it lost it."""
  records, fsync = Records(tmp_path / "a"), os.fsync
  records.add(b"first\n")
  records.write()
  with files_of_at_most(8), pytest.raises(OSError, match=FULL):
    records.rewrite(b"FIRST, and much more of it\n")
  assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"first\n"

  def failing(_):
    raise OSError(errno.EDQUOT, "Disk quota exceeded")

  monkeypatch.setattr(os, "fsync", failing)
  with pytest.raises(OSError, match="quota"):
    records.rewrite(b"FIRST\n")
  assert (tmp_path / "a").read_bytes() == b"first\n"
  monkeypatch.setattr(os, "fsync", fsync)
  records.rewrite(b"FIRST\n2\n")
  records.add(b"third\n")
  monkeypatch.setattr(os, "fsync", failing)
  with pytest.raises(OSError, match="quota"):
    records.sync()
  (tmp_path / "a").write_bytes(b"FIRST\n2\n" + bytes(9))
  monkeypatch.setattr(os, "fsync", fsync)
  records.sync()
  assert len(open_files(tmp_path)) == 1
  records.close()
  assert (tmp_path / "a").read_bytes() == b"FIRST\n2\nthird\n"


def test_a_line_is_amended(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"loss": 1.0})
  writer.write(2, {"loss": 2.0})
  writer.amend(2, {"kid": 0.5, "score": math.nan, "loss": 3.0})
  writer.write(3, {"loss": 4.0})
  expected = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 3.0, "kid": 0.5, "score": None}, {"step": 3, "loss": 4.0}]
  assert read_lines(tmp_path) == expected
  writer.flush()
  writer.close()
  assert read_lines(tmp_path) == expected
  numbers = [scalar for scalar in shown(tmp_path) if scalar[1] != "score"]
  assert numbers == [(1, "loss", 1.0), (2, "loss", 2.0), (2, "kid", 0.5), (2, "loss", 3.0), (3, "loss", 4.0)]
  (score,) = [value for _, tag, value in shown(tmp_path) if tag == "score"]
  assert math.isnan(score)


def test_a_step_without_a_line_gets_one(tmp_path):
  """Also one that lies between two that are logged, and the first of all."""
  for first in ([], [10]):
    (tmp_path / str(len(first))).mkdir()
    writer = MetricsWriter(tmp_path / str(len(first)))
    for step in first:
      writer.write(step, {"loss": 1.0})
    writer.amend(15, {"kid": 0.5})
    writer.amend(15, {"score": math.inf})
    writer.write(20, {"loss": 2.0})
    writer.close()
    lines = read_lines(tmp_path / str(len(first)))
    assert [line["step"] for line in lines] == [*first, 15, 20]
    assert lines[-2] == {"step": 15, "kid": 0.5, "score": None}
    assert [step for step, _, _ in shown(tmp_path / str(len(first)))] == [*first, 15, 15, 20]


def test_a_line_is_amended_after_a_restart(tmp_path):
  """The evaluation of the last checkpoint was interrupted."""
  write(tmp_path, [10, 20])
  writer = MetricsWriter(tmp_path, resume_step=20)
  writer.amend(20, {"kid": 0.5})
  writer.write(30, {"loss": 2.0})
  writer.close()
  lines = read_lines(tmp_path)
  assert [line["step"] for line in lines] == [10, 20, 30]
  assert lines[1] == {"step": 20, "loss": 1.0, "grad_norm": 0.5, "kid": 0.5}
  assert (20, "kid", 0.5) in shown(tmp_path) and (20, "loss", 1.0) in shown(tmp_path)
  MetricsWriter(tmp_path, resume_step=20).close()
  assert read_lines(tmp_path) == lines[:2]
  # A line for it where the metrics of that training step were not logged: the step was given to the writer as done.
  write(tmp_path, [], resume_step=20)
  writer = MetricsWriter(tmp_path, resume_step=25)
  writer.amend(25, {"kid": 0.25})
  writer.close()
  assert read_lines(tmp_path)[-1] == {"step": 25, "kid": 0.25}


def test_an_amendment_on_a_full_disk(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"loss": 1.0})
  writer.write(2, {"loss": 2.0})
  with files_of_at_most(sizes(tmp_path)[0] + 3), pytest.raises(OSError, match=FULL):
    writer.amend(2, {"kid": 0.5})
  assert losses(tmp_path) == [(1, 1.0), (2, 2.0)]
  writer.amend(2, {"kid": 0.5})
  writer.write(3, {"loss": 3.0})
  writer.close()
  assert read_lines(tmp_path)[1:] == [{"step": 2, "loss": 2.0, "kid": 0.5}, {"step": 3, "loss": 3.0}]


def test_a_line_that_waits_is_amended_once_there_is_room(tmp_path):
  writer = MetricsWriter(tmp_path)
  with files_of_at_most(5):
    with pytest.raises(OSError, match=FULL):
      writer.write(1, {"loss": 1.0})
    with pytest.raises(OSError, match=FULL):
      writer.amend(1, {"kid": 0.5})
  writer.amend(1, {"kid": 0.5})
  writer.close()
  assert read_lines(tmp_path) == [{"step": 1, "loss": 1.0, "kid": 0.5}]
