"""An evaluation from beginning to end: what it holds, that devices and batches do not matter, what it refuses."""

import dataclasses
import hashlib
import json
import tempfile
import types

import jax
import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.config import DataConfig, EvaluateConfig
from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.devices import make_mesh
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import estimate, statistics, yardsticks
from ddpm_jax.evaluation import evaluate as evaluate_lib
from ddpm_jax.evaluation.evaluate import evaluate, measurable
from ddpm_jax.evaluation.features import Extracted, Features
from ddpm_jax.evaluation.surroundings import Abandoned, Surroundings
from ddpm_jax.runs import evaluate as evaluation_run
from ddpm_jax.sampling import drawn
from ddpm_jax.weights.load import Weights
from ddpm_jax.workdir import layout
from tests.training.tiny import IMAGE_SHAPE, tiny_config, tiny_run

LITTLE = dict(channels=4, channel_multipliers=(1,), attention_resolutions=(), dropout=0.3, num_timesteps=20)
OPTIONS = LITTLE | dict(
  measures=("frechet", "kid", "score", "precision_recall", "density_coverage", "neighbours", "bound", "ode"),
  evaluate_samples=21,
  evaluate_batch_size=9,
  likelihood_splits="train,test",
  likelihood_examples=11,
  bound_timesteps=3,
  ode_steps=2,
  sampler="ddim",
  sampling_steps=2,
  sample_batch_size=10,
)
PROJECT = np.random.default_rng(1).normal(size=(64, 4)) / 255


def pictures(split="train", number=37):
  images = np.random.default_rng(len(split)).integers(0, 256, (number, *IMAGE_SHAPE), dtype=np.uint8)
  read = DecodedRows(images, np.zeros(number, bool)).take
  return Source("pictures", IMAGE_SHAPE, number, read, {"split": split}, lambda: np.arange(number, dtype=np.int32) % 2)


def summary_features(*_):
  """Takes the classifier's place."""

  def extract(images):
    features = (images.reshape(len(images), -1) @ PROJECT).astype(np.float32)
    odds = np.exp(features)
    return Extracted(features, odds / odds.sum(1, keepdims=True))

  return Features("classifier", "sums", {"classes": 4}, extract)


def open_split(data: DataConfig):
  if data.split not in ("train", "test"):
    raise UserError(f"split: {data.split!r} is none of pictures' splits")
  return pictures(data.split, number=23 if data.split == "test" else 37)


@pytest.fixture(autouse=True, scope="module")
def small_parts():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate_lib, "_features", summary_features)
    patch.setattr(evaluate_lib, "open_source", open_split)
    patch.setattr(evaluate_lib, "has_split", lambda data, split: split == "test")
    patch.setattr(
      yardsticks, "_untrained", lambda config, weights, number, beat: pictures(number=number).read(slice(number)).images
    )
    yield


def one_device():
  return make_mesh("pmap", jax.devices()[:1])


def config_of(**changes):
  return tiny_config(**(OPTIONS | changes))


def weights_of(config, mesh=None):
  run = tiny_run(config)
  params = run.initial_state().params
  # A fresh network answers 0; this one says something.
  params = jax.tree.map(lambda leaf: leaf + 0.02, params)
  if mesh is not None:
    run, params = run._replace(mesh=mesh), jax.device_put(params, mesh.replicated)
  return Weights(run, params, 5, "ema", "some identity")


def check(config, workdir, train):
  return evaluate_lib.check(config, workdir, train, Weights(tiny_run(config), {}, 5, "ema", "some identity"))


DRAWN_20 = "drawing: images 11 to 20 of 21, network evaluation 2/2"


def around(workdir, beat=lambda what: None):
  return Surroundings(workdir, beat, quiet=True)


@pytest.fixture(scope="module")
def whole(small_parts, tmp_path_factory):
  """(result, pictures, what was heard) of everything that can be measured."""
  workdir, heard = tmp_path_factory.mktemp("whole"), []
  config = config_of()
  return *evaluate(config, weights_of(config), pictures(), around(workdir, heard.append)), heard, workdir


