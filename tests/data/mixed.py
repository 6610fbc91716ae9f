"""Data sets of TFDS whose images are not all encoded alike, and not in the colours that the data set says."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

CONFIGS = ("colour", "grey", "half")


def _encoded(pixels, kind, **options):
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, kind, **options)
  return stream.getvalue()


class Mixed(tfds.core.GeneratorBasedBuilder):
  """Twelve images of random pixels, 8 x 8, with a class, and one split in which some have none.

  Those of `colour` are all grey and count as RGB, those of `grey` are RGB and count as grey, and those of `half` are
  both, of formats that have no usual suffix among them.
  """

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name, description=name) for name in CONFIGS]  # noqa: RUF012

  def _info(self):
    channels = 1 if self.builder_config.name == "grey" else 3
    features = {
      "image": tfds.features.Image(shape=(None, None, channels)),
      "label": tfds.features.ClassLabel(names=["b/c", "a", "of no image"]),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    del dl_manager
    return {"train": self._generate_examples([0, 1]), "test": self._generate_examples([0, -1])}

  def _generate_examples(self, labels):
    random = np.random.default_rng(0)
    for i in range(12):
      other, *more = random.integers(0, 256, (3, 8, 8, 3), np.uint8)
      kind, options = ("PNG", "JPEG", "TGA", "WEBP", "MPO")[i % 5], {}
      if self.builder_config.name != "half":
        kind = ("PNG", "JPEG")[i % 2]
      elif kind == "MPO":  # as some cameras make them
        options = {"save_all": True, "append_images": [Image.fromarray(image) for image in more]}
      grey = {"colour": True, "grey": False, "half": kind in ("PNG", "TGA")}[self.builder_config.name]
      file = _encoded(other[..., 0] if grey else other, kind, **options)
      yield i, {"image": file, "label": labels[i % 2]}
