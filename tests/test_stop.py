"""The first signal, the second, and where the main thread is at the time: in processes of their own, without JAX."""

import signal
import subprocess
import sys
import time

import pytest

PRELUDE = """
import hashlib, os, signal, sys, time
from ddpm_jax.stop import Stopped, StopRequest
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
  try:
    ready()
    BODY
  except Stopped as stopped:
    print("unwound", flush=True)
    sys.exit(stop.exit_code(stopped.number))
"""


def send(script, *numbers, apart=0.3):
  """Runs a script, sends signals once it is ready. Returns exit code, stdout, stderr, seconds since the first one."""
  command = [sys.executable, "-c", PRELUDE + script]
  process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert process.stdout.readline() == "ready\n"
  began = time.monotonic()
  for number in numbers:
    process.send_signal(number)
    time.sleep(apart)
  out, err = process.communicate(timeout=30)
  return process.returncode, out, err, time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks(number):
  code, out, err, _ = send(SAVES.replace("BODY", "pass"), number)
  assert (code, out) == (0, f"saved {int(number)}\n")
  assert f"{number.name}: saving, then stopping; a second signal ends at once" in err


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_ends_at_once_wherever_the_main_thread_is(second):
  code, _, _, seconds = send(SAVES.replace("BODY", "compute()"), signal.SIGTERM, second)
  assert code == 128 + second
  assert seconds < 5


@pytest.mark.parametrize(("exit_code", "expected"), [("0", 0), ("None", 128 + signal.SIGTERM)])
def test_with_nothing_to_save_the_main_thread_unwinds(exit_code, expected):
  code, out, err, seconds = send(NOTHING.replace("EXIT", exit_code).replace("BODY", "time.sleep(20)"), signal.SIGTERM)
  assert (code, out) == (expected, "unwound\n")
  assert "SIGTERM: stopping; there is nothing to save" in err
  assert seconds < 5


def test_with_nothing_to_save_a_compilation_is_not_waited_for():
  code, out, _, seconds = send(NOTHING.replace("EXIT", "0").replace("BODY", "compute()"), signal.SIGTERM)
  assert (code, out) == (0, "")
  assert seconds < 5


def test_a_library_that_takes_the_signals_is_taken_them_back():
  body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); stop.again(); time.sleep(20)"
  code, out, _, _ = send(
    NOTHING.replace("EXIT", "0").replace("ready()", body.replace("; time", "; ready(); time")).replace("BODY", "pass"),
    signal.SIGTERM,
  )
  assert (code, out) == (0, "unwound\n")


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
