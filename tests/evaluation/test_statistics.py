"""Files of reference statistics: what is in them, and what is none."""

import io
import json

import numpy as np
import pytest

from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.evaluation.comparison import MOST
from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.moments import add, covariance, no_moments
from ddpm_jax.evaluation.reference import Reference, evenly_spaced
from ddpm_jax.evaluation.statistics import read_statistics, write_statistics

NUMBERS = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
FEATURES = Features("inception", "ab" * 32, {"resize": "clean", "source_sha256": "cd" * 32}, None)
SOURCE = Source(
  "cifar10", (32, 32, 3), 50, DecodedRows(np.zeros((50, 1, 1, 1), np.uint8), np.zeros(50, bool)).take, {"a": 1}
)


def reference(features=NUMBERS) -> Reference:
  return Reference(add(no_moments(features.shape[1]), features), np.arange(len(features)), features)


def test_what_is_written_is_read(tmp_path):
  write_statistics(tmp_path / "a.npz", SOURCE, "train[:50]", FEATURES, reference())
  got, wanted = read_statistics(str(tmp_path / "a.npz")), reference()
  np.testing.assert_array_equal(got.mean, wanted.moments.mean)
  np.testing.assert_array_equal(got.covariance, covariance(wanted.moments))
  np.testing.assert_array_equal(got.features, NUMBERS)
  assert got.features.dtype == np.float32
  assert got.facts["features"] == {
    "name": "inception",
    "identity": "ab" * 32,
    "resize": "clean",
    "source_sha256": "cd" * 32,
  }
  about = {"dataset": "cifar10", "split": "train[:50]", "number": 50, "fingerprint": {"a": 1}}
  assert got.description == {"file": "a.npz", "sha256": got.sha256} | about
  assert got.reference.moments.count == 50
  np.testing.assert_allclose(covariance(got.reference.moments), covariance(wanted.moments), rtol=1e-14)
  write_statistics(tmp_path / "b.npz", SOURCE, "train[:50]", FEATURES, reference())
  assert read_statistics(str(tmp_path / "b.npz")).sha256 == got.sha256, "the same data, the same file"


def test_a_large_set_keeps_as_many_features_as_are_compared(tmp_path):
  many = np.arange(3 * (MOST + 7), dtype=np.float32).reshape(-1, 3)
  write_statistics(tmp_path / "a.npz", SOURCE, "train", FEATURES, reference(many))
  got = read_statistics(str(tmp_path / "a.npz")).features
  np.testing.assert_array_equal(got, many[evenly_spaced(len(many), MOST)])


def test_files_of_others(tmp_path):
  """As `np.savez_compressed` of pytorch-fid and clean-fid writes them."""
  wide = NUMBERS.astype(np.float64)
  mean, sigma = wide.mean(0), np.cov(wide, rowvar=False)
  np.savez_compressed(tmp_path / "fid.npz", mu=mean, sigma=sigma)
  np.savez_compressed(tmp_path / "kid.npz", feats=NUMBERS)
  fid, kid = (read_statistics(str(tmp_path / name)) for name in ("fid.npz", "kid.npz"))
  assert fid.features.shape == (0, 3) and fid.facts == kid.facts == {}
  np.testing.assert_array_equal(kid.features, NUMBERS)
  for got in (fid, kid):
    np.testing.assert_allclose(got.reference.moments.mean, mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(covariance(got.reference.moments), sigma, rtol=1e-6, atol=1e-7)
  assert fid.description == {"file": "fid.npz", "sha256": fid.sha256}


def bad(path, **arrays):
  np.savez(path, **arrays)


def own(path, **facts):
  write_statistics(path, SOURCE, "train", FEATURES, reference())
  with np.load(path) as archive:
    arrays = dict(archive)
  bad(path, **(arrays | {"facts": np.asarray(json.dumps(json.loads(str(arrays["facts"])) | facts))}))


def one_array() -> bytes:
  data = io.BytesIO()
  np.save(data, np.zeros(3))
  return data.getvalue()


EYE = np.eye(3)
BAD = {
  "there is no file": lambda path: None,
  "is no npz file that can be read (Is a directory)": lambda path: path.mkdir(),
  "is no npz file that can be read (No data left in file)": lambda path: path.touch(),
  "is no npz file that can be read": lambda path: path.write_bytes(b"PK\3\4 and so on"),
  "is no npz file that can be read (": lambda path: path.write_text("mu, sigma"),
  "(it is a single array)": lambda path: path.write_bytes(one_array()),
  "has neither mu and sigma nor feats": lambda path: bad(path, mu=np.zeros(3)),
  "(Object arrays cannot be loaded": lambda path: bad(path, mu=np.asarray([{}, 1], object), sigma=EYE),
  "mean and covariance in": lambda path: bad(path, mu=np.zeros(4), sigma=EYE),
  "are not of one length": lambda path: bad(path, mu=np.zeros(3), sigma=EYE, feats=np.zeros((9, 4))),
  "mu in": lambda path: bad(path, mu=np.zeros((1, 3)), sigma=EYE),
  "is int64 [3]": lambda path: bad(path, mu=np.arange(3), sigma=EYE),
  "not finite": lambda path: bad(path, mu=np.full(3, np.nan), sigma=EYE),
  "is not symmetric": lambda path: bad(path, mu=np.zeros(3), sigma=np.triu(np.ones((3, 3)))),
  "of one image": lambda path: bad(path, feats=np.zeros((1, 3))),
  "its facts are none of ours": lambda path: own(path, features=3),
  "of another version": lambda path: own(path, ddpm_jax=2),
}


def test_what_is_no_such_file_is_one_line(tmp_path):
  for i, (message, make) in enumerate(BAD.items()):
    path = tmp_path / f"{i}.npz"
    make(path)
    with pytest.raises(UserError) as caught:
      read_statistics(str(path))
    text = str(caught.value)
    assert text.startswith("reference_stats: ") and message in text and str(path) in text and "\n" not in text, text


def test_a_damaged_file_is_one_line_wherever_it_is_damaged(tmp_path):
  write_statistics(tmp_path / "a.npz", SOURCE, "train", FEATURES, reference())
  data, wanted, refusals = (tmp_path / "a.npz").read_bytes(), read_statistics(str(tmp_path / "a.npz")), []
  for place in range(0, len(data), 3):
    (tmp_path / "b.npz").write_bytes(data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :])
    try:
      got = read_statistics(str(tmp_path / "b.npz"))
    except UserError as error:
      refusals.append(str(error))
    else:  # a byte that nobody reads
      np.testing.assert_array_equal(got.mean, wanted.mean)
  assert len(refusals) > len(data) / 3 / 2 and not any("\n" in text for text in refusals)
  for size in range(0, len(data), 97):
    (tmp_path / "b.npz").write_bytes(data[:size])
    with pytest.raises(UserError, match="reference_stats: "):
      read_statistics(str(tmp_path / "b.npz"))


def test_a_folder_that_takes_nothing_is_one_line(tmp_path):
  with pytest.raises(RunError, match=r"write_reference: cannot write .*a\.npz \(No such file or directory\)"):
    write_statistics(tmp_path / "none" / "a.npz", SOURCE, "train", FEATURES, reference())