def test_all_of_it(whole):
  result, shown, _, workdir = whole
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  assert (result["step"], result["weights"]) == (5, "ema")
  assert result["reference"] == {
    "dataset": "pictures",
    "split": "train",
    "number": 37,
    "fingerprint": {"split": "train"},
  }
  assert result["features"] == {"classes": 4, "name": "classifier", "identity": "sums", "width": 4}
  drawn_as = result["samples"]
  assert (drawn_as["number"], drawn_as["evaluations"], drawn_as["sampler"], drawn_as["checkpoint"]) == (
    21,
    2,
    "ddim",
    5,
  )
  assert {"classifier_distance", "classifier_kid", "classifier_score", "precision", "coverage"} <= set(
    result["measures"]
  )
  assert result["neighbours"]["pixels"]["training_images"] == 37
  assert result["neighbours"]["pixels"]["orientations"] == 2, "as the run flips"
  for kind, number in (("data", 18), ("noise", 21), ("untrained", 21)):  # of 37 images, and of 21 samples
    beside = result["yardsticks"][kind]
    assert beside["number"] == number and {"classifier_distance", "precision", "coverage"} <= set(beside["values"])
  assert "near_duplicates_pixels" in result["yardsticks"]["data"]["values"]
  for key in ("bits_per_dim", "ode_bits_per_dim"):
    assert list(result[key]) == ["train", "test"]
    for facts in result[key].values():
      beside = facts["yardsticks"]
      assert beside["noise"] == 8 and np.isfinite(beside["untrained"]) and beside["untrained"] != facts["total"]
    assert all(facts["examples"] == 11 and np.isfinite(facts["total"]) for facts in result[key].values())
    assert result[key]["train"]["total"] != result[key]["test"]["total"]
    how = [(facts["dtype"], facts["matmul_precision"]) for facts in result[key].values()]
    assert how == [("float32", "highest")] * 2
  (warning,) = result["warnings"]
  assert warning.startswith("the noise schedule does not reach pure noise")  # 20 timesteps with the default betas
  assert result["seconds"] >= 0 and result["date"].endswith("+00:00") and result["machine"].startswith("8 x ")
  assert set(shown) == {"samples", "neighbours"}
  assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in shown.values())
  assert not list((workdir / "samples").iterdir()), "what was drawn has served"


def test_it_beats_in_every_part(whole):
  """A part that says nothing for long would count as stuck, and could not be stopped."""
  _, _, heard, _ = whole
  for what in ("features of the data: image 37/37", "features of the samples: image 21/21"):
    assert heard.count(what) == 1
  assert heard.count("nearest images: training image 37/37") == 1
  batches = ("1 to 10", "11 to 20", "21 to 21")
  assert {f"drawing: images {batch} of 21, network evaluation 2/2" for batch in batches} <= set(heard)
  assert [heard.count(f"bits/dim ({name}): image 11/11") for name in ("bound", "ode")] == [2, 2], "of two splits"


@pytest.mark.parametrize("changes", [dict(evaluate_batch_size=37), "one device"])
def test_neither_batches_nor_devices_matter(whole, tmp_path, changes):
  """Of sets that neither the batches nor the devices divide."""
  config = config_of(**(changes if isinstance(changes, dict) else {}))
  weights = weights_of(config, one_device() if changes == "one device" else None)
  found, _ = evaluate(config, weights, pictures(), around(tmp_path))
  numbers, wanted = (
    flat({key: result[key] for key in ("measures", "neighbours", "bits_per_dim", "ode_bits_per_dim")})
    for result in (found, whole[0])
  )
  assert numbers.keys() == wanted.keys() and len(wanted) > 30
  for name, value in wanted.items():
    wanted_value = value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-7)
    assert numbers[name] == wanted_value, name


def flat(tree, name=""):
  if isinstance(tree, dict | list):
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {key: value for part, inner in parts for key, value in flat(inner, f"{name}/{part}").items()}
  return {name: tree}


