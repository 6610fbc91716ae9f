"""Several updates in one call of a compiled step: how many is an argument, so that one program is enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.devices.packed import pack, unpack

Tree = Any


def make_updates(
  step: Callable[[Tree, Tree], tuple[Tree, Tree]],
  state: Tree,
  batches: Tree,
  number: jax.Array,
  *,
  most: int,
  packed: bool = False,
) -> tuple[Tree, Tree]:
  """Makes updates one after the other, within a compiled function.

  Args:
    step: one update, (state, batch) -> (state, metrics).
    state: a TrainState.
    batches: leaves [most, ...]; if `most` is 1, without that axis.
    number: of updates to make, an int32 scalar, at most `most`; it is not read if `most` is 1.
    most: how many can be made.
    packed: whether `step` gets a packed state, see `packed.pack`.

  Returns:
    The state after them, and their metrics [most], of which the first `number` count; if `most` is 1, scalars.
  """
  if most == 1:
    return step(state, batches)
  step = jax.jit(step)  # so that it is traced once

  def batch(i: int | jax.Array) -> Tree:
    return jax.tree.map(lambda rows: rows[i], batches)

  def update(i: jax.Array, made: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
    state, metrics = made
    state, new = step(state, batch(i))
    return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), metrics, new)

  if packed:
    state = pack(state, state.params)
  _, one = jax.eval_shape(step, state, batch(0))
  metrics = jax.tree.map(lambda row: jnp.zeros((most, *row.shape), row.dtype), one)
  return unpack(jax.lax.fori_loop(0, number, update, (state, metrics)))
