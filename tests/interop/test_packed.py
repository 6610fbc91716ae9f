"""What we pack, read by the package `webdataset`; what the package `datasets` writes, read here.

pip install -e '.[test,interop]'
python -m pytest tests/interop
"""

import io
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import command
from ddpm_jax.config import DataConfig
from ddpm_jax.data.sources import open_source
from tests.data.packing import classes, pictures, write

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  import datasets
  import webdataset

pytestmark = pytest.mark.filterwarnings("ignore")  # what others warn of is theirs


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_webdataset_reads_our_shards(tmp_path, monkeypatch, capsys):
  """All keys, images and classes, in our order; with the pattern that the command names."""
  files = pictures()
  words = [write("folder", tmp_path, files), f"webdataset:{tmp_path}/shards/x", "--shard_size=5"]
  monkeypatch.setattr(sys, "argv", ["ddpm", "pack", *words])
  assert command.main() == 0
  pattern = capsys.readouterr().out.strip().partition("--dataset=webdataset:")[2]
  found = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8"))
  assert [example["__key__"] for example in found] == [name.rpartition(".")[0] for name in files]
  assert [example["cls"] for example in found] == classes(files)[1]
  for (name, content), example in zip(files.items(), found, strict=True):
    (suffix,) = example.keys() & {"png", "jpg"}
    assert name.endswith(suffix)
    with Image.open(io.BytesIO(content)) as image:
      np.testing.assert_array_equal(example[suffix], np.asarray(image.convert("RGB")))


def test_parquet_that_datasets_wrote(tmp_path):
  """Its images, names and classes are those of the folder that `datasets` was given."""
  files = pictures()
  folder = write("folder", tmp_path, files)
  names, labels = classes(files)
  features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
  images = [{"bytes": content, "path": name} for name, content in files.items()]
  datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(tmp_path / "x.parquet")
  ours, right = (open_source(DataConfig(dataset=name)) for name in (f"parquet:{tmp_path}/x.parquet", folder))
  assert ours.fingerprint == right.fingerprint and ours.known_classes() == right.known_classes()
  np.testing.assert_array_equal(ours.labels(), labels)
