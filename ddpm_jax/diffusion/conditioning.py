"""Labels as the condition of a network, and their dropping for guidance without a classifier."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def drop_label(key: jax.Array, label: jax.Array, rate: float, null_label: int) -> jax.Array:
  """The label of one example or, at this rate, the null label (Ho and Salimans 2022, Algorithm 1).

  >>> drop_label(jax.random.key(0), jnp.asarray(3), rate=0.0, null_label=10).tolist()
  3

  Args:
    key: of this example, for nothing else.
    label: int32 scalar.
    rate: p_uncond, in [0, 1).
    null_label: stands for no label.
  """
  return jnp.where(jax.random.bernoulli(key, rate), null_label, label)
