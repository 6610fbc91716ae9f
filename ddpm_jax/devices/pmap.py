"""`--parallel=pmap`: every device holds the whole state, takes its rows, and averages the gradients with the others.

`jax.pmap` is in maintenance mode upstream, where it is now a thin layer over jit(shard_map); it is asked for here.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ddpm_jax.devices.mesh import AXIS, DeviceMesh, PinnedStep, Tree
from ddpm_jax.devices.steps import run_steps
from ddpm_jax.runtime import cpu


class PmapMesh(DeviceMesh):
  """The state is replicated. With `in_axes=None` it has no axis of devices: it is global, as that of fsdp is."""

  strategy = "pmap"

  def state_shardings(self, abstract_state: Tree) -> Tree:
    """Every leaf whole on each device."""
    return jax.tree.map(lambda _: self.replicated, abstract_state)

  def wrap_loss(self, loss_fn: Callable[..., tuple[Tree, Tree]]) -> Callable[..., tuple[Tree, Tree]]:
    """The loss as it is: the step runs on each device with its rows, and `train_step` averages over `axis_name`.

    Its parameters may be packed (`cpu.pack`); the gradient is then, too.
    """
    return lambda params, *rest: loss_fn(cpu.unpack(params), *rest)

  def compile(
    self,
    train_step: Callable,
    abstract_state: Tree,
    *,
    max_steps: int = 1,
    arguments: Mapping[str, Tree] = types.MappingProxyType({}),
    packs: bool = True,
  ) -> PinnedStep:
    """See `DeviceMesh.compile`."""
    # Elsewhere than on CPUs a kernel's shape has a layout in memory.
    packs = packs and max_steps > 1 and self.platform == "cpu"

    def steps(state: Tree, batches: Tree, command: jax.Array, further: Tree):
      command = jax.lax.pmax(command, AXIS)
      num_steps, votes = command[0], command[1:]
      step = functools.partial(train_step, axis_name=AXIS, **further)
      state = cpu.pack(state, state.params) if packs else state
      state, metrics = run_steps(step, state, batches, num_steps, max_steps=max_steps)
      return cpu.unpack(state) if packs else state, metrics, votes

    mapped = jax.pmap(
      steps,
      axis_name=AXIS,
      in_axes=(None, 0, 0, None),
      out_axes=None,
      donate_argnums=0,
      devices=self._chosen_devices,
    )
    return PinnedStep(mapped, self.matmul_precision, self._placed(arguments))

  def put_batches(self, batches: Sequence[dict[str, np.ndarray]], *, max_steps: int = 1) -> dict[str, jax.Array]:
    """Arrays [devices, B / devices, ...], or [devices, max_steps, B / devices, ...]; see `DeviceMesh.put_batches`."""

    def put(*rows: np.ndarray) -> jax.Array:
      by_device = [_by_device(part, jax.local_device_count()) for part in rows]
      together = by_device[0] if max_steps == 1 else np.stack(by_device, axis=1)
      return jax.make_array_from_process_local_data(self.split, together)

    return jax.tree.map(put, *batches, *[batches[-1]] * (max_steps - len(batches)))

  def abstract_batches(
    self, batch: dict[str, jax.ShapeDtypeStruct], *, max_steps: int = 1
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """See `DeviceMesh.abstract_batches`."""

    def place(rows: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      size, *rest = rows.shape
      several = (max_steps,) if max_steps > 1 else ()
      shape = (self.num_devices, *several, size // self.num_devices, *rest)
      return jax.ShapeDtypeStruct(shape, rows.dtype, sharding=self.split)

    return jax.tree.map(place, batch)

  def to_global_array(self, state: Tree) -> Tree:
    """Joins the copies: after a pmap over several processes each of them holds its own."""
    if jax.process_count() == 1:
      return state

    def join(leaf: jax.Array) -> jax.Array:
      copies = [shard.data for shard in leaf.addressable_shards]
      return jax.make_array_from_single_device_arrays(leaf.shape, self.replicated, copies)

    return jax.tree.map(join, state)

  @property
  def lowers_shapes(self) -> bool:
    """False over several processes, where `jax.pmap` wants arrays."""
    return jax.process_count() == 1


def _by_device(rows: Any, devices: int) -> Any:
  """[B, ...] -> [devices, B / devices, ...]."""
  return rows.reshape(devices, len(rows) // devices, *rows.shape[1:])
