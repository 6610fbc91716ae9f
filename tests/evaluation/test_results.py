"""What evaluations leave in a workdir: nothing that was measured is lost, and the best checkpoint is whole."""

import json
import math

import chex
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import config as config_lib
from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.config import Config
from ddpm_jax.errors import RunError
from ddpm_jax.evaluation import results
from ddpm_jax.evaluation.results import keep_best, measure_of, read_result, scalars, write_result
from ddpm_jax.weights.load import load_weights
from ddpm_jax.workdir import grids, layout
from tests.training.tiny import host, tiny_config, tiny_run

PICTURE = np.full((20, 30, 3), 7, np.uint8)


def of_samples(step=8, weights="ema", **measures):
  return {
    "step": step,
    "weights": weights,
    "date": "2026-01-01T00:00:00+00:00",
    "samples": {"number": 10},
    "reference": {"split": "train"},
    "features": {"name": "classifier"},
    "measures": measures or {"classifier_distance": 3.25, "classifier_kid": 0.5},
  }


def of_model(step=8, weights="ema", key="bits_per_dim", **splits):
  return {
    "step": step,
    "weights": weights,
    "date": "2026-01-02T00:00:00+00:00",
    key: {split: {"total": total} for split, total in splits.items()},
  }


def read(path):
  return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture
def workdir(tmp_path):
  layout.create(tmp_path / "run", Config())
  return tmp_path / "run"


def test_what_is_written(workdir):
  found = of_samples() | {"neighbours": {"pixels": {"near_duplicates": 0.125}}}
  path = write_result(workdir, found, {"samples": PICTURE, "neighbours": PICTURE})
  assert path == workdir / "eval" / "8.json"
  pictures = {"samples": "eval/8.samples.png", "neighbours": "eval/8.neighbours.png"}
  assert read(path) == read_result(path) == found | {"pictures": pictures}
  assert sorted(child.name for child in (workdir / "eval").iterdir()) == ["8.json", "8.neighbours.png", "8.samples.png"]
  assert grids.facts_of(workdir / pictures["samples"]) == {"checkpoint": 8, "sample_weights": "ema", "number": 10}
  with Image.open(workdir / pictures["samples"]) as picture:
    np.testing.assert_array_equal(np.asarray(picture), PICTURE)


def test_other_measures_are_added(workdir):
  write_result(workdir, of_samples(), {"samples": PICTURE})
  write_result(workdir, of_model(train=3.5), {})
  path = write_result(workdir, of_model(key="ode_bits_per_dim", train=3.25), {})
  assert read(path) == of_samples() | of_model(train=3.5) | of_model(key="ode_bits_per_dim", train=3.25) | {
    "pictures": {"samples": "eval/8.samples.png"}
  }
  first, second = (read(workdir / "eval" / f"8.{number}.json") for number in (1, 2))
  assert "bits_per_dim" not in first and "ode_bits_per_dim" not in second and "bits_per_dim" in second


def test_splits_are_added_and_renewed(workdir):
  write_result(workdir, of_model(train=3.0, test=4.0), {})
  path = write_result(workdir, of_model(test=4.5, more=5.0), {})
  assert read(path)["bits_per_dim"] == {"train": {"total": 3.0}, "test": {"total": 4.5}, "more": {"total": 5.0}}


def test_what_is_of_samples_is_replaced_together(workdir):
  """Numbers of two draws do not stand side by side, nor does a picture of another draw."""
  earlier = of_samples() | {"neighbours": {"pixels": {}}} | of_model(train=3.0)
  write_result(workdir, earlier, {"samples": PICTURE, "neighbours": PICTURE})
  found = of_samples(classifier_score=2.0)
  path = write_result(workdir, found, {"samples": PICTURE})
  assert read(path) == found | {
    "bits_per_dim": {"train": {"total": 3.0}},
    "pictures": {"samples": "eval/8.samples.png"},
  }
  kept = read(workdir / "eval" / "8.1.json")
  assert kept == earlier | {"pictures": kept["pictures"]}


@pytest.mark.parametrize("other", [dict(weights="raw"), dict(step=9)])
def test_other_weights_stay_apart(workdir, other):
  write_result(workdir, of_samples(), {})
  path = write_result(workdir, of_model(train=3.0, **other), {})
  assert "measures" not in read(path)
  name = "8.1.json" if "weights" in other else "8.json"
  assert read(workdir / "eval" / name)["measures"] == of_samples()["measures"]