def test_another_split_to_compare_with(whole, tmp_path, monkeypatch):
  """The samples are compared with that split; what they could be copies of is what was trained on."""
  config = config_of(reference_split="test", measures=("frechet", "neighbours"))
  found, _ = evaluate(config, weights_of(config), pictures(), around(tmp_path))
  assert (found["reference"]["split"], found["reference"]["number"]) == ("test", 23)
  assert found["measures"]["classifier_distance"] != whole[0]["measures"]["classifier_distance"]
  assert found["neighbours"] == whole[0]["neighbours"]


@pytest.fixture(scope="module")
def file_of_statistics(small_parts, tmp_path_factory):
  folder = tmp_path_factory.mktemp("statistics")
  evaluate_lib.write_reference(config_of(), pictures(), folder / "own.npz", around(folder))
  return folder / "own.npz"


def test_only_features_that_are_needed_are_part_of_the_estimate(file_of_statistics, tmp_path, monkeypatch):
  """Where samples are compared with a file, those of the data are not, but for the nearest images."""

  def settle(config, weights, train, needed, *_):
    asked.append(sum(map(len, needed)))
    raise Abandoned

  asked, both = [], ("frechet", "neighbours")
  monkeypatch.setattr(evaluate_lib, "_settle", settle)
  for changes in ({}, {"reference_split": "test"}, {"reference_stats": str(file_of_statistics)}):
    for measures in (("frechet",), both):
      config = config_of(measures=measures, **changes)
      with pytest.raises(Abandoned):
        evaluate(config, weights_of(config), pictures(), around(tmp_path))
  test = len(open_split(DataConfig(split="test")))
  assert asked == [37, 37, test, test + 37, 0, 37]


def test_statistics_are_of_the_features_that_an_evaluation_takes(small_parts, tmp_path, monkeypatch):
  asked = []

  def features(config, *_):
    asked.append(config.evaluate.features)
    return summary_features()

  monkeypatch.setattr(evaluate_lib, "_features", features)
  for i, source in enumerate((pictures(), dataclasses.replace(pictures(), labels=None))):
    evaluate_lib.write_reference(config_of(features="auto"), source, tmp_path / f"{i}.npz", around(tmp_path))
  assert asked == ["classifier", "network"]


OF_SAMPLES = OPTIONS["measures"][:6]


def test_measuring_against_a_file_is_measuring_against_the_data(whole, file_of_statistics, tmp_path):
  """And the file is read as pytorch-fid reads it."""
  config = config_of(reference_stats=str(file_of_statistics), measures=OF_SAMPLES)
  found, _ = evaluate(config, weights_of(config), pictures(), around(tmp_path))
  for name, value in whole[0]["measures"].items():
    assert found["measures"][name] == pytest.approx(value, rel=1e-9), name
  assert found["neighbours"] == whole[0]["neighbours"]
  digest = hashlib.sha256(file_of_statistics.read_bytes()).hexdigest()
  assert found["reference"] == {"file": "own.npz", "sha256": digest} | whole[0]["reference"]
  with np.load(file_of_statistics) as archive:
    mean, sigma = archive["mu"][:], archive["sigma"][:]
  features = summary_features().extract(pictures().read(np.arange(37)).images).features.astype(np.float64)
  np.testing.assert_allclose(mean, features.mean(0), rtol=1e-12)
  np.testing.assert_allclose(sigma, np.cov(features, rowvar=False), rtol=1e-10)


@pytest.mark.parametrize("names", [("mu", "sigma"), ("feats",)])
def test_measuring_against_a_file_of_others(whole, file_of_statistics, tmp_path, capsys, names):
  """Mean and covariance alone are enough for the distance alone."""
  with np.load(file_of_statistics) as archive:
    np.savez_compressed(tmp_path / "theirs.npz", **{name: archive[name] for name in names})
  config = config_of(reference_stats=str(tmp_path / "theirs.npz"), measures=OF_SAMPLES)
  default = dataclasses.replace(EvaluateConfig(), measures=OF_SAMPLES)
  loud = dataclasses.replace(around(tmp_path), quiet=False)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(statistics, "EvaluateConfig", lambda: default)  # nothing was named
    found, _ = evaluate(config, weights_of(config), pictures(), loud)
  missing = {"classifier_kid", "classifier_kid_std", "precision", "recall", "density", "coverage", "set_size"}
  wanted = {k: v for k, v in whole[0]["measures"].items() if names == ("feats",) or k not in missing}
  assert found["measures"].keys() == wanted.keys()
  for name, value in wanted.items():
    assert found["measures"][name] == pytest.approx(value, rel=1e-6), name
  assert found["neighbours"] == whole[0]["neighbours"]
  assert set(found["reference"]) == {"file", "sha256"}
  out = capsys.readouterr().out
  assert "theirs.npz does not say which features it is of; taken for those of --features=classifier\n" in out
  left_out = "left out: kid, precision_recall, density_coverage ("
  assert (left_out in out) == (names == ("mu", "sigma"))


