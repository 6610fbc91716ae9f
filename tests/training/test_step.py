"""One training step: what is drawn, what is minimised, and that it learns."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.config import DiffusionConfig
from ddpm_jax.devices import make_mesh
from ddpm_jax.diffusion import reference
from ddpm_jax.diffusion.denoiser import Denoiser
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.first_stage.pixels import Pixels
from ddpm_jax.keys import EXAMPLE_DRAWS, example_key
from ddpm_jax.training import objective as objective_lib
from ddpm_jax.training import step as step_lib
from ddpm_jax.training.objective import DenoiserObjective
from ddpm_jax.training.setup import make_objective, make_train_step
from ddpm_jax.training.state import create_state, from_stored, to_stored
from tests.training.tiny import CONDITIONAL, IMAGE_SHAPE, host, random_batch, tiny_config, tiny_run

LINEAR = make_schedule("linear", 1000)


def says_zero(params, xt, time, cond, *, dropout_keys):
  return jnp.zeros_like(xt)


def objective_of(network=says_zero, prediction="eps", *, schedule=LINEAR, flip=False, **changes) -> DenoiserObjective:
  denoiser = Denoiser(network, PARAMETERIZATIONS[prediction])
  return DenoiserObjective(denoiser, schedule, Pixels(IMAGE_SHAPE), DiffusionConfig(**changes), flip)


def loss_of(objective, batch, keys, params=None):
  """The one term of the loss."""
  terms, per_example = objective.loss(params or {}, {}, {}, batch, keys)
  assert list(terms) == ["simple"] and not per_example
  return terms["simple"]


def draws(step, index, random_flip=False, seed=0):
  keys = step_lib.example_keys(seed, jnp.asarray(step), jnp.asarray(index))
  images = jnp.broadcast_to(jnp.arange(64, dtype=jnp.uint8).reshape(IMAGE_SHAPE), (len(index), *IMAGE_SHAPE))
  one = objective_of(flip=random_flip).sample_training_example
  return host(jax.jit(jax.vmap(one))(keys, images)._replace(dropout_key=jnp.zeros(())))


def test_draws_have_the_distributions_of_algorithm_1():
  images, t, eps, _ = draws(3, np.arange(5000), random_flip=True)
  counts = np.histogram(t, bins=10, range=(0.5, 1000.5))[0]
  assert t.min() >= 1 and t.max() <= 1000 and t.max() > 990 and t.min() < 10
  assert ((counts - 500) ** 2 / 500).sum() < 33.7  # chi-square of 9 degrees of freedom, one in 10,000
  assert abs(eps.mean()) < 5 / np.sqrt(eps.size) and abs(eps.std() - 1) < 5 / np.sqrt(2 * eps.size)
  flipped = images[:, 0, 0, 0] > images[:, 0, -1, 0]
  assert abs(flipped.mean() - 0.5) < 5 * 0.5 / np.sqrt(5000)
  assert abs(np.corrcoef(t, flipped)[0, 1]) < 0.08 and abs(np.corrcoef(t, eps[:, 0, 0, 0])[0, 1]) < 0.08


def test_every_timestep_is_drawn_from_1_to_t():
  keys = step_lib.example_keys(0, jnp.asarray(0), jnp.arange(200))
  image = jnp.zeros(IMAGE_SHAPE, jnp.uint8)
  objective = objective_of(schedule=make_schedule("linear", 3))
  t = jax.vmap(lambda key: objective.sample_training_example(key, image).t)(keys)
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

  def network(_, xt, time, cond, *, dropout_keys):
    a, b, _ = (value[:, None, None, None] for value in LINEAR.level(time + 1))
    eps = (xt - a * x0) / b
    return {"eps": eps, "x0": jnp.full_like(xt, x0), "v": a * eps - b * x0}[prediction]

  keys = step_lib.example_keys(0, jnp.asarray(0), jnp.arange(16))
  assert loss_of(objective_of(network, prediction), jax.tree.map(jnp.asarray, batch), keys) < 1e-6


def test_the_loss_is_the_mean_over_the_batch_by_hand():
  """A network that says 0 pays the mean of eps squared, example by example."""
  batch = jax.tree.map(jnp.asarray, random_batch())
  keys = step_lib.example_keys(0, jnp.asarray(5), batch["index"])
  eps = draws(5, np.arange(16)).eps
  np.testing.assert_allclose(loss_of(objective_of(), batch, keys), np.mean(eps**2), rtol=1e-5)


def test_the_loss_is_that_of_algorithm_1():
  """As the paper prints it, in float64, with a network that depends on x_t and t."""
  batch = random_batch()
  keys = step_lib.example_keys(0, jnp.asarray(5), batch["index"])
  _, t, eps, _ = draws(5, np.arange(16))
  x0 = batch["image"] / 127.5 - 1.0

  def network(_, xt, time, cond, *, dropout_keys):
    return 0.3 * xt + (time[:, None, None, None] + 1) / 1000

  expected = [
    reference.ddpm_loss(lambda x, t: 0.3 * x + t / 1000, LINEAR.betas, x0[i], int(t[i]), eps[i].astype(np.float64))
    for i in range(16)
  ]
  found = loss_of(objective_of(network), jax.tree.map(jnp.asarray, batch), keys)
  np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)


def recorded(random_flip):
  """What the loss gives the network for 64 images that are dark on the left and bright on the right."""
  seen = []

  def network(_, xt, time, cond, *, dropout_keys):
    seen.append((xt, time, jax.random.key_data(dropout_keys)))
    return jnp.zeros_like(xt)

  image = np.repeat(np.linspace(0, 255, 8).astype(np.uint8)[None, :, None], 8, axis=0)
  batch = {"image": jnp.broadcast_to(image, (64, *IMAGE_SHAPE)), "index": jnp.arange(64)}
  keys = step_lib.example_keys(0, jnp.asarray(5), batch["index"])
  loss_of(objective_of(network, flip=random_flip), batch, keys)
  return host(seen[0]), image


def test_what_the_network_is_given():
  (xt, time, dropout_keys), image = recorded(random_flip=False)
  _, expected_t, eps, _ = draws(5, np.arange(64))
  np.testing.assert_array_equal(time, expected_t - 1)
  t = expected_t
  a, b = LINEAR.sqrt_alpha_bar[t], LINEAR.sqrt_one_minus_alpha_bar[t]
  x0 = (xt - b[:, None, None, None] * eps) / a[:, None, None, None]
  early = t < 300  # where x_t still tells x_0
  np.testing.assert_allclose(x0[early], np.broadcast_to(image / 127.5 - 1, x0.shape)[early], atol=1e-3)
  assert len(np.unique(dropout_keys, axis=0)) == 64  # dropout is on, and each example has its own


def test_flips_reach_the_network():
  (xt, time, _), _ = recorded(random_flip=True)
  early = time < 300
  brighter_left = (xt[..., :4, :].mean((1, 2, 3)) > xt[..., 4:, :].mean((1, 2, 3)))[early]
  assert 0.2 < brighter_left.mean() < 0.8


def test_no_two_draws_share_a_key(monkeypatch):
  """Timestep, noise, flip and dropout come from four keys, none of them the example's own, and all else from others."""
  used = {}

  def spy(module, name):
    real = getattr(module, name)

    def noting(key, *args, **kwargs):
      used[name] = key
      return real(key, *args, **kwargs)

    monkeypatch.setattr(module, name, noting)

  spy(jax.random, "randint")
  spy(jax.random, "normal")
  spy(objective_lib, "random_flip")
  key = step_lib.example_keys(0, jnp.asarray(1), jnp.asarray([2]))[0]
  image = jnp.zeros(IMAGE_SHAPE, jnp.uint8)
  draw = objective_of(flip=True).sample_training_example(key, image)
  keys = [*used.values(), draw.dropout_key, key, *(example_key(key, name) for name in EXAMPLE_DRAWS)]
  assert set(used) == {"randint", "normal", "random_flip"}
  assert len({tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}) == 5 + len(EXAMPLE_DRAWS)


