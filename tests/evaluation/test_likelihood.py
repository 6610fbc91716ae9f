"""Likelihoods over a data set: closed forms for networks that know nothing; many devices and batches are one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.devices import make_mesh
from ddpm_jax.diffusion.denoiser import Denoiser
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.diffusion.schedules import at, make_schedule
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import likelihood
from ddpm_jax.first_stage.pixels import Pixels

SHAPE = (4, 4, 1)
SCHEDULE = make_schedule("linear", 31, beta_start=1e-3, beta_end=0.3)  # 31 strata: two calls of 16, the last is padding


def source_of(images):
  asked = []

  def read(indices):
    asked.extend(indices.tolist())
    return DecodedRows(images[indices], np.zeros(len(indices), bool))

  return Source("pictures", images.shape[1:], len(images), read), asked


def random_images(number, seed=0):
  images = np.random.default_rng(seed).integers(0, 256, (number, *SHAPE), dtype=np.uint8)
  images[:, 0] = np.asarray([0, 255, 0, 255], np.uint8)[:, None]  # both edges of the decoder
  return images


def one_device():
  return make_mesh("pmap", jax.devices()[:1])


def constant(params, xt, time, cond, *, dropout_keys=None):
  """Says the same number for every pixel."""
  assert cond is None and dropout_keys is None
  return jnp.zeros_like(xt) + params["value"]


def wavy(params, xt, time, cond):
  """Depends on everything that it may depend on, and mixes the pixels."""
  mixed = jnp.roll(xt, 1, axis=1) - 0.5 * jnp.roll(xt, 1, axis=2)
  return 0.5 * xt + 0.3 * jnp.sin(mixed + params["value"]) + (0.01 * time[:, None, None, None]).astype(jnp.float32)


def bound(images, network=constant, value=0.0, schedule=SCHEDULE, mesh=None, **changes):
  mesh = mesh or make_mesh("pmap")
  source, _ = source_of(images)
  options = dict(prediction="x0", variance="fixed_large", examples=0, timesteps=0, batch_size=8, seed=0) | changes
  params = jax.device_put({"value": np.float32(value)}, mesh.replicated)
  denoiser = Denoiser(network, PARAMETERIZATIONS[options.pop("prediction")])
  return likelihood.bound(denoiser, params, schedule, Pixels(SHAPE), source=source, mesh=mesh, **options)


def ode(images, network, value=0.0, schedule=SCHEDULE, mesh=None, **changes):
  mesh = mesh or make_mesh("pmap")
  source, _ = source_of(images)
  options = dict(prediction="eps", examples=0, steps=5, probes=1, batch_size=8, seed=0) | changes
  params = jax.device_put({"value": np.float32(value)}, mesh.replicated)
  denoiser = Denoiser(network, PARAMETERIZATIONS[options.pop("prediction")])
  return likelihood.ode(denoiser, params, schedule, Pixels(SHAPE), source=source, mesh=mesh, **options)


def terms_by_hand(images, x0_hat, schedule, variance):
  """L_T [N], L_{t-1} for t = 1..T [N, T] of a network whose x0_hat is constant: float64, bits per dimension."""
  x0 = images.reshape(len(images), -1) / 127.5 - 1
  beta, ab = schedule.betas, schedule.alpha_bar
  t = np.arange(2, len(beta))
  q = beta[t] * (1 - ab[t - 1]) / (1 - ab[t])
  p = {"fixed_small": q, "fixed_large": beta[t]}[variance]
  shift = np.sqrt(ab[t - 1]) * beta[t] / (1 - ab[t])
  square = np.mean((x0 - x0_hat) ** 2, axis=1)[:, None]
  chain = (np.log(p / q) + q / p - 1 + shift**2 * square / p) / 2
  edges = np.concatenate([[-np.inf], (np.arange(1, 256) - 0.5) / 127.5 - 1, [np.inf]])
  left, right = stats.norm.logcdf(edges, x0_hat, np.sqrt(q[0])), stats.norm.logsf(edges, x0_hat, np.sqrt(q[0]))
  with np.errstate(divide="ignore"):  # on the side that is not used
    below = left[1:] + np.log1p(-np.exp(left[:-1] - left[1:]))
    above = right[:-1] + np.log1p(-np.exp(right[1:] - right[:-1]))
  log_p = np.where(edges[1:] < x0_hat, below, above)
  decoder = -log_p[images.reshape(len(images), -1)].mean(axis=1)[:, None]
  end = ab[-1]
  prior = (-np.log(1 - end) - end + end * np.mean(x0**2, axis=1)) / 2
  return prior / np.log(2), np.concatenate([decoder, chain], axis=1) / np.log(2)


@pytest.mark.parametrize(("variance", "value", "x0_hat"), [("fixed_large", 0.0, 0.0), ("fixed_small", 7.0, 1.0)])
def test_full_bound_of_a_constant_network(variance, value, x0_hat):
  """Nothing is random in it. What the network says is clipped to [-1, 1], but for the error of eps."""
  images = random_images(11)
  prior, terms = terms_by_hand(images, x0_hat, SCHEDULE, variance)
  got = bound(images, value=value, variance=variance)
  totals = prior + terms.sum(axis=1)
  expected = {
    "examples": 11,
    "timesteps_per_example": 31,
    "total": totals.mean(),
    "standard_error": totals.std(ddof=1) / np.sqrt(11),
    "prior": prior.mean(),
    "chain": terms[:, 1:].sum(axis=1).mean(),
    "decoder": terms[:, 0].mean(),
    "rate": (totals - terms[:, 0]).mean(),
    "distortion": terms[:, 0].mean(),
  }
  by_timestep = got.pop("by_timestep")
  assert got == pytest.approx(expected, rel=2e-5)
  assert got["total"] == pytest.approx(got["prior"] + got["chain"] + got["decoder"], rel=1e-12)  # prior is small
  assert by_timestep["t_low"] == by_timestep["t_high"] == list(range(1, 32))
  np.testing.assert_allclose(by_timestep["bits"], terms.mean(axis=0), rtol=2e-5)
  eps_mse = SCHEDULE.snr[1:] * np.mean((images / 127.5 - 1 - value) ** 2)
  np.testing.assert_allclose(by_timestep["eps_mse"], eps_mse, rtol=1e-4)
  assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_strata_are_an_unbiased_estimate_of_the_full_bound():
  """Only the timesteps are random: 600 times the same image, each with its own."""
  image = random_images(1)
  prior, terms = terms_by_hand(image, 0.0, SCHEDULE, "fixed_large")
  got = bound(np.repeat(image, 600, axis=0), timesteps=6, batch_size=200)
  assert got["timesteps_per_example"] == 6 and got["examples"] == 600
  assert 0 < got["standard_error"] < 0.02 * terms.sum()
  assert abs(got["total"] - prior.sum() - terms.sum()) < 4 * got["standard_error"]
  assert got["decoder"] == pytest.approx(terms[0, 0], rel=1e-5)  # exact: it has a stratum of its own
  by_timestep = got["by_timestep"]
  low, high = np.asarray(by_timestep["t_low"]), np.asarray(by_timestep["t_high"])
  assert low[0] == high[0] == 1 and high[-1] == 31 and (low[1:] == high[:-1] + 1).all()
  means = [terms[0, a - 1 : b].mean() for a, b in zip(low, high, strict=True)]
  np.testing.assert_allclose(by_timestep["bits"], means, rtol=0.1)
  np.testing.assert_allclose(np.sum(by_timestep["bits"] * (high - low + 1)), got["chain"] + got["decoder"], rtol=1e-9)


def test_noise_is_standard_normal_and_its_own_for_each_timestep():
  """A network that sees no noise, eps_hat = 0: its squared error is the mean square of what was drawn."""
  got = bound(random_images(40), prediction="eps", batch_size=40)["by_timestep"]["eps_mse"]
  np.testing.assert_allclose(np.mean(got), 1, atol=4 * np.sqrt(2 / (31 * 40 * 16)))
  assert len(set(got)) == 31
  assert np.std(got) == pytest.approx(np.sqrt(2 / (40 * 16)), rel=0.5)


def test_long_chains_are_pooled_by_timestep():
  images = random_images(8)
  schedule = make_schedule("linear", 300, beta_end=0.05)
  got = bound(images, schedule=schedule)
  _, terms = terms_by_hand(images, 0.0, schedule, "fixed_large")
  by_timestep = got["by_timestep"]
  low, high = np.asarray(by_timestep["t_low"]), np.asarray(by_timestep["t_high"])
  assert got["timesteps_per_example"] == 300 and len(low) == 100
  means = [terms[:, a - 1 : b].mean() for a, b in zip(low, high, strict=True)]
  np.testing.assert_allclose(by_timestep["bits"], means, rtol=1e-4)
  snr = [schedule.snr[a : b + 1].mean() for a, b in zip(low, high, strict=True)]
  np.testing.assert_allclose(by_timestep["eps_mse"], np.mean((images / 127.5 - 1) ** 2) * np.asarray(snr), rtol=1e-3)

  # Also where strata of several sizes come together.
  got = bound(images, schedule=schedule, timesteps=150)
  by_timestep = got["by_timestep"]
  low, high = np.asarray(by_timestep["t_low"]), np.asarray(by_timestep["t_high"])
  assert len(low) == 100 and (low[1:] == high[:-1] + 1).all() and high[-1] == 300
  np.testing.assert_allclose(np.sum(by_timestep["bits"] * (high - low + 1)), got["chain"] + got["decoder"], rtol=1e-9)


@pytest.mark.parametrize("timesteps", [0, 5])
def test_bound_depends_neither_on_the_devices_nor_on_the_batch(timesteps):
  images = random_images(13)
  options = dict(network=wavy, value=0.2, prediction="eps", timesteps=timesteps)
  alone = bound(images, mesh=one_device(), batch_size=13, **options)
  other = bound(images, batch_size=5, **options)
  for name in ("t_low", "t_high", "bits", "eps_mse"):
    np.testing.assert_allclose(other["by_timestep"][name], alone["by_timestep"][name], rtol=2e-4)
  names = set(alone) - {"by_timestep"}
  assert {n: other[n] for n in names} == pytest.approx({n: alone[n] for n in names}, rel=2e-5)


def test_bound_depends_on_the_seed():
  first, other = (bound(random_images(8), network=wavy, prediction="eps", timesteps=2, seed=s) for s in (0, 1))
  assert first["total"] != pytest.approx(other["total"], rel=1e-3)
  assert first["prior"] == other["prior"]


def test_ode_depends_neither_on_the_devices_nor_on_the_batch():
  images = random_images(13)
  alone = ode(images, wavy, 0.2, mesh=one_device(), batch_size=13, probes=2)
  assert ode(images, wavy, 0.2, batch_size=5, probes=2) == pytest.approx(alone, rel=2e-5)
  assert alone["total"] != pytest.approx(ode(images, wavy, 0.2, probes=2, seed=1)["total"], rel=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ode_of_standard_normal_data(prediction):
  """The density is the standard normal one, whatever the image: its mean over a bin is known, and hardly varies."""
  schedule = make_schedule("linear", 1000)

  def network(params, xt, time, cond):
    share = at(schedule.sqrt_one_minus_alpha_bar, time + 1)[:, None, None, None]
    return {"eps": share * xt, "v": jnp.zeros_like(xt)}[prediction]

  images = random_images(24)
  got = ode(images, network, schedule=schedule, prediction=prediction, steps=100, batch_size=24)
  bits = []
  for image in images.reshape(24, -1).astype(np.float64):
    x0 = image / 127.5 - 1
    density = 0.5 * (x0**2 + (1 / 127.5) ** 2 / 12) + 0.5 * np.log(2 * np.pi)
    bits.append((density.mean() - np.log(1 / 127.5)) / np.log(2))
  assert {n: got[n] for n in ("examples", "steps", "evaluations", "probes")} == {
    "examples": 24,
    "steps": 100,
    "evaluations": 216,
    "probes": 1,
  }
  assert got["total"] == pytest.approx(np.mean(bits), abs=1e-3)
  assert got["standard_error"] == pytest.approx(np.std(bits, ddof=1) / np.sqrt(24), rel=0.03)


def test_ode_spreads_pixels_over_their_bins():
  """A density much narrower than a bin: only in its middle is it high. The mean over the bin is known."""
  schedule = make_schedule("linear", 100)
  images = np.full((50, *SHAPE), 255, np.uint8)
  got = ode(images, constant, schedule=schedule, batch_size=56)
  # A network that predicts 0: x_0 ~ N(0, 1 / alpha_bar_T); the mean of its logarithm over the bin around 1.
  precision = schedule.alpha_bar[-1]
  square = 1 + (1 / 127.5) ** 2 / 12
  nats = 0.5 * precision * square - 0.5 * np.log(precision / (2 * np.pi)) + np.log(127.5)
  assert got["total"] == pytest.approx(nats / np.log(2), abs=2e-4)
  # x_0 = 1 + u: the variance of x_0^2 / 2 is about that of u.
  error = precision * np.sqrt((1 / 127.5) ** 2 / 12 / 16 / 50) / np.log(2)
  assert got["standard_error"] == pytest.approx(error, rel=0.3)


def test_images_are_spread_over_the_data_and_each_is_read_once():
  mesh, done = make_mesh("pmap"), []
  params = jax.device_put({"value": np.float32(0)}, mesh.replicated)
  for examples, expected in ((99, range(10)), (4, [0, 2, 5, 7]), (1, [0])):
    source, asked = source_of(random_images(10))
    options = dict(source=source, examples=examples, batch_size=4, mesh=mesh, seed=0, progress=done.append)
    got = likelihood.ode(
      Denoiser(constant, PARAMETERIZATIONS["eps"]), params, SCHEDULE, Pixels(SHAPE), steps=1, probes=1, **options
    )
    assert asked == list(expected) and got["examples"] == len(asked)
    assert done == [*range(4, len(asked), 4), len(asked)]
    assert (got["standard_error"] is None) == (examples == 1)
    del asked[:], done[:]
  options |= dict(variance="fixed_large", examples=9, timesteps=2)
  got = likelihood.bound(Denoiser(constant, PARAMETERIZATIONS["x0"]), params, SCHEDULE, Pixels(SHAPE), **options)
  assert asked == [0, 1, 2, 3, 4, 5, 6, 7, 8] and got["examples"] == 9
  assert done == [2, 4, 6, 8, 8, 9]  # in and after each batch


def test_one_compilation_whatever_the_batches():
  traced = []

  def network(params, xt, time, cond):
    traced.append(xt.shape)
    return jnp.zeros_like(xt)

  bound(random_images(19), network=network, batch_size=8)  # three batches of two calls, the last batch of three
  assert len(traced) <= 2  # scan may trace its body twice
  assert set(traced) == {(8, *SHAPE)}


def test_more_steps_than_timesteps_are_not_made():
  got = ode(random_images(8), constant, steps=500)
  assert got["steps"] == 31 and got["evaluations"] == 78


def test_a_single_timestep_has_no_decoder():
  with pytest.raises(UserError, match="num_timesteps: 1"):
    bound(random_images(1), schedule=make_schedule("linear", 1))
