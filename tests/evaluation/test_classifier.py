"""The classifier of a data set's own labels: what it learns, what is kept of it, and that all processes agree."""

import dataclasses
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from ddpm_jax.config import DataConfig
from ddpm_jax.data import sources
from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.devices import make_mesh
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import classifier, trained
from ddpm_jax.models.classifier import Classifier
from tests.models.reference import conv, group_norm, swish

ROOT = pathlib.Path(__file__).resolve().parents[2]


def classes_of_grey(number=60, replaced=(), shape=(4, 4, 1), seed=0):
  """Images of three classes, which are dark, grey and light; those at `replaced` stand for bad ones."""
  rng = np.random.default_rng(seed)
  labels = np.arange(number, dtype=np.int32) % 3
  pixels = (labels[:, None, None, None] * 90 + rng.integers(0, 60, (number, *shape))).astype(np.uint8)
  rows = DecodedRows(pixels, np.isin(np.arange(number), replaced))
  return Source("greys", shape, number, rows.take, {"seed": seed}, lambda: labels)


def train(source, cache, *, said=None, batch_size=16, num_steps=3, **options):
  return classifier.classifier_features(
    source,
    cache=cache,
    mesh=make_mesh("pmap"),
    batch_size=batch_size,
    say=(said if said is not None else []).append,
    num_steps=num_steps,
    **options,
  )


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  source = sources.open_source(DataConfig(data_dir=str(folder)))
  said = []
  return source, train(source, folder / "cache", said=said, num_steps=120), said


def test_it_learns_the_digits(digits):
  source, features, said = digits
  assert features.name == "classifier"
  assert {name: value for name, value in features.about.items() if name != "accuracy"} == {
    "classes": 10,
    "trained_on": 1617,
    "updates": 120,
  }
  assert features.about["accuracy"] > 0.9
  assert len(said) == 2
  assert said[0] == "training a classifier of 10 classes on 1617 images, 120 training steps"
  assert said[1].startswith(
    f"it classifies {round(180 * features.about['accuracy'])} of 180 images held out correctly; training it took "
  )
  found = features.extract(source.read(np.arange(1797)).images)
  assert (found.probabilities.argmax(1) == source.labels()).mean() > 0.9
  np.testing.assert_allclose(found.probabilities.sum(1), 1.0, rtol=1e-5)
  assert (found.features.shape, found.features.dtype) == ((1797, 64), np.float32)
  assert (found.probabilities.shape, found.probabilities.dtype) == ((1797, 10), np.float32)
  assert np.linalg.matrix_rank(found.features) > 30


def test_features_do_not_depend_on_the_batch(digits, tmp_path):
  source, features, _ = digits
  images = source.read(np.arange(40)).images
  together = features.extract(images)
  assert np.ptp(together.features, axis=0).max() > 1
  for rows in (slice(0, 5), slice(17, 18), slice(30, 40), slice(3, 3)):
    for whole, part in zip(together, features.extract(images[rows]), strict=True):
      np.testing.assert_allclose(part, whole[rows], rtol=1e-5, atol=1e-5)


def test_what_is_extracted_is_the_network_of_the_file(tmp_path):
  """In float64, from the file alone: an image is scaled to [-1, 1] and given to the network."""
  source = classes_of_grey()
  features = train(source, tmp_path)
  (path,) = tmp_path.iterdir()
  p = {name: np.float64(leaf) for name, leaf in safetensors.numpy.load_file(path).items()}
  images = source.read(np.arange(9)).images
  h = images / 127.5 - 1

  def part(name):
    return {key.partition("/")[2]: leaf for key, leaf in p.items() if key.partition("/")[0] == name}

  for name, stride, groups in (("conv1", 1, 4), ("conv2", 2, 8), ("conv3", 2, 16)):
    h = swish(group_norm(conv(h, part(name), stride), part(f"{name}_norm"), groups))
  expected = swish(h.reshape(9, -1) @ p["features/kernel"] + p["features/bias"])
  logits = expected @ p["logits/kernel"] + p["logits/bias"]
  found = features.extract(images)
  np.testing.assert_allclose(found.features, expected, atol=1e-5)
  np.testing.assert_allclose(found.probabilities, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), atol=1e-5)


def test_the_same_seed_gives_the_same_weights_and_another_others(tmp_path):
  source = classes_of_grey()
  first, again = (train(source, tmp_path / name) for name in "ab")
  assert first.identity == again.identity
  assert first.about == again.about
  assert len(first.identity) == 64
  other = train(source, tmp_path / "a", seed=1)
  assert other.identity != first.identity
  assert len(list((tmp_path / "a").iterdir())) == 2


