"""Own images, however they are kept: the same data set. The oracle is Pillow and a loop over the files' bytes."""

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import os
import re
import resource
import shutil
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data import fingerprint, pipeline, sources
from ddpm_jax.errors import UserError
from tests.data import packing
from tests.data.packing import (
  KINDS,
  classes,
  encoded,
  features,
  pictures,
  write,
  write_folder,
  write_parquet,
  write_tar,
  write_zip,
)

B = 4


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """A cache of their own."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "ddpm_jax" / "data"


def open_source(dataset, **options):
  return sources.open_source(DataConfig(dataset=dataset, **options))


def batches(source, count, start=0, **options):
  stream = pipeline.batches(source, batch_size=B, seed=3, start_step=start, labels=True, **options)
  with contextlib.closing(stream):
    return list(itertools.islice(stream, count))


def expected(files, count, bad=()):
  """The batches, by another path: one image at a time, from its bytes."""
  names, (_, labels) = list(files), classes(files)
  for step in range(count):
    rows = pipeline.order(len(files), batch_size=B, seed=3)[step]
    records = []
    for row in rows.tolist():
      while names[row] in bad:
        row = (row + 1) % len(files)
      records.append(row)
    with contextlib.ExitStack() as stack:
      found = [stack.enter_context(Image.open(io.BytesIO(files[names[record]]))) for record in records]
      pixels = np.stack([np.asarray(image.convert("RGB")) for image in found])
    yield {
      "image": pixels,
      "index": np.arange(B, dtype=np.int32),
      "replaced": np.array([names[row] in bad for row in rows]),
      "record": np.array(records, np.int32),
      "label": np.array([labels[record] for record in records], np.int32),
    }


def same(ours, theirs):
  for batch, other in zip(ours, theirs, strict=True):
    assert batch.keys() == other.keys()
    for name, value in batch.items():
      np.testing.assert_array_equal(value, other[name])
      assert value.dtype == other[name].dtype


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_are_one_data_set(tmp_path, kind, capsys):
  files = pictures()
  dataset = write(kind, tmp_path, files)
  right = list(expected(files, 8))  # more than two epochs
  of_folder = open_source(write("folder", tmp_path / "oracle", files))
  for options in ({}, {"cache_gib": 0.0}, {"cache_gib": 0.0}):  # read, kept, and from what was kept
    source = open_source(dataset, **options)
    same(batches(source, 8), right)
    assert fingerprint.differences(of_folder.fingerprint, source.fingerprint) == []
    assert source.fingerprint["listing"] == of_folder.fingerprint["listing"]
    assert source.known_classes() == of_folder.known_classes()
    assert source.known_classes().names == ("ape", "bee", "cow")
  same(batches(source, 4, start=3, threads=3), right[3:7])  # from the middle of an epoch
  assert capsys.readouterr() == ("", "")
  for split in ("train[:50%]", "train[9:]+train[:3]"):
    part, other = open_source(dataset, split=split), open_source(f"folder:{tmp_path}/oracle/folder", split=split)
    assert part.fingerprint == other.fingerprint and 0 < len(part) < 14


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[1:])
def test_worker_processes_read_the_same(tmp_path, kind, request):
  flags.FLAGS.mark_as_parsed()  # as in the command: Grain wants that
  request.addfinalizer(flags.FLAGS.unparse_flags)
  files = pictures()
  files["bee/04.png"] = b"no image"
  source = open_source(write(kind, tmp_path, files), cache_gib=0.0, data_workers=1, on_bad_record="skip")
  same(batches(source, 5, workers=1), list(expected(files, 5, bad={"bee/04.png"})))


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_image(tmp_path, kind, capsys):
  files = pictures()
  files["bee/04.png"] = b"no image"  # without a header
  files["cow/08.png"] = files["cow/08.png"][:90]  # with one
  dataset = write(kind, tmp_path, files)
  for _ in range(2):  # also from the index
    with pytest.raises(UserError, match=r"^dataset: .* \(image 6\) is not an image that Pillow can read .*=skip$"):
      open_source(dataset)
  for options in ({}, {"cache_gib": 0.0}):
    source = open_source(dataset, on_bad_record="skip", **options)
    same(batches(source, 8), list(expected(files, 8, bad={"bee/04.png", "cow/08.png"})))
  told = {line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")}
  named = {"folder": "/bee/04.png", "zip": "x.zip/bee/04.png", "webdataset": "x-000.tar/bee/04.png"}.get(
    kind, "row 6 of"
  )
  assert len(told) == 2 and any(named in line and "(image 6)" in line for line in told), told


@pytest.mark.parametrize("kind", KINDS)
def test_only_some_classes(tmp_path, kind):
  """It is the data set that has those images alone, in every way."""
  files = pictures()
  dataset = write(kind, tmp_path, files)
  part = {name: content for name, content in files.items() if not name.startswith("bee")}
  oracle = open_source(write("folder", tmp_path / "oracle", part))
  for only in ("ape,cow", "cow, 0"):
    source = open_source(dataset, only=only)
    assert source.fingerprint == oracle.fingerprint
    assert source.known_classes() == oracle.known_classes()
    assert source.known_classes().names == ("ape", "cow")
    same(batches(source, 6), list(expected(part, 6)))
  one = open_source(dataset, only="bee")
  assert (len(one), one.known_classes().names) == (len(files) - len(part), ("bee",))
  for only, match in (("bea", "did you mean bee"), ("7", "use some of ape, bee, cow$"), ("", None)):
    with pytest.raises(UserError, match=rf"^only: '{only}' .*{match}") if match else contextlib.nullcontext():
      open_source(dataset, only=only)


def test_grey_only_if_all_are(tmp_path):
  """All of the collection, whatever the split and the classes."""
  files = {f"{'ab'[i % 2]}/{i}.png": encoded(np.full((4, 4), i, np.uint8)) for i in range(8)}
  for kind in KINDS:
    assert open_source(write(kind, tmp_path / kind, files)).image_shape == (4, 4, 1)
  files["a/c.png"] = encoded(np.zeros((4, 4, 3), np.uint8))
  for kind in KINDS:
    assert open_source(write(kind, tmp_path / "c" / kind, files), only="b").image_shape == (4, 4, 3)


# Labels.


def with_json(files, tree):
  return files | {"dataset.json": json.dumps(tree).encode()}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_labels_of_dataset_json(tmp_path, kind):
  """Its numbers count, and its names, else those of the folders; folders of EDM are no classes."""
  files = pictures()
  order = {"ape": 2, "bee": 0, "cow": 4}
  pairs = [[name, order[name[:3]]] for name in files]
  names = ["bee", "x", "ape", "y", "cow"]
  numbered = {f"0000{i % 2}/img{i:08d}.png": content for i, content in enumerate(files.values()) if i % 5 != 1}
  cases = {
    "names": (with_json(files, {"labels": pairs, "label_names": names}), names, [order[n[:3]] for n in files]),
    "none": (with_json(files, {"labels": pairs}), ["bee", "1", "ape", "3", "cow"], [order[n[:3]] for n in files]),
    "null": (with_json(files, {"labels": None}), *classes(files)),
    "else": (with_json(files, {"pictures": 3}), *classes(files)),
    "edm": (
      with_json(numbered, {"labels": [[name, i % 3] for i, name in enumerate(sorted(numbered))]}),
      ["0", "1", "2"],
      [i % 3 for i in range(len(numbered))],
    ),
  }
  for case, (packed, right, labels) in cases.items():
    dataset = write(kind, tmp_path / case, packed)
    source = open_source(dataset)
    assert source.labels().tolist() == labels, case
    assert list(source.known_classes().names) == right, case
  without = open_source(write(kind, tmp_path / "without", with_json(numbered, {"labels": None})))
  assert without.known_classes() == sources.KnownClasses()
  with pytest.raises(UserError, match="has none; use"):
    without.labels()


def test_labels_of_shards(tmp_path):
  files = dict(itertools.islice(pictures().items(), 6))

  def shards(name, members, **options):
    write_tar(tmp_path / name / "0.tar", members)
    return open_source(f"webdataset:{tmp_path / name}", **options)

  def beside(name, content):
    return [
      pair for file, picture in files.items() for pair in ((file, picture), (f"{file[:-4]}.{name}", content(file)))
    ]

  texts = shards("texts", beside("cls", lambda file: file[:3].encode() + b"\n"))
  assert texts.labels().tolist() == classes(files)[1] and texts.known_classes().names == ("ape", "bee")
  trees = beside("json", lambda file: json.dumps({"kind": int(file[:3] == "bee"), "label": [1]}).encode())
  numbers = shards("numbers", trees, label_field="kind")
  assert numbers.labels().tolist() == classes(files)[1] and numbers.known_classes().names == ("0", "1")
  assert shards("captions", beside("txt", lambda file: b"a picture")).known_classes() == sources.KnownClasses()
  # What is not asked for is no error: a line.
  with pytest.raises(UserError, match=r"the class of image 0 of webdataset:.* is \[1\]; use a whole number"):
    shards("bad", trees).labels()


# Names and other kinds of entries.


def test_what_is_left_out_of_a_zip_and_of_shards(tmp_path, capsys):
  files = pictures(3)
  hidden = {"__MACOSX/._a.png": b"x", ".cache/b.png": b"x", "notes.TXT": b"x", "sub/": b""}
  path = write_zip(tmp_path / "x.zip", files | hidden)
  with zipfile.ZipFile(path, "a") as archive:
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    archive.writestr(link, "ape/00.png")
  assert len(open_source(f"zip:{path}")) == 3
  told = "3 images; left out: 1 file of another format (.txt 1), 1 hidden file, 1 hidden folder, 1 link\n"
  assert capsys.readouterr().err == f"zip:{path}: {told}"
  members = [*files.items(), ("._x.png", b"x"), ("y.txt", b"x"), ("./z.png", files["ape/00.png"])]
  write_tar(tmp_path / "0.tar", members)
  source = open_source(f"webdataset:{tmp_path}/*.tar")
  assert len(source) == 4
  assert capsys.readouterr().err.endswith("4 images; left out: 1 hidden file, 1 example without an image\n")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_long_and_foreign_names(tmp_path, form, compression):
  long = "/".join(["x" * 60] * 3)  # longer than a header of a tar holds, but for ustar's prefix
  files = {f"ä/{long}/ü.png": encoded(np.full((4, 4), 1, np.uint8)), "b/é è.PNG": encoded(np.full((4, 4), 2, np.uint8))}
  files = dict(sorted(files.items()))
  prints = [open_source(write("folder", tmp_path, files)).fingerprint]
  write_zip(tmp_path / "x.zip", files, compression)
  write_tar(tmp_path / "x.tar", files.items(), form)
  prints += [
    open_source(f"{kind}:{tmp_path}/x.{suffix}").fingerprint for kind, suffix in (("zip", "zip"), ("webdataset", "tar"))
  ]
  assert prints[0] == prints[1] == prints[2]


def test_splits_of_parquet_files(tmp_path):
  files = pictures(12)
  names, labels = classes(files)
  root = tmp_path / "data"
  for number, split in enumerate(["train", "train", "test"]):
    part = dict(list(files.items())[4 * number : 4 * number + 4])
    write_parquet(root / f"{split}-0000{number}-of-00002.parquet", part, names, labels[4 * number : 4 * number + 4])
  data = DataConfig(dataset=f"parquet:{root}")
  assert [sources.has_split(data, name) for name in ("train", "test", "validation")] == [True, True, False]
  listed = {}
  for split in ("train", "test", "train+test", "test[:50%]"):
    source = sources.open_source(dataclasses.replace(data, split=split))
    listed[split] = len(source)
  assert listed == {"train": 8, "test": 4, "train+test": 12, "test[:50%]": 2}
  test = open_source(f"parquet:{root}", split="test")
  assert test.fingerprint["dataset"] == "folder test"
  assert len(open_source(f"parquet:{root}/train-*.parquet")) == 8
  assert len(open_source(f"parquet:{root}/test-00002-of-00002.parquet")) == 4
  with pytest.raises(UserError, match=r"split: 'validation' is no part of a parquet .* use 'test' or slices of it"):
    open_source(f"parquet:{root}", split="validation")
  words = tmp_path / "words"
  for name in ("my_train", "sub/val"):
    (words / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / "test-00002-of-00002.parquet", words / f"{name}.parquet")
  assert len(open_source(f"parquet:{words}", split="validation")) == 4


def test_parquet_with_several_columns(tmp_path):
  files = pictures(3)
  images = [{"bytes": content, "path": name} for name, content in files.items()]
  flat = pa.array(list(files.values()), pa.binary())
  pq.write_table(pa.table({"left": images, "right": images[::-1], "id": [1, 2, 3]}), tmp_path / "two.parquet")
  pq.write_table(pa.table({"jpg": flat, "kind": ["b", "a", "b"], "label": [3, 3, 3]}), tmp_path / "flat.parquet")
  right = open_source(f"parquet:{tmp_path}/two.parquet", image_field="right")
  left = open_source(f"parquet:{tmp_path}/two.parquet", image_field="left", cache_gib=0.0)
  np.testing.assert_array_equal(right.read(np.arange(3)).images, left.read(np.arange(3)[::-1]).images)
  plain = open_source(f"parquet:{tmp_path}/flat.parquet", label_field="kind")
  np.testing.assert_array_equal(plain.read(np.arange(3)).images, left.read(np.arange(3)).images)
  assert plain.labels().tolist() == [1, 0, 1] and plain.known_classes().names == ("a", "b")


# The index.


@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_index_is_kept_until_something_changes(tmp_path, cache, kind, monkeypatch, capsys):
  files = pictures()
  dataset = write(kind, tmp_path, files)
  counted = []
  read = sources.files.read_headers
  monkeypatch.setattr(
    sources.files, "read_headers", lambda *args, **options: counted.append(1) or read(*args, **options)
  )

  def opened():
    counted.clear()
    found = open_source(dataset, cache_gib=0.0)
    return len(counted), found.fingerprint, found.known_classes()

  first = opened()
  assert first[0] == 1 and opened() == (0, *first[1:])
  kept = next(cache.glob("*.safetensors"))
  whole = kept.read_bytes()
  damaged = bytearray(whole)
  damaged[len(whole) - 9] ^= 1
  for content in (bytes(damaged), whole[:-20], b""):  # a bit is flipped, cut off, empty
    kept.write_bytes(content)
    assert opened() == first and opened()[0] == 0
  changed = dict(list(files.items())[1:])
  dataset = write(kind, tmp_path, changed)
  assert opened()[0] == 1 and len(open_source(dataset)) == 13
  for packed in cache.glob("*.packed"):
    packed.unlink()
    assert opened()[0] == 1
  assert [path.suffix for path in cache.iterdir() if path.name.startswith(".") or path.suffix == ".tmp"] == []
  capsys.readouterr()
  monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
  if kind != "parquet":
    assert opened()[0] == 1 and "will be scanned anew next time" in capsys.readouterr().err


# Bad input.


def cut(path, size):
  os.truncate(path, size)
  return path


def bad_cases(root):
  """Name -> (--dataset, other options, what the error says)."""
  files = pictures(6)
  labels = [[name, 0 if name[:3] == "ape" else 1] for name in files]
  _, numbers = classes(files)

  def zipped(name, content, **options):
    return f"zip:{write_zip(root / f'{name}.zip', content, **options)}"

  def tree(name, **changes):
    return zipped(name, with_json(files, {"labels": labels} | changes))

  def shard(name, members):
    return f"webdataset:{write_tar(root / name / '0.tar', members)}"

  def table(name, columns, metadata=None):
    (root / name).mkdir()
    columns = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(columns.replace_schema_metadata(metadata), root / name / "x.parquet")
    return f"parquet:{root / name}"

  encrypted = write_zip(root / "encrypted.zip", files)
  content = bytearray(encrypted.read_bytes())
  for match in re.finditer(b"PK\1\2", bytes(content)):
    content[match.start() + 8] |= 1
  encrypted.write_bytes(content)
  twice = write_zip(root / "twice.zip", files)
  with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(twice, "a") as archive:
    archive.writestr("ape/00.png", b"x")
  tail = write_tar(root / "tail.tar", packing.examples(files, numbers))
  end = write_tar(root / "end.tar", packing.examples(files, numbers))
  cut(end, -(-len(end.read_bytes().rstrip(b"\0")) // 512) * 512)  # all of it but the zeros
  mid = write_tar(root / "mid.tar", packing.examples(files, numbers))
  content = bytearray(mid.read_bytes())
  content[2048:2100] = b"?" * 52
  mid.write_bytes(content)
  whole = write_zip(root / "whole.zip", files, zipfile.ZIP_STORED).read_bytes()

  def directory(name, **values):
    """The zip with other bytes in its directory's second entry: `at_N` names their place."""
    path, content = root / f"{name}.zip", bytearray(whole)
    start = [match.start() for match in re.finditer(b"PK\1\2", whole)][1]
    for at, value in values.items():
      at = start + int(at.removeprefix("at_"))
      content[at : at + len(value)] = value
    path.write_bytes(content)
    return f"zip:{path}"

  def backwards(content):
    """A tar whose first file has a size below 0."""
    header = bytearray(content[:512])
    header[124:136], header[148:156] = b"\xff" * 12, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]

  deep = b"[" * 10**5
  minus = write_tar(root / "minus.tar", [("b.png", files["ape/00.png"]), ("a.png", files["ape/00.png"])])
  minus.write_bytes(backwards(minus.read_bytes()))
  (root / "blank").mkdir()
  (root / "blank" / "0.tar").write_bytes(b"")
  named = shard("named", packing.examples(files, numbers))
  (root / "named" / "classes.json").write_bytes(deep)
  same = shard("same", packing.examples(files, numbers))
  (root / "same" / "classes.json").write_text('["ape", "ape", "cow"]')
  (root / "x.tar.gz").write_bytes(b"\x1f\x8b1234")
  (root / "text.tar").write_bytes(b"no tar" * 300)
  (root / "text.parquet").write_bytes(b"no parquet" * 300)
  kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
  unread = pa.array([{"bytes": None, "path": "/x.png"}], kind)
  image = [{"bytes": content, "path": name} for name, content in files.items()]
  no_text = pa.StringArray.from_buffers(1, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff"))
  return {
    "no zip": (f"zip:{root}/none.zip", {}, "is no file; use zip:PATH"),
    "no emoji": (f"zip:{root}/emoji64.zip", {}, "is no file; emoji64.zip is made by experiments/make_emoji.py"),
    "text": (f"zip:{root}/text.tar", {}, "is no whole zip"),
    "cut zip": (f"zip:{cut(write_zip(root / 'cut.zip', files), 900)}", {}, r"is no whole zip \(.*; copy it again"),
    "empty zip": (zipped("empty", {"notes.txt": b"x"}), {}, r"holds no .*, only 1 file of another format; name a zip"),
    "latents": (zipped("npy", {"00000/a.npy": b"x"}), {}, r"holds arrays such as '00000/a.npy' .* which are no images"),
    "outside": (zipped("outside", files | {"../../x.png": b"x"}), {}, r"leads outside, '\.\./\.\./x\.png'"),
    "absolute": (zipped("absolute", files | {"/x.png": b"x"}), {}, "leads outside, '/x.png'"),
    "encrypted": (f"zip:{encrypted}", {}, r"is encrypted \('ape/00.png'\)"),
    "twice": (f"zip:{twice}", {}, "has two entries 'ape/00.png'"),
    "bzip2": (
      zipped("bz", files, compression=zipfile.ZIP_BZIP2),
      {},
      "'ape/00.png' compressed by bzip2; pack it again",
    ),
    "missing": (tree("missing", labels=labels[1:]), {"only": "0"}, "has no label for ape/00.png"),
    "unknown": (tree("unknown", labels=[*labels, ["z.png", 1]]), {"only": "0"}, "a label for z.png, which is no image"),
    "float": (tree("float", labels=[*labels[1:], [labels[0][0], 0.5]]), {"only": "0"}, "class 0.5, not a whole number"),
    "negative": (
      tree("minus", labels=[*labels[1:], [labels[0][0], -1]]),
      {"only": "0"},
      "class -1, not a whole number",
    ),
    "shape": (tree("shape", labels={"a": 1}), {"only": "0"}, "has no list of"),
    "no json": (zipped("nojson", files | {"dataset.json": b"{"}), {"only": "0"}, "is not JSON"),
    "disagree": (
      tree("both", labels=[[n, i % 2] for i, (n, _) in enumerate(labels)]),
      {"only": "0"},
      "folders disagree",
    ),
    "other names": (tree("names", label_names=["x", "bee"]), {"only": "0"}, "disagree: ape holds the class x"),
    "merged": (tree("merged"), {"only": "0"}, "two folders hold one class"),
    "folder too": (
      f"folder:{write_folder(root / 'disagree', with_json(files, {'labels': [[n, 0] for n in files]}))}",
      {"only": "0"},
      "disagree",
    ),
    "no labels": (
      zipped("plain", {"a.png": files["ape/00.png"]}),
      {"only": "0"},
      "only: '0' chooses by class, and zip",
    ),
    "no shard": (f"webdataset:{root}/none-*.tar", {}, "is no file; use webdataset:GLOB"),
    "one missing": (f"webdataset:{root}/{{0..1}}.tar", {}, r"has no shard .*/0.tar"),
    "no range": (f"webdataset:{root}/{{5..1}}.tar", {}, r"the range \{5\.\.1\} .* is none"),
    "compressed": (f"webdataset:{root}/x.tar.gz", {}, r"is a compressed tar.*decompress it \(gunzip\)"),
    "no tar": (f"webdataset:{root}/text.tar", {}, "is no tar"),
    "tail": (
      f"webdataset:{cut(tail, 512 * 18 + 100)}",
      {},
      r"tail.tar is cut off; the last whole example is .*; copy that shard again, or use --on_bad_record=skip$",
    ),
    "no end": (f"webdataset:{end}", {}, "end.tar is cut off; the last whole example is cow/05; copy"),
    "middle": (f"webdataset:{mid}", {}, "mid.tar is damaged; the last whole example is ape/00;"),
    "two images": (
      shard("pair", [("a.png", files["ape/00.png"]), ("a.jpg", b"x")]),
      {},
      "example a of .* has two images",
    ),
    "no image": (shard("texts", [("a.txt", b"x")]), {}, "holds no .* file, only 1 example without an image"),
    "cls and json": (
      shard("differ", [("a.png", files["ape/00.png"]), ("a.cls", b"1"), ("a.json", b'{"label": 2}')]),
      {"only": "1"},
      "a.cls says 1, and its .json 2",
    ),
    "no parquet": (f"parquet:{root}/nowhere", {}, "holds no .parquet file"),
    "text parquet": (f"parquet:{root}/text.parquet", {}, "is no whole parquet file"),
    "no column": (table("none", {"id": [1], "text": ["x"]}), {}, r"no column of images; it has id \(int64\), text"),
    "two columns": (table("two", {"a": image, "b": image}), {}, "several columns of images, a and b.*--image_field=a$"),
    "other column": (table("other", {"a": image}), {"image_field": "c"}, "'c' is no column of images"),
    "no label": (table("lab", {"a": image}), {"label_field": "c"}, "label_field: 'c' is no column"),
    "paths": (table("paths", {"a": unread}), {}, "holds no images, only paths"),
    "names": (
      table("few", {"image": image, "label": [0, 1, 2, 0, 1, 2]}, features(["a", "b"])),
      {"only": "a"},
      "names 2 classes",
    ),
    "bucket": ("zip:s3://bucket/x.zip", {}, "is an address, and images are read from disk; copy"),
    "a list too deep": (zipped("deep", files | {"dataset.json": deep}), {"only": "0"}, "is not JSON"),
    "zip of a later version": (directory("later", at_6=b"\x63\0"), {}, "is no whole zip .*version 9.9"),
    "name that is no text": (directory("name", at_9=b"\x08", at_46=b"\xff"), {}, "is no whole zip .*utf-8"),
    "behind the end": (
      directory("behind", at_42=b"\xff\xff\xff\x7f"),
      {},
      r"is no whole zip \(ape/03.png is not there\)",
    ),
    "too large": (directory("large", at_20=b"\xfe\xff\xff\xff" * 2), {}, r"is no whole zip \(ape/03.png is not there"),
    "bzip2 of labels": (
      zipped("labels", with_json({}, {"labels": None}) | files, compression=zipfile.ZIP_BZIP2),
      {},
      "'dataset.json' compressed by bzip2; pack it again",
    ),
    "size below 0": (f"webdataset:{minus}", {}, "is damaged; it has no whole example; copy that shard again$"),
    "empty shard": (f"webdataset:{root}/blank", {}, r"is no tar \(empty file\).*; copy that shard again$"),
    "empty shard, skip": (f"webdataset:{root}/blank", {"on_bad_record": "skip"}, r"is no tar \(empty file\)"),
    "dots": (
      shard("dots", [("a.1.png", files["ape/00.png"]), ("b.txt", b"x")]),
      {},
      "only 1 image with a second dot in its name, 1 example without an image;",
    ),
    "twice in an example": (shard("again", [("a.png", b"x"), ("a.PNG", b"y")]), {}, "example a of .* two files a.PNG;"),
    "json too deep": (
      shard("deeper", [("a.png", files["ape/00.png"]), ("a.json", deep)]),
      {"only": "0"},
      "a.json cannot be read",
    ),
    "names too deep": (named, {"only": "0"}, "classes.json cannot be read"),
    "one name for two": (same, {"only": "cow,ape"}, "'ape' names several classes of .*, 0 and 1; use the number"),
    "no such field": (
      shard("fields", [("a.png", files["ape/00.png"]), ("a.json", b'{"label": 1}')]),
      {"label_field": "kind", "only": "1"},
      "no .json of .* has a field 'kind'",
    ),
    "no rows": (table("rows", {"image": pa.array([], kind)}), {}, "has no rows"),
    "nested": (table("nested", {"image": [{"bytes": {"bytes": b"x"}}]}), {}, "no column of images"),
    "column twice": (
      table("cc", pa.Table.from_arrays([pa.array(image)] * 2, ["a", "a"])),
      {},
      "two columns of one name",
    ),
    "dates": (
      table("dates", {"image": image, "label": pa.array([1] * 6, pa.timestamp("ns"))}),
      {"only": "0"},
      r"'label' of .* is timestamp\[ns\]; name one of",
    ),
    "paths that are no text": (
      table("pp", pa.Table.from_arrays([pa.StructArray.from_arrays([[b"x"], no_text], ["bytes", "path"])], ["image"])),
      {},
      "is no whole parquet file",
    ),
    "field": (f"folder:{root}", {"label_field": "x"}, "label_field: x has no effect with dataset=folder"),
  }


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, cache):
  (tmp_path / "data").mkdir()
  wrong = {}
  for name, (dataset, options, match) in bad_cases(tmp_path / "data").items():
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    try:
      from ddpm_jax import config as config_lib

      config = config_lib.override(config_lib.Config(), {"dataset": dataset, **options})
      sources.open_source(config.data)
      wrong[name] = "no error"
    except UserError as error:
      if "\n" in str(error) or not re.search(match, str(error)):
        wrong[name] = str(error)
    if before != {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}:
      wrong[name] = "wrote"
  assert wrong == {}


