"""Sampling tasks: progressive, interpolate, slerp, inpaint, reconstruct.

Each task is a function (parts, what it is given) -> Outcome: arrays for the npz file and a picture, some with an
animation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import Config, SampleConfig
from ddpm_jax.diffusion.denoiser import Cond
from ddpm_jax.diffusion.forward import q_sample
from ddpm_jax.diffusion.inpainting import Jumps, inpaint_after_row, repaint_jumps
from ddpm_jax.diffusion.interpolation import lerp, slerp
from ddpm_jax.diffusion.samplers import (
  SamplerTable,
  Trajectory,
  ddim_table,
  encoding_table,
  numbered_noise,
  sampler_grid,
  steps_table,
  time_grid,
)
from ddpm_jax.keys import Seeded, indexed_keys, stream_key
from ddpm_jax.runtime.progress import Drawing, counted
from ddpm_jax.sampling.classes import Classes
from ddpm_jax.sampling.draw import Bind, bind_weights, by_stretches, constants_of, fit_batch, table_of
from ddpm_jax.training.setup import Run
from ddpm_jax.weights.load import Weights
from ddpm_jax.workdir import grids

_SHARES = 9  # points from one end of an interpolation to the other
_FRAMES = 50  # of the animation of a progressive draw
_STRIP = 10  # of them in the strip
_VERSIONS = 4  # drawn of each image that is inpainted: what is hidden has more than one answer


class Outcome(NamedTuple):
  """The result of a task.

  Attributes:
    arrays: for the npz file; images are uint8 [N, ..., H, W, C].
    picture: uint8 [height, width, 3].
    frames: pictures of an animation, or none.
    facts: facts, for the terminal and the settings in the npz file.
  """

  arrays: dict[str, np.ndarray]
  picture: np.ndarray
  frames: list[np.ndarray]
  facts: Mapping[str, float | str]


class Parts(NamedTuple):
  """What a task draws with.

  Attributes:
    weights: of the model.
    config: the options.
    quiet: say nothing of how far it is.
    classes: of what is drawn; None for an unconditional model.
  """

  weights: Weights
  config: Config
  quiet: bool
  classes: Classes | None = None

  @property
  def run(self) -> Run:
    """The parts of the model."""
    return self.weights.run

  @property
  def options(self) -> SampleConfig:
    """The options of drawing."""
    return self.config.sample

  @property
  def shape(self) -> tuple[int, int, int]:
    """Of an x_0."""
    return self.run.first_stage.latent_shape

  @property
  def bind(self) -> Bind:
    """What makes the denoise function that the options name."""
    return self.binding(self.options)

  def binding(self, options: SampleConfig) -> Bind:
    """`bind` with other options."""
    return bind_weights(self.weights, options)

  def x0(self, constants: Seeded, images: jax.Array) -> jax.Array:
    """The x_0 of given images, uint8 [B, H, W, C]: of latents the mean."""
    params = constants.first_stage
    return self.run.first_stage.x0(params, self.run.first_stage.moments(params, images))

  def images(self, constants: Seeded, x0: jax.Array) -> jax.Array:
    """The images uint8 [B, ..., H, W, C] of x_0."""
    rows = x0.reshape(-1, *self.shape)
    return self.run.first_stage.decode(constants.first_stage, rows).reshape(*x0.shape[:-3], *self.run.image_shape)

  def draw(
    self,
    table: SamplerTable,
    trajectory: Callable[..., Trajectory],
    *columns: np.ndarray,
    image: np.ndarray | None = None,
    end: Callable[..., Any] | None = None,
  ) -> Any:
    """Draws in batches, and shows how far it is.

    Args:
      table: that of the trajectory.
      trajectory: (`Seeded`, *columns) -> the way of these rows; of a conditional model with their labels as `label`.
      *columns: NumPy arrays, one entry for each row.
      image: int [rows], which image's class each has; None: as the first column says.
      end: (`Seeded`, x_0, x0_hat at the kept rows) -> what is returned of a row; None: the image of x_0.

    Returns:
      NumPy arrays.
    """
    evaluations, number = len(table.t), len(columns[0])
    if self.classes is not None:
      columns = (*columns, self.classes.of(columns[0] if image is None else image))
    shared = by_stretches(
      self.run.mesh, evaluations, trajectory, end or (lambda seeded, x0, _: self.images(seeded, x0))
    )
    constants = constants_of(self.weights, self.options)
    batches, asked = [], self.options.sample_batch_size
    with counted("image", total=number, quiet=self.quiet) as (done, _):

      def report(first: int, count: int, made: int) -> None:
        at = Drawing(number, first, count, made, evaluations)
        done(at.images, str(at))

      size = min(asked, number) if asked else fit_batch(shared, constants, *columns, number=number)
      report(0, size, 0)
      for first in range(0, number, size):
        batch = [column[first : first + size] for column in columns]
        batches.append(shared(constants, *batch, size=size, done=functools.partial(report, first, len(batch[0]))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


def tables(parts: Parts) -> tuple[SamplerTable, ...]:
  """What the task of the options goes through for each row, one after the other."""
  options, schedule, variance = parts.options, parts.run.schedule, parts.config.diffusion.variance
  match options.sample_task:
    case "interpolate":
      return (table_of(options, schedule, variance, _first_timestep(parts)),)
    case "inpaint":
      jumps = _jumps(parts)
      return (steps_table(schedule, options.sampler, jumps.t, jumps.s, eta=options.eta, variance=variance),)
    case "reconstruct":
      times = time_grid(schedule, options.sampling_steps or schedule.num_timesteps, _reconstruction_grid(options))
      return encoding_table(schedule, times), ddim_table(schedule, times[:-1], times[1:], eta=0.0)
    case _:
      return (table_of(options, schedule, variance),)


def _first_timestep(parts: Parts) -> int:
  """To which images are diffused that are interpolated."""
  return parts.options.interpolation_timestep or max(1, parts.run.schedule.num_timesteps // 2)


def _jumps(parts: Parts) -> Jumps:
  """The steps of RePaint."""
  options = parts.options
  times = sampler_grid(parts.run.schedule, options.sampler, num_steps=options.sampling_steps, grid=options.time_grid)
  return repaint_jumps(times, options.repaint_jump, options.repaint_resamples)


def _reconstruction_grid(options: SampleConfig) -> str:
  return "uniform" if options.time_grid == "auto" else options.time_grid  # down to t = 1, next to the image


def _keys(constants: Seeded, index: jax.Array) -> jax.Array:
  """The keys of a draw's images."""
  return indexed_keys(stream_key(constants.seed, "sample"), index)


