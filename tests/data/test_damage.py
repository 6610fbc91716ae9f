"""Prepared data sets whose files are damaged: what is said of them, and what takes the place of a bad record."""

import contextlib
import itertools
import resource
import shutil

import numpy as np
import pytest
from array_record.python import array_record_module

from ddpm_jax.config import DataConfig
from ddpm_jax.data import pipeline, prepare, prepared, sources
from ddpm_jax.errors import RunError, UserError
from tests.data import old_digits  # noqa: F401  TFDS knows the data set once this is imported

N = 1797
SHARD = "old_digits-train.array_record-00000-of-00001"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A folder with the digits, and their pixels."""
  folder = tmp_path_factory.mktemp("whole")
  prepare.prepare(DataConfig(dataset="old_digits", data_dir=str(folder)))
  pixels = sources.open_source(DataConfig(dataset="old_digits", data_dir=str(folder))).read(np.arange(N)).images
  assert len(np.unique(pixels.reshape(N, -1), axis=0)) == N
  return folder, pixels


@pytest.fixture
def copy(whole, tmp_path):
  """A data_dir of its own to be damaged, and its shard."""
  shutil.copytree(whole[0], tmp_path / "data")
  return tmp_path / "data", tmp_path / "data" / "old_digits" / "1.0.0" / SHARD


def open_source(folder, **options):
  return sources.open_source(DataConfig(dataset="old_digits", data_dir=str(folder), **options))


def exchange(shard, replacements):
  """Writes the shard anew, with other bytes for some of its records."""
  reader = array_record_module.ArrayRecordReader(str(shard))
  records = reader.read_all()
  reader.close()
  for index, content in replacements.items():
    records[index] = content
  writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def refuse(folder, match, **options):
  with pytest.raises(UserError, match=match) as caught:
    open_source(folder, **options)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_a_flipped_byte_costs_one_record(copy, whole, capsys, cache_gib):
  folder, shard = copy
  with shard.open("r+b") as file:
    file.seek(200_000)
    (byte,) = file.read(1)
    file.seek(200_000)
    file.write(bytes([byte ^ 0xFF]))
  rows = open_source(folder, cache_gib=cache_gib, on_bad_record="skip").read(np.arange(N))
  (bad,) = np.flatnonzero((rows.images != whole[1]).any((1, 2, 3)))
  assert 0 < bad < N - 1
  np.testing.assert_array_equal(rows.images[bad], whole[1][bad + 1])
  np.testing.assert_array_equal(np.flatnonzero(rows.replaced), [bad])
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"skipped: image {bad} of old_digits, train (record {bad} of {shard}) cannot be read (")
  refuse(
    folder, rf"^dataset: image {bad} of old_digits, train \(record {bad} of {shard}\) cannot be read .*; move .* away"
  )


def test_the_record_is_found_in_a_sum_of_slices(copy, whole, capsys):
  folder, shard = copy
  exchange(shard, {3: b"", 1792: b"", 1795: b"\xff\xffno example"})
  split = "train[:10]+train[-5:]"
  source = open_source(folder, split=split, on_bad_record="skip")
  rows = source.read(np.arange(15))
  np.testing.assert_array_equal(np.flatnonzero(rows.replaced), [3, 10, 13])
  told = [line.partition(SHARD)[0].split() for line in capsys.readouterr().err.splitlines()]
  assert [(words[2], words[-3]) for words in told] == [("3", "3"), ("10", "1792"), ("13", "1795")]
  places = [0, 1, 2, 4, 4, 5, 6, 7, 8, 9, 1793, 1793, 1794, 1796, 1796]
  np.testing.assert_array_equal(rows.images, whole[1][places])
  refuse(folder, r"image 3 of old_digits, train\[:10\].*\(record 3 of .*\) is empty", split=split)
  refuse(folder, r"image 0 of old_digits, train\[-5:\] \(record 1792 of .*\) is empty", split="train[-5:]")


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_shard_that_is_cut_short_or_gone(copy, damage):
  folder, shard = copy
  content = shard.read_bytes()
  shard.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
  if damage == "gone":
    shard.unlink()
  for cache_gib in (0.0, 1.0):
    refuse(folder, rf"image 0 of old_digits, train \(record 0 of {shard}\) cannot be read", cache_gib=cache_gib)
    refuse(folder, "too many images of old_digits are bad, 101 in a row", cache_gib=cache_gib, on_bad_record="skip")


def test_a_shard_that_is_cut_short_while_it_is_open(copy, whole):
  """Its reader gives empty records then, not errors."""
  folder, shard = copy
  source = open_source(folder, cache_gib=0.0)
  with shard.open("r+b") as file:
    file.truncate(100_000)
  np.testing.assert_array_equal(source.read(np.arange(9)).images, whole[1][:9])
  with pytest.raises(UserError, match=r"image 1700 of old_digits, train \(record 1700 of"):
    source.read(np.array([0, 1700]))


def test_batches_say_where_a_bad_record_was(copy, whole):
  folder, shard = copy
  indices = pipeline.order(N, batch_size=8, seed=0)
  bad = int(indices[2][5])
  exchange(shard, {bad: b"\xff\xffno example"})
  source = open_source(folder, cache_gib=0.0, on_bad_record="skip")
  with contextlib.closing(pipeline.batches(source, batch_size=8, seed=0, start_step=0)) as stream:
    batches = list(itertools.islice(stream, 4))
  np.testing.assert_array_equal(np.argwhere([batch["replaced"] for batch in batches]), [[2, 5]])
  np.testing.assert_array_equal(batches[2]["image"][5], whole[1][(bad + 1) % N])


def test_the_label_of_a_bad_record(copy, whole):
  """It is that of the next good one, of which also the image is."""
  folder, shard = copy
  right = open_source(whole[0]).labels()
  places = np.arange(N)
  places[[3, 4, 700, N - 1]] = [5, 5, 701, 0]
  exchange(shard, dict.fromkeys([3, N - 1], b"") | dict.fromkeys([4, 700], b"\xff\xffno example"))
  for cache_gib in (0.0, 1.0):
    source = open_source(folder, cache_gib=cache_gib, on_bad_record="skip")
    np.testing.assert_array_equal(source.labels(), right[places])
    np.testing.assert_array_equal(source.read(np.arange(N)).images, whole[1][places])


def test_a_bad_record_has_no_label(copy):
  folder, shard = copy
  source = open_source(folder)
  exchange(shard, {700: b"", 1000: b""})
  with pytest.raises(
    UserError, match=rf"^dataset: image 700 of old_digits, train \(record 700 of {shard}\) is empty; move"
  ):
    source.labels()


def test_a_process_out_of_file_handles_skips_nothing(copy):
  """A data set of a thousand shards needs a thousand."""
  data = DataConfig(dataset="old_digits", data_dir=str(copy[0]), on_bad_record="skip")
  prepared.open_prepared(data).fetch([0])  # whatever is imported or opened once
  encoded = prepared.open_prepared(data)
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
  try:
    with pytest.raises(RunError, match=r"record 0 of .* cannot be opened .*Too many open files"):
      encoded.fetch([0])
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
  assert isinstance(prepared.open_prepared(data).fetch([0])[0], bytes)


def test_a_damaged_description_is_named(copy):
  folder, shard = copy
  info = shard.parent / "dataset_info.json"
  info.write_bytes(info.read_bytes()[:300])
  refuse(
    folder, rf"data_dir: the files that describe 'old_digits' in {folder} are damaged .* move the folder of old_digits"
  )
