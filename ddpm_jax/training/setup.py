"""The parts of a run that training and sampling share, built from its Config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax.config import WITHOUT_ENDS, Config, own_images
from ddpm_jax.devices.mesh import DeviceMesh
from ddpm_jax.diffusion.denoiser import Denoiser
from ddpm_jax.diffusion.schedules import (
  SEEN_SIGNAL,
  SEEN_SIGNAL_OF_LATENTS,
  NoiseSchedule,
  betas_that_reach_noise,
  largest_prior_kl,
  make_schedule,
  reaches_noise,
)
from ddpm_jax.first_stage.latents import FixedStage
from ddpm_jax.first_stage.pixels import FirstStage, Pixels
from ddpm_jax.keys import stream_key
from ddpm_jax.models.build import Params, TrainableNetwork, build_denoiser, null_label
from ddpm_jax.training import autoencoder
from ddpm_jax.training.autoencoder import Pair, Perceptual, build_pair
from ddpm_jax.training.objective import (
  Batch,
  ClassifierObjective,
  CombiningObjective,
  DenoiserObjective,
  Objective,
)
from ddpm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from ddpm_jax.training.state import TrainState, create_state
from ddpm_jax.training.step import Metrics, abstract_batch, train_step

_MANY_IMAGES, _MANY_PASSES = 5000, 100  # see `copies_warning`


class Run(NamedTuple):
  """The parts of a run that never change while it runs."""

  config: Config
  schedule: NoiseSchedule
  first_stage: FirstStage
  denoiser: Denoiser
  mesh: DeviceMesh
  abstract_state: TrainState  # ShapeDtypeStructs with shardings
  lr_restart: int = 0  # the step at which the learning rate began anew, see `resume.restarts`
  objective: Objective | None = None  # in the place of the denoiser's loss
  own: dict[str, str] | None = None  # names of what is not as the settings say, see `layout.own_parts`
  # Parameters of networks that do not train, as `DeviceMesh.place` returns them, or their shapes with shardings.
  frozen: Any = {}  # noqa: RUF012
  pair: Pair | None = None  # of stage=autoencoder: the network of the denoiser, which means nothing then
  perceptual: Perceptual | None = None  # of --perceptual; its parameters, placed, are `frozen["perceptual"]`
  first_stage_facts: dict[str, Any] | None = None  # `FixedStage.facts`; None: pixels
  moments_shape: tuple[int, ...] | None = None  # O, h, w, ..; of batches that hold `moments` in the place of images

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """H, W, C of an image."""
    return self.first_stage.image_shape

  def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a global batch of that size, as the step gets it."""
    return abstract_batch(self.image_shape, batch_size, labels=self.conditional, moments=self.moments_shape)

  @property
  def stage_params(self) -> Params | None:
    """The parameters of the first stage, as `keys.Seeded` has them; None: pixels."""
    return self.frozen if self.first_stage_facts else None

  @property
  def conditional(self) -> bool:
    """Whether the network is told the class of an image, or tells it."""
    return self.config.model.num_classes > 0

  def with_perceptual(self, perceptual: Perceptual | None) -> Run:
    """The run of an autoencoder with its perceptual distance."""
    if perceptual is None:
      return self
    return self._replace(
      perceptual=perceptual, frozen=self.frozen | {"perceptual": _placed(perceptual.params, self.mesh)}
    )

  @property
  def packs(self) -> bool:
    """See `DeviceMesh.compile`: whether the step looks at no part of the gradient."""
    return not (self.pair and self.pair.discriminator) and not isinstance(self.objective, CombiningObjective)

  @property
  def null_label(self) -> int | None:
    """The label that stands for none; None if the network has no such label."""
    return null_label(self.config.model)

  def initial_state(self, params: Params | None = None) -> TrainState:
    """The state before the first training step, placed.

    Args:
      params: the weights to begin with, NumPy arrays, the same on every process; None: random ones.
    """
    init = functools.partial(_initial_state, self.denoiser, self.config, self.first_stage.latent_shape)
    shardings = self.mesh.state_shardings(self.abstract_state)
    compiled = jax.jit(init, out_shardings=shardings, compiler_options=self.mesh.once)
    return compiled(np.uint32(self.config.train.seed), params)

  def place(self, params: Params) -> Params:
    """Weights, NumPy arrays that are the same on every process, placed as those of a state."""
    return self.mesh.place(params)


def build_run(
  config: Config,
  image_shape: tuple[int, int, int],
  mesh: DeviceMesh,
  network: TrainableNetwork | None = None,
  stage: FixedStage | None = None,
) -> Run:
  """Builds the parts; nothing is computed or compiled. Raises UserError if they do not fit together.

  Args:
    config: the settings.
    image_shape: H, W, C.
    mesh: the devices.
    network: in the place of that of the settings.
    stage: the first stage of a latent model; None: pixels.
  """
  d = config.diffusion
  first_stage = stage.latents if stage else Pixels(image_shape)
  latent_shape = first_stage.latent_shape
  pair = build_pair(config, image_shape) if config.model.stage == "autoencoder" else None
  network = cast(TrainableNetwork, pair) if pair else network  # which no sampler is ever given
  denoiser = build_denoiser(config.model, d.prediction, latent_shape, network, attention=mesh.attention)
  schedule = make_schedule(d.beta_schedule, d.num_timesteps, beta_start=d.beta_start, beta_end=d.beta_end)
  shapes = jax.eval_shape(
    functools.partial(_initial_state, denoiser, config, latent_shape), np.uint32(config.train.seed)
  )
  abstract_state = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    mesh.state_shardings(shapes),
  )
  run = Run(config, schedule, first_stage, denoiser, mesh, abstract_state, pair=pair)
  return with_first_stage(run, stage) if stage else run


