"""The order of the loop: what is written when, exact resume, stopping on request, bad news."""

import contextlib
import dataclasses
import datetime
import json
import os
import re
import shutil
import signal
import threading
import time
import types
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.data import shuffle
from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.pipeline import order
from ddpm_jax.data.sources import KnownClasses, Source
from ddpm_jax.errors import NonFiniteError, RunError, UserError
from ddpm_jax.runs import reports
from ddpm_jax.runs import train as train_lib
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.training.optimizer import decay_start
from ddpm_jax.training.setup import make_objective
from ddpm_jax.workdir import layout
from ddpm_jax.workdir.metrics import TIMES
from ddpm_jax.workdir.writers import MetricsWriter
from tests.training.tiny import CONDITIONAL, IMAGE_SHAPE, host, newest_intact, tiny_config, tiny_run

pytestmark = pytest.mark.usefixtures("shared_programs")


def noise(seed=0, replaced=(), classes=3):
  """40 images: with batches of 16, an epoch ends in the middle of the third batch. Some of them stand for bad ones."""
  images = np.random.default_rng(seed).integers(0, 256, (40, *IMAGE_SHAPE), dtype=np.uint8)
  rows = DecodedRows(images, np.isin(np.arange(40), replaced))
  fingerprint = {"probe": f"{seed:064d}"}
  labels = lambda: np.arange(40, dtype=np.int32) % classes  # noqa: E731
  return Source("noise", image_shape=IMAGE_SHAPE, length=40, read=rows.take, fingerprint=fingerprint, labels=labels)


@pytest.fixture(autouse=True)
def noise_images(monkeypatch):
  monkeypatch.setattr(train_lib, "open_source", lambda *_: noise())


def train(workdir, clock=lambda: 0.0, **changes):  # no grid because of the time
  with StopRequest() as stop:
    return train_lib.train(tiny_config(**changes), workdir, train_lib.Invocation(stop, clock=clock))


def train_little(workdir, clock=lambda: 0.0, **changes):
  """The same with a network that is built in a moment, where it does not matter which."""
  return train(workdir, clock, **(LITTLE | changes))


DECAY = dict(lr_schedule="constant_then_decay", decay_fraction=0.3)
LITTLE = dict(channels=4, channel_multipliers=(1,), attention_resolutions=(), dropout=0.0)


def metrics(workdir):
  """The lines of metrics.jsonl without the times."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def restore(workdir, step=None, **changes):
  checkpoints = Checkpoints(workdir / "checkpoints")
  run = tiny_run(tiny_config(**changes))
  if step is not None:
    checkpoints.steps = lambda: [step]
  state = newest_intact(checkpoints, run.abstract_state).state
  checkpoints.close()
  return host(state)


def newest_manifest(workdir):
  newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
  return json.loads((newest / "manifest" / "metadata").read_text())


def terminate():
  """SIGTERM to this process; returns once the thread that listens has told the run, however busy the machine is."""
  (listener,) = (thread for thread in threading.enumerate() if thread.name == "signals")
  stop = listener._target.__self__  # type: ignore
  os.kill(os.getpid(), signal.SIGTERM)
  while stop.requested is None:
    time.sleep(0.001)


@contextlib.contextmanager
def signal_with(monkeypatch, step):
  """While it lasts, a SIGTERM arrives with the batch of that step."""
  real = train_lib.batches

  def interrupt(*args, **kwargs):
    for number, batch in enumerate(real(*args, **kwargs), start=kwargs["start_step"] + 1):
      if number == step:
        terminate()
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(train_lib, "batches", interrupt)
    yield


@pytest.fixture(scope="module")
def uninterrupted(shared_programs, tmp_path_factory):
  """Eight training steps in one go, with grids."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_lib, "open_source", lambda *_: noise())
    train(workdir, sample_every=6)
  return workdir


def test_a_workdir_that_is_not_shared_is_not_begun(tmp_path, monkeypatch):
  def refuse(workdir):
    assert (workdir / "config.json").exists() and (workdir / "lock").exists()
    raise UserError("workdir: is not the same folder for all processes")

  monkeypatch.setattr(train_lib.resume, "check_shared", refuse)
  with pytest.raises(UserError, match="not the same folder"):
    train_little(tmp_path / "run")
  assert list(tmp_path.iterdir()) == []


