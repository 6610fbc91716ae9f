"""Drawing latents: images are decoded, given ones encoded, masks shrunk. The network is a closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.data.sources import from_array
from ddpm_jax.devices import make_mesh
from ddpm_jax.diffusion.denoiser import Denoiser
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.diffusion.schedules import at
from ddpm_jax.evaluation import likelihood
from ddpm_jax.first_stage.latents import FixedStage, Latents
from ddpm_jax.sampling import tasks
from ddpm_jax.sampling.draw import bind_weights, constants_of, make_draw, table_of
from ddpm_jax.sampling.tasks import Parts, shrunk
from ddpm_jax.training.setup import build_run
from ddpm_jax.weights.load import Weights
from tests.first_stage.test_latents import AUTOENCODER, IMAGES, SHAPE, Blocks, Z
from tests.training.tiny import tiny_config

STD = 0.05  # of the latents that the network knows, around those of the first image
MEAN, SCALE = np.linspace(-1, 1, Z, dtype=np.float32), np.linspace(0.5, 2, Z, dtype=np.float32)


def knowing(schedule, std):
  """A network: eps_hat of latents N(mean, std^2), the mean being its weights."""

  def network(params, xt, time, _cond, *, dropout_keys=None):
    ab = at(schedule.alpha_bar, time + 1)[:, None, None, None]
    return jnp.sqrt(1 - ab) * (xt - jnp.sqrt(ab) * params["mean"][None]) / (ab * std**2 + 1 - ab)

  return network


@pytest.fixture(scope="module")
def weights() -> Weights:
  config = tiny_config(
    first_stage="/an/autoencoder",
    channel_multipliers=(1,),
    attention_resolutions=(),
    num_timesteps=200,
    beta_end=0.05,
    sampler="ddim",
    sampling_steps=20,
    num_samples=2,
  )
  params = {"autoencoder": AUTOENCODER, "mean": MEAN, "std": SCALE}
  run = build_run(config, SHAPE, make_mesh("pmap"), stage=FixedStage(Latents(Blocks(), SHAPE), params, "0" * 64))
  assert run.first_stage_facts == {"sha256": "0" * 64, "mean": MEAN.tolist(), "std": SCALE.tolist()}
  mean = run.first_stage.x0(run.frozen, run.first_stage.moments(run.frozen, jnp.asarray(IMAGES[:1])))[0]
  run = run._replace(denoiser=Denoiser(knowing(run.schedule, STD), PARAMETERIZATIONS["eps"]))
  return Weights(run, {"mean": jax.device_put(mean, run.mesh.replicated)}, 5, "ema", "0" * 64)


def off(images: np.ndarray) -> float:
  """The largest root mean square difference from the first image, in grey levels."""
  difference = images.astype(float) - IMAGES[0]
  return float(np.sqrt(np.square(difference).mean((-3, -2, -1))).max())


def parts_of(weights, **changes) -> Parts:
  return Parts(weights, config_lib.override(weights.run.config, changes), quiet=True)


def test_images_are_decoded_and_latents_not_clipped(weights):
  """The latents of the first image are far outside of [-1, 1], where 'auto' leaves them."""
  options, run = weights.run.config.sample, weights.run
  assert options.threshold == "auto" and np.abs(weights.params["mean"]).max() > 3

  def draw(**changes):
    chosen = dataclasses.replace(options, **changes)
    bind, table = bind_weights(weights, chosen), table_of(chosen, run.schedule, "fixed_large")
    drawn = make_draw(bind, table, first_stage=run.first_stage, mesh=run.mesh, stream="sample")
    return drawn(constants_of(weights, chosen), np.arange(4, dtype=np.int32))

  assert off(draw()) < 12  # STD * SCALE / 3 in units of 127.5
  assert off(draw(threshold="static")) > 30


def test_every_task_encodes_and_decodes(weights):
  parts, few = parts_of(weights), IMAGES[:4]
  shown = tasks.progressive(parts)
  assert shown.arrays["images"].shape == (2, *SHAPE) and shown.arrays["x0_hat"].shape[0::2] == (2, *SHAPE[:1], 1)
  assert off(shown.arrays["images"]) < 12 and off(shown.arrays["x0_hat"][:, -1]) < 12
  assert tasks.slerp_noises(parts).arrays["images"].shape == (2, 9, *SHAPE)
  between = tasks.interpolate(parts_of(weights, sample_task="interpolate", interpolation_timestep=1), few)
  assert between.arrays["images"].shape == (2, 9, *SHAPE)
  back = tasks.reconstruct(parts_of(weights, sample_task="reconstruct", sampling_steps=200), IMAGES[:1])
  assert back.arrays["noise"].shape == (1, 4, 6, Z)
  assert back.facts["rms_error_in_grey_levels"] < 2


def test_a_mask_of_pixels_is_shrunk_to_latents(weights):
  """What is known stays to the bit; where one pixel of a latent is to be drawn, the latent is."""
  mask = np.zeros(SHAPE[:2], bool)
  mask[2:5, 4:7] = True
  small = shrunk(mask, (4, 6))
  assert small.sum() == 4 and small[1:3, 2:4].all()
  options = dict(sample_task="inpaint", sampler="ddpm", repaint_resamples=1)
  drawn = tasks.inpaint(parts_of(weights, **options), IMAGES[[0, 5]], mask).arrays["images"]
  assert drawn.shape == (2, 4, *SHAPE)
  for versions, image in zip(drawn, IMAGES[[0, 5]], strict=True):
    np.testing.assert_array_equal(versions[:, ~mask], np.broadcast_to(image[~mask], versions[:, ~mask].shape))
    # The network knows the first image alone, and so all that it draws is of that.
    assert np.abs(versions[:, mask].astype(float) - IMAGES[0][mask]).mean() < 15
  assert (drawn[1, 0][mask] != IMAGES[5][mask]).any()


def test_what_is_hidden_is_not_encoded(weights, monkeypatch):
  """Known latents see beyond their own pixels: an encoder that mixes them all must not be given the hidden ones."""
  mask = np.zeros(SHAPE[:2], bool)
  mask[2:5, 4:7] = True
  given = [IMAGES[:2], np.where(mask[:, :, None], 255 - IMAGES[:2], IMAGES[:2])]
  seen = []

  def draw(self, table, rows, index, images, image=None):
    seen.append(images)
    return images

  monkeypatch.setattr(Parts, "draw", draw)
  for images in given:
    tasks.inpaint(parts_of(weights, sample_task="inpaint", sampler="ddpm"), images, mask)
  np.testing.assert_array_equal(*seen)
  known = seen[0].reshape(2, 4, *SHAPE)[:, 0]
  np.testing.assert_array_equal(known[:, ~mask], IMAGES[:2][:, ~mask])
  mean = IMAGES[:2][:, ~mask].mean(1).round()
  np.testing.assert_array_equal(known[:, mask], np.broadcast_to(mean[:, None], known[:, mask].shape))
  tasks.inpaint(parts_of(weights, sample_task="inpaint", sampler="ddpm"), IMAGES[:1], np.ones_like(mask))
  assert np.all(seen[-1] == 128)


def test_likelihoods_of_latents_are_densities(weights):
  """Of latents N(mean, std^2), for a network that knows them, it is their differential entropy in bits."""
  run, mean = weights.run, np.asarray(weights.params["mean"])
  source = from_array(np.tile(IMAGES, (3, 1, 1, 1)))
  shared = dict(source=source, examples=0, batch_size=64, mesh=run.mesh, seed=0)
  for std in (STD, 1.0):
    known, entropy = Known(Blocks(), SHAPE, mean, std), 0.5 * np.log2(2 * np.pi * np.e * std**2)
    denoiser = Denoiser(knowing(run.schedule, std), PARAMETERIZATIONS["eps"])
    arguments = (denoiser, weights.params, run.schedule, known, run.frozen)
    ode = likelihood.ode(*arguments, steps=100, probes=1, **shared)
    assert abs(ode["total"] - entropy) < 0.05 + 3 * ode["standard_error"], std
  bound = likelihood.bound(*arguments, variance="fixed_large", timesteps=0, **shared)
  assert -3 * bound["standard_error"] < bound["total"] - entropy < 0.05  # the variance of this model is that of std 1


@dataclasses.dataclass(frozen=True, eq=False)
class Known(Latents):
  """Of any image a latent of N(mean, std^2), once it is standardised."""

  mean: np.ndarray
  std: float

  def moments(self, params, images):
    scale, shift = (params[name].reshape(1, 1, -1) for name in ("std", "mean"))
    z = jnp.asarray(self.mean) * scale + shift
    both = jnp.concatenate([z, jnp.broadcast_to(2 * jnp.log(self.std * scale), z.shape)], axis=-1)
    return jnp.broadcast_to(both[None], (images.shape[0], *both.shape))