def test_an_earlier_file_that_cannot_be_read_is_kept_aside(workdir):
  (workdir / "eval").mkdir()
  (workdir / "eval" / "8.json").write_text('{"step": 8')
  path = write_result(workdir, of_model(train=3.0), {})
  assert read(path)["bits_per_dim"] == {"train": {"total": 3.0}}
  assert (workdir / "eval" / "8.1.json").read_text() == '{"step": 8'


def test_a_kill_in_the_middle_loses_no_measure(workdir, monkeypatch):
  write_result(workdir, of_samples(), {})
  real = results.write_whole

  def killed(path, data):
    if path.name == "8.json":
      raise KeyboardInterrupt
    real(path, data)

  monkeypatch.setattr(results, "write_whole", killed)
  with pytest.raises(KeyboardInterrupt):
    write_result(workdir, of_model(train=3.0), {})
  monkeypatch.setattr(results, "write_whole", real)
  assert read(write_result(workdir, of_model(train=3.0), {}))["measures"] == of_samples()["measures"]


def test_no_json_without_a_name(workdir):
  path = write_result(workdir, of_model(train=math.nan, test=math.inf), {})
  assert read(path)["bits_per_dim"] == {"train": {"total": None}, "test": {"total": None}}


def test_a_full_disk_is_one_line(workdir, monkeypatch):
  def full(path, data):
    raise OSError(28, "No space left on device", str(path))

  monkeypatch.setattr(results, "write_whole", full)
  with pytest.raises(RunError, match=r"workdir: cannot write .*8\.json \(No space left on device\); make room"):
    write_result(workdir, of_model(train=3.0), {})


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null"])
def test_what_is_no_result(tmp_path, text):
  (tmp_path / "8.json").write_text(text)
  assert read_result(tmp_path / "8.json") is None
  assert read_result(tmp_path / "9.json") is None


def test_scalars_have_flat_names():
  found = of_samples() | of_model(train=3.0, test=3.5) | of_model(key="ode_bits_per_dim", train=2.5)
  found["neighbours"] = {space: {"near_duplicates": x} for space, x in (("pixels", 0.25), ("features", 0.5))}
  assert scalars(found) == {
    "evaluation/classifier_distance": 3.25,
    "evaluation/classifier_kid": 0.5,
    "evaluation/near_duplicates_pixels": 0.25,
    "evaluation/near_duplicates_features": 0.5,
    "evaluation/bits_per_dim_train": 3.0,
    "evaluation/bits_per_dim_test": 3.5,
    "evaluation/ode_bits_per_dim_train": 2.5,
  }
  assert scalars({"step": 3}) == {}


def test_the_measure_that_is_named():
  found = of_samples() | of_model(train=3.0, test=3.5) | of_model(key="ode_bits_per_dim", train=2.5)
  assert [measure_of(found, name) for name in ("frechet", "kid", "bound", "ode")] == [3.25, 0.5, 3.5, 2.5]
  inception = found | {"features": {"name": "inception"}, "measures": {"fid": 12.0, "kid": 0.25}}
  assert [measure_of(inception, name) for name in ("frechet", "kid")] == [12.0, 0.25]


# The best checkpoint.


@pytest.fixture
def saved(workdir):
  for step in (2, 4, 6):
    (workdir / "checkpoints" / str(step) / "state").mkdir(parents=True)
    (workdir / "checkpoints" / str(step) / "state" / "data").write_text(f"state {step}")
  return workdir


def best(workdir):
  """The number of the checkpoint that is kept, and of which the note is."""
  (path,) = (workdir / "best").iterdir()
  assert (path / "state" / "data").read_text() == f"state {path.name}"
  note = read(workdir / "eval" / "best.json")
  assert note["step"] == int(path.name)
  assert note.pop("conditions")
  return note


def test_the_best_is_the_lowest(saved):
  assert keep_best(saved, of_model(2, train=3.0), "bound")
  assert best(saved) == {"measure": "bound", "value": 3.0, "step": 2}
  assert not keep_best(saved, of_model(4, train=3.5), "bound")
  assert not keep_best(saved, of_model(4, train=3.0), "bound"), "as good: the earlier one stays"
  assert best(saved)["step"] == 2
  assert keep_best(saved, of_model(6, train=2.5), "bound")
  assert best(saved) == {"measure": "bound", "value": 2.5, "step": 6}
  assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_a_checkpoint_of_the_same_number_is_another_one(saved):
  """Of a run that was made longer since, and came by that number again."""
  keep_best(saved, of_model(4, train=3.0), "bound")
  data = saved / "best" / "4" / "state" / "data"
  data.write_text("of the run that was shorter")
  assert not keep_best(saved, of_model(4, train=3.5), "bound")
  assert data.read_text() == "of the run that was shorter"
  assert keep_best(saved, of_model(4, train=2.0), "bound")
  assert best(saved) == {"measure": "bound", "value": 2.0, "step": 4}


