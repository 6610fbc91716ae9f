"""One update: Algorithm 1 of Ho et al. 2020 as a pure function (state, batch) -> (state, metrics).

Randomness is a function of (seed, step, index of the example in the global batch). An example's timestep, noise, flip
and dropout mask are therefore the same on any number of devices, processes and accumulation steps.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ddpm_jax.config import DiffusionConfig
from ddpm_jax.data import images
from ddpm_jax.diffusion.forward import q_sample
from ddpm_jax.diffusion.losses import distance, loss_weights
from ddpm_jax.diffusion.prediction import training_target
from ddpm_jax.diffusion.schedules import NoiseSchedule, at
from ddpm_jax.keys import indexed_keys, stream_key
from ddpm_jax.models.build import Network, Params
from ddpm_jax.training.optimizer import apply_updates, ema_decay_at, update_ema
from ddpm_jax.training.state import Counts, TrainState

# image: uint8 [B, H, W, C]; index: int32 [B], the place of each row in the global batch; replaced: bool [B], whether
# the row holds another image, because its own could not be read
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]  # scalars
LossFn = Callable[[Params, Batch, jax.Array], jax.Array]  # (params, batch, keys [B]) -> the mean loss, a scalar


class Draw(typing.NamedTuple):
  """What is random in the training of one example."""

  x0: jax.Array
  t: jax.Array
  eps: jax.Array
  dropout_key: jax.Array


def example_keys(seed: int | jax.Array, step: jax.Array, index: jax.Array) -> jax.Array:
  """One key for each example: fold_in(fold_in(root, step), index). index int32 [B] -> keys [B]."""
  return indexed_keys(jax.random.fold_in(stream_key(seed, "train"), step), index)


def draw_example(key: jax.Array, image: jax.Array, *, num_timesteps: int, random_flip: bool) -> Draw:
  """Lines 2 to 4 of Algorithm 1 for one example: x0 ~ data (flipped or not), t ~ U{1..T}, eps ~ N(0, I).

  Args:
    key: of this example at this step.
    image: uint8 [H, W, C].
    num_timesteps: T.
    random_flip: mirror the image with probability 1/2.
  """
  t_key, eps_key, flip_key, dropout_key = jax.random.split(key, 4)
  if random_flip:
    image = images.random_flip(flip_key, image)
  x0 = images.to_float(image)
  t = jax.random.randint(t_key, (), 1, num_timesteps + 1)
  eps = jax.random.normal(eps_key, x0.shape, jnp.float32)
  return Draw(x0, t, eps, dropout_key)


def abstract_batch(image_shape: tuple[int, int, int], batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a global batch, as `pipeline.batches` yields it to one process: image, index, replaced."""
  return {
    "image": jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8),
    "index": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    "replaced": jax.ShapeDtypeStruct((batch_size,), jnp.bool_),
  }


def make_loss(network: Network, schedule: NoiseSchedule, config: DiffusionConfig, *, random_flip: bool) -> LossFn:
  """The loss of a batch as a function of the parameters: line 5 of Algorithm 1, averaged over the batch (eq. 14)."""
  weights = loss_weights(config.loss_weighting, config.prediction, schedule)

  def loss_fn(params: Params, batch: Batch, keys: jax.Array) -> jax.Array:
    x0, t, eps, dropout_keys = jax.vmap(
      lambda key, image: draw_example(key, image, num_timesteps=schedule.num_timesteps, random_flip=random_flip)
    )(keys, batch["image"])
    xt = jax.vmap(lambda x0, t, eps: q_sample(schedule, x0, t, eps))(x0, t, eps)
    output = network(params, xt, t, dropout_keys)
    target = jax.vmap(lambda x0, eps, t: training_target(config.prediction, schedule, x0, eps, t))(x0, eps, t)
    losses = jax.vmap(lambda output, target: distance(config.loss, output, target))(output, target)
    return jnp.mean(at(weights, t) * losses)

  return loss_fn


