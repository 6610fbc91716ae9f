"""The mesh of devices: placements, and the interface of the two strategies by which devices share a training step.

Between steps the state is a tree of global arrays over a one-dimensional mesh ("data"): replicated for pmap, sharded
for fsdp. Both run the same pure `train_step` and give the same numbers to float32 rounding.
"""

from __future__ import annotations

import abc
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddpm_jax.errors import UserError
from ddpm_jax.runtime import cpu, numerics

AXIS = "data"
Tree = Any
Batch = dict[str, Any]


class DeviceMesh(abc.ABC):
  """A one-dimensional mesh over all devices of all processes, and a strategy; made by `devices.make_mesh`.

  Attributes:
    strategy: 'pmap' or 'fsdp'.
    matmul_precision: of products and convolutions in all that is compiled here, see `numerics.pinned`.
    num_devices: in the mesh.
    platform: JAX's name of the devices' platform: 'cpu', 'gpu' or 'tpu'.
    jax_mesh: JAX's mesh, with the one axis `AXIS`.
    replicated: the placement of an array that is whole on each device.
    split: the placement of rows, of which each device has its part.
  """

  strategy: ClassVar[str]

  def __init__(self, devices: Sequence[Any] | None, *, matmul_precision: str):
    """As `devices.make_mesh` says."""
    self.matmul_precision = matmul_precision
    self._chosen_devices = devices
    if devices is None:
      try:
        devices = jax.devices()
      except (RuntimeError, AssertionError) as error:  # the latter, without a word, for `cuda` where no plugin is
        reason = next(
          iter(str(error).splitlines()), f"no installed plugin provides JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
        )
        raise UserError(f"JAX finds no device ({reason}); correct JAX_PLATFORMS or the installation of JAX") from error
    self.num_devices = len(devices)
    self.platform: str = devices[0].platform
    # In the order of pmap. jax.make_mesh may choose another one on a TPU, and the state would move at every step.
    self.jax_mesh = Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))
    self.replicated = NamedSharding(self.jax_mesh, PartitionSpec())
    self.split = NamedSharding(self.jax_mesh, PartitionSpec(AXIS))
    self._commands: dict[tuple[int, bool, bool], jax.Array] = {}

  @property
  def once(self) -> dict[str, Any] | None:
    """XLA's options for a program that runs once, as `jax.jit` takes them."""
    return cpu.RUNS_ONCE if self.platform == "cpu" else None

  # The strategy.

  @abc.abstractmethod
  def state_shardings(self, abstract_state: Tree) -> Tree:
    """The placement of each leaf of the state."""

  @abc.abstractmethod
  def wrap_loss(self, loss_fn: Callable[..., tuple[Tree, Tree]]) -> Callable[..., tuple[Tree, Tree]]:
    """An objective's loss, (params, extra, frozen, batch, keys) -> (terms, per_example), for the compiled step."""

  @abc.abstractmethod
  def compile(
    self,
    train_step: Callable,
    abstract_state: Tree,
    *,
    max_steps: int = 1,
    arguments: Mapping[str, Tree] = types.MappingProxyType({}),
    packs: bool = True,
  ) -> PinnedStep:
    """`train_step(state, batch, axis_name=...)` as a function of placed arrays; it consumes (donates) its state.

    Args:
      train_step: one training step.
      abstract_state: shapes and types of the state.
      max_steps: the most steps of one call. If more than one, the metrics have a leading axis [max_steps].
      arguments: further keyword arguments of `train_step`, which are data of the program and no constants in it: with
        other values it is the same program. Each is a NumPy scalar, or a tree of arrays that `place` returned; of
        ShapeDtypeStructs with shardings, if the step is lowered and never called.
      packs: whether it may be given packed parameters (`cpu.pack`), where those take less time.

    Returns:
      (state, batches, command) -> (state, metrics, votes). The batches are those of `put_batches`, the command that of
      `put_step_command`: it says how many steps to make, so that one program is enough, and carries the votes by which
      the processes agree. The votes are int32 [2]: 1 where any process wants to stop, where any wants a sample grid.
    """

  @abc.abstractmethod
  def put_batches(self, batches: Sequence[dict[str, np.ndarray]], *, max_steps: int = 1) -> dict[str, jax.Array]:
    """This process's rows [B / processes, ...] of the next global batches, as the compiled step takes them.

    If they are fewer than `max_steps`, the last one stands for what is missing.
    """

  @abc.abstractmethod
  def abstract_batches(
    self, batch: dict[str, jax.ShapeDtypeStruct], *, max_steps: int = 1
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `put_batches` returns, for global batches of these shapes [B, ...]."""

  def to_global_array(self, state: Tree) -> Tree:
    """The state that a step returned as global arrays."""
    return state

  def gathered(self, tree: Tree) -> Tree:
    """Within a compiled function: arrays that are placed as those of the state, whole on each device."""
    return tree

  @property
  def lowers_shapes(self) -> bool:
    """Whether the compiled step can be lowered without arrays."""
    return True

  # What is common.

  @property
  def compiles_beside_steps(self) -> bool:
    """Whether XLA may compile while the devices compute. For a GPU it tries algorithms out there, and takes memory."""
    return self.platform != "gpu"

  @property
  def attention(self) -> str:
    """What computes attention: 'cudnn' on NVIDIA's GPUs from compute capability 8.0 on, else 'xla'."""
    found = re.fullmatch(r"(\d+)\.\d+", str(getattr(self.jax_mesh.devices.flat[0], "compute_capability", "")))
    return "cudnn" if self.platform == "gpu" and found and int(found[1]) >= 8 else "xla"

  def check_batch(self, batch_size: int, grad_accum_steps: int = 1, *, fixed: bool = False) -> None:
    """Raises UserError if the devices do not divide the global batch, or a part of it.

    fixed: the run was trained with that batch size, and goes on with no other.
    """
    rows = self.num_devices * grad_accum_steps
    fewer = [n for n in range(1, self.num_devices) if batch_size % (n * grad_accum_steps) == 0]
    if batch_size % rows and fixed and fewer:
      raise UserError(
        f"batch_size: {batch_size}, which this run keeps, cannot be divided among {self.num_devices} devices; use "
        f"{' or '.join(map(str, fewer[-3:]))} of them, or more that divide it"
      )
    if batch_size % rows:
      below, above = batch_size // rows * rows, (batch_size // rows + 1) * rows
      parts = f" times grad_accum_steps={grad_accum_steps}" if grad_accum_steps > 1 else ""
      raise UserError(
        f"batch_size: {batch_size} cannot be divided among {self.num_devices} devices{parts}; use "
        f"--batch_size={f'{below} or {above}' if below else above}"
      )

  def abstract_inputs(
    self, batch: dict[str, jax.ShapeDtypeStruct], *, max_steps: int = 1
  ) -> tuple[dict[str, Any], jax.ShapeDtypeStruct]:
    """Global batches [B, ...] and the command as the compiled step takes them: to lower it without arrays."""
    command = jax.ShapeDtypeStruct((self.num_devices, 3), jnp.int32, sharding=self.split)
    return self.abstract_batches(batch, max_steps=max_steps), command

  def put_step_command(self, num_steps: int = 1, *, stop: bool = False, grid: bool = False) -> jax.Array:
    """How many steps to make, and this process's votes to stop and for a sample grid, as the compiled step takes it."""
    command = num_steps, stop, grid
    if command not in self._commands:
      rows = np.tile(np.asarray(command, np.int32), (jax.local_device_count(), 1))
      self._commands[command] = jax.make_array_from_process_local_data(self.split, rows)
    return self._commands[command]

  def put_rows(self, columns: Sequence[np.ndarray]) -> list[jax.Array]:
    """Columns [B, ...], whole on every process, with B a multiple of the devices: placed, each device its rows."""
    return [
      jax.make_array_from_callback(column.shape, self.split, lambda piece, column=column: column[piece])
      for column in columns
    ]

  def put_whole(self, array: np.ndarray) -> jax.Array:
    """An array that is the same on every process, placed whole on each device."""
    return jax.make_array_from_callback(array.shape, self.replicated, lambda piece: array[piece])

  def place(self, tree: Tree) -> Tree:
    """NumPy arrays that are the same on every process, placed as those of a state."""
    return jax.tree.map(
      lambda leaf, sharding: jax.make_array_from_callback(leaf.shape, sharding, lambda piece: leaf[piece]),
      tree,
      self.state_shardings(tree),
    )

  def _placed(self, arguments: Mapping[str, Tree]) -> dict[str, Tree]:
    """Those of `compile`, with its NumPy scalars whole on each device."""
    return {
      name: self.put_whole(np.asarray(value)) if isinstance(value, np.generic) else value
      for name, value in arguments.items()
    }


class PinnedStep:
  """A jitted or pmapped training step with further arguments, traced, lowered and called under `numerics.pinned`."""

  def __init__(self, step: Any, matmul_precision: str, further: Mapping[str, Tree]):
    self._step, self._matmul_precision, self._further = step, matmul_precision, further

  def __call__(self, *arguments: Any) -> Any:
    """Runs the step; compiles it first if it has to."""
    with numerics.pinned(self._matmul_precision):
      return self._step(*arguments, self._further)

  def lower(self, *arguments: Any) -> Any:
    """A `jax.stages.Lowered`, as what `jax.jit` returns has it."""
    with numerics.pinned(self._matmul_precision):
      return self._step.lower(*arguments, self._further)
