"""Likelihoods of a trained model over a data set, on all devices: the variational bound, and that of the ODE."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.sources import Source
from ddpm_jax.devices.batched import BatchedFn
from ddpm_jax.devices.mesh import DeviceMesh
from ddpm_jax.diffusion.denoiser import Cond, Denoiser, Params, Prediction
from ddpm_jax.diffusion.forward import prior_kl, q_sample
from ddpm_jax.diffusion.likelihood import (
  bound_term,
  density_to_bits,
  dequantise,
  ode_evaluations,
  ode_log_density,
  strata,
)
from ddpm_jax.diffusion.schedules import Level, NoiseSchedule
from ddpm_jax.errors import UserError
from ddpm_jax.first_stage.pixels import FirstStage
from ddpm_jax.keys import Seeded, indexed_keys, seeded, stream_key

Progress = Callable[[int], None]
PRECISION = "highest"  # of products; with fewer bits the ODE's likelihood is too good, see docs/concepts/precision.md
_AT_ONCE = 25  # strata in one call on the devices: long enough to hide its cost, short enough to be interrupted
_MOST_BINS = 100  # of the result by timestep


def bound(
  denoiser: Denoiser,
  params: Params,
  schedule: NoiseSchedule,
  first_stage: FirstStage,
  frozen: Params = None,
  *,
  variance: str,
  source: Source,
  labels: np.ndarray | None = None,
  examples: int,
  timesteps: int,
  batch_size: int,
  mesh: DeviceMesh,
  seed: int,
  progress: Progress | None = None,
) -> dict[str, Any]:
  """The variational bound on the negative log-likelihood (Ho et al. 2020, eq. 5), with x0_hat clipped to [-1, 1].

  Of a latent model it is that of the latents, sampled from their posterior: nothing is clipped, and L_0 is the density
  of a Gaussian, so that the bits are those of a density and may be negative.

  What is drawn for an example, its timesteps and its noise at each of them, depends on (seed, index) alone.

  Args:
    denoiser: see `diffusion.denoiser`.
    params: its weights, placed on the devices.
    schedule: the noise schedule.
    first_stage: turns images into x_0.
    frozen: its parameters, placed likewise; None: it has none.
    variance: of p, 'fixed_small' or 'fixed_large'.
    source: the images.
    labels: of all of them, int32 [N], for a conditional model; None for an unconditional one.
    examples: how many of them, evenly spaced; 0: all.
    timesteps: for each image, see `likelihood.strata`; 0: all T. Unbiased either way; the noise is drawn in any case.
    batch_size: images at once, over all devices.
    mesh: the devices.
    seed: of the stream 'bound'.
    progress: called now and then with the number of examples that are done.

  Returns:
    Bits per dimension, means over the examples: `total` with its `standard_error` (None for one example), which is
    `prior` (L_T) + `chain` (L_1 to L_{T-1}) + `decoder` (L_0); also as `rate` (prior + chain) and `distortion`
    (decoder). `examples` and `timesteps_per_example` are counts. `by_timestep` has lists with an entry for each range
    of timesteps, `t_low` to `t_high`, both included: `bits`, the mean of L_{t-1} in it, and `eps_mse`, the mean squared
    error of eps_hat, before clipping.

  Raises:
    UserError: the schedule has a single timestep, with which the decoder has no width.
  """
  if schedule.num_timesteps < 2:
    raise UserError(f"num_timesteps: {schedule.num_timesteps} is too few for the bound, which needs at least 2")
  edges = strata(schedule.num_timesteps, timesteps)
  number, sizes = len(edges) - 1, np.diff(edges)
  calls = math.ceil(number / _AT_ONCE)
  at_once = math.ceil(number / calls)
  function = _bound_function(denoiser, schedule, first_stage, variance, edges, at_once)
  constants = seeded(params, seed, first_stage=frozen)
  compiled = BatchedFn(function, mesh, matmul_precision=PRECISION)
  indices = _spread(len(source), examples)
  size = min(batch_size, len(indices))
  prior, decoder, chain = (np.empty(len(indices)) for _ in range(3))
  sums = np.zeros((2, number))  # of bits and of squared errors, by stratum
  for rows, images in _batches(source, indices, size):
    columns, label = (images, indices[rows].astype(np.int32)), _labels_of(labels, indices[rows])
    parts = []
    for first in range(0, number, at_once):
      *terms, prior[rows] = compiled(constants, *columns, np.full(len(images), first, np.int32), *label, size=size)
      parts.append(np.asarray(terms, np.float64))
      _tell(progress, rows.start + len(images) * len(parts) // (calls + 1))
    terms = np.concatenate(parts, axis=2)[:, :, :number]  # [2, B, strata]
    bits = terms[0] * sizes
    decoder[rows], chain[rows] = bits[:, 0], bits[:, 1:].sum(axis=1)
    sums += terms.sum(axis=1)
    _tell(progress, rows.stop)
  return {
    "examples": len(indices),
    "timesteps_per_example": number,
    **_mean(prior + chain + decoder),
    "prior": float(prior.mean()),
    "chain": float(chain.mean()),
    "decoder": float(decoder.mean()),
    "rate": float((prior + chain).mean()),
    "distortion": float(decoder.mean()),
    "by_timestep": _by_timestep(edges, *(sums / len(indices))),
  }


def _bound_function(
  denoiser: Denoiser, schedule: NoiseSchedule, first_stage: FirstStage, variance: str, edges: np.ndarray, number: int
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
  """(`Seeded`, images uint8 [B, ...], index, first, label int32 [B]) -> bits, eps_mse [B, number] and L_T [B].

  The label is that of a conditional model. The columns of the result are the strata `first`, `first` + 1, ...; past the
  last one they are without meaning.
  """
  low, high = (jnp.asarray(edge, jnp.int32) for edge in (edges[:-1], edges[1:]))

  def draw(key: jax.Array, stratum: jax.Array, x0: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, Level]:
    # The noise at timestep t has the number t of the example's key; the number 0 is left for the timesteps.
    timestep_key = jax.random.fold_in(jax.random.fold_in(key, 0), stratum)
    t = jax.random.randint(timestep_key, (), low[stratum], high[stratum])
    eps = jax.random.normal(jax.random.fold_in(key, t), x0.shape)
    level = schedule.level(t)
    return t, eps, q_sample(x0, eps, level), level

  def judge(found: Prediction, x0: jax.Array, eps: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    eps_mse = jnp.mean(jnp.square(found.eps - eps))
    x0_hat = jnp.clip(found.x0, -1.0, 1.0) if first_stage.identity else found.x0
    return bound_term(schedule, variance, x0, t, x0_hat, first_stage.bin_width), eps_mse

  def function(constants: Seeded, images: jax.Array, index: jax.Array, first: jax.Array, label: Cond = None):
    keys = indexed_keys(stream_key(constants.seed, "bound"), index)
    x0 = first_stage.x0(constants.first_stage, first_stage.moments(constants.first_stage, images), keys)
    denoise = denoiser.bind(constants.params, label)

    def step(carry: None, offset: jax.Array) -> tuple[None, tuple]:
      t, eps, xt, level = jax.vmap(draw)(keys, jnp.minimum(first + offset, len(low) - 1), x0)
      return carry, jax.vmap(judge)(denoise(xt, level), x0, eps, t)

    _, (bits, eps_mse) = jax.lax.scan(step, None, jnp.arange(number))
    return bits.T, eps_mse.T, jax.vmap(lambda x: prior_kl(schedule, x))(x0)

  return function


def _by_timestep(edges: np.ndarray, bits: np.ndarray, eps_mse: np.ndarray) -> dict[str, list]:
  """Means over neighbouring strata, so that there are not too many: `bits` and `eps_mse` are float64 [strata]."""
  groups = strata(len(bits), _MOST_BINS) - 1
  sizes = np.diff(edges)

  def pool(values: np.ndarray) -> list[float]:
    return (np.add.reduceat(values * sizes, groups[:-1]) / np.add.reduceat(sizes, groups[:-1])).tolist()

  ends = edges[groups]
  return {
    "t_low": ends[:-1].tolist(),
    "t_high": (ends[1:] - 1).tolist(),
    "bits": pool(bits),
    "eps_mse": pool(eps_mse),
  }


def ode(
  denoiser: Denoiser,
  params: Params,
  schedule: NoiseSchedule,
  first_stage: FirstStage,
  frozen: Params = None,
  *,
  source: Source,
  labels: np.ndarray | None = None,
  examples: int,
  steps: int,
  probes: int,
  batch_size: int,
  mesh: DeviceMesh,
  seed: int,
  progress: Progress | None = None,
) -> dict[str, Any]:
  """The negative log-likelihood under the probability-flow ODE (Song et al. 2021), of uniformly dequantised images.

  Of a latent model it is the density of the latents, sampled from their posterior, in bits.

  What is drawn for an example, where in its bins it lies and the random signs, depends on (seed, index) alone.

  Args:
    denoiser: see `diffusion.denoiser`.
    params: its weights, placed on the devices.
    schedule: the noise schedule.
    first_stage: turns images into x_0.
    frozen: its parameters, placed likewise; None: it has none.
    source: the images.
    labels: of all of them, int32 [N], for a conditional model; None for an unconditional one.
    examples: how many of them, evenly spaced; 0: all.
    steps: of Heun's method; at most T are made.
    probes: random vectors of Hutchinson's estimator.
    batch_size: images at once, over all devices.
    mesh: the devices.
    seed: of the stream 'ode'.
    progress: called now and then with the number of examples that are done.

  Returns:
    `total` in bits per dimension with its `standard_error` (None for one example), and the counts `examples`, `steps`,
    `evaluations` (of the network, for each image) and `probes`.
  """
  steps = min(steps, schedule.num_timesteps)

  def function(constants: Seeded, images: jax.Array, index: jax.Array, label: Cond = None) -> jax.Array:
    keys = indexed_keys(stream_key(constants.seed, "ode"), index)
    place_keys, probe_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    x0 = first_stage.x0(constants.first_stage, first_stage.moments(constants.first_stage, images), keys)
    x0 = x0 if first_stage.bin_width is None else jax.vmap(dequantise)(place_keys, x0)
    denoise = denoiser.bind(constants.params, label)
    return ode_log_density(schedule, denoise, x0, probe_keys, num_steps=steps, num_probes=probes)

  compiled, constants = BatchedFn(function, mesh, matmul_precision=PRECISION), seeded(params, seed, first_stage=frozen)
  indices = _spread(len(source), examples)
  size = min(batch_size, len(indices))
  bits = np.empty(len(indices))
  for rows, images in _batches(source, indices, size):
    columns = images, indices[rows].astype(np.int32), *_labels_of(labels, indices[rows])
    log_density = compiled(constants, *columns, size=size)
    bits[rows] = density_to_bits(log_density, math.prod(first_stage.latent_shape), first_stage.bin_width)
    _tell(progress, rows.stop)
  counts = {"examples": len(indices), "steps": steps, "evaluations": ode_evaluations(steps), "probes": probes}
  return counts | _mean(bits)


def _spread(length: int, examples: int) -> np.ndarray:
  """Indices, each once, rising: all of them for 0, else that many, evenly spaced. int64."""
  number = min(examples, length) or length
  return np.arange(number) * length // number


def _batches(source: Source, indices: np.ndarray, size: int) -> Iterator[tuple[slice, np.ndarray]]:
  """Which of the indices, and their images uint8 [at most size, H, W, C]."""
  for start in range(0, len(indices), size):
    rows = slice(start, min(start + size, len(indices)))
    yield rows, source.read(indices[rows]).images


def _labels_of(labels: np.ndarray | None, indices: np.ndarray) -> tuple[np.ndarray, ...]:
  """The column of labels, where there are any."""
  return () if labels is None else (labels[indices].astype(np.int32),)


def _mean(bits: np.ndarray) -> dict[str, float | None]:
  """The mean over the examples, and the standard error of this mean."""
  error = float(bits.std(ddof=1) / np.sqrt(len(bits))) if len(bits) > 1 else None
  return {"total": float(bits.mean()), "standard_error": error}


def _tell(progress: Progress | None, done: int) -> None:
  if progress is not None:
    progress(done)
