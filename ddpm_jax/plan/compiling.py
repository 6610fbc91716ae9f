"""Compiles the real training step for a batch size, and reads what it needs from the compiled program."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from ddpm_jax import config as config_lib
from ddpm_jax.devices import make_mesh
from ddpm_jax.plan import hlo, traffic
from ddpm_jax.plan.collectives import Collective, collectives
from ddpm_jax.plan.topology import OutOfMemory, out_of_memory
from ddpm_jax.training.setup import Run, make_train_step
from ddpm_jax.training.step import abstract_batch


class Memory(NamedTuple):
  """Bytes on one device while a step runs, by kind; each byte once.

  Attributes:
    parameters, average, optimizer: of the state. It is donated: the new state takes the place of the old one.
    counters: the number of training steps, what went wrong in them, and what a loss keeps.
    batch: images, their indices, and the command: how many steps to make.
    padding: what the device's layout adds to all of these.
    temporaries: activations, gradients and whatever else lives within a step.
    outputs: the metrics.
    program: the compiled code.
    frozen: parameters of networks that do not train: a first stage, also its decoder, which no step reads but the
      sample grids do; a perceptual network.
  """

  parameters: int
  average: int
  optimizer: int
  counters: int
  batch: int
  padding: int
  temporaries: int
  outputs: int
  program: int
  frozen: int = 0

  @property
  def total(self) -> int:
    """The sum."""
    return sum(self)

  @property
  def fixed(self) -> int:
    """What does not grow with the batch."""
    return self.total - self.temporaries - self.batch


class CompiledStep(NamedTuple):
  """What one device needs and does in a step.

  Attributes:
    batch_size: images in the step, over all devices.
    memory: by kind.
    flops: floating-point operations, as XLA counts them in the compiled program; on a CPU before it is compiled, as
      there they are hidden in calls of libraries.
    bytes: between its main memory and its arithmetic, see `traffic.main_memory_bytes`. On a CPU only what goes in and
      comes out: its caches hold part of the rest, and the program does not say which.
    collectives: what the devices send each other.
  """

  batch_size: int
  memory: Memory
  flops: float
  bytes: int
  collectives: list[Collective]

  @property
  def sent(self) -> float:
    """Bytes that the device sends to others, at the least; a collective in a loop of unknown length counts once."""
    return sum(c.sent * (1 if c.times is None else c.times) for c in self.collectives)


def compile_step(run: Run, batch_size: int) -> CompiledStep | OutOfMemory:
  """Compiles the step for that global batch; OutOfMemory if the compiler refuses it for that.

  Args:
    run: of the devices to compile for, with abstract state.
    batch_size: a multiple of the devices times `grad_accum_steps`.
  """
  batch, command = run.mesh.abstract_inputs(abstract_batch(run.image_shape, batch_size, labels=run.conditional))
  step = run.mesh.compile(make_train_step(run), run.abstract_state, arguments={"frozen": run.frozen})
  try:
    compiled = step.lower(run.abstract_state, batch, command).compile()
  except jax.errors.JaxRuntimeError as error:
    refused = out_of_memory(error)
    if refused is None:
      raise
    return refused
  module, stats = hlo.parse(compiled.as_text()), compiled.memory_analysis()
  has_caches = run.mesh.platform == "cpu"
  return CompiledStep(
    batch_size=batch_size,
    memory=_memory(run, (batch, command), stats, _not_read(run, compiled)),
    flops=(
      _operations(run, batch_size, parts=1) / run.mesh.num_devices
      if has_caches
      else compiled.cost_analysis()["flops"] * _parts_not_counted(run, batch_size)
    ),
    bytes=(
      stats.argument_size_in_bytes + stats.output_size_in_bytes if has_caches else traffic.main_memory_bytes(module)
    ),
    collectives=collectives(module, run.mesh.num_devices),
  )


def _memory(run: Run, inputs: Any, stats: Any, not_read: int = 0) -> Memory:
  """not_read: bytes of `run.frozen` that lie on the device and are no argument of the program."""
  state = run.abstract_state
  parts = {
    "parameters": _bytes(state.params),
    "average": _bytes(state.ema),
    "optimizer": _bytes(state.opt_state),
    "counters": _bytes((state.step, state.counts, state.extra)),
    "batch": _bytes(inputs),
    "frozen": _bytes(run.frozen),
  }
  return Memory(
    **parts,
    padding=stats.argument_size_in_bytes + not_read - sum(parts.values()),
    temporaries=stats.temp_size_in_bytes,
    outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
    program=stats.generated_code_size_in_bytes,
  )


def _not_read(run: Run, compiled: Any) -> int:
  """Of `run.frozen`, on one device: JAX leaves out what a program does not read, and has no sharding for it."""
  ((*_, further), _) = compiled.input_shardings
  read = jax.tree.leaves(further["frozen"], is_leaf=lambda leaf: leaf is None)
  return _bytes([leaf for leaf, sharding in zip(jax.tree.leaves(run.frozen), read, strict=True) if sharding is None])


def _bytes(tree: Any) -> int:
  """Of a tree of placed shapes, on one device."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _parts_not_counted(run: Run, batch_size: int) -> float:
  """By what XLA's count of operations must be multiplied: it counts one part of --grad_accum_steps, as loops once.

  The factor is that of the same step before it is compiled, on one device, with its batch in one part.
  """
  parts = run.config.train.grad_accum_steps
  return 1.0 if parts == 1 else _operations(run, batch_size, parts=1) / _operations(run, batch_size, parts=parts)


def _operations(run: Run, batch_size: int, *, parts: int) -> float:
  """XLA's count for the step before it is compiled, on one device, with `parts` for --grad_accum_steps; loops once."""
  config = config_lib.override(run.config, {"grad_accum_steps": parts})
  # fsdp divides the loss among its devices, and of that XLA would count the part of one.
  run = run._replace(config=config, mesh=make_mesh("pmap", list(run.mesh.jax_mesh.devices[:1])))
  state, frozen = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (run.abstract_state, run.frozen)
  )
  batch = abstract_batch(run.image_shape, batch_size, labels=run.conditional)
  traced = jax.jit(make_train_step(run)).trace(state, batch, frozen=frozen)
  # As for a TPU: for a CPU, convolutions would be loops.
  cost = traced.lower(lowering_platforms=("tpu",)).cost_analysis()
  assert cost
  return cost["flops"]
