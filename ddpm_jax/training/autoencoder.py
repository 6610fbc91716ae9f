"""The loss of a first stage (Rombach et al. 2022, section 3.1 and appendix G; Esser et al. 2021).

Reconstruction and perceptual distance, the regularisation of the latents, and a discriminator of patches. Autoencoder
and discriminator learn from one forward pass of the parameters before the step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ddpm_jax.config import AutoencoderConfig, Config
from ddpm_jax.data.images import random_flip
from ddpm_jax.diffusion.losses import pointwise_loss
from ddpm_jax.first_stage.pixels import Shape, to_float
from ddpm_jax.keys import example_key
from ddpm_jax.models.build import (
  AutoencoderNetwork,
  DiscriminatorNetwork,
  Params,
  build_autoencoder,
  build_discriminator,
)
from ddpm_jax.training.objective import Batch, PerExample, Terms

# Weights of the two terms of eq. 4 of Esser et al. 2021, as its released code has them.
COMMITMENT, CODEBOOK = 1.0, 0.25
LARGEST_WEIGHT, EPSILON = 1e4, 1e-4  # of the adaptive weight, beside a loss as the released code has it
USE_DECAY = 0.99  # of the average use of each code

# (parameters, x_hat, x: float [B, H, W, C] in [-1, 1]) -> [B]
Distance = Callable[[Params, jax.Array, jax.Array], jax.Array]


class Perceptual(NamedTuple):
  """A perceptual distance.

  Attributes:
    distance: the function.
    params: its parameters, NumPy arrays, the same on every process.
    sha256: of them, hexadecimal.
  """

  distance: Distance
  params: Params
  sha256: str


@dataclasses.dataclass(frozen=True)
class Pair:
  """The networks that are trained; their parameters are {'autoencoder', 'discriminator' where there is one}.

  Attributes:
    autoencoder: the first stage.
    discriminator: tells images from reconstructions; None: there is none.
  """

  autoencoder: AutoencoderNetwork
  discriminator: DiscriminatorNetwork | None = None

  def init(self, key: jax.Array, image_shape: Shape) -> Params:
    """Fresh parameters. Those of the autoencoder are the same with and without a discriminator."""
    params = {"autoencoder": self.autoencoder.init(key, image_shape)}
    if self.discriminator:
      params["discriminator"] = self.discriminator.init(jax.random.fold_in(key, 1))
    return params


def build_pair(config: Config, image_shape: Shape) -> Pair:
  """The networks of the settings. Raises UserError where they do not fit the images."""
  options = config.autoencoder
  autoencoder = build_autoencoder(config.model, options, image_shape)
  if not options.discriminator_weight:
    return Pair(autoencoder)
  return Pair(autoencoder, build_discriminator(options.discriminator_layers, image_shape, config.model.dtype))


def initial_extra(config: AutoencoderConfig) -> dict[str, jax.Array]:
  """What the loss keeps, before the first step: the number of steps, and the average share of each code.

  Steps are counted as the learning rate counts them: those that are left out, as their loss is not finite, are not.
  """
  extra = {"steps": jnp.zeros((), jnp.int32)} if config.discriminator_weight else {}
  if config.regularizer == "vq":
    extra["use"] = jnp.full(config.codebook_size, 1.0 / config.codebook_size, jnp.float32)
  return extra


def kl_divergence(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
  """KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, element by element (Kingma and Welling 2014, appendix B).

  >>> float(kl_divergence(jnp.asarray(2.0), jnp.asarray(0.0)))
  2.0
  """
  return 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)


def codebook_loss(z: jax.Array, z_q: jax.Array) -> jax.Array:
  """||sg(z_q) - z||^2 + 0.25 ||z_q - sg(z)||^2, the mean over the latents of an example.

  Van den Oord et al. 2017, eq. 3, have beta = 0.25 at the first of the two, which draws the encoder to the codes. In
  the released code of Esser et al. and Rombach et al. it is at the second, which draws the codes to the latents.
  """
  sg = jax.lax.stop_gradient
  return jnp.mean(COMMITMENT * jnp.square(sg(z_q) - z) + CODEBOOK * jnp.square(z_q - sg(z)))


def discriminator_loss(real: jax.Array, reconstructed: jax.Array) -> jax.Array:
  """The hinge loss (Lim and Ye 2017), from logits of any shape: 1 for a discriminator that always says 0.

  >>> float(discriminator_loss(jnp.zeros(4), jnp.zeros(4)))
  1.0
  """
  return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + reconstructed)))


def adaptive_weight(reconstruction: jax.Array, adversarial: jax.Array, largest: float) -> jax.Array:
  """By how much an adversarial loss weighs as much as the reconstruction in the last layer (Esser et al. 2021, eq. 7).

  Args:
    reconstruction: the gradient of this loss by the kernel of the last layer.
    adversarial: of that loss.
    largest: that the weight is, see `largest_weight`.
  """
  return jnp.clip(optax.tree.norm(reconstruction) / (optax.tree.norm(adversarial) + EPSILON), 0.0, largest)


def largest_weight(regularizer: str, image_shape: Shape) -> float:
  """The bound of the adaptive weight: 10^4 where the released code has means, as ours, over an image; for KL its sums.

  >>> largest_weight("vq", (256, 256, 3))
  10000.0
  >>> round(largest_weight("kl", (256, 256, 3)), 4)
  0.0509
  """
  return LARGEST_WEIGHT / (math.prod(image_shape) if regularizer == "kl" else 1)


def with_gradient(value: jax.Array, gradient: Any, at: Any) -> jax.Array:
  """The scalar `value`, whose gradient by the tree `at` is `gradient`.

  Of several losses of one image, each then costs one pass back through its own network, and not one for each gradient
  that is taken of their sum.
  """
  sg = jax.lax.stop_gradient
  zeros = jax.tree.map(lambda gradient, at: jnp.sum(sg(gradient) * (at - sg(at))), gradient, at)
  return sg(value) + functools.reduce(jnp.add, jax.tree.leaves(zeros))


@dataclasses.dataclass(frozen=True)
class AutoencoderObjective:
  """The loss of an autoencoder, and of its discriminator.

  With H W C numbers in an image:

    reconstruction  the mean of |x - x_hat|, or what `loss_name` says
    perceptual      perceptual_weight times the mean distance
    kl              kl_weight times the KL divergence, summed over the latents, divided by H W C
    codebook        `codebook_loss`
    discriminator   `discriminator_loss`, by the parameters of the discriminator alone
    adversarial     -mean D(x_hat), by those of the autoencoder alone, with an adaptive weight that `combine` gives it

  Attributes:
    pair: the networks.
    config: options of the first stage and its loss.
    loss_name: of the pixels: 'l1', 'l2' or 'huber'.
    flip: mirror each image with probability 1/2.
    distance: the perceptual distance, whose parameters are `frozen["perceptual"]`; None: there is none.
  """

  pair: Pair
  config: AutoencoderConfig
  loss_name: str
  flip: bool
  distance: Distance | None = None

  def loss(self, params: Params, extra: Any, frozen: Any, batch: Batch, keys: jax.Array) -> tuple[Terms, PerExample]:
    """The terms of the loss, means over the batch. In `extra` 'steps' is the number of steps before this one."""
    autoencoder, options = self.pair.autoencoder, self.config
    _, _, flip_keys, dropout_keys = jnp.unstack(jax.vmap(lambda key: jax.random.split(key, 4))(keys), axis=1)
    images = jax.vmap(random_flip)(flip_keys, batch["image"]) if self.flip else batch["image"]
    x = to_float(images)

    moments = autoencoder.moments(params["autoencoder"], x, dropout_keys=dropout_keys)
    if autoencoder.regularizer == "kl":
      mean, log_variance = jnp.split(moments, 2, axis=-1)
      eps = jax.vmap(lambda key, mean: jax.random.normal(example_key(key, "posterior"), mean.shape))(keys, mean)
      z = mean + jnp.exp(0.5 * log_variance) * eps
      divergence = kl_divergence(mean, log_variance)
      regularization = {"kl": options.kl_weight * jnp.mean(divergence) * mean[0].size / x[0].size}
      per_example = {"kl": jnp.mean(divergence, axis=(1, 2, 3))}
    else:
      z_q, codes = autoencoder.quantize(params["autoencoder"], moments)
      z = moments + jax.lax.stop_gradient(z_q - moments)  # the gradient by z_q is that by z
      regularization = {"codebook": jnp.mean(jax.vmap(codebook_loss)(moments, z_q))}
      used = jnp.mean(extra["use"] > 0.01 / options.codebook_size, dtype=jnp.float32)
      per_example = {"codes": codes.reshape(len(codes), -1), "codes_used": jnp.full(len(codes), used)}
    x_hat = autoencoder.decode(params["autoencoder"], z, dropout_keys=dropout_keys)

    terms = {"reconstruction": jnp.mean(jax.vmap(functools.partial(pointwise_loss, self.loss_name))(x_hat, x))}
    if distance := self.distance:
      mean_distance = jax.value_and_grad(lambda x_hat: jnp.mean(distance(frozen["perceptual"], x_hat, x)))
      terms["perceptual"] = options.perceptual_weight * with_gradient(*mean_distance(x_hat), x_hat)
    terms |= regularization
    if self.pair.discriminator:
      terms |= self._of_discriminator(params["discriminator"], extra["steps"], x, x_hat)
    return terms, per_example

  def _of_discriminator(self, params: Params, steps: jax.Array, x: jax.Array, x_hat: jax.Array) -> Terms:
    """'discriminator' and 'adversarial'. Before either is wanted it is 0, and not computed."""
    discriminator, sg = self.pair.discriminator, jax.lax.stop_gradient
    assert discriminator
    begin = self.config.discriminator_start - self.config.discriminator_warmup

    def hinge(params: Params) -> jax.Array:
      return discriminator_loss(discriminator(params, x), discriminator(params, sg(x_hat)))

    def deceit(x_hat: jax.Array) -> jax.Array:
      return -jnp.mean(discriminator(sg(params), x_hat))

    def when(needed: jax.Array, term: Callable[[Any], jax.Array], at: Any) -> jax.Array:
      zeros = jnp.zeros_like(x_hat[0, 0, 0, 0]), jax.tree.map(jnp.zeros_like, at)
      value, gradient = jax.lax.cond(needed, lambda: jax.value_and_grad(term)(at), lambda: zeros)
      return with_gradient(value, gradient, at)

    return {
      "discriminator": when(steps >= begin, hinge, params),
      "adversarial": when(self.started(steps), deceit, x_hat),
    }

  def started(self, steps: jax.Array) -> jax.Array:
    """Whether the discriminator takes part in the loss of the autoencoder after so many steps."""
    return steps >= self.config.discriminator_start

  def update_extra(self, extra: Any, per_example: PerExample) -> Any:
    """One step more, and the shares of the codes in its batch."""
    new = dict(extra)
    if "steps" in extra:
      new["steps"] = extra["steps"] + 1
    if "use" in extra:
      codes = per_example["codes"].reshape(-1)
      share = jnp.bincount(codes, length=len(extra["use"])) / codes.size
      new["use"] = extra["use"] + (1.0 - USE_DECAY) * (share.astype(jnp.float32) - extra["use"])
    return new


@dataclasses.dataclass(frozen=True)
class AdversarialObjective(AutoencoderObjective):
  """The same with a discriminator: the adversarial term has a weight that follows from the gradients of both.

  Attributes:
    largest: bound of the adaptive weight, before it is multiplied by `config.discriminator_weight`.
  """

  largest: float = LARGEST_WEIGHT

  def apart(self, extra: Any) -> dict[str, jax.Array]:
    """'adversarial', from `discriminator_start` on."""
    return {"adversarial": self.started(extra["steps"])}

  def combine(self, gradients: dict[str, Params], extra: Any) -> tuple[Params, dict[str, jax.Array]]:
    """The sum, with the adaptive weight; before `discriminator_start` without a trace of the discriminator."""
    together, adversarial = gradients["together"], gradients["adversarial"]
    of_loss, of_deceit = (tree["autoencoder"]["decoder"]["conv_out"]["kernel"] for tree in (together, adversarial))
    weight = self.config.discriminator_weight * adaptive_weight(of_loss, of_deceit, self.largest)
    started = self.started(extra["steps"])
    weight = jnp.where(started, weight, 0.0)
    # What is not finite is in the sum, and the step is one that is not.
    add = lambda one, other: jnp.where(started, one + weight * other, one)  # noqa: E731
    gradient = together | {"autoencoder": jax.tree.map(add, together["autoencoder"], adversarial["autoencoder"])}
    return gradient, {"adversarial_weight": weight}


def make_objective(
  pair: Pair, config: Config, image_shape: Shape, distance: Distance | None = None
) -> AutoencoderObjective:
  """That of the settings, for images of this shape."""
  plain = AutoencoderObjective(pair, config.autoencoder, config.diffusion.loss, config.data.random_flip, distance)
  if not pair.discriminator:
    return plain
  return AdversarialObjective(**vars(plain), largest=largest_weight(config.autoencoder.regularizer, image_shape))