def test_labels_are_dropped_by_seed_step_and_index_alone():
  """At the rate that was asked for, to 4 deviations; whatever the class, the rest of the batch and the other draws."""
  objective = dataclasses.replace(objective_of(), label_dropout=0.2, null_label=10)

  def told(step, index, label, seed=0):
    keys = step_lib.example_keys(seed, jnp.asarray(step), jnp.asarray(index))
    return np.asarray(objective.condition(keys, {"label": jnp.asarray(label, jnp.int32)}))

  index, label = np.arange(4000), np.arange(4000) % 10
  whole = told(3, index, label)
  dropped = whole == 10
  np.testing.assert_array_equal(whole, np.where(dropped, 10, label))
  assert abs(dropped.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 4000)
  _, t, _, _ = draws(3, index)
  assert abs(np.corrcoef(dropped, t)[0, 1]) < 0.07
  np.testing.assert_array_equal(told(3, index[7:99], label[7:99]), whole[7:99])
  np.testing.assert_array_equal(told(3, index, (label + 1) % 10) == 10, dropped)
  for other in (told(4, index, label), told(3, index + 4000, label), told(3, index, label, seed=1)):
    assert 0.1 < np.mean((other == 10) != dropped) < 0.5


def test_the_network_is_told_the_label_and_nothing_where_there_is_none():
  seen = []

  def network(_, xt, time, cond, *, dropout_keys):
    seen.append(cond)
    return jnp.zeros_like(xt)

  batch = jax.tree.map(jnp.asarray, random_batch(classes=3))
  keys = step_lib.example_keys(0, jnp.asarray(5), batch["index"])
  loss_of(objective_of(network), batch, keys)  # no null label: none is dropped
  np.testing.assert_array_equal(seen.pop(), batch["label"])
  del batch["label"]
  loss_of(dataclasses.replace(objective_of(network), label_dropout=0.2, null_label=3), batch, keys)
  assert seen == [None]


