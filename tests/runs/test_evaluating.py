"""Evaluations while a run trains: what they leave, that they change nothing, and that none is lost or made twice."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.devices.pmap import PmapMesh
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.evaluation import evaluate as evaluate_lib
from ddpm_jax.evaluation import yardsticks
from ddpm_jax.evaluation.features import Extracted, Features
from ddpm_jax.evaluation.results import read_result, scalars
from ddpm_jax.evaluation.surroundings import Abandoned
from ddpm_jax.runs import evaluating, workdirs
from ddpm_jax.runs import train as train_lib
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.runtime.watchdog import Watchdog
from ddpm_jax.sampling import drawn
from ddpm_jax.weights.load import load_weights
from ddpm_jax.workdir import layout
from ddpm_jax.workdir.metrics import TIMES
from tests.command import digests
from tests.training.tiny import IMAGE_SHAPE, host, tiny_config, tiny_run

# A network that is built in a moment; dropout and flips, so that a state depends on every key before it.
LITTLE = dict(channels=4, channel_multipliers=(1,), attention_resolutions=(), dropout=0.3, num_timesteps=20)
LITTLE |= dict(beta_schedule="cosine")  # so that no warning is printed
EVALUATED = LITTLE | dict(
  evaluate_every=3,
  keep_checkpoints=9,
  log_every=5,
  measures=("bound", "frechet"),
  evaluate_samples=20,
  evaluate_batch_size=16,
  likelihood_splits="train",
  likelihood_examples=10,
  bound_timesteps=3,
  sampler="ddim",
  sampling_steps=2,
  sample_batch_size=8,
)
NUMBERS = {"evaluation/classifier_distance", "evaluation/bits_per_dim_train"}


def noise():
  """Dim noise, 40 images, with labels."""
  images = np.random.default_rng(0).integers(0, 100, (40, *IMAGE_SHAPE), dtype=np.uint8)
  rows = DecodedRows(images, np.zeros(40, bool))
  return Source("noise", IMAGE_SHAPE, 40, rows.take, {"probe": "0"}, lambda: np.arange(40, dtype=np.int32) % 2)


def summary_features(*_):
  """Takes the classifier's place: six sums of pixels."""
  project = np.random.default_rng(1).normal(size=(64, 6)) / 255

  def extract(images):
    features = (images.reshape(len(images), -1) @ project).astype(np.float32)
    return Extracted(features, np.full((len(images), 2), 0.5, np.float32))

  return Features("classifier", "sums", {}, extract)


def weighed(denoiser, params, *_, examples, batch_size, progress, **__):
  """Takes the bound's place: a number that depends on the weights."""
  for first in range(0, examples, batch_size):
    progress(min(first + batch_size, examples))
  return {"total": weight(params)}


def weight(params):
  return float(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(host(params))))


@pytest.fixture(autouse=True, scope="module")
def small_parts():
  """Nothing is compiled twice: all runs here have one network, one training step and one sampler."""
  made = {}

  def once(name, make):
    def made_once(*args, **options):
      if name not in made:
        made[name] = make(*args, **options)
      return made[name]

    return made_once

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_lib, "open_source", lambda *_: noise())
    patch.setattr(evaluate_lib, "_features", summary_features)
    patch.setattr(evaluate_lib.likelihood, "bound", weighed)
    patch.setattr(drawn, "make_long_draw", once("draw", drawn.make_long_draw))
    patch.setattr(
      yardsticks, "_untrained", lambda config, weights, number, beat: noise().read(np.arange(number)).images
    )
    patch.setattr(PmapMesh, "compile", once("update", PmapMesh.compile))
    yield


def train(workdir, **changes):
  with StopRequest() as stop:
    train_lib.train(tiny_config(**(EVALUATED | changes)), workdir, train_lib.Invocation(stop))


