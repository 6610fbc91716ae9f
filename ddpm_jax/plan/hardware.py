"""What a device can do at its best: published numbers for TPUs, measured ones for the CPU at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.plan.topology import Topology


class Peaks(NamedTuple):
  """The most that one device can do.

  Attributes:
    flops: floating-point operations a second.
    bandwidth: bytes a second between its main memory and its arithmetic, reads and writes together.
    interconnect: bytes a second that it sends to others, over all its links; None if unknown.
    source: where the numbers are from, in words.
  """

  flops: float
  bandwidth: float
  interconnect: float | None
  source: str


# For each chip, by JAX's device_kind: bfloat16 TFLOP/s, memory in GB/s, interconnect in GB/s, both directions and all
# links together. From the "System architecture" tables of Google Cloud's TPU documentation,
# https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (where editions of a page differ, the larger number). The
# page of v4 has no interconnect; an earlier edition of /v5e compares it: 2400 Gbit/s in each direction. v3 is from
# /v3 and, for its 4 links of 656 Gbit/s in each direction, Jouppi et al., CACM 63(7), 2020.
# A float32 product with JAX's default precision is one bfloat16 pass with float32 sums, so one number is the peak of
# both types; a TPU has no other unit for products.
TPUS = {
  "TPU v3": (123, 900, 656),
  "TPU v4": (275, 1200, 600),
  "TPU v5 lite": (197, 819, 400),  # v5e
  "TPU v5": (459, 2765, 1200),  # v5p
  "TPU v6 lite": (918, 1640, 800),  # v6e, Trillium
}
_SIZE = 2048  # rows and columns of the product that is measured
_COPY = 2**26  # float32 numbers of the array that is copied: more than a CPU's caches hold


def peaks(topology: Topology) -> Peaks | None:
  """The peaks of one device of a topology; None if nobody has published any. Measures on 'cpu', for a few seconds."""
  if topology.name == "cpu":
    return _measured(topology)
  if topology.kind not in TPUS:
    return None
  flops, bandwidth, interconnect = TPUS[topology.kind]
  share = topology.chips / len(topology.devices)
  return Peaks(
    flops=flops * 1e12 * share,
    bandwidth=bandwidth * 1e9 * share,
    interconnect=interconnect / 2 * 1e9 * share,
    source="published by Google; bfloat16 products, as which float32 ones run too",
  )


def _measured(topology: Topology) -> Peaks:
  """Of this machine, divided among its devices: they share its cores."""
  device, count = topology.devices[0], len(topology.devices)
  square = jax.device_put(jnp.ones((_SIZE, _SIZE), jnp.float32), device)
  line = jax.device_put(jnp.ones((_COPY,), jnp.float32), device)
  product = _seconds(jax.jit(lambda x: jnp.matmul(x, x)), square)
  copy = _seconds(jax.jit(lambda x: x + 1), line)
  return Peaks(
    flops=2 * _SIZE**3 / product / count,
    bandwidth=2 * line.nbytes / copy / count,
    interconnect=None,
    source=f"measured here: a float32 product of {_SIZE} x {_SIZE} matrices, a copy of {line.nbytes // 2**20} MiB",
  )


def _seconds(function: Callable[[jax.Array], Any], argument: jax.Array) -> float:
  """The shortest of five runs, after one that compiles."""
  jax.block_until_ready(function(argument))
  times = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(function(argument))
    times.append(time.perf_counter() - start)
  return min(times)