def test_sizes_that_no_file_has(tmp_path):
  """A zip64 may say 2**64 - 1 bytes: neither memory nor numbers end with it."""
  name, content = "a.png", encoded(np.zeros((4, 4), np.uint8))
  local = struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 33, zlib.crc32(content), *[len(content)] * 2, len(name), 0)
  body, full = local + name.encode() + content, 2**32 - 1
  for size, stored, start in (
    (2**40, 2**40, 0),
    (2**64 - 1, 2**64 - 1, 0),
    (2**63, len(content), 0),
    (len(content), 9, 2**63),
  ):
    extra = struct.pack("<2H3Q", 1, 24, size, stored, start)
    sizes = struct.pack("<L2L5H2L", zlib.crc32(content), full, full, len(name), len(extra), 0, 0, 0, 0, full)
    entry = struct.pack("<4s6H", b"PK\1\2", 45, 45, 0, 8 if stored != size else 0, 0, 33) + sizes
    entry += name.encode() + extra
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entry), len(body), 0)
    (tmp_path / "x.zip").write_bytes(body + entry + end)
    with pytest.raises(UserError, match=r"is no whole zip \(a.png is not there\)"):
      open_source(f"zip:{tmp_path}/x.zip")


def test_a_zip_of_windows(tmp_path):
  """Its names may have backslashes between folders."""
  files = pictures(4)
  write_zip(tmp_path / "x.zip", {"ape\\": b""} | {name.replace("/", "\\"): content for name, content in files.items()})
  ours, theirs = open_source(f"zip:{tmp_path}/x.zip"), open_source(write("folder", tmp_path, files))
  assert ours.fingerprint == theirs.fingerprint and ours.known_classes() == theirs.known_classes()


