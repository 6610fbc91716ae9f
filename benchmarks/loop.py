"""The whole program beside the bare training step: what logging, checkpoints and sample grids cost.

  python -m benchmarks.loop
  python -m benchmarks.loop --flagfile=experiments/fashion_mnist.flags --num_steps=500 --rounds=2

In each round the program runs in new folders: first with an empty compilation cache, then with what the first run
left there. It is timed from its first call to its last checkpoint and sample grid; what comes before is the start.
In that time it is held again and again for a block of the bare step. So the two take turns of a few seconds, and each
turn of the program is compared with the blocks before and after it. On a GPU or TPU the calls that a program has queued
go on while it is held, so there a turn should be long: --block_seconds=60.

A third run is left alone: by its own clock, what passed outside of updates, in percent of what passed in them. Two
processes that run one program differ by some percent; this does not depend on a second one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks import command, report
from benchmarks.alternate import Block, block_size, spread
from benchmarks.worker import ROOT, last_words
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.runs.train import dispatches
from ddpm_jax.training.optimizer import decay_start

_COMPILED = "compiled and made step"
_STARTS = ("cold", "warm")
_ALONE = "alone"


def make_parser() -> command.Parser:
  """The options."""
  parser = command.Parser("loop", "Measures whole runs of ddpm_jax.main beside the bare training step.")
  parser.set_defaults(rounds=2)
  return parser


def main(argv: Sequence[str]) -> None:
  """Measures and prints."""
  options, (setting,) = command.parse(make_parser(), argv)
  config, blocks = setting.config, []
  if config.train.num_steps <= _first_call(config):
    raise UserError(f"num_steps: {config.train.num_steps} updates are a single call; use more")
  shape = command.image_shape(config, options.image_shape)
  with command.workers({"bare": ("step_work", {})}) as workers:
    command.say(f"compiling the bare step: {setting}")
    facts = workers["bare"].prepare(setting.job(shape, data=True))

    def bare(count: int) -> dict[str, Any]:
      return workers["bare"].block("", count)

    count = block_size(bare, options.block_seconds)
    for number in range(options.rounds):
      command.say(
        f"round {number + 1} of {options.rounds}: 3 x {config.train.num_steps} updates, {count} bare ones a turn"
      )
      with tempfile.TemporaryDirectory(prefix="ddpm_jax_benchmark_") as folder:
        for start in (*_STARTS, _ALONE):
          beside = None if start == _ALONE else lambda: bare(count)
          measured = whole_run(config, pathlib.Path(folder), start, beside, options.block_seconds)
          blocks.append(Block(number, start, config.train.num_steps, measured))
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


def whole_run(
  config: Config, folder: pathlib.Path, start: str, bare: Callable[[], dict[str, Any]] | None, turn_seconds: float
) -> dict[str, Any]:
  """Runs `python -m ddpm_jax.main` in a new workdir in `folder`, where the compilation cache is too.

  Args:
    config: the run.
    folder: must exist.
    start: names the workdir.
    bare: runs a block of the bare step; what is whole is held meanwhile. None: nothing interrupts it.
    turn_seconds: how long it goes on between two of them.

  Returns:
    Seconds: from the start of the process to the end of its first call (`to_first_update`); of each turn from there
    to the last checkpoint and grid (`turns`); from there to the end of the process (`after`). `bare` has the blocks
    before, between and after the turns. `updates` are those after the first call, `cpu_seconds` the time of all cores
    for them. `outside` is what of the turns passed outside of updates, which is known of a run that nothing interrupts.

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
  began, turns, blocks = time.time(), [], []
  with (
    (folder / "errors.txt").open("w") as errors,
    _group(words, env=variables, text=True, stdout=subprocess.PIPE, stderr=errors) as process,
    _CpuTime(process.pid) as cpu,
  ):
    assert process.stdout
    compiled = any(_COMPILED in line for line in process.stdout)
    first = time.time()
    reader = threading.Thread(target=process.stdout.read)  # it would wait for us if nobody read
    reader.start()
    while compiled and process.poll() is None:
      if bare:
        os.killpg(process.pid, signal.SIGSTOP)
        blocks.append(bare())
        os.killpg(process.pid, signal.SIGCONT)
      turn = time.time()
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(turn_seconds)
      turns.append(_Turn(turn, time.time()))
    process.wait()
    reader.join()
  if process.returncode or not turns:
    why = last_words((folder / "errors.txt").read_text(errors="replace"))
    raise RunError(f"the run ended with exit code {process.returncode}: {why}")
  if bare:
    blocks.append(bare())
  last = last_written(workdir, config.train.num_steps)
  until_last = [turn._replace(end=min(turn.end, last)) for turn in turns if turn.begin < last]
  first_call = _first_call(config)
  return {
    "to_first_update": first - began,
    "turns": [turn.end - turn.begin for turn in until_last],
    "bare": blocks[: len(until_last) + 1],
    "cpu_seconds": cpu.until(last) - cpu.until(first),
    "after": sum(turn.end - max(turn.begin, last) for turn in turns if turn.end > last),
    "updates": config.train.num_steps - first_call,
    "outside": None if bare else last - first - in_updates(workdir / "metrics.jsonl", first_call),
  }


