"""Two processes of the real command: what happens to one is known to the other, and nothing is lost."""

import json
import shutil
import signal
import subprocess

import numpy as np
import pytest

from tests import command
from tests.faults import pair

pytestmark = pytest.mark.slow

SHORT = ["--num_steps=90", "--sample_every=0", "--checkpoint_every=30", "--heartbeat_timeout=100", *pair.CONDITIONAL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Where the digits are prepared once, with an uninterrupted pair's run of 90 updates."""
  folder = tmp_path_factory.mktemp("pairs")
  for process in command.start_job(folder, "whole", *SHORT):
    command.finish(process)
  return folder


@pytest.fixture
def empty(folder):
  """The folder without a pair's run in it."""
  shutil.rmtree(folder / "pair", ignore_errors=True)
  return folder


def goes_on_as_if_nothing_had_been(folder):
  """Back to a checkpoint before step 90, as the stopped run may be past it; then on to 90, as a pair."""
  workdir = folder / "pair"
  for step in command.checkpoints(workdir):
    if step >= 90:
      shutil.rmtree(workdir / "checkpoints" / str(step))
  for process in command.start_job(folder, "pair", *SHORT):
    command.finish(process)
  assert command.digests(workdir) == command.digests(folder / "whole")
  assert command.metrics(workdir) == command.metrics(folder / "whole")


def test_a_worker_that_is_stopped_and_one_that_is_killed(empty):
  """A stop stops both at one training step; who is killed is named, and the other ends; and nothing is lost."""
  assert pair.stopped(empty, 1, signal.SIGTERM) < 10
  pair.lost(empty, 1)
  goes_on_as_if_nothing_had_been(empty)


def test_damage_that_one_process_alone_would_meet_is_known_to_both(empty):
  """With fsdp each reads what it needs: in a collective, the other would wait for it for ever."""
  flags = [*SHORT, "--parallel=fsdp", "--channels=64"]
  for num_steps in (60, 90):
    for process in command.start_job(empty, "pair", *flags, f"--num_steps={num_steps}"):
      command.finish(process)
    if num_steps == 60:
      newest = empty / "pair" / "checkpoints" / "60" / "state" / "ocdbt.process_1"
      damaged = [path for path in newest.rglob("d/*") if path.stat().st_size > 1000]
      assert damaged
      for path in damaged:
        path.write_bytes(path.read_bytes()[:100])
  assert (empty / "pair" / "damaged" / "60").exists()
  assert command.checkpoints(empty / "pair")[-1] == 90


def test_a_killed_coordinator_is_named_and_the_other_ends(empty):
  pair.lost(empty, 0)


def test_a_stuck_process_says_where_and_all_end(empty):
  pair.stuck(empty)


def test_a_second_signal_ends_a_process_that_waits_for_a_stuck_one(empty):
  """Nothing but its own signals can reach it: it is inside a collective."""
  processes = pair.start(empty, "--log_every=1", "--heartbeat_timeout=5", module="tests.faults.hanging")
  lines = empty / "pair" / "metrics.jsonl"
  command.wait_for(lambda: lines.exists() and lines.read_text().count("\n") >= 8, *processes)
  processes[0].send_signal(signal.SIGTERM)
  with pytest.raises(subprocess.TimeoutExpired):
    processes[0].wait(timeout=2)
  processes[0].send_signal(signal.SIGTERM)
  assert processes[0].wait(timeout=5) == 128 + signal.SIGTERM
  assert processes[1].wait(timeout=15) == 1
  for process in processes:
    process.communicate()


def test_hosts_with_other_flags_are_refused(folder):
  processes = command.start_job(folder, "other", each=[["--dropout=0.2"], ["--dropout=0.3"]])
  for process in processes:
    _, err = command.finish(process, code=2)
    assert "error: distributed: the flags of process" in err and err.count("\n") == 1, err
  assert not (folder / "other").exists()


def test_both_stages_of_two_processes_are_those_of_one(tmp_path):
  """An autoencoder with its discriminator, then a model of its latents by class, whose images two processes encode
  before they begin, and after a stop in each step; they find no statistics of latents that one process has measured."""
  stage = [
    *("--stage=autoencoder", "--loss=l1", "--channel_multipliers=1,2", "--num_res_blocks=1", "--latent_channels=2"),
    *("--discriminator_weight=0.5", "--discriminator_layers=1", "--discriminator_start=4", "--num_steps=8"),
  ]
  latent = [f"--first_stage={tmp_path / 'stage'}", "--conditioning=class", "--label_dropout=0.2", "--num_steps=8"]
  home = {"XDG_CACHE_HOME": str(tmp_path / "home_of_two")}
  for name, flags, parts in (
    ("stage", stage, [["--parallel=fsdp"]]),
    ("latent", latent, [["--num_steps=4"], ["--parallel=fsdp", "--cache_gib=0"]]),
  ):
    command.finish(command.start(tmp_path, name, *flags))
    for part in parts:
      for process in command.start_job(tmp_path, f"two_{name}", *flags, *part, **home):
        command.finish(process)
    one, two = (command.metrics(tmp_path / of) for of in (name, f"two_{name}"))
    assert [row["step"] for row in two] == [row["step"] for row in one] == [2, 4, 6, 8]
    for found, wanted in zip(two, one, strict=True):
      told = [key for key in wanted if key.startswith(("loss", "grad_norm", "combined", "mean"))]
      np.testing.assert_allclose([found[key] for key in told], [wanted[key] for key in told], rtol=1e-3, err_msg=told)
  assert command.metrics(tmp_path / "stage")[-1]["combined/adversarial_weight"] > 0
  kept = [json.loads((tmp_path / name / "first_stage/settings.json").read_text()) for name in ("latent", "two_latent")]
  for key in ("mean", "std"):
    np.testing.assert_allclose(*(settings[key] for settings in kept), rtol=1e-5)
