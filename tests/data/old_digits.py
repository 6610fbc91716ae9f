"""The digits as releases up to 0.1.0 had them: prepared by TFDS in a folder. What is embedded now must be the same."""

import csv
import gzip
import io
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

FILE = pathlib.Path(__file__).parents[2] / "ddpm_jax" / "data" / "digits" / "optdigits.csv.gz"


class OldDigits(tfds.core.GeneratorBasedBuilder):
  """A prepared data set for tests: it writes PNG bytes, so that preparing it needs no TensorFlow."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
          "label": tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=("image", "label"),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    with gzip.open(FILE, "rt", newline="") as file:
      for row, values in enumerate(csv.reader(file)):
        *counts, label = map(int, values)
        pixels = np.round(np.array(counts) * 255 / 16).astype(np.uint8).reshape(8, 8)
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        yield row, {"image": png.getvalue(), "label": label}


class Digits(OldDigits):
  """Under the name that they had."""
