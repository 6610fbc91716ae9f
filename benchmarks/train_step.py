"""The training step that the loop runs: images a second, step time, compilation, memory, FLOPs.

python -m benchmarks.train_step --flagfile=experiments/fashion_mnist.flags
python -m benchmarks.train_step --flagfile=experiments/cifar10.flags --b="--dtype=bfloat16"
python -m benchmarks.train_step --b_env="XLA_FLAGS=--xla_cpu_use_thunk_runtime=false"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import command, report
from benchmarks.alternate import Block, block_size, cpu_seconds, rates, run_blocks, speed_ratio, spread

_MIB, _G = 2**-20, 1e-9


def make_parser() -> command.Parser:
  """The options."""
  parser = command.Parser("train_step", "Measures the training step; with a setting B, the two take turns.")
  parser.add_comparison()
  return parser


def main(argv: Sequence[str]) -> None:
  """Measures and prints."""
  options, settings = command.parse(make_parser(), argv)
  shapes = {setting.name: command.image_shape(setting.config, options.image_shape) for setting in settings}
  facts, counts = {}, {}
  with command.workers({setting.name: ("step_work", setting.env) for setting in settings}) as workers:
    for setting in settings:
      command.say(f"compiling {setting.name}: {setting}")
      facts[setting.name] = workers[setting.name].prepare(setting.job(shapes[setting.name]))
    runs = {name: lambda count, worker=worker: worker.block("", count) for name, worker in workers.items()}
    for name, run in runs.items():
      counts[name] = block_size(run, options.block_seconds)
    command.say(f"measuring: {options.rounds} turns each, updates in a turn: {counts}")
    blocks = run_blocks(runs, counts, options.rounds)
  results = summary(facts, blocks)
  print(text(settings, shapes, facts, results))
  print(report.machine())
  about = {s.name: {"flags": s.flags, "env": s.env, "image_shape": shapes[s.name]} for s in settings}
  report.write_json(options.json, report.document("train_step", about, facts, blocks, results))


def summary(facts: dict[str, Any], blocks: Sequence[Block]) -> dict[str, Any]:
  """The numbers of the table, for each setting, and the ratio of the speeds."""
  results: dict[str, Any] = {}
  for name, fact in facts.items():
    own = [block.measured for block in blocks if block.setting == name]
    step = spread([seconds for measured in own for seconds in measured["steps"]])
    images = rates(blocks, name)
    achieved = fact["flops"] * images.median / (own[0]["images"] / len(own[0]["steps"]))
    # What was measured is a lower bound of the peak, so the larger of two measurements holds for both.
    peak = max(other["peak_flops"] for other in facts.values() if other["peak_source"] == fact["peak_source"])
    results[name] = {
      "images_per_second": images,
      "step_seconds": step,
      "cpu_seconds_of_an_image": cpu_seconds(blocks, name),
      "achieved_flops": achieved,
      "peak_flops": peak,
      "utilisation": achieved / peak,
      "device_bytes": own[-1].get("device_bytes"),
      "process_bytes": own[-1]["process_bytes"],
    }
  if "B" in facts:
    results["speed of B over A"] = speed_ratio(blocks, "B", "A")
  return results


def text(settings: Sequence[command.Setting], shapes: dict, facts: dict[str, Any], results: dict[str, Any]) -> str:
  """What is printed."""
  names = [setting.name for setting in settings]

  def row(label: str, value: Any) -> list[str]:
    return [label, *(value(facts[name], results[name]) for name in names)]

  number, with_spread = report.number, report.with_spread
  rows = [
    row("images/s", lambda _, r: with_spread(r["images_per_second"])),
    row("step, ms", lambda _, r: with_spread(r["step_seconds"], 1e3)),
    row("CPU time of an image, ms", lambda _, r: with_spread(r["cpu_seconds_of_an_image"], 1e3)),
    row("lower + compile, s", lambda f, _: f"{number(f['lower_seconds'])} + {number(f['compile_seconds'])}"),
    row("peak of a device, MiB", lambda _, r: number(r["device_bytes"] * _MIB) if r["device_bytes"] else "not told"),
    row("planned by XLA for a device, MiB", lambda f, _: number(f["plan_bytes"] * _MIB)),
    row("peak of the process, MiB", lambda _, r: number(r["process_bytes"] * _MIB)),
    row("parameters", lambda f, _: f"{f['parameters']:,}"),
    row("model FLOPs of an update, G", lambda f, _: number(f["flops"] * _G)),
    row("achieved, GFLOP/s", lambda _, r: number(r["achieved_flops"] * _G)),
    row("peak, GFLOP/s", lambda _, r: number(r["peak_flops"] * _G)),
    row("utilisation, %", lambda _, r: number(100 * r["utilisation"])),
  ]
  lines = []
  for setting in settings:
    fact, shape = facts[setting.name], "x".join(map(str, shapes[setting.name]))
    lines.append(report.heading(f"{setting.name}: {setting}"))
    lines.append(f"   {shape}, batch {setting.config.data.batch_size}, {fact['devices']}; peak {fact['peak_source']}")
  lines += ["", report.table(["train_step: median (quartiles)", *names], rows)]
  if "speed of B over A" in results:
    lines += ["", f"speed of B over A: {report.with_spread(results['speed of B over A'])}"]
  return "\n".join(lines)


if __name__ == "__main__":
  command.finish(main)
