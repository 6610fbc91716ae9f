"""The data pipeline: images a second that it delivers, against what the training step takes.

  python -m benchmarks.input --flagfile=experiments/fashion_mnist.flags
  python -m benchmarks.input --dataset=folder:PATH --image_size=64 --own_data --b="--data_threads=4"

Cold is the first pass: the data set is opened and read once, with its files dropped from the system's cache. Warm is
every later one.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import command, report
from benchmarks.alternate import Block, block_size, rates, run_blocks, speed_ratio
from ddpm_jax import config as config_lib

CASES = {
  "memory, first pass": "kept in memory, cold",
  "memory": "kept in memory, warm",
  "disk, first pass": "decoded from disk, cold",
  "disk": "decoded from disk, warm",
}


def make_parser() -> command.Parser:
  """The options."""
  parser = command.Parser("input", "Measures the data pipeline, and the training step that it has to feed.")
  parser.add_comparison()
  parser.add_argument(
    "--images", type=command.positive(int), default=2048, help="PNG files to generate and read (2048)"
  )
  parser.add_argument("--own_data", action="store_true", help="read the data set of the flags, and no generated one")
  return parser


def main(argv: Sequence[str]) -> None:
  """Measures and prints."""
  options, settings = command.parse(make_parser(), argv)
  shapes = {setting.name: command.image_shape(setting.config, options.image_shape) for setting in settings}
  facts, counts, runs = {}, {}, {}
  works = {setting.name: ("read_work", setting.env) for setting in settings}
  steps = {f"step {setting.name}": ("step_work", setting.env) for setting in settings}
  with contextlib.ExitStack() as stack:
    workers = stack.enter_context(command.workers(works | steps))
    for setting in settings:
      name, shape = setting.name, shapes[setting.name]
      config = setting.config
      if not options.own_data:
        folder = stack.enter_context(generated(options.images, shape))
        size = config_lib.image_size(*shape[:2])
        config = config_lib.override(config, {"dataset": f"folder:{folder}", "split": "train", "image_size": size})
      command.say(f"opening the images and compiling the step of {name}: {setting}")
      job = setting.job(shape)
      facts[name] = workers[name].prepare(job | {"config": config_lib.to_json(config)})
      facts[f"step {name}"] = workers[f"step {name}"].prepare(job)
      runs[f"{name}: the step"] = lambda count, worker=workers[f"step {name}"]: worker.block("", count)
      for case in CASES:
        runs[f"{name}: {case}"] = lambda count, worker=workers[name], case=case: worker.block(case, count)
    for name, run in runs.items():
      counts[name] = block_size(run, options.block_seconds)
    command.say(f"measuring: {options.rounds} turns each")
    blocks = run_blocks(runs, counts, options.rounds)
  results = summary([setting.name for setting in settings], blocks)
  for setting in settings:
    fact, what = facts[setting.name], "x".join(map(str, facts[setting.name]["image_shape"]))
    data = setting.config.data.dataset if options.own_data else "generated"
    print(report.heading(f"{setting.name}: {setting}") + f"\n   {fact['images']} images {what}, {data}")
  print(f"\n{text(results)}")
  print(report.machine())
  about = {s.name: {"flags": s.flags, "env": s.env, "image_shape": shapes[s.name]} for s in settings}
  report.write_json(options.json, report.document("input", about, facts, blocks, results))


@contextlib.contextmanager
def generated(number: int, shape: tuple[int, int, int]) -> Iterator[pathlib.Path]:
  """A temporary folder of PNG files: smooth random colours with a little noise, which compress like photographs."""
  random = np.random.default_rng(0)
  height, width, channels = shape
  with tempfile.TemporaryDirectory(prefix="ddpm_jax_benchmark_") as folder:
    for index in range(number):
      coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
      pixels = np.asarray(coarse) + random.integers(-6, 7, (height, width, 3))
      image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
      with open(pathlib.Path(folder, f"{index:06d}.png"), "wb") as file:
        (image.convert("L") if channels == 1 else image).save(file, "png")
        os.fsync(file.fileno())  # what is not on the disk cannot be dropped from the cache
    yield pathlib.Path(folder)


def summary(names: Sequence[str], blocks: Sequence[Block]) -> dict[str, Any]:
  """For each setting the images a second of each case and of the step, and how many times the step's needs they are."""
  results: dict[str, Any] = {}
  for name in names:
    step = rates(blocks, f"{name}: the step")
    results[name] = {"the step": {"images_per_second": step}}
    for case in CASES:
      delivered = rates(blocks, f"{name}: {case}")
      results[name][case] = {"images_per_second": delivered, "times_the_step": delivered.median / step.median}
  if "B" in names:
    for case in CASES:
      results["B"][case]["speed of B over A"] = speed_ratio(blocks, f"B: {case}", f"A: {case}")
  return results


def text(results: dict[str, Any]) -> str:
  """The table."""
  rows = []
  for name in (name for name in ("A", "B") if name in results):
    rows.append([f"{name}: taken by the step", report.with_spread(results[name]["the step"]["images_per_second"]), "1"])
    for case, label in CASES.items():
      result = results[name][case]
      times = report.number(result["times_the_step"])
      rows.append([f"{name}: {label}", report.with_spread(result["images_per_second"]), times])
      if "speed of B over A" in result:
        rows.append(["   B over A", report.with_spread(result["speed of B over A"]), ""])
  return report.table(["input", "images/s: median (quartiles)", "times the step"], rows)


if __name__ == "__main__":
  command.finish(main)