def test_columns_of_other_types(tmp_path):
  """Types that other writers choose for the same values; paths and names of classes that are none."""
  files = pictures(6)
  names, labels = classes(files)
  contents = list(files.values())
  right = open_source(f"parquet:{write_parquet(tmp_path / 'right.parquet', files, names, labels)}")
  for number, (images, kinds, says) in enumerate(
    (
      (pa.array(contents, pa.binary_view()), labels, names),
      (pa.array(contents).dictionary_encode(), pa.array([names[i] for i in labels]).dictionary_encode(), None),
      ([{"bytes": content, "path": i} for i, content in enumerate(contents)], labels, [1, 2, 3]),
    )
  ):
    table = pa.table({"a.b": images, "label": kinds})
    table = table.replace_schema_metadata(features(says) if says else {"huggingface": '{"info": {"features": [1]}}'})
    pq.write_table(table, tmp_path / f"{number}.parquet")
    for options in ({}, {"cache_gib": 0.0}):
      source = open_source(f"parquet:{tmp_path}/{number}.parquet", **options)
      np.testing.assert_array_equal(source.read(np.arange(6)).images, right.read(np.arange(6)).images)
      assert source.labels().tolist() == labels
      assert source.known_classes().names == (("0", "1", "2") if says == [1, 2, 3] else tuple(names))


