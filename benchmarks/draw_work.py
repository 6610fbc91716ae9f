"""A worker's work: drawing images with samplers, each compiled once, from weights that were never trained."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.step_work import device_facts, memory_used
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.devices import make_mesh
from ddpm_jax.keys import seeded
from ddpm_jax.sampling.classes import one_scale
from ddpm_jax.sampling.draw import bind_for_sampling, make_long_draw, table_of
from ddpm_jax.training.setup import build_run


def with_sampler(config: Config, case: str) -> Config:
  """The run with the sampler of a case, such as 'heun:20'. Raises UserError if they do not fit together."""
  name, _, evaluations = case.partition(":")
  return config_lib.override(config, {"sampler": name, "sampling_steps": int(evaluations)})


def prepare(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str, int], dict[str, Any]]]:
  """Compiles a function for each sampler.

  Args:
    job: `config`, as JSON; `image_shape`; `cases`: samplers, such as ['ddpm:50', 'heun:20']; `batch_size`.

  Returns:
    Facts, and a function that draws batches with the sampler that is its case.
  """
  config = config_lib.from_json(job["config"])
  run = build_run(
    config, tuple(job["image_shape"]), make_mesh(config.train.parallel, matmul_precision=config.model.matmul_precision)
  )
  size = job["batch_size"]
  index = np.arange(size, dtype=np.int32)
  label = index % max(1, config.model.num_classes)
  columns = (index, label) if run.conditional else (index,)
  constants = seeded(run.initial_state().ema["ema"], config.sample.sample_seed, one_scale(config.sample))
  draws, samplers = {}, {}
  for case in job["cases"]:
    options = with_sampler(config, case).sample
    table = table_of(options, run.schedule, config.diffusion.variance)
    draws[case] = make_long_draw(
      bind_for_sampling(run, options),
      table,
      first_stage=run.first_stage,
      mesh=run.mesh,
      stream="sample",
    )
    began = time.perf_counter()
    planned = draws[case].bytes_needed(constants, *columns, size=size)
    samplers[case] = {
      "compile_seconds": time.perf_counter() - began,
      "evaluations": len(table.t),
      "plan_bytes": planned,
    }

  def block(case: str, count: int) -> dict[str, Any]:
    began, cpu = time.perf_counter(), time.process_time()
    for number in range(count):
      draws[case](constants, index + number * size, *columns[1:])
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "images": count * size, **memory_used()}

  return {**device_facts(config), "batch_size": size, "samplers": samplers}, block
