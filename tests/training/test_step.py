"""One update: what is drawn, what is minimised, and that it learns."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import DiffusionConfig
from ddpm_jax.diffusion.schedules import at, make_schedule
from ddpm_jax.training import step as step_lib
from ddpm_jax.training.setup import make_train_step
from tests.training.tiny import IMAGE_SHAPE, host, random_batch, tiny_config, tiny_run

LINEAR = make_schedule("linear", 1000)


def draws(step, index, random_flip=False, seed=0):
  keys = step_lib.example_keys(seed, jnp.asarray(step), jnp.asarray(index))
  images = jnp.broadcast_to(jnp.arange(64, dtype=jnp.uint8).reshape(IMAGE_SHAPE), (len(index), *IMAGE_SHAPE))
  one = functools.partial(step_lib.draw_example, num_timesteps=1000, random_flip=random_flip)
  return host(jax.jit(jax.vmap(one))(keys, images)._replace(dropout_key=jnp.zeros(())))


def test_draws_have_the_distributions_of_algorithm_1():
  x0, t, eps, _ = draws(3, np.arange(5000), random_flip=True)
  counts = np.histogram(t, bins=10, range=(0.5, 1000.5))[0]
  assert t.min() >= 1 and t.max() <= 1000 and t.max() > 990 and t.min() < 10
  assert ((counts - 500) ** 2 / 500).sum() < 33.7  # chi-square of 9 degrees of freedom, one in 10,000
  assert abs(eps.mean()) < 5 / np.sqrt(eps.size) and abs(eps.std() - 1) < 5 / np.sqrt(2 * eps.size)
  flipped = x0[:, 0, 0, 0] > x0[:, 0, -1, 0]
  assert abs(flipped.mean() - 0.5) < 5 * 0.5 / np.sqrt(5000)
  assert abs(np.corrcoef(t, flipped)[0, 1]) < 0.08 and abs(np.corrcoef(t, eps[:, 0, 0, 0])[0, 1]) < 0.08


def test_every_timestep_is_drawn_from_1_to_t():
  keys = step_lib.example_keys(0, jnp.asarray(0), jnp.arange(200))
  image = jnp.zeros(IMAGE_SHAPE, jnp.uint8)
  t = jax.vmap(lambda key: step_lib.draw_example(key, image, num_timesteps=3, random_flip=False).t)(keys)
  assert set(np.asarray(t)) == {1, 2, 3}


def test_draws_are_a_function_of_seed_step_and_index():
  whole = draws(3, np.arange(8))
  parts = [draws(3, np.arange(4)), draws(3, np.arange(4, 8))]
  joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), parts[0][:3], parts[1][:3])
  chex.assert_trees_all_equal(whole[:3], joined)
  for other in (draws(4, np.arange(8)), draws(3, np.arange(8, 16)), draws(3, np.arange(8), seed=1)):
    assert not np.isclose(other.eps, whole.eps).any(axis=(1, 2, 3)).all()
    assert (other.t != whole.t).any()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_perfect_network_has_no_loss(prediction):
  """All images are one image, so x_t gives away eps; the loss is 0 to rounding for the network that says so."""
  batch = random_batch() | {"image": np.full((16, *IMAGE_SHAPE), 200, np.uint8)}
  x0 = 200 / 127.5 - 1

  def network(_, xt, t, __):
    a, b = (at(table, t)[:, None, None, None] for table in (LINEAR.sqrt_alpha_bar, LINEAR.sqrt_one_minus_alpha_bar))
    eps = (xt - a * x0) / b
    return {"eps": eps, "x0": jnp.full_like(xt, x0), "v": a * eps - b * x0}[prediction]

  loss_fn = step_lib.make_loss(network, LINEAR, DiffusionConfig(prediction=prediction), random_flip=False)
  keys = step_lib.example_keys(0, jnp.asarray(0), jnp.arange(16))
  assert loss_fn({}, jax.tree.map(jnp.asarray, batch), keys) < 1e-6


def test_the_loss_is_the_mean_over_the_batch_by_hand():
  """A network that says 0 pays the mean of eps squared, example by example."""
  batch = jax.tree.map(jnp.asarray, random_batch())
  loss_fn = step_lib.make_loss(lambda p, xt, t, k: jnp.zeros_like(xt), LINEAR, DiffusionConfig(), random_flip=False)
  keys = step_lib.example_keys(0, jnp.asarray(5), batch["index"])
  eps = draws(5, np.arange(16)).eps
  np.testing.assert_allclose(loss_fn({}, batch, keys), np.mean(eps**2), rtol=1e-5)


def recorded(random_flip):
  """What `make_loss` gives the network for 64 images that are dark on the left and bright on the right."""
  seen = []

  def network(_, xt, t, dropout_keys):
    seen.append((xt, t, jax.random.key_data(dropout_keys)))
    return jnp.zeros_like(xt)

  image = np.repeat(np.linspace(0, 255, 8).astype(np.uint8)[None, :, None], 8, axis=0)
  batch = {"image": jnp.broadcast_to(image, (64, *IMAGE_SHAPE)), "index": jnp.arange(64)}
  loss_fn = step_lib.make_loss(network, LINEAR, DiffusionConfig(), random_flip=random_flip)
  keys = step_lib.example_keys(0, jnp.asarray(5), batch["index"])
  loss_fn({}, batch, keys)
  return host(seen[0]), image


def test_what_the_network_is_given():
  (xt, t, dropout_keys), image = recorded(random_flip=False)
  _, expected_t, eps, _ = draws(5, np.arange(64))
  np.testing.assert_array_equal(t, expected_t)
  a, b = LINEAR.sqrt_alpha_bar[t], LINEAR.sqrt_one_minus_alpha_bar[t]
  x0 = (xt - b[:, None, None, None] * eps) / a[:, None, None, None]
  early = t < 300  # where x_t still tells x_0
  np.testing.assert_allclose(x0[early], np.broadcast_to(image / 127.5 - 1, x0.shape)[early], atol=1e-3)
  assert len(np.unique(dropout_keys, axis=0)) == 64  # dropout is on, and each example has its own


def test_flips_reach_the_network():
  (xt, t, _), _ = recorded(random_flip=True)
  early = t < 300
  brighter_left = (xt[..., :4, :].mean((1, 2, 3)) > xt[..., 4:, :].mean((1, 2, 3)))[early]
  assert 0.2 < brighter_left.mean() < 0.8


def test_no_two_draws_share_a_key(monkeypatch):
  """Timestep, noise, flip and dropout of an example come from four keys, none of them the example's own."""
  used = {}

  def spy(module, name):
    real = getattr(module, name)

    def noting(key, *args, **kwargs):
      used[name] = key
      return real(key, *args, **kwargs)

    monkeypatch.setattr(module, name, noting)

  spy(jax.random, "randint")
  spy(jax.random, "normal")
  spy(step_lib.images, "random_flip")
  key = step_lib.example_keys(0, jnp.asarray(1), jnp.asarray([2]))[0]
  image = jnp.zeros(IMAGE_SHAPE, jnp.uint8)
  draw = step_lib.draw_example(key, image, num_timesteps=10, random_flip=True)
  keys = [*used.values(), draw.dropout_key, key]
  assert set(used) == {"randint", "normal", "random_flip"}
  assert len({tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}) == 5


