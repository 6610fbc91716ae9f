"""How many bytes one step moves between a device's memory and its arithmetic, read from the compiled program."""

from __future__ import annotations

from ddpm_jax.plan import hlo

# They move nothing themselves: what is inside of the last ones counts for itself.
_FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"})
_FREE |= {"replica-id", "iota", "while", "call", "conditional", "async-start", "async-update", "async-done"}


def main_memory_bytes(module: hlo.Module) -> int:
  """Bytes that one device reads from and writes to its main memory in a step.

  Each instruction reads its operands and writes its result, once, as XLA's own cost analysis counts; a fusion is one
  instruction. Two things differ from there: what XLA keeps on the chip counts nothing, and what is in a loop counts as
  often as the loop turns (once if that is unknown).
  """
  total = 0
  for computation, instruction, times in hlo.steps(module, into_fusions=False):
    opcode, known = instruction.opcode, module.computations[computation]
    if opcode in _FREE:
      continue
    moved = 0
    if not opcode.endswith("-done"):
      moved += sum(_in_main_memory(known[name].result) for name in instruction.operand_names() if name in known)
    if not opcode.endswith("-start"):
      moved += _in_main_memory(instruction.result)
    total += moved * (1 if times is None else times)
  return total


def _in_main_memory(result: str) -> int:
  return sum(array.bytes for array in hlo.arrays(result) if array.space == 0)
