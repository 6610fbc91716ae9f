"""Files of tensors: whole or refused, and every number as it was."""

import json

import numpy as np
import pytest
import safetensors.numpy

from ddpm_jax.weights.tensors import read_facts, read_tensors, write_tensors
from ddpm_jax.workdir.arrays import UnusableError

ARRAYS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.float32([-0.0, 1e-42, np.finfo(np.float32).max])}
FACTS = {"step": 3, "name": "é"}


@pytest.fixture
def path(tmp_path):
  write_tensors(tmp_path / "x.safetensors", ARRAYS, FACTS)
  return tmp_path / "x.safetensors"


def refusal(path) -> str:
  with pytest.raises(UnusableError) as caught:
    read_tensors(path)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_round_trip(path):
  arrays, facts = read_tensors(path)
  assert set(arrays) == set(ARRAYS) and facts == FACTS == read_facts(path)
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(arrays[name].view(np.uint32), array.view(np.uint32))


def test_what_is_written_is_plain_safetensors(path):
  theirs = safetensors.numpy.load(path.read_bytes())
  assert all(np.array_equal(theirs[name], array) for name, array in ARRAYS.items())
  transposed = ARRAYS["b"].T  # not in C order
  write_tensors(path, {"t": transposed}, {})
  np.testing.assert_array_equal(safetensors.numpy.load(path.read_bytes())["t"], transposed)


def test_half_precision_is_widened(tmp_path):
  values = np.float32([1.0, -2.5, 3.140625])
  header = json.dumps({"x": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
  upper = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
  (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + upper)
  np.testing.assert_array_equal(read_tensors(tmp_path / "x").arrays["x"], values)
  (tmp_path / "x").write_bytes(safetensors.numpy.save({"x": values.astype(np.float16)}))
  np.testing.assert_array_equal(read_tensors(tmp_path / "x").arrays["x"], values.astype(np.float16))


def test_every_cut_is_found(path):
  whole = path.read_bytes()
  for length in range(0, len(whole), 7):
    path.write_bytes(whole[:length])
    assert "is no whole safetensors file" in refusal(path)
  path.write_bytes(whole + b"\0")
  assert "is no whole safetensors file" in refusal(path)


def test_every_flipped_bit_is_found(path):
  """In the header, the facts or the numbers; a flip that leaves the meaning as it was may pass."""
  whole = path.read_bytes()
  for position in range(len(whole)):
    changed = bytearray(whole)
    changed[position] ^= 1 << position % 8
    path.write_bytes(changed)
    try:
      arrays, facts = read_tensors(path)
    except UnusableError:
      continue
    assert facts == FACTS and set(arrays) == set(ARRAYS)
    for name in ARRAYS:
      np.testing.assert_array_equal(arrays[name].view(np.uint32), ARRAYS[name].view(np.uint32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(path, value):
  write_tensors(path, ARRAYS | {"c": np.float32([0, value])}, {})
  assert refusal(path) == "holds numbers that are not finite, in c"


def test_other_types(path):
  path.write_bytes(safetensors.numpy.save({"x": np.zeros(2, np.float64)}))
  assert refusal(path) == "holds x as F64; only F32, F16 and BF16 are weights"


@pytest.mark.parametrize("begin", [b"PK\x03\x04more", b"\x80\x02more"])
def test_pickles_are_not_opened(path, begin):
  path.write_bytes(begin * 20)
  assert refusal(path).startswith("is a pickle, which is not opened")
  with pytest.raises(UnusableError, match="is a pickle"):
    read_facts(path)


def test_a_file_that_begins_as_pickles_do(path):
  """It begins with the length of its header, of which one in 32 has the lowest byte 0x80."""
  for number in range(0, 256, 8):
    facts = FACTS | {"more": "x" * number}
    write_tensors(path, ARRAYS, facts)
    if path.read_bytes().startswith(b"\x80"):
      break
  assert path.read_bytes().startswith(b"\x80")
  assert read_tensors(path).facts == read_facts(path) == facts


def test_what_cannot_be_read(tmp_path):
  assert refusal(tmp_path / "none") == "cannot be read (No such file or directory)"
  assert refusal(tmp_path) == "cannot be read (Is a directory)"


def test_the_header_alone(path):
  whole = path.read_bytes()
  for text in (b"", b"\0" * 8, whole[:50], b"\xff" * 60):
    path.write_bytes(text)
    with pytest.raises(UnusableError, match="is no whole safetensors file"):
      read_facts(path)
  path.write_bytes(safetensors.numpy.save(ARRAYS))
  assert read_facts(path) == {}