def test_the_weight_is_that_of_the_drawn_timestep():
  """With T = 3 each timestep is drawn: a network that says 0 pays min(SNR, 5) / SNR times the mean of eps squared."""
  schedule = make_schedule("linear", 3, beta_start=0.05, beta_end=0.9)
  objective = objective_of(schedule=schedule, loss_weighting="min_snr")
  batch = jax.tree.map(jnp.asarray, random_batch())
  keys = step_lib.example_keys(0, jnp.asarray(5), batch["index"])
  _, t, eps, _ = jax.vmap(objective.sample_training_example)(keys, batch["image"])
  assert set(np.asarray(t)) == {1, 2, 3}
  alpha_bar = np.cumprod(1 - np.linspace(0.05, 0.9, 3))[np.asarray(t) - 1]
  snr = alpha_bar / (1 - alpha_bar)
  expected = np.mean(np.minimum(snr, 5) / snr * np.mean(np.asarray(eps) ** 2, axis=(1, 2, 3)))
  np.testing.assert_allclose(loss_of(objective, batch, keys), expected, rtol=1e-5)


@pytest.fixture(scope="module")
def learning():
  """200 training steps on one batch of four images: (initial state, states and losses along the way, compiled step)."""
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
  chex.assert_trees_all_equal(host(initial.ema["ema"]), host(initial.params))
  chex.assert_trees_all_equal_shapes_and_dtypes(initial, final)
  # The first step has learning rate 0 (warm-up), so after the second the average is params0 + (1 - d) (params2 -
  # params0) with d = (1 + 2) / (10 + 2): made from the new parameters, not the old ones.
  expected = jax.tree.map(lambda old, new: old + 0.75 * (new - old), host(initial.params), host(second.params))
  chex.assert_trees_all_close(host(second.ema["ema"]), expected, rtol=1e-5, atol=1e-6)
  assert float(metrics["ema_decay"]) == np.float32(0.9)


def test_metrics_are_those_of_this_update(learning):
  run, initial, *_ = learning
  batch = jax.device_put(random_batch(), jax.devices()[0])
  _, metrics = jax.jit(make_train_step(run))(initial, batch)
  keys = step_lib.example_keys(0, jnp.asarray(0), batch["index"])
  value_and_grad = jax.value_and_grad(lambda params: loss_of(make_objective(run), batch, keys, params))
  loss, gradients = jax.jit(value_and_grad)(initial.params)
  norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(host(gradients))))
  np.testing.assert_allclose([metrics["loss"], metrics["grad_norm"]], [loss, norm], rtol=1e-5)
  assert float(metrics["learning_rate"]) == 0