def test_what_a_run_leaves(uninterrupted):
  assert {path.name for path in uninterrupted.iterdir()} == {
    "config.json",
    "flags.txt",
    "lock",
    "checkpoints",
    "metrics.jsonl",
    "loss.png",
    "report.html",
    "tensorboard",
    "samples",
  }
  assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir() if p.name.isdigit()) == ["4", "8"]
  assert [line["step"] for line in metrics(uninterrupted)] == list(range(1, 9))
  assert set(metrics(uninterrupted)[0]) == {
    *("step", "images", "loss", "grad_norm", "learning_rate", "ema_decay"),
    *("nonfinite", "nonfinite_in_row", "bad_records"),
  }
  assert int(restore(uninterrupted, 4).step) == 4 and int(restore(uninterrupted).step) == 8
  grids = sorted((uninterrupted / "samples").iterdir())
  assert [path.name for path in grids] == ["step_00000006.png", "step_00000008.png"]
  picture = np.asarray(Image.open(grids[0]))
  assert picture.ndim == 3 and picture.std() > 20


def test_stopped_again_and_again_is_never_stopped(uninterrupted, tmp_path):
  """Stops after 2, 3 and 5 training steps, across the end of an epoch: state and metrics are equal bit for bit."""
  for num_steps in (2, 3, 5, 8):
    train(tmp_path / "run", num_steps=num_steps)
  chex.assert_trees_all_equal(restore(tmp_path / "run"), restore(uninterrupted))
  assert metrics(tmp_path / "run") == metrics(uninterrupted)


def test_a_conditional_run_likewise(tmp_path):
  """With grids by class; its classes are counted, and lie in config.json and in the checkpoints."""
  options = LITTLE | {"conditioning": "class", "label_dropout": 0.3}
  train(tmp_path / "whole", **options, sample_every=6, preview_images=5)
  stored = {}
  for num_steps in (3, 5, 8):
    train(tmp_path / "run", **options, **stored, num_steps=num_steps)
    stored = {"num_classes": 3}
  config = layout.load_config(tmp_path / "run")
  assert (config.data.conditioning, config.model.num_classes, config.model.label_dropout) == ("class", 3, 0.3)
  assert newest_manifest(tmp_path / "run")["classes"] == ["0", "1", "2"]
  ours, theirs = (restore(tmp_path / name, **LITTLE, **CONDITIONAL) for name in ("run", "whole"))
  chex.assert_trees_all_equal(ours, theirs)
  assert ours.params["label_embedding"]["embedding"].shape == (4, 16)
  assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
  assert (tmp_path / "whole" / "samples" / "step_00000006.png").exists()


def test_the_classes_of_a_conditional_run_must_stay(tmp_path, monkeypatch, capsys):
  """Those of another run are nobody's business: it goes on, as before."""
  for name, options in (("run", CONDITIONAL), ("other", {})):
    train_little(tmp_path / name, num_steps=1, **options)
  monkeypatch.setattr(train_lib, "open_source", lambda *_: noise(classes=2))
  train_little(tmp_path / "other", num_steps=2)
  with pytest.raises(
    UserError, match=r"dataset: the classes of noise have changed since checkpoint 1 .* those of some"
  ):
    train_little(tmp_path / "run", num_steps=2, **CONDITIONAL)
  train_little(tmp_path / "run", num_steps=2, **CONDITIONAL, allow_data_change=True)
  train_little(tmp_path / "run", num_steps=3, **CONDITIONAL)  # from now on these are the classes
  (change,) = newest_manifest(tmp_path / "run")["data_changes"]
  assert change["after_update"] == 1 and len(change["before"]["labels"]) == 64
  named = noise(classes=2)
  monkeypatch.setattr(
    train_lib,
    "open_source",
    lambda *_: dataclasses.replace(named, known_classes=lambda: KnownClasses(("a", "b"))),
  )
  with pytest.raises(UserError, match=r"their names were 0, 1, 2, are a, b; restore them, or go on"):
    train_little(tmp_path / "run", num_steps=4, **CONDITIONAL)
  capsys.readouterr()
  train_little(tmp_path / "run", num_steps=4, **CONDITIONAL, allow_data_change=True)
  said = capsys.readouterr()
  assert (
    "the classes of noise have changed, and go by their numbers: 0 was 0, is a, 1 was 1, is b" in said.out + said.err
  )
  monkeypatch.setattr(train_lib, "open_source", lambda *_: noise(classes=5))
  with pytest.raises(UserError, match=r"dataset: noise has 5 classes, and the run was begun with 3; restore them, or"):
    train_little(tmp_path / "run", num_steps=5, **CONDITIONAL, allow_data_change=True)


