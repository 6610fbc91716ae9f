"""One training step, Algorithm 1 of Ho et al. 2020, as a pure function (state, frozen, batch) -> (state, metrics).

Randomness is a function of (seed, step, index of the example in the global batch). An example's timestep, noise, flip
and dropout mask are therefore the same on any number of devices, processes and accumulation steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ddpm_jax.errors import UserError
from ddpm_jax.keys import indexed_keys, stream_key
from ddpm_jax.models.build import Params
from ddpm_jax.training.objective import Batch, CombiningObjective, Objective, PerExample, Terms
from ddpm_jax.training.optimizer import apply_updates, ema_decay_at, update_ema
from ddpm_jax.training.state import Counts, TrainState

Metrics = dict[str, jax.Array]  # scalars
# (params, batch, keys [B]) -> the terms of the loss, and numbers of each example
LossFn = Callable[[Params, Batch, jax.Array], tuple[Terms, PerExample]]
# The same -> the loss, a scalar, with its terms and the numbers of each example, and gradients
GradientFn = Callable[[Params, Batch, jax.Array], tuple[tuple[jax.Array, tuple[Terms, PerExample]], Any]]


def example_keys(seed: int | jax.Array, step: jax.Array, index: jax.Array) -> jax.Array:
  """One key for each example: fold_in(fold_in(root, step), index). index int32 [B] -> keys [B]."""
  return indexed_keys(jax.random.fold_in(stream_key(seed, "train"), step), index)


def abstract_batch(
  image_shape: tuple[int, int, int],
  batch_size: int,
  *,
  labels: bool = False,
  moments: tuple[int, ...] | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of `inputs_of` a global batch.

  Args:
    image_shape: H, W, C.
    batch_size: B.
    labels: of a conditional run.
    moments: [O, h, w, ..] of an image, where the batch holds these in its place.
  """
  image = {"image": jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8)}
  return {
    **({"moments": jax.ShapeDtypeStruct((batch_size, *moments), jnp.float32)} if moments else image),
    "index": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    "replaced": jax.ShapeDtypeStruct((batch_size,), jnp.bool_),
    **({"label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)} if labels else {}),
  }


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
  """What of a batch, as `pipeline.batches` yields it, goes to the devices: all but the place in the data set."""
  return {name: batch[name] for name in ("image", "moments", "index", "replaced", "label") if name in batch}


def gradient_of_sum(loss_of: LossFn) -> GradientFn:
  """The gradient of the sum of the terms, one tree."""

  def loss_fn(params: Params, batch: Batch, keys: jax.Array) -> tuple[jax.Array, tuple[Terms, PerExample]]:
    terms, per_example = loss_of(params, batch, keys)
    return functools.reduce(jnp.add, terms.values()), (terms if len(terms) > 1 else {}, per_example)

  return jax.value_and_grad(loss_fn, has_aux=True)


def gradients_apart(loss_of: LossFn, apart: Mapping[str, jax.Array]) -> GradientFn:
  """A gradient for each term of `apart`, and one for the sum of the others, 'together', from one forward pass.

  apart: whether the gradient of that term is needed, bool scalars; where it is not, it is 0 and not computed.
  """

  def value_and_gradients(params: Params, batch: Batch, keys: jax.Array) -> Any:
    def sums(params: Params) -> tuple[dict[str, jax.Array], tuple[Terms, PerExample]]:
      terms, per_example = loss_of(params, batch, keys)
      others = functools.reduce(jnp.add, [term for name, term in terms.items() if name not in apart])
      return {"together": others, **{name: terms[name] for name in apart}}, (terms, per_example)

    values, pull_back, aux = jax.vjp(sums, params, has_aux=True)

    def gradient(of: str) -> Params:
      return pull_back({name: jnp.full_like(value, name == of) for name, value in values.items()})[0]

    gradients = {"together": gradient("together")}
    for name, needed in apart.items():
      zero = functools.partial(jax.tree.map, jnp.zeros_like, params)
      gradients[name] = jax.lax.cond(needed, functools.partial(gradient, name), zero)
    return (functools.reduce(jnp.add, values.values()), aux), gradients

  return value_and_gradients


def mean_loss_and_gradients(
  value_and_grad: GradientFn, params: Params, batch: Batch, keys: jax.Array, grad_accum_steps: int
) -> tuple[jax.Array, Any, Terms, PerExample]:
  """The mean loss, its gradients, its terms and the numbers of each example, accumulated over M microbatches.

  Microbatch m takes every M-th row, so that rows spread over devices stay where they are.
  """
  if grad_accum_steps == 1:
    (loss, (terms, per_example)), gradients = value_and_grad(params, batch, keys)
    return loss, gradients, terms, per_example

  def split(rows: jax.Array) -> jax.Array:
    return rows.reshape(-1, grad_accum_steps, *rows.shape[1:]).swapaxes(0, 1)

  def join(parts: jax.Array) -> jax.Array:
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])

  def add_part(total, part):
    (loss, aux), gradients = value_and_grad(params, *part)
    return jax.tree.map(jnp.add, total, (loss, gradients)), aux

  parts = jax.tree.map(split, (batch, keys))
  (loss, _), gradients = jax.eval_shape(value_and_grad, params, *jax.tree.map(lambda rows: rows[0], parts))
  zero = jax.tree.map(jnp.zeros_like, (loss, gradients))
  total, (terms, per_example) = jax.lax.scan(add_part, zero, parts)
  loss, gradients = jax.tree.map(lambda x: x / grad_accum_steps, total)
  return loss, gradients, jax.tree.map(jnp.mean, terms), jax.tree.map(join, per_example)


