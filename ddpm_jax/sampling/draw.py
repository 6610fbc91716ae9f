"""Compiled functions that draw images from given weights, on all devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import SampleConfig
from ddpm_jax.devices.batched import BatchedFn, BatchedLoop, Loop, free_memory
from ddpm_jax.devices.hosts import all_gather_host
from ddpm_jax.devices.mesh import DeviceMesh
from ddpm_jax.diffusion.denoiser import Cond, DenoiseFn, thresholded
from ddpm_jax.diffusion.guidance import guided, pair_of
from ddpm_jax.diffusion.samplers import SamplerTable, Trajectory, make_sampler, sample
from ddpm_jax.diffusion.schedules import NoiseSchedule
from ddpm_jax.first_stage.pixels import FirstStage
from ddpm_jax.keys import Seeded, indexed_keys, stream_key
from ddpm_jax.models.build import Params
from ddpm_jax.training.setup import Run

_MOST_ON_A_DEVICE = 1024  # images; more make nothing faster
_MOST_ON_A_CPU = 64
_SHARE = 0.85  # of the free memory: XLA's plan leaves out what the runtime needs


QUICK = 20  # network evaluations of DPM-Solver++ that draw in seconds what is close to what all T draw
Bind = Callable[[Seeded, Cond], DenoiseFn]


def bind_for_sampling(run: Run, options: SampleConfig = SampleConfig(), guide: Run | None = None) -> Bind:  # noqa: B008
  """(`Seeded`, labels int32 [B] or None) -> the denoise function: guided, and with x0 kept in range.

  Args:
    run: of the model.
    options: say in which interval, and in which range.
    guide: the run of the weights `Seeded.guide`; None: the model itself without a label guides.
  """
  interval = options.guidance_interval
  one_batch = run.mesh.platform != "cpu"  # where a larger batch makes better use of the device

  def bind(constants: Seeded, label: Cond) -> DenoiseFn:
    denoise = run.denoiser.bind(constants.params, label)
    if constants.guidance_scale is not None:
      if guide is not None:
        pair = pair_of(denoise, guide.denoiser.bind(constants.guide, label if guide.conditional else None))
      else:
        assert run.null_label is not None  # see `classes.check_guidance`
        null = jnp.full_like(label, run.null_label)
        pair = run.denoiser.bind_pair(constants.params, label, null, one_batch=one_batch)
      denoise = guided(denoise, pair, constants.guidance_scale, (interval[0], interval[1]) if interval else None)
    return thresholded(denoise, options.threshold, options.threshold_quantile)

  return bind


def table_of(options: SampleConfig, schedule: NoiseSchedule, variance: str, first: int = 0) -> SamplerTable:
  """The sampler that the options name, starting at timestep `first` (0: T)."""
  return make_sampler(
    schedule,
    options.sampler,
    num_steps=options.sampling_steps,
    grid=options.time_grid,
    eta=options.eta,
    variance=variance,
    first=first,
  )


def draw_of(bind: Bind, table: SamplerTable, *, first_stage: FirstStage, stream: str) -> Callable[..., jax.Array]:
  """Returns the pure function (`Seeded`, index int32 [B], label) -> uint8 [B, H, W, C] that draws image i of a seed.

  Image i is a function of (weights, seed, stream, i) and its label, int32 [B], which an unconditional model has not.
  """

  def draw(constants: Seeded, index: jax.Array, label: jax.Array | None = None) -> jax.Array:
    keys = indexed_keys(stream_key(constants.seed, stream), index)
    return first_stage.decode(None, sample(table, bind(constants, label), keys, first_stage.latent_shape)[0])

  return draw


def make_draw(
  bind: Bind,
  table: SamplerTable,
  *,
  first_stage: FirstStage,
  mesh: DeviceMesh,
  stream: str,
  keep: bool = False,
) -> BatchedFn:
  """Returns draw(`Seeded`, index int32 [B], label) -> uint8 [B, H, W, C], which is `draw_of` on all devices.

  One compilation for each B, whatever the seed. The result does not depend on B or on the number of devices beyond
  float32 rounding. keep: as in `BatchedFn`.
  """
  return BatchedFn(draw_of(bind, table, first_stage=first_stage, stream=stream), mesh, keep=keep)


def make_long_draw(
  bind: Bind,
  table: SamplerTable,
  *,
  first_stage: FirstStage,
  mesh: DeviceMesh,
  stream: str,
) -> BatchedLoop:
  """`make_draw` in stretches of network evaluations, so that progress can be shown. The same images."""

  def trajectory(constants: Seeded, index: jax.Array, label: jax.Array | None = None) -> Trajectory:
    keys = indexed_keys(stream_key(constants.seed, stream), index)
    return Trajectory(table, bind(constants, label), keys, first_stage.latent_shape)

  return by_stretches(mesh, len(table.t), trajectory, lambda x0, _: first_stage.decode(None, x0))


def by_stretches(
  mesh: DeviceMesh, evaluations: int, trajectory: Callable[..., Trajectory], end: Callable[..., Any]
) -> BatchedLoop:
  """Compiles a draw on all devices, in stretches.

  Args:
    mesh: the devices.
    evaluations: rows of the sampler's table.
    trajectory: (constants, *columns [B, ...]) -> the way of these B examples.
    end: (x_0, x0_hat at the kept rows), see `Trajectory.end` -> the result, a tree of [B, ...].
  """
  return BatchedLoop(
    Loop(
      begin=lambda constants, *columns: trajectory(constants, *columns).begin(),
      advance=lambda constants, state, first, last, *columns: trajectory(constants, *columns).advance(
        state, first, last
      ),
      end=lambda constants, state, *columns: end(*trajectory(constants, *columns).end(state)),
      number=evaluations,
    ),
    mesh,
  )


def largest_batch(bytes_needed: Callable[[int], int], free: int, *, most: int, first: int) -> int:
  """Images to draw at once: as many as fit into the memory of the devices.

  Args:
    bytes_needed: number of images -> bytes on each device.
    free: bytes on each device.
    most: images.
    first: images of the first try, from which the others are computed.

  Returns:
    The number, at least 1.
  """
  size = min(first, most)
  needed = bytes_needed(size)
  fits = int(size * _SHARE * free / max(needed, 1))
  if fits < size or fits >= 2 * size:  # less than twice as many are not worth another compilation
    size = max(1, min(fits, most))
  return size


def fit_batch(draw: BatchedFn | BatchedLoop, constants: Seeded | Params, *columns: np.ndarray, number: int) -> int:
  """The batch size for `number` images where the user leaves it open; the same on every process.

  columns: arrays like those that `draw` takes beside the constants, of at least one row.
  """
  devices = jax.device_count()
  on_cpu = jax.devices()[0].platform == "cpu"
  most = min(number, devices * (_MOST_ON_A_CPU if on_cpu else _MOST_ON_A_DEVICE))
  free = int(all_gather_host(np.asarray(free_memory())).min())
  return largest_batch(
    lambda size: draw.bytes_needed(constants, *columns, size=size), free, most=most, first=devices * _MOST_ON_A_CPU
  )
