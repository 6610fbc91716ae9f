"""Compiled functions that draw images from given weights, on all devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import SampleConfig, threshold_of
from ddpm_jax.devices.batched import BatchedFn, BatchedLoop, Loop, free_memory
from ddpm_jax.devices.hosts import all_gather_host
from ddpm_jax.devices.mesh import DeviceMesh
from ddpm_jax.diffusion.denoiser import Cond, DenoiseFn, for_each, thresholded
from ddpm_jax.diffusion.guidance import (
  GradientFn,
  classifier_gradient,
  classifier_guided,
  guided,
  mean_shift,
  pair_of,
)
from ddpm_jax.diffusion.samplers import SamplerTable, Shift, Trajectory, make_sampler, sample, variances
from ddpm_jax.diffusion.schedules import Level, NoiseSchedule
from ddpm_jax.first_stage.pixels import FirstStage
from ddpm_jax.keys import Seeded, indexed_keys, seeded, stream_key
from ddpm_jax.models.build import Params
from ddpm_jax.sampling.classes import one_scale
from ddpm_jax.training.setup import Run
from ddpm_jax.weights.load import Weights

_MOST_ON_A_DEVICE = 1024  # images; more make nothing faster
_MOST_ON_A_CPU = 64
_SHARE = 0.85  # of the free memory: XLA's plan leaves out what the runtime needs


QUICK = 20  # network evaluations of DPM-Solver++ that draw in seconds what is close to what all T draw


@dataclasses.dataclass(frozen=True)
class Bind:
  """(`Seeded`, labels int32 [B] or None) -> the denoise function: guided, x0 kept in range, then a classifier's.

  Attributes:
    run: of the model.
    options: say in which interval, in which range, and by which sampler.
    guide: the run of the weights `Seeded.guide`; None: the model itself without a label guides.
    classifier: the run of the weights `Seeded.classifier`.
  """

  run: Run
  options: SampleConfig
  guide: Run | None = None
  classifier: Run | None = None

  def __call__(self, constants: Seeded, label: Cond) -> DenoiseFn:
    run, options, interval = self.run, self.options, self.options.guidance_interval
    own = label if run.conditional else None
    denoise = run.denoiser.bind(constants.params, own)
    if constants.guidance_scale is not None:
      if self.guide is not None:
        pair = pair_of(denoise, self.guide.denoiser.bind(constants.guide, label if self.guide.conditional else None))
      else:
        assert run.null_label is not None  # see `classes.check_guidance`
        null = jnp.full_like(label, run.null_label)
        one_batch = run.mesh.platform != "cpu"  # where a larger batch makes better use of the device
        pair = run.denoiser.bind_pair(constants.params, own, null, one_batch=one_batch)
      denoise = guided(denoise, pair, constants.guidance_scale, (interval[0], interval[1]) if interval else None)
    how = threshold_of(options, latent=not run.first_stage.identity)
    denoise = thresholded(denoise, how, options.threshold_quantile)
    gradient = self._gradient(constants, label)
    if gradient is None or options.sampler == "ddpm":  # there the mean moves
      return denoise
    return classifier_guided(denoise, gradient, constants.classifier_scale)

  def shift(self, constants: Seeded, label: Cond, table: SamplerTable) -> Shift | None:
    """The `Trajectory.shift` of ancestral sampling with a classifier; None for all else."""
    gradient = self._gradient(constants, label)
    if gradient is None or self.options.sampler != "ddpm":
      return None
    return mean_shift(gradient, variances(self.run.schedule, table), constants.classifier_scale)

  def _gradient(self, constants: Seeded, label: Cond) -> GradientFn | None:
    if self.classifier is None or constants.classifier is None:
      return None
    network = self.classifier.denoiser.network

    def log_probabilities(xt: jax.Array, level: Level) -> jax.Array:
      return jax.nn.log_softmax(network(constants.classifier, xt, for_each(level, xt).time, None))

    return classifier_gradient(log_probabilities, label)


def bind_for_sampling(
  run: Run,
  options: SampleConfig = SampleConfig(),  # noqa: B008  frozen
  guide: Run | None = None,
  classifier: Run | None = None,
) -> Bind:
  """See `Bind`, whose attributes these are."""
  return Bind(run, options, guide, classifier)


def bind_weights(weights: Weights, options: SampleConfig) -> Bind:
  """What draws with weights of `constants_of`."""
  guide, classifier = weights.guide, weights.classifier
  return Bind(weights.run, options, guide and guide.run, classifier and classifier.run)


def constants_of(weights: Weights, options: SampleConfig) -> Seeded:
  """The weights, the seed and the scales of a draw. Raises UserError for several guidance scales."""
  guide, classifier = weights.guide, weights.classifier
  return seeded(
    weights.params,
    options.sample_seed,
    one_scale(options),
    guide and guide.params,
    options.classifier_scale,
    classifier and classifier.params,
    weights.run.stage_params,
  )


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
    denoise, shift = bind(constants, label), bind.shift(constants, label, table)
    x0, _ = sample(table, denoise, keys, first_stage.latent_shape, shift=shift)
    return first_stage.decode(constants.first_stage, x0)

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
    shift = bind.shift(constants, label, table)
    return Trajectory(table, bind(constants, label), keys, first_stage.latent_shape, shift=shift)

  def end(constants: Seeded, x0: jax.Array, _: jax.Array) -> jax.Array:
    return first_stage.decode(constants.first_stage, x0)

  return by_stretches(mesh, len(table.t), trajectory, end)


def by_stretches(
  mesh: DeviceMesh, evaluations: int, trajectory: Callable[..., Trajectory], end: Callable[..., Any]
) -> BatchedLoop:
  """Compiles a draw on all devices, in stretches.

  Args:
    mesh: the devices.
    evaluations: rows of the sampler's table.
    trajectory: (constants, *columns [B, ...]) -> the way of these B examples.
    end: (constants, x_0, x0_hat at the kept rows), see `Trajectory.end` -> the result, a tree of [B, ...].
  """
  return BatchedLoop(
    Loop(
      begin=lambda constants, *columns: trajectory(constants, *columns).begin(),
      advance=lambda constants, state, first, last, *columns: trajectory(constants, *columns).advance(
        state, first, last
      ),
      end=lambda constants, state, *columns: end(constants, *trajectory(constants, *columns).end(state)),
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
