"""A worker's work: the training step, built and compiled as the loop does it, and run in blocks."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import hardware
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.data.pipeline import Batch, batches
from ddpm_jax.data.sources import open_source
from ddpm_jax.devices import make_mesh
from ddpm_jax.models.build import num_params
from ddpm_jax.runs.train import calls_ahead
from ddpm_jax.training.setup import build_run, make_train_step
from ddpm_jax.training.step import inputs_of

_BATCHES = 8  # different ones, used again and again


def prepare(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str, int], dict[str, Any]]]:
  """Compiles the step.

  Args:
    job: `config`, as JSON; `image_shape`; `data`: whether the batches are those of the run's data set, not random ones.

  Returns:
    Facts, and a function that makes updates: it takes each batch from the host to the device, as the loop does.
  """
  config, shape = config_lib.from_json(job["config"]), tuple(job["image_shape"])
  mesh = make_mesh(config.train.parallel, matmul_precision=config.model.matmul_precision)
  mesh.check_batch(config.data.batch_size, config.train.grad_accum_steps)
  host_batches = _first_batches(config) if job.get("data") else _random_batches(config, shape)
  run = build_run(config, shape, mesh)
  updates = config.train.steps_per_dispatch
  step: Any = mesh.compile(make_train_step(run), run.abstract_state, max_steps=updates)
  state = run.initial_state()
  put = functools.partial(mesh.put_batches, max_steps=updates)
  began = time.perf_counter()
  lowered = step.lower(state, put(host_batches[:1]), mesh.put_step_command(updates))
  lowered_at = time.perf_counter()
  compiled = lowered.compile()
  facts = {
    **device_facts(config),
    "parameters": num_params(run.abstract_state.params),
    "lower_seconds": lowered_at - began,
    "compile_seconds": time.perf_counter() - lowered_at,
    "flops": model_flops(config, shape, host_batches[0]),
    "flops_of_a_device_with_recomputation": (compiled.cost_analysis() or {}).get("flops"),
    "plan_bytes": planned_bytes(compiled),
  }
  endless = itertools.cycle(host_batches)

  def call(number: int) -> list[Any]:
    nonlocal state
    state, *outputs = step(state, put([next(endless) for _ in range(number)]), mesh.put_step_command(number))
    return outputs

  def block(case: str, count: int) -> dict[str, Any]:
    full, rest = divmod(count, updates)
    numbers = [updates] * full + [rest] * (rest > 0)
    in_flight, ends = collections.deque(), []
    jax.block_until_ready(call(updates))  # to be warm
    began, cpu = time.perf_counter(), time.process_time()
    for number in numbers:
      in_flight.append(call(number))
      if len(in_flight) > calls_ahead(config.train):
        jax.block_until_ready(in_flight.popleft())
        ends.append(time.perf_counter())
    for outputs in in_flight:
      jax.block_until_ready(outputs)
      ends.append(time.perf_counter())
    return {
      "seconds": ends[-1] - began,
      "cpu_seconds": time.process_time() - cpu,
      "images": count * config.data.batch_size,
      "steps": np.repeat(np.diff([began, *ends]) / numbers, numbers).tolist(),
      **memory_used(),
    }

  return facts, block


def model_flops(config: Config, shape: tuple[int, ...], batch: Batch) -> float:
  """FLOPs of an update as XLA counts them before it optimises: of the whole batch, and without any recomputation.

  Of the step as it is for a TPU: for a CPU, convolutions are partly loops, which XLA counts once.
  """
  plain = config_lib.override(config, {"parallel": "pmap", "remat": "none", "grad_accum_steps": 1})
  run = build_run(plain, (shape[0], shape[1], shape[2]), make_mesh("pmap", jax.devices()[:1]))
  state, rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (run.abstract_state, batch))
  step = functools.partial(make_train_step(run), axis_name=None)
  lowered = jax.jit(step).trace(state, rows).lower(lowering_platforms=("tpu",))
  return (lowered.cost_analysis() or {})["flops"]


def device_facts(config: Config) -> dict[str, Any]:
  """The devices, their peak for the run's type, and the versions."""
  devices = jax.devices()
  kind, dtype = devices[0].device_kind, config.model.dtype
  of_one, source = hardware.published_peak(kind, dtype) or hardware.measured_peak(dtype)
  together = 1 if devices[0].platform == "cpu" else len(devices)  # the devices of one CPU share its cores
  return {
    "devices": f"{len(devices)} x {kind}",
    "peak_flops": of_one * together,
    "peak_source": source,
    "versions": hardware.versions("jax", "jaxlib", "flax", "optax", "numpy"),
  }


def planned_bytes(compiled: Any) -> int:
  """Memory of a device that XLA plans for a compiled function: arguments, results and what lies between."""
  plan = compiled.memory_analysis()
  if plan is None:
    return 0
  in_and_out = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
  return in_and_out + plan.temp_size_in_bytes


def memory_used() -> dict[str, int]:
  """The most that was used so far: of the first device, where it tells, and by this process."""
  stats = jax.local_devices()[0].memory_stats() or {}
  device = {"device_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}
  return {**device, "process_bytes": hardware.peak_rss()}


def _random_batches(config: Config, shape: tuple[int, ...]) -> list[Batch]:
  random, size, classes = np.random.default_rng(0), config.data.batch_size, config.model.num_classes
  label = {"label": np.arange(size, dtype=np.int32) % classes} if classes else {}
  return [
    {
      "image": random.integers(0, 256, (size, *shape), dtype=np.uint8),
      "index": np.arange(size, dtype=np.int32),
      "replaced": np.zeros(size, bool),
      **label,
    }
    for _ in range(_BATCHES)
  ]


def _first_batches(config: Config) -> list[Batch]:
  source = open_source(config.data)
  of_run = {"batch_size": config.data.batch_size, "seed": config.train.seed}
  stream = batches(source, **of_run, start_step=0, labels=config.model.num_classes > 0)
  with contextlib.closing(stream):
    return [inputs_of(batch) for batch in itertools.islice(stream, _BATCHES)]
