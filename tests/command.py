"""The command as a person runs it, in processes of its own, and what it leaves in a workdir."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

from ddpm_jax.workdir.metrics import TIMES
from tests import quick

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 24
XLA_FLAGS = quick.FLAGS  # beside those that the program sets itself; tests/test_cli.py runs it without them
TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ", re.MULTILINE)  # with which lines of a log begin
# Eight channels, one level: compiles in seconds. The paper's two ways of losing track are on: dropout and flips.
FLAGS = [
  "--preset=none",  # also where the data are a folder
  *("--channels=8", "--channel_multipliers=1", "--attention_resolutions=", "--dropout=0.2", "--random_flip"),
  *(
    "--batch_size=16",
    "--lr_schedule=constant",
    "--warmup_steps=4",
    "--num_timesteps=50",
    "--beta_end=0.4",
    "--log_every=2",
  ),
  *("--checkpoint_every=6", "--sample_every=12", "--preview_images=4", "--preview_steps=2", "--keep_checkpoints=9"),
]


def start(folder, name, *flags, devices=2, module="ddpm_jax.main", **environment):
  """Starts the command on a number of simulated devices."""
  command = [sys.executable, "-m", module, f"--workdir={folder / name}"]
  if not any(flag.startswith("--mode") for flag in flags):
    command += FLAGS
  if not any(flag.startswith(("--num_steps", "--mode")) for flag in flags):
    command.append(f"--num_steps={STEPS}")
  command += flags
  xla_flags = f"--xla_force_host_platform_device_count={devices} {XLA_FLAGS}"
  variables = os.environ | {"XLA_FLAGS": xla_flags} | environment
  return subprocess.Popen(command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_job(folder, name, *flags, count=2, each=((), ()), **environment):
  """Starts the processes of a job, a device each, which find each other over loopback; `each` has flags of its own."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)} | environment
  return [start(folder, name, *flags, *each[i], devices=1, JAX_PROCESS_ID=str(i), **environment) for i in range(count)]


def finish(process, code=0, timeout=300):
  """Waits for the end. Returns what was printed, without the times: (stdout, stderr)."""
  out, err = (TIME.sub("", text) for text in process.communicate(timeout=timeout))
  assert process.returncode == code, f"exit code {process.returncode}\n{err}\n{out}"
  return out, err


def run(folder, name, *flags, code=0, **options):
  return finish(start(folder, name, *flags, **options), code)


def wait_for(condition, *processes, seconds=240):
  deadline = time.monotonic() + seconds
  while not condition():
    for process in processes:
      assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.01)


def wait_for_line(process, text):
  """Reads standard output until a line has this text in it. Returns what was read."""
  read = ""
  for line in process.stdout:
    read += line
    if text in line:
      return read
  raise AssertionError(f"{text!r} was never printed:\n{read}\n{process.communicate()[1]}")


def metrics(workdir):
  """The lines of metrics.jsonl without the times."""
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def checkpoints(workdir):
  """The numbers of the checkpoints, in order."""
  folder = workdir / "checkpoints"
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def digests(workdir, step=None):
  """Name -> SHA-256 of every leaf of a checkpoint, as its manifest says; restoring compares it with the arrays."""
  step = step or checkpoints(workdir)[-1]
  manifest = json.loads((workdir / "checkpoints" / str(step) / "manifest" / "metadata").read_text())
  return {name: leaf["sha256"] for name, leaf in manifest["leaves"].items()}


class Heard:
  """A started command whose words are read while it runs: `out` and `err` are what it has said, without the times."""

  def __init__(self, process):
    self.process = process
    self._lines = {"stdout": [], "stderr": []}
    self._readers = [threading.Thread(target=self._read, args=[name], daemon=True) for name in self._lines]
    for reader in self._readers:
      reader.start()

  def _read(self, name):
    for line in getattr(self.process, name):
      self._lines[name].append(line)

  @property
  def out(self):
    return TIME.sub("", "".join(self._lines["stdout"]))

  @property
  def err(self):
    return TIME.sub("", "".join(self._lines["stderr"]))

  def wait_until(self, condition, seconds=120):
    """Waits until a condition holds, while the process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
      alive = self.process.poll() is None and time.monotonic() < deadline
      assert alive or condition(), f"waited in vain; exit code {self.process.poll()}\n{self.err}\n{self.out}"
      time.sleep(0.002)

  def wait_for(self, text):
    """Waits until the process has said something."""
    self.wait_until(lambda: text in self.out or text in self.err)

  def finish(self, code=0, timeout=120):
    """Waits for the end. Returns what was said: (stdout, stderr)."""
    try:
      self.process.wait(timeout)
    except subprocess.TimeoutExpired:
      raise AssertionError(f"does not end within {timeout} s\n{self.err}\n{self.out}") from None
    for reader in self._readers:
      reader.join()
    assert self.process.returncode == code, f"exit code {self.process.returncode}\n{self.err}\n{self.out}"
    return self.out, self.err

  def end(self):
    """Kills the process if it still runs, and closes the pipes."""
    self.process.kill()
    self.process.wait()
    for reader, stream in zip(self._readers, (self.process.stdout, self.process.stderr), strict=True):
      reader.join()
      stream.close()
