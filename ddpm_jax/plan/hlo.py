"""Reads the text of an optimised HLO module, as `compiled.as_text()` prints it: what runs, and how often in a step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Array(NamedTuple):
  """An array in the type of an instruction's result."""

  bytes: int
  space: int  # 0: the main memory of the device; others lie on the chip


class Instruction(NamedTuple):
  """One instruction: its result, what it does, on what."""

  name: str
  result: str  # its type, such as 'f32[8,3]{1,0}' or '(f32[], s32[2]{0})'
  opcode: str
  operands: str  # the text between the parentheses
  attributes: str  # the rest of the line
  root: bool

  def operand_names(self) -> list[str]:
    """The instructions whose results it takes."""
    return re.findall(r"%([\w.\-]+)", self.operands)

  def called(self) -> dict[str, str]:
    """The computations that it names, by attribute; branches are 'branch0', 'branch1' and so on."""
    found = dict(_CALLED.findall(self.attributes))
    branches = _BRANCHES.search(self.attributes)
    names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
    return found | {f"branch{number}": name for number, name in enumerate(names)}


Computation = dict[str, Instruction]  # in the order of the text


class Module(NamedTuple):
  """A module: its computations by name, and the name of the one where it begins."""

  computations: dict[str, Computation]
  entry: str


class Step(NamedTuple):
  """An instruction that runs, and how often: None if the compiler does not say how often a loop around it turns."""

  computation: str
  instruction: Instruction
  times: int | None


def arrays(result: str) -> list[Array]:
  """The arrays of a type, in order; tokens have no bytes."""
  found = []
  for kind, dimensions, layout in _ARRAY.findall(result):
    size = math.prod(int(dimension) for dimension in dimensions.split(",") if dimension)
    space = _SPACE.search(layout)
    found.append(Array(size * _bits(kind) // 8, int(space[1]) if space else 0))
  return found


def _bits(kind: str) -> int:
  if kind == "pred":
    return 8
  number = re.search(r"\d+", kind)
  return int(number[0]) if number else 0


def parse(text: str) -> Module:
  """The module of `compiled.as_text()`. Raises ValueError if it has no entry."""
  computations: dict[str, Computation] = {}
  entry, inside = "", {}
  for line in text.splitlines():
    if not line.startswith(" "):
      header = _HEADER.match(line)
      if header:
        inside = computations.setdefault(header[2], {})
        entry = header[2] if header[1] else entry
      continue
    found = _INSTRUCTION.match(line)
    if found:
      instruction = _instruction(found[2], found[3], root=bool(found[1]))
      inside[instruction.name] = instruction
  if not entry:
    raise ValueError("the text is no HLO module: it has no ENTRY")
  return Module(computations, entry)


def _instruction(name: str, text: str, *, root: bool) -> Instruction:
  end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  opening = text.index("(", end)
  closing = _closing(text, opening)
  opcode = text[end:opening].strip()
  return Instruction(name, text[:end], opcode, text[opening + 1 : closing], text[closing + 1 :], root)


def _closing(text: str, opening: int) -> int:
  """Where the parenthesis at `opening` is closed."""
  depth = 0
  for place in range(opening, len(text)):
    depth += (text[place] == "(") - (text[place] == ")")
    if depth == 0:
      return place
  raise ValueError(f"a parenthesis is never closed: {text[:80]}")


def steps(module: Module, *, into_fusions: bool) -> Iterator[Step]:
  """Every instruction that runs, from the entry on, with the number of times; each branch of a condition once."""
  yield from _steps_of(module, module.entry, 1, into_fusions)


def _steps_of(module: Module, name: str, times: int | None, into_fusions: bool) -> Iterator[Step]:
  for instruction in module.computations[name].values():
    yield Step(name, instruction, times)
    called, inner = instruction.called(), times
    match instruction.opcode:
      case "while":
        trips = trip_count(module, name, instruction)
        inner = None if trips is None or times is None else times * trips
        followed = [called["body"]]
      case "fusion":
        followed = [called["calls"]] if into_fusions else []
      case "call" | "conditional" | "async-start":
        followed = list(called.values())
      case _:
        followed = []
    for target in followed:
      yield from _steps_of(module, target, inner, into_fusions)


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
  """How often a while loop turns: as the compiler says, or as its counter does, from 0 by 1 to below a constant.

  None if neither is there. XLA for TPUs leaves its own note out; JAX's scans have the counter.
  """
  noted = _TRIPS.search(loop.attributes)
  if noted:
    return int(noted[1])
  called = loop.called()
  condition, body = module.computations[called["condition"]], module.computations[called["body"]]
  test = _root(condition)
  if test.opcode != "compare" or "direction=LT" not in test.attributes:
    return None
  counter, limit = test.operand_names()
  place = _tuple_place(condition, counter)
  end, updated = _constant(condition, limit), _root(body)
  if place is None or end is None or updated.opcode != "tuple":
    return None
  start = _constant_in_tuple(module.computations[computation], loop.operand_names()[0], place)
  step = body.get(updated.operand_names()[place])
  if step is None or step.opcode != "add" or start != 0:
    return None
  old, by = step.operand_names()
  if _tuple_place(body, old) != place or _constant(body, by) != 1:
    return None
  return end


def _root(computation: Computation) -> Instruction:
  return next(instruction for instruction in computation.values() if instruction.root)


def _source(computation: Computation, name: str) -> Instruction:
  """The instruction of that name, or what it is a copy of."""
  found = computation[name]
  while found.opcode == "copy":
    found = computation[found.operand_names()[0]]
  return found


def _tuple_place(computation: Computation, name: str) -> int | None:
  """Which element of a computation's argument an instruction is, if it is one."""
  found = _source(computation, name)
  index = re.search(r"\bindex=(\d+)", found.attributes)
  return int(index[1]) if found.opcode == "get-tuple-element" and index else None


def _constant(computation: Computation, name: str) -> int | None:
  found = _source(computation, name)
  return int(found.operands) if found.opcode == "constant" and re.fullmatch(r"-?\d+", found.operands) else None


def _constant_in_tuple(computation: Computation, name: str, place: int) -> int | None:
  found = computation[name]
  return _constant(computation, found.operand_names()[place]) if found.opcode == "tuple" else None
