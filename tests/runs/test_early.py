"""Pictures early and often: when, that nothing of the training depends on it, and what is renewed with each."""

import itertools
import json
import statistics
from concurrent.futures import Future

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import SampleConfig
from ddpm_jax.report import report
from ddpm_jax.runs import preview, reports
from ddpm_jax.runs import train as train_lib
from ddpm_jax.runs.preview import EarlyGrids, Preview
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.sampling.draw import table_of
from ddpm_jax.workdir import grids
from tests.command import digests
from tests.runs.test_train import LITTLE, metrics, noise, poisoned, signal_with
from tests.training.tiny import tiny_config, tiny_run

OPTIONS = LITTLE | dict(num_steps=12, checkpoint_every=12, log_every=4, steps_per_dispatch=2)


@pytest.fixture(autouse=True)
def noise_images(monkeypatch):
  monkeypatch.setattr(train_lib, "open_source", lambda *_: noise())


class Clock:
  """A clock that the test moves."""

  now = 0.0

  def __call__(self):
    return self.now


# When.


def moments(seconds_of_a_step, until, regular=(), before=0, wanted=True):
  """The seconds at which grids are drawn, asked after every step."""
  clock, drawn = Clock(), []
  clock.now = before
  early = EarlyGrids(clock, wanted=wanted)
  assert not early.due()
  for seconds in range(seconds_of_a_step, until + 1, seconds_of_a_step):
    clock.now = before + seconds
    if early.due() or seconds in regular:
      drawn.append(seconds)
      early.drawn()
  return drawn


def test_after_one_two_four_eight_minutes():
  assert moments(1, 60 * 130) == [60 * 2**n for n in range(8)]


def test_the_first_is_there_within_two_minutes_however_long_a_step_takes():
  for step in (7, 25, 59, 61, 100):
    first, *others = moments(step, 100_000)
    assert first < 60 + step
    assert all(2 * before <= after < 2 * before + step for before, after in itertools.pairwise([first, *others]))


def test_no_other_where_the_regular_ones_come_often():
  assert moments(5, 1000, regular=range(50, 1001, 50)) == [*range(50, 1001, 50)]
  assert moments(5, 1000, regular=[200]) == [60, 120, 200, 400, 800]


def test_after_a_stop_they_go_on_where_they_were():
  assert moments(1, 1000, before=100) == [100, 300, 700]  # of 200, 400 and 800 seconds of training
  assert moments(1, 1000, before=20)[:2] == [40, 100]
  assert moments(1, 1000, before=10_000) == []


def test_none_where_none_is_wanted():
  assert moments(10, 100_000, wanted=False) == []


def test_what_compiles_is_waited_for_while_two_minutes_are_not_over():
  clock = Clock()
  early = EarlyGrids(clock, wanted=True)
  due = []
  for clock.now in range(0, 130, 10):
    due.append((early.due(), early.due(compiling=True)))
  assert [now for now, _ in due].index(True) == 6 and [later for _, later in due].index(True) == 10


def test_processes_are_asked_once_for_a_grid():
  clock = Clock()
  early = EarlyGrids(clock, wanted=True)
  asked = []
  for clock.now in range(0, 200, 10):
    asked.append(early.ask())
    if clock.now in (90, 180):
      early.drawn()
  assert [10 * i for i, ask in enumerate(asked) if ask] == [60, 180]


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
def test_a_vote_of_one_process_is_heard_by_all(mode):
  mesh = tiny_run(tiny_config(parallel=mode)).mesh
  state = {"x": np.zeros(8, np.float32)}
  step = mesh.compile(lambda state, batch, axis_name: (state, {}), state)
  rows = mesh.put_batches([{"rows": np.zeros((8, 2), np.float32)}])
  for votes in itertools.product((False, True), (False, True)):
    order = mesh.put_step_command(stop=votes[0], grid=votes[1])
    _, _, heard = step(jax.device_put(state, mesh.state_shardings(state)), rows, order)
    assert tuple(map(bool, np.asarray(heard))) == votes


def test_a_grid_has_the_timesteps_that_the_command_draws_with(monkeypatch):
  run, tables = tiny_run(tiny_config(**OPTIONS)), []
  monkeypatch.setattr(preview, "make_draw", lambda predictor, table, **options: tables.append(table))
  Preview(run, None)
  drawn_alike = SampleConfig(sampler="dpmpp", sampling_steps=run.config.train.preview_steps)
  chex.assert_trees_all_equal(*tables, table_of(drawn_alike, run.schedule, run.config.diffusion.variance))


# In a run.


def train(workdir, clock=lambda: 0.0, **changes):
  with StopRequest() as stop:
    train_lib.train(tiny_config(**(OPTIONS | changes)), workdir, train_lib.Invocation(stop, clock=clock))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """A run without grids."""
  workdir = tmp_path_factory.mktemp("plain") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_lib, "open_source", lambda *_: noise())
    train(workdir)
  return workdir