def test_what_has_no_classes_is_no_conditional_run(tmp_path, monkeypatch):
  several = noise(classes=5)
  for source, changes, message in (
    (dataclasses.replace(several, labels=None), {}, "conditioning: class needs the class of each image, and noise has"),
    (noise(classes=5), {}, "num_classes: 3 is less than the 5 classes of noise; use --num_classes=5"),
  ):
    monkeypatch.setattr(train_lib, "open_source", lambda *_, source=source: source)
    with pytest.raises(UserError, match=message):
      train_little(tmp_path / "run", **CONDITIONAL, **changes)
  assert not (tmp_path / "run").exists()


def test_some_checkpoints_are_kept_for_good(tmp_path, monkeypatch):
  """At multiples of 3, beside the newest and that where the decay begins; a damaged newest falls back to one of them.

  A call of several steps ends at them; a run that goes on with another number keeps what is a multiple of that.
  """
  options = DECAY | dict(keep_every=3, checkpoint_every=4, keep_checkpoints=1, steps_per_dispatch=5, log_every=99)
  train_little(tmp_path / "run", num_steps=10, **options)
  kept = lambda: sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())  # noqa: E731
  assert kept() == [3, 6, 7, 9, 10]
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "10" / "manifest")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "9" / "manifest")
  train_little(tmp_path / "run", num_steps=10, **options)
  assert kept() == [3, 6, 7, 9, 10]
  whole = restore(tmp_path / "run", 6, **LITTLE)
  assert int(whole.step) == 6


def test_a_line_says_images_and_time_over_all_resumes(tmp_path):
  """Seconds of training are the steps at the speed of their line, whether the run was stopped or not."""
  began = time.time()
  for num_steps in (3, 5, 8):
    train_little(tmp_path / "run", time.monotonic, num_steps=num_steps, log_every=2)
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [(row["step"], row["images"]) for row in rows] == [(step, 16 * step) for step in (2, 3, 4, 5, 6, 8)]
  times = [row["time"] for row in rows]
  assert times == sorted(times) and began - 1 < times[0] and times[-1] < time.time() + 1
  seconds, before = 0.0, 0
  for row in rows:
    if "steps_per_second" in row:
      seconds, before = seconds + (row["step"] - before) / row["steps_per_second"], row["step"]
    assert row["seconds"] == pytest.approx(seconds, abs=0.01)
  assert 0 < seconds < time.time() - began


class Ticks:
  """A clock in whose time a training step takes so many seconds, but for the first call, which compiles."""

  def __init__(self, monkeypatch, seconds):
    self.now, real, known = 0.0, train_lib.Reports.check, []

    def check(reports, steps, metrics):
      self.now += seconds * len(steps) * (reports in known)
      known.append(reports)
      real(reports, steps, metrics)

    monkeypatch.setattr(train_lib.Reports, "check", check)

  def __call__(self):
    return self.now


@pytest.mark.parametrize(("stops", "size"), [((), 5), ((5,), 1), ((1, 2, 6), 1)])
def test_seconds_are_exact_across_stops(tmp_path, monkeypatch, stops, size):
  """A step takes 7 s. A checkpoint, which takes 100 s, and the time between two processes count for nothing.

  The first call of a process counts as the steps after it do; where there are none, nothing is known of it.
  """
  clock, real = Ticks(monkeypatch, 7.0), Checkpoints.save

  def slowly(*args, **kwargs):
    clock.now += 100.0
    return real(*args, **kwargs)

  monkeypatch.setattr(Checkpoints, "save", slowly)
  for num_steps in (*stops, 12):
    train_little(tmp_path / "run", clock, num_steps=num_steps, log_every=4, checkpoint_every=3, steps_per_dispatch=size)
    clock.now += 1000.0
  rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
  alone = [step for step in stops if step <= 2]
  seconds = {row["step"]: row["seconds"] for row in rows}
  for step in (4, 8, 12):
    assert seconds[step] == pytest.approx(7 * (step - len(alone)))


@pytest.mark.parametrize(
  ("seconds", "log_every", "told"), [(6.0, 10, [5, 10]), (50.0, 10, [2, 10]), (6.0, 2, [2, 4, 6, 8, 10])]
)
def test_the_time_left_is_told_early_however_far_the_first_metrics_are(
  tmp_path, monkeypatch, capsys, seconds, log_every, told
):
  """Off a terminal: after the first step by which 20 seconds of training are over, by the speed of the steps so far."""
  clock = Ticks(monkeypatch, seconds)
  options = dict(num_steps=10, log_every=log_every, checkpoint_every=10, steps_per_dispatch=1)
  train_little(tmp_path / "run", clock, **options)
  lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"step \d+/10 ", line)]
  assert [int(re.split("[ /]", line)[1]) for line in lines] == told
  if log_every == 10:
    left = datetime.timedelta(seconds=seconds * (10 - told[0]))
    assert lines[0] == f"step {told[0]}/10  {1 / seconds:.3g} steps/s  {left} left"