def progressive(parts: Parts) -> Outcome:
  """x0_hat along the way (Ho et al. 2020, section 4.3 and figure 6): one row for each image, noise at the left."""
  (table,) = tables(parts)
  frames = min(_FRAMES, len(table.t))
  keep = np.unique(np.round(np.linspace(0, len(table.t) - 1, frames)).astype(int))

  def rows(constants: Seeded, index: jax.Array, label: Cond = None) -> Trajectory:
    keys, denoise = _keys(constants, index), parts.bind(constants, label)
    shift = parts.bind.shift(constants, label, table)
    return Trajectory(table, denoise, keys, parts.shape, keep=tuple(keep.tolist()), shift=shift)

  index = np.arange(parts.options.num_samples, dtype=np.int32)

  def end(constants: Seeded, x0: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    return parts.images(constants, x0), parts.images(constants, kept)

  final, kept = parts.draw(table, rows, index, end=end)
  shown = np.unique(np.round(np.linspace(0, len(keep) - 1, _STRIP - 1)).astype(int))
  strip = np.concatenate([kept[:, shown], final[:, None]], axis=1)
  movie = [grids.image_grid(kept[:, i]) for i in range(len(keep))]
  movie += [grids.image_grid(final)] * 10  # the end stands still for a second
  arrays = {"images": final, "x0_hat": kept, "timesteps": table.t[keep]}
  return Outcome(arrays, grids.image_rows(strip), movie, {})


def interpolate(parts: Parts, given: np.ndarray) -> Outcome:
  """Between pairs of images: both diffused to t with the same noise, mixed, denoised (Ho et al. 2020, section 4.4).

  given: uint8 [2 P, H, W, C]; pairs are neighbours.
  """
  run, schedule = parts.run, parts.run.schedule
  (table,), first = tables(parts), _first_timestep(parts)

  def rows(
    constants: Seeded, pair: jax.Array, a: jax.Array, b: jax.Array, share: jax.Array, label: Cond = None
  ) -> Trajectory:
    keys = _keys(constants, pair)
    eps = numbered_noise(keys, parts.shape)(len(table.t) + 1)
    diffuse = jax.vmap(functools.partial(q_sample, level=schedule.level(first)))
    start = jax.vmap(lerp)(diffuse(parts.x0(constants, a), eps), diffuse(parts.x0(constants, b), eps), share)
    shift = parts.bind.shift(constants, label, table)
    return Trajectory(table, parts.bind(constants, label), keys, parts.shape, start=start, shift=shift)

  pair, share = _pairs_and_shares(len(given) // 2)
  drawn = parts.draw(table, rows, pair, given[2 * pair], given[2 * pair + 1], share)
  drawn = drawn.reshape(-1, _SHARES, *run.image_shape)
  row = np.concatenate([given[0::2, None], drawn, given[1::2, None]], axis=1)
  return Outcome({"images": drawn, "given": given}, grids.image_rows(row, apart=(0, _SHARES)), [], {"timestep": first})


def slerp_noises(parts: Parts) -> Outcome:
  """Between pairs of noises, along the sphere (Song et al. 2021, appendix D.5)."""
  run = parts.run
  (table,) = tables(parts)

  def rows(constants: Seeded, pair: jax.Array, share: jax.Array, label: Cond = None) -> Trajectory:
    ends = [numbered_noise(_keys(constants, 2 * pair + end), parts.shape)(0) for end in (0, 1)]
    start = jax.vmap(slerp)(ends[0], ends[1], share)
    keys, shift = _keys(constants, 2 * pair), parts.bind.shift(constants, label, table)
    return Trajectory(table, parts.bind(constants, label), keys, parts.shape, start=start, shift=shift)

  drawn = parts.draw(table, rows, *_pairs_and_shares(parts.options.num_samples))
  drawn = drawn.reshape(-1, _SHARES, *run.image_shape)
  return Outcome({"images": drawn}, grids.image_rows(drawn), [], {})


def inpaint(parts: Parts, given: np.ndarray, mask: np.ndarray) -> Outcome:
  """Draws what a mask covers of given images (RePaint).

  Args:
    parts: what to draw with; of the samplers ddpm or ddim.
    given: uint8 [N, H, W, C].
    mask: bool [H, W], true where pixels are drawn; of latents, those that have such pixels are.

  What is hidden has no part in the draw: before images are encoded, the mean of the known pixels stands for it.
  """
  run, schedule = parts.run, parts.run.schedule
  (table,), jumps = tables(parts), _jumps(parts)
  drawn_here = mask[:, :, None]
  seen = given if run.first_stage.identity else _without(given, mask)
  mask_of_x0 = jnp.asarray(shrunk(mask, parts.shape[:2]), jnp.float32)[None, :, :, None]

  def rows(constants: Seeded, index: jax.Array, known: jax.Array, label: Cond = None) -> Trajectory:
    keys = _keys(constants, index)
    after_row = inpaint_after_row(
      schedule,
      jumps,
      parts.x0(constants, known),
      mask_of_x0,
      numbered_noise(keys, parts.shape),
    )
    shift = parts.bind.shift(constants, label, table)
    return Trajectory(table, parts.bind(constants, label), keys, parts.shape, after_row=after_row, shift=shift)

  index = np.arange(len(given) * _VERSIONS, dtype=np.int32)
  image = index // _VERSIONS
  drawn = parts.draw(table, rows, index, seen[image], image=image)
  if not run.first_stage.identity:  # which gives what is known back to no more than its precision
    drawn = np.where(drawn_here, drawn, given[image])
  drawn = drawn.reshape(-1, _VERSIONS, *run.image_shape)
  hidden = np.where(drawn_here, np.uint8(128), given)
  row = np.concatenate([given[:, None], hidden[:, None], drawn], axis=1)
  picture = grids.image_rows(row, apart=(1,))
  facts = {"network_evaluations": len(table.t)}
  return Outcome({"images": drawn, "given": given, "mask": mask.astype(np.uint8)}, picture, [], facts)


def _without(given: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """The images uint8 [N, H, W, C] with the mean of the others for each pixel of the mask; grey if there are none."""
  known = given[:, ~mask]
  colour = known.mean(1).round().astype(np.uint8) if known.shape[1] else np.full_like(given[:, 0, 0], 128)
  return np.where(mask[:, :, None], colour[:, None, None], given)


def shrunk(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """A mask bool [H, W] for latents, bool [h, w]: one is drawn if any of its pixels is.

  >>> shrunk(np.asarray([[False, False, False, True], [False, False, False, False]]), (1, 2)).tolist()
  [[False, True]]

  Args:
    mask: true where pixels are drawn.
    size: h, w, divisors of H and W.
  """
  (height, width), (h, w) = mask.shape, size
  return np.any(mask.reshape(h, height // h, w, width // w), axis=(1, 3))


def reconstruct(parts: Parts, given: np.ndarray) -> Outcome:
  """Encodes images to noise with deterministic DDIM and decodes them again (Song et al. 2021, section 5.4).

  given: uint8 [N, H, W, C]. The picture has the image, its noise, what came back, and ten times the difference.
  """
  # Clipping cannot be undone.
  bind = parts.binding(dataclasses.replace(parts.options, threshold="none"))
  up, down = tables(parts)

  def encode(constants: Seeded, index: jax.Array, known: jax.Array, label: Cond = None) -> Trajectory:
    keys, start = _keys(constants, index), parts.x0(constants, known)
    return Trajectory(up, bind(constants, label), keys, parts.shape, start=start)

  def decode(constants: Seeded, index: jax.Array, noise: jax.Array, label: Cond = None) -> Trajectory:
    return Trajectory(down, bind(constants, label), _keys(constants, index), parts.shape, start=noise)

  index = np.arange(len(given), dtype=np.int32)
  paler = 1 / 3 if parts.run.first_stage.identity else 1  # three deviations of the noise are the range of pixels

  def noise_and_image(constants: Seeded, noise: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
    return noise, parts.images(constants, paler * noise)

  noise, seen = parts.draw(up, encode, index, given, end=noise_and_image)
  pixels = parts.draw(down, decode, index, noise)
  difference = pixels.astype(int) - given
  shown = [given, seen, pixels, (128 + 10 * difference).clip(0, 255).astype(np.uint8)]
  error = float(np.sqrt(np.mean(difference.astype(np.float64) ** 2)))
  facts = {
    "time_grid": _reconstruction_grid(parts.options),
    "network_evaluations": 2 * len(up.t),
    "rms_error_in_grey_levels": error,
    "peak_signal_to_noise_db": float(20 * np.log10(255 / max(error, 1e-3))),
    "deviation_of_the_noise": float(noise.std()),
  }
  return Outcome({"images": pixels, "given": given, "noise": noise}, grids.image_rows(np.stack(shown, 1)), [], facts)


def rows_for_each(task: str) -> int:
  """Images drawn for each of `--num_samples`."""
  return {"interpolate": _SHARES, "slerp": _SHARES, "inpaint": _VERSIONS}.get(task, 1)


def _pairs_and_shares(pairs: int) -> tuple[np.ndarray, np.ndarray]:
  """Pair and share in [0, 1] of each row: int32 and float32 [pairs * _SHARES]."""
  pair, place = np.divmod(np.arange(pairs * _SHARES), _SHARES)
  return pair.astype(np.int32), (place / (_SHARES - 1)).astype(np.float32)
