"""A compiled function that draws images from given weights, on all devices."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from ddpm_jax.data import images
from ddpm_jax.diffusion.samplers import SamplerTable, sample, x0_predictor
from ddpm_jax.diffusion.schedules import NoiseSchedule
from ddpm_jax.keys import indexed_keys, stream_key
from ddpm_jax.models.build import Network, Params
from ddpm_jax.training.parallel import Parallel

Draw = Callable[[Params, np.ndarray], np.ndarray]


def make_draw(
  network: Network,
  schedule: NoiseSchedule,
  table: SamplerTable,
  *,
  prediction: str,
  image_shape: tuple[int, int, int],
  parallel: Parallel,
  seed: int,
  stream: str,
) -> Draw:
  """Returns draw(params, index int [B]) -> uint8 [B, H, W, C]; image i is a function of (weights, seed, stream, i).

  One compilation for each B. The result does not depend on B or on the number of devices beyond float32 rounding.
  """

  def draw_on_device(params: Params, index: jax.Array) -> jax.Array:
    predict_x0 = x0_predictor(lambda xt, t: network(params, xt, t, None), schedule, prediction)
    keys = indexed_keys(stream_key(seed, stream), index)
    return images.to_uint8(sample(table, predict_x0, keys, image_shape))

  shared = parallel.by_rows(draw_on_device)
  return lambda params, index: shared(params, np.asarray(index, np.int32))
