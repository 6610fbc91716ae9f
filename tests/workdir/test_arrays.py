"""Files of arrays: what was written comes back, and nothing else ever does."""

import json

import numpy as np
import pytest
import safetensors.numpy

from ddpm_jax.workdir.arrays import UnusableError, load_arrays, save_arrays

ARRAYS = {
  "mean": np.array([1 / 3, -0.0, 1e300, np.nan]),
  "index": np.arange(5) * 2**40,
  "features": np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32),
  "none": np.empty((0, 4), np.float32),
  "one": np.array(7, np.int32),
}
FACTS = {"count": 12, "of": '[1, "x"]'}


@pytest.fixture
def path(tmp_path):
  save_arrays(tmp_path / "a" / "b" / "file.safetensors", ARRAYS, FACTS)
  return tmp_path / "a" / "b" / "file.safetensors"


def same(found, wanted):
  return found.keys() == wanted.keys() and all(
    found[name].dtype == wanted[name].dtype
    and found[name].shape == wanted[name].shape
    and found[name].tobytes() == wanted[name].tobytes()
    for name in wanted
  )


def test_round_trip(path):
  arrays, facts = load_arrays(path)
  assert same(arrays, ARRAYS) and facts == FACTS
  assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_replaced_as_a_whole(path):
  save_arrays(path, {"other": np.ones(2)}, {})
  arrays, facts = load_arrays(path)
  assert same(arrays, {"other": np.ones(2)}) and facts == {}


def test_arrays_that_are_not_contiguous(tmp_path):
  wanted = np.arange(12.0).reshape(3, 4)
  save_arrays(tmp_path / "file", {"x": wanted.T}, {})
  assert same(load_arrays(tmp_path / "file")[0], {"x": np.ascontiguousarray(wanted.T)})


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
def test_any_changed_byte_is_noticed(path, mask):
  """In the length, the header, the facts, the digest or the arrays; or it changes nothing, as a space does."""
  whole = path.read_bytes()
  noticed = 0
  for place in range(len(whole)):
    path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
    try:
      arrays, facts = load_arrays(path)
    except UnusableError as error:
      noticed += len(str(error).splitlines()) == 1
    else:
      assert same(arrays, ARRAYS) and facts == FACTS, f"byte {place}"
  assert noticed > 0.9 * len(whole)


def test_a_file_that_was_cut_short(path):
  whole = path.read_bytes()
  for length in [*range(40), *range(40, len(whole), 7), len(whole) - 1]:
    path.write_bytes(whole[:length])
    with pytest.raises(UnusableError):
      load_arrays(path)


def test_other_files(path, tmp_path):
  with pytest.raises(FileNotFoundError):
    load_arrays(tmp_path / "nothing")
  with pytest.raises(UnusableError):
    load_arrays(tmp_path)
  path.write_text("no such format")
  with pytest.raises(UnusableError, match="no whole safetensors file"):
    load_arrays(path)
  for metadata in (None, {"facts": json.dumps(FACTS)}, {"sha256": "0" * 64}):
    path.write_bytes(safetensors.numpy.save({"x": np.ones(2)}, metadata))
    with pytest.raises(UnusableError, match="not hold what was written"):
      load_arrays(path)