def test_no_room_to_pack_into(tmp_path):
  """It is the cache that is full, and nothing is wrong with the file that is read."""
  image = [{"bytes": bytes(2**21), "path": "x.png"}] * 2
  pq.write_table(pa.table({"image": image}), tmp_path / "x.parquet")
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
  try:
    with pytest.raises(UserError, match=r"cannot be packed into .* \(File too large\); make room there"):
      open_source(f"parquet:{tmp_path}/x.parquet", cache_gib=0.0)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_may_not_be_read_is_told_as_such(tmp_path, monkeypatch):
  """The tests may run as root, who may read everything."""

  def refuse(path, *_, **__):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

  pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "x.parquet")
  with monkeypatch.context() as patch:
    patch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(UserError, match=r"x.parquet cannot be read \(Permission denied\); make it readable"):
      open_source(f"parquet:{tmp_path}/x.parquet")
  monkeypatch.setattr(os, "listdir", refuse)
  for dataset in ("zip:{}/a.zip", "webdataset:{}/*.tar", "webdataset:{}", "parquet:{}/none", "folder:{}/none"):
    with pytest.raises(UserError, match=rf"is not found: {tmp_path} cannot be listed \(Permission denied\)"):
      open_source(dataset.format(tmp_path))


def test_an_empty_shard_among_others_is_skipped(tmp_path, capsys):
  files = pictures(4)
  write_tar(tmp_path / "0.tar", files.items())
  (tmp_path / "1.tar").write_bytes(b"")
  with pytest.raises(UserError, match=r"1.tar is no tar \(empty file\); .*, or use --on_bad_record=skip$"):
    open_source(f"webdataset:{tmp_path}")
  assert len(open_source(f"webdataset:{tmp_path}", on_bad_record="skip")) == 4
  assert "1.tar is no tar (empty file); it has no whole example" in capsys.readouterr().err