def test_by_another_measure_it_begins_anew(saved):
  keep_best(saved, of_model(2, train=3.0), "bound")
  assert keep_best(saved, of_samples(4, classifier_distance=90.0), "frechet")
  assert best(saved) == {"measure": "frechet", "value": 90.0, "step": 4}


def test_measured_in_another_way_it_begins_anew(saved):
  """From more samples every distance is lower: no later one of few would ever be the best."""
  many = of_samples(2, classifier_distance=8.0)
  many["samples"] = {"number": 256}
  assert keep_best(saved, many, "frechet")
  assert keep_best(saved, of_samples(4, classifier_distance=13.0), "frechet")
  assert not keep_best(saved, of_samples(6, classifier_distance=14.0), "frechet")
  note = saved / "eval" / "best.json"  # as release 0.1.0 wrote it
  note.write_text(json.dumps({"measure": "frechet", "value": 8.0, "step": 4}))
  assert not keep_best(saved, of_samples(6, classifier_distance=9.0), "frechet")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_is_never_the_best(saved, value):
  assert not keep_best(saved, of_model(2, train=value), "bound")
  assert keep_best(saved, of_model(4, train=3.0), "bound")
  assert not keep_best(saved, of_model(6, train=value), "bound")
  assert best(saved)["step"] == 4


def test_a_copy_that_a_kill_cut_short(saved, monkeypatch):
  keep_best(saved, of_model(2, train=3.0), "bound")
  (saved / "best" / ".4.new").mkdir()
  (saved / "best" / ".4.new" / "half").write_text("sta")
  assert keep_best(saved, of_model(4, train=2.0), "bound")
  assert best(saved)["step"] == 4


@pytest.mark.parametrize("at", ["replace", "write_whole", "rmtree"])
def test_killed_at_any_point_it_can_be_done_again(saved, monkeypatch, at):
  keep_best(saved, of_model(2, train=3.0), "bound")

  def killed(*_):
    raise KeyboardInterrupt

  owner = {"replace": results.os, "write_whole": results, "rmtree": results.shutil}[at]
  real = getattr(owner, at)
  monkeypatch.setattr(owner, at, killed)
  with pytest.raises(KeyboardInterrupt):
    keep_best(saved, of_model(4, train=2.0), "bound")
  monkeypatch.setattr(owner, at, real)
  assert (saved / "best" / "2" / "state" / "data").exists()
  keep_best(saved, of_model(4, train=2.0), "bound")
  assert read(saved / "eval" / "best.json")["step"] == 4
  assert (saved / "best" / "4" / "state" / "data").read_text() == "state 4"


def test_one_that_somebody_deleted_is_no_measure(saved):
  keep_best(saved, of_model(2, train=3.0), "bound")
  results.shutil.rmtree(saved / "best")
  assert keep_best(saved, of_model(4, train=3.5), "bound")
  assert best(saved)["step"] == 4


def test_one_that_cannot_be_copied(saved, monkeypatch):
  keep_best(saved, of_model(2, train=3.0), "bound")

  def full(source, target):
    target.mkdir()
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(results.shutil, "copytree", full)
  with pytest.raises(RunError, match=r"cannot copy checkpoint 4 to .*best \(No space left on device\); make room"):
    keep_best(saved, of_model(4, train=2.0), "bound")
  assert best(saved)["step"] == 2, "the copy takes no space, and the earlier one is whole"


def test_the_copy_is_the_checkpoint(tmp_path):
  """Restored by --checkpoint=best, every bit of it, after the original is gone."""
  config = tiny_config(channels=4, channel_multipliers=(1,), attention_resolutions=())
  run = tiny_run(config)
  layout.create(tmp_path / "run", config)
  checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1)
  state = run.initial_state()
  facts = {"image_shape": [8, 8, 1], "config": json.loads(config_lib.to_json(config)), "data": {}, "data_changes": []}
  checkpoints.save(state, 3, facts)
  checkpoints.wait()
  assert keep_best(tmp_path / "run", of_model(3, train=1.0), "bound")
  checkpoints.save(state, 4, facts)
  checkpoints.close()
  assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["4"]
  weights = load_weights(config_lib.override(config, {"checkpoint": "best"}), tmp_path / "run")
  assert weights.step == 3
  chex.assert_trees_all_equal(host(weights.params), host(state.ema["ema"]))