def test_the_weight_is_that_of_the_drawn_timestep():
  """With T = 3 each timestep is drawn: a network that says 0 pays min(SNR, 5) / SNR times the mean of eps squared."""
  schedule = make_schedule("linear", 3, beta_start=0.05, beta_end=0.9)
  config = DiffusionConfig(num_timesteps=3, loss_weighting="min_snr")
  loss_fn = step_lib.make_loss(lambda p, xt, t, k: jnp.zeros_like(xt), schedule, config, random_flip=False)
  batch = jax.tree.map(jnp.asarray, random_batch())
  keys = step_lib.example_keys(0, jnp.asarray(5), batch["index"])
  one = functools.partial(step_lib.draw_example, num_timesteps=3, random_flip=False)
  _, t, eps, _ = jax.vmap(one)(keys, batch["image"])
  assert set(np.asarray(t)) == {1, 2, 3}
  alpha_bar = np.cumprod(1 - np.linspace(0.05, 0.9, 3))[np.asarray(t) - 1]
  snr = alpha_bar / (1 - alpha_bar)
  expected = np.mean(np.minimum(snr, 5) / snr * np.mean(np.asarray(eps) ** 2, axis=(1, 2, 3)))
  np.testing.assert_allclose(loss_fn({}, batch, keys), expected, rtol=1e-5)


