"""What is saved is what is restored, bit for bit, on any placement; anything else is refused, and damage is found."""

import hashlib
import json
import os
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1 as ocp_v1

from ddpm_jax.checkpoint import manifest as manifest_lib
from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.errors import NonFiniteError, RunError, UserError
from ddpm_jax.training.state import to_stored
from tests.training.tiny import host, newest_intact, tiny_config, tiny_run

FACTS = {"image_shape": [8, 8, 1]}


def noisy(state):
  """The same state with other numbers in every leaf."""
  return jax.tree.map(
    lambda x: x + jnp.sqrt(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(x.dtype), state
  )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder with checkpoints 3, 5 and 9 of which two are kept; and the state in 9, in 5."""
  directory = tmp_path_factory.mktemp("run") / "checkpoints"
  run = tiny_run(tiny_config())
  state = run.initial_state()
  other = jax.device_put(noisy(state), run.mesh.state_shardings(run.abstract_state))
  checkpoints = Checkpoints(directory, keep=2)
  assert checkpoints.newest() is None and newest_intact(checkpoints, run.abstract_state) is None
  for step in (3, 5, 9):
    checkpoints.save(other if step == 9 else state, step, FACTS)
    checkpoints.wait()
  with pytest.raises(RunError, match=r"checkpoint 7 was not written: .* already holds 9"):
    checkpoints.save(state, 7, FACTS)  # Orbax says so only by returning False
  checkpoints.close()
  return directory, host(other), host(state)


@pytest.fixture
def copy(saved, tmp_path):
  """A copy of the folder, to damage; and what is in it."""
  shutil.copytree(saved[0], tmp_path / "run" / "checkpoints")
  return tmp_path / "run" / "checkpoints", *saved[1:]


def restore(directory, run=None, **options):
  run = run or tiny_run(tiny_config())
  checkpoints = Checkpoints(directory)
  try:
    return newest_intact(checkpoints, run.abstract_state, **options)
  finally:
    checkpoints.close()


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
def test_round_trip_to_any_placement(saved, mode):
  directory, expected, _ = saved
  run = tiny_run(tiny_config(parallel=mode))
  step, state, manifest, damaged = restore(directory, run)
  assert (step, damaged, manifest["image_shape"]) == (9, {}, [8, 8, 1])
  chex.assert_trees_all_equal(host(state), expected)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, run.abstract_state)
  for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(run.abstract_state), strict=True):
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_what_is_saved_of_shards_is_what_is_saved_whole(saved, tmp_path):
  """The manifest does not depend on where the arrays lie."""
  directory, _, _ = saved
  run = tiny_run(tiny_config(parallel="fsdp"))
  state = restore(directory, run).state
  assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
  checkpoints.save(state, 9, FACTS)
  checkpoints.close()
  assert restore(tmp_path / "checkpoints").manifest == restore(directory).manifest


def test_a_restored_state_can_be_donated(saved):
  state = restore(saved[0]).state
  jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_the_newest_are_kept(saved):
  checkpoints = Checkpoints(saved[0])
  assert checkpoints.steps() == [5, 9] and checkpoints.newest() == 9
  checkpoints.close()
  assert sorted(int(path.name) for path in saved[0].iterdir() if path.name.isdigit()) == [5, 9]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_the_other_orbax_reads_it_too(saved):
  """Orbax 1.0 will read what version 0 has written: nobody is locked in."""
  directory, expected, _ = saved
  found = ocp_v1.load(directory / "9", checkpointable_name="state")
  np.testing.assert_array_equal(found["params"]["conv_in"]["kernel"], expected.params["conv_in"]["kernel"])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"channels": 16}, r"checkpoint 9 in .* is of another network: \S+ is float32\[.*\], this run needs float32\[.*\]"),
    ({"num_res_blocks": 2}, "checkpoint 9 in .* is of another network: only this run has ema_params/"),
    ({"attention_resolutions": ()}, "is of another network: only it has ema_params/down1_block0_attention"),
  ],
)
def test_another_network_is_refused(saved, changes, message):
  with pytest.raises(UserError, match=message):
    restore(saved[0], tiny_run(tiny_config(**changes)))


def test_another_type_is_not_cast(saved):
  run = tiny_run(tiny_config())
  narrow = jax.tree.map(
    lambda leaf: (
      jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding) if leaf.dtype == jnp.float32 else leaf
    ),
    run.abstract_state,
  )
  with pytest.raises(UserError, match=r"is float32\[.*\], this run needs bfloat16"):
    restore(saved[0], run._replace(abstract_state=narrow))


# Damage. The faults of files, one by one and in every bit, are in tests/faults/.


def flip(path: pathlib.Path, byte: int, bit: int = 0) -> None:
  contents = bytearray(path.read_bytes())
  contents[byte] ^= 1 << bit
  path.write_bytes(contents)


def largest(folder: pathlib.Path) -> pathlib.Path:
  """Of the files that hold arrays."""
  return max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_changed_bit_is_found_and_the_older_checkpoint_taken(copy):
  directory, _, older = copy
  data = largest(directory / "9")
  flip(data, data.stat().st_size // 10)
  step, state, _, damaged = restore(directory)
  assert step == 5 and list(damaged) == [9]
  chex.assert_trees_all_equal(host(state), older)
  with pytest.raises(UserError, match=r"on_corrupt: checkpoint 9 in .* is damaged: .*--on_corrupt=fallback"):
    restore(directory, on_corrupt="fail")


def test_the_one_checkpoint_that_was_asked_for(copy):
  directory, _, older = copy
  with pytest.raises(UserError, match=r"checkpoint: .* has no 7, only 5, 9"):
    restore(directory, only=7)
  data = largest(directory / "9")
  flip(data, data.stat().st_size // 10)
  step, state, manifest, damaged = restore(directory, only=5)
  assert (step, manifest["step"], damaged) == (5, 5, {})
  chex.assert_trees_all_equal(host(state), older)
  with pytest.raises(
    UserError, match=r"checkpoint: 9 in .* is damaged: .*; use another one"
  ):  # no other one stands in for it
    restore(directory, only=9)


def test_there_is_none_to_ask_for(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  assert restore(tmp_path / "checkpoints", only=9) is None


def test_a_checkpoint_that_goes_away_while_it_is_read(copy, monkeypatch):
  """The run that trains here keeps only the newest ones."""
  directory, _, _ = copy
  read = Checkpoints._read_manifest

  def deleted_first(self, step):
    if step == 9:
      shutil.rmtree(directory / "9")
      monkeypatch.undo()
    return read(self, step)

  monkeypatch.setattr(Checkpoints, "_read_manifest", deleted_first)
  with pytest.raises(UserError, match=r"checkpoint: .* has no 9, only 5"):
    restore(directory, only=9)


def test_other_numbers_are_found_and_named(copy):
  """Written by Orbax itself, with all its checksums in order: only the manifest can tell."""
  directory, newer, _ = copy
  wrong = newer.replace(params=jax.tree.map(np.copy, newer.params))
  wrong.params["conv_in"]["kernel"].flat[3] = np.nextafter(wrong.params["conv_in"]["kernel"].flat[3], np.float32(9))
  shutil.rmtree(directory / "9" / "state")
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory / "9" / "state", to_stored(wrong))
  restored = restore(directory)
  assert restored.step == 5
  assert restored.damaged[9] == "params/conv_in/kernel: not the numbers that were saved (SHA-256)"


@pytest.mark.parametrize("change", [("step", 8), ("image_shape", [8, 8, 3]), ("format", 2), ("leaves", {})])
def test_a_changed_manifest_is_found(copy, change):
  directory, _, _ = copy
  path = directory / "9" / "manifest" / "metadata"
  manifest = json.loads(path.read_text())
  path.write_text(json.dumps(manifest | dict([change])))
  assert restore(directory).damaged == {9: "its manifest is not what was saved"}


def test_a_manifest_of_another_checkpoint_is_found(copy):
  directory, _, _ = copy
  shutil.copy(directory / "5" / "manifest" / "metadata", directory / "9" / "manifest" / "metadata")
  assert restore(directory).damaged == {9: "its manifest is of step 5"}


def test_nothing_intact_is_an_error_and_never_a_new_start(copy):
  directory, _, _ = copy
  for step in ("5", "9"):
    shutil.rmtree(directory / step / "manifest")
  with pytest.raises(
    UserError, match=r"workdir: no checkpoint in .* is intact \(9: .*; 5: .*\); restore one from a copy"
  ):
    restore(directory)


def test_a_damaged_checkpoint_is_moved_and_its_number_saved_again(copy):
  directory, newer, _ = copy
  run = tiny_run(tiny_config())
  checkpoints = Checkpoints(directory, keep=2)
  target = checkpoints.set_aside(9)
  assert target == directory.parent / "damaged" / "9" and (target / "state").is_dir()
  state = jax.device_put(newer, run.mesh.state_shardings(run.abstract_state))
  checkpoints.save(state, 9, FACTS)
  checkpoints.wait()
  assert checkpoints.steps() == [5, 9]
  assert checkpoints.set_aside(9) == directory.parent / "damaged" / "9.1"
  checkpoints.close()


def test_a_machine_that_cannot_read_is_not_taken_for_damage(copy, monkeypatch):
  directory, _, _ = copy
  checkpoints = Checkpoints(directory)
  run = tiny_run(tiny_config())

  def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", refuse)
  with pytest.raises(RunError, match=r"checkpoint 9 in .* cannot be read \(.*Permission denied"):
    newest_intact(checkpoints, run.abstract_state)


def test_a_state_that_is_not_finite_is_not_saved(copy):
  directory, newer, _ = copy
  run = tiny_run(tiny_config())
  newer = jax.tree.map(np.copy, newer)
  newer.ema["ema"]["conv_in"]["bias"][2] = np.inf
  checkpoints = Checkpoints(directory, keep=2)
  state = jax.device_put(newer, run.mesh.state_shardings(run.abstract_state))
  with pytest.raises(NonFiniteError, match="step 12: ema_params/conv_in/bias is no longer finite"):
    checkpoints.save(state, 12, FACTS)
  checkpoints.close()
  assert sorted(os.listdir(directory)) == ["5", "9"]


def test_the_digests_are_sha256_of_the_bytes(saved):
  """By another program's arithmetic: hashlib over NumPy's own bytes."""
  directory, newer, _ = saved
  leaf = restore(directory).manifest["leaves"]["params/conv_in/kernel"]
  kernel = newer.params["conv_in"]["kernel"]
  assert leaf == {
    "shape": list(kernel.shape),
    "dtype": "float32",
    "sha256": hashlib.sha256(kernel.tobytes()).hexdigest(),
  }
  assert set(restore(directory).manifest) == {"format", "step", "leaves", "sha256", "image_shape"}


@pytest.mark.parametrize("manifest", [None, [], {}, {"sha256": None}, "text"])
def test_what_is_no_manifest(manifest):
  with pytest.raises(manifest_lib.DamagedError):
    manifest_lib.check(manifest, 9)