def test_a_file_of_statistics_that_does_not_fit(file_of_statistics, tmp_path):
  with np.load(file_of_statistics) as archive:
    own = dict(archive)
  facts = json.loads(str(own["facts"]))

  def having(**changes):
    told = facts | {"features": facts["features"] | changes}
    np.savez(tmp_path / "a.npz", **(own | {"facts": np.asarray(json.dumps(told))}))

  def refused(measures=("frechet",), **changes):
    config = config_of(reference_stats=str(tmp_path / "a.npz"), measures=measures, **changes)

    def run():
      check(config, tmp_path, pictures())
      evaluate(config, weights_of(config), pictures(), around(tmp_path))

    with pytest.raises(UserError) as caught:
      run()
    text = str(caught.value)
    assert "\n" not in text and not any(path.stat().st_size for path in tmp_path.glob("samples/.drawn*"))
    return text

  having(name="inception", resize="fid")
  assert "a.npz is of --features=inception, and this command compares by classifier" in refused()
  having(identity="f" * 64)
  assert f"a.npz is of another classifier, with other weights or arithmetic ({'f' * 12}, this one is sums)" in refused()
  np.savez(tmp_path / "a.npz", mu=np.zeros(2048), sigma=np.eye(2048))
  assert "is of features of 2048 numbers, and those of classifier have 64" in refused()
  np.savez(tmp_path / "a.npz", mu=np.zeros(64), sigma=np.eye(64))
  assert "is of features of 64 numbers, and those of classifier have 4" in refused()
  assert "measures: kid, precision_recall cannot be measured, as" in refused(("frechet", "kid", "precision_recall"))
  assert refused(("bound",)).startswith("reference_stats: has no effect with --measures=bound")
  wide = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
  np.savez(tmp_path / "a.npz", feats=wide)
  text = refused(("density_coverage",))
  assert text == f"measures: density_coverage needs 6 images, and {tmp_path}/a.npz has 5; leave it out"
  np.savez(tmp_path / "a.npz", mu=np.zeros(64), sigma=np.eye(64))
  bare = config_of(
    reference_stats=str(tmp_path / "a.npz"), evaluate_every=5, measures=EvaluateConfig().measures, num_timesteps=200
  )
  check(bare, tmp_path, pictures())
  with pytest.raises(
    UserError, match=r"best_measure: kid cannot be measured, as .*a\.npz has mean and covariance alone"
  ):
    check(config_lib.override(bare, {"best_measure": "kid"}), tmp_path, pictures())


def test_flips_are_no_part_of_the_data(whole, tmp_path):
  config = config_of(random_flip=False, measures=("frechet",))
  found, _ = evaluate(config, weights_of(config), pictures(), around(tmp_path))
  assert tiny_config().data.random_flip
  assert found["measures"] == {"classifier_distance": whole[0]["measures"]["classifier_distance"]}


