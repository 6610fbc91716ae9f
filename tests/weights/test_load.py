"""Which checkpoint is drawn from, and with the network as it was trained."""

import contextlib
import os
import shutil

import jax
import numpy as np
import pytest

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.errors import UserError
from ddpm_jax.runs import sample as sampling
from ddpm_jax.weights.load import load_weights
from ddpm_jax.workdir import layout
from ddpm_jax.workdir.lock import Lock
from tests.command import digests
from tests.sampling.conftest import Trained, noise
from tests.training.tiny import host


@pytest.fixture
def trained(original, tmp_path) -> Trained:
  """A copy of the workdir with checkpoints, to change."""
  shutil.copytree(original.path, tmp_path / "run")
  return Trained(tmp_path / "run", original.config)


def refusal(trained, **changes) -> str:
  with pytest.raises(UserError) as caught:
    load_weights(trained.having(**changes), trained.path)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize(
  ("changes", "step", "seed"),
  [
    ({}, 5, 50),
    ({"checkpoint": "5", "sample_weights": "raw"}, 5, 5),
    ({"checkpoint": "3"}, 3, 30),
    ({"checkpoint": "03", "sample_weights": "raw", "parallel": "fsdp"}, 3, 3),
  ],
)
def test_the_weights_that_were_asked_for(original, changes, step, seed):
  weights = load_weights(original.having(**changes), original.path)
  assert (weights.step, weights.which) == (step, changes.get("sample_weights", "ema"))
  first = host(weights.run.initial_state()).params
  for leaf, begun in zip(jax.tree.leaves(host(weights.params)), jax.tree.leaves(first), strict=True):
    np.testing.assert_allclose(leaf, begun + noise(begun.shape, seed), rtol=1e-6, atol=1e-7)
  assert weights.run.image_shape == (8, 8, 1)


def test_weights_are_known_by_their_numbers(original, trained):
  """Not by the place or the number of the checkpoint."""
  identity = lambda where, **changes: load_weights(where.having(**changes), where.path).identity  # noqa: E731
  ours = {identity(original), identity(original, checkpoint="3"), identity(original, sample_weights="raw")}
  assert len(ours) == 3 and all(len(text) == 64 for text in ours)
  (trained.path / "best").mkdir()
  shutil.copytree(trained.path / "checkpoints" / "3", trained.path / "best" / "3")
  assert identity(trained, checkpoint="best") == identity(original, checkpoint="3")
  assert identity(trained, parallel="fsdp") == identity(original)
  names = [name for name in digests(original.path) if name.startswith("ema_params/")]
  assert names


def test_the_best_is_that_of_its_own_folder(trained):
  text = refusal(trained, checkpoint="best")
  assert text == f"workdir: {trained.path} holds no best checkpoint yet; let training keep one with --evaluate_every"
  (trained.path / "best").mkdir()
  assert refusal(trained, checkpoint="best") == text  # still none
  shutil.copytree(trained.path / "checkpoints" / "3", trained.path / "best" / "3")
  assert load_weights(trained.having(checkpoint="best"), trained.path).step == 3


def test_a_checkpoint_that_is_not_there(trained):
  assert refusal(trained, checkpoint="7") == f"checkpoint: {trained.path / 'checkpoints'} has no 7, only 3, 5"
  assert "has no 0, only 3, 5" in refusal(trained, checkpoint="0")


