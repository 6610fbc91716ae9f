"""The loss of a classifier of noisy images, and what a training step logs of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.config import OptimizerConfig
from ddpm_jax.diffusion.forward import q_sample
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.first_stage.pixels import Pixels, to_float
from ddpm_jax.keys import indexed_keys
from ddpm_jax.training.objective import ClassifierObjective, sample_example
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import create_state
from ddpm_jax.training.step import example_keys, train_step
from tests.training.tiny import IMAGE_SHAPE, random_batch

SCHEDULE = make_schedule("linear", 100)
LABELS = np.arange(16, dtype=np.int32) % 3


def linear(params, xt, time, cond, *, dropout_keys=None):
  """Logits of three classes, of x_t and the time."""
  assert cond is None and dropout_keys is not None
  return xt.reshape(len(xt), -1) @ params["w"] + time[:, None] * params["of_time"][None]


OBJECTIVE = ClassifierObjective(linear, SCHEDULE, Pixels(IMAGE_SHAPE), flip=True)
PARAMS = {
  "w": jnp.asarray(np.random.default_rng(0).standard_normal((64, 3)) / 8, jnp.float32),
  "of_time": jnp.asarray([0.0, 0.01, -0.01]),
}


def by_hand(params, keys, batch):
  """-log p(y | x_t) and whether y is the likeliest, of each example, in NumPy."""
  losses, right = [], []
  for key, image, label in zip(keys, batch["image"], batch["label"], strict=True):
    image, t, eps, _ = sample_example(key, image, 100, IMAGE_SHAPE, flip=True)
    xt = q_sample(to_float(image), eps, SCHEDULE.level(t))
    logits = np.asarray(xt, np.float64).reshape(-1) @ np.asarray(params["w"]) + float(t - 1) * params["of_time"]
    losses.append(np.log(np.exp(logits).sum()) - logits[label])
    right.append(np.argmax(logits) == label)
  return np.asarray(losses), np.asarray(right)


def test_the_loss_is_the_cross_entropy_of_noisy_images():
  batch = random_batch() | {"label": LABELS}
  keys = indexed_keys(jax.random.key(0), jnp.arange(16))
  terms, per_example = OBJECTIVE.loss(PARAMS, {}, {}, batch, keys)
  losses, right = by_hand(PARAMS, keys, batch)
  assert list(terms) == ["cross_entropy"] and 0 < right.mean() < 1
  np.testing.assert_allclose(terms["cross_entropy"], losses.mean(), rtol=1e-5)
  np.testing.assert_array_equal(per_example["accuracy"], right)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_training_step_logs_the_accuracy(parts):
  """The mean over the batch, whole or in parts; where it is mapped over devices, over all of them."""
  batch, config = random_batch() | {"label": LABELS}, OptimizerConfig(warmup_steps=0, lr_schedule="constant")
  optimizer = make_optimizer(config, 10)
  step = lambda state, batch, axis_name=None: train_step(  # noqa: E731
    state,
    {},
    batch,
    seed=0,
    objective=OBJECTIVE,
    optimizer=optimizer,
    learning_rate=optax.constant_schedule(1e-3),
    ema_decay=0.9,
    grad_accum_steps=parts,
    axis_name=axis_name,
  )
  state = create_state(PARAMS, optimizer)
  losses, right = by_hand(PARAMS, example_keys(0, state.step, jnp.asarray(batch["index"])), batch)
  _, alone = jax.jit(step)(state, batch)
  halves = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(2, 8, *leaf.shape[1:]), batch)
  _, mapped = jax.vmap(lambda batch: step(state, batch, "devices"), axis_name="devices")(halves)
  for metrics in (alone, jax.tree.map(lambda leaf: leaf[0], mapped)):
    np.testing.assert_allclose(metrics["mean/accuracy"], right.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], losses.mean(), rtol=1e-5)