def test_grids_of_a_run_come_with_the_clock_and_change_nothing(plain, tmp_path, monkeypatch, capsys):
  """A step takes half a minute. Calls, numbers and lines are those of the run without grids."""
  clock, real, seen = Clock(), train_lib.batches, []

  def slow(*args, **kwargs):
    for batch in real(*args, **kwargs):
      clock.now += 30.0
      yield batch

  def page(workdir, own=reports.write_pages):
    own(workdir)
    seen.append(sorted(path.name for path in workdir.iterdir() if path.suffix in (".png", ".html")))

  monkeypatch.setattr(train_lib, "batches", slow)
  monkeypatch.setattr(reports, "write_pages", page)
  monkeypatch.setattr(Preview, "compiling", False)
  workdir = tmp_path / "run"
  train(workdir, clock, sample_every=1000)
  drawn = [int(path.stem.removeprefix("step_")) for path in sorted((workdir / "samples").iterdir())]
  # Each call of two steps takes 60 seconds, the first one counts as much from step 4 on; the last grid is of the end.
  assert drawn == [4, 8, 12]
  assert digests(workdir) == digests(plain) and metrics(workdir) == metrics(plain)
  for step in drawn:
    assert grids.facts_of(workdir / f"samples/step_{step:08d}.png") == {
      "checkpoint": step,
      "sample_weights": "ema, raw",
      "sampler": "dpmpp",
      "sampling_steps": 2,
      "sample_seed": 0,
    }
  assert seen and all(names == ["loss.png", "report.html"] for names in seen), "renewed with a grid, from the start"
  out = capsys.readouterr().out
  assert f"sample grid of step 4: {workdir / 'samples' / 'step_00000004.png'}" in out
  assert (plain / "report.html").exists() and not list(plain.glob("samples/*"))


def test_no_grid_where_sample_every_is_zero(tmp_path, monkeypatch):
  clock, real = Clock(), train_lib.batches

  def slow(*args, **kwargs):
    for batch in real(*args, **kwargs):
      clock.now += 3000.0
      yield batch

  monkeypatch.setattr(train_lib, "batches", slow)
  train(tmp_path / "run", clock, sample_every=0)
  assert not list((tmp_path / "run").glob("samples/*"))


class AtOnce:
  """A thread that is never late."""

  def __init__(self, *_, **__):
    pass

  def submit(self, function, *arguments):
    future = Future()
    try:
      future.set_result(function(*arguments))
    except OSError as error:
      future.set_exception(error)
    return future

  def shutdown(self):
    pass


def test_pages_that_cannot_be_written_are_told_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
  """Beside the training, and at the end."""
  workdir = tmp_path / "run"

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(reports, "ThreadPoolExecutor", AtOnce)
  with monkeypatch.context() as patch:
    patch.setattr(report, "write_report", full)
    train(workdir, sample_every=4, log_every=2)
  out, err = capsys.readouterr()
  assert "done: 12 training steps" in out
  assert "cannot write ([Errno 28] No space left on device); loss.png and report.html are not renewed at step" in err
  assert f"cannot write loss.png and report.html into {workdir} (No space left on device)" in err
  train(workdir, num_steps=13)
  with Image.open(workdir / "loss.png") as picture:
    assert picture.format == "PNG"


# The loss that is logged.


@pytest.fixture(scope="module")
def every(tmp_path_factory):
  """The loss of each training step."""
  workdir = tmp_path_factory.mktemp("every") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_lib, "open_source", lambda *_: noise())
    train(workdir, log_every=1)
  return [line["loss"] for line in metrics(workdir)]


def stop_after(monkeypatch, step, workdir, **options):
  with signal_with(monkeypatch, step):
    train(workdir, **options)


def test_the_logged_loss_is_the_mean_since_the_line_before(plain, every, tmp_path, monkeypatch):
  """The other numbers are those of the training step. Stopped between two lines, the line is the same, bit for bit."""
  lines = metrics(plain)
  assert [line["step"] for line in lines] == [4, 8, 12]
  assert [line["loss"] for line in lines] == [statistics.fmean(every[first : first + 4]) for first in (0, 4, 8)]
  for step in (6, 10):
    stop_after(monkeypatch, step, tmp_path / "run")
    newest = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    manifest = json.loads((tmp_path / "run" / "checkpoints" / str(newest) / "manifest" / "metadata").read_text())
    assert manifest["so_far"]["losses"] == every[newest // 4 * 4 : newest]
  train(tmp_path / "run")
  assert metrics(tmp_path / "run") == lines and digests(tmp_path / "run") == digests(plain)


def test_a_loss_that_is_not_finite_is_no_part_of_the_mean(tmp_path, monkeypatch):
  options = dict(on_nonfinite="skip", log_every=3, steps_per_dispatch=3, num_steps=9, checkpoint_every=9)
  monkeypatch.setattr(train_lib, "make_train_step", poisoned([2, 4, 5, 6], float("inf")))
  train(tmp_path / "run", **options)
  losses = [line["loss"] for line in metrics(tmp_path / "run")]
  assert losses[1] is None, "all three were not finite"
  train(tmp_path / "each", **options | dict(log_every=1))
  each = [line["loss"] for line in metrics(tmp_path / "each")]
  assert losses[0] == statistics.fmean([each[0], each[2]]) and losses[2] == statistics.fmean(each[6:])