def test_only_what_is_asked_for(tmp_path):
  config = config_of(measures=("bound",), likelihood_splits="", likelihood_examples=0)
  found, shown = evaluate(config, weights_of(config), pictures(), around(tmp_path))
  assert not {"samples", "measures", "features", "neighbours", "ode_bits_per_dim"} & set(found) and shown == {}
  assert {split: facts["examples"] for split, facts in found["bits_per_dim"].items()} == {"train": 37, "test": 23}
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("phase", [DRAWN_20, "features of the samples: image 18/21", "bits/dim (bound): image 11/11"])
def test_abandoned_it_goes_on(whole, tmp_path, monkeypatch, phase):
  """Whatever it was doing after the draw: what was drawn is taken over."""

  def beat(what):
    if what == phase:
      raise Abandoned

  config = config_of(measures=("frechet", "bound"), likelihood_splits="train")
  with pytest.raises(Abandoned):
    evaluate(config, weights_of(config), pictures(), around(tmp_path, beat))
  (kept,) = (tmp_path / "samples").iterdir()
  assert kept.stat().st_size == (20 if phase == DRAWN_20 else 21) * 64
  if phase != DRAWN_20:
    monkeypatch.setattr(drawn, "make_long_draw", lambda *args, **options: pytest.fail("drawn again"))
  found, _ = evaluate(config, weights_of(config), pictures(), around(tmp_path))
  assert found["measures"]["classifier_distance"] == whole[0]["measures"]["classifier_distance"]
  assert not list((tmp_path / "samples").iterdir())


@pytest.mark.parametrize(
  ("asked", "own", "splits"),
  [
    ("", "train", ["train", "test"]),
    ("", "test", ["test"]),
    ("train", "train", ["train"]),
    (" test , train,", "train", ["test", "train"]),
    (",", "train", ["train", "test"]),
  ],
)
def test_which_splits(asked, own, splits):
  config = config_of(likelihood_splits=asked, split=own)
  assert [name for name, _ in evaluate_lib._splits(config, pictures(own))] == splits


# What is refused, before anything is computed or written.


