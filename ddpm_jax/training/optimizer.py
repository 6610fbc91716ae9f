"""The Optax chain, the learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from ddpm_jax.config import OptimizerConfig
from ddpm_jax.models.build import Params


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Update number (from 0) -> learning rate: linear from 0 over the warm-up, then constant or a cosine to 0.

  The first update of a warm-up has rate 0, as in the authors' code.
  """
  match config.lr_schedule:
    case "constant":
      after = optax.constant_schedule(config.learning_rate)
    case "cosine":
      after = optax.cosine_decay_schedule(config.learning_rate, num_steps - config.warmup_steps)
    case _:
      raise ValueError(f"unknown learning-rate schedule {config.lr_schedule!r}")
  if config.warmup_steps == 0:
    return after
  warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
  return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
  """Clip by the global norm of the mean gradient, then Adam.

  The authors' TPU code clips each replica's gradient to 1/8 of the norm before the replicas are summed
  (tpu_utils.py:164); clipping their mean is what the paper's single formula says and does not depend on the number of
  devices.
  """
  clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
  return optax.chain(clip, optax.adam(learning_rate_schedule(config, num_steps), b1=0.9, b2=0.999, eps=1e-8))


def ema_decay_at(decay: float, num_updates: jax.Array) -> jax.Array:
  """min(decay, (1 + n) / (10 + n)) after n >= 1 updates: a short memory first, so that early samples are usable.

  The rule of TensorFlow's ExponentialMovingAverage(num_updates=n). The authors' code uses the full decay from the
  second update on; at 0.9999 the two agree after about 90,000 updates.
  """
  n = num_updates.astype(jnp.float32)
  return jnp.minimum(jnp.float32(decay), (1.0 + n) / (10.0 + n))


def update_ema(ema_params: Params, new_params: Params, decay: jax.Array) -> Params:
  """ema <- decay ema + (1 - decay) params, from the parameters after the update, in float32."""
  return jax.tree.map(lambda ema, new: ema + (1.0 - decay) * (new - ema), ema_params, new_params)