def test_the_seed_is_that_of_the_first_weights_and_of_the_order(tmp_path, monkeypatch):
  init, fresh = classifier.init_of(Classifier(3), (4, 4, 1)), trained.fresh
  kernels = [np.asarray(fresh(init, seed)["conv2"]["kernel"]) for seed in (0, 0, 1)]
  np.testing.assert_array_equal(kernels[0], kernels[1])
  assert (kernels[0] != kernels[2]).all()
  monkeypatch.setattr(trained, "fresh", lambda init, seed: fresh(init, 0))
  source = classes_of_grey(600)  # more than a batch
  assert len({train(source, tmp_path, seed=seed).identity for seed in (0, 1)}) == 2


def test_what_a_kept_classifier_is_found_by():
  def task(source, seed=0, num_steps=3, **changes):
    source = dataclasses.replace(source, **changes)
    return classifier._task(source, source.labels(), seed, num_steps)

  source = classes_of_grey()
  first = task(source)
  assert task(classes_of_grey(replaced=[3]), name="another") == first
  others = [
    task(source, seed=1),
    task(source, num_steps=4),
    task(source, labels=lambda: 2 - source.labels()),
    task(source, fingerprint={"seed": 1}),
    task(source, image_shape=(4, 8, 1)),
  ]
  assert len({first, *others}) == 6


@pytest.mark.parametrize(
  ("number", "expected"), [(2, 300), (8000, 300), (9000, 317), (60_000, 2000), (1_281_167, 2000)]
)
def test_the_number_of_updates_follows_from_that_of_the_images(tmp_path, monkeypatch, number, expected):
  class Stop(Exception):
    pass

  def stop(model, init, source, labels, training, num_steps, seed, counted):
    asked.append(num_steps)
    raise Stop

  asked = []
  monkeypatch.setattr(classifier, "_train", stop)
  source = Source("many", (4, 4, 1), number, None, {}, lambda: np.arange(number, dtype=np.int32) % 2)
  with pytest.raises(Stop):
    train(source, tmp_path, num_steps=0)
  assert asked == [expected]


def test_what_is_held_out():
  labels = np.tile(np.arange(10), 60)  # every tenth image is of one class
  labels[:3] = 10
  training, held_out = trained.divide(np.argsort(labels, kind="stable"))
  np.testing.assert_array_equal(np.sort(np.concatenate([training, held_out])), np.arange(600))
  assert len(held_out) == 60
  np.testing.assert_array_equal(np.abs(np.bincount(labels[held_out], minlength=11)[:10] - 6) <= 1, True)
  assert set(labels[training]) == set(range(11))
  assert [len(part) for part in trained.divide(np.arange(1))] == [1, 0]
  for number in (2, 3, 10, 11, 12):
    parts = trained.divide(np.arange(number))
    assert min(map(len, parts)) >= 1
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(number))


def test_images_held_out_are_not_learnt_from(tmp_path):
  source = classes_of_grey(200)
  training, held_out = trained.divide(np.argsort(source.labels(), kind="stable"))
  seen = set()

  def read(indices):
    seen.update(indices.tolist())
    return source.read(indices)

  train(dataclasses.replace(source, read=read), tmp_path / "a", num_steps=4)
  assert seen == set(range(200))
  pixels = source.read(np.arange(200)).images
  pixels[held_out] = 255 - pixels[held_out]
  other = dataclasses.replace(source, read=DecodedRows(pixels, np.zeros(200, bool)).take)
  assert train(other, tmp_path / "b", num_steps=4).identity == train(source, tmp_path / "a", num_steps=4).identity
  assert len(training) == 180


def test_images_that_stand_for_bad_ones_are_left_out(tmp_path):
  """Whatever they show: they are not of the class of the image in whose place they stand."""
  bad = [1, 7, 20, 33, 59]

  def source(pixels_of_bad):
    whole = classes_of_grey(60, replaced=bad)
    rows = whole.read(np.arange(60))
    rows.images[bad] = pixels_of_bad
    return dataclasses.replace(whole, read=rows.take)

  dark, light = (train(source(value), tmp_path / f"{value}") for value in (0, 255))
  assert dark.identity == light.identity
  assert dark.about == light.about
  held_out = trained.divide(np.argsort(source(0).labels(), kind="stable"))[1]
  everything_held_out_is_bad = classes_of_grey(60, replaced=held_out)
  assert train(everything_held_out_is_bad, tmp_path / "c").about["accuracy"] == 0


def test_the_accuracy_is_of_the_images_held_out(tmp_path):
  source = classes_of_grey(300)
  held_out = trained.divide(np.argsort(source.labels(), kind="stable"))[1]
  features = train(source, tmp_path / "a", num_steps=20)
  answers = features.extract(source.read(held_out).images).probabilities.argmax(1)
  right = int((answers == source.labels()[held_out]).sum())
  assert features.about["accuracy"] == right / 30
  assert right >= 20


