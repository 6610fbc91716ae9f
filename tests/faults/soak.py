"""What a long run takes of the machine: memory, threads and open files of the real command, read from /proc."""

import os
import pathlib
import time
from typing import NamedTuple

from tests import command


class Usage(NamedTuple):
  step: int
  megabytes: float  # resident
  threads: int
  files: int


def look(pid: int, step: int) -> Usage | None:
  """None for a process that has just ended."""
  try:
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    files = len(os.listdir(f"/proc/{pid}/fd"))
  except OSError:
    return None
  status = dict(line.split(":", 1) for line in lines if ":" in line)
  return Usage(step, int(status.get("VmRSS", "0").split()[0]) / 1024, int(status["Threads"]), files)


def soak(folder: pathlib.Path, num_steps: int) -> list[Usage]:
  """Trains `num_steps` training steps with many checkpoints, metrics and grids, and looks five times a second."""
  flags = [f"--num_steps={num_steps}", "--checkpoint_every=50", "--log_every=5", "--sample_every=100"]
  process = command.start(folder, "soak", *flags, "--keep_checkpoints=2", devices=1)
  lines, seen = folder / "soak" / "metrics.jsonl", []
  while process.poll() is None:
    text = lines.read_text() if lines.exists() else ""
    usage = look(process.pid, text.count("\n") * 5)
    if text and usage and usage.files:
      seen.append(usage)
    time.sleep(0.2)
  command.finish(process)
  assert command.checkpoints(folder / "soak") == [num_steps - 50, num_steps]
  return seen


def growth(seen: list[Usage]) -> Usage:
  """How much more was taken at most in the last third of the run than in the second; the first warms up."""
  last = seen[-1].step
  second, third = (
    [u for u in seen if low * last <= u.step <= high * last] for low, high in ((1 / 3, 2 / 3), (2 / 3, 1))
  )
  assert len(second) >= 5 and len(third) >= 5, "too few looks to judge"
  return Usage(last, *(max(u[i] for u in third) - max(u[i] for u in second) for i in (1, 2, 3)))
