"""The converter: what it packs is the same data set, and a run that was killed goes on to the same bytes."""

import fcntl
import itertools
import json
import os
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from ddpm_jax import command
from ddpm_jax.config import DataConfig
from ddpm_jax.data import fingerprint, pack, pipeline, prepare, sources
from ddpm_jax.data.encoded import NoLabels
from tests.data import mixed
from tests.data.packing import KINDS, classes, encoded, pictures, write, write_folder, write_tar

TARGETS = ("zip", "webdataset")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def run(monkeypatch, capsys):
  """Runs `ddpm pack` with these words. Returns the exit code, and what it printed: (code, stdout, stderr)."""

  def call(*words):
    monkeypatch.setattr(sys, "argv", ["ddpm", "pack", *map(str, words)])
    return (command.main(), *capsys.readouterr())

  return call


def target(kind, path):
  """The value of TARGET, and options so that there are several shards."""
  return (f"{kind}:{path}.zip",) if kind == "zip" else (f"{kind}:{path}", "--shard_size=5")


def packed(run, source, kind, path, *options) -> str:
  """Packs. Returns the value of --dataset that it names."""
  code, out, err = run(source, *target(kind, path), *options)
  assert (code, err) == (0, ""), err
  return out.strip().partition("--dataset=")[2]


def batches(dataset, count=6, **options):
  source = sources.open_source(DataConfig(dataset=dataset, **options))
  stream = pipeline.batches(source, batch_size=4, seed=3, start_step=0, labels=source.labels is not None)
  return source, list(itertools.islice(stream, count))


def same(ours, theirs):
  for batch, other in zip(ours, theirs, strict=True):
    assert batch.keys() == other.keys()
    for name, value in batch.items():
      np.testing.assert_array_equal(value, other[name])


def contents(folder) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", TARGETS)
def test_it_is_the_same_data_set(tmp_path, run, kind):
  """From every kind of source: batches, labels, fingerprint, and the bytes of the files by another reader."""
  files = pictures()
  oracle, right = batches(write("folder", tmp_path / "oracle", files))
  made = {}
  for source in KINDS:
    dataset = packed(run, write(source, tmp_path / source, files), kind, tmp_path / f"from_{source}" / "x")
    ours, found = batches(dataset)
    same(found, right)
    assert fingerprint.differences(oracle.fingerprint, ours.fingerprint) == []
    assert ours.known_classes() == oracle.known_classes() and ours.known_classes().names == ("ape", "bee", "cow")
    made[source] = contents(tmp_path / f"from_{source}")
  assert all(made[source] == made["folder"] for source in KINDS)
  labels = dict(zip(files, classes(files)[1], strict=True))
  root = tmp_path / "from_folder"
  if kind == "zip":
    with zipfile.ZipFile(root / "x.zip") as archive:
      tree = json.loads(archive.read("dataset.json"))
      assert {name: archive.read(name) for name in archive.namelist() if name != "dataset.json"} == files
      assert {(entry.compress_type, entry.date_time) for entry in archive.infolist()} == {(0, (1980, 1, 1, 0, 0, 0))}
    assert dict(tree["labels"]) == labels and tree["label_names"] == ["ape", "bee", "cow"]
  else:
    found = {}
    for path in sorted(root.glob("*.tar")):
      with tarfile.open(path) as archive:
        found |= {entry.name: archive.extractfile(entry).read() for entry in archive if entry.mtime == 0}
    beside = {f"{name.rpartition('.')[0]}.cls": str(label).encode() for name, label in labels.items()}
    assert found == files | beside
    assert [path.name for path in sorted(root.iterdir())] == ["classes.json", *(f"x-{k:06d}.tar" for k in range(3))]