@pytest.fixture(scope="module")
def learning():
  """200 updates on one batch of four images: (initial state, states and losses along the way, compiled step)."""
  run = tiny_run(tiny_config(batch_size=16, dropout=0.0, random_flip=False, learning_rate=5e-3, ema_decay=0.9))
  step, device = jax.jit(make_train_step(run)), jax.devices()[0]
  initial = state = jax.device_put(host(run.initial_state()), device)
  images = np.repeat(random_batch(4)["image"], 4, axis=0)
  batch = jax.device_put(random_batch() | {"image": images}, device)
  losses, second = [], None
  for i in range(200):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
    second = second or (state if i == 1 else None)
  return run, initial, second, state, losses, metrics


def test_a_step_overfits_one_batch(learning):
  *_, losses, _ = learning
  assert 0.7 < losses[0] < 1.3  # the output is 0 at first, so the loss is the variance of eps
  assert np.mean(losses[-20:]) < 0.35 * losses[0]


def test_state_after_the_updates(learning):
  _, initial, second, final, _, metrics = learning
  assert int(initial.step) == 0 and int(final.step) == 200 and final.step.dtype == jnp.int32
  chex.assert_trees_all_equal(host(initial.ema_params), host(initial.params))
  chex.assert_trees_all_equal_shapes_and_dtypes(initial, final)
  # The first update has learning rate 0 (warm-up), so after the second the average is params0 + (1 - d) (params2 -
  # params0) with d = (1 + 2) / (10 + 2): made from the new parameters, not the old ones.
  expected = jax.tree.map(lambda old, new: old + 0.75 * (new - old), host(initial.params), host(second.params))
  chex.assert_trees_all_close(host(second.ema_params), expected, rtol=1e-5, atol=1e-6)
  assert float(metrics["ema_decay"]) == np.float32(0.9)


def test_metrics_are_those_of_this_update(learning):
  run, initial, *_ = learning
  batch = jax.device_put(random_batch(), jax.devices()[0])
  _, metrics = jax.jit(make_train_step(run))(initial, batch)
  loss_fn = step_lib.make_loss(run.network, run.schedule, run.config.diffusion, random_flip=False)
  keys = step_lib.example_keys(0, jnp.asarray(0), batch["index"])
  loss, gradients = jax.jit(jax.value_and_grad(loss_fn))(initial.params, batch, keys)
  norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(host(gradients))))
  np.testing.assert_allclose([metrics["loss"], metrics["grad_norm"]], [loss, norm], rtol=1e-5)
  assert float(metrics["learning_rate"]) == 0


def test_accumulated_gradients_are_those_of_the_whole_batch():
  run = tiny_run(tiny_config())
  params = jax.tree.map(lambda x: x + 0.05, run.initial_state().params)  # nothing zero-initialised hides dropout
  loss_fn = step_lib.make_loss(run.network, run.schedule, run.config.diffusion, random_flip=True)
  batch = jax.tree.map(jnp.asarray, random_batch())
  keys = step_lib.example_keys(0, jnp.asarray(7), batch["index"])
  whole, parts = (
    jax.jit(lambda n: step_lib.mean_loss_and_gradients(loss_fn, params, batch, keys, n), static_argnums=0)(n)
    for n in (1, 4)
  )
  chex.assert_trees_all_close(parts, whole, rtol=2e-3, atol=1e-5)