class _Turn(NamedTuple):
  """Seconds since the epoch."""

  begin: float
  end: float


@contextlib.contextmanager
def _group(words: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
  """A process that can be held together with those that it starts, and does not outlive the block."""
  with subprocess.Popen(words, start_new_session=True, **options) as process:
    try:
      yield process
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


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


def _first_call(config: Config) -> int:
  """The number of updates in the first call of the step."""
  return len(next(dispatches(config.train, 0, decay_start(config.optimizer, config.train.num_steps))))


def last_written(workdir: pathlib.Path, step: int) -> float:
  """When the checkpoint and the sample grid of the last update were complete, in seconds since the epoch."""
  checkpoint = workdir / "checkpoints" / str(step)
  paths = [checkpoint, *checkpoint.rglob("*"), workdir / "samples" / f"step_{step:08d}.png"]
  return max(max(path.stat().st_mtime, path.stat().st_ctime) for path in paths if path.exists())


def in_updates(metrics: pathlib.Path, first_call: int) -> float:
  """Seconds of the updates after the first call, up to the last line, by the speed that the run tells.

  That leaves out checkpoints and sample grids.
  """
  seconds, before = 0.0, first_call
  for line in metrics.read_text(encoding="utf-8").splitlines():
    values = json.loads(line)
    if values["step"] > first_call:
      seconds += (values["step"] - before) / values["steps_per_second"]
      before = values["step"]
  return seconds


def summary(config: Config, blocks: Sequence[Block]) -> dict[str, Any]:
  """For each start, an update of the whole run and of the bare step beside it, and the overhead in percent.

  And of the runs that were left alone, how much passed outside of updates.
  """
  results = {}
  for start in _STARTS:
    runs = [block.measured for block in blocks if block.setting == start]
    bare = [_of_an_update(run["bare"], "seconds", config.data.batch_size) for run in runs]
    bare_cpu = [_of_an_update(run["bare"], "cpu_seconds", config.data.batch_size) for run in runs]
    expected = [bare_updates(run["turns"], beside) for run, beside in zip(runs, bare, strict=True)]
    updates = [run["updates"] for run in runs]
    whole = [sum(run["turns"]) / number for run, number in zip(runs, updates, strict=True)]
    cpu = [run["cpu_seconds"] / number for run, number in zip(runs, updates, strict=True)]
    results[start] = {
      "bare_seconds": spread([seconds for one in bare for seconds in one]),
      "whole_seconds": spread(whole),
      "overhead_percent": spread([100 * (more / made - 1) for more, made in zip(expected, updates, strict=True)]),
      "bare_cpu_seconds": spread([seconds for one in bare_cpu for seconds in one]),
      "whole_cpu_seconds": spread(cpu),
      "cpu_overhead_percent": spread(
        [100 * (whole / statistics.mean(beside) - 1) for whole, beside in zip(cpu, bare_cpu, strict=True)]
      ),
      "to_first_update_seconds": spread([run["to_first_update"] for run in runs]),
      "after_seconds": spread([run["after"] for run in runs]),
    }
  alone = [block.measured for block in blocks if block.setting == _ALONE]
  results[_ALONE] = {
    "outside_seconds": spread([run["outside"] for run in alone]),
    "outside_percent": spread([100 * run["outside"] / (sum(run["turns"]) - run["outside"]) for run in alone]),
  }
  return results


def bare_updates(turns: Sequence[float], beside: Sequence[float]) -> float:
  """How many updates the bare step would have made in the turns of a run.

  Args:
    turns: their seconds.
    beside: seconds of a bare update before, between and after them: one more.
  """
  around = zip(turns, itertools.pairwise(beside), strict=True)
  return sum(2 * turn / (before + after) for turn, (before, after) in around)


def _of_an_update(blocks: Sequence[dict[str, Any]], what: str, batch_size: int) -> list[float]:
  return [block[what] * batch_size / block["images"] for block in blocks]


def text(results: dict[str, Any]) -> str:
  """The table."""
  cold, warm, alone = (results[start] for start in (*_STARTS, _ALONE))

  def row(label: str, name: str, scale: float = 1) -> list[str]:
    return [label, report.with_spread(cold[name], scale), report.with_spread(warm[name], scale)]

  rows = [
    row("an update of the bare step, ms", "bare_seconds", 1e3),
    row("an update of the whole run, ms", "whole_seconds", 1e3),
    row("overhead, %", "overhead_percent"),
    row("CPU time of an update of the bare step, ms", "bare_cpu_seconds", 1e3),
    row("CPU time of an update of the whole run, ms", "whole_cpu_seconds", 1e3),
    row("overhead in CPU time, %", "cpu_overhead_percent"),
    row("start of the process to first call, s", "to_first_update_seconds"),
    row("last checkpoint to end of the process, s", "after_seconds"),
  ]
  table = report.table(["loop: median (quartiles)", "empty compilation cache", "filled compilation cache"], rows)
  seconds, percent = (report.with_spread(alone[name]) for name in ("outside_seconds", "outside_percent"))
  return f"{table}\n\nleft alone, it passed {seconds} s outside of its updates: {percent} % of the time for them"


if __name__ == "__main__":
  command.finish(main)
