"""TrainState: everything that an update changes, as arrays only."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ddpm_jax.models.build import Params


@flax.struct.dataclass
class TrainState:
  """The state after `step` updates.

  Random keys and the position in the data are not part of it: both are functions of (seed, step).

  Attributes:
    step: int32 scalar, the number of updates made.
    params: the network's parameters.
    ema_params: their exponential moving average, float32 always.
    opt_state: of the Optax chain.
  """

  step: jax.Array
  params: Params
  ema_params: Params
  opt_state: optax.OptState


def create_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first update: the average equals the parameters."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),  # an array, not a Python int: that would be weakly typed and compile the step twice
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),  # a copy, as the step donates its input and no buffer may go twice
    opt_state=optimizer.init(params),
  )