@pytest.mark.parametrize("changes", [{}, CONDITIONAL], ids=["unconditional", "conditional"])
def test_accumulated_gradients_are_those_of_the_whole_batch(changes):
  run = tiny_run(tiny_config(**changes))
  params = jax.tree.map(lambda x: x + 0.05, run.initial_state().params)  # nothing zero-initialised hides dropout

  def loss_fn(params, batch, keys):
    loss = loss_of(make_objective(run), batch, keys, params)
    return loss, ({"half": loss / 2}, {"index": batch["index"]})

  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
  batch = jax.tree.map(jnp.asarray, random_batch(classes=run.config.model.num_classes))
  keys = step_lib.example_keys(0, jnp.asarray(7), batch["index"])
  whole, parts = (
    jax.jit(lambda n: step_lib.mean_loss_and_gradients(value_and_grad, params, batch, keys, n), static_argnums=0)(n)
    for n in (1, 4)
  )
  chex.assert_trees_all_close(parts, whole, rtol=2e-3, atol=1e-5)
  np.testing.assert_array_equal(parts[3]["index"], np.arange(16))  # each number is that of its row again


class Remembering(NamedTuple):
  """(w - frozen)^2 / 2 and 10 w as two terms; what it keeps is the index of each example of the last batch."""

  def loss(self, params, extra, frozen, batch, keys):
    terms = {"square": (params["w"] - frozen) ** 2 / 2, "slope": 10 * params["w"]}
    return terms, {"index": batch["index"], "image": batch["image"][:, 0, 0, 0]}

  def update_extra(self, extra, per_example):
    return {"seen": per_example["index"] + 100 * per_example["image"].astype(jnp.int32), "steps": extra["steps"] + 1}


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_an_own_objective_with_terms_extra_and_frozen(mode, accumulated):
  """On eight devices. The gradient of the sum of its terms is w - frozen + 10; `extra` is in the order of the index."""
  mesh = make_mesh(mode)
  optimizer = optax.sgd(0.1)

  def update(gradients, state, params, *, finite):
    return optimizer.update(gradients, state, params)

  extra = {"seen": jnp.zeros(16, jnp.int32), "steps": jnp.zeros((), jnp.int32)}
  state = create_state({"w": jnp.asarray(1.0)}, optimizer, extra)

  def step(state, batch, axis_name):
    return step_lib.train_step(
      state,
      jnp.asarray(3.0),
      batch,
      seed=0,
      objective=Remembering(),
      optimizer=optax.GradientTransformationExtraArgs(optimizer.init, update),
      learning_rate=optax.constant_schedule(0.1),
      ema_decay=0.5,
      grad_accum_steps=accumulated,
      axis_name=axis_name,
      wrap_loss=mesh.wrap_loss,
    )

  order = np.random.default_rng(0).permutation(16)
  batch = {name: rows[order] for name, rows in random_batch().items()} | {"index": order.astype(np.int32)}
  batch["image"] = np.broadcast_to(order.astype(np.uint8)[:, None, None, None], (16, *IMAGE_SHAPE))
  compiled = mesh.compile(step, jax.eval_shape(lambda: state))
  placed = jax.device_put(state, mesh.state_shardings(jax.eval_shape(lambda: state)))
  new, metrics, _ = compiled(placed, mesh.put_batches([batch]), mesh.put_step_command())
  assert [float(metrics[name]) for name in ("loss", "loss/square", "loss/slope")] == [2 + 10, 2, 10]
  np.testing.assert_allclose(new.params["w"], 1 - 0.1 * (1 - 3 + 10), rtol=1e-6)
  np.testing.assert_allclose(new.ema["ema"]["w"], 1 + (1 - 2 / 11) * (new.params["w"] - 1), rtol=1e-6)
  np.testing.assert_array_equal(new.extra["seen"], 101 * np.arange(16))
  assert int(new.extra["steps"]) == 1


def test_what_release_0_1_0_did_not_know_is_stored_beside_what_it_did():
  state = create_state({"w": jnp.ones(2)}, optax.sgd(0.1))
  assert set(to_stored(state)) == {"step", "params", "ema_params", "opt_state", "counts"}
  more = state.replace(ema={**state.ema, "slow": {"w": jnp.zeros(2)}}, extra={"seen": jnp.arange(3)})
  chex.assert_trees_all_equal(from_stored(to_stored(more)), more)