def metrics(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def result(workdir, step):
  """A result without what depends on the clock."""
  found = json.loads((workdir / "eval" / f"{step}.json").read_text())
  return {name: value for name, value in found.items() if name not in ("date", "seconds")}


def results(workdir):
  return sorted(int(path.stem) for path in (workdir / "eval").glob("*.json") if path.stem.isdecimal())


def steps(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def forget(workdir, step):
  """As if the last evaluation had not been made."""
  (workdir / "eval" / f"{step}.json").unlink()
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  lines[-1] = {name: value for name, value in lines[-1].items() if name not in NUMBERS}
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def same_as(whole, workdir):
  assert metrics(workdir) == metrics(whole)
  assert [result(workdir, step) for step in (3, 6, 8)] == [result(whole, step) for step in (3, 6, 8)]
  assert (workdir / "eval" / "best.json").read_text() == (whole / "eval" / "best.json").read_text()
  assert digests(workdir) == digests(whole)


@pytest.fixture(scope="module")
def whole(small_parts, tmp_path_factory):
  """Eight training steps in one go, measured after 3, 6 and 8."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  train(workdir)
  return workdir


def test_each_due_state_is_measured(whole):
  assert results(whole) == [3, 6, 8]
  assert steps(whole) == [3, 4, 6, 8], "what is measured is saved"
  assert not list((whole / "samples").iterdir()), "what was drawn has served"
  for step in (3, 6, 8):
    found = result(whole, step)
    assert (found["step"], found["weights"], found["samples"]["number"]) == (step, "ema", 20)
    assert set(found["measures"]) == {"classifier_distance"} and set(found["bits_per_dim"]) == {"train"}
    assert (whole / found["pictures"]["samples"]).exists()
  values = [result(whole, step)["measures"]["classifier_distance"] for step in (3, 6, 8)]
  assert len(set(values)) == 3, "each of another state"
  assert (whole / "report.html").exists()


def test_everything_that_a_run_writes_is_known_by_name(whole):
  """What is not, another program may have put there."""
  names = {path.name for path in whole.iterdir()}
  assert {"config.json", "checkpoints", "best", "eval", "lock"} <= names
  assert [name for name in names if not layout.WRITTEN.fullmatch(name)] == []


def test_the_numbers_are_in_the_line_of_their_update(whole):
  lines = metrics(whole)
  assert [line["step"] for line in lines] == [3, 5, 6, 8], "also where --log_every would write none"
  for line in lines:
    assert "loss" in line
    own = {name: value for name, value in line.items() if name.startswith("evaluation/")}
    assert own == ({} if line["step"] == 5 else scalars(result(whole, line["step"])))
    assert set(own) in (set(), NUMBERS)
  (events,) = (whole / "tensorboard").iterdir()
  for name in NUMBERS:
    assert events.read_bytes().count(name.encode()) == 3, "once for each evaluation"


def test_the_best_is_kept_and_can_be_drawn_from(whole):
  values = {step: result(whole, step)["measures"]["classifier_distance"] for step in (3, 6, 8)}
  best = min(values, key=lambda step: values[step])
  note = json.loads((whole / "eval" / "best.json").read_text())
  assert "number" in note.pop("conditions")
  assert note == {"measure": "frechet", "value": values[best], "step": best}
  assert [path.name for path in (whole / "best").iterdir()] == [str(best)]
  weights = load_weights(tiny_config(**EVALUATED, checkpoint="best"), whole)
  saved = {name: digest for name, digest in digests(whole, best).items() if name.startswith("ema_params/")}
  found = evaluating.manifest.describe(weights.params)
  assert weights.step == best
  assert {f"ema_params/{name}": leaf["sha256"] for name, leaf in found.items()} == saved
  # What was measured while it trained is what a later command measures, and what was drawn of one serves the other.
  assert evaluating.identity_of(found) == weights.identity
  assert weight(weights.params) == result(whole, best)["bits_per_dim"]["train"]["total"]


def test_measuring_changes_nothing(whole, tmp_path):
  train(tmp_path / "run", evaluate_every=0)
  assert digests(tmp_path / "run") == digests(whole)
  assert not (tmp_path / "run" / "eval").exists() and not (tmp_path / "run" / "best").exists()


@pytest.mark.parametrize(
  ("step", "phase", "drawn"),
  [(3, "drawing: images 1 to 8 of 20, network evaluation 2/2", 8), (8, "bits/dim (bound): image 10/10", 20)],
)
def test_stopped_while_it_measures(whole, tmp_path, monkeypatch, capsys, step, phase, drawn):
  """In the draw and after it: the checkpoint is there, and the same command measures without drawing again."""
  workdir = tmp_path / "run"
  if step == 8:
    forget(shutil.copytree(whole, workdir), 8)
  before = results(workdir)
  stop = StopRequest()
  real = Watchdog.beat

  def beat(self, what):
    real(self, what)
    if what == phase:
      stop.requested = signal.SIGTERM

  monkeypatch.setattr(Watchdog, "beat", beat)
  with stop:
    train_lib.train(tiny_config(**EVALUATED), workdir, train_lib.Invocation(stop))
  monkeypatch.setattr(Watchdog, "beat", real)
  assert ("stopped on request after step 3 of 8, saved" if step == 3 else "done: 8") in capsys.readouterr().out
  assert steps(workdir)[-1] == step and results(workdir) == before
  assert len(list((workdir / "samples").iterdir())) == 1, "what was drawn is kept"
  train(workdir)
  assert f"{drawn} of them were drawn before" in capsys.readouterr().out
  same_as(whole, workdir)
  assert not list((workdir / "samples").iterdir())


def test_the_last_evaluation_of_a_finished_run_is_made(whole, tmp_path, capsys):
  workdir = tmp_path / "run"
  forget(shutil.copytree(whole, workdir), 8)
  before = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
  train(workdir)
  out = capsys.readouterr().out
  assert "evaluated step 8: frechet" in out and "done: 8 training steps" in out
  same_as(whole, workdir)
  assert before == {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
  train(workdir)
  assert "nothing to do" in capsys.readouterr().out


def test_what_a_kill_leaves_half_done_is_done_again(whole, tmp_path, monkeypatch):
  """A result says that all the rest is done, so it comes last."""
  workdir = tmp_path / "run"

  def dying(*_):
    raise KeyboardInterrupt

  for name in ("keep_best", "write_result"):
    real = getattr(evaluating, name)
    monkeypatch.setattr(evaluating, name, dying)
    with pytest.raises(KeyboardInterrupt):
      train(workdir)
    monkeypatch.setattr(evaluating, name, real)
    assert steps(workdir) == [3] and results(workdir) == []
  train(workdir)
  same_as(whole, workdir)


def test_a_state_that_cannot_be_saved_is_not_measured(tmp_path, monkeypatch, capsys):
  real = Checkpoints.save

  def save(self, state, step, facts):
    if step == 3:
      raise RunError("checkpoint 3 could not be written (the disk is full)")
    real(self, state, step, facts)

  monkeypatch.setattr(Checkpoints, "save", save)
  train(tmp_path / "run", num_steps=4)
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and "warning: checkpoint 3 could not be written (the disk is full)" in err
  assert results(tmp_path / "run") == [4]
  assert [line["step"] for line in metrics(tmp_path / "run") if set(line) >= NUMBERS] == [4]


def test_a_save_that_fails_in_the_background_is_not_measured(tmp_path, monkeypatch, capsys):
  real, failed = Checkpoints.wait, []

  def wait(self):
    step = self._saving
    real(self)
    if step == 3 and not failed:
      failed.append(step)
      raise RunError("checkpoint 3 could not be written (input/output error)")

  monkeypatch.setattr(Checkpoints, "wait", wait)
  monkeypatch.setattr(Checkpoints, "finished", lambda self: False)
  train(tmp_path / "run", num_steps=4, measures=("bound",), best_measure="bound")
  assert "warning: checkpoint 3 could not be written (input/output error)" in capsys.readouterr().err
  assert results(tmp_path / "run") == [4]


def test_switched_on_when_a_run_goes_on(tmp_path):
  """The newest checkpoint is measured, also where no line of metrics describes its training step."""
  workdir, options = tmp_path / "run", dict(measures=("bound",), best_measure="bound")
  train(workdir, num_steps=3, evaluate_every=0, log_every=1)
  lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
  (workdir / "metrics.jsonl").write_text("".join(lines[:2]))
  train(workdir, num_steps=4, log_every=1, **options)
  assert [line["step"] for line in metrics(workdir)] == [1, 2, 3, 4]
  assert ["evaluation/bits_per_dim_train" in line for line in metrics(workdir)] == [False, False, True, True]
  assert (workdir / "loss.png").exists()
  assert json.loads((workdir / "eval" / "best.json").read_text())["measure"] == "bound"


def test_fewer_updates_than_were_made(whole, tmp_path, capsys):
  workdir = tmp_path / "run"
  forget(shutil.copytree(whole, workdir), 8)
  train(workdir, num_steps=5, evaluate_every=4)
  assert "done: 8 training steps" in capsys.readouterr().out and 8 in results(workdir)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(measures=("bound",)), r"best_measure: frechet is none of --measures=bound; add it"),
    (dict(measures=("frechet", "precision_recall"), evaluate_samples=3), "evaluate_samples: 3 are too few for prec"),
    (dict(features="inception", inception_weights="/nowhere.safetensors"), "inception_weights: .*nowhere"),
  ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_written(tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    train(tmp_path / "run", **changes)
  assert not (tmp_path / "run").exists()


def test_no_labels_are_found_out_before_anything_is_written(tmp_path, monkeypatch):
  bare = Source("bare", IMAGE_SHAPE, 40, noise().read, {})
  monkeypatch.setattr(train_lib, "open_source", lambda *_: bare)
  with pytest.raises(UserError, match="features: 'classifier' needs labels, and bare has none"):
    train(tmp_path / "run", features="classifier")
  assert not (tmp_path / "run").exists()
  train(tmp_path / "run", num_steps=1, evaluate_every=0)


def test_room_for_checkpoints_counts_those_of_evaluations(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(workdirs.layout, "check_space", lambda *args, **_: asked.append(args))
  run = tiny_run(tiny_config(**EVALUATED))
  workdirs.check_space(run, tmp_path, 0)
  workdirs.check_space(run._replace(config=config_lib.override(run.config, {"evaluate_every": 0})), tmp_path, 0)
  assert asked[0][3] >= 4 and asked[1][3] == 3


def test_a_result_that_cannot_be_read_counts_as_none(tmp_path):
  config = tiny_config(**EVALUATED)
  (tmp_path / "eval").mkdir()
  assert evaluating.evaluation_missing(config, tmp_path, 6)
  (tmp_path / "eval" / "6.json").write_text('{"step": 6')
  assert evaluating.evaluation_missing(config, tmp_path, 6) and read_result(tmp_path / "eval" / "6.json") is None
  (tmp_path / "eval" / "6.json").write_text('{"step": 6}')
  assert not evaluating.evaluation_missing(config, tmp_path, 6)
  assert [evaluating.evaluation_due(config.train, step) for step in (0, 1, 3, 7, 8)] == [
    False,
    False,
    True,
    False,
    True,
  ]


def test_flags_of_the_command_reach_the_evaluation(tmp_path, monkeypatch):
  """A sampler or a number that the command itself names is not chosen by the speed of the machine."""
  heard = []

  def evaluate(config, weights, source, around):
    heard.append(around.given)
    raise Abandoned

  monkeypatch.setattr(evaluate_lib, "evaluate", evaluate)
  given = frozenset({"sampler", "likelihood_examples"})
  with StopRequest() as stop:
    assert not train_lib.train(
      tiny_config(**EVALUATED | {"num_steps": 3}), tmp_path / "run", train_lib.Invocation(stop, given=given)
    )
  assert heard == [given]
