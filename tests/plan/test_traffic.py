"""Bytes to and from the main memory, beside XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.plan import hlo
from ddpm_jax.plan.traffic import main_memory_bytes
from tests.plan.test_hlo import loop

SQUARE = jax.ShapeDtypeStruct((64, 64), jnp.float32)


def compiled(function):
  return jax.jit(function).lower(SQUARE).compile()


@pytest.mark.parametrize(
  "function",
  [
    lambda x: jnp.sin(x) + 1,
    lambda x: jnp.dot(x, jnp.cos(x)),
    lambda x: jnp.dot(jnp.dot(x, x), jnp.exp(x)).T,
    lambda x: (jnp.sum(x, axis=0), x * 2),
  ],
)
def test_without_loops_it_is_the_count_of_xla(function):
  program = compiled(function)
  ours, xla = main_memory_bytes(hlo.parse(program.as_text())), program.cost_analysis()["bytes accessed"]
  assert ours == pytest.approx(xla, rel=0.02)


def test_a_loop_counts_as_often_as_it_turns():
  once, often = (
    main_memory_bytes(
      hlo.parse(compiled(lambda x, n=n: jax.lax.fori_loop(0, n, lambda _, y: jnp.dot(y, y), x)).as_text())
    )
    for n in (3, 30)
  )
  assert 27 * 3 * SQUARE.size * 4 <= often - once <= 27 * 5 * SQUARE.size * 4


def test_what_stays_on_the_chip_is_free():
  """Of the loop by hand: the counters are in the main memory, the array is on the chip."""
  # copy.10: read, write; 8 times copy.3: read, write; add.2: two reads, a write; lt.0 runs, but only the body counts
  assert main_memory_bytes(loop()) == 2 * 4 + 8 * (2 + 3) * 4
  assert main_memory_bytes(loop(step="2")) == 2 * 4 + (2 + 3) * 4  # of unknown length: once


def test_copies_to_the_chip_count_where_they_touch_the_memory():
  text = """ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %s = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%x)
  %d = f32[8]{0:S(1)} copy-done(%s)
  %t = (f32[8]{0}, f32[8]{0:S(1)}, u32[]{:S(2)}) copy-start(%d)
  ROOT %e = f32[8]{0} copy-done(%t)
}
"""
  assert main_memory_bytes(hlo.parse(text)) == 32 + 32  # one read, one write