def test_none_at_all_says_whether_the_run_is_training(trained):
  """A run that was never trained, one that trains now, and one that ended too early; in Python as on the command line.

  The first checkpoint is the earliest of --checkpoint_every, --evaluate_every, the beginning of a decay, and the end.
  """
  path = trained.path
  begin = f"python -m ddpm_jax.main --workdir={path}"
  shutil.rmtree(path / "checkpoints")
  never = f"workdir: {path} holds no checkpoint yet, as it was never trained; train first, with {begin}"
  for name in ("newest", "5"):
    assert refusal(trained, checkpoint=name) == never
  (path / "checkpoints").mkdir()
  assert refusal(trained, checkpoint="5") == never
  decay = dict(lr_schedule="constant_then_decay", decay_fraction=0.9, num_steps=20)
  for changes, first in (
    (dict(checkpoint_every=30, num_steps=70), "30 of 70 (--checkpoint_every=30)"),
    (dict(checkpoint_every=30, num_steps=20), "20 of 20 (--checkpoint_every=30)"),
    (dict(checkpoint_every=30, num_steps=70, evaluate_every=7), "7 of 70 (--checkpoint_every=30)"),
    (dict(checkpoint_every=5, **decay), "2 of 20 (--checkpoint_every=5)"),
    (dict(checkpoint_every=5, **decay | dict(decay_fraction=1.0)), "5 of 20 (--checkpoint_every=5)"),
  ):
    layout.create(path, trained.having(**changes))
    with contextlib.closing(Lock(path)):
      (path / "metrics.jsonl").touch()
      text = refusal(trained)
      with pytest.raises(UserError) as caught:
        ddpm_jax.load(path)
    assert text.startswith(
      f"workdir: {path} holds no checkpoint yet, as it is being trained, by process {os.getpid()} "
    )
    assert text.endswith(
      f": the first is written after step {first}; wait for it, or stop the training, which saves one, and give its "
      "command again with a smaller --checkpoint_every"
    )
    assert str(caught.value) == text
    assert refusal(trained) == (
      f"workdir: {path} holds no checkpoint: training has ended before there was one, or they were deleted; the first "
      f"is written after step {first}; begin anew with {begin}, with a smaller --checkpoint_every if need be"
    )


@pytest.mark.parametrize("name", ["last", "", "-5", "5.0", " 5", "٥", "bests"])
def test_nonsense(trained, name):
  with pytest.raises(UserError, match=r"checkpoint: .* is unknown; use newest, best, or a number of training steps"):
    trained.having(checkpoint=name)


def test_another_run_is_refused(trained):
  assert "channels: checkpoint 5 in " in refusal(trained, channels=16)


def test_a_damaged_checkpoint(trained, capsys):
  """The newest intact one is taken where the newest was wanted, and none other than the one that was named."""
  files = (trained.path / "checkpoints" / "5" / "state").glob("**/d/*")
  data = max(files, key=lambda path: path.stat().st_size)
  contents = bytearray(data.read_bytes())
  for place in range(0, len(contents), 64):  # in all arrays that the file holds
    contents[place] ^= 1
  data.write_bytes(contents)
  assert load_weights(trained.config, trained.path).step == 3
  assert "warning: checkpoint 5 is damaged: " in capsys.readouterr().err
  assert "damaged" in refusal(trained, on_corrupt="fail")
  text = refusal(trained, checkpoint="5")
  assert "checkpoint: 5 in " in text and text.endswith("; use another one")
  assert load_weights(trained.having(checkpoint="3"), trained.path).step == 3


def test_a_draw_and_a_task_end_to_end(trained, capsys):
  """With the U-Net, from its checkpoint."""
  sampling.sample(trained.having(checkpoint="3"), trained.path)
  sampling.sample(trained.having(checkpoint="3", sample_task="progressive", sample_weights="ema"), trained.path)
  plain, progressive = trained.load(), trained.load("progressive")
  assert plain["images"].shape == (3, 8, 8, 1) and plain["images"].std() > 10
  np.testing.assert_array_equal(plain["images"], progressive["images"])
  assert progressive["x0_hat"].shape == (3, 4, 8, 8, 1)
  assert trained.settings()["checkpoint"] == 3
  assert "with the ema weights after step 3: ddim" in capsys.readouterr().out
  other = trained.having(checkpoint="3", sample_weights="raw")
  assert config_lib.values(other)["sample_weights"] == "raw"
  sampling.sample(other, trained.path)
  assert np.abs(trained.load()["images"].astype(int) - plain["images"]).mean() > 2
  assert "with the raw weights after step 3" in capsys.readouterr().out