def mean_loss_and_gradients(
  loss_fn: LossFn, params: Params, batch: Batch, keys: jax.Array, grad_accum_steps: int
) -> tuple[jax.Array, Params]:
  """The mean loss and its gradient, computed on `grad_accum_steps` parts of the batch one after the other.

  Part m takes every M-th row, so that rows spread over devices stay where they are.
  """
  value_and_grad = jax.value_and_grad(loss_fn)
  if grad_accum_steps == 1:
    return value_and_grad(params, batch, keys)

  def split(rows: jax.Array) -> jax.Array:
    return rows.reshape(-1, grad_accum_steps, *rows.shape[1:]).swapaxes(0, 1)

  def add_part(total, part):
    return jax.tree.map(jnp.add, total, value_and_grad(params, *part)), None

  zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
  total, _ = jax.lax.scan(add_part, zero, jax.tree.map(split, (batch, keys)))
  return jax.tree.map(lambda x: x / grad_accum_steps, total)


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  seed: int | jax.Array,
  loss_fn: LossFn,
  optimizer: optax.GradientTransformationExtraArgs,
  learning_rate: optax.Schedule,
  ema_decay: float,
  grad_accum_steps: int = 1,
  axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
  """One update. Pure: bind the keyword arguments with functools.partial, then jit, pmap or call it.

  Where the loss or the gradient is not finite, parameters, moving average and optimiser stay as they are, bit for bit;
  the step is counted all the same, so that the next update sees the next batch.

  Args:
    state: after n updates.
    batch: image uint8 [B, H, W, C], index int32 [B], replaced bool [B].
    seed: of the run, in 0..2^32 - 1; an array of it is uint32.
    loss_fn: from `make_loss`.
    optimizer: from `make_optimizer`.
    learning_rate: the schedule inside `optimizer`, for the metrics.
    ema_decay: the decay that the moving average reaches.
    grad_accum_steps: parts in which the batch is worked off.
    axis_name: the mapped axis over which the batch is split, if it is.

  Returns:
    The state after n + 1 updates, and its scalars: loss and grad_norm (before clipping) of this update, learning_rate,
    ema_decay, and the fields of `Counts`.
  """
  keys = example_keys(seed, state.step, batch["index"])
  loss, gradients = mean_loss_and_gradients(loss_fn, state.params, batch, keys, grad_accum_steps)
  if axis_name is not None:
    loss, gradients = jax.lax.pmean((loss, gradients), axis_name)
  grad_norm = optax.tree.norm(gradients)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, finite=finite)
  params = apply_updates(state.params, updates, finite)
  applied = state.step - state.counts.nonfinite  # what the optimiser counts
  decay = ema_decay_at(ema_decay, applied + 1)
  ema_params = optax.tree.where(finite, update_ema(state.ema_params, params, decay), state.ema_params)

  counts = count(state.counts, finite, batch["replaced"], axis_name)
  metrics = {
    "loss": loss,
    "grad_norm": grad_norm,
    "learning_rate": jnp.asarray(learning_rate(applied), jnp.float32),
    "ema_decay": decay,
    **{field.name: getattr(counts, field.name) for field in dataclasses.fields(counts)},
  }
  new_state = TrainState(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state, counts=counts)
  return new_state, metrics


def count(counts: Counts, finite: jax.Array, replaced: jax.Array, axis_name: str | None) -> Counts:
  """The counts after one more update: whether it was finite, and which rows bool [B] of its batch were replaced."""
  bad_records = jnp.sum(replaced, dtype=jnp.int32)
  if axis_name is not None:
    bad_records = jax.lax.psum(bad_records, axis_name)
  return Counts(
    nonfinite=counts.nonfinite + jnp.where(finite, 0, 1),
    nonfinite_in_row=jnp.where(finite, 0, counts.nonfinite_in_row + 1),
    bad_records=counts.bad_records + bad_records,
  )
