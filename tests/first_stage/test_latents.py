"""Latents: standardised by their data set, sampled from their posterior, and back to images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.sources import from_array
from ddpm_jax.devices import make_mesh
from ddpm_jax.first_stage.latents import Latents
from ddpm_jax.first_stage.statistics import as_source, encoded, standard
from ddpm_jax.keys import indexed_keys
from ddpm_jax.training.objective import DenoiserObjective
from ddpm_jax.training.step import example_keys
from tests.training.test_step import objective_of

SHAPE = (8, 12, 1)
Z = 5  # four pixels, and one number that says which way the image faces


@dataclasses.dataclass(frozen=True)
class Blocks:
  """An autoencoder that loses nothing: the four pixels of each 2x2 block, three times as large and moved.

  The fifth number is not symmetric: of a mirrored image it is not that of the image.
  """

  regularizer: str = "kl"
  factor: int = 2

  def latent_shape(self, image_shape):
    height, width, _ = image_shape
    return height // 2, width // 2, Z

  def moments(self, params, x):
    batch, height, width, _ = x.shape
    blocks = x.reshape(batch, height // 2, 2, width // 2, 2).transpose(0, 1, 3, 2, 4)
    blocks = blocks.reshape(batch, height // 2, width // 2, 4)
    z = jnp.concatenate([3 * blocks + 1, blocks[..., :1] - 2 * blocks[..., 1:2]], axis=-1)
    log_variance = jnp.broadcast_to(params["log_variance"].reshape(1, 1, 1, Z), z.shape)
    return z if self.regularizer == "vq" else jnp.concatenate([z, log_variance], axis=-1)

  def decode(self, params, z):
    batch, h, w, _ = z.shape
    blocks = ((z[..., :4] - 1) / 3).reshape(batch, h, w, 2, 2).transpose(0, 1, 3, 2, 4)
    return blocks.reshape(batch, 2 * h, 2 * w, 1)

  def quantize(self, params, z):
    """To that of the nearest pixel of an even value."""
    value = 2 * jnp.round((z + 2) * 42.5 / 2)
    return value / 42.5 - 2, jnp.zeros(z.shape[:3], jnp.int32)


LOG_VARIANCE = np.log(np.asarray([1e-4, 0.5, 1.0, 2.0, 0.1], np.float32))
AUTOENCODER = {"log_variance": LOG_VARIANCE}
IMAGES = np.random.default_rng(0).integers(0, 256, (101, *SHAPE), np.uint8) // np.asarray([[[1], [2]] * 6], np.uint8)


def params_of(mean, std):
  return {"autoencoder": AUTOENCODER, "mean": np.asarray(mean, np.float32), "std": np.asarray(std, np.float32)}


def latents_of(images: np.ndarray, flips: bool) -> tuple[np.ndarray, np.ndarray]:
  """Means and variances of z, float64 [.., z], by NumPy alone."""
  both = np.concatenate([images, images[:, :, ::-1]]) if flips else images
  x = both[..., 0] / 127.5 - 1.0
  blocks = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
  z = np.stack([3 * block + 1 for block in blocks] + [blocks[0] - 2 * blocks[1]], axis=-1)
  return z, np.exp(LOG_VARIANCE.astype(np.float64))


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_what_is_encoded_comes_back_whatever_the_statistics(regularizer):
  latents, rng = Latents(Blocks(regularizer), SHAPE), np.random.default_rng(1)
  params = params_of(rng.normal(size=Z), [0.7] * Z if regularizer == "vq" else rng.uniform(0.2, 5, Z))
  images = IMAGES // 2 * 2 if regularizer == "vq" else IMAGES
  x0 = latents.x0(params, latents.moments(params, jnp.asarray(images)))
  assert (x0.shape[1:], latents.latent_shape) == ((4, 6, Z), (4, 6, Z))
  assert (latents.identity, latents.bin_width) == (False, None)
  np.testing.assert_array_equal(latents.decode(params, x0), images)
  expected = (latents_of(images, False)[0] - params["mean"]) / params["std"]
  np.testing.assert_allclose(x0, expected, rtol=1e-5, atol=1e-5)


def test_a_codebook_is_looked_up_when_it_is_decoded():
  """So what is a little off comes back exactly, which by KL it does not."""
  params, even = params_of([0.3] * Z, [2.0] * Z), IMAGES // 2 * 2
  for regularizer, off in (("vq", 0), ("kl", 1)):
    latents = Latents(Blocks(regularizer), SHAPE)
    x0 = latents.x0(params, latents.moments(params, jnp.asarray(even))) + 0.9 / 42.5 / 2.0
    np.testing.assert_array_equal(latents.decode(params, x0), even + off)


def test_latents_are_samples_of_the_posterior_by_the_keys_alone():
  latents, params = Latents(Blocks(), SHAPE), params_of(np.zeros(Z), np.ones(Z))
  number = 2000
  moments = jnp.tile(latents.moments(params, jnp.asarray(IMAGES[:1])), (number, 1, 1, 1))
  keys = indexed_keys(jax.random.key(0), jnp.arange(number))
  drawn = np.asarray(latents.x0(params, moments, keys), np.float64)
  mean, variance = latents_of(IMAGES[:1], False)
  deviations = (drawn - mean) / np.sqrt(variance)
  assert np.abs(deviations.mean(0)).max() < 5 / np.sqrt(number)
  assert np.abs(deviations.var(0) - 1).max() < 5 * np.sqrt(2 / number)
  assert np.abs(np.corrcoef(deviations.reshape(number, -1), rowvar=False) - np.eye(4 * 6 * Z)).max() < 0.12
  some = latents.x0(params, moments[:3], keys[7:10])
  np.testing.assert_array_equal(some, drawn[7:10].astype(np.float32))
  np.testing.assert_array_equal(Latents(Blocks("vq"), SHAPE).x0(params, moments[..., :Z], keys), moments[..., :Z])


@pytest.mark.parametrize("flips", [False, True])
def test_statistics_are_those_of_the_whole_set(flips):
  """Of all images, both ways round, with the variance of the posterior; one deviation for a codebook."""
  source, mesh = from_array(IMAGES), make_mesh("fsdp")
  z, variance = latents_of(IMAGES, flips)
  wanted = z.mean((0, 1, 2)), np.sqrt(z.var((0, 1, 2)) + variance)
  for regularizer in ("kl", "vq"):
    latents = Latents(Blocks(regularizer), SHAPE)
    params = mesh.place({"autoencoder": AUTOENCODER})
    parts = list(encoded(latents, params, source, mesh, flips=flips))
    moments = np.concatenate([part.moments for part in parts])
    assert moments.shape[:2] == (101, 1 + flips)
    mean, std = standard(latents, [moments[:7], moments[7:]])
    expected = wanted[1] if regularizer == "kl" else np.full(Z, np.sqrt(z.var((0, 1, 2)).mean()))
    np.testing.assert_allclose(mean, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(std, expected, rtol=1e-5)
  assert wanted[1].max() > 1.3 * wanted[1].min()


def test_standardised_samples_have_deviation_1():
  latents, source, mesh = Latents(Blocks(), SHAPE), from_array(IMAGES), make_mesh("pmap")
  (part,) = encoded(latents, mesh.place({"autoencoder": AUTOENCODER}), source, mesh, flips=False)
  mean, std = standard(latents, [part.moments])
  keys = indexed_keys(jax.random.key(1), jnp.arange(101))
  params = params_of(mean, std)
  fold = jax.vmap(jax.random.fold_in, (0, None))
  drawn = np.concatenate([latents.x0(params, jnp.asarray(part.moments[:, 0]), fold(keys, i)) for i in range(40)])
  assert np.abs(drawn.mean((0, 1, 2))).max() < 0.01
  assert np.abs(drawn.std((0, 1, 2)) - 1).max() < 0.01


def test_cached_moments_make_the_same_training_as_images():
  """A mirrored image has its own latent, which is not the mirrored latent."""
  objective, mesh = objective_of(flip=True), make_mesh("pmap")
  latents = Latents(Blocks(), SHAPE)
  objective = dataclasses.replace(objective, first_stage=latents)
  assert isinstance(objective, DenoiserObjective)
  frozen = params_of(np.arange(Z), 1 + np.arange(Z))
  source = from_array(IMAGES)
  parts = list(encoded(latents, mesh.place({"autoencoder": AUTOENCODER}), source, mesh, flips=True))
  assert len(parts) == 1
  cached = as_source(source, parts[0])
  indices, keys = np.asarray([3, 100, 3, 0, 57, 8]), example_keys(0, jnp.asarray(2), jnp.arange(6))
  seen = []

  def says(params, xt, time, cond, *, dropout_keys):
    seen.append(xt)
    return jnp.zeros_like(xt)

  objective = dataclasses.replace(objective, denoiser=dataclasses.replace(objective.denoiser, network=says))
  of_images = {"image": jnp.asarray(source.read(indices).images)}
  of_moments = {"moments": jnp.asarray(cached.read(indices).images)}
  losses = [objective.loss({}, {}, frozen, batch, keys)[0]["simple"] for batch in (of_images, of_moments)]
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
  np.testing.assert_allclose(seen[0], seen[1], rtol=1e-5, atol=1e-5)
  flipped = [bool(jax.random.bernoulli(jax.random.split(key, 4)[2])) for key in keys]
  assert 0 < sum(flipped) < 6
  z, _ = latents_of(IMAGES[indices], False)
  mirrored = np.stack([np.flip(z, 2)[i] if flip else z[i] for i, flip in enumerate(flipped)])
  own = np.stack([latents_of(IMAGES[[i]], True)[0][int(flip)] for i, flip in zip(indices, flipped, strict=True)])
  assert np.abs(mirrored - own)[np.asarray(flipped)].max() > 1
