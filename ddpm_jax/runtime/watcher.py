"""Ends a process that keeps Python's lock in compiled code for ever: there no thread of it can.

A program of its own, which `watchdog.py` starts: `python watcher.py PID SIGNAL FILE`. Standard library only.

On standard input it hears the watchdog's thread, at every tick a line of JSON: the seconds until the process counts as
stuck, the seconds since the last beat, and the rest of the line that says so. If it hears nothing for that time it
sends SIGNAL, on which the process writes the stacks of its threads to the same pipe, without Python's lock. It prints
the line and the stacks, writes them to FILE, and kills the process.

Only time in which the process could run counts: not while it is stopped, nor while both are frozen or the machine is.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time

_TICK_S = 0.5
_FROZEN_S = 1.0  # a tick that took so much longer was no time in which anything ran
_MARGIN_S = 3.0  # the watchdog's own thread, if it gets a turn, is first
_STACKS_S = 0.5  # after the last part of them
_REPORT_S = 1.5  # to report, as standard error and the file may be stuck too


def main(process: int, number: int, path: str) -> None:
  """Returns when the process ends, or has been killed."""
  for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # which may come to all processes of a terminal or a job
    signal.signal(getattr(signal, name), signal.SIG_IGN)
  left, silent, rest = float("inf"), 0.0, ""
  unheard, before = 0.0, time.monotonic()
  while True:
    data = _read(_TICK_S)
    now = time.monotonic()
    took, before = now - before, now
    if data == "":
      return
    ticks = [line for line in (data or "").splitlines() if line.startswith("[")]
    if ticks:  # and not stacks, for which somebody else has asked
      left, silent, rest = json.loads(ticks[-1])
      unheard = 0.0
    elif took < _TICK_S + _FROZEN_S and _is_running(process):
      unheard += took
    if unheard > left + _MARGIN_S:
      os.kill(process, number)
      stacks = ""
      while part := _read(_STACKS_S):
        stacks += part
      if "[" in (line[:1] for line in stacks.splitlines()):  # the watchdog has had its turn after all
        unheard = 0.0
        continue
      _report(f"error: no progress for {silent + unheard:.0f} s {rest}\n{stacks}", path)
      os.kill(process, signal.SIGKILL)
      return


def _read(seconds: float) -> str | None:
  """Returns what arrives on standard input within that time; None if nothing does, '' at the end."""
  if not select.select([0], [], [], seconds)[0]:
    return None
  return os.read(0, 2**16).decode(errors="replace")  # all of a pipe, so whole lines: each is written at once


def _is_running(process: int) -> bool:
  """Returns False if the process is stopped, by SIGSTOP or a debugger."""
  try:
    with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
      state = file.read().rpartition(")")[2].split()[0]
  except OSError:  # no Linux
    state = subprocess.run(["ps", "-o", "state=", "-p", str(process)], capture_output=True, text=True).stdout.strip()
  return state[:1] not in ("T", "t")


def _report(text: str, path: str) -> None:
  data = text.encode(errors="backslashreplace")

  def write(file: int | str) -> None:
    with contextlib.suppress(OSError), open(file, "wb", buffering=0) as stream:
      stream.write(data)

  writers = [threading.Thread(target=write, args=[file], daemon=True) for file in (path, 2) if file]
  for writer in writers:
    writer.start()
  for writer in writers:
    writer.join(_REPORT_S)


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
