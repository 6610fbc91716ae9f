import json
import os
import time

import pytest

from benchmarks import command as command_line
from benchmarks import loop
from benchmarks.alternate import Block
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import RunError
from tests import command
from tests.benchmarks import fake

HOLD = 0.5
BLOCK = {"seconds": 4.0, "cpu_seconds": 6.0, "images": 320}


def hold():
  time.sleep(HOLD)
  return BLOCK


@pytest.mark.slow
def test_a_whole_run_is_timed_from_its_first_update_to_its_last_checkpoint(tmp_path):
  words = [*command.FLAGS, "--num_steps=12"]
  _, (setting,) = command_line.parse(loop.make_parser(), words)
  measured = loop.whole_run(setting.config, tmp_path, "cold", hold, 0.5)
  assert command.checkpoints(tmp_path / "cold") == [6, 12]
  assert list((tmp_path / "cache").iterdir())  # for the warm start
  assert measured["updates"] == 12 - 2  # a line of the metrics ends the first call
  assert len(measured["bare"]) == len(measured["turns"]) + 1 > 2
  assert max(measured["turns"]) < 0.9  # while it is held, no time passes
  assert 0 < measured["cpu_seconds"] < 9 * sum(measured["turns"])
  assert measured["to_first_update"] > 1
  assert measured["after"] > 0
  assert measured["outside"] is None
  alone = loop.whole_run(setting.config, tmp_path, "alone", None, 0.5)
  assert alone["bare"] == [] and 0 < alone["outside"] < sum(alone["turns"])


def test_a_run_that_fails_is_told_in_a_line(tmp_path):
  config = config_lib.override(Config(), {"dataset": f"folder:{tmp_path / 'nothere'}"})
  with pytest.raises(RunError, match=r"the run ended with exit code 2: error: dataset: .* is not a folder"):
    loop.whole_run(config, tmp_path, "cold", hold, 1)


def test_a_run_that_fails_later_is_told_too(tmp_path, monkeypatch):
  program = tmp_path / "python"
  program.write_text("#!/bin/sh\necho compiled and made step 1 in 2 s\necho 'error: disk full' >&2\nexit 1\n")
  program.chmod(0o755)
  monkeypatch.setattr(loop.sys, "executable", str(program))
  with pytest.raises(RunError, match="the run ended with exit code 1: error: disk full"):
    loop.whole_run(Config(), tmp_path, "cold", hold, 1)


def test_a_run_does_not_outlive_the_benchmark(tmp_path, monkeypatch):
  program = tmp_path / "python"
  program.write_text("#!/bin/sh\necho $$ >pid\necho compiled and made step 1 in 2 s\nsleep 60\n")
  program.chmod(0o755)
  monkeypatch.setattr(loop.sys, "executable", str(program))
  monkeypatch.chdir(tmp_path)

  def interrupted():
    raise KeyboardInterrupt

  began = time.monotonic()
  with pytest.raises(KeyboardInterrupt):
    loop.whole_run(Config(), tmp_path, "cold", interrupted, 1)
  assert time.monotonic() - began < 30
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_end_is_when_the_last_file_was_written(tmp_path):
  state = tmp_path / "checkpoints" / "8" / "state"
  state.mkdir(parents=True)
  (tmp_path / "checkpoints" / "4").mkdir()
  (tmp_path / "samples").mkdir()
  for name, moment in (("checkpoints/8/state/x", 5e9), ("checkpoints/4/x", 9e9), ("samples/step_00000008.png", 6e9)):
    (tmp_path / name).write_text("")
    os.utime(tmp_path / name, (moment, moment))
  assert loop.last_written(tmp_path, 8) == 6e9
  (tmp_path / "samples/step_00000008.png").unlink()
  assert loop.last_written(tmp_path, 8) == 5e9


def whole(turns, bare):
  blocks = [{"seconds": 10 * one, "cpu_seconds": 15 * one, "images": 640} for one in bare]
  return {"turns": turns, "bare": blocks, "cpu_seconds": 30.0, "updates": 10, "to_first_update": 30.0, "after": 1.0}


ALONE = {"turns": [25.0, 26.0], "outside": 1.0}


def test_what_passes_in_updates_is_what_the_run_tells_of_its_speed(tmp_path):
  """Also where the first line is of the first call, which has no speed."""
  lines = [{"step": 5, "loss": 1}, {"step": 10, "steps_per_second": 2.5}, {"step": 30, "steps_per_second": 10}]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert loop.in_updates(tmp_path / "metrics.jsonl", 5) == pytest.approx(2 + 2)
  assert loop.in_updates(tmp_path / "metrics.jsonl", 7) == pytest.approx(3 / 2.5 + 2)


def test_a_turn_is_compared_with_the_blocks_beside_it():
  """A machine that becomes twice as slow in the middle makes no difference: 4 updates, then 2, then 4 times 3 / 4."""
  assert loop.bare_updates([4.0, 4.0, 4.0], [1.0, 1.0, 3.0, 3.0]) == pytest.approx(4 + 2 + 4 / 3)


def test_a_summary():
  config = config_lib.override(Config(), {"num_steps": 11, "warmup_steps": 0})
  blocks = [
    Block(0, "cold", 11, whole([8.0, 7.0], [1.0, 1.0, 1.0])),
    Block(0, "warm", 11, whole([8.0, 12.0], [2.0, 2.0, 2.0])),
    Block(0, "alone", 11, ALONE),
  ]
  results = loop.summary(config, blocks)
  assert results["cold"]["whole_seconds"].median == pytest.approx(1.5)
  assert results["cold"]["overhead_percent"].median == pytest.approx(50)
  assert results["warm"]["overhead_percent"].median == pytest.approx(0)
  assert results["warm"]["bare_seconds"].median == pytest.approx(2)
  assert results["warm"]["whole_cpu_seconds"].median == pytest.approx(3)
  assert results["warm"]["cpu_overhead_percent"].median == pytest.approx(0)  # 15 / 10 * 2
  assert results["cold"]["cpu_overhead_percent"].median == pytest.approx(100)
  assert results["alone"]["outside_percent"].median == pytest.approx(2)
  assert "overhead, %" in loop.text(results) and "outside of its updates: 2.00" in loop.text(results)


def test_each_round_has_a_cache_of_its_own(monkeypatch, capsys, tmp_path):
  machine, runs = fake.Machine(), []

  def run(config, folder, start, bare, turn_seconds):
    assert turn_seconds == 5
    runs.append((folder, start))
    if start == "alone":
      assert bare is None
      return ALONE
    assert bare()["images"]
    return whole([10.0], [1.0, 1.0])

  monkeypatch.setattr(loop, "whole_run", run)
  worker = fake.Worker({"devices": "1 x x"}, machine.run("bare", 64))
  monkeypatch.setattr(command_line, "workers", fake.workers({"bare": worker}))
  loop.main(["--rounds=2", "--num_steps=11", "--warmup_steps=0", f"--json={tmp_path / 'out.json'}"])
  assert worker.jobs[0]["data"] is True
  content = json.loads((tmp_path / "out.json").read_text())
  assert [block["setting"] for block in content["measurements"]] == ["cold", "warm", "alone"] * 2
  folders = [folder for folder, _ in runs]
  assert folders[0] == folders[1] == folders[2] != folders[3] == folders[4] == folders[5]
  assert not folders[0].exists()
  assert "every 1000, a grid every 1000" in capsys.readouterr().out
