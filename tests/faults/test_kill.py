"""Killed at random moments and started again, on other devices too: the run is the one that nothing happened to."""

import json
import random
import shutil
import time

import jax
import numpy as np
import pytest

from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.checkpoint.manifest import describe
from ddpm_jax.devices import make_mesh
from ddpm_jax.training.setup import build_run
from ddpm_jax.workdir import layout
from tests import command
from tests.command import checkpoints, digests, metrics
from tests.faults.conftest import PLAIN
from tests.training.tiny import newest_intact

pytestmark = pytest.mark.slow

KILLS = 5


def temporary(workdir):
  """What a kill in the middle of a save leaves behind."""
  return list((workdir / "checkpoints").glob("*tmp*"))


def test_killed_at_random_moments(folder, whole, launch, complete):
  workdir, generator = folder / "killed", random.Random(20)
  newest, inside_a_save = 0, 0
  for number in range(KILLS):
    heard = launch("killed", f"--checkpoint_every={generator.choice([1, 2, 5])}")
    heard.wait_for("compiling")
    assert temporary(workdir) == [], "what the last kill has left is still there"
    if number != 1:  # which is killed while it compiles
      heard.wait_for("compiled and made step")
      rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
      assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "a line is missing or there twice"
      assert len(rows) >= newest, "lines are gone of training steps that are not made again"
      at_least = newest + 1  # so that there is progress
      heard.wait_until(lambda: checkpoints(workdir)[-1:] >= [at_least])  # noqa: B023
    time.sleep(generator.uniform(0, 0.8))
    heard.process.kill()
    heard.finish(-9)
    left = temporary(workdir)
    assert len(left) <= 1, left
    inside_a_save += len(left)
    newest = checkpoints(workdir)[-1]
  assert inside_a_save, "no kill met a save; choose another seed"
  out = complete("killed")
  assert f"after step {newest} of" in out
  assert [path for path in workdir.rglob("*") if "tmp" in path.name] == []


@pytest.fixture(scope="module")
def five(folder):
  """A workdir after 5 training steps on 2 devices, stopped by its command."""
  command.run(folder, "five", *PLAIN, "--num_steps=5")
  assert checkpoints(folder / "five") == [5]
  return folder / "five"


def test_restored_on_other_devices_every_bit_is_the_same(five):
  """This process has eight devices."""
  assert jax.device_count() == 8
  config = layout.load_config(five)
  for mode in ("pmap", "fsdp"):
    mesh = make_mesh(mode)
    run = build_run(config, (8, 8, 1), mesh)
    checkpoints = Checkpoints(five / "checkpoints")
    state = newest_intact(checkpoints, run.abstract_state).state
    checkpoints.close()
    sharded = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert bool(sharded) == (mode == "fsdp")
    assert {name: leaf["sha256"] for name, leaf in describe(state).items()} == digests(five)


@pytest.mark.parametrize(("devices", "mode"), [(1, "fsdp"), (8, "pmap"), (8, "fsdp")])
def test_on_other_devices_the_run_goes_on_as_it_would_have(folder, whole, five, launch, devices, mode):
  """The same images, timesteps and noise: else the losses and the gradients would differ in the first digit."""
  name = f"{devices}-{mode}"
  shutil.copytree(five, folder / name)
  out, _ = launch(name, "--num_steps=10", f"--parallel={mode}", devices=devices).finish()
  assert f"{devices} x cpu ({mode})" in out and "after step 5 of 10" in out
  found, wanted = metrics(folder / name), metrics(whole)[:10]
  assert found[:5] == wanted[:5]
  for key in ("step", "loss", "grad_norm"):
    np.testing.assert_allclose([row[key] for row in found], [row[key] for row in wanted], rtol=1e-5)
