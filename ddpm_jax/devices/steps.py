"""Several training steps in one call of a compiled function: how many is an argument, so one program is enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def run_steps(
  step: Callable[[Tree, Tree], tuple[Tree, Tree]], state: Tree, batches: Tree, num_steps: jax.Array, *, max_steps: int
) -> tuple[Tree, Tree]:
  """Runs training steps one after the other, within a compiled function.

  Args:
    step: one training step, (state, batch) -> (state, metrics).
    state: a TrainState.
    batches: leaves [max_steps, ...]; if `max_steps` is 1, without that axis.
    num_steps: int32 scalar, at most `max_steps`; it is not read if `max_steps` is 1.
    max_steps: the most steps of a call.

  Returns:
    The state after them, and their metrics [max_steps], of which the first `num_steps` count; if `max_steps` is 1,
    scalars.
  """
  if max_steps == 1:
    return step(state, batches)
  step = jax.jit(step)  # so that it is traced once

  def batch(i: int | jax.Array) -> Tree:
    return jax.tree.map(lambda rows: rows[i], batches)

  def body(i: jax.Array, carry: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
    state, metrics = carry
    state, new = step(state, batch(i))
    return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), metrics, new)

  _, one = jax.eval_shape(step, state, batch(0))
  metrics = jax.tree.map(lambda row: jnp.zeros((max_steps, *row.shape), row.dtype), one)
  return jax.lax.fori_loop(0, num_steps, body, (state, metrics))
