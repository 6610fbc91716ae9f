"""What is saved is what is restored, bit for bit, on any placement; anything else is refused."""

import chex
import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.training.checkpoint import Checkpoints
from tests.training.tiny import host, tiny_config, tiny_run

META = {"image_shape": [8, 8, 1]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder with checkpoints 3, 5 and 9 of which two are kept; and the state in 9."""
  directory = tmp_path_factory.mktemp("run") / "checkpoints"
  run = tiny_run(tiny_config())
  state = run.initial_state()
  noisy = jax.tree.map(
    lambda x: x + jnp.sqrt(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(x.dtype), state
  )
  noisy = jax.device_put(noisy, run.parallel.state_shardings(run.abstract_state))
  checkpoints = Checkpoints(directory, keep=2)
  for step in (3, 5, 9):
    checkpoints.save(noisy if step == 9 else state, step, META)
    checkpoints.wait()
  with pytest.raises(RuntimeError, match=r"checkpoint 7 was not written: .* already holds 9"):
    checkpoints.save(state, 7, META)  # Orbax says so only by returning False
  checkpoints.close()
  return directory, host(noisy)


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
def test_round_trip_to_any_placement(saved, mode):
  directory, expected = saved
  run = tiny_run(tiny_config(parallel=mode))
  checkpoints = Checkpoints(directory)
  assert checkpoints.latest_step() == 9 and checkpoints.meta(9) == META
  state = checkpoints.restore(run.abstract_state, 9)
  checkpoints.close()
  chex.assert_trees_all_equal(host(state), expected)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, run.abstract_state)
  for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(run.abstract_state), strict=True):
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_a_restored_state_can_be_donated(saved):
  directory, _ = saved
  run = tiny_run(tiny_config())
  checkpoints = Checkpoints(directory)
  state = checkpoints.restore(run.abstract_state, 9)
  checkpoints.close()
  jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_the_newest_are_kept(saved):
  directory, _ = saved
  assert sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) == [5, 9]


def test_no_checkpoint_yet(tmp_path):
  checkpoints = Checkpoints(tmp_path / "new", keep=1)
  assert checkpoints.latest_step() is None
  checkpoints.close()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"channels": 16}, r"checkpoint 9 in .*: \S+ is float32\[.*\], this run needs float32\[.*\]"),
    ({"num_res_blocks": 2}, "checkpoint 9 in .* is of another network: only this run has ema_params/"),
    ({"attention_resolutions": ()}, "is of another network: only it has ema_params/down1_block0_attention"),
  ],
)
def test_another_network_is_refused(saved, changes, message):
  directory, _ = saved
  run = tiny_run(tiny_config(**changes))
  checkpoints = Checkpoints(directory)
  with pytest.raises(UserError, match=message):
    checkpoints.restore(run.abstract_state, 9)
  checkpoints.close()


def test_another_type_is_not_cast(saved):
  directory, _ = saved
  run = tiny_run(tiny_config())
  narrow = jax.tree.map(
    lambda leaf: (
      jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding) if leaf.dtype == jnp.float32 else leaf
    ),
    run.abstract_state,
  )
  checkpoints = Checkpoints(directory)
  with pytest.raises(UserError, match=r"is float32\[.*\], this run needs bfloat16"):
    checkpoints.restore(narrow, 9)
  checkpoints.close()