def train_step(
  state: TrainState,
  frozen: Any,
  batch: Batch,
  *,
  seed: int | jax.Array,
  objective: Objective,
  optimizer: optax.GradientTransformationExtraArgs,
  learning_rate: optax.Schedule,
  ema_decay: float,
  grad_accum_steps: int = 1,
  axis_name: str | None = None,
  wrap_loss: Callable[[Callable], Callable] = lambda loss: loss,
) -> tuple[TrainState, Metrics]:
  """One training step. Pure: bind the keyword arguments with functools.partial, then jit, pmap or call it.

  Where the loss or the gradient is not finite, parameters, averages and optimiser stay as they are, bit for bit; the
  step is counted all the same, so that the next one sees the next batch.

  Args:
    state: after n steps.
    frozen: parameters of networks that are not trained, see `Objective.loss`.
    batch: image uint8 [B, H, W, C], index int32 [B], replaced bool [B], in a conditional run label int32 [B].
    seed: of the run, in 0..2^32 - 1; an array of it is uint32.
    objective: its loss is minimised.
    optimizer: from `make_optimizer`.
    learning_rate: the schedule inside `optimizer`, for the metrics.
    ema_decay: the decay that the moving average reaches.
    grad_accum_steps: microbatches of the batch.
    axis_name: the mapped axis over which the batch is split, if it is.
    wrap_loss: `DeviceMesh.wrap_loss`, where the step is compiled for a mesh.

  Returns:
    The state after n + 1 steps, and its scalars: loss and grad_norm (before clipping) of this step, learning_rate,
    ema_decay, the fields of `Counts`, where the loss has several terms each of them as loss/NAME, the means of the
    numbers of each example as mean/NAME, and what `CombiningObjective.combine` says as combined/NAME.
  """
  keys = example_keys(seed, state.step, batch["index"])
  wrapped = wrap_loss(objective.loss)

  def loss_of(params: Params, batch: Batch, keys: jax.Array) -> tuple[Terms, PerExample]:
    return wrapped(params, state.extra, frozen, batch, keys)

  combines = isinstance(objective, CombiningObjective)
  value_and_grad = gradients_apart(loss_of, objective.apart(state.extra)) if combines else gradient_of_sum(loss_of)
  loss, gradients, terms, per_example = mean_loss_and_gradients(
    value_and_grad, state.params, batch, keys, grad_accum_steps
  )
  means = {name: jnp.mean(numbers) for name, numbers in per_example.items() if numbers.ndim == 1}
  if axis_name is not None:
    loss, gradients, terms, means = jax.lax.pmean((loss, gradients, terms, means), axis_name)
  gradients, combined = objective.combine(gradients, state.extra) if combines else (gradients, {})
  grad_norm = optax.tree.norm(gradients)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, finite=finite)
  params = apply_updates(state.params, updates, finite)
  applied = state.step - state.counts.nonfinite  # what the optimiser counts
  decay = ema_decay_at(ema_decay, applied + 1)
  ema = {
    name: optax.tree.where(finite, update_ema(average, params, decay), average) for name, average in state.ema.items()
  }
  extra = objective.update_extra(state.extra, in_order_of_index(per_example, batch["index"], axis_name))
  if jax.tree.structure(extra) != jax.tree.structure(state.extra):
    raise UserError(
      f"objective: update_extra of {type(objective).__name__} returns other arrays than `extra` has; return the same"
    )

  counts = count(state.counts, finite, batch["replaced"], axis_name)
  metrics = {
    "loss": loss,
    "grad_norm": grad_norm,
    "learning_rate": jnp.asarray(learning_rate(applied), jnp.float32),
    "ema_decay": decay,
    **{field.name: getattr(counts, field.name) for field in dataclasses.fields(counts)},
    **{f"loss/{name}": term for name, term in terms.items()},
    **{f"mean/{name}": mean for name, mean in means.items()},
    **{f"combined/{name}": number for name, number in combined.items()},
  }
  new_state = TrainState(state.step + 1, params, ema, opt_state, counts, optax.tree.where(finite, extra, state.extra))
  return new_state, metrics


def in_order_of_index(per_example: PerExample, index: jax.Array, axis_name: str | None) -> PerExample:
  """The numbers of the global batch, from those of the rows that are here, [b], and their index int32 [b]."""
  if not per_example:
    return per_example
  if axis_name is not None:
    per_example, index = jax.lax.all_gather((per_example, index), axis_name, tiled=True)
  order = jnp.argsort(index)
  return jax.tree.map(lambda rows: rows[order], per_example)


def count(counts: Counts, finite: jax.Array, replaced: jax.Array, axis_name: str | None) -> Counts:
  """The counts after one more step: whether it was finite, and which rows bool [B] of its batch were replaced."""
  bad_records = jnp.sum(replaced, dtype=jnp.int32)
  if axis_name is not None:
    bad_records = jax.lax.psum(bad_records, axis_name)
  return Counts(
    nonfinite=counts.nonfinite + jnp.where(finite, 0, 1),
    nonfinite_in_row=jnp.where(finite, 0, counts.nonfinite_in_row + 1),
    bad_records=counts.bad_records + bad_records,
  )
