"""A run whose output cannot be written, in several ways at once."""

import os
import signal
import subprocess
import sys

import pytest

from tests.command import FLAGS, ROOT, checkpoints, metrics, wait_for

pytestmark = pytest.mark.slow


def test_stopped_when_the_reader_goes_it_saves_all_the_same(folder):
  """As `... | tee log` and Ctrl-C; with warnings to a full disk, and a workdir that the output cannot spell."""
  workdir = folder / "gone é"
  command = [sys.executable, "-m", "ddpm_jax.main", f"--workdir={workdir}", *FLAGS]
  command += ["--num_steps=1000000", "--checkpoint_every=1000000", "--sample_every=0", "--log_every=1"]
  with open("/dev/full", "w") as full, open(os.devnull) as null:
    process = subprocess.Popen(
      command,
      cwd=ROOT,
      env=os.environ | {"PYTHONIOENCODING": "ascii", "XLA_FLAGS": ""},
      stdin=null,
      stdout=subprocess.PIPE,
      stderr=full,
    )
  assert process.stdout
  read = b""
  while b"step 3/" not in read:
    read += (line := process.stdout.readline())
    assert line, "ended early"
  assert b"gone \\xe9" in read
  process.stdout.close()
  at_least = len(metrics(workdir)) + 5
  wait_for(lambda: len(metrics(workdir)) > at_least or process.poll() is not None)
  process.send_signal(signal.SIGINT)
  assert process.wait(60) == 0
  assert len(checkpoints(workdir)) == 1
