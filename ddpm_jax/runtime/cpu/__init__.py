"""All that makes programs faster on CPUs; the results are the same to rounding.

It wraps plain code from outside: `models.build` gives the network its convolutions, `devices` packs the state for a
call of several steps, and compiles with `RUNS_ONCE`. `materialize` alone stands within what it is for,
`training.optimizer`. What is arranged with XLA and the operating system before JAX starts is in `runtime.compilation`
and `runtime.hugepages`.
"""

from __future__ import annotations

from typing import Any

import jax

from ddpm_jax.runtime.cpu.convolution import convolve
from ddpm_jax.runtime.cpu.packed import pack, unpack

__all__ = ["RUNS_ONCE", "convolve", "materialize", "pack", "unpack"]

# XLA's options for a program that runs once, most of whose time is its compilation; the same bits. The initial state of
# emoji64_ae took 92 s to compile with JAX 0.12, and 13 s with this, that of the digits 23 and 9 (2 cores of a shared
# Intel Xeon beside other work, 2026-11-30).
RUNS_ONCE = {"xla_backend_optimization_level": 1}


def materialize(tree: Any) -> Any:
  """The same arrays. On CPUs, XLA computes them anew wherever they are used, unless it is kept from that.

  Elsewhere one pass over the memory yields several results, and nothing may come between. On 2 cores of a shared AMD
  EPYC the optimizer's part of a step on the digits took 5.40 ms of CPU time with it and 5.58 without (2026-11-29, in
  turns). It is little; it stays because the last bits of earlier runs depend on it.
  """
  return jax.lax.platform_dependent(tree, cpu=jax.lax.optimization_barrier, default=lambda tree: tree)
