"""The first signal, the second, and where the main thread is at the time: in processes of their own, without JAX."""

import signal
import subprocess
import sys
import time

import pytest

PRELUDE = """
import hashlib, os, signal, sys, time
from ddpm_jax.runtime.stop import StopRequest
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which is ignored where the tests run under nohup
def compute():
  # In C for half a minute, without Python's lock, like a compilation: no handler runs.
  hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
def ready():
  print("ready", flush=True)
"""
SAVES = """
with StopRequest(exit_code=0) as stop:
  stop.defer()
  ready()
  while not stop.requested:
    time.sleep(0.01)
  print("saved", stop.requested, flush=True)
  BODY
"""
NOTHING = """
with StopRequest(EXIT) as stop:
  ready()
  BODY
"""


def send(script, *numbers, before=0.0, apart=0.3):
  """Runs a script, sends signals once it is ready. Returns exit code, stdout, stderr, seconds since the first one."""
  command = [sys.executable, "-c", PRELUDE + script]
  process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert process.stdout.readline() == "ready\n"
  time.sleep(before)
  began = time.monotonic()
  for number in numbers:
    process.send_signal(number)
    time.sleep(apart)
  out, err = process.communicate(timeout=30)
  return process.returncode, out, err, time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks(number):
  code, out, err, _ = send(SAVES.replace("BODY", "pass"), number)
  assert (code, out) == (0, f"saved {int(number)}\n")
  assert (
    f"{number.name}: saving after the training steps under way, then stopping; a second SIGTERM or Ctrl-C ends at once"
    in err
  )


def test_a_closed_terminal_is_ignored_where_it_is_ignored():
  """Under nohup."""
  script = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SAVES.replace("BODY", "pass")
  code, out, err, _ = send(script, signal.SIGHUP, signal.SIGTERM)
  assert (code, out) == (0, f"saved {int(signal.SIGTERM)}\n")
  assert "SIGHUP" not in err


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_ends_at_once_wherever_the_main_thread_is(second):
  code, _, err, seconds = send(SAVES.replace("BODY", "compute()"), signal.SIGTERM, second)
  assert code == 128 + second
  assert err.endswith(f"{second.name}: ended at once; what came after the newest checkpoint is lost\n")
  assert seconds < 15


@pytest.mark.parametrize(
  "numbers",
  [
    (signal.SIGHUP, signal.SIGHUP),  # a terminal that closes may send two
    (signal.SIGINT, signal.SIGHUP),
    (signal.SIGTERM, signal.SIGHUP),  # systemd with SendSIGHUP
    (signal.SIGHUP, signal.SIGTERM),
  ],
  ids=str,
)
def test_a_closed_terminal_never_ends_at_once(numbers):
  code, out, _, _ = send(SAVES.replace("BODY", "time.sleep(1)"), *numbers)
  assert (code, out) == (0, f"saved {int(numbers[0])}\n")


@pytest.mark.parametrize(("exit_code", "expected"), [("0", 0), ("None", 128 + signal.SIGTERM)])
@pytest.mark.parametrize("body", ["time.sleep(20)", "compute()"])
def test_with_nothing_to_save_the_first_ends_at_once_wherever_the_main_thread_is(body, exit_code, expected):
  code, out, err, seconds = send(NOTHING.replace("EXIT", exit_code).replace("BODY", body), signal.SIGTERM)
  assert (code, out, err) == (expected, "", "SIGTERM: stopped; there was nothing to save\n")
  assert seconds < 15


@pytest.mark.parametrize("wait", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_a_stop_inside_an_import_is_no_crash(wait):
  """An exception of ours inside the initialisation of a C extension was a segmentation fault once."""
  code, _, err, _ = send(
    NOTHING.replace("EXIT", "0").replace("BODY", "import numpy, jax; time.sleep(20)"),
    signal.SIGTERM,
    before=wait,
  )
  assert (code, err) == (0, "SIGTERM: stopped; there was nothing to save\n")


def test_a_library_that_takes_the_signals_is_taken_them_back():
  script = """
with StopRequest(0) as stop:
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  stop.reinstall()
  ready()
  time.sleep(20)
"""
  assert send(script, signal.SIGTERM)[0] == 0


def test_afterwards_the_signals_are_as_before():
  script = """
before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
with StopRequest() as stop:
  stop.defer()
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(0.2)
assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
assert signal.set_wakeup_fd(-1) == -1
ready()
time.sleep(20)
"""
  assert send(script, signal.SIGTERM)[0] == -signal.SIGTERM


AT_REST = """
with StopRequest(exit_code=EXIT) as stop:
  stop.defer()
  with stop.at_rest():
    INSIDE
  AFTER
"""
DEFERRED = """
  ready()
  while not stop.requested:
    time.sleep(0.01)
  print("saved", stop.requested, flush=True)
"""


@pytest.mark.parametrize(("exit_code", "expected"), [("0", 0), ("None", 128 + signal.SIGINT)])
@pytest.mark.parametrize("body", ["time.sleep(20)", "compute()"])
def test_at_rest_the_first_ends_at_once_as_everything_is_saved(body, exit_code, expected):
  script = AT_REST.replace("EXIT", exit_code).replace("INSIDE", f"ready(); {body}").replace("AFTER", "")
  code, out, err, seconds = send(script, signal.SIGINT)
  assert (code, out, err) == (expected, "", "SIGINT: stopped; everything was saved before\n")
  assert seconds < 15


@pytest.mark.parametrize("inside", ["pass", "try:\n      with stop.at_rest(): raise OSError\n    except OSError: pass"])
def test_after_the_rest_the_first_only_asks_again(inside):
  script = AT_REST.replace("EXIT", "0").replace("INSIDE", inside).replace("AFTER", DEFERRED)
  code, out, err, _ = send(script, signal.SIGTERM)
  assert (code, out) == (0, f"saved {int(signal.SIGTERM)}\n")
  assert "SIGTERM: saving after the training steps under way" in err


def test_a_rest_before_anything_was_saved_leaves_nothing_to_save():
  script = """
with StopRequest(exit_code=0) as stop:
  with stop.at_rest():
    pass
  ready()
  time.sleep(20)
"""
  assert send(script, signal.SIGTERM)[:3] == (0, "", "SIGTERM: stopped; there was nothing to save\n")


def test_a_second_signal_at_rest_ends_at_once_with_its_number():
  """The first came before, was taken for a request to save, and nobody has looked yet."""
  script = """
with StopRequest(exit_code=0) as stop:
  stop.defer()
  os.kill(os.getpid(), signal.SIGTERM)
  while not stop.requested:
    time.sleep(0.01)
  with stop.at_rest():
    ready()
    time.sleep(20)
"""
  assert send(script, signal.SIGINT)[0] == 128 + signal.SIGINT