BAD = {
  "reference split": (dict(reference_split="trian"), "split: 'trian'"),
  "likelihood split": (dict(likelihood_splits="train,tset"), "split: 'tset'"),
  "no weights": (dict(features="inception", inception_weights="/nowhere"), "inception_weights: .*/nowhere"),
  "samples of precision": (dict(evaluate_samples=3), "evaluate_samples: 3 are too few for precision_recall; use 4"),
  "images of density": (
    dict(reference_split="test", measures=("density_coverage",)),
    "measures: density_coverage needs 6 images, and pictures has 5; leave it out",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_measured(tmp_path, monkeypatch, name):
  changes, message = BAD[name]
  if name == "images of density":
    monkeypatch.setattr(evaluate_lib, "open_source", lambda *_: pictures(number=5))
  with pytest.raises(UserError, match=message) as caught:
    check(config_of(**changes), tmp_path, pictures())
  assert "\n" not in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_junk_for_weights(tmp_path):
  (tmp_path / "junk").write_bytes(b"\x10\0\0\0\0\0\0\0{}              junk")
  with pytest.raises(UserError, match="inception_weights: ") as caught:
    check(config_of(features="inception", inception_weights=str(tmp_path / "junk")), tmp_path, pictures())
  assert "\n" not in str(caught.value)


def test_no_labels(tmp_path):
  bare = dataclasses.replace(pictures(), labels=None)
  with pytest.raises(UserError, match="features: 'classifier' needs labels, and pictures has none"):
    check(config_of(features="classifier"), tmp_path, bare)
  check(config_of(features="classifier", measures=("bound",)), tmp_path, bare)
  with pytest.raises(UserError, match="measures: score needs classes, which features=network has none of"):
    check(config_of(), tmp_path, bare)
  check(config_of(measures=("frechet", "neighbours")), tmp_path, bare)


@pytest.mark.parametrize(
  ("labels", "asked", "features", "left_out"),
  [
    (True, "auto", "classifier", ()),
    (False, "auto", "network", ("score",)),
    (True, "network", "network", ("score",)),
    (True, "classifier", "classifier", ()),
    (False, "classifier", "classifier", OPTIONS["measures"][:6]),  # as release 0.1, which had this default
  ],
)
def test_which_features_auto_is(labels, asked, features, left_out):
  source = pictures() if labels else dataclasses.replace(pictures(), labels=None)
  config = config_of(features=asked, measures=config_lib.Config().evaluate.measures)
  found, line = measurable(config, source)
  assert found.evaluate.features == features
  assert set(config.evaluate.measures) - set(found.evaluate.measures) == set(left_out)
  assert line.startswith("left out: " + ", ".join(left_out) + " (") if left_out else line == ""
  named = config_lib.override(config, {"measures": ("frechet", "score")})
  assert measurable(named, source)[0].evaluate.measures == ("frechet", "score"), "what is asked for is not left out"


def test_labels_that_cannot_be_read(tmp_path):
  def labels():
    raise UserError("features: no labels")

  with pytest.raises(UserError, match="no labels"):
    check(config_of(), tmp_path, dataclasses.replace(pictures(), labels=labels))


def test_more_samples_than_the_disk_takes(tmp_path, monkeypatch):
  monkeypatch.setattr(drawn.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=21 * 64 - 1))
  with pytest.raises(UserError, match="21 images need up to"):
    check(config_of(), tmp_path / "not" / "there", pictures())
  check(config_of(measures=("bound",)), tmp_path, pictures())
  check(config_of(evaluate_samples=20), tmp_path, pictures())


def test_one_image_has_no_neighbours(tmp_path):
  one = pictures(number=1)
  with pytest.raises(UserError, match="measures: frechet needs 2 images, and pictures has 1"):
    check(config_of(measures=("frechet",)), tmp_path, one)
  with pytest.raises(UserError, match="measures: neighbours needs 2 images"):
    check(config_of(measures=("neighbours",)), tmp_path, one)


# The run.


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run with a checkpoint after three updates that nobody made."""
  folder, config = tmp_path_factory.mktemp("run") / "run", tiny_config(**LITTLE)
  layout.create(folder, config)
  facts = {"image_shape": [8, 8, 1], "config": json.loads(config_lib.to_json(config)), "data": {}, "data_changes": []}
  checkpoints = Checkpoints(folder / "checkpoints", keep=1)
  checkpoints.save(tiny_run(config).initial_state(), 3, facts)
  checkpoints.wait()
  checkpoints.close()
  return folder


def listing(folder):
  return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_run_writes_what_it_prints(workdir, monkeypatch, capsys):
  monkeypatch.setattr(evaluation_run, "open_source", open_split)
  evaluation_run.evaluate(config_of(measures=("frechet",)), workdir)
  out = capsys.readouterr().out
  result = json.loads((workdir / "eval" / "3.json").read_text())
  assert "evaluating the ema weights after step 3: frechet" in out
  beside = [result["yardsticks"][kind]["values"]["classifier_distance"] for kind in ("data", "noise", "untrained")]
  data, noise, untrained = (f"{value:.3g}" for value in beside)
  value = f"{result['measures']['classifier_distance']:<10.5g}"
  assert f"  classifier_distance          {value} (data {data}, noise {noise}, untrained {untrained})\n" in out
  assert "Classifier distance " in out and "; lower is better." in out
  assert f"done: {workdir / 'eval' / '3.json'} and {workdir / 'report.html'}" in out
  assert "classifier" in (workdir / "report.html").read_text()


def test_what_fits_is_chosen_once_for_a_workdir(workdir, monkeypatch, capsys):
  """The number, the sampler and the images of the likelihood are chosen by the clock, recorded, and taken again."""
  monkeypatch.setattr(evaluation_run, "open_source", open_split)
  monkeypatch.setattr(estimate, "NUMBERS", (30, 50, 100))
  monkeypatch.setattr(estimate, "LEAST", 30)
  monkeypatch.setattr(estimate, "_EXAMPLES", (5, 10, 20))

  def clock(seconds):
    monkeypatch.setattr(estimate, "measure_speed", lambda *_: estimate.Speed(seconds, seconds, 1e-6))

  def run(**changes):
    options = dict(LITTLE, measures=("frechet", "bound"), likelihood_splits="train", bound_timesteps=3) | changes
    evaluation_run.evaluate(tiny_config(**options), workdir, options.pop("given", ()))
    return json.loads((workdir / "eval" / "3.json").read_text()), capsys.readouterr().out

  clock(400 / 60 / 20)  # 60 samples of 20 network evaluations in 400 s, and 10 images at 3 timesteps in 200 s
  result, out = run()
  assert result["chosen"] == ["evaluate_samples", "sampler", "likelihood_examples"]
  drawn = result["samples"]
  assert (drawn["number"], drawn["sampler"], drawn["evaluations"]) == (50, "dpmpp", 20)
  assert result["bits_per_dim"]["train"]["examples"] == 20 and result["estimated_seconds"] == 353.3
  lines = out.splitlines()
  first = next(
    i for i, line in enumerate(lines) if line.startswith("estimate, from a timed batch: about 6 min (drawing")
  )
  assert "--evaluate_samples=50 --sampler=dpmpp --likelihood_examples=20 --sampling_steps=20" in lines[first - 1]
  assert "papers measure 50,000 images" in lines[first + 1]
  assert not any(line.startswith("drawing") for line in lines[:first]), "before anything is drawn"
  clock(1e-3)  # a faster machine
  result, _ = run()
  assert (result["samples"]["number"], result["samples"]["sampler"]) == (50, "dpmpp")
  assert result["bits_per_dim"]["train"]["examples"] == 20
  result, out = run(evaluate_samples=25, sampler="ddim", sampling_steps=2, likelihood_examples=6)
  assert result["chosen"] == [] and "chosen" not in out
  assert (result["samples"]["number"], result["samples"]["sampler"]) == (25, "ddim")


def test_what_the_run_refuses_leaves_no_trace(workdir, tmp_path, monkeypatch):
  monkeypatch.setattr(evaluation_run, "open_source", open_split)
  before = listing(workdir)
  for changes, message in (
    (dict(likelihood_splits="tset"), "split: 'tset'"),
    (dict(checkpoint="best"), "holds no best checkpoint yet; let training keep one with --evaluate_every"),
    (dict(checkpoint="4"), "checkpoint: .* has no 4, only 3"),
  ):
    with pytest.raises(UserError, match=message):
      evaluation_run.evaluate(config_of(**changes), workdir)
  small = dataclasses.replace(pictures(), image_shape=(4, 4, 1))
  monkeypatch.setattr(evaluation_run, "open_source", lambda *_: small)
  with pytest.raises(UserError, match="dataset: the images of pictures are not of the size that the model draws"):
    evaluation_run.evaluate(config_of(), workdir)
  assert listing(workdir) == before
  layout.create(tmp_path / "empty", tiny_config(**LITTLE))
  before = listing(tmp_path)
  with pytest.raises(UserError, match="holds no checkpoint yet, as it was never trained; train first"):
    evaluation_run.evaluate(config_of(), tmp_path / "empty")
  assert listing(tmp_path) == before


def test_the_run_writes_statistics_and_nothing_else(workdir, tmp_path, monkeypatch, capsys):
  """Of a data set without a run, or of the one that a run has, whether it was trained or not."""
  monkeypatch.setattr(evaluation_run, "open_source", open_split)
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
  (tmp_path / "temporary").mkdir()
  evaluation_run.evaluate(config_of(write_reference=str(tmp_path / "a.npz")), None)
  assert capsys.readouterr().out.endswith(f"done: {tmp_path / 'a.npz'}\n")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "temporary"]
  assert not list((tmp_path / "temporary").iterdir())
  before = listing(workdir)
  evaluation_run.evaluate(config_of(write_reference=str(tmp_path / "b.npz")), workdir)
  assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
  assert {path.parent.name for path in listing(workdir).keys() - before.keys()} <= {"eval", "run", "cache"}
  evaluation_run.evaluate(config_of(write_reference=str(tmp_path / "c.npz"), reference_split="test"), None)
  told = statistics.read_statistics(str(tmp_path / "c.npz")).description
  assert (told["dataset"], told["split"], told["number"]) == ("pictures", "test", 23)
  for path, message in (
    (tmp_path / "a.npz", "a.npz exists; name another file"),
    (tmp_path / "none" / "a.npz", "there is no folder .*/none; make it"),
    ("gs://bucket/a.npz", "is no path in a file system"),
  ):
    with pytest.raises(UserError, match=f"write_reference: .*{message}"):
      evaluation_run.evaluate(config_of(write_reference=str(path)), None)