@pytest.mark.parametrize("kind", TARGETS)
def test_killed_and_started_again(tmp_path, run, kind, monkeypatch):
  """Whatever a kill, or a loss of power, leaves of the file that is being written: the same bytes in the end."""
  source = write("folder", tmp_path / "source", pictures())
  packed(run, source, kind, tmp_path / "whole" / "x")
  right = contents(tmp_path / "whole")
  convert, converted = pack._convert, []

  def stopped(encoded, row, *rest):
    if row == 12:
      raise KeyboardInterrupt
    converted.append(row)
    return convert(encoded, row, *rest)

  root = tmp_path / "broken"
  with monkeypatch.context() as patch:
    patch.setattr(pack, "_convert", stopped)
    patch.setattr(pack, "_CHUNK", 2)
    with pytest.raises(KeyboardInterrupt):
      packed(run, source, kind, root / "x")
  assert {path.suffix for path in root.iterdir()} == {".part"} | ({".tar", ".json"} if kind == "webdataset" else set())
  (part,) = root.glob("*.part")
  converted.clear()
  monkeypatch.setattr(pack, "_convert", lambda *all: (converted.append(all[1]), convert(*all))[1])
  packed(run, source, kind, root / "x")
  assert contents(root) == right
  assert converted and min(converted) >= 8, "what was done is not done again"

  last = right["x.zip" if kind == "zip" else "x-000002.tar"]
  for cut in (0, 17, 3000, len(last) // 2, len(last) - 1, len(last)):
    for tail in (b"", bytes(600)):
      (root / ("x.zip" if kind == "zip" else "x-000002.tar")).unlink()
      part.write_bytes(last[:cut] + tail) if kind == "zip" else (root / "x-000002.tar.part").write_bytes(last[:cut])
      packed(run, source, kind, root / "x")
      assert contents(root) == right, (cut, len(tail))

  code, out, _ = run(source, *target(kind, root / "x"))
  assert code == 0 and "is finished already: nothing to do" in out and contents(root) == right
  for options in (["--image_size=4"], ["--split=train[:90%]"]):
    code, out, err = run(source, *target(kind, root / "x"), *options)
    assert code == 2 and err.count("\n") == 1 and "is there already" in err and out == "" and contents(root) == right


@pytest.mark.parametrize("kind", TARGETS)
def test_resized_as_in_training(tmp_path, run, kind):
  """PNG files of the pixels that training would see; digits, which are no files, too; numbered as EDM does."""
  source = write("folder", tmp_path / "source", pictures())
  options = {"image_size": "6x4", "resize": "squash", "resample": "box"}
  dataset = packed(run, source, kind, tmp_path / "small" / "x", *(f"--{k}={v}" for k, v in options.items()))
  (ours, found), (theirs, right) = batches(dataset), batches(source, **options)
  same(found, right)
  assert ours.image_shape == (6, 4, 3) and ours.known_classes() == theirs.known_classes()
  dataset = packed(run, "digits", kind, tmp_path / "digits" / "x", "--split=train[:40]", "--only=3,7")
  same(batches(dataset)[1], batches("digits", split="train[:40]", only="3,7")[1])
  names = ["00000/img00000000.png", "00000/img00000001.png"]
  if kind == "zip":
    with zipfile.ZipFile(tmp_path / "digits" / "x.zip") as archive:
      assert archive.namelist()[:2] == names and json.loads(archive.read("dataset.json"))["label_names"] == ["3", "7"]


@pytest.fixture(scope="module")
def mixed_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  for name in mixed.CONFIGS:
    prepare.prepare(DataConfig(dataset=f"mixed/{name}", data_dir=str(folder)))
  return folder


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", mixed.CONFIGS)
def test_tfds(tmp_path, run, kind, name, mixed_dir):
  """The pixels, classes and names of the source, whatever the encoded images are and say."""
  source, where = f"mixed/{name}", {"data_dir": str(mixed_dir)}
  dataset = packed(run, source, kind, tmp_path / "whole" / "x", f"--data_dir={mixed_dir}")
  for size in (8, 6):
    (ours, found), (theirs, right) = batches(dataset, image_size=size), batches(source, image_size=size, **where)
    same(found, right)
    assert (ours.length, ours.image_shape) == (12, theirs.image_shape)
    assert ours.known_classes().names == theirs.known_classes().names
    np.testing.assert_array_equal(ours.labels(), theirs.labels())
  dataset = packed(
    run, source, kind, tmp_path / "part" / "x", f"--data_dir={mixed_dir}", "--split=train[5:]", "--only=1,0"
  )
  same(batches(dataset, image_size=8)[1], batches(source, image_size=8, split="train[5:]", only="1,0", **where)[1])
  code, out, err = run(source, *target(kind, tmp_path / "test" / "x"), f"--data_dir={mixed_dir}", "--split=test")
  assert code == 0 and err.startswith(f"no classes are packed: {source} has none for image ") and err.count("\n") == 1
  ours = sources.open_source(DataConfig(dataset=out.strip().partition("--dataset=")[2]))
  with pytest.raises(NoLabels):
    ours.labels()


@pytest.mark.parametrize("kind", TARGETS)
def test_images_of_different_sizes_and_formats_are_copied(tmp_path, run, kind):
  files = {
    f"{i}.{suffix}": encoded(np.full((4 + i, 9, 3), i, np.uint8), suffix) for i, suffix in enumerate(("png", "jpg"))
  }
  dataset = packed(run, f"folder:{write_folder(tmp_path / 'odd', files)}", kind, tmp_path / "x")
  assert sources.open_source(DataConfig(dataset=dataset, image_size=4)).length == 2
  if kind == "zip":
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
      assert json.loads(archive.read("dataset.json")) == {"labels": None}
      assert all(archive.read(name) == content for name, content in files.items())


@pytest.mark.parametrize("kind", TARGETS)
def test_bad_records(tmp_path, run, kind):
  files = pictures()
  files["bee/04.png"], files["cow/08.png"] = b"no image", files["cow/08.png"][:90]
  source = write("folder", tmp_path / "source", files)
  code, out, err = run(source, *target(kind, tmp_path / "x"))
  assert code == 2 and out == "" and err.count("\n") == 1 and "04.png" in err and "--on_bad_record=skip" in err
  code, out, err = run(source, *target(kind, tmp_path / "x"), "--on_bad_record=skip")
  told = err.splitlines()
  assert code == 0 and len(told) == 2 and all(line.startswith("left out: ") for line in told)
  good = {name: content for name, content in files.items() if name not in ("bee/04.png", "cow/08.png")}
  oracle = sources.open_source(DataConfig(dataset=write("folder", tmp_path / "good", good)))
  ours = sources.open_source(DataConfig(dataset=out.strip().partition("--dataset=")[2]))
  assert ours.fingerprint == oracle.fingerprint and ours.known_classes() == oracle.known_classes()


def test_names_that_the_target_cannot_have(tmp_path, run):
  """The images are numbered then, in their order, and one line says why."""
  files = {name: encoded(np.full((8, 8, 3), i, np.uint8)) for i, name in enumerate(("a/x.png", "a/y.png", "b/z.png"))}
  dots = write("folder", tmp_path / "dots", {name.replace(".png", ".1.png"): files[name] for name in files})
  twice = f"webdataset:{tmp_path}/twice"
  for shard in ("a", "b"):
    write_tar(tmp_path / "twice" / f"{shard}.tar", [("0.png", files["a/x.png"]), ("0.cls", shard.encode())])
  other = f"webdataset:{tmp_path}/other"
  members = [(name, content) for name in files for content in [files[name]]]
  members = [part for name, content in members for part in ((name, content), (f"{name[:-4]}.cls", name[2:3].encode()))]
  write_tar(tmp_path / "other" / "x.tar", members)
  for source, kind, why in (
    (dots, "webdataset", "'a/x.1.png' has more than one dot"),
    (twice, "zip", "two files have one name"),
    (other, "zip", "their folders say other classes than their labels"),
  ):
    path = tmp_path / f"numbered_{why[:5].strip()}"
    code, out, err = run(source, *target(kind, path / "x"))
    assert code == 0 and err.count("\n") == 1 and why in err and "numbered" in err, err
    same(batches(out.strip().partition("--dataset=")[2])[1], batches(source)[1])
  assert (
    packed(run, dots, "zip", tmp_path / "kept") and zipfile.ZipFile(tmp_path / "kept.zip").namelist()[0] == "a/x.1.png"
  )


def test_what_is_refused_is_one_line(tmp_path, run):
  source = write("folder", tmp_path / "source", pictures(4))
  (tmp_path / "other.zip").write_bytes(b"something else")
  (tmp_path / "named").mkdir()
  (tmp_path / "named" / "classes.json").write_text('["x"]')
  before = sorted(tmp_path.rglob("*"))
  for words, part in (
    ([source], "required: TARGET"),
    ([source, "folder:x"], "TARGET: 'folder:x' is neither zip:PATH nor webdataset:PATH"),
    ([source, f"zip:{tmp_path}/other.zip"], "other.zip is there already"),
    ([source, f"zip:{tmp_path}/x.zip", "--shard_size=3"], "shard_size: has no effect on a zip"),
    ([source, f"webdataset:{tmp_path}/x", "--shard_size=0"], "shard_size: 0 must be at least 1"),
    ([source, f"webdataset:{tmp_path}/x-{{0..3}}.tar"], "names no shards"),
    ([source, f"webdataset:{tmp_path}/named/x"], "names the classes of other shards"),
    ([source, f"zip:{tmp_path}/x.zip", "--channels=8"], "channels: has no effect on packing"),
    ([source, f"zip:{tmp_path}/x.zip", "--image_size=4", "--crop=random"], "crop: random takes another part"),
    ([source, f"zip:{tmp_path}/x.zip", "--imagesize=4"], "did you mean --image_size"),
    ([f"folder:{tmp_path}/none", f"zip:{tmp_path}/x.zip"], "is not a folder"),
    ([source, f"zip:{tmp_path}/named"], f"is a folder; name the zip, such as zip:{tmp_path}/named/images.zip"),
    ([source, f"zip:{tmp_path}/new/"], "is a folder; name the zip"),
    ([source, f"zip:{tmp_path}/a\nb.zip"], "has the character '\\n', with which files cannot be written"),
    ([source, f"webdataset:{tmp_path}/a\0b"], "has the character '\\x00'"),
    ([source, f"zip:{tmp_path}/\udcff.zip"], "is not UTF-8; use another TARGET"),
    ([source, f"zip:{tmp_path}/other.zip/x.zip"], "cannot be written"),
  ):
    code, out, err = run(*words)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and part in err, err
  assert sorted(tmp_path.rglob("*")) == before


def test_two_at_once(tmp_path, run):
  source = write("folder", tmp_path / "source", pictures(4))
  with open(tmp_path / "x-000000.tar.part", "wb") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    code, _, err = run(source, f"webdataset:{tmp_path}/x")
  assert code == 2 and "another process writes" in err
  assert os.path.getsize(tmp_path / "x-000000.tar.part") == 0
