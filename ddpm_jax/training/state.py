"""TrainState: everything that a training step changes, as arrays only."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ddpm_jax.models.build import Params


@flax.struct.dataclass
class Counts:
  """Counts of what went wrong so far, int32 scalars. Part of the state, so that a resumed run goes on counting.

  Attributes:
    nonfinite: training steps that were not applied, because their loss or gradient was infinite or not a number.
    nonfinite_in_row: those of them at the end.
    bad_records: rows of batches that held another image, because theirs could not be read.
  """

  nonfinite: jax.Array
  nonfinite_in_row: jax.Array
  bad_records: jax.Array


@flax.struct.dataclass
class TrainState:
  """The state after `step` training steps.

  Random keys and the position in the data are not part of it: both are functions of (seed, step).

  Attributes:
    step: int32 scalar, the number of training steps made or, where they were not finite, left out.
    params: the network's parameters.
    ema: moving averages of them by name, float32 always; "ema" is the one that is drawn with.
    opt_state: of the Optax chain.
    counts: of training steps left out and images replaced.
    extra: the state of an objective, a tree of finite arrays.
  """

  step: jax.Array
  params: Params
  ema: dict[str, Params]
  opt_state: optax.OptState
  counts: Counts
  extra: Any = flax.struct.field(default_factory=dict)


def create_state(params: Params, optimizer: optax.GradientTransformation, extra: Any = None) -> TrainState:
  """The state before the first step: the average equals the parameters; no `extra` is an empty one."""
  zero = jnp.zeros((), jnp.int32)  # an array, not a Python int: that would be weakly typed and compile the step twice
  return TrainState(
    step=zero,
    params=params,
    ema={"ema": jax.tree.map(jnp.copy, params)},  # a copy, as the step donates its input and no buffer may go twice
    opt_state=optimizer.init(params),
    counts=Counts(nonfinite=jnp.copy(zero), nonfinite_in_row=jnp.copy(zero), bad_records=jnp.copy(zero)),
    extra={} if extra is None else extra,
  )


def to_stored(state: TrainState) -> dict[str, Any]:
  """The tree of a checkpoint: that of release 0.1.0, in which "ema" is `ema_params`, and new parts where not empty."""
  stored = {name: getattr(state, name) for name in ("step", "params", "opt_state", "counts")}
  others = {name: average for name, average in state.ema.items() if name != "ema"}
  new = {"averages": others, "extra": state.extra}
  return stored | {"ema_params": state.ema["ema"]} | {name: part for name, part in new.items() if jax.tree.leaves(part)}


def from_stored(stored: dict[str, Any]) -> TrainState:
  """The inverse of `to_stored`."""
  ema = {"ema": stored["ema_params"], **stored.get("averages", {})}
  return TrainState(
    stored["step"], stored["params"], ema, stored["opt_state"], stored["counts"], stored.get("extra", {})
  )
