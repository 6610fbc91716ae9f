"""Real processes that hang, with timeouts of a second."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import timeit

import pytest

from ddpm_jax.runtime.watchdog import Watchdog

ROOT = pathlib.Path(__file__).parents[2]
START = """
import ctypes, faulthandler, os, pathlib, sys, time
from ddpm_jax.runtime.watchdog import Watchdog

def stuck_here():
  {stuck}

with Watchdog({timeout}, process=3, folder=pathlib.Path(sys.argv[1]), first_s={first_s}) as watchdog:
  {before}
  stuck_here()
{after}
"""


def run(folder, stuck="time.sleep(60)", before='watchdog.beat("step 7")', after="", timeout=1.0, first_s=60, **options):
  """Runs it in the middle of a script. Returns the process, which has ended, and how long it took."""
  code = START.format(stuck=stuck, before=before, after=after, timeout=timeout, first_s=first_s)
  options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
  start = time.monotonic()
  process = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, text=True, timeout=40, **options)
  return process, time.monotonic() - start


def check_line(text):
  line, stacks = text.split("\n", 1)
  assert line.startswith("error: no progress for 1 s after step 7 on process 3 (host ")
  assert "stuck" in line and line.endswith("raise --step_timeout if this is normal")
  assert "in stuck_here" in stacks


@pytest.mark.parametrize(
  "stuck",
  [
    "time.sleep(60)",
    "while True: pass",
    "ctypes.CDLL(None).sleep(60)",  # in C, without Python's lock, as in a collective
  ],
)
def test_stuck(tmp_path, stuck):
  process, seconds = run(tmp_path, stuck)
  assert process.returncode == 1
  assert 1 < seconds < 30
  check_line(process.stderr)
  check_line((tmp_path / "stuck.3.txt").read_text())


# In C with Python's lock, for ever, and without end for a signal.
KEEPS_THE_LOCK = "ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)"


def test_stuck_with_the_lock_of_python(tmp_path):
  process, seconds = run(tmp_path, KEEPS_THE_LOCK, before='watchdog.beat("step 7"); time.sleep(1)', timeout=2)
  assert process.returncode == -signal.SIGKILL
  assert 2 < seconds < 30
  for text in (process.stderr, (tmp_path / "stuck.3.txt").read_text()):
    line, stacks = text.split("\n", 1)
    assert re.match(r"error: no progress for \d s after step 7 on process 3 \(host .*stuck in compiled", line)
    assert "in stuck_here" in stacks


def test_stacks_that_somebody_else_asks_for_are_no_ticks():
  """SIGURG from outside: faulthandler writes into the pipe of the second process, which goes on."""
  watcher = ROOT / "ddpm_jax" / "runtime" / "watcher.py"
  command = [sys.executable, "-I", "-S", str(watcher), str(os.getpid()), "0", ""]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    for text in (b'[60.0, 0.0, "x"]\n', b"Thread 0x1 (most recent call first):\n", b'[60.0, 0.0, "x"]\n'):
      process.stdin.write(text)
      process.stdin.flush()
      time.sleep(0.3)
    _, err = process.communicate()
  assert (process.returncode, err) == (0, b"")


def test_time_in_which_the_process_is_stopped_does_not_count(tmp_path):
  """Stopped for longer than any limit, it goes on; stuck afterwards, it ends."""
  then = f'watchdog.beat("step 8"); time.sleep(1); {KEEPS_THE_LOCK}'
  code = START.format(
    stuck='while os.read(0, 1) != b"x": pass',
    before='watchdog.beat("step 7"); time.sleep(1); print("ready", flush=True)',
    after=f"with Watchdog(2, folder=pathlib.Path(sys.argv[1])) as watchdog: {then}",
    timeout=3,
    first_s=60,
  )
  pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
  with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, text=True, **pipes) as process:
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)  # more than the limit and what the second process waits
    process.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert process.poll() is None and list(tmp_path.iterdir()) == []
    killed = threading.Timer(30, process.kill)
    killed.start()
    _, err = process.communicate("x")
    killed.cancel()
  assert process.returncode == -signal.SIGKILL and "after step 8" in err


def test_before_the_first_beat_the_limit_is_longer(tmp_path):
  process, _ = run(tmp_path, "time.sleep(2.5)", before="")
  assert (process.returncode, process.stderr) == (0, "")
  process, _ = run(tmp_path, before="", timeout=0.5, first_s=1)
  assert process.returncode == 1
  assert "no progress for 1 s after the start" in process.stderr


def test_a_limit_above_the_first_one_counts_from_the_start():
  assert Watchdog(5000)._first == 5000
  assert Watchdog(5)._first == 3600


def test_a_loop_that_goes_on_is_left_alone(tmp_path):
  process, seconds = run(tmp_path, 'for i in range(20): time.sleep(0.1); watchdog.beat(f"step {i}")')
  assert (process.returncode, process.stderr) == (0, "")
  assert seconds > 2
  assert list(tmp_path.iterdir()) == []


def test_off(tmp_path):
  process, _ = run(tmp_path, "time.sleep(2)", timeout=0)
  assert (process.returncode, process.stderr) == (0, "")


def test_outside_it_is_disarmed(tmp_path):
  process, _ = run(tmp_path, "time.sleep(0.3)", after="time.sleep(4.5)")  # after a first tick
  assert (process.returncode, process.stderr) == (0, "")


def test_an_error_inside_passes_through(tmp_path):
  process, seconds = run(tmp_path, 'raise ValueError("of the loop")')
  assert process.returncode == 1
  assert seconds < 30
  assert "ValueError: of the loop" in process.stderr and "stuck and ends" not in process.stderr


def test_standard_error_is_closed(tmp_path):
  process, seconds = run(tmp_path, before='os.close(2); watchdog.beat("step 7")')
  assert process.returncode == 1
  assert seconds < 30
  check_line((tmp_path / "stuck.3.txt").read_text())


def test_standard_error_is_full(tmp_path):
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  with contextlib.suppress(BlockingIOError):
    while True:
      os.write(writer, b"x" * 4096)
  os.set_blocking(writer, True)
  process, seconds = run(tmp_path, stderr=writer)
  assert process.returncode == 1
  assert 1 < seconds < 30
  check_line((tmp_path / "stuck.3.txt").read_text())
  os.close(reader)
  os.close(writer)


def test_the_folder_is_gone(tmp_path):
  process, _ = run(tmp_path / "nowhere")
  assert process.returncode == 1
  check_line(process.stderr)


def test_a_beat_costs_nothing():
  with Watchdog(60) as watchdog:
    seconds = min(timeit.repeat(lambda: watchdog.beat("step 12"), number=10000, repeat=5)) / 10000
  assert seconds < 2e-5
