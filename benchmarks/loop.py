"""The whole program beside the bare training step: what logging, checkpoints and sample grids cost.

  python -m benchmarks.loop --data_dir=DIR
  python -m benchmarks.loop --flagfile=experiments/fashion_mnist.flags --num_steps=500 --rounds=2

In each round the program runs twice in new folders, with blocks of the bare step before, between and after. The first
of the two starts with an empty compilation cache, the second with what the first left there. A run is timed from its
first update to its last checkpoint and sample grid; what comes before is the start. It is compared with its neighbours.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import command, report
from benchmarks.alternate import Block, Spread, block_size, spread
from benchmarks.worker import ROOT, last_words
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import RunError

_COMPILED = "compiled and made update"
_STARTS = ("cold", "warm")


def make_parser() -> command.Parser:
  """The options."""
  parser = command.Parser("loop", "Measures whole runs of ddpm_jax.main beside the bare training step.")
  parser.set_defaults(rounds=2, block_seconds=20)
  return parser


def main(argv: Sequence[str]) -> None:
  """Measures and prints."""
  options, (setting,) = command.parse(make_parser(), argv)
  config, blocks = setting.config, []
  shape = command.image_shape(config, options.image_shape)
  with command.workers({"bare": ("step_work", {})}) as workers:
    command.say(f"compiling the bare step: {setting}")
    facts = workers["bare"].prepare(setting.job(shape, data=True))

    def bare(count: int) -> dict[str, Any]:
      return workers["bare"].block("", count)

    count = block_size(bare, options.block_seconds)
    for number in range(options.rounds):
      command.say(f"round {number + 1} of {options.rounds}: {count} bare updates, 2 x {config.train.num_steps} whole")
      with tempfile.TemporaryDirectory(prefix="ddpm_jax_benchmark_") as folder:
        for start in _STARTS:
          blocks.append(Block(number, "bare", count, bare(count)))
          blocks.append(Block(number, start, config.train.num_steps, whole_run(config, pathlib.Path(folder), start)))
      blocks.append(Block(number, "bare", count, bare(count)))
  results = summary(config, blocks)
  print(report.heading(str(setting)))
  print(
    f"   {config.train.num_steps} updates of {config.data.batch_size} images, {facts['devices']}; "
    f"a checkpoint every {config.train.checkpoint_every}, a grid every {config.train.sample_every}\n"
  )
  print(text(results))
  print(report.machine())
  about = {"whole and bare": {"flags": setting.flags, "image_shape": shape}}
  report.write_json(options.json, report.document("loop", about, {"bare": facts}, blocks, results))


def whole_run(config: Config, folder: pathlib.Path, start: str) -> dict[str, Any]:
  """Runs `python -m ddpm_jax.main` in a new workdir in `folder`, where the compilation cache is too.

  Returns:
    Seconds: from the start of the process to the end of its first update (`to_first_update`); from there to the last
    checkpoint and grid (`seconds`), of which `in_updates` passed outside of checkpoints and grids; to the end of the
    process (`after`). `images` are those of the updates after the first, `cpu_seconds` the time of all cores for them.

  Raises:
    RunError: if the run fails.
  """
  workdir, flagfile = folder / start, folder / "flags.txt"
  flagfile.write_text(config_lib.to_flagfile(config), encoding="utf-8")
  variables = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "JAX_ENABLE_COMPILATION_CACHE": "true",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  words = [sys.executable, "-m", "ddpm_jax.main", f"--flagfile={flagfile}", f"--workdir={workdir}"]
  words.append(f"--compilation_cache={folder / 'cache'}")
  began, first = time.time(), 0.0
  with (
    (folder / "errors.txt").open("w") as errors,
    subprocess.Popen(words, env=variables, text=True, stdout=subprocess.PIPE, stderr=errors) as process,
    _CpuTime(process.pid) as cpu,
  ):
    assert process.stdout
    for line in process.stdout:
      if line.startswith(_COMPILED):
        first = time.time()
  ended = time.time()
  if process.returncode or not first:
    why = last_words((folder / "errors.txt").read_text(errors="replace"))
    raise RunError(f"the run ended with exit code {process.returncode}: {why}")
  last = last_written(workdir, config.train.num_steps)
  return {
    "to_first_update": first - began,
    "seconds": last - first,
    "cpu_seconds": cpu.until(last) - cpu.until(first),
    "in_updates": seconds_in_updates(workdir / "metrics.jsonl"),
    "after": ended - last,
    "images": (config.train.num_steps - 1) * config.data.batch_size,
  }


class _CpuTime:
  """Reads every 0.05 seconds how much time of all cores a process has had, as Linux tells it."""

  def __init__(self, pid: int):
    self._file = pathlib.Path(f"/proc/{pid}/stat")
    self._readings = [(0.0, 0.0)]
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._read)

  def _read(self) -> None:
    while not self._ended.wait(0.05):
      try:
        fields = self._file.read_text().rpartition(")")[2].split()  # what stands before may hold blanks
      except OSError:
        return  # the process is gone, or this is no Linux
      self._readings.append((time.time(), sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")))

  def __enter__(self) -> _CpuTime:
    self._thread.start()
    return self

  def __exit__(self, *error: object) -> None:
    self._ended.set()
    self._thread.join()

  def until(self, moment: float) -> float:
    """Seconds that it had had at that time since the epoch."""
    return max(seconds for when, seconds in self._readings if when <= moment)


def last_written(workdir: pathlib.Path, step: int) -> float:
  """When the checkpoint and the sample grid of the last update were complete, in seconds since the epoch."""
  checkpoint = workdir / "checkpoints" / str(step)
  paths = [checkpoint, *checkpoint.rglob("*"), workdir / "samples" / f"step_{step:08d}.png"]
  return max(max(path.stat().st_mtime, path.stat().st_ctime) for path in paths if path.exists())


def seconds_in_updates(metrics: pathlib.Path) -> float:
  """What the speeds in the file add up to. The first line has no speed if it is about update 1 alone."""
  rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
  before = [1, *(row["step"] for row in rows)]
  return sum(
    (row["step"] - last) / row["steps_per_second"]
    for last, row in zip(before, rows, strict=False)
    if row.get("steps_per_second")
  )


def summary(config: Config, blocks: Sequence[Block]) -> dict[str, Any]:
  """Overheads in percent of the bare step: each whole run against the two bare blocks around it."""
  size, results = config.data.batch_size, {}

  def of_an_update(block: Block, what: str) -> float:
    return block.measured[what] * size / block.measured["images"]

  bare = [block for block in blocks if block.setting == "bare"]
  results["bare_seconds"] = spread([of_an_update(block, "seconds") for block in bare])
  results["bare_cpu_seconds"] = spread([of_an_update(block, "cpu_seconds") for block in bare])
  for start in _STARTS:
    places = [i for i, block in enumerate(blocks) if block.setting == start]
    runs = [blocks[i] for i in places]

    def more(what: str, of_bare: str, places: list[int] = places) -> Spread:
      """How much more of it an update takes than the mean of the bare blocks before and after, in percent."""
      beside = [(of_an_update(blocks[i - 1], of_bare) + of_an_update(blocks[i + 1], of_bare)) / 2 for i in places]
      return spread([100 * (of_an_update(blocks[i], what) / one - 1) for i, one in zip(places, beside, strict=True)])

    results[start] = {
      "whole_seconds": spread([of_an_update(run, "seconds") for run in runs]),
      "overhead_percent": more("seconds", "seconds"),
      "in_updates_percent": more("in_updates", "seconds"),
      "whole_cpu_seconds": spread([of_an_update(run, "cpu_seconds") for run in runs]),
      "cpu_overhead_percent": more("cpu_seconds", "cpu_seconds"),
      "to_first_update_seconds": spread([run.measured["to_first_update"] for run in runs]),
      "after_seconds": spread([run.measured["after"] for run in runs]),
    }
  return results


def text(results: dict[str, Any]) -> str:
  """The table."""
  cold, warm, bare, bare_cpu = (results[name] for name in ("cold", "warm", "bare_seconds", "bare_cpu_seconds"))

  def row(label: str, name: str, scale: float = 1) -> list[str]:
    return [label, report.with_spread(cold[name], scale), report.with_spread(warm[name], scale)]

  rows = [
    ["an update of the bare step, ms", *2 * [report.with_spread(bare, 1e3)]],
    row("an update of the whole run, ms", "whole_seconds", 1e3),
    row("overhead, %", "overhead_percent"),
    row("  of it within updates, %", "in_updates_percent"),
    ["CPU time of an update of the bare step, ms", *2 * [report.with_spread(bare_cpu, 1e3)]],
    row("CPU time of an update of the whole run, ms", "whole_cpu_seconds", 1e3),
    row("overhead in CPU time, %", "cpu_overhead_percent"),
    row("start of the process to first update, s", "to_first_update_seconds"),
    row("last checkpoint to end of the process, s", "after_seconds"),
  ]
  return report.table(["loop: median (quartiles)", "empty compilation cache", "filled compilation cache"], rows)


if __name__ == "__main__":
  command.finish(main)