def test_a_workdir_of_release_0_1_0_counts_its_seconds(tmp_path, monkeypatch):
  monkeypatch.setattr(reports.Reports, "so_far", lambda self, step: {})  # its checkpoints have none
  train_little(tmp_path / "run", num_steps=4)
  path = tmp_path / "run" / "metrics.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  old = [{k: v for k, v in row.items() if k not in ("images", "seconds", "time")} for row in rows]
  path.write_text("".join(json.dumps(row | {"steps_per_second": 0.5}) + "\n" for row in old))
  train_little(tmp_path / "run", num_steps=6)
  assert json.loads(path.read_text().splitlines()[4])["seconds"] == 8
  assert json.loads(path.read_text().splitlines()[5])["images"] == 96


class Told:
  """Fails at everything after its first step."""

  calls: list = []  # noqa: RUF012

  def __init__(self, workdir, settings, resume_step):
    self.calls.append((workdir.name, settings["train"]["seed"], resume_step))

  def scalars(self, step, values):
    self.calls.append((step, values))
    if step > 1:
      raise ConnectionError("no network")

  def image(self, step, name, picture):
    self.calls.append((step, name))

  def close(self):
    self.calls.append("close")


def test_a_class_of_a_persons_own_is_told_and_ends_nothing(tmp_path, capsys):
  from tests.runs import test_train

  told, name = test_train.Told.calls, "tests.runs.test_train:Told"
  told.clear()
  train_little(tmp_path / "run", num_steps=3, sample_every=2, seed=5, writers=name)
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 3]
  assert told[0] == ("run", 5, 0) and told[-1] == "close"
  assert [call[0] for call in told[1:-1]] == [1, 2, 2, 3, 3] and told[3] == (2, "samples")
  assert told[1][1] == {k: v for k, v in rows[0].items() if k not in ("step", "time")}
  assert not (tmp_path / "run" / "tensorboard").exists()
  err = capsys.readouterr().err
  assert err.count("test_train:Told fails (ConnectionError: no network); the run goes on") == 1
  assert int(restore(tmp_path / "run", **LITTLE, seed=5).step) == 3
  train_little(tmp_path / "run", num_steps=4, seed=5, writers="")  # it may change
  assert len(told) == 7 and len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_what_cannot_be_run_is_said_before_anything_is_written(tmp_path):
  for changes, message in (
    ({"writers": "no_such_module:Class"}, "writers: no_such_module:Class cannot be imported"),
    ({"batch_size": 12}, "batch_size: 12 cannot be divided among 8 devices"),
    ({"channel_multipliers": (1,) * 5}, "image_size: 8 is not divisible by 16"),
  ):
    with pytest.raises(UserError, match=message):
      train_little(tmp_path / "run", **changes)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("size", "ends_at"), [(1, 3), (2, 4)])
def test_a_request_to_stop_saves_where_it_is(tmp_path, monkeypatch, capsys, size, ends_at):
  """Where the call that is being prepared ends; and the run that goes on is the one that was never stopped."""
  options = LITTLE | dict(steps_per_dispatch=size, log_every=size)
  real, count = train_lib.batches, []

  def interrupt(*args, **kwargs):
    for batch in real(*args, **kwargs):
      count.append(1)
      if len(count) == 3:
        terminate()
      yield batch

  monkeypatch.setattr(train_lib, "batches", interrupt)
  before = signal.getsignal(signal.SIGTERM)
  assert not train(tmp_path / "run", **options)
  assert f"stopped on request after step {ends_at} of 8, saved" in capsys.readouterr().out
  assert signal.getsignal(signal.SIGTERM) is before
  assert (tmp_path / "run" / "checkpoints" / str(ends_at)).exists()
  monkeypatch.setattr(train_lib, "batches", real)
  assert train(tmp_path / "run", **options)
  assert "resuming" in capsys.readouterr().out
  assert train(tmp_path / "whole", **options)
  chex.assert_trees_all_equal(restore(tmp_path / "run", **options), restore(tmp_path / "whole", **options))
  assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_updates_lost_to_a_crash_are_made_and_logged_again(uninterrupted, tmp_path, monkeypatch):
  real = train_lib.batches

  def crash(*args, **kwargs):
    for number, batch in enumerate(real(*args, **kwargs)):
      if number == 7:
        raise OSError("a cable was pulled")
      yield batch

  monkeypatch.setattr(train_lib, "batches", crash)
  with pytest.raises(OSError, match="cable"):
    train(tmp_path / "run")
  assert len(metrics(tmp_path / "run")) > 4  # logged beyond the checkpoint of step 4
  monkeypatch.setattr(train_lib, "batches", real)
  train(tmp_path / "run")
  chex.assert_trees_all_equal(restore(tmp_path / "run"), restore(uninterrupted))
  assert metrics(tmp_path / "run") == metrics(uninterrupted)


