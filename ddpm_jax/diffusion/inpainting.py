"""RePaint (Lugmayr et al. 2022): inpainting with an unconditional model, in terms of a sampler's rows.

After each row the known pixels are replaced by q(x_s | x_0) of the given image. As drawn and known pixels then do not
fit yet, stretches of `jump` steps are undone by the forward process and drawn again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.schedules import NoiseSchedule


class Jumps(NamedTuple):
  """One entry for each row: evaluate at `t`, step to `s`, then diffuse to `up` >= s. int64 [N] each."""

  t: np.ndarray
  s: np.ndarray
  up: np.ndarray


def repaint_jumps(grid: np.ndarray, jump: int, resamples: int) -> Jumps:
  """The order of RePaint's steps: its Algorithm 1 with jumps, `get_schedule_jump` of the authors' code.

  Args:
    grid: falling timesteps with 0 at the end.
    jump: steps that are undone at a time, j; where the grid is shorter than that, none are.
    resamples: how often each stretch is drawn, r >= 1; with 1 none is undone.

  >>> repaint_jumps(np.asarray([30, 20, 10, 0]), jump=1, resamples=2).up.tolist()  # 20 is diffused to 30 again, once
  [30, 20, 20, 10, 0]
  """
  last = len(grid) - 1
  place = 0  # in the grid
  left = dict.fromkeys(range(last - 1, jump - 1, -jump), resamples - 1)
  rows = []
  while place < last:
    before, place = place, place + 1
    here = place
    if left.get(place, 0):
      left[place] -= 1
      place -= jump
    rows.append((grid[before], grid[here], grid[place]))
  order = np.asarray(rows, np.int64)
  return Jumps(order[:, 0], order[:, 1], order[:, 2])


def inpaint_after_row(
  schedule: NoiseSchedule,
  jumps: Jumps,
  known: jax.Array,
  mask: jax.Array,
  noise: Callable[[jax.Array], jax.Array],
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """The `after_row` of `samplers.sample`: known pixels are replaced, and stretches undone.

  Args:
    schedule: the noise schedule.
    jumps: one for each row of the table.
    known: images float32 [B, ...] in [-1, 1].
    mask: float32, broadcastable to `known`: 1 where pixels are drawn, 0 where they are known.
    noise: number -> standard normal [B, ...]; the numbers 0..N belong to the prior and the rows.
  """
  s, up = jumps.s, jumps.up
  a_s, b_s = schedule.sqrt_alpha_bar[s], schedule.sqrt_one_minus_alpha_bar[s]
  # q(x_up | x_s) = N(sqrt(kept) x_s, (1 - kept) I), kept = alpha_bar_up / alpha_bar_s: Ho et al. eq. 2, several steps.
  kept = schedule.alpha_bar[up] / schedule.alpha_bar[s]
  columns = [jnp.asarray(column, jnp.float32) for column in (a_s, b_s, np.sqrt(kept), np.sqrt(1 - kept))]
  number = len(s)

  def after_row(xs: jax.Array, row: jax.Array) -> jax.Array:
    a, b, shrink, spread = (column[row] for column in columns)
    known_s = a * known + b * noise(number + 1 + row)
    blended = mask * xs + (1 - mask) * known_s
    return shrink * blended + spread * noise(2 * number + 1 + row)

  return after_row
