"""Conditional models: measures by class, which classes are drawn, and guidance scales side by side."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import EvaluateConfig
from ddpm_jax.data.sources import KnownClasses
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import by_class, likelihood, measures, moments, trained, yardsticks
from ddpm_jax.evaluation import evaluate as evaluate_lib
from ddpm_jax.evaluation.evaluate import check, evaluate, measurable
from ddpm_jax.evaluation.results import read_result, write_result
from ddpm_jax.evaluation.summary import columns, guidance_of
from ddpm_jax.evaluation.surroundings import Abandoned
from ddpm_jax.report.report import write_guidance_chart, write_report
from ddpm_jax.runs.evaluate import result_lines
from ddpm_jax.sampling import drawn
from ddpm_jax.sampling.classes import Classes, labels_among, numbers_among
from ddpm_jax.weights.load import Weights
from ddpm_jax.workdir import layout
from tests.evaluation.test_evaluate import (  # noqa: F401
  around,
  config_of,
  one_device,
  pictures,
  small_parts,
  summary_features,
)
from tests.training.tiny import tiny_run

NAMES = ("cat", "dog", "eel")
LABELS = np.repeat(np.arange(3, dtype=np.int32), (40, 27, 3))  # of the third class fewer than there are features
MEASURES = ("frechet", "precision_recall", "classes")


def labelled(split="train"):
  return dataclasses.replace(pictures(split, len(LABELS)), labels=lambda: LABELS)


def conditional(**changes):
  options = dict(conditioning="class", num_classes=3, label_dropout=0.1, evaluate_samples=50, sample_batch_size=50)
  return config_of(**(options | dict(measures=MEASURES, likelihood_splits="train") | changes))


def weights_of(config):
  """Weights that answer something, and each class something else."""
  run = tiny_run(config)._replace(mesh=one_device())
  random = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape).astype(leaf.dtype), run.initial_state().params
  )
  return Weights(run, jax.device_put(params, run.mesh.replicated), 5, "ema", "some identity", classes=NAMES)


@pytest.fixture(scope="module")
def seen():
  """(images, labels) of what was measured, filled by each evaluation."""
  found, real = [], evaluate_lib.see

  def see(features, images, size, done, labels=None):
    found.append((np.array(images), labels))
    return real(features, images, size, done, labels)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate_lib, "see", see)
    yield found


def measured(folder, **changes):
  config = conditional(**changes)
  return evaluate(config, weights_of(config), labelled(), around(folder))


@pytest.fixture(scope="module")
def whole(small_parts, seen, tmp_path_factory):  # noqa: F811
  workdir = tmp_path_factory.mktemp("conditional")
  result, _ = measured(workdir, measures=(*MEASURES, "bound"))
  return result, *seen[-1], workdir


def of(images):
  return summary_features().extract(images)


def naive_distance(ours, others):
  a, b = of(ours).features, of(others).features
  return measures.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))


def test_each_class_beside_the_data(whole):
  """The images of a class with those of the class; and as many as the classifier sees as what was asked for."""
  result, images, labels, _ = whole
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  assert result["samples"]["labels"] == "proportional" and result["samples"]["guidance_scale"] == [1.0]
  assert np.abs(np.bincount(labels, minlength=3) - 50 * np.bincount(LABELS) / 70).max() < 2
  assert set(result["classes"]) == set(NAMES)
  real = labelled().read(np.arange(70)).images
  right = of(images).probabilities.argmax(1) == labels
  for label, name in enumerate(NAMES):
    found, rows = result["classes"][name], labels == label
    assert found["number"] == rows.sum() and found["class_accuracy"] == right[rows].mean()
    if name == "eel":
      assert "classifier_distance" not in found
    else:
      wanted = naive_distance(images[rows], real[label == LABELS])
      assert found["classifier_distance"] == pytest.approx(wanted, rel=1e-4)
  assert result["measures"]["class_accuracy"] == right.mean()
  assert "classifier_intra_distance" not in result["measures"], "one class has none"


def test_the_classifier_on_images_that_it_was_not_trained_on(whole):
  result, *_ = whole
  _, held_out = trained.divide(np.argsort(LABELS, kind="stable"))
  assert len(held_out) == 7
  right = of(labelled().read(held_out).images).probabilities.argmax(1) == LABELS[held_out]
  data = result["yardsticks"]["data"]
  assert data["values"]["class_accuracy"] == right.mean()
  for label in np.unique(LABELS[held_out]):
    assert data["classes"][NAMES[label]]["class_accuracy"] == right[LABELS[held_out] == label].mean()
  real = labelled().read(np.arange(70)).images
  ours, others = yardsticks.halves(70, 50)
  parts = (real[rows[LABELS[rows] == 0]] for rows in (ours, others))
  assert data["classes"]["cat"]["classifier_distance"] == pytest.approx(naive_distance(*parts), rel=1e-4)


def test_the_likelihood_is_that_of_images_given_their_classes(whole):
  result, *_ = whole
  assert result["bits_per_dim"]["train"]["given"] == "class"
  (column,) = [column for column in columns({5: result}) if column.title == "Bits/dim"]
  assert column.remark == "bound, train, given the class"
  assert "Bits/dim are of the images given their classes." in list(result_lines(result))
  config = conditional(measures=("bound",))
  wrong = dataclasses.replace(labelled(), labels=lambda: (LABELS + 1) % 3)
  found, _ = evaluate(config, weights_of(config), wrong, around(whole[-1]))
  assert found["bits_per_dim"]["train"]["total"] != result["bits_per_dim"]["train"]["total"]


def test_means_over_classes_and_classes_that_the_classifier_does_not_know():
  """By hand: all classes have a distance, and the classifier knows two of three."""
  labels = np.repeat([0, 1, 2], 10)
  features = np.random.default_rng(0).normal(size=(2, 30, 2))
  ours, others = (moments.moments_by_class(part, labels) for part in features)
  probabilities = np.eye(2)[np.repeat([0, 1, 0, 1], (10, 4, 6, 10))]
  right = by_class.seen_as("classifier", probabilities, labels)
  found = by_class.measure("classifier", NAMES, labels, ours, others, right)
  assert found.values["class_accuracy"] == 14 / 20
  assert [found.each[name].get("class_accuracy") for name in NAMES] == [1.0, 0.4, None]
  distances = [found.each[name]["classifier_distance"] for name in NAMES]
  assert found.values["classifier_intra_distance"] == np.mean(distances)
  assert by_class.left_out("classifier", found.each, 2) == ""
  assert by_class.seen_as("inception", np.ones((30, 1008)), labels) is None
  few = by_class.measure("inception", NAMES, labels, ours, {0: others[0]}, None)
  assert few.values == {} and list(few.each["cat"]) == ["number", "fid"]
  line = by_class.left_out("inception", few.each, 2)
  assert line == (
    "left out: the distance of 2 of 3 classes (dog, eel), as 3 samples and as many images of a class are needed"
  )


def test_which_classes():
  train, config = labelled(), conditional()
  weights = weights_of(config)

  def classes(**changes):
    return by_class.asked_for(conditional(**changes), weights, train)

  index = np.arange(6)
  np.testing.assert_array_equal(classes().of(index), Classes(LABELS, NAMES, proportional=True).of(index))
  np.testing.assert_array_equal(classes(evaluate_labels="uniform").of(index), [0, 1, 2, 0, 1, 2])
  np.testing.assert_array_equal(classes(classes=("eel", "cat")).of(index), [2, 0, 2, 0, 2, 0])
  bare = dataclasses.replace(train, labels=None)
  with pytest.raises(
    UserError, match=r"proportional needs the class of each image, and pictures has none; use --evaluate_labels=uniform"
  ):
    by_class.asked_for(config, weights, bare)
  more = dataclasses.replace(train, labels=lambda: LABELS + 1)
  with pytest.raises(
    UserError, match="evaluate_labels: pictures has classes that the model does not know, 3; use images of its 3"
  ):
    by_class.asked_for(config, weights, more)
  plain = config_of()
  assert by_class.asked_for(plain, weights_of(plain), bare) is None


def sources_of(names, labels=LABELS):
  return dataclasses.replace(
    pictures(number=len(labels)), labels=lambda: labels, known_classes=lambda: KnownClasses(names)
  )


def test_classes_of_images_go_by_their_names():
  """Of other folders, in another order, with some that the model does not know; by number where there are no names."""
  cases = [
    (NAMES, [0, 1, 2]),
    (("dog", "eel", "cat"), [1, 2, 0]),
    (("ant", "cat", "dog", "eel"), [-1, 0, 1, 2]),
    (("cat", "cat", "x"), [0, 0, -1]),
    ((), [0, 1, 2]),
    (("0", "1", "2", "3"), [0, 1, 2, -1]),
  ]
  assert [numbers_among(NAMES, sources_of(names)).tolist() for names, _ in cases] == [numbers for _, numbers in cases]
  assert numbers_among(("0", "1"), sources_of(NAMES)).tolist() == [0, 1, -1]
  digits = tuple("0123456789")  # where numbers are names
  assert numbers_among(digits, sources_of(("3", "8", "9"))).tolist() == [3, 8, 9]
  assert numbers_among(("3", "8"), sources_of(digits)).tolist() == [-1, -1, -1, 0, -1, -1, -1, -1, 1, -1]
  assert numbers_among(NAMES, dataclasses.replace(pictures(), labels=None)) is None
  np.testing.assert_array_equal(labels_among(NAMES, sources_of(("dog", "eel", "cat"))), (LABELS + 1) % 3)
  turned = np.eye(3)[[0, 1, 2]]  # the classifier of such images sees a dog, an eel, a cat
  seen = by_class.seen_as("classifier", turned, np.array([1, 2, 2]), np.array([1, 2, 0], np.int32))
  np.testing.assert_array_equal(seen, [1, 1, 0])


def test_images_in_another_order_of_classes_are_measured_alike(whole, tmp_path):
  """The same images and names, numbered otherwise: the same classes are drawn, and the same is told of each."""
  result, *_ = whole
  other = sources_of(("eel", "cat", "dog"), (LABELS + 1) % 3)
  config = conditional(measures=("frechet", "classes"))
  found, _ = evaluate(config, weights_of(config), other, around(tmp_path))
  assert {name: part["number"] for name, part in found["classes"].items()} == {
    name: part["number"] for name, part in result["classes"].items()
  }
  for name in ("cat", "dog"):
    assert "classifier_distance" in found["classes"][name]
  with pytest.raises(UserError, match="evaluate_labels: pictures has classes that the model does not know, ant; use"):
    by_class.asked_for(config, weights_of(config), sources_of(("ant", "cat", "dog")))


def test_draws_of_an_unconditional_model_with_a_classifier_have_classes():
  """Those of the classifier; by default with the other measures, and in columns of their own."""
  changes = dict(conditioning="none", num_classes=0, label_dropout=0.0, classifier="runs/k")
  usual = EvaluateConfig().measures
  assert measurable(conditional(**changes, measures=usual), labelled())[0].evaluate.measures == (*usual, "classes")
  config = conditional(**changes)
  plain, classifier = weights_of(config), weights_of(conditional())
  classes = by_class.asked_for(config, plain._replace(classifier=classifier), labelled())
  np.testing.assert_array_equal(classes.of(np.arange(9)), Classes(LABELS, NAMES, proportional=True).of(np.arange(9)))
  with pytest.raises(UserError, match="classes: 'cow' is none of the 3 classes of the classifier"):
    by_class.asked_for(conditional(**changes, classes=("cow",)), plain._replace(classifier=classifier), labelled())
  guided, unguided = ({"samples": {"classifier": path, "classifier_scale": 1.0}} for path in ("/k", ""))
  assert guidance_of(guided) == {"classifier": "/k"} and guidance_of(unguided) == {}


def test_on_by_default_for_conditional_models_alone(tmp_path):
  usual = EvaluateConfig().measures
  assert measurable(conditional(measures=usual), labelled())[0].evaluate.measures == (*usual, "classes")
  assert measurable(config_of(measures=usual), labelled()) == (config_of(measures=usual, features="classifier"), "")
  assert "classes" not in measurable(conditional(measures=("frechet",)), labelled())[0].evaluate.measures
  np.savez(tmp_path / "a.npz", mu=np.zeros(70), sigma=np.eye(70))
  file = dict(reference_stats=str(tmp_path / "a.npz"), features="network")
  found, line = measurable(conditional(measures=usual, num_timesteps=20, **file), labelled())
  assert "classes" not in found.evaluate.measures
  assert line.endswith(
    "left out: classes (" + str(tmp_path / "a.npz") + " has no classes, and features=network sees none)"
  )
  with pytest.raises(UserError, match=r"measures: classes cannot be measured, as .*a\.npz has no classes"):
    measurable(conditional(measures=("frechet", "classes"), **file), labelled())


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    (None, ", and pictures has none; leave bound and ode out"),
    (lambda: LABELS + 1, ": pictures has classes that the model does not know, 3; use images of its 3 classes"),
  ],
)
def test_a_likelihood_needs_the_classes(tmp_path, labels, message):
  config = conditional(measures=("bound",))
  with pytest.raises(UserError, match=f"measures: the likelihood of a conditional model is .*{message}"):
    check(config, tmp_path, dataclasses.replace(labelled(), labels=labels), weights_of(config))


def test_yardsticks_depend_neither_on_labels_nor_on_guidance(whole, tmp_path, monkeypatch):
  result, *_, workdir = whole
  monkeypatch.setattr(yardsticks, "_untrained", lambda *_: pytest.fail("computed again"))
  (tmp_path / "eval").mkdir()
  (tmp_path / "eval" / "cache").symlink_to(workdir / "eval" / "cache")
  measures = (*MEASURES, "bound")
  found, _ = measured(tmp_path, measures=measures, evaluate_labels="uniform", guidance_scale=(2.0,))
  assert found["yardsticks"] == result["yardsticks"]
  assert found["samples"]["labels"] == "uniform" and found["samples"]["guidance_scale"] == [2.0]
  names = {column.name for column in columns({5: result, 6: found}) if len(column.values) == 2}
  assert names == {"bits_per_dim_train"}, "what is drawn otherwise shares no column"


# Guidance scales.

SCALES = (1.0, 1.5, 3.0)


@pytest.fixture(scope="module")
def swept(small_parts, tmp_path_factory):  # noqa: F811
  """Of three scales: (result, pictures, draws that were compiled, likelihoods that were measured, workdir)."""
  workdir, made, likelihoods = tmp_path_factory.mktemp("swept"), [], []
  layout.create(workdir / "run", conditional())
  real, real_bound = drawn.make_long_draw, likelihood.bound
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(drawn, "make_long_draw", lambda *args, **how: made.append(real(*args, **how)) or made[-1])
    patch.setattr(likelihood, "bound", lambda *args, **how: likelihoods.append(how) or real_bound(*args, **how))
    scales = dict(guidance_scale=SCALES, guidance_interval=(0.1, 5.0))
    found, shown = measured(workdir / "run", measures=(*MEASURES, "bound"), **scales)
  return found, shown, made, likelihoods, workdir / "run"


def test_each_scale_is_as_measured_alone(whole, swept, tmp_path):
  """Of the same seeds and classes; by one program for all scales but 1, and with one likelihood."""
  result, shown, made, likelihoods, _ = swept
  assert [len(one._compiled) for one in made] == [1, 1]
  assert len(likelihoods) == 2, "of the model and of the untrained network"
  assert [one["guidance_scale"] for one in result["guidance"]] == list(SCALES)
  assert set(shown) == {"samples", "samples_1.5", "samples_3"}
  unguided = whole[0]
  for name in ("measures", "classes", "yardsticks", "reference", "features"):
    assert result[name] == unguided[name], name
  off = {"guidance_scale": 1.0, "guidance_interval": [], "guide_with": ""}
  assert result["guidance"][0] == off | {name: unguided[name] for name in ("measures", "classes")}
  alone, _ = measured(tmp_path, guidance_scale=(3.0,), guidance_interval=(0.1, 5.0))
  on = {"guidance_scale": 3.0, "guidance_interval": [0.1, 5.0], "guide_with": ""}
  assert result["guidance"][2] == on | {name: alone[name] for name in ("measures", "classes")}
  assert "guidance" not in alone and alone["measures"] != unguided["measures"]


def test_one_table_one_plot_and_one_file(swept):
  result, shown, _, _, workdir = swept
  head, *lines = result_lines(result)
  assert head.split() == ["guidance_scale", "1", "1.5", "3"]
  distances = [one["measures"]["classifier_distance"] for one in result["guidance"]]
  line = next(line for line in lines if "classifier_distance" in line)
  assert line.split()[1:4] == [f"{value:.5g}" for value in distances]
  assert f"(best at {SCALES[int(np.argmin(distances))]:g}, data " in line
  assert sum("class_accuracy" in line for line in lines) == sum("bits_per_dim_train" in line for line in lines) == 1
  path = write_result(workdir, result, shown)
  written = read_result(path)
  assert written is not None and written["guidance"] == result["guidance"]
  (chart,) = write_guidance_chart(workdir, written)
  assert chart == workdir / "eval" / "5.guidance.png"
  with Image.open(chart) as picture:
    assert picture.width > 500
  page = write_report(workdir).read_text()
  for text in (
    "<h3>Guidance</h3>",
    "Guidance scale",
    "<h3>By class</h3>",
    "precision, recall",
    "given its class",
    "guidance scale 1.5, step 5",
  ):
    assert text in page, text
  points = page[page.index("<h3>Guidance</h3>") :]
  assert points.count("</text>") and all(f">{scale:g}</text>" in points for scale in SCALES)
  few = {**written, "guidance": [{**one, "measures": {"recall": 0.5}} for one in written["guidance"]]}
  assert write_guidance_chart(workdir, few) == []


def test_an_older_reader_sees_the_first_scale(swept, whole):
  """A result of one scale has no other keys than before; that of several has one more."""
  assert set(swept[0]) - set(whole[0]) == {"guidance"}


def test_stopped_in_between_it_goes_on(swept, tmp_path, monkeypatch):
  """What was drawn at earlier scales is taken over."""

  def beat(what):
    if what == "features of the samples with guidance 3: image 50/50":
      raise Abandoned

  config = conditional(guidance_scale=SCALES, guidance_interval=(0.1, 5.0))
  with pytest.raises(Abandoned):
    evaluate(config, weights_of(config), labelled(), around(tmp_path, beat))
  assert [path.stat().st_size for path in (tmp_path / "samples").iterdir()] == [50 * 64] * 3
  monkeypatch.setattr(drawn, "make_long_draw", lambda *args, **options: pytest.fail("drawn again"))
  found, _ = evaluate(config, weights_of(config), labelled(), around(tmp_path))
  assert found["guidance"] == swept[0]["guidance"]
  assert not list((tmp_path / "samples").iterdir())
