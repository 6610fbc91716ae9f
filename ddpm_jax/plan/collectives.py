"""What the devices send each other in one step, read from the compiled program."""

from __future__ import annotations

import re
from typing import NamedTuple

from ddpm_jax.plan import hlo

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_GRID = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_LISTS = re.compile(r"replica_groups=\{\{([\d,]*)\}")


class Collective(NamedTuple):
  """One collective of a step.

  Attributes:
    kind: one of KINDS.
    bytes: of the whole value on one device: what is reduced, what is there after gathering, what was there before
      scattering.
    group: devices that take part together, at least 1.
    times: how often in a step; None where a loop of unknown length is around it.
  """

  kind: str
  bytes: int
  group: int
  times: int | None

  @property
  def sent(self) -> float:
    """Bytes that each device sends at the least, each time (Thakur et al. 2005, Chan et al. 2007)."""
    share = (self.group - 1) / self.group
    match self.kind:
      case "all-reduce":
        return 2 * self.bytes * share
      case "collective-permute":
        return float(self.bytes)
      case _:
        return self.bytes * share


def collectives(module: hlo.Module, num_devices: int) -> list[Collective]:
  """The collectives of a module for that many devices, in the order in which they run.

  A TPU takes some apart into a chain of fusions, so that they run beside arithmetic. Each of them repeats the
  collective under the same chain_id, and counts once.
  """
  found, chains = [], set()
  for computation, instruction, times in hlo.steps(module, into_fusions=True):
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
      continue
    chain = re.search(r'chain_id="([^"]*)"', instruction.attributes)
    if chain and chain[1] in chains:
      continue
    chains |= {chain[1]} if chain else set()
    group = _group(instruction.attributes, num_devices)
    size = sum(array.bytes for array in _results(instruction))
    if kind == "reduce-scatter":
      size *= group
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):  # a TPU's name for the two in one
      kind = "reduce-scatter"
    found.append(Collective(kind, size, group, times))
  return found


def _results(instruction: hlo.Instruction) -> list[hlo.Array]:
  """The arrays that come out. A start other than that of an all-reduce holds its operands first, then the results."""
  found = hlo.arrays(instruction.result)
  if instruction.opcode in ("all-gather-start", "collective-permute-start"):
    operands = len(instruction.operand_names())
    return found[operands : 2 * operands]
  return found


def _group(attributes: str, num_devices: int) -> int:
  """How many devices are in a group: '{{0,1},{2,3}}', '[2,2]<=[4]' or "mesh['x'=2,'y'=2] {'y'}"; '{}' is all."""
  mesh = _MESH.search(attributes)
  if mesh:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    group = 1
    for axis in re.findall(r"'(\w+)'", mesh[2]):
      group *= int(sizes[axis])
    return group
  grid = _GRID.search(attributes)
  if grid:
    return int(grid[1])
  lists = _LISTS.search(attributes)
  return len(lists[1].split(",")) if lists else num_devices
