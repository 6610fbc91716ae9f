import json
import os

import pytest

from benchmarks import command as command_line
from benchmarks import loop
from benchmarks.alternate import Block
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import RunError
from tests import command
from tests.benchmarks import fake


def test_a_whole_run_is_timed_from_its_first_update_to_its_last_checkpoint(tmp_path):
  words = [*command.FLAGS, "--num_steps=12", f"--data_dir={tmp_path / 'tfds'}"]
  _, (setting,) = command_line.parse(loop.make_parser(), words)
  measured = loop.whole_run(setting.config, tmp_path, "cold")
  assert command.checkpoints(tmp_path / "cold") == [6, 12]
  assert list((tmp_path / "cache").iterdir())  # for the warm start
  assert measured["images"] == 11 * 16
  assert 0 < measured["in_updates"] < measured["seconds"]
  assert 0 < measured["cpu_seconds"] < 9 * measured["seconds"]
  assert measured["to_first_update"] > 1
  assert measured["after"] > 0


def test_a_run_that_fails_is_told_in_a_line(tmp_path):
  config = config_lib.override(Config(), {"dataset": f"folder:{tmp_path / 'nothere'}"})
  with pytest.raises(RunError, match=r"the run ended with exit code 2: error: dataset: .* names no folder"):
    loop.whole_run(config, tmp_path, "cold")


def test_a_run_that_fails_later_is_told_too(tmp_path, monkeypatch):
  program = tmp_path / "python"
  program.write_text("#!/bin/sh\necho compiled and made update 1 in 2 s\necho 'error: disk full' >&2\nexit 1\n")
  program.chmod(0o755)
  monkeypatch.setattr(loop.sys, "executable", str(program))
  with pytest.raises(RunError, match="the run ended with exit code 1: error: disk full"):
    loop.whole_run(Config(), tmp_path, "cold")


def test_the_end_is_when_the_last_file_was_written(tmp_path):
  state = tmp_path / "checkpoints" / "8" / "state"
  state.mkdir(parents=True)
  (tmp_path / "checkpoints" / "4").mkdir()
  (tmp_path / "samples").mkdir()
  for name, time in (("checkpoints/8/state/x", 5e9), ("checkpoints/4/x", 9e9), ("samples/step_00000008.png", 6e9)):
    (tmp_path / name).write_text("")
    os.utime(tmp_path / name, (time, time))
  assert loop.last_written(tmp_path, 8) == 6e9
  (tmp_path / "samples/step_00000008.png").unlink()
  assert loop.last_written(tmp_path, 8) == 5e9


def test_speeds_add_up_to_seconds(tmp_path):
  rows = [{"step": 1}, {"step": 5, "steps_per_second": 2.0}, {"step": 10, "steps_per_second": 5.0}]
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert loop.seconds_in_updates(path) == 4 / 2 + 5 / 5
  path.write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
  assert loop.seconds_in_updates(path) == 9 / 5


def whole(seconds, updates):
  about = {"images": 640, "to_first_update": 30.0, "after": 1.0}
  return {"seconds": seconds, "in_updates": updates, "cpu_seconds": 2 * updates, **about}


def test_a_run_is_compared_with_the_blocks_beside_it(capsys):
  def bare(seconds):
    return Block(0, "bare", 5, {"seconds": seconds, "cpu_seconds": 1.5 * seconds, "images": 320})

  config = config_lib.override(Config(), {"num_steps": 11, "warmup_steps": 0})
  blocks = [
    bare(4.0),
    Block(0, "cold", 11, whole(15.0, 11.0)),
    bare(6.0),
    Block(0, "warm", 11, whole(15.0, 12.0)),
    bare(9.0),
  ]
  results = loop.summary(config, blocks)
  assert results["cold"]["whole_seconds"].median == 1.5
  assert results["cold"]["overhead_percent"].median == pytest.approx(50)  # 1.5 against (0.8 + 1.2) / 2
  assert results["cold"]["in_updates_percent"].median == pytest.approx(10)
  assert results["warm"]["overhead_percent"].median == pytest.approx(0)  # against (1.2 + 1.8) / 2
  assert results["bare_seconds"].median == pytest.approx(1.2)
  assert results["warm"]["whole_cpu_seconds"].median == pytest.approx(2.4)
  assert results["warm"]["cpu_overhead_percent"].median == pytest.approx(100 / 15)  # against 1.5 (1.2 + 1.8) / 2
  assert "overhead, %" in loop.text(results)


def test_runs_and_bare_blocks_alternate(monkeypatch, capsys, tmp_path):
  machine, runs = fake.Machine(), []

  def run(config, folder, start):
    runs.append((folder, start, len(machine.turns)))
    return whole(10.0, 8.0)

  monkeypatch.setattr(loop, "whole_run", run)
  worker = fake.Worker({"devices": "1 x x"}, machine.run("bare", 64))
  monkeypatch.setattr(command_line, "workers", fake.workers({"bare": worker}))
  loop.main(["--rounds=2", "--num_steps=11", "--warmup_steps=0", f"--json={tmp_path / 'out.json'}"])
  assert worker.jobs[0]["data"] is True
  content = json.loads((tmp_path / "out.json").read_text())
  assert [block["setting"] for block in content["measurements"]] == ["bare", "cold", "bare", "warm", "bare"] * 2
  folders = [folder for folder, _, _ in runs]
  assert folders[0] == folders[1] != folders[2] == folders[3]  # each round has a cache of its own
  assert not folders[0].exists()
  assert "every 1000, a grid every 1000" in capsys.readouterr().out
