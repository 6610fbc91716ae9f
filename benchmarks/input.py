"""The data pipeline: images a second that it delivers, against what the training step takes.

  python -m benchmarks.input --flagfile=experiments/fashion_mnist.flags
  python -m benchmarks.input --dataset=folder:PATH --image_size=64 --own_data --b="--data_threads=4"

  python -m benchmarks.input --dataset=folder:PATH --own_data --packed --torch_python=PATH

With --packed the same images are read from a folder, a zip, tar shards and a parquet file, without the step; with
--torch_python also by PyTorch, from the folder, with Pillow in as many processes as the program has threads.

Cold is the first pass: the data set is opened and read once, with its files dropped from the system's cache. Warm is
every later one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from benchmarks import command, report
from benchmarks.alternate import Block, block_size, rates, run_blocks, speed_ratio
from ddpm_jax import config as config_lib
from ddpm_jax.errors import UserError

CASES = {
  "memory, first pass": "kept in memory, cold",
  "memory": "kept in memory, warm",
  "disk, first pass": "decoded from disk, cold",
  "disk": "decoded from disk, warm",
}
PYTORCH = "PyTorch"
_IN_A_SHARD = 1000


def make_parser() -> command.Parser:
  """The options."""
  parser = command.Parser("input", "Measures the data pipeline, and the training step that it has to feed.")
  parser.add_comparison()
  parser.add_argument(
    "--images", type=command.positive(int), default=2048, help="PNG files to generate and read (2048)"
  )
  parser.add_argument("--own_data", action="store_true", help="read the data set of the flags, and no generated one")
  parser.add_argument("--packed", action="store_true", help="read them from a folder, a zip, shards and a parquet file")
  parser.add_argument("--torch_python", default="", help="with --packed: a Python with torch, to read the folder too")
  return parser


def main(argv: Sequence[str]) -> None:
  """Measures and prints."""
  options, settings = command.parse(make_parser(), argv)
  if options.packed:
    read_packed(options, settings)
    return
  if options.torch_python:
    raise UserError("torch_python: has no effect without --packed; add that")
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
        config = config_lib.override(config, {"dataset": f"folder:{folder}", "split": "train", "image_size": shape[0]})
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


def read_packed(options: argparse.Namespace, settings: Sequence[command.Setting]) -> None:
  """Measures the reading of the same images, kept in each way."""
  if len(settings) > 1:
    raise UserError("packed: compares kinds of data sets; leave --b and --b_env out")
  (setting,) = settings
  kind, place = config_lib.own_images(setting.config.data.dataset) or ("", "")
  if options.own_data and kind != "folder":
    raise UserError(f"own_data: {setting.config.data.dataset} is no folder to be packed; use --dataset=folder:PATH")
  shape = command.image_shape(setting.config, options.image_shape)
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(place) if options.own_data else stack.enter_context(generated(options.images, shape))
    kinds = pack(folder, pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddpm_jax_benchmark_"))))
    works = dict.fromkeys(kinds, ("read_work", setting.env))
    pythons = {PYTORCH: options.torch_python} if options.torch_python else {}
    workers = stack.enter_context(command.workers(works | {name: ("torch_read", {}) for name in pythons}, pythons))
    facts, runs, counts = {}, {}, {}
    for name, worker in workers.items():
      data = {"dataset": kinds.get(name, f"folder:{folder}"), "split": "train"}
      config = config_lib.override(setting.config, data)
      command.say(f"opening the images for {name}")
      threads = config.data.data_threads
      facts[name] = worker.prepare(setting.job(shape, workers=threads) | {"config": config_lib.to_json(config)})
      for case in (case for case in CASES if case.startswith("disk")):
        runs[f"{name}: {case}"] = lambda count, worker=worker, case=case: worker.block(case, count)
    for name, run in runs.items():
      counts[name] = block_size(run, options.block_seconds)
    command.say(f"measuring: {options.rounds} turns each")
    blocks = run_blocks(runs, counts, options.rounds)
  others = ["folder", *pythons]
  results = packed_summary(blocks, others)
  count = facts["folder"]["images"]
  print(report.heading(f"{count} images {'x'.join(map(str, shape))}, {setting}"))
  print(packed_text(results, others))
  print(report.machine())
  about = {setting.name: {"flags": setting.flags, "env": setting.env, "image_shape": shape}}
  report.write_json(options.json, report.document("input", about, facts, blocks, results))


def packed_summary(blocks: Sequence[Block], others: Sequence[str]) -> dict[str, Any]:
  """For each 'KIND: CASE' the images a second, and how many times those of each of the others they are."""
  results: dict[str, Any] = {}
  for name in dict.fromkeys(block.setting for block in blocks):
    kind, _, case = name.partition(": ")
    over = {other: speed_ratio(blocks, name, f"{other}: {case}") for other in others if other != kind}
    results[name] = {"images_per_second": rates(blocks, name), "over": over}
  return results


def packed_text(results: dict[str, Any], others: Sequence[str]) -> str:
  """The table."""
  rows = []
  for name, result in results.items():
    kind, _, case = name.partition(": ")
    over = [report.with_spread(result["over"][other]) if other in result["over"] else "" for other in others]
    label = f"{kind}, {'cold' if 'first' in case else 'warm'}"
    rows.append([label, report.with_spread(result["images_per_second"]), *over])
  return report.table(["input", "images/s: median (quartiles)", *(f"over {other}" for other in others)], rows)


def pack(folder: pathlib.Path, place: pathlib.Path) -> dict[str, str]:
  """Packs the files of a folder as a zip, as tar shards and as a parquet file. Returns kind -> --dataset."""
  files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
  names = [
    name for name in sorted(files) if pathlib.PurePath(name).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
  ]
  with zipfile.ZipFile(place / "x.zip", "w") as archive:
    for name in names:
      archive.write(files[name], name)
  for number, start in enumerate(range(0, len(names), _IN_A_SHARD)):
    with tarfile.open(place / f"x-{number:03d}.tar", "w") as shard:
      for name in names[start : start + _IN_A_SHARD]:
        shard.add(files[name], name)
  images = [{"bytes": files[name].read_bytes(), "path": name} for name in names]
  pyarrow.parquet.write_table(pyarrow.table({"image": images}), place / "x.parquet", row_group_size=_IN_A_SHARD)
  for path in place.iterdir():
    with path.open("rb") as file:
      os.fsync(file.fileno())
  return {
    "folder": f"folder:{folder}",
    "zip": f"zip:{place / 'x.zip'}",
    "webdataset": f"webdataset:{place}/x-*.tar",
    "parquet": f"parquet:{place / 'x.parquet'}",
  }


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
