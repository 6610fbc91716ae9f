"""ddpm_jax beside PyTorch: the same U-Net, batch, precision and optimiser, in turns on one device.

  pip install -e '.[benchmark]'
  python -m benchmarks.pytorch --flagfile=experiments/fashion_mnist.flags
  python -m benchmarks.pytorch --flagfile=experiments/cifar10.flags --dtype=bfloat16 --torch_python=PATH

The opponent is the fastest of PyTorch eager, with channels_last, compiled, and both; on a CPU also with one thread,
which is faster where other processes want the cores, and with --grad_accum_steps also in as many parts. There are two
opponents: one with the memory allocator as glibc has it by default, and one with all the settings of it that the
program gives itself (`ddpm_jax/runtime/hugepages.py`). The speed that counts is the one over the faster of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import command, report
from benchmarks.alternate import block_size, cpu_seconds, rates, run_blocks, speed_ratio
from benchmarks.torch_loop import VARIANTS
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import hugepages
from ddpm_jax.weights.options import unet_options

_SAME = {"prediction": "eps", "loss": "l2", "loss_weighting": "constant", "remat": "none"}
# The opponents, and the tunables of glibc's malloc that each process begins with.
MALLOCS = {
  "PyTorch, default malloc": {hugepages.HUGE_PAGES: 0},  # the default value; without it the worker would set ours
  "PyTorch, tuned malloc": {hugepages.HUGE_PAGES: 1, **hugepages.KEEP_FREED},
}


def check(config: Config) -> None:
  """Raises UserError if the PyTorch loop would do something else than the run."""
  for section in (config.diffusion, config.model, config.train):
    for name, value in _SAME.items():
      if getattr(section, name, value) != value:
        raise UserError(f"{name}: the PyTorch loop has {value} only; leave --{name} out")


def make_parser() -> command.Parser:
  """The options."""
  parser = command.Parser("pytorch", "Measures the training step beside that of a plain PyTorch loop, in turns.")
  parser.add_argument("--torch_python", default=sys.executable, help="a Python with torch and diffusers (this one)")
  parser.add_argument("--variants", default=",".join(VARIANTS), help="what to try of PyTorch, separated by commas")
  return parser


def main(argv: Sequence[str]) -> None:
  """Measures and prints."""
  options, (setting,) = command.parse(make_parser(), argv)
  check(setting.config)
  variants = options.variants.split(",")
  for variant in variants:
    if variant not in VARIANTS:
      raise UserError(f"variants: {variant!r} is none of {','.join(VARIANTS)}; use some of those")
  shape = command.image_shape(setting.config, options.image_shape)
  works = {name: ("torch_loop", {"GLIBC_TUNABLES": _text(values)}) for name, values in MALLOCS.items()}
  works["ddpm_jax"] = ("step_work", {})
  with command.workers(works, {name: str(options.torch_python) for name in MALLOCS}) as workers:
    command.say(f"compiling: {setting}")
    facts = {"ddpm_jax": workers["ddpm_jax"].prepare(setting.job(shape))}
    if not facts["ddpm_jax"]["devices"].startswith("1 x"):
      raise UserError(f"PyTorch runs on one device, JAX on {facts['ddpm_jax']['devices']}; let JAX see one")
    job = setting.job(shape, unet=unet_options(setting.config.model, shape), variants=variants)
    for name in MALLOCS:
      command.say(f"trying {name}: {', '.join(variants)}")
      facts[name] = workers[name].prepare(job)
    runs = {name: lambda count, worker=worker: worker.block("", count) for name, worker in workers.items()}
    counts = {name: block_size(run, options.block_seconds) for name, run in runs.items()}
    command.say(f"measuring: {options.rounds} turns each, training steps in a turn: {counts}")
    blocks = run_blocks(runs, counts, options.rounds)
  images_per_second = {name: rates(blocks, name) for name in works}
  results = {
    "images_per_second": images_per_second,
    "speed of ddpm_jax over": {name: speed_ratio(blocks, "ddpm_jax", name) for name in MALLOCS},
    "the faster opponent": max(MALLOCS, key=lambda name: images_per_second[name].median),
    "cpu_seconds_of_an_image": {name: cpu_seconds(blocks, name) for name in works},
    "same number of parameters": len({fact["parameters"] for fact in facts.values()}) == 1,
  }
  print(text(setting, shape, facts, results))
  print(report.machine())
  about = {"all": {"flags": setting.flags, "image_shape": shape, "unet": job["unet"], "malloc": MALLOCS}}
  report.write_json(options.json, report.document("pytorch", about, facts, blocks, results))


def text(setting: command.Setting, shape: Sequence[int], facts: dict[str, Any], results: dict[str, Any]) -> str:
  """What is printed."""
  jax, model = facts["ddpm_jax"], setting.config.model
  torch = facts[next(iter(MALLOCS))]
  lines = [
    report.heading(str(setting)),
    f"   {'x'.join(map(str, shape))}, batch {setting.config.data.batch_size}, {model.dtype}; "
    f"PyTorch {torch['versions'].get('torch')} on {torch['device']}, JAX {jax['versions'].get('jax')} on "
    f"{jax['devices']}",
    "",
  ]
  rows = []
  for name in (*MALLOCS, "ddpm_jax"):
    for variant, tried in facts[name].get("tried", {}).items():
      speed = report.number(tried["images_per_second"]) if "failed" not in tried else tried["failed"][:50]
      rows.append([f"  tried: {variant}", speed, "", ""])
    cpu = report.with_spread(results["cpu_seconds_of_an_image"][name], 1e3)
    speed = report.with_spread(results["images_per_second"][name])
    rows.append([_label(name, facts), speed, cpu, f"{facts[name]['parameters']:,}"])
  lines += [report.table(["pytorch: median (quartiles)", "images/s", "CPU ms/image", "parameters"], rows), ""]
  ratios, faster = results["speed of ddpm_jax over"], results["the faster opponent"]
  for name in MALLOCS:
    note = ", the faster opponent" if name == faster else ""
    lines.append(f"speed of ddpm_jax over {_label(name, facts)}{note}: {report.with_spread(ratios[name])}")
  if not results["same number of parameters"]:
    lines.append("The two networks differ: not the same number of parameters.")
  return "\n".join(lines)


def _label(name: str, facts: dict[str, Any]) -> str:
  variant = facts[name].get("variant")
  return f"{name}, {variant}" if variant else name


def _text(tunables: dict[str, int]) -> str:
  return ":".join(f"{name}={value}" for name, value in tunables.items())


if __name__ == "__main__":
  command.finish(main)