def test_a_finished_run_does_nothing(uninterrupted, capsys):
  before = {path: path.stat().st_mtime_ns for path in (uninterrupted / "checkpoints").rglob("*")}
  config = (uninterrupted / "config.json").read_text()
  assert train(uninterrupted, sample_every=6, num_samples=9)
  assert (uninterrupted / "config.json").read_text() == config
  assert "already holds all 8 steps: nothing to do" in capsys.readouterr().out
  assert before == {path: path.stat().st_mtime_ns for path in (uninterrupted / "checkpoints").rglob("*")}
  assert len(metrics(uninterrupted)) == 8


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
  with pytest.raises(NonFiniteError, match=r"step [23]: loss .*; what was saved before is intact; try a lower"):
    train_little(tmp_path / "run", learning_rate=1e38, warmup_steps=0, grad_clip=0.0)


def poisoned(updates, value=float("nan")):
  """`make_train_step` with a loss, and so gradients, that are not finite at these updates."""

  def make(run):
    real = make_objective(run)

    def step(state, batch, **options):
      def loss(*arguments):
        (terms, per_example), bad = real.loss(*arguments), jnp.isin(state.step + 1, jnp.asarray(updates))
        return {"simple": terms["simple"] * jnp.where(bad, value, 1.0)}, per_example

      spoilt = types.SimpleNamespace(loss=loss, update_extra=real.update_extra)
      return loop_make_train_step(run, spoilt)(state, batch, **options)

    return step

  return make


loop_make_train_step = train_lib.make_train_step


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("log_every", [1, 8])
def test_halt_names_the_update_and_its_images(tmp_path, monkeypatch, value, log_every):
  """NaN and infinity, at a training step that is logged and one that is not."""
  monkeypatch.setattr(train_lib, "make_train_step", poisoned([6], value))
  with pytest.raises(NonFiniteError, match="step 6: loss") as caught:
    train_little(tmp_path / "run", log_every=log_every)
  images = [int(word) for word in str(caught.value).split("its images are ")[1].split()]
  assert images == list(order(40, batch_size=16, seed=0)[5])
  assert sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == [4]


def test_skip_leaves_the_update_out_and_counts_it(tmp_path, monkeypatch, capsys):
  """The same as if the batch had not been there, but for the step: compared with the state before and after."""
  options = dict(on_nonfinite="skip", num_steps=6, checkpoint_every=1, keep_checkpoints=9, warmup_steps=10)
  monkeypatch.setattr(train_lib, "make_train_step", poisoned([3, 4]))
  train_little(tmp_path / "run", **options)
  before, after, later = (restore(tmp_path / "run", step, **LITTLE) for step in (2, 4, 5))
  for name in ("params", "ema", "opt_state"):
    chex.assert_trees_all_equal(getattr(after, name), getattr(before, name))
  assert (after.step, after.counts.nonfinite, after.counts.nonfinite_in_row) == (4, 2, 2)
  assert (later.step, later.counts.nonfinite, later.counts.nonfinite_in_row) == (5, 2, 0)
  lines = metrics(tmp_path / "run")
  assert [line["nonfinite"] for line in lines] == [0, 0, 1, 2, 2, 2]
  rates = np.array([line["learning_rate"] for line in lines])  # those that were used: what is left out does not count
  np.testing.assert_allclose(rates / rates[1], [0, 1, 2, 2, 2, 3], rtol=1e-5)
  assert [line["loss"] is None for line in lines] == [False, False, True, True, False, False]
  assert capsys.readouterr().out.count("left out, the weights stay as they were; its images are ") == 2


