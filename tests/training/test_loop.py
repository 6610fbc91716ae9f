"""The order of the loop: what is written when, exact resume, stopping on request, bad news."""

import json
import os
import signal

import chex
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data.sources import Source
from ddpm_jax.errors import NonFiniteError, UserError
from ddpm_jax.training import loop
from ddpm_jax.training.checkpoint import Checkpoints
from tests.training.tiny import IMAGE_SHAPE, host, tiny_config, tiny_run

TIMES = ("steps_per_second", "images_per_second")


@pytest.fixture(autouse=True)
def noise_images(monkeypatch):
  """40 images: with batches of 16, an epoch ends in the middle of the third batch."""
  images = np.random.default_rng(0).integers(0, 256, (40, *IMAGE_SHAPE), dtype=np.uint8)
  source = Source(name="noise", image_shape=IMAGE_SHAPE, length=len(images), read=images.__getitem__)
  monkeypatch.setattr(loop, "open_source", lambda data: source)


def train(workdir, **changes):
  loop.train(tiny_config(**changes), workdir)


def metrics(workdir):
  """The lines of metrics.jsonl without the times."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def restore(workdir, step=None):
  checkpoints = Checkpoints(workdir / "checkpoints")
  run = tiny_run(tiny_config())
  state = checkpoints.restore(run.abstract_state, step or checkpoints.latest_step())
  checkpoints.close()
  return host(state)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """Eight updates in one go, with grids."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  with pytest.MonkeyPatch.context() as patch:
    images = np.random.default_rng(0).integers(0, 256, (40, *IMAGE_SHAPE), dtype=np.uint8)
    source = Source(name="noise", image_shape=IMAGE_SHAPE, length=len(images), read=images.__getitem__)
    patch.setattr(loop, "open_source", lambda data: source)
    train(workdir, sample_every=6)
  return workdir


def test_what_a_run_leaves(uninterrupted):
  assert {path.name for path in uninterrupted.iterdir()} == {
    "config.json",
    "flags.txt",
    "checkpoints",
    "metrics.jsonl",
    "loss.png",
    "tensorboard",
    "samples",
  }
  assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir() if p.name.isdigit()) == ["4", "8"]
  assert [line["step"] for line in metrics(uninterrupted)] == list(range(1, 9))
  assert set(metrics(uninterrupted)[0]) == {"step", "loss", "grad_norm", "learning_rate", "ema_decay"}
  assert int(restore(uninterrupted, 4).step) == 4 and int(restore(uninterrupted).step) == 8
  grids = sorted((uninterrupted / "samples").iterdir())
  assert [path.name for path in grids] == ["step_00000006.png", "step_00000008.png"]
  picture = np.asarray(Image.open(grids[0]))
  assert picture.ndim == 3 and picture.std() > 20


def test_stopped_again_and_again_is_never_stopped(uninterrupted, tmp_path):
  """Stops after 2, 3 and 5 updates, across the end of an epoch: state and metrics are equal bit for bit."""
  for num_steps in (2, 3, 5, 8):
    train(tmp_path / "run", num_steps=num_steps)
  chex.assert_trees_all_equal(restore(tmp_path / "run"), restore(uninterrupted))
  assert metrics(tmp_path / "run") == metrics(uninterrupted)


def test_a_request_to_stop_saves_where_it_is(uninterrupted, tmp_path, monkeypatch, capsys):
  real, count = loop.batches, []

  def interrupt(*args, **kwargs):
    for batch in real(*args, **kwargs):
      count.append(1)
      if len(count) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  monkeypatch.setattr(loop, "batches", interrupt)
  before = signal.getsignal(signal.SIGTERM)
  train(tmp_path / "run")
  assert "stopped on request after update 3 of 8, saved" in capsys.readouterr().out
  assert signal.getsignal(signal.SIGTERM) is before
  assert int(restore(tmp_path / "run").step) == 3
  monkeypatch.setattr(loop, "batches", real)
  train(tmp_path / "run")
  assert "resuming" in capsys.readouterr().out
  chex.assert_trees_all_equal(restore(tmp_path / "run"), restore(uninterrupted))
  assert metrics(tmp_path / "run") == metrics(uninterrupted)


def test_updates_lost_to_a_crash_are_made_and_logged_again(uninterrupted, tmp_path, monkeypatch):
  real = loop.batches

  def crash(*args, **kwargs):
    for number, batch in enumerate(real(*args, **kwargs)):
      if number == 6:
        raise OSError("a cable was pulled")
      yield batch

  monkeypatch.setattr(loop, "batches", crash)
  with pytest.raises(OSError, match="cable"):
    train(tmp_path / "run")
  assert len(metrics(tmp_path / "run")) > 4  # logged beyond the checkpoint of update 4
  monkeypatch.setattr(loop, "batches", real)
  train(tmp_path / "run")
  chex.assert_trees_all_equal(restore(tmp_path / "run"), restore(uninterrupted))
  assert metrics(tmp_path / "run") == metrics(uninterrupted)


def test_a_finished_run_does_nothing(uninterrupted, capsys):
  before = {path: path.stat().st_mtime_ns for path in (uninterrupted / "checkpoints").rglob("*")}
  config = (uninterrupted / "config.json").read_text()
  train(uninterrupted, sample_every=6, num_samples=9)
  assert (uninterrupted / "config.json").read_text() == config
  assert "already holds all 8 updates: nothing to do" in capsys.readouterr().out
  assert before == {path: path.stat().st_mtime_ns for path in (uninterrupted / "checkpoints").rglob("*")}
  assert len(metrics(uninterrupted)) == 8


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
  with pytest.raises(NonFiniteError, match=r"update [23]: loss .*; what was saved before is intact; try a lower"):
    train(tmp_path / "run", learning_rate=1e38, warmup_steps=0, grad_clip=0.0)


def test_another_configuration_is_refused_before_anything_is_written(uninterrupted):
  before = (uninterrupted / "config.json").read_text()
  with pytest.raises(UserError, match=r"channels: .* was trained with '8', this command says '16'"):
    train(uninterrupted, channels=16, sample_every=6)
  assert (uninterrupted / "config.json").read_text() == before
