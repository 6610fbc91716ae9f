"""A packed tree is the tree: to and fro, and in what is computed with it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.runtime.cpu.packed import SMALL, Packed, pack, unpack
from ddpm_jax.training.objective import DenoiserObjective
from ddpm_jax.training.setup import make_objective, make_train_step
from ddpm_jax.training.step import abstract_batch
from tests.training.tiny import IMAGE_SHAPE, host, random_batch, tiny_config, tiny_run


def tree_of(*sizes: int):
  random = np.random.default_rng(0)
  return {f"{number}": random.normal(size=size).astype(np.float32) for number, size in enumerate(sizes)}


@pytest.mark.parametrize(
  "shapes",
  [
    [(3,), (SMALL + 1,), (), (2, 3)],
    [(SMALL,), (SMALL + 1,), (3, 3, 40, 50)],
    [(SMALL + 1,), (100, 100)],  # none is small
    [(3,), (1, 2, 3)],  # none is large
    [(0,), (2, 0), (5,)],
  ],
)
def test_to_and_fro(shapes):
  tree = tree_of(*shapes)
  packed = pack(tree, tree)
  assert packed.small.size == sum(leaf.size for leaf in tree.values() if leaf.size <= SMALL)
  assert [leaf.shape for leaf in packed.large] == [(leaf.size,) for leaf in tree.values() if leaf.size > SMALL]
  chex.assert_trees_all_equal(host(unpack(packed)), tree)


def test_a_state_is_packed_where_it_is_like_the_parameters():
  state = tiny_run(tiny_config()).initial_state()
  packed = pack(state, state.params)
  adam, adam_packed = state.opt_state[1][0], packed.opt_state[1][0]
  for part in (packed.params, packed.ema["ema"], adam_packed.mu, adam_packed.nu):
    assert isinstance(part, Packed)
  for left, whole in ((packed.step, state.step), (adam_packed.count, adam.count), (packed.counts, state.counts)):
    chex.assert_trees_all_equal(left, whole)
  assert len(jax.tree.leaves(packed)) < len(jax.tree.leaves(state)) / 4
  chex.assert_trees_all_equal(unpack(packed), state)


def test_the_gradient_of_a_packed_tree_is_that_of_the_tree_packed():
  tree = tree_of((3,), (SMALL + 1,), (4, 2))

  def loss(params):
    return sum(jnp.sum(jnp.sin(leaf) * (number + 1)) for number, leaf in enumerate(jax.tree.leaves(unpack(params))))

  whole, packed = jax.grad(loss)(tree), jax.grad(loss)(pack(tree, tree))
  assert isinstance(packed, Packed)
  chex.assert_trees_all_equal(unpack(packed), whole)


def test_updates_of_a_call_are_made_of_a_packed_state_on_cpus():
  """XLA's loop carries what is large, four times, and little else; without packing it would be all of the state."""
  run = tiny_run(tiny_config())
  step = run.mesh.compile(make_train_step(run), run.abstract_state, max_steps=3)
  text = step.lower(
    run.abstract_state, *run.mesh.abstract_inputs(abstract_batch(IMAGE_SHAPE, 16), max_steps=3)
  ).as_text()
  carried = max(line.count("tensor<") for line in text.splitlines() if "stablehlo.while" in line)
  large = sum(leaf.size > SMALL for leaf in jax.tree.leaves(run.abstract_state))
  assert large <= carried < large + 30 < len(jax.tree.leaves(run.abstract_state))


@pytest.mark.parametrize("parts", [1, 2])
def test_updates_of_a_packed_state_are_the_updates(parts):
  """Three in a call against three calls, with large arrays; the second is not finite, and leaves no trace."""
  run = tiny_run(tiny_config(channels=24, channel_multipliers=(1,), attention_resolutions=(), grad_accum_steps=parts))
  assert any(leaf.size > SMALL for leaf in jax.tree.leaves(run.abstract_state.params))

  class Poisoned(DenoiserObjective):
    def loss(self, params, extra, frozen, batch, keys):
      terms, per_example = super().loss(params, extra, frozen, batch, keys)
      factor = jnp.where(jnp.any(batch["replaced"]), jnp.nan, 1.0)
      return {name: term * factor for name, term in terms.items()}, per_example

  step = make_train_step(run, Poisoned(**vars(make_objective(run))))
  batches = [random_batch(seed=i) for i in range(3)]
  batches[1]["replaced"][:] = True
  three, one = (run.mesh.compile(step, run.abstract_state, max_steps=updates) for updates in (3, 1))

  def together(number: int):
    placed = run.mesh.put_batches(batches, max_steps=3)
    state, metrics, _ = three(run.initial_state(), placed, run.mesh.put_step_command(number))
    return host(state), host(metrics)

  state, rows = run.initial_state(), []
  for batch in batches:
    state, metrics, _ = one(state, run.mesh.put_batches([batch]), run.mesh.put_step_command())
    rows.append(host(metrics))
  packed, packed_metrics = together(3)
  chex.assert_trees_all_close(packed_metrics, jax.tree.map(lambda *values: np.stack(values), *rows), rtol=2e-5)
  for mine, theirs in zip(jax.tree.leaves(packed), jax.tree.leaves(host(state)), strict=True):
    assert mine.dtype == theirs.dtype
    assert np.mean(np.abs(mine - theirs) > 1e-4) < 0.02  # as in test_mesh.py

  first, left_out = together(1)[0], together(2)[0]
  for name in ("params", "ema", "opt_state"):
    chex.assert_trees_all_equal(getattr(left_out, name), getattr(first, name))
  assert (left_out.step, left_out.counts.nonfinite) == (2, 1)
