"""The embedded data set `digits`: 1,797 handwritten digits of 8 x 8 pixels, as a TFDS builder."""

from __future__ import annotations

import csv
import gzip
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

_FILE = pathlib.Path(__file__).parent / "optdigits.csv.gz"


class Digits(tfds.core.GeneratorBasedBuilder):
  """Optical Recognition of Handwritten Digits, the test set of 1,797 images.

  Examples are PNG bytes rather than arrays: TFDS encodes arrays with TensorFlow, and stores bytes as they are.
  """

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Handwritten digits, 8 x 8 pixels: the test set of Optical Recognition of Handwritten Digits.",
      homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
      citation="Alpaydin, E. and Kaynak, C. (1998). Optical Recognition of Handwritten Digits. UCI Machine Learning "
      "Repository. doi:10.24432/C50P49",
      license="CC BY 4.0",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
          "label": tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=("image", "label"),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
    del dl_manager  # nothing to download
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row of the file, example)."""
    with gzip.open(_FILE, "rt", newline="") as file:
      for row, values in enumerate(csv.reader(file)):
        *counts, label = map(int, values)
        pixels = np.round(np.array(counts) * 255 / 16).astype(np.uint8).reshape(8, 8)
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        yield row, {"image": png.getvalue(), "label": label}
