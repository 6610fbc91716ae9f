"""Objectives: the loss that training minimises. The denoiser's is Algorithm 1 of Ho et al. 2020, lines 2 to 5."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from ddpm_jax.config import DiffusionConfig
from ddpm_jax.data.images import random_flip
from ddpm_jax.diffusion.conditioning import drop_label
from ddpm_jax.diffusion.denoiser import Cond, Denoiser, Network, Params
from ddpm_jax.diffusion.forward import q_sample
from ddpm_jax.diffusion.losses import loss_weights, pointwise_loss
from ddpm_jax.diffusion.schedules import NoiseSchedule, at
from ddpm_jax.first_stage.pixels import FirstStage
from ddpm_jax.keys import example_key

# image: uint8 [B, H, W, C], or moments: float32 [B, O, h, w, ..] of the image and, if O is 2, of the mirrored one;
# index: int32 [B], the place of each row in the global batch; replaced: bool [B], whether the row holds another image,
# because its own could not be read; in a conditional run label: int32 [B], its class
Batch = dict[str, jax.Array]
Terms = dict[str, jax.Array]  # scalars by name, means over the batch; training minimises their sum
PerExample = dict[str, jax.Array]  # [B, ...] by name


class Objective(Protocol):
  """The loss that `step.train_step` minimises: the denoiser's or your own. Pure functions."""

  def loss(self, params: Params, extra: Any, frozen: Any, batch: Batch, keys: jax.Array) -> tuple[Terms, PerExample]:
    """The loss of a batch.

    Args:
      params: the parameters that are trained.
      extra: `TrainState.extra`.
      frozen: parameters of networks that are not trained.
      batch: B examples: all of the global batch, or the part of a device or of a microbatch.
      keys: a random key for each example, [B].

    Returns:
      The terms of the loss, and numbers of each example for `update_extra`; the means of those of shape [B] are logged.
    """
    ...

  def update_extra(self, extra: Any, per_example: PerExample) -> Any:
    """`TrainState.extra` after a step, from the numbers of the global batch in the order of its index."""
    ...


@runtime_checkable
class CombiningObjective(Objective, Protocol):
  """An objective that makes one gradient of those of several terms, such as with a weight that depends on their norms.

  An objective without these two methods minimises the sum of its terms.
  """

  def apart(self, extra: Any) -> dict[str, jax.Array]:
    """The terms whose gradients are computed apart from that of the sum of the others.

    bool scalars: whether the gradient is needed at this step; where it is not, it is 0.
    """
    ...

  def combine(self, gradients: dict[str, Params], extra: Any) -> tuple[Params, dict[str, jax.Array]]:
    """The gradient that the optimizer is given.

    Args:
      gradients: of each term of `apart`, and of the sum of the others as 'together': means over microbatches and
        devices, trees as the parameters.
      extra: `TrainState.extra`, before the step.

    Returns:
      The gradient, and scalars to be logged.
    """
    ...


class NoisedExample(NamedTuple):
  """The random choices in the training of one example."""

  image: jax.Array
  t: jax.Array
  eps: jax.Array
  dropout_key: jax.Array


def sample_example(
  key: jax.Array, image: jax.Array, num_timesteps: int, shape: tuple[int, ...], *, flip: bool
) -> NoisedExample:
  """Lines 2 to 4 of Algorithm 1 for one example: the image (flipped or not), t ~ U{1..T}, eps ~ N(0, I).

  Args:
    key: of this example at this step.
    image: uint8 [H, W, C]; or the moments of both orientations, [2, h, w, ..], without flips of one.
    num_timesteps: T.
    shape: of x_0.
    flip: mirror the image with probability 1/2.
  """
  t_key, eps_key, flip_key, dropout_key = jax.random.split(key, 4)
  if image.ndim == 3:
    image = random_flip(flip_key, image) if flip else image
  else:
    image = image[jax.random.bernoulli(flip_key).astype(jnp.int32)] if flip else image[0]
  t = jax.random.randint(t_key, (), 1, num_timesteps + 1)
  return NoisedExample(image, t, jax.random.normal(eps_key, shape, jnp.float32), dropout_key)


def images_of(batch: Batch) -> jax.Array:
  """The images of a batch, or their moments, where these are cached."""
  return batch["moments"] if "moments" in batch else batch["image"]


