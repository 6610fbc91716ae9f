"""ddpm_jax beside PyTorch: the same U-Net, batch, precision and optimiser, in turns on one device.

  pip install -e '.[benchmark]'
  python -m benchmarks.pytorch --flagfile=experiments/fashion_mnist.flags
  python -m benchmarks.pytorch --flagfile=experiments/cifar10.flags --dtype=bfloat16 --torch_python=PATH

The opponent is the fastest of PyTorch eager, with channels_last, compiled, and both; on a CPU also with one thread,
which is faster where other processes want the cores, and with --grad_accum_steps also in as many parts.
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
from ddpm_jax.exchange.options import unet_options

_SAME = {"prediction": "eps", "loss": "l2", "loss_weighting": "constant", "remat": "none"}


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
  works = {"PyTorch": ("torch_loop", {}), "ddpm_jax": ("step_work", {})}
  with command.workers(works, {"PyTorch": options.torch_python}) as workers:
    command.say(f"compiling: {setting}")
    facts = {"ddpm_jax": workers["ddpm_jax"].prepare(setting.job(shape))}
    if not facts["ddpm_jax"]["devices"].startswith("1 x"):
      raise UserError(f"PyTorch runs on one device, JAX on {facts['ddpm_jax']['devices']}; let JAX see one")
    command.say(f"trying PyTorch: {', '.join(variants)}")
    job = setting.job(shape, unet=unet_options(setting.config.model, shape), variants=variants)
    facts["PyTorch"] = workers["PyTorch"].prepare(job)
    runs = {name: lambda count, worker=worker: worker.block("", count) for name, worker in workers.items()}
    counts = {name: block_size(run, options.block_seconds) for name, run in runs.items()}
    command.say(f"measuring: {options.rounds} turns each, updates in a turn: {counts}")
    blocks = run_blocks(runs, counts, options.rounds)
  results = {
    **{name: rates(blocks, name) for name in works},
    "speed of ddpm_jax over PyTorch": speed_ratio(blocks, "ddpm_jax", "PyTorch"),
    "cpu_seconds_of_an_image": {name: cpu_seconds(blocks, name) for name in works},
    "same number of parameters": facts["PyTorch"]["parameters"] == facts["ddpm_jax"]["parameters"],
  }
  print(text(setting, shape, facts, results))
  print(report.machine())
  about = {"both": {"flags": setting.flags, "image_shape": shape, "unet": job["unet"]}}
  report.write_json(options.json, report.document("pytorch", about, facts, blocks, results))


def text(setting: command.Setting, shape: Sequence[int], facts: dict[str, Any], results: dict[str, Any]) -> str:
  """What is printed."""
  torch, jax, model = facts["PyTorch"], facts["ddpm_jax"], setting.config.model
  lines = [
    report.heading(str(setting)),
    f"   {'x'.join(map(str, shape))}, batch {setting.config.data.batch_size}, {model.dtype}; "
    f"PyTorch {torch['versions'].get('torch')} on {torch['device']}, JAX {jax['versions'].get('jax')} on "
    f"{jax['devices']}",
    "",
  ]
  rows = []
  for variant, tried in torch["tried"].items():
    speed = report.number(tried["images_per_second"]) if "failed" not in tried else tried["failed"][:50]
    rows.append([f"  tried: {variant}", speed, "", ""])
  for name, label in (("PyTorch", f"PyTorch {torch['variant']}"), ("ddpm_jax", "ddpm_jax")):
    cpu = report.with_spread(results["cpu_seconds_of_an_image"][name], 1e3)
    rows.append([label, report.with_spread(results[name]), cpu, f"{facts[name]['parameters']:,}"])
  lines.append(report.table(["pytorch: median (quartiles)", "images/s", "CPU ms/image", "parameters"], rows))
  ratio = results["speed of ddpm_jax over PyTorch"]
  lines += ["", f"speed of ddpm_jax over PyTorch {torch['variant']}: {report.with_spread(ratio)}"]
  if not results["same number of parameters"]:
    lines.append("The two networks differ: not the same number of parameters.")
  return "\n".join(lines)


if __name__ == "__main__":
  command.finish(main)
