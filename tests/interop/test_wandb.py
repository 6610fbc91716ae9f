"""What Weights & Biases gets in its offline mode, read back from the file that it would upload.

pip install -e '.[test,wandb]'
python -m pytest tests/interop/test_wandb.py
"""

import json
import struct
import time

import numpy as np
import pytest
from wandb.proto import wandb_internal_pb2

from ddpm_jax.workdir.loggers import Loggers, find


@pytest.fixture(autouse=True)
def offline(monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")


def records(path):
  """The records of a LevelDB log in blocks of 32 KiB, after a header of 7 bytes."""
  data, place, whole = path.read_bytes(), 7, b""
  while place + 7 <= len(data):
    room = 32768 - place % 32768
    if room < 7:
      place += room
      continue
    size, kind = struct.unpack_from("<HB", data, place + 4)  # behind a checksum
    if kind == 0:
      break
    whole += data[place + 7 : place + 7 + size]
    place += 7 + size
    if kind in (1, 4):  # whole, or the last part
      yield wandb_internal_pb2.Record.FromString(whole)
      whole = b""


def history(path):
  """Step -> values, and the settings, of one run's file, which another process writes."""
  deadline = time.monotonic() + 60
  while not any(record.WhichOneof("record_type") == "exit" for record in records(path)):
    assert time.monotonic() < deadline, "never written to its end"
    time.sleep(0.2)
  rows, settings = {}, {}
  for record in records(path):
    kind = record.WhichOneof("record_type")
    if kind == "history":
      row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
      rows.setdefault(row["_step"], {}).update(row)
    elif kind in ("run", "config"):
      update = record.run.config.update if kind == "run" else record.config.update
      settings |= {item.key: json.loads(item.value_json) for item in update}
  return rows, settings


def test_offline(tmp_path, capfd):
  """Two starts of one run are one run."""
  workdir = tmp_path / "run"
  workdir.mkdir()
  settings = {"train": {"seed": 3}, "model": {"channels": 8, "channel_multipliers": [1, 2]}}
  picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
  for resume_step in (0, 20):
    loggers = Loggers(find(["tensorboard", "wandb"]), workdir, settings, resume_step)
    for step in (resume_step + 10, resume_step + 20):
      loggers.scalars(step, {"loss": 1 / step, "images": step * 16})
    loggers.image(resume_step + 20, "samples", picture)
    loggers.scalars(resume_step + 20, {"evaluation/fid": 3.5})
    loggers.close()
  err = capfd.readouterr().err
  assert "warning" not in err, err
  first, second = sorted(workdir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.parent.name)
  assert first.name == second.name, "one run"
  for path, steps in ((first, (10, 20)), (second, (30, 40))):
    rows, told = history(path)
    assert sorted(rows) == list(steps)
    assert all(rows[step]["loss"] == 1 / step and rows[step]["images"] == step * 16 for step in steps)
    last = rows[steps[-1]]
    assert last["evaluation/fid"] == 3.5
    assert told["train"] == {"seed": 3} and told["model"]["channel_multipliers"] == [1, 2]
  assert len(list(workdir.glob("wandb/offline-run-*/files/media/images/*.png"))) == 2
