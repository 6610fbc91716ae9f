"""Drawing: images a second and compilation of each sampler.

python -m benchmarks.sample --flagfile=experiments/fashion_mnist.flags
python -m benchmarks.sample --samplers=ddpm:1000,dpmpp:20 --b="--dtype=bfloat16"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import command, draw_work, report
from benchmarks.alternate import Block, block_size, rates, run_blocks, speed_ratio
from ddpm_jax.errors import UserError

_DEFAULT = "ddpm:50,ddim:50,heun:49,dpmpp:50"


def make_parser() -> command.Parser:
  """The options."""
  parser = command.Parser("sample", "Measures drawing with weights that were never trained, which takes as long.")
  parser.add_comparison()
  parser.add_argument(
    "--samplers", default=_DEFAULT, help=f"samplers, with the evaluations for each image ({_DEFAULT})"
  )
  return parser


def main(argv: Sequence[str]) -> None:
  """Measures and prints."""
  options, settings = command.parse(make_parser(), argv)
  cases = parse_samplers(options.samplers, settings)
  shapes = {setting.name: command.image_shape(setting.config, options.image_shape) for setting in settings}
  facts, counts, runs = {}, {}, {}
  with command.workers({setting.name: ("draw_work", setting.env) for setting in settings}) as workers:
    for setting in settings:
      command.say(f"compiling {setting.name}: {setting}")
      job = setting.job(shapes[setting.name], cases=cases, batch_size=setting.config.sample.sample_batch_size or 64)
      facts[setting.name] = workers[setting.name].prepare(job)
    for case in cases:
      for name, worker in workers.items():
        run = runs[f"{name} {case}"] = lambda count, worker=worker, case=case: worker.block(case, count)
        counts[f"{name} {case}"] = block_size(run, options.block_seconds)
    command.say(f"measuring: {options.rounds} turns each, batches in a turn: {counts}")
    blocks = run_blocks(runs, counts, options.rounds)
  results = summary(list(facts), cases, blocks)
  for setting in settings:
    fact = facts[setting.name]
    print(report.heading(f"{setting.name}: {setting}"))
    print(f"   batches of {fact['batch_size']} images, {fact['devices']}")
  print(f"\n{text(facts, results)}")
  print(report.machine())
  about = {s.name: {"flags": s.flags, "env": s.env, "image_shape": shapes[s.name]} for s in settings}
  report.write_json(options.json, report.document("sample", about, facts, blocks, results))


def parse_samplers(text: str, settings: Sequence[command.Setting]) -> list[str]:
  """'ddpm:50,heun:19' -> ['ddpm:50', 'heun:19']. Raises UserError unless each setting can draw with each."""
  cases = [case.strip() for case in text.split(",")]
  for case in cases:
    if not case.partition(":")[2].isdecimal():
      raise UserError(f"samplers: {case!r} is no SAMPLER:EVALUATIONS; write {_DEFAULT}, for example")
    for setting in settings:
      draw_work.with_sampler(setting.config, case)
  return cases


def summary(names: Sequence[str], cases: Sequence[str], blocks: Sequence[Block]) -> dict[str, Any]:
  """For each sampler the images a second of each setting, and the ratio."""
  results = {}
  for case in cases:
    results[case] = {name: rates(blocks, f"{name} {case}") for name in names}
    if "B" in names:
      results[case]["speed of B over A"] = speed_ratio(blocks, f"B {case}", f"A {case}")
  return results


def text(facts: dict[str, Any], results: dict[str, Any]) -> str:
  """The table."""
  rows = []
  for case, result in results.items():
    for name, fact in facts.items():
      about = fact["samplers"][case]
      compiled, speed = report.number(about["compile_seconds"]), report.with_spread(result[name])
      ratio = report.with_spread(result["speed of B over A"]) if name == "B" else ""
      rows.append([f"{name}: {case.partition(':')[0]}", str(about["evaluations"]), compiled, speed, ratio])
  header = ["sample", "evaluations", "compile, s", "images/s: median (quartiles)", "speed of B over A"]
  return report.table(header, rows) if "B" in facts else report.table(header[:-1], [row[:-1] for row in rows])


if __name__ == "__main__":
  command.finish(main)
