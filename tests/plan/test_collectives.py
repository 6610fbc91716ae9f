"""What devices send each other: of programs that XLA compiled for 8 devices here, and of text as TPUs have it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ddpm_jax.devices import make_mesh
from ddpm_jax.devices.mesh import AXIS
from ddpm_jax.plan import hlo
from ddpm_jax.plan.collectives import Collective, collectives

MESH = make_mesh("pmap").jax_mesh
EVERYWHERE, SPLIT = PartitionSpec(), PartitionSpec(AXIS)


def compiled(function, shape, out=EVERYWHERE, into=SPLIT):
  """The collectives of a function of one device's share [shape] of a float32 array."""
  mapped = jax.shard_map(function, mesh=MESH, in_specs=into, out_specs=out)
  whole = (shape[0] * 8, *shape[1:]) if into else shape
  argument = jax.ShapeDtypeStruct(whole, jnp.float32, sharding=NamedSharding(MESH, into))
  return collectives(hlo.parse(jax.jit(mapped).lower(argument).compile().as_text()), 8)


def text(line, **others):
  """The collectives of an entry with one line, on 4 devices; others are further computations, by name."""
  extra = "".join(f"%{name} (p: f32[2]) -> f32[2] {{\n{lines}\n}}\n\n" for name, lines in others.items())
  entry = f"ENTRY %main (p: f32[2]) -> f32[2] {{\n  %p = f32[2]{{0}} parameter(0)\n{line}\n}}\n"
  return collectives(hlo.parse(extra + entry), 4)


@pytest.mark.parametrize(
  ("function", "options", "expected"),
  [
    (lambda x: jax.lax.psum(x, AXIS), {}, Collective("all-reduce", 400, 8, 1)),
    (lambda x: jax.lax.all_gather(x, AXIS), {"out": SPLIT}, Collective("all-gather", 3200, 8, 1)),
    (
      lambda x: jax.lax.psum_scatter(jnp.tile(x, (8, 1)), AXIS, tiled=True),
      {"out": SPLIT},
      Collective("reduce-scatter", 3200, 8, 1),
    ),
    (
      lambda x: jax.lax.ppermute(x, AXIS, [(i, (i + 1) % 8) for i in range(8)]),
      {"out": SPLIT},
      Collective("collective-permute", 400, 8, 1),
    ),
  ],
  ids=["psum", "all_gather", "psum_scatter", "ppermute"],
)
def test_each_kind_as_xla_writes_it(function, options, expected):
  assert compiled(function, (10, 10), **options) == [expected]


def test_all_to_all():
  (found,) = compiled(lambda x: jax.lax.all_to_all(x, AXIS, 0, 1, tiled=True), (8, 10), out=SPLIT)
  assert found == Collective("all-to-all", 320, 8, 1)


def test_groups_of_some_devices():
  def f(x):
    return jax.lax.psum(x, AXIS, axis_index_groups=[[0, 1], [2, 3], [4, 5], [6, 7]])

  mapped = jax.shard_map(f, mesh=MESH, in_specs=SPLIT, out_specs=SPLIT, check_vma=False)
  argument = jax.ShapeDtypeStruct((80,), jnp.float32, sharding=NamedSharding(MESH, SPLIT))
  found = collectives(hlo.parse(jax.jit(mapped).lower(argument).compile().as_text()), 8)
  assert found == [Collective("all-reduce", 40, 2, 1)]


def test_those_in_a_loop_count_as_often_as_it_turns():
  def f(x):
    return jax.lax.fori_loop(0, 6, lambda _, y: jax.lax.psum(jnp.sin(y), AXIS), x)

  assert compiled(f, (10,), into=EVERYWHERE) == [Collective("all-reduce", 40, 8, 6)]


# Algorithms that send the least: each of 4 devices has 1/4 of the value to reduce for, and to hand on.
@pytest.mark.parametrize(
  ("kind", "sent"),
  [("all-reduce", 150), ("all-gather", 75), ("reduce-scatter", 75), ("all-to-all", 75), ("collective-permute", 100)],
)
def test_what_each_device_sends(kind, sent):
  assert Collective(kind, 100, 4, 1).sent == sent
  assert kind == "collective-permute" or Collective(kind, 100, 1, 1).sent == 0


@pytest.mark.parametrize(
  ("groups", "group"),
  [
    ("{{0,1},{2,3}}", 2),
    ("{{0,1,2,3}}", 4),
    ("{}", 4),
    ("[2,2]<=[4]", 2),
    ("[1,4]<=[2,2]T(1,0)", 4),
    ("mesh['axis_0'=4,'axis_1'=1] {'axis_0'}", 4),
    ("mesh['x'=2,'y'=2] {'y'}", 2),
    ("mesh['x'=2,'y'=2] {'x','y'}", 4),
  ],
)
def test_notations_of_groups(groups, group):
  line = f"  ROOT %a = f32[2]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"
  assert text(line) == [Collective("all-reduce", 8, group, 1)]


def test_starts_hold_their_operands_too():
  groups = "channel_id=1, replica_groups={{0,1,2,3}}"
  assert text(f"  ROOT %a = f32[2]{{0}} all-reduce-start(%p), {groups}") == [Collective("all-reduce", 8, 4, 1)]
  one = f"  ROOT %a = (f32[2]{{0}}, f32[8]{{0}}) all-gather-start(%p), {groups}"
  assert text(one) == [Collective("all-gather", 32, 4, 1)]
  two = f"  ROOT %a = ((f32[2]{{0}}, s8[3]{{0}}), (f32[8]{{0}}, s8[12]{{0}})) all-gather-start(%p, %q), {groups}"
  assert text(two) == [Collective("all-gather", 44, 4, 1)]
  four = "  ROOT %a = (f32[2]{0}, f32[2]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), channel_id=1"
  assert text(four) == [Collective("collective-permute", 8, 4, 1)]
  wrapped = text(
    "  ROOT %a = ((f32[2]{0}), f32[8]{0}) async-start(%p), calls=%inside",
    inside=f"  ROOT %r = f32[2]{{0}} reduce-scatter(%p), {groups}",
  )
  assert wrapped == [Collective("reduce-scatter", 32, 4, 1)]
  assert text("  ROOT %a = f32[2]{0} all-reduce-done(%p)") == []


def test_a_chain_of_fusions_is_one_collective():
  """As XLA for TPUs hides a gather behind arithmetic: each fusion of the chain repeats it; channel ids say nothing."""
  part = (
    "  ROOT %g = bf16[8]{0} all-gather(%p), channel_id=13, replica_groups=mesh['a'=4] {'a'}, "
    'frontend_attributes={chain_id="0"}'
  )
  fusions = "\n".join(f"  %f{i} = bf16[8]{{0}} fusion(%p), kind=kCustom, calls=%c{i}" for i in range(3))
  found = text(fusions, c0=part, c1=part, c2=part.replace('id="0"', 'id="1"'))
  assert found == [Collective("all-gather", 16, 4, 1)] * 2
  alone = part.replace(', frontend_attributes={chain_id="0"}', "")
  assert len(text(fusions, c0=alone, c1=alone, c2=alone)) == 3


def test_an_all_reduce_of_which_each_keeps_its_share_is_a_reduce_scatter():
  inside = {"all-reduce-scatter.3": "  ROOT %r = f32[2]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add"}
  found = text("  ROOT %f = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3", **inside)
  assert found == [Collective("reduce-scatter", 8, 4, 1)]
