"""Runs that are made longer or shorter: what they go on from, and that nothing of it is lost or told wrongly."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax import resolve
from ddpm_jax.checkpoint import resume
from ddpm_jax.config import Config
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.runs import train as train_lib
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.weights.load import load_weights
from ddpm_jax.workdir import grids, layout
from tests.command import checkpoints, digests
from tests.runs.test_train import LITTLE, metrics, noise, signal_with, train

# Of 10 steps the last 4 decay, of 20 the last 8; the warm-up is longer than the shorter run.
DECAY = LITTLE | dict(dropout=0.3, lr_schedule="constant_then_decay", decay_fraction=0.4, warmup_steps=11)
OPTIONS = DECAY | dict(checkpoint_every=5, sample_every=5, log_every=3, keep_checkpoints=1, steps_per_dispatch=1)
COSINE = LITTLE | dict(lr_schedule="cosine", warmup_steps=2, checkpoint_every=4, log_every=1, steps_per_dispatch=1)


pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(autouse=True)
def noise_images(monkeypatch):
  monkeypatch.setattr(train_lib, "open_source", lambda *_: noise())


@pytest.fixture(scope="module")
def short_and_long(shared_programs, tmp_path_factory):
  """Ten steps; twenty from the start."""
  folder = tmp_path_factory.mktemp("runs")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_lib, "open_source", lambda *_: noise())
    train(folder / "short", **OPTIONS, num_steps=10)
    train(folder / "long", **OPTIONS, num_steps=20)
  return folder / "short", folder / "long"


def stop_after(monkeypatch, step, workdir, **options):
  """Trains until a signal arrives with that step."""
  with signal_with(monkeypatch, step):
    train(workdir, **options)
  assert checkpoints(workdir)[-1] == step


def same(workdir, other, steps):
  """Whether checkpoints, metrics and settings are equal, bit for bit."""
  assert checkpoints(workdir) == checkpoints(other)
  for step in steps:
    assert digests(workdir, step) == digests(other, step)
  assert metrics(workdir) == metrics(other)
  assert sorted(os.listdir(workdir / "samples")) == sorted(os.listdir(other / "samples"))


def test_a_finished_run_that_is_made_longer_was_long_from_the_start(short_and_long, tmp_path, capsys):
  short, long = short_and_long
  assert checkpoints(short) == [6, 10]  # that where the decay began, beyond the newest
  assert checkpoints(long) == [12, 20]
  workdir = tmp_path / "run"
  shutil.copytree(short, workdir)
  (workdir / "eval").mkdir()
  for name in ("5.json", "10.json", "10.1.json", "best.json"):
    (workdir / "eval" / name).write_text("{}")
  for name, step in (("samples", 10), ("samples.1", 6)):  # drawn with --mode=sample
    grids.save_png(workdir / "samples" / f"{name}.png", np.zeros((8, 8, 3), np.uint8), {"checkpoint": step})
    np.savez(workdir / "samples" / f"{name}.npz", images=np.zeros(1))
  capsys.readouterr()
  train(workdir, **OPTIONS, num_steps=20)
  out = capsys.readouterr().out
  assert "going back to step 6, " in out and str(workdir / "earlier" / "10") in out
  assert "after step 6 of 20" in out
  drawn = [(workdir / "samples" / name) for name in ("samples.1.npz", "samples.1.png")]
  for path in drawn:
    path.unlink()
  same(workdir, long, (12, 20))
  assert layout.load_config(workdir) == layout.load_config(long)

  # What the longer run makes otherwise is a workdir to draw from, or to look at.
  before, after = workdir / "earlier" / "10", workdir / "eval"
  assert sorted(os.listdir(after)) == ["5.json", "best.json"]
  assert sorted(os.listdir(before / "eval")) == ["10.1.json", "10.json"]
  assert sorted(os.listdir(before / "samples")) == ["samples.npz", "samples.png", "step_00000010.png"]
  assert metrics(before) == metrics(short)
  config = layout.load_config(before)
  assert config == layout.load_config(short)
  assert load_weights(config, before).step == 10


@pytest.mark.parametrize("step", [4, 8])
def test_a_stopped_run_that_is_made_longer_was_long_from_the_start(short_and_long, tmp_path, monkeypatch, step):
  """Before the decay it goes on as it is, in the decay it goes back."""
  workdir, options = tmp_path / "run", OPTIONS | dict(num_steps=20)
  stop_after(monkeypatch, step, workdir, **OPTIONS, num_steps=10)
  train(workdir, **options)
  same(workdir, short_and_long[1], (12, 20))
  assert (workdir / "earlier").exists() == (step == 8)


@pytest.mark.slow
def test_a_kill_while_it_goes_back(short_and_long, tmp_path, monkeypatch):
  """At each file that is moved: the same command goes on, and the end of the shorter run is in one place."""
  workdir, options = tmp_path / "run", OPTIONS | dict(num_steps=20)
  shutil.copytree(short_and_long[0], workdir)
  shutil.copytree(workdir / "checkpoints" / "10", workdir / "checkpoints" / "9")
  resealed(workdir / "checkpoints" / "9", step=9)
  for moved in (0, 1, 1):  # a grid, two checkpoints
    with monkeypatch.context() as patch:
      fail_after(patch, moved)
      with pytest.raises(RunError, match=r"cannot (be moved|move) "):
        train(workdir, **options)
  train(workdir, **options)
  same(workdir, short_and_long[1], (12, 20))
  assert os.listdir(workdir / "earlier") == ["10"]
  assert checkpoints(workdir / "earlier" / "10") == [9, 10]


def resealed(checkpoint, **changes):
  """Changes the manifest of a checkpoint."""
  from ddpm_jax.checkpoint import manifest

  path = checkpoint / "manifest" / "metadata"
  facts = json.loads(path.read_text()) | changes
  path.write_text(json.dumps(facts | {"sha256": manifest._seal(facts)}))


def fail_after(patch, number):
  """Moves that many things from one folder of the workdir to another, and no more."""
  for name in ("rename", "replace"):
    real = getattr(pathlib.Path, name)

    def move(self, target, real=real):
      nonlocal number
      if "earlier" in str(target):
        number -= 1
        if number < 0:
          raise OSError(5, "Input/output error", str(self))
      return real(self, target)

    patch.setattr(pathlib.Path, name, move)


def test_a_run_that_is_made_shorter(short_and_long, tmp_path, capsys):
  """What has so many steps is finished; otherwise nothing is trained that a run of this length would not hold."""
  workdir = tmp_path / "run"
  shutil.copytree(short_and_long[0], workdir)
  train(workdir, **OPTIONS, num_steps=9)
  assert "already holds all 9 steps: nothing to do; raise --num_steps" in capsys.readouterr().out
  shutil.rmtree(workdir / "checkpoints" / "10")  # 6 is left; of 8 steps, the decay begins at 5, of 9 at 5, of 10 at 6
  with pytest.raises(
    UserError, match=r"num_steps: with 8 steps .* from step 5 on, .* use --num_steps=10 or at least .*=10, or"
  ):
    train(workdir, **OPTIONS, num_steps=8)
  shutil.rmtree(workdir / "checkpoints" / "6")
  shutil.copytree(short_and_long[0] / "checkpoints" / "10", workdir / "checkpoints" / "10")
  with pytest.raises(
    UserError, match=r"with 20 steps .* from step 12 on, with 10 .* from step 6; .* use --num_steps=10, or a"
  ):
    train(workdir, **OPTIONS, num_steps=20)
  assert checkpoints(workdir) == [10] and not (workdir / "earlier").exists()


def rates(workdir):
  return [line["learning_rate"] for line in metrics(workdir)]


def cosine(steps, warmup):
  n = np.arange(steps)
  return 2e-3 * np.where(n < warmup, n / max(1, warmup), (1 + np.cos(np.pi * (n - warmup) / (steps - warmup))) / 2)


def test_with_cosine_the_rate_begins_anew(tmp_path, monkeypatch, capsys):
  """Finished, made longer, stopped, gone on, stopped, made longer still."""
  workdir, whole = tmp_path / "run", tmp_path / "whole"
  train(workdir, **COSINE, num_steps=6)
  shutil.copytree(workdir, whole)
  capsys.readouterr()
  train(whole, **COSINE, num_steps=14)
  assert "the cosine learning rate restarts for the 8 training steps from here to 14" in capsys.readouterr().out
  np.testing.assert_allclose(rates(whole), [*cosine(6, 2), *cosine(8, 2)], rtol=1e-5, atol=1e-9)

  stop_after(monkeypatch, 9, workdir, **COSINE, num_steps=14)
  capsys.readouterr()
  train(workdir, **COSINE, num_steps=14)
  assert "restarts" not in capsys.readouterr().out
  assert digests(workdir) == digests(whole)
  assert metrics(workdir) == metrics(whole)

  train(workdir, **COSINE, num_steps=16)  # two more: their warm-up takes half of them
  np.testing.assert_allclose(rates(workdir)[14:], [0, 2e-3], rtol=1e-5)
  facts = json.loads((workdir / "checkpoints" / "16" / "manifest" / "metadata").read_text())
  assert facts["lr_restarts"] == [6, 14]


def test_which_rates_begin_anew():
  def restarts(schedule, before, at, now):
    config = config_lib.override(Config(), {"lr_schedule": schedule, "num_steps": now})
    old = config_lib.override(config, {"num_steps": before})
    return resume.restarts(config, {"step": at, "config": json.loads(config_lib.to_json(old))})

  cases = [("linear", 6, 6, 14), ("cosine", 14, 9, 20), ("linear", 14, 9, 14), ("linear", 14, 9, 9)]
  assert [restarts(*case) for case in cases] == [[6], [9], [], []]
  assert restarts("constant", 6, 6, 14) == restarts("constant_then_decay", 6, 6, 14) == []


def go_on(workdir, **given):
  """What the command does with --workdir and these flags."""
  with StopRequest() as stop:
    train_lib.train(resolve.resolve_config("train", given, workdir), workdir, train_lib.Invocation(stop))


@pytest.mark.slow
def test_the_workdir_alone_goes_on_with_its_own_settings(short_and_long, tmp_path, monkeypatch):
  """And --num_steps alone makes it longer."""
  workdir = tmp_path / "run"
  stop_after(monkeypatch, 4, workdir, **OPTIONS, num_steps=10)
  go_on(workdir)
  assert digests(workdir) == digests(short_and_long[0])
  go_on(workdir, num_steps=20)
  assert digests(workdir) == digests(short_and_long[1])


@pytest.mark.slow
def test_a_run_that_decays_from_its_first_step_is_made_longer_from_there(tmp_path):
  """One step, or a decay over the whole length: all that both have in common is the initial state."""
  for number, (few, more, options) in enumerate(((1, 4, {}), (4, 6, {"decay_fraction": 1.0}))):
    workdir, whole = tmp_path / f"run{number}", tmp_path / f"whole{number}"
    train(workdir, **OPTIONS | options, num_steps=few)
    train(workdir, **OPTIONS | options, num_steps=more)
    train(whole, **OPTIONS | options, num_steps=more)
    same(workdir, whole, [more])
    assert checkpoints(workdir / "earlier" / str(few)) == [few]


def test_without_room_the_end_stays_where_it_is(short_and_long, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  shutil.copytree(short_and_long[0], workdir)
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    with pytest.raises(UserError, match=r"has 0\.0 MB of free space, but"):
      train(workdir, **OPTIONS, num_steps=20)
  assert checkpoints(workdir) == [6, 10] and not (workdir / "earlier").exists()

  def full(folder, config, *_):
    raise UserError("workdir: cannot write") from OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(layout, "create", full)
    with pytest.raises(RunError, match=r"No space left on device.*cannot be moved to"):
      train(workdir, **OPTIONS, num_steps=20)
  assert checkpoints(workdir) == [6, 10]


def test_a_cosine_that_is_cut_short_has_nothing_left_to_begin(tmp_path, capsys):
  """Its end is evaluated, and no rate is asked for."""
  train(tmp_path, **COSINE, num_steps=6)
  capsys.readouterr()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_lib.Evaluations, "make", lambda *_: False)
    patch.setattr(train_lib.Evaluations, "missing", lambda *_: True)
    patch.setattr(train_lib, "evaluation_missing", lambda *_: True)
    train(tmp_path, **COSINE, num_steps=4)
  assert "restarts" not in capsys.readouterr().out
