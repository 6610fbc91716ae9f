"""`--parallel=fsdp`: every device holds a part of the state, gathers the parameters for a step, and keeps its part.

The step is one `jax.jit` over the mesh, to which XLA adds what the devices send each other.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ddpm_jax.devices.mesh import AXIS, DeviceMesh, PinnedStep, Tree
from ddpm_jax.devices.steps import run_steps


class FsdpMesh(DeviceMesh):
  """The state is sharded: each array along its longest axis that the devices divide."""

  strategy = "fsdp"

  def state_shardings(self, abstract_state: Tree) -> Tree:
    """Each leaf cut along its longest divisible axis; whole where there is none."""
    return jax.tree.map(self._leaf_sharding, abstract_state)

  def _leaf_sharding(self, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    for axis in sorted(range(len(leaf.shape)), key=lambda axis: -leaf.shape[axis]):
      if leaf.shape[axis] % self.num_devices == 0:
        return NamedSharding(self.jax_mesh, PartitionSpec(*(None,) * axis, AXIS))
    return self.replicated

  def wrap_loss(self, loss_fn: Callable[..., tuple[Tree, Tree]]) -> Callable[..., tuple[Tree, Tree]]:
    """The loss whose devices take their rows each, with parameters that are whole.

    Left alone, XLA would cut the activations where the parameters are cut, and send them around; and it would sum
    gradients over the devices in the type of the product that each is made of. Here they are summed in that of the
    parameters, float32.
    """

    def of_a_device(params: Tree, *rest: Tree) -> tuple[Tree, Tree]:
      params = jax.lax.pcast(params, AXIS, to="varying")  # whose transpose is the sum over the devices
      terms, per_example = loss_fn(params, *rest)
      return jax.lax.pmean(terms, AXIS), per_example

    rows, whole = PartitionSpec(AXIS), PartitionSpec()
    in_specs = (whole, whole, whole, rows, rows)
    return jax.shard_map(of_a_device, mesh=self.jax_mesh, in_specs=in_specs, out_specs=(whole, rows))

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

    def steps(state: Tree, batches: Tree, commands: jax.Array, further: Tree):
      command = jnp.max(commands, axis=0)
      step = functools.partial(train_step, axis_name=None, **further)
      return *run_steps(step, state, batches, command[0], max_steps=max_steps), command[1:]

    shardings, placed = self.state_shardings(abstract_state), self._placed(arguments)
    of_further = jax.tree.map(lambda leaf: leaf.sharding, placed)
    jitted = jax.jit(
      steps,
      in_shardings=(shardings, self._batches_sharding(max_steps), self.split, of_further),
      out_shardings=(shardings, self.replicated, self.replicated),
      donate_argnums=0,
    )
    return PinnedStep(jitted, self.matmul_precision, placed)

  def put_batches(self, batches: Sequence[dict[str, np.ndarray]], *, max_steps: int = 1) -> dict[str, jax.Array]:
    """Arrays [B, ...], or [max_steps, B, ...]; see `DeviceMesh.put_batches`."""

    def put(*rows: np.ndarray) -> jax.Array:
      together = rows[0] if max_steps == 1 else np.stack(rows)
      return jax.make_array_from_process_local_data(self._batches_sharding(max_steps), together)

    return jax.tree.map(put, *batches, *[batches[-1]] * (max_steps - len(batches)))

  def abstract_batches(
    self, batch: dict[str, jax.ShapeDtypeStruct], *, max_steps: int = 1
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """See `DeviceMesh.abstract_batches`."""

    def place(rows: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      shape = (max_steps, *rows.shape) if max_steps > 1 else rows.shape
      return jax.ShapeDtypeStruct(shape, rows.dtype, sharding=self._batches_sharding(max_steps))

    return jax.tree.map(place, batch)

  def _batches_sharding(self, max_steps: int) -> NamedSharding:
    return self.split if max_steps == 1 else NamedSharding(self.jax_mesh, PartitionSpec(None, AXIS))

  def gathered(self, tree: Tree) -> Tree:
    """See `DeviceMesh.gathered`."""
    return jax.lax.with_sharding_constraint(tree, self.replicated)
