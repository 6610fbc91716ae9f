"""Training with worker processes that read: signals that reach them too, one that is killed, and what comes of it."""

import os
import pathlib
import signal
import time

import pytest

from tests.command import digests, metrics
from tests.faults.test_signals import stop_and_save

pytestmark = pytest.mark.slow

WORKERS = ["--cache_gib=0", "--data_workers=2"]


def workers_of(heard):
  """The processes that Python has spawned for a command. Its own clean-up of shared memory is none of them."""
  children = pathlib.Path(f"/proc/{heard.process.pid}/task").glob("*/children")
  pids = [int(pid) for file in children for pid in file.read_text().split()]
  return [pid for pid in pids if b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_stopped_and_killed_workers_change_nothing(folder, whole, launch):
  """That a command ends is also that its workers do: `Heard` reads until nobody holds its output."""
  heard = launch("workers", *WORKERS)
  heard.wait_for("step 10/")
  workers = workers_of(heard)
  assert len(workers) == 2
  for pid in workers:
    os.kill(pid, signal.SIGINT)  # a Ctrl-C reaches them too
  time.sleep(0.2)
  assert workers_of(heard) == workers
  step = stop_and_save(heard, signal.SIGINT, folder / "workers")

  heard = launch("workers", *WORKERS)
  heard.wait_for(f"step {step + 10}/")
  os.kill(workers_of(heard)[0], signal.SIGKILL)
  _, err = heard.finish(1)
  assert err.startswith("error: data_workers: a process that reads images has died (") and err.count("\n") == 1

  heard = launch("workers", *WORKERS)
  heard.wait_for(f"step {step + 10}/")
  heard.process.kill()
  _, err = heard.finish(-signal.SIGKILL)
  assert err == ""

  _, err = launch("workers", *WORKERS).finish()
  assert err == ""
  assert metrics(folder / "workers") == metrics(whole)
  assert digests(folder / "workers") == digests(whole)