def test_a_cut_shard_gives_its_whole_examples(tmp_path, capsys):
  """Cut at every block: never an image that is not whole, never a label of another."""
  files = pictures(6)
  _, numbers = classes(files)
  path = write_tar(tmp_path / "x.tar", packing.examples(files, numbers))
  whole, right = path.read_bytes(), dict(zip(files, numbers, strict=True))
  seen = set()
  for size in range(512 * 5, len(whole) - 9000, 256):
    path.write_bytes(whole[:size])
    source = open_source(f"webdataset:{path}", on_bad_record="skip", cache_gib=0.0)
    rows = source.read(np.arange(len(source)))
    assert not rows.replaced.any()
    seen.add(len(source))
    for name, pixels, label in zip(files, rows.images, source.labels() if len(source) > 3 else [], strict=False):
      with Image.open(io.BytesIO(files[name])) as image:
        np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))
      assert label == right[name]
  assert seen >= {1, 2, 3, 4, 5}
  assert "is cut off; the last whole example is" in capsys.readouterr().err


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_entry_of_a_zip_with_another_checksum_is_bad(tmp_path, compression, capsys):
  """Pillow would decode most of these JPEGs to other pixels without a word."""
  files = {f"{i}.jpg": encoded(np.full((16, 16, 3), 9 * i, np.uint8), "jpg") for i in range(4)}
  path = write_zip(tmp_path / "x.zip", files, compression)
  source = open_source(f"zip:{path}", cache_gib=0.0, on_bad_record="skip")
  with zipfile.ZipFile(path) as archive:
    places = [(entry.header_offset, entry.compress_size) for entry in archive.infolist()]
  content = bytearray(path.read_bytes())
  content[places[2][0] + 30 + len("2.jpg") + places[2][1] - 20] ^= 4
  path.write_bytes(content)
  rows = source.read(np.arange(4))
  assert rows.replaced.tolist() == [False, False, True, False] and rows.record.tolist() == [0, 1, 3, 3]
  assert re.search(r"x.zip/2.jpg \(image 2\) (is damaged|cannot be decompressed)", capsys.readouterr().err)


def test_a_shard_that_is_cut_while_it_is_open(tmp_path):
  files = pictures(6)
  dataset = write("webdataset", tmp_path, files)
  source = open_source(dataset, cache_gib=0.0, on_bad_record="skip")
  os.truncate(tmp_path / "shards" / "x-001.tar", 600)
  assert source.read(np.arange(6)).replaced.tolist() == [False] * 3 + [True] * 3
