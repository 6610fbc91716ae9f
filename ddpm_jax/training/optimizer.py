"""The Optax chain, the learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ddpm_jax.config import OptimizerConfig
from ddpm_jax.models.build import Params
from ddpm_jax.runtime import cpu


def decay_start(config: OptimizerConfig, num_steps: int) -> int | None:
  """The step after which the learning rate of `constant_then_decay` decays; None for the other schedules.

  Up to there a run does not depend on `num_steps`, but for being at least so long. It never falls as `num_steps` grows.
  """
  if config.lr_schedule != "constant_then_decay":
    return None
  return num_steps - max(1, round(config.decay_fraction * num_steps))


def learning_rate_schedule(config: OptimizerConfig, num_steps: int, restart: int = 0) -> optax.Schedule:
  """Step number (from 0) -> learning rate: linear from 0 over the warm-up, then what `lr_schedule` says.

  The first step of a warm-up has rate 0, as in the authors' code.

  Args:
    config: the options.
    num_steps: of the whole run.
    restart: the step at which the rate begins again from 0, for `cosine` and `linear`: of a run that was made longer,
      see `resume.restarts`.
  """
  warmup_steps = config.warmup_steps
  match config.lr_schedule:
    case "constant" | "constant_then_decay":
      after = optax.constant_schedule(config.learning_rate)
    case "cosine" | "linear":
      steps = num_steps - restart
      if warmup_steps >= steps:  # it ends at 0 all the same
        warmup_steps = steps // 2
      if config.lr_schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, steps - warmup_steps)
      else:
        after = optax.linear_schedule(config.learning_rate, 0.0, steps - warmup_steps)
    case _:
      raise ValueError(f"unknown learning-rate schedule {config.lr_schedule!r}")
  rate = after
  if warmup_steps:
    warmup = optax.linear_schedule(0.0, config.learning_rate, warmup_steps)
    rate = optax.join_schedules([warmup, after], [warmup_steps])
  begin = decay_start(config, num_steps)
  if begin is not None:
    # A product, so that no step before the decay depends on num_steps, also where the warm-up is longer than the run.
    return lambda n: rate(n) * (1.0 - jnp.sqrt(jnp.clip((n - begin) / (num_steps - begin), 0.0, 1.0)))
  if restart:
    return lambda n: rate(jnp.maximum(n - restart, 0))  # n leaves out the steps that were not finite
  return rate


def make_optimizer(
  config: OptimizerConfig, num_steps: int, restart: int = 0, *, by_part: bool = False
) -> optax.GradientTransformationExtraArgs:
  """Clip by the global norm of the mean gradient, then Adam, or AdamW (Loshchilov and Hutter 2019, Algorithm 2).

  Of update(..., finite=False) the state stays as it is.

  The authors' TPU code clips each replica's gradient to 1/8 of the norm before the replicas are summed
  (tpu_utils.py:164); clipping their mean is what the paper's single formula says and does not depend on the number of
  devices.

  by_part: the parameters are a dict of networks, and the norm is that of each network's gradient.
  """
  clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
  clip = each_part(clip) if by_part and config.grad_clip else clip
  rate = if_finite(optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps, restart)))
  decay = [optax.add_decayed_weights(config.weight_decay)] if config.weight_decay else []
  return optax.chain(clip, optax.chain(scale_by_adam(b1=config.adam_b1, b2=config.adam_b2, eps=1e-8), *decay, rate))


def each_part(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
  """A transformation without state, of each entry of a dict on its own."""

  def update(updates: Any, state: optax.OptState, params: Params | None = None):
    del params
    return {name: transformation.update(part, state)[0] for name, part in updates.items()}, state

  return optax.GradientTransformation(transformation.init, update)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam`, whose moments are computed but once: gradients -> mu_hat / (sqrt(nu_hat) + eps).

  Algorithm 1 of Kingma and Ba 2015.
  """
  moments = if_finite(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))

  def update(updates: Params, state: optax.OptState, params: Params | None = None, **finite):
    _, new = moments.update(updates, state, params, **finite)
    assert isinstance(new, optax.ScaleByAdamState)
    mu, nu = cpu.materialize((new.mu, new.nu))
    mu_hat = optax.tree.bias_correction(mu, b1, new.count)
    nu_hat = optax.tree.bias_correction(nu, b2, new.count)
    updates = jax.tree.map(lambda mu, nu: mu / (jnp.sqrt(nu) + eps), mu_hat, nu_hat)
    return updates, new._replace(mu=mu, nu=nu)

  return optax.GradientTransformationExtraArgs(moments.init, update)


def if_finite(transformation: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """The transformation, whose state stays as it is, bit for bit, where `finite` is false.

  Its updates are not to be used then.

  `optax.apply_if_finite` looks at the gradients alone, and has a count of its own.
  """

  def update(updates: Params, state: optax.OptState, params: Params | None = None, *, finite: jax.Array | bool = True):
    updates, new = transformation.update(updates, state, params)
    return updates, optax.tree.where(finite, new, state)

  return optax.GradientTransformationExtraArgs(transformation.init, update)


def apply_updates(params: Params, updates: Params, finite: jax.Array) -> Params:
  """`optax.apply_updates`, but the parameters as they are, bit for bit, where `finite` is false."""
  return cpu.materialize(optax.tree.where(finite, optax.apply_updates(params, updates), params))


def ema_decay_at(decay: float, num_updates: jax.Array) -> jax.Array:
  """min(decay, (1 + n) / (10 + n)) after n >= 1 training steps: a short memory first, so that early samples are usable.

  The rule of TensorFlow's ExponentialMovingAverage(num_updates=n). The authors' code uses the full decay from the
  second training step on; at 0.9999 the two agree after about 90,000 training steps.
  """
  n = num_updates.astype(jnp.float32)
  return jnp.minimum(jnp.float32(decay), (1.0 + n) / (10.0 + n))


def update_ema(ema_params: Params, new_params: Params, decay: jax.Array) -> Params:
  """ema <- decay ema + (1 - decay) params, from the parameters after the training step, in float32."""
  return jax.tree.map(lambda ema, new: ema + (1.0 - decay) * (new - ema), ema_params, new_params)
