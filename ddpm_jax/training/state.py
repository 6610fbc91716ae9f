"""TrainState: everything that an update changes, as arrays only."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ddpm_jax.models.build import Params


@flax.struct.dataclass
class Counts:
  """What went wrong so far, int32 scalars. Part of the state, so that a resumed run goes on counting.

  Attributes:
    nonfinite: updates that were not applied, because their loss or gradient was infinite or not a number.
    nonfinite_in_row: those of them at the end.
    bad_records: rows of batches that held another image, because theirs could not be read.
  """

  nonfinite: jax.Array
  nonfinite_in_row: jax.Array
  bad_records: jax.Array


@flax.struct.dataclass
class TrainState:
  """The state after `step` updates.

  Random keys and the position in the data are not part of it: both are functions of (seed, step).

  Attributes:
    step: int32 scalar, the number of updates made or, where they were not finite, left out.
    params: the network's parameters.
    ema_params: their exponential moving average, float32 always.
    opt_state: of the Optax chain.
    counts: of updates left out and images replaced.
  """

  step: jax.Array
  params: Params
  ema_params: Params
  opt_state: optax.OptState
  counts: Counts


def create_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first update: the average equals the parameters."""
  zero = jnp.zeros((), jnp.int32)  # an array, not a Python int: that would be weakly typed and compile the step twice
  return TrainState(
    step=zero,
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),  # a copy, as the step donates its input and no buffer may go twice
    opt_state=optimizer.init(params),
    counts=Counts(nonfinite=jnp.copy(zero), nonfinite_in_row=jnp.copy(zero), bad_records=jnp.copy(zero)),
  )