def with_first_stage(run: Run, stage: FixedStage) -> Run:
  """The run with the parameters of its first stage, placed as those of a state; of shapes, shapes with shardings."""
  return run._replace(frozen=_placed(stage.params, run.mesh), first_stage_facts=stage.facts)


def _placed(params: Params, mesh: DeviceMesh) -> Params:
  """NumPy arrays that are the same on every process, placed as those of a state; of shapes, shapes with shardings."""
  if not all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
    return mesh.place(params)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    params,
    mesh.state_shardings(params),
  )


def noise_warning(run: Run) -> str | None:
  """A line if at t = T more is left of images, or latents, than can go unseen, with betas that would do; else None."""
  pixels = run.first_stage.identity
  seen = SEEN_SIGNAL if pixels else SEEN_SIGNAL_OF_LATENTS
  if reaches_noise(run.schedule, seen):
    return None
  d, remedies = run.config.diffusion, []
  if d.beta_schedule not in WITHOUT_ENDS:
    betas = betas_that_reach_noise(d.beta_schedule, d.num_timesteps, d.beta_start, d.beta_end, seen)
    if betas:
      remedies.append("--beta_start={:g} --beta_end={:g}".format(*betas))
    if reaches_noise(make_schedule("cosine", d.num_timesteps), seen):
      remedies.append("--beta_schedule=cosine")
  most = f"{'up to ' if pixels else ''}{largest_prior_kl(run.schedule):.2g}"
  return (
    f"the noise schedule does not reach pure noise, from which sampling starts: at t = {d.num_timesteps}, the last "
    f"timestep, sqrt(alpha_bar) is {run.schedule.sqrt_alpha_bar[-1]:.2g} (L_T {most} bits/dim); in a new run, use "
    f"{' or '.join(remedies or ['more timesteps'])}"
  )


def copies_warning(config: Config, images: int) -> str | None:
  """A line if a model of this many own images is likely to learn them by heart; else None.

  The number of steps after which a diffusion model draws copies grows with the number of images, so that the number of
  passes says most (Favero et al. 2025, "Bigger Isn't Always Memorizing"; Bonnaire et al. 2025, "Why Diffusion Models
  Don't Memorize"); with many images it never does. The two bounds are no more than rules of thumb: --preset=images32
  makes 77 passes over the 3,754 images by which it was chosen.
  """
  passes = config.train.num_steps * config.data.batch_size / images
  if not own_images(config.data.dataset) or images >= _MANY_IMAGES or passes <= _MANY_PASSES:
    return None
  flips = "" if config.data.random_flip else ", or --random_flip if a mirrored image is as good"
  return (
    f"{config.train.num_steps:,} training steps of {config.data.batch_size} images are {passes:,.0f} passes over this "
    f"small set of {images}, which the model may learn by heart and draw copies of; use more images, or a smaller "
    f"--num_steps{flips}; 'neighbours' of --mode=evaluate measures it"
  )


def make_train_step(run: Run, objective: Objective | None = None) -> Callable[..., tuple[TrainState, Metrics]]:
  """`step.train_step` as (state, batch, axis_name=..., seed=..., frozen=...) -> (state, metrics), all else bound.

  Args:
    run: the run.
    objective: what to minimise; None: as the settings say.
  """
  config = run.config
  bound = functools.partial(
    train_step,
    objective=objective or run.objective or _objective(run),
    optimizer=_optimizer(config, run.lr_restart),
    learning_rate=learning_rate_schedule(config.optimizer, config.train.num_steps, run.lr_restart),
    ema_decay=config.optimizer.ema_decay,
    grad_accum_steps=config.train.grad_accum_steps,
    wrap_loss=run.mesh.wrap_loss,
  )

  def step(
    state: TrainState,
    batch: Batch,
    *,
    axis_name: str | None = None,
    seed: int | jax.Array = config.train.seed,
    frozen: Any = None,
  ) -> tuple[TrainState, Metrics]:
    return bound(state, {} if frozen is None else frozen, batch, axis_name=axis_name, seed=seed)

  return step


def _objective(run: Run) -> Objective:
  """That of the settings."""
  if run.pair:
    distance = run.perceptual and run.perceptual.distance
    return autoencoder.make_objective(run.pair, run.config, run.image_shape, distance)
  if run.config.model.stage == "classifier":
    return ClassifierObjective(run.denoiser.network, run.schedule, run.first_stage, run.config.data.random_flip)
  return make_objective(run)


def make_objective(run: Run) -> DenoiserObjective:
  """The denoiser's loss."""
  data, model = run.config.data, run.config.model
  return DenoiserObjective(
    run.denoiser,
    run.schedule,
    run.first_stage,
    run.config.diffusion,
    flip=data.random_flip,
    label_dropout=model.label_dropout,
    null_label=run.null_label,
  )


def _initial_state(
  denoiser: Denoiser, config: Config, latent_shape: tuple[int, int, int], seed: jax.Array, params: Params | None = None
) -> TrainState:
  if params is None:
    network = cast(TrainableNetwork, denoiser.network)  # `build_run` makes no other
    params = network.init(stream_key(seed, "init"), latent_shape)
  else:
    params = jax.tree.map(jnp.copy, params)  # the step donates its input, and a buffer of the caller may not be donated
  extra = autoencoder.initial_extra(config.autoencoder) if config.model.stage == "autoencoder" else None
  return create_state(params, _optimizer(config), extra)


def _optimizer(config: Config, restart: int = 0) -> optax.GradientTransformationExtraArgs:
  by_part = config.autoencoder.discriminator_weight > 0
  return make_optimizer(config.optimizer, config.train.num_steps, restart, by_part=by_part)