def test_a_kept_classifier_is_not_trained_again(tmp_path, monkeypatch):
  chance = np.random.default_rng(0).integers(0, 3, 200)
  source, said = dataclasses.replace(classes_of_grey(200), labels=lambda: chance), []
  first = train(source, tmp_path)
  assert 0 < first.about["accuracy"] < 1

  def refuse(*_):
    raise AssertionError("it trains")

  monkeypatch.setattr(classifier, "_train", refuse)
  again = train(source, tmp_path, said=said)
  assert said == []
  assert again[:3] == first[:3]
  images = source.read(np.arange(7)).images
  for before, after in zip(first.extract(images), again.extract(images), strict=True):
    np.testing.assert_array_equal(before, after)
  with pytest.raises(AssertionError, match="it trains"):
    train(source, tmp_path, seed=1)


def test_a_flipped_byte_in_the_cache_is_noticed(tmp_path):
  source = classes_of_grey()
  first = train(source, tmp_path)
  (path,) = tmp_path.iterdir()
  content = path.read_bytes()
  shapes = safetensors.numpy.load(content)
  header = int.from_bytes(content[:8], "little")
  said = []
  assert trained.load(path, shapes, classifier.MARKS, said.append) is not None
  assert said == []
  places = [*range(0, 8 + header, 5), *range(8 + header, len(content), len(content) // 60), len(content) - 1]
  for number, place in enumerate(places):
    damaged = bytearray(content)
    damaged[place] ^= (0xFF, 1)[number % 2]
    path.write_bytes(damaged)
    assert trained.load(path, shapes, classifier.MARKS, said.append) is None, place
  assert len(said) == len(places)
  assert all(line.startswith(f"{path} cannot be used (") and "\n" not in line for line in said)

  damaged = bytearray(content)
  damaged[-100] ^= 1
  for broken in (bytes(damaged), content[:-1], content[:100], b"", b"no weights"):
    path.write_bytes(broken)
    said = []
    again = train(source, tmp_path, said=said)
    assert len(said) == 3
    assert said[0].endswith("; training it anew")
    assert again[:3] == first[:3]
    assert safetensors.numpy.load(path.read_bytes()).keys() == shapes.keys()


def test_weights_of_another_network_are_not_used(tmp_path):
  source, said = classes_of_grey(), []
  train(source, tmp_path)
  (path,) = tmp_path.iterdir()
  shapes = safetensors.numpy.load_file(path)
  assert trained.load(path, shapes, classifier.MARKS, said.append) is not None
  assert trained.load(path, {**shapes, "logits/bias": np.zeros(4, np.float32)}, (), said.append) is None
  assert trained.load(path, {"logits/bias": shapes["logits/bias"]}, (), said.append) is None
  assert len(said) == 2


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
  (tmp_path / "file").write_text("")
  said = []
  features = train(classes_of_grey(), tmp_path / "file" / "cache", said=said)
  assert features.about["classes"] == 3
  assert said[-1].endswith("cannot be written (Not a directory); the network will be trained anew next time")


def test_data_without_labels(tmp_path):
  source = dataclasses.replace(classes_of_grey(), labels=None)
  with pytest.raises(UserError) as caught:
    train(source, tmp_path)
  assert str(caught.value) == (
    "features: 'classifier' needs labels, and greys has none; use --features=network, or inception with "
    "--inception_weights"
  )


PROCESS = """if True:
  import pathlib, sys
  import jax
  port, index, cache, lines = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4])
  jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
  import numpy as np
  from tests.evaluation import test_classifier
  source = test_classifier.classes_of_grey()
  said = []
  for seed in (index, 0, index):  # each trains another one at first
    features = test_classifier.train(source, cache / str(index), said=said, seed=seed, batch_size=6)
    found = features.extract(source.read(np.arange(5)).images)
    sums = found.features.sum(), found.probabilities.sum()
    with lines.open("a") as file:  # Gloo writes on standard output
      print(features.identity, features.about, *sums, len(said), file=file)
"""


def test_two_processes_have_the_same(tmp_path):
  """The first alone has a cache; what it holds counts for both."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-c", PROCESS, str(port)]
  processes = [
    subprocess.Popen(
      [*command, str(i), str(tmp_path / "cache"), str(tmp_path / f"{i}.txt")],
      cwd=ROOT,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  errors = [process.communicate(timeout=120)[1] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], errors
  first, second = ((tmp_path / f"{i}.txt").read_text().splitlines() for i in range(2))
  assert first == second
  assert len(first) == 3
  assert len(set(first)) == 1  # that of the first process, which it finds in the cache
  assert [path.name for path in (tmp_path / "cache").iterdir()] == ["0"]
  features = train(classes_of_grey(), tmp_path / "cache" / "0", batch_size=6)
  assert features.identity == first[0].split()[0]