def x0_of(first_stage: FirstStage, frozen: Any, images: jax.Array, keys: jax.Array) -> jax.Array:
  """x_0 of images uint8 [B, H, W, C], or of their moments, float; sampled with the keys of the examples."""
  moments = first_stage.moments(frozen, images) if images.dtype == jnp.uint8 else images
  return first_stage.x0(frozen, moments, keys)


@dataclasses.dataclass(frozen=True)
class DenoiserObjective:
  """The weighted simple loss (Ho et al. 2020, eq. 14) of a denoiser.

  Attributes:
    denoiser: the network that is trained, and what it predicts.
    schedule: the noise schedule.
    first_stage: turns images into x_0; its parameters are `frozen`.
    config: names the pointwise loss and the weighting.
    flip: mirror each image with probability 1/2.
    label_dropout: rate at which labels are dropped.
    null_label: what stands for a dropped label; None where none is dropped.
  """

  denoiser: Denoiser
  schedule: NoiseSchedule
  first_stage: FirstStage
  config: DiffusionConfig
  flip: bool
  label_dropout: float = 0.0
  null_label: int | None = None

  def sample_training_example(self, key: jax.Array, image: jax.Array) -> NoisedExample:
    """Lines 2 to 4 of Algorithm 1 for one image, uint8 [H, W, C], with the key of this example at this step."""
    return sample_example(key, image, self.schedule.num_timesteps, self.first_stage.latent_shape, flip=self.flip)

  def condition(self, keys: jax.Array, batch: Batch) -> Cond:
    """What the network is told of each example: its label or the null label, int32 [B]; None if unconditional."""
    label = batch.get("label")
    if label is None or self.null_label is None:
      return label
    drop = functools.partial(drop_label, rate=self.label_dropout, null_label=self.null_label)
    return jax.vmap(lambda key, label: drop(example_key(key, "label_dropout"), label))(keys, label)

  def loss(self, params: Params, extra: Any, frozen: Any, batch: Batch, keys: jax.Array) -> tuple[Terms, PerExample]:
    """Line 5 of Algorithm 1, averaged over the batch."""
    network, parameterization = self.denoiser.network, self.denoiser.parameterization
    weights = loss_weights(self.config.loss_weighting, parameterization, self.schedule)

    images, t, eps, dropout_keys = jax.vmap(self.sample_training_example)(keys, images_of(batch))
    x0, level = x0_of(self.first_stage, frozen, images, keys), self.schedule.level(t)
    xt = jax.vmap(q_sample)(x0, eps, level)
    output = network(params, xt, level.time, self.condition(keys, batch), dropout_keys=dropout_keys)
    target = jax.vmap(parameterization.target)(x0, eps, level)
    losses = jax.vmap(functools.partial(pointwise_loss, self.config.loss))(output, target)
    return {"simple": jnp.mean(at(weights, t) * losses)}, {}

  def update_extra(self, extra: Any, per_example: PerExample) -> Any:
    """The same: it keeps nothing."""
    return extra


@dataclasses.dataclass(frozen=True)
class ClassifierObjective:
  """The cross entropy of a classifier of noisy images (Dhariwal and Nichol 2021, section 4).

  Attributes:
    network: makes logits [B, K] of x_t.
    schedule: the noise schedule, that of the model which it is to guide.
    first_stage: turns images into x_0; its parameters are `frozen`.
    flip: mirror each image with probability 1/2.
  """

  network: Network
  schedule: NoiseSchedule
  first_stage: FirstStage
  flip: bool

  def loss(self, params: Params, extra: Any, frozen: Any, batch: Batch, keys: jax.Array) -> tuple[Terms, PerExample]:
    """-log p(y | x_t) with t ~ U{1..T}, averaged over the batch; of each example whether its class is the likeliest."""
    num_timesteps, shape = self.schedule.num_timesteps, self.first_stage.latent_shape
    sample = functools.partial(sample_example, num_timesteps=num_timesteps, shape=shape, flip=self.flip)
    images, t, eps, dropout_keys = jax.vmap(sample)(keys, images_of(batch))
    x0, level = x0_of(self.first_stage, frozen, images, keys), self.schedule.level(t)
    xt = jax.vmap(q_sample)(x0, eps, level)
    logits = self.network(params, xt, level.time, None, dropout_keys=dropout_keys)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    right = jnp.argmax(logits, axis=-1) == batch["label"]
    return {"cross_entropy": jnp.mean(losses)}, {"accuracy": right.astype(jnp.float32)}

  def update_extra(self, extra: Any, per_example: PerExample) -> Any:
    """The same: it keeps nothing."""
    return extra
