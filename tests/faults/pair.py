"""Two processes of the real command over gloo, one of which is told to stop, killed, or stuck; until all have ended.

Each returns the seconds that took. Used by the tests and by the storm.
"""

import pathlib
import signal
import socket
import time

from tests import command

HEARTBEAT, STEP_TIMEOUT = 5, 6
CONDITIONAL = ("--conditioning=class", "--label_dropout=0.2")  # labels, and what drops them, are the pair's too
PROMPT = (
  30  # seconds allowed beside them on a machine that does other things too; a fault here is an end that never comes
)


def start(folder: pathlib.Path, *flags: str, **options):
  """A pair that would take far longer than anything done to it, unless told otherwise."""
  return command.start_job(
    folder, "pair", "--num_steps=5000", "--sample_every=0", "--checkpoint_every=30", *CONDITIONAL, *flags, **options
  )


def start_and_save(folder: pathlib.Path, *flags: str):
  """A pair that has saved something."""
  before = command.checkpoints(folder / "pair")
  processes = start(folder, *flags)
  command.wait_for(lambda: command.checkpoints(folder / "pair")[-1:] > before[-1:], *processes)
  return processes


def ends(processes, seconds: float, codes) -> list[tuple[str, str]]:
  """Waits until all have ended with one of these exit codes, PROMPT later at most. Returns what each printed."""
  began, printed = time.monotonic(), []
  for process in processes:
    printed.append(process.communicate(timeout=max(1, began + seconds + PROMPT - time.monotonic())))
  codes_found = [process.returncode for process in processes]
  assert all(code in codes for code in codes_found), (codes_found, printed)
  return printed


def stopped(folder: pathlib.Path, index: int, number: int = signal.SIGTERM) -> float:
  """A signal to one process: all save the same training step and exit with 0."""
  processes = start_and_save(folder)
  began = time.monotonic()
  processes[index].send_signal(number)
  (out, err), _ = ends(processes, 0, [0])
  seconds = time.monotonic() - began
  assert "stopped on request after step" in out and "Traceback" not in err, (out, err)
  newest = command.checkpoints(folder / "pair")[-1]
  assert f"after step {newest} of 5000" in out, (out, newest)
  assert newest - 2 < command.metrics(folder / "pair")[-1]["step"] <= newest
  return seconds


def lost(folder: pathlib.Path, index: int) -> float:
  """SIGKILL to one process: the other ends, and names it."""
  processes = start_and_save(folder, f"--heartbeat_timeout={HEARTBEAT}")
  began = time.monotonic()
  processes[index].kill()
  ((_, err),) = ends([processes[1 - index]], HEARTBEAT, [1])
  seconds = time.monotonic() - began
  processes[index].communicate()
  name = f"error: process {index} of 2 is lost (host {socket.gethostname()}, pid {processes[index].pid})"
  assert name in err, err
  return seconds


def stuck(folder: pathlib.Path) -> float:
  """A process that is alive but never goes on: the watchdog says where it is, and all end."""
  processes = start(folder, f"--step_timeout={STEP_TIMEOUT}", "--log_every=1", module="tests.faults.hanging")
  lines = folder / "pair" / "metrics.jsonl"
  command.wait_for(lambda: lines.exists() and lines.read_text().count("\n") >= 8, *processes)
  began = time.monotonic()
  _, (_, err) = ends(processes, STEP_TIMEOUT, [1])
  seconds = time.monotonic() - began
  assert f"error: no progress for {STEP_TIMEOUT} s after step" in err and "hanging_batches" in err, err
  assert "hanging_batches" in (folder / "pair" / "stuck.1.txt").read_text()
  return seconds
