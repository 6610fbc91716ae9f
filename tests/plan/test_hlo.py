"""The reader of HLO: on text by hand, in the manner of a TPU's compiler, and on what XLA writes for the CPU."""

import collections

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.plan import hlo

# A loop as XLA for TPUs leaves it: no known_trip_count, counters behind copies, a buffer on the chip (S(1)).
LOOP = """HloModule jit_f, is_scheduled=true

%inner (p.0: f32[8]) -> f32[8] {
  %p.0 = f32[8]{0:T(128)S(1)} parameter(0)
  ROOT %negate.1 = f32[8]{0:T(128)S(1)} negate(%p.0)
}

%body (arg.0: (s32[], f32[8])) -> (s32[], f32[8]) {
  %one = s32[]{:T(128)} constant(STEP)
  %arg.0 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg.0), index=0
  %copy.3 = s32[]{:T(128)} copy(%i)
  %add.2 = s32[]{:T(128)} add(%copy.3, %one), metadata={op_name="jit(f)/while/body/add"}
  %x = f32[8]{0:T(128)S(1)} get-tuple-element(%arg.0), index=1
  %fusion.1 = f32[8]{0:T(128)S(1)} fusion(%x), kind=kLoop, calls=%inner
  ROOT %tuple.11 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%add.2, /*index=1*/%fusion.1)
}

%cond (arg.3: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(8)
  %arg.3 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%arg.3), index=0
  ROOT %lt.0 = pred[]{:T(512)} compare(%j, %n), direction=DIRECTION
}

ENTRY %main (x.1: f32[8]) -> f32[8] {
  %zero = s32[]{:T(128)} constant(START)
  %copy.10 = s32[]{:T(128)} copy(%zero)
  %x.1 = f32[8]{0:T(128)} parameter(0)
  %tuple.13 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%copy.10, %x.1)
  %while = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) while(%tuple.13), condition=%cond, body=%body
  ROOT %out = f32[8]{0:T(128)S(1)} get-tuple-element(%while), index=1
}
"""


def loop(step="1", start="0", direction="LT"):
  return hlo.parse(LOOP.replace("STEP", step).replace("START", start).replace("DIRECTION", direction))


@pytest.mark.parametrize(
  ("result", "expected"),
  [
    ("f32[3,5]{1,0}", [(60, 0)]),
    ("f32[]", [(4, 0)]),
    ("pred[7]{0}", [(7, 0)]),
    ("bf16[64,32]{1,0:T(8,128)(2,1)S(1)}", [(4096, 1)]),
    ("(f8e4m3fn[4]{0}, /*index=1*/u4[6]{0}, token[], s64[2]{0:S(5)})", [(4, 0), (3, 0), (0, 0), (16, 5)]),
    ("f32[0,4]{1,0}", [(0, 0)]),
  ],
)
def test_bytes_of_a_type(result, expected):
  assert hlo.arrays(result) == expected


def test_an_instruction_is_taken_apart():
  module = loop()
  assert module.entry == "main" and set(module.computations) == {"inner", "body", "cond", "main"}
  root = module.computations["body"]["tuple.11"]
  assert root.opcode == "tuple" and root.root and root.operand_names() == ["add.2", "fusion.1"]
  assert root.result == "(s32[]{:T(128)}, f32[8]{0:T(128)S(1)})"
  assert module.computations["main"]["while"].called() == {"condition": "cond", "body": "body"}
  assert not module.computations["main"]["while"].root


def test_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match="no HLO module"):
    hlo.parse("HloModule nothing\n")


def test_a_counter_says_how_often_a_loop_turns():
  module = loop()
  assert hlo.trip_count(module, "main", module.computations["main"]["while"]) == 8
  counted = {s.instruction.name: s.times for s in hlo.steps(module, into_fusions=True)}
  assert (counted["x.1"], counted["add.2"], counted["negate.1"]) == (1, 8, 8)
  assert "negate.1" not in {s.instruction.name for s in hlo.steps(module, into_fusions=False)}


@pytest.mark.parametrize("change", [{"step": "2"}, {"start": "1"}, {"direction": "LE"}])
def test_any_other_loop_has_no_known_length(change):
  module = loop(**change)
  assert hlo.trip_count(module, "main", module.computations["main"]["while"]) is None
  counted = {s.instruction.name: s.times for s in hlo.steps(module, into_fusions=True)}
  assert (counted["x.1"], counted["add.2"], counted["negate.1"]) == (1, None, None)


def test_branches_are_followed_once_each():
  text = """ENTRY %main (x: f32[2], b: pred[]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = f32[2]{0} conditional(%b, %x, %x), branch_computations={%one, %two}
}

%one (p: f32[2]) -> f32[2] {
  ROOT %sine.1 = f32[2]{0} sine(%p)
}

%two (q: f32[2]) -> f32[2] {
  ROOT %cosine.1 = f32[2]{0} cosine(%q)
}
"""
  opcodes = collections.Counter(s.instruction.opcode for s in hlo.steps(hlo.parse(text), into_fusions=False))
  assert (opcodes["sine"], opcodes["cosine"]) == (1, 1)


@pytest.mark.parametrize("length", [3, 7])
def test_loops_of_jax_multiply(length):
  """Loops in loops: what XLA for the CPU writes itself."""

  def inner(x, _):
    return jax.lax.scan(lambda y, _: (jnp.dot(y, y), None), x, None, length=5)[0], None

  f = jax.jit(lambda x: jax.lax.scan(inner, x, None, length=length)[0])
  text = f.lower(jax.ShapeDtypeStruct((16, 16), jnp.float32)).compile().as_text()
  times = [s.times for s in hlo.steps(hlo.parse(text), into_fusions=True) if s.instruction.opcode == "dot"]
  assert times == [5 * length]


def test_a_loop_without_a_length():
  f = jax.jit(lambda x: jax.lax.while_loop(lambda y: y[0] > 0, lambda y: jnp.cos(y) * 2, x))
  module = hlo.parse(f.lower(jax.ShapeDtypeStruct((16,), jnp.float32)).compile().as_text())
  assert None in {s.times for s in hlo.steps(module, into_fusions=False)}
