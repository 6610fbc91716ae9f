"""The devices of a job: their mesh, the strategies pmap and fsdp, functions of many rows, exchange between hosts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddpm_jax.devices.fsdp import FsdpMesh
from ddpm_jax.devices.mesh import DeviceMesh
from ddpm_jax.devices.pmap import PmapMesh

STRATEGIES = {mesh.strategy: mesh for mesh in (PmapMesh, FsdpMesh)}


def make_mesh(strategy: str, devices: Sequence[Any] | None = None, *, matmul_precision: str = "default") -> DeviceMesh:
  """The mesh over all devices of all processes, with the strategy that `--parallel` names.

  Args:
    strategy: 'pmap' or 'fsdp'.
    devices: JAX's, for the mesh; None: all that JAX has. For others, such as those of a topology that is not here, a
      step can be compiled, but they hold no arrays.
    matmul_precision: of products and convolutions in all that is compiled for the mesh, see `numerics.pinned`.

  Raises:
    UserError: if JAX has no device.
    ValueError: unknown strategy.
  """
  if strategy not in STRATEGIES:
    raise ValueError(f"unknown strategy {strategy!r}, not one of {', '.join(STRATEGIES)}")
  return STRATEGIES[strategy](devices, matmul_precision=matmul_precision)
