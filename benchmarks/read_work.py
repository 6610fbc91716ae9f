"""A worker's work: reading batches as training does, without training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from absl import flags as absl_flags

from benchmarks import hardware
from ddpm_jax import config as config_lib
from ddpm_jax.data.pipeline import batches
from ddpm_jax.data.sources import open_source

IN_MEMORY = 1e6  # GiB of --cache_gib: everything is kept


def prepare(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str, int], dict[str, Any]]]:
  """Opens the data set in both ways.

  Args:
    job: `config`, as JSON.

  Returns:
    Facts, and a function for the cases 'memory' and 'disk', where `count` batches are read of an opened data set, and
    'memory, first pass' and 'disk, first pass', where `count` times the data set is opened and read once.
  """
  config = config_lib.from_json(job["config"])
  ways = {
    name: config_lib.override(config, {"cache_gib": gib}).data for name, gib in (("memory", IN_MEMORY), ("disk", 0.0))
  }
  sources = {name: open_source(data) for name, data in ways.items()}
  size = config.data.batch_size

  threads, workers = config.data.data_threads, config.data.data_workers
  absl_flags.FLAGS.mark_as_parsed()  # Grain's worker processes want to know

  def block(case: str, count: int) -> dict[str, Any]:
    way, _, first = case.partition(", ")
    seconds = cpu_seconds = images = 0
    for _ in range(count if first else 1):
      if first:
        hardware.forget(ways[way].dataset)
      began, cpu = time.perf_counter(), time.process_time()
      source = open_source(ways[way]) if first else sources[way]
      stream = batches(source, batch_size=size, seed=config.train.seed, start_step=0, threads=threads, workers=workers)
      with contextlib.closing(stream):
        if not first:  # they all read before the clock starts
          for _ in range(max(1, workers)):
            next(stream)
          began, cpu = time.perf_counter(), time.process_time()
        images += sum(len(next(stream)["image"]) for _ in range(-(-len(source) // size) if first else count))
        seconds += time.perf_counter() - began
        cpu_seconds += time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "images": images, "process_bytes": hardware.peak_rss()}

  source = sources["disk"]
  return {"images": len(source), "image_shape": source.image_shape, "versions": hardware.versions("grain")}, block