def test_too_many_in_a_row_end_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(train_lib, "make_train_step", poisoned([2, 5, 6, 7]))
  with pytest.raises(NonFiniteError, match="step 7: loss nan, gradient norm nan, as the 2 before it"):
    train_little(tmp_path / "run", on_nonfinite="skip", max_nonfinite=3)


def test_the_count_of_a_row_survives_a_stop(tmp_path, monkeypatch):
  monkeypatch.setattr(train_lib, "make_train_step", poisoned([3, 4, 5]))
  train_little(tmp_path / "run", on_nonfinite="skip", max_nonfinite=3, num_steps=4)
  with pytest.raises(NonFiniteError, match=r"step 5: .* as the 2 before it"):
    train_little(tmp_path / "run", on_nonfinite="skip", max_nonfinite=3)


def test_replaced_images_are_counted(tmp_path, monkeypatch):
  monkeypatch.setattr(train_lib, "open_source", lambda *_: noise(replaced=(3, 17, 30)))
  train_little(tmp_path / "run", num_steps=5)
  rows = [np.isin(order(40, batch_size=16, seed=0)[step], (3, 17, 30)).sum() for step in range(5)]
  assert [line["bad_records"] for line in metrics(tmp_path / "run")] == list(np.cumsum(rows))


# Resuming.


def test_other_images_are_refused(tmp_path, monkeypatch, capsys):
  train_little(tmp_path / "run", num_steps=2)
  monkeypatch.setattr(train_lib, "open_source", lambda *_: noise(seed=1))
  with pytest.raises(
    UserError, match=r"dataset: the images of noise have changed since checkpoint 2 .*: probe was 0000"
  ):
    train_little(tmp_path / "run", num_steps=4)
  train_little(tmp_path / "run", num_steps=4, allow_data_change=True)
  train_little(tmp_path / "run", num_steps=5)  # from now on these are the images
  checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
  run = tiny_run(tiny_config(**LITTLE))
  changes = newest_intact(checkpoints, run.abstract_state).manifest["data_changes"]
  assert changes == [{"after_update": 2, "before": {"probe": f"{0:064d}", "order": "sorted Philox words"}}]


def test_another_order_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(shuffle, "KIND", "one place at a time")
  train_little(tmp_path / "run", num_steps=2)
  monkeypatch.undo()
  monkeypatch.setattr(train_lib, "open_source", lambda *_: noise())
  with pytest.raises(UserError, match=r"dataset: checkpoint 2 in .* shuffles the images in another order; go on with"):
    train_little(tmp_path / "run", num_steps=4)


def test_a_checkpoint_of_another_configuration_is_refused(uninterrupted, tmp_path):
  """config.json may be anybody's; what a checkpoint was trained with it says itself."""
  shutil.copytree(uninterrupted, tmp_path / "run")
  text = (tmp_path / "run" / "config.json").read_text()
  (tmp_path / "run" / "config.json").write_text(text.replace('"seed": 0', '"seed": 1'))
  with pytest.raises(UserError, match=r"seed: checkpoint 8 in .* was trained with '0', config.json says '1'; restore"):
    train(tmp_path / "run", seed=1, num_steps=9)


def test_a_damaged_checkpoint_is_set_aside_and_made_again(uninterrupted, tmp_path, capsys):
  shutil.copytree(uninterrupted, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "8" / "manifest")
  train(tmp_path / "run", sample_every=6)
  out, err = capsys.readouterr()
  assert "warning: checkpoint 8 is damaged: " in err and str(tmp_path / "run" / "damaged" / "8") in err
  assert "after step 4 of 8" in out
  chex.assert_trees_all_equal(restore(tmp_path / "run"), restore(uninterrupted))
  assert metrics(tmp_path / "run") == metrics(uninterrupted)


# Storage.


def test_a_save_that_fails_is_told_and_tried_again(uninterrupted, tmp_path, monkeypatch, capsys):
  """The disk is full at step 2 and has room again at step 4: nothing is lost."""
  real = Checkpoints.save
  monkeypatch.setattr(Checkpoints, "save", full_disk(real, [2]))
  train(tmp_path / "run", checkpoint_every=2)
  assert (
    "warning: checkpoint 2 could not be written (the disk is full); the run goes on and tries again"
    in capsys.readouterr().err
  )
  assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == [4, 6, 8]
  chex.assert_trees_all_equal(restore(tmp_path / "run"), restore(uninterrupted))


def full_disk(save, steps):
  def failing(self, state, step, facts):
    if step in steps:
      raise RunError(f"checkpoint {step} could not be written (the disk is full)")
    save(self, state, step, facts)

  return failing


