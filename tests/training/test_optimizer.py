"""Learning rates, clipping and the moving average against formulas written out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.config import OptimizerConfig
from ddpm_jax.training.optimizer import (
  decay_start,
  ema_decay_at,
  learning_rate_schedule,
  make_optimizer,
  update_ema,
)


def test_warm_up_then_constant_as_in_the_paper():
  rate = learning_rate_schedule(OptimizerConfig(learning_rate=2e-4, lr_schedule="constant", warmup_steps=5000), 800_000)
  np.testing.assert_allclose(
    [rate(n) for n in (0, 1, 2500, 5000, 799_999)], [0, 2e-4 / 5000, 1e-4, 2e-4, 2e-4], rtol=1e-3
  )


def test_cosine_after_the_warm_up():
  rate = learning_rate_schedule(OptimizerConfig(learning_rate=1e-3, lr_schedule="cosine", warmup_steps=100), 1100)
  half = 1e-3 * (1 + np.cos(np.pi / 4)) / 2
  np.testing.assert_allclose([rate(n) for n in (50, 100, 350, 600, 1100)], [5e-4, 1e-3, half, 5e-4, 0], atol=1e-9)


def test_cosine_in_a_run_that_is_shorter_than_its_warm_up_and_anew_after_a_restart():
  config = OptimizerConfig(learning_rate=1e-3, lr_schedule="cosine", warmup_steps=100)
  rate = learning_rate_schedule(config, 40)  # a warm-up of 20
  np.testing.assert_allclose([rate(n) for n in (10, 20, 30, 40)], [5e-4, 1e-3, 5e-4, 0], atol=1e-9)
  rate = learning_rate_schedule(config, 1100 + 700, restart=700)
  # Less than 700 where steps were not finite.
  np.testing.assert_allclose([rate(n) for n in (690, 700, 750, 800, 1300)], [0, 0, 5e-4, 1e-3, 5e-4], atol=1e-9)


def test_linear_anneals_as_guided_diffusion_does_after_any_warm_up():
  """Its classifiers: the rate times 1 - n / N (Dhariwal and Nichol 2021, `classifier_train.py`), without a warm-up."""
  config = OptimizerConfig(learning_rate=3e-4, lr_schedule="linear", warmup_steps=0)
  n = np.arange(301)
  np.testing.assert_allclose(learning_rate_schedule(config, 300)(n), 3e-4 * (1 - n / 300), atol=1e-10)
  config = OptimizerConfig(learning_rate=1e-3, lr_schedule="linear", warmup_steps=100)
  rate = learning_rate_schedule(config, 1100)
  np.testing.assert_allclose([rate(n) for n in (50, 100, 350, 600, 1100)], [5e-4, 1e-3, 7.5e-4, 5e-4, 0], atol=1e-9)
  rate = learning_rate_schedule(config, 40)  # a warm-up of 20
  np.testing.assert_allclose([rate(n) for n in (10, 20, 30, 40)], [5e-4, 1e-3, 5e-4, 0], atol=1e-9)
  rate = learning_rate_schedule(config, 1100 + 700, restart=700)
  np.testing.assert_allclose([rate(n) for n in (700, 750, 800, 1050, 1800)], [0, 5e-4, 1e-3, 7.5e-4, 0], atol=1e-9)
  assert decay_start(config, 1100) is None


def test_constant_then_decay():
  """1 - sqrt over the last fifth, as a factor, so that a short warm-up or a short run are no other case."""
  config = OptimizerConfig(learning_rate=1e-3, lr_schedule="constant_then_decay", decay_fraction=0.2, warmup_steps=100)
  rate = learning_rate_schedule(config, 1000)
  np.testing.assert_allclose(
    [rate(n) for n in (0, 50, 100, 799, 800, 850, 1000)], [0, 5e-4, 1e-3, 1e-3, 1e-3, 5e-4, 0], atol=1e-9
  )
  rate = learning_rate_schedule(config, 40)
  np.testing.assert_allclose([rate(n) for n in (10, 32, 34, 40)], [1e-4, 3.2e-4, 1.7e-4, 0], atol=1e-9)


def test_a_longer_run_has_the_rates_of_a_shorter_one_up_to_its_decay():
  for fraction, warmup in ((0.2, 100), (0.37, 5), (1.0, 3), (0.001, 0)):
    config = OptimizerConfig(lr_schedule="constant_then_decay", decay_fraction=fraction, warmup_steps=warmup)
    starts = [decay_start(config, num_steps) for num_steps in range(1, 300)]
    assert starts == sorted(starts) and all(start < n for n, start in enumerate(starts, 1))
    n = np.arange(300)
    for short in (1, 2, 40, 173, 299):
      rates = [np.asarray(learning_rate_schedule(config, length)(n)) for length in (short, 300)]
      np.testing.assert_array_equal(*(rate[: starts[short - 1] + 1] for rate in rates))
  assert decay_start(OptimizerConfig(lr_schedule="cosine"), 100) is None


def test_no_warm_up():
  assert learning_rate_schedule(OptimizerConfig(learning_rate=0.5, lr_schedule="constant", warmup_steps=0), 9)(0) == 0.5


def test_adam_by_hand():
  """Two training steps of Adam with beta 0.9 and 0.999 and epsilon 1e-8, without and with clipping to norm 1.

  The third gradient is so small that epsilon shows, and whether it is in the root.
  """
  for clip, scale in ((0.0, 1.0), (1.0, 0.2)):  # the gradient (3, 4) has norm 5
    config = OptimizerConfig(learning_rate=0.1, lr_schedule="constant", warmup_steps=0, grad_clip=clip)
    optimizer = make_optimizer(config, 10)
    params = jnp.zeros(3)
    state = optimizer.init(params)
    m, v, expected = np.zeros(3), np.zeros(3), np.zeros(3)
    for n, gradient in enumerate([np.array([3.0, 4.0, 1e-7]), np.array([-0.1, 0.2, 1e-7])], start=1):
      updates, state = optimizer.update(jnp.asarray(gradient), state, params)
      params = optax.apply_updates(params, updates)
      g = gradient * (scale if n == 1 else 1.0)
      m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
      expected = expected - 0.1 * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
      np.testing.assert_allclose(params, expected, rtol=1e-4)


def test_weight_decay_is_that_of_adamw():
  """Decoupled: where there is no gradient, each training step multiplies a parameter by 1 - rate x decay."""
  config = OptimizerConfig(learning_rate=0.1, lr_schedule="constant", warmup_steps=0, grad_clip=0.0, weight_decay=0.05)
  optimizer, theirs = make_optimizer(config, 10), optax.adamw(0.1, weight_decay=0.05)
  params = other = jnp.asarray([2.0, -3.0, 0.5])
  state, their_state = optimizer.init(params), theirs.init(other)
  for n in (1, 2):
    gradient = jnp.asarray([0.0, 0.3 * n, -0.1])
    updates, state = optimizer.update(gradient, state, params)
    their_updates, their_state = theirs.update(gradient, their_state, other)
    params, other = optax.apply_updates(params, updates), optax.apply_updates(other, their_updates)
    np.testing.assert_allclose(params, other, rtol=1e-6)
    np.testing.assert_allclose(params[0], 2.0 * (1 - 0.1 * 0.05) ** n, rtol=1e-6)


def test_the_same_as_adam_of_optax():
  """Also its state, which checkpoints hold."""
  config = OptimizerConfig(learning_rate=0.1, lr_schedule="constant", warmup_steps=0, grad_clip=0.0)
  ours, theirs = make_optimizer(config, 10), optax.chain(optax.identity(), optax.adam(optax.constant_schedule(0.1)))
  params = {"a": jnp.linspace(-1.0, 1.0, 7), "b": jnp.ones((2, 3))}
  states = [optimizer.init(params) for optimizer in (ours, theirs)]
  for n in range(3):
    gradients = jax.tree.map(lambda p, n=n: jnp.sin(7 * p + n), params)
    (ours_made, states[0]), (theirs_made, states[1]) = (
      optimizer.update(gradients, state, params) for optimizer, state in zip((ours, theirs), states, strict=True)
    )
    chex.assert_trees_all_close(ours_made, theirs_made, rtol=1e-6)
    chex.assert_trees_all_equal(*states)


@pytest.mark.parametrize(("n", "expected"), [(1, 2 / 11), (5, 6 / 15), (81, 82 / 91), (10**6, 0.9999)])
def test_ema_warm_up(n, expected):
  np.testing.assert_allclose(ema_decay_at(0.9999, jnp.asarray(n)), expected, rtol=1e-6)


def test_ema_does_not_stall():
  """At decay 0.9999 in float32 the average follows a constant; in bfloat16 it would never move."""
  ema = jnp.zeros(())
  for _ in range(100):
    ema = update_ema(ema, jnp.ones(()), jnp.float32(0.9999))
  np.testing.assert_allclose(ema, 1 - 0.9999**100, rtol=1e-3)
