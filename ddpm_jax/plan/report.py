"""What a plan says, as text: lines of at most 100 columns."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator

from ddpm_jax.first_stage.latents import Latents
from ddpm_jax.models.build import num_params
from ddpm_jax.plan.batches import Largest
from ddpm_jax.plan.collectives import KINDS, Collective
from ddpm_jax.plan.compiling import CompiledStep, Memory
from ddpm_jax.plan.hardware import Peaks
from ddpm_jax.plan.roofline import Roofline
from ddpm_jax.plan.topology import OutOfMemory, Topology
from ddpm_jax.training.setup import Run

_SMALLER = "try a smaller --batch_size, --remat=blocks, --grad_accum_steps, --dtype=bfloat16 or --parallel=fsdp"


LESS = "JAX_OPTIMIZATION_LEVEL=O1"  # in the environment, for a quick plan


_EFFORTS = ("JAX_OPTIMIZATION_LEVEL", "JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "JAX_MEMORY_FITTING_EFFORT")


def effort() -> str:
  """What the environment says of how well to compile, which then is not as for a run without it; '' for nothing."""
  return " ".join(f"{name}={os.environ[name]}" for name in _EFFORTS if os.environ.get(name, "UNKNOWN") != "UNKNOWN")


def headline(run: Run, topology: Topology, peaks: Peaks | None) -> str:
  """What is planned, on what."""
  height, width, channels = run.image_shape
  config = run.config
  chips = "" if topology.chips == len(topology.devices) else f" ({topology.chips} chips)"
  rows = [
    ("model", f"{_networks(run)}, {config.model.dtype} activations, {config.model.matmul_precision} matmul precision"),
    ("images", f"{height}x{width}x{channels} ({config.data.dataset}), {config.data.batch_size} in a training step"),
    *_first_stage(run),
    (
      "topology",
      f"{topology.name}: {len(topology.devices)} x {topology.kind}{chips}, --parallel={config.train.parallel}",
    ),
  ]
  if peaks:
    rows += [
      ("peaks", f"{rate(peaks.flops, 'FLOP/s')}, memory {rate(peaks.bandwidth, 'B/s')}{_links(peaks)}, each device"),
      ("", peaks.source),
      ("ridge point", f"{peaks.flops / peaks.bandwidth:.0f} FLOP for each byte: below it, memory is the limit"),
    ]
  else:
    rows.append(("peaks", f"none are known for {topology.kind}: no roofline"))
  if effort():
    rows += [("compiled", f"with {effort()}"), ("", "a run without it has other bytes and times")]
  return _table(rows)


def _networks(run: Run) -> str:
  """What is trained."""
  params = run.abstract_state.params
  if not run.pair:
    kind = "classifier" if run.config.model.stage == "classifier" else "U-Net"
    return f"{kind} of {num_params(params):,} parameters"
  text = f"autoencoder of {num_params(params['autoencoder']):,} parameters"
  return text + (f", discriminator of {num_params(params['discriminator']):,}" if run.pair.discriminator else "")


def _first_stage(run: Run) -> Iterator[tuple[str, str]]:
  """What turns images into what is diffused, and where."""
  if isinstance(run.first_stage, Latents):
    latents, params = run.first_stage.latent_shape, num_params(run.frozen["autoencoder"])
    yield "first stage", f"autoencoder of {params:,} parameters, latents {'x'.join(map(str, latents))}, encoded in"
    yield "", "each step; a run whose latents fit into --cache_gib encodes them once, and needs less"


def _links(peaks: Peaks) -> str:
  return "" if peaks.interconnect is None else f", links {rate(peaks.interconnect, 'B/s')} out"


def memory_table(memory: Memory, topology: Topology) -> str:
  """Bytes on each device by kind, and whether they fit."""
  names = {
    "parameters": "parameters",
    "average": "their moving average",
    "optimizer": "optimiser",
    "counters": "counters",
    "batch": "batch",
    "padding": "padding of the layout",
    "temporaries": "temporaries: activations, gradients",
    "outputs": "output: metrics",
    "frozen": "networks that do not train",
    "program": "program",
  }
  shares = memory._asdict()
  rows = [(name, f"{size_text(shares[key]):>12}") for key, name in names.items() if shares[key]]
  rows.append(("all", f"{size_text(memory.total):>12}"))
  return "memory of each device\n" + _table(rows) + fits(memory, topology)


def fits(memory: Memory, topology: Topology) -> str:
  """The line that answers the question."""
  if topology.memory is None:
    return "the compiler accepts it, but does not say how much memory a device has\n"
  if memory.total <= topology.memory:
    return f"fits: {size_text(memory.total)} of {size_text(topology.memory)}\n"
  return f"does not fit: {size_text(memory.total)} of {size_text(topology.memory)};\n  {_SMALLER}\n"


def refusal(refused: OutOfMemory) -> str:
  """The same, where the compiler refuses the step."""
  if refused.needed is None or refused.available is None:
    return f"does not fit: the compiler refuses it;\n  {_SMALLER}\n"
  return f"does not fit: {size_text(refused.needed)} of {size_text(refused.available)};\n  {_SMALLER}\n"


def step_table(step: CompiledStep, peaks: Peaks | None, times: Roofline | None) -> str:
  """What one device does in a step, and how long each part takes at its peak."""
  compute, memory, links = rate(step.flops, "FLOP"), rate(step.bytes, "B"), rate(step.sent, "B")
  if peaks and times:
    compute += f" at {rate(peaks.flops, 'FLOP/s')}: {seconds_text(times.compute)}"
    memory += f" at {rate(peaks.bandwidth, 'B/s')}: {seconds_text(times.memory)}"
    if times.interconnect is not None and peaks.interconnect is not None:
      links += f" sent at {rate(peaks.interconnect, 'B/s')}: {seconds_text(times.interconnect)}"
  ratio = f"{step.flops / step.bytes:.1f} FLOP for each byte" if step.bytes else "no bytes"
  rows = [("compute", compute), ("memory", memory), ("interconnect", links), ("intensity", ratio)]
  return "one step, each device\n" + _table(rows) + "".join(_collectives(step.collectives))


def _collectives(found: list[Collective]) -> Iterator[str]:
  if not found:
    yield "no collectives\n"
    return
  yield "collectives\n"
  rows, unknown = [], 0
  for kind in KINDS:
    mine = [c for c in found if c.kind == kind]
    if mine:
      number = sum(c.times or 1 for c in mine)
      whole, sent = (sum(getattr(c, name) * (c.times or 1) for c in mine) for name in ("bytes", "sent"))
      rows.append((kind, f"{number:>4} of {rate(whole, 'B')} in all; each device sends {rate(sent, 'B')}"))
      unknown += sum(c.times is None for c in mine)
  yield _table(rows)
  if unknown:
    yield f"  {unknown} of them in a loop of unknown length, counted once\n"


def bound(run: Run, step: CompiledStep, times: Roofline) -> str:
  """The least time, the most images, and the least time to the end of the run."""
  total = run.config.train.num_steps
  rows = [
    ("step", f"at least {seconds_text(times.seconds)}; limit: {times.limit}"),
    ("speed", f"at most {1 / times.seconds:,.1f} steps/s, {step.batch_size / times.seconds:,.0f} images/s"),
    ("arithmetic", f"at most {times.utilisation:.0%} of its peak is used"),
    (f"{total:,} steps", f"at least {duration_text(total * times.seconds)}"),
  ]
  return "bound: roofline, all three at the same time and at their peaks\n" + _table(rows)


def largest_text(found: Largest, devices: int, known: dict[int, float], limit: int) -> str:
  """The largest batch that fits."""
  if not found.size:
    return f"largest batch: none; a batch of {found.next_size} already needs more than {size_text(limit)}\n"
  if math.isinf(found.next_bytes):
    more = "needs more, says the compiler"
  elif found.next_size in known:
    more = f"needs {size_text(found.next_bytes)}, says the compiler"
  else:
    more = f"would need about {size_text(found.next_bytes)}, by extrapolation"
  words = "largest batch" if found.settled else "largest batch that was tried and fits"
  return (
    f"{words}: --batch_size={found.size}, {found.size / devices:g} on each device, "
    f"{size_text(known[found.size])};\n  {found.next_size} {more}\n"
  )


def size_text(number: float) -> str:
  """Bytes of memory, as memory is sold: in KiB, MiB or GiB."""
  for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
    if number >= size:
      return f"{number / size:.2f} {unit}"
  return f"{number:.0f} B"


def rate(number: float, unit: str) -> str:
  """A number with a decimal prefix, such as '197 TFLOP/s'."""
  for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if number >= size:
      return f"{number / size:.4g} {prefix}{unit}"
  return f"{number:.4g} {unit}"


def seconds_text(seconds: float) -> str:
  """A short time."""
  for unit, size in (("s", 1.0), ("ms", 1e-3)):
    if seconds >= size:
      return f"{seconds / size:.3g} {unit}"
  return f"{seconds / 1e-6:.3g} us"


def duration_text(seconds: float) -> str:
  """A long time."""
  for unit, size in (("days", 86400.0 * 2), ("hours", 3600.0), ("minutes", 60.0)):
    if seconds >= size:
      return f"{seconds / (86400.0 if unit == 'days' else size):.1f} {unit}"
  return seconds_text(seconds)


def _table(rows: Iterable[tuple[str, str]]) -> str:
  rows = list(rows)
  width = max(len(name) for name, _ in rows) + 2
  return "".join(f"  {name:<{width}}{text}\n" for name, text in rows)