@pytest.mark.parametrize(("limit", "ends_at"), [(0, 4), (3, 3), (5, 5)])
def test_no_more_is_lost_than_may_be(tmp_path, monkeypatch, limit, ends_at):
  tried = []

  def failing(self, state, step, facts):
    tried.append(step)
    raise RunError(f"checkpoint {step} could not be written (the disk is full)")

  monkeypatch.setattr(Checkpoints, "save", failing)
  with pytest.raises(RunError, match=r"the disk is full\); nothing could be saved since step 0"):
    train_little(tmp_path / "run", checkpoint_every=2, max_unsaved_steps=limit)
  assert tried[-1] == ends_at


def test_the_last_save_must_succeed(tmp_path, monkeypatch):
  monkeypatch.setattr(Checkpoints, "save", full_disk(Checkpoints.save, [8]))
  with pytest.raises(
    RunError, match=r"checkpoint 8 .* the run has ended after step 8, what came after the newest is lost"
  ):
    train_little(tmp_path / "run", checkpoint_every=3)


def test_a_checkpoint_waits_for_its_metrics(uninterrupted, tmp_path, monkeypatch, capsys):
  """Resuming forgets metrics after the checkpoint, and never those before it."""
  real, fail = MetricsWriter.flush, [True, True, False, False]

  def flush(self):
    if fail.pop(0):
      raise OSError(28, "No space left on device")
    real(self)

  monkeypatch.setattr(MetricsWriter, "flush", flush)
  train(tmp_path / "run", checkpoint_every=2, max_unsaved_steps=6)
  err = capsys.readouterr().err
  assert err.startswith("warning: the noise schedule does not reach pure noise")
  assert "warning: checkpoint 4 could not be written, as its metrics cannot ([Errno 28]" in err
  assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == [6, 8]
  assert metrics(tmp_path / "run") == metrics(uninterrupted)


def test_a_workdir_that_vanishes_is_not_made_anew(tmp_path, monkeypatch):
  real = train_lib.batches

  def remove(*args, **kwargs):
    for number, batch in enumerate(real(*args, **kwargs)):
      if number == 4:
        shutil.rmtree(tmp_path / "run")
      yield batch

  monkeypatch.setattr(train_lib, "batches", remove)
  with pytest.raises(RunError, match="has vanished"):
    train_little(tmp_path / "run", checkpoint_every=6)
  assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused_before_anything_is_written(uninterrupted):
  before = (uninterrupted / "config.json").read_text()
  with pytest.raises(UserError, match=r"channels: .* was trained with '8', this command says '16'"):
    train(uninterrupted, channels=16, sample_every=6)
  assert (uninterrupted / "config.json").read_text() == before


@pytest.mark.parametrize(
  ("start", "changes", "want"),
  [
    (0, {"steps_per_dispatch": 1, "num_steps": 3}, [1, 1, 1]),
    (0, {"steps_per_dispatch": 4, "num_steps": 8, "log_every": 4}, [4, 4]),
    (0, {"steps_per_dispatch": 4, "num_steps": 10, "log_every": 8, "checkpoint_every": 8}, [4, 4, 2]),
    (
      0,
      {"steps_per_dispatch": 2, "num_steps": 6, "log_every": 6, "checkpoint_every": 6, "sample_every": 3},
      [2, 1, 2, 1],
    ),
    (
      0,
      {"steps_per_dispatch": 3, "num_steps": 6, "log_every": 6, "checkpoint_every": 6, "evaluate_every": 2},
      [2, 2, 2],
    ),
    (0, {"steps_per_dispatch": 4, "num_steps": 6, "log_every": 6, "checkpoint_every": 4, "keep_every": 3}, [3, 1, 2]),
    (5, {"steps_per_dispatch": 4, "num_steps": 12, "log_every": 4}, [3, 4]),
    (8, {"steps_per_dispatch": 4, "num_steps": 8}, []),
    (0, {"steps_per_dispatch": 4, "num_steps": 10, "log_every": 99, "checkpoint_every": 99} | DECAY, [4, 3, 3]),
    (8, {"steps_per_dispatch": 4, "num_steps": 10, "log_every": 99, "checkpoint_every": 99} | DECAY, [2]),
  ],
)
def test_calls_end_where_something_is_written(start, changes, want):
  config = tiny_config(**changes)
  extra = decay_start(config.optimizer, config.train.num_steps)
  calls = list(train_lib.dispatches(config.train, start, extra))
  assert [len(steps) for steps in calls] == want
  assert [step for steps in calls for step in steps] == list(range(start + 1, changes["num_steps"] + 1))


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "parts"), [("pmap", 1), ("fsdp", 2)])
def test_several_updates_in_a_call_are_the_same_updates(uninterrupted, tmp_path, parallel, parts):
  options = dict(steps_per_dispatch=2, log_every=2, parallel=parallel, grad_accum_steps=parts)
  train(tmp_path / "run", **options)
  each = metrics(uninterrupted)
  pairs = zip(each[::2], each[1::2], strict=True)
  logged = [second | {"loss": (first["loss"] + second["loss"]) / 2} for first, second in pairs]
  for mine, theirs in zip(metrics(tmp_path / "run"), logged, strict=True):
    assert mine == {name: pytest.approx(value, rel=2e-5) for name, value in theirs.items()}

  # Stopped and resumed it is the same to the last bit.
  train(tmp_path / "again", **options, num_steps=4)
  train(tmp_path / "again", **options)
  chex.assert_trees_all_equal(restore(tmp_path / "again", **options), restore(tmp_path / "run", **options))
  assert metrics(tmp_path / "again") == metrics(tmp_path / "run")

  # And with other calls.
  train(tmp_path / "other", **options | {"log_every": 3})
  chex.assert_trees_all_equal(restore(tmp_path / "other", **options), restore(tmp_path / "run", **options))


