"""The denoiser: a network and a parameterization. All that samples or measures sees only its denoise function.

  denoise = Denoiser(network, parameterization).bind(params)
  x0, eps = denoise(xt, schedule.level(t))

A denoise function is a plain function of arrays. Thresholding wraps one: it returns a denoise function, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.parameterization import Parameterization
from ddpm_jax.diffusion.schedules import Level

Params = Any  # a pytree of arrays
Cond = Any  # the condition: a pytree of arrays [B, ...]; None for an unconditional network


class Network(Protocol):
  """A network as a pure function of its parameters. To be equal by value, it is a frozen dataclass or a function."""

  def __call__(
    self, params: Params, x: jax.Array, time: jax.Array, cond: Cond, *, dropout_keys: jax.Array | None = None
  ) -> jax.Array:
    """Runs the network on a batch.

    Args:
      params: its parameters.
      x: x_t, float32 [B, ...].
      time: `Level.time` of each example, [B].
      cond: the condition.
      dropout_keys: B random keys; None for no dropout.

    Returns:
      The output that the parameterization interprets, the shape of x.
    """
    ...


class Prediction(NamedTuple):
  """The estimates of x_0 and of eps in x_t = alpha x_0 + sigma eps, float32, the shape of x_t."""

  x0: jax.Array
  eps: jax.Array


DenoiseFn = Callable[[jax.Array, Level], Prediction]  # (x_t [B, ...], its level: scalars or [B]) -> Prediction
PairFn = Callable[[jax.Array, Level], tuple[Prediction, Prediction]]  # likewise, of the main model and of its guide


def from_x0(x0: jax.Array, xt: jax.Array, level: Level) -> Prediction:
  """The prediction of an x0 [B, ...]: eps = (x_t - alpha x_0) / sigma, for sigma > 0."""

  def eps(x0: jax.Array, xt: jax.Array, level: Level) -> jax.Array:
    return (xt - level.alpha * x0) / level.sigma

  return Prediction(x0, jax.vmap(eps)(x0, xt, for_each(level, xt)))


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """A network and the parameterization of its output. Equal and hashed by value; holds no arrays."""

  network: Network
  parameterization: Parameterization

  def bind(self, params: Params, cond: Cond = None) -> DenoiseFn:
    """The denoise function with these parameters and this condition, without dropout and thresholding."""

    def denoise(xt: jax.Array, level: Level) -> Prediction:
      level = for_each(level, xt)
      output = self.network(params, xt, level.time, cond).astype(jnp.float32)
      return from_x0(jax.vmap(self.parameterization.x0_hat)(output, xt, level), xt, level)

    return denoise

  def bind_pair(self, params: Params, cond: Cond, null: Cond, *, one_batch: bool) -> PairFn:
    """The denoise functions of two conditions with the same parameters, to guide the first by the second.

    Args:
      params: the parameters.
      cond: the condition of the main prediction.
      null: that of the guide, of the same structure and shapes.
      one_batch: evaluate the network once, at a batch of 2 B examples, the main ones first; else twice at B. Equal to
        float32 rounding; which is faster depends on the device.
    """
    if not one_batch:
      main, guide = self.bind(params, cond), self.bind(params, null)
      return lambda xt, level: (main(xt, level), guide(xt, level))

    def stacked(main: Any, guide: Any) -> Any:
      return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), main, guide)

    denoise = self.bind(params, stacked(cond, null))

    def pair(xt: jax.Array, level: Level) -> tuple[Prediction, Prediction]:
      level = for_each(level, xt)
      both = denoise(stacked(xt, xt), stacked(level, level))
      size = xt.shape[0]
      return jax.tree.map(lambda value: value[:size], both), jax.tree.map(lambda value: value[size:], both)

    return pair


def thresholded(denoise: DenoiseFn, how: str, quantile: float = 0.995) -> DenoiseFn:
  """The denoise function with the x0 of each example kept in the range of the data, see `threshold_x0`; eps follows."""

  def kept_in_range(xt: jax.Array, level: Level) -> Prediction:
    x0 = jax.vmap(lambda x0: threshold_x0(x0, how, quantile))(denoise(xt, level).x0)
    return from_x0(x0, xt, level)

  return kept_in_range


def threshold_x0(x0_hat: jax.Array, how: str, quantile: float) -> jax.Array:
  """Keeps the x0_hat of one example in the range of the data, [-1, 1].

  >>> threshold_x0(jnp.asarray([-0.5, 2.0]), "static", 0.995).tolist()
  [-0.5, 1.0]

  Args:
    x0_hat: any shape.
    how: 'static' clips, as Ho et al. do when they sample; 'dynamic' clips at the given quantile of |x0_hat|, but not
      below 1, and divides by it (Saharia et al. 2022, section 2.3); 'none' does nothing.
    quantile: in (0, 1], for 'dynamic'.

  Raises:
    ValueError: for an unknown `how`.
  """
  match how:
    case "static":
      return jnp.clip(x0_hat, -1.0, 1.0)
    case "dynamic":
      limit = jnp.maximum(jnp.quantile(jnp.abs(x0_hat), quantile), 1.0)
      return jnp.clip(x0_hat, -limit, limit) / limit
    case "none":
      return x0_hat
    case _:
      raise ValueError(f"unknown threshold {how!r}")


def for_each(level: Level, x: jax.Array) -> Level:
  """The level with an entry for each of the B examples of x."""
  return Level(*(jnp.broadcast_to(value, x.shape[:1]) for value in level))