def traced(workdir):
  """The last step of each call that is in the trace."""
  (file,) = (workdir / "profile").glob("plugins/profile/*/*.xplane.pb")
  data = jax.profiler.ProfileData.from_file(str(file))
  calls = (event for plane in data.planes for line in plane.lines for event in line.events if event.name == "train")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its types in C++, where a warning that is an error aborts Python
    return sorted({int(dict(call.stats)["step_num"]) for call in calls})


@pytest.mark.slow
def test_a_trace_is_of_whole_calls_and_changes_no_bit(tmp_path, capsys):
  """Calls are of the steps 1 2, 3 4, 5 6, 7 8."""
  options = LITTLE | dict(steps_per_dispatch=2, log_every=4)
  train(tmp_path / "run", **options)
  train(tmp_path / "traced", **options, profile_steps="3:5")
  assert f"profile of steps 3 to 6: {tmp_path / 'traced' / 'profile'}" in capsys.readouterr().out
  assert traced(tmp_path / "traced") == [4, 6]
  chex.assert_trees_all_equal(restore(tmp_path / "traced", **options), restore(tmp_path / "run", **options))
  assert metrics(tmp_path / "traced") == metrics(tmp_path / "run")


def test_a_trace_of_a_run_that_is_resumed_or_ends_early(tmp_path, monkeypatch, capsys):
  """What cannot be written is told; steps that were made are not made again; of a run that fails there is its part."""
  folder = tmp_path / "run" / "profile"
  train_little(tmp_path / "run", num_steps=3)
  train_little(tmp_path / "run", num_steps=4, profile_steps="2:3")
  assert "profile_steps: step 3 is after 2:3, so nothing is traced" in capsys.readouterr().out
  assert not folder.exists()
  with monkeypatch.context() as patch:
    patch.setattr(train_lib, "make_train_step", poisoned([6]))
    with pytest.raises(NonFiniteError):
      train_little(tmp_path / "run", profile_steps="4:8")
  assert f"profile from step 5 on: {folder}" in capsys.readouterr().out
  assert traced(tmp_path / "run")[0] == 5
  shutil.rmtree(folder)
  folder.write_text("no folder")
  assert train_little(tmp_path / "run", num_steps=6, profile_steps="6:6")
  assert f"warning: profile_steps: cannot write the trace into {folder} (" in capsys.readouterr().err
  folder.unlink()
  assert train_little(tmp_path / "run", num_steps=8, profile_steps="7:8")  # whether JAX still holds the other or not
  with contextlib.suppress(RuntimeError):
    jax.profiler.stop_trace()


def test_an_update_inside_a_call_is_named(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(train_lib, "make_train_step", poisoned([6]))
  options = dict(steps_per_dispatch=4, log_every=4, num_steps=8)
  with pytest.raises(NonFiniteError, match=r"^step 6: loss nan"):
    train_little(tmp_path / "halt", **options)
  train_little(tmp_path / "skip", **options, on_nonfinite="skip")
  assert "step 6: loss nan" in capsys.readouterr().out
  assert metrics(tmp_path / "skip")[-1]["nonfinite"] == 1
