"""A worker's work: reading a folder of images as a plain PyTorch loop does, with Pillow in worker processes.

Needs torch and Pillow, and no JAX.
"""

from __future__ import annotations

import importlib
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import hardware
from ddpm_jax import config as config_lib
from ddpm_jax.errors import UserError


class Pictures:
  """A map-style dataset of the images in a folder: uint8 [H, W, 3]."""

  def __init__(self, folder: pathlib.Path):
    self._files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(self._files[index]) as image:
      return np.asarray(image.convert("RGB"))


def prepare(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str, int], dict[str, Any]]]:
  """Opens the folder.

  Args:
    job: `config`, as JSON, whose data set is a folder of images of one size; `workers`: processes that read.

  Returns:
    Facts, and a function for the cases of `read_work` that read from disk.
  """
  try:
    data: Any = importlib.import_module("torch.utils.data")
  except ModuleNotFoundError as error:
    raise UserError(f"torch_python: this Python has no {error.name}; name one that has it") from error
  config = config_lib.from_json(job["config"])
  _, folder = config_lib.own_images(config.data.dataset) or ("", "")

  def batches() -> Iterator[Any]:
    loader = data.DataLoader(
      Pictures(pathlib.Path(folder)),
      batch_size=config.data.batch_size,
      shuffle=True,
      num_workers=job["workers"],
      persistent_workers=True,
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))  # epoch after epoch

  warm = batches()
  length = len(Pictures(pathlib.Path(folder)))

  def block(case: str, count: int) -> dict[str, Any]:
    first = case.endswith("first pass")
    seconds = images = 0
    for _ in range(count if first else 1):
      if first:
        hardware.forget(config.data.dataset)
      else:
        next(warm)  # the workers read before the clock starts
      began = time.perf_counter()
      stream = batches() if first else warm
      images += sum(len(next(stream)) for _ in range(-(-length // config.data.batch_size) if first else count))
      seconds += time.perf_counter() - began
    return {"seconds": seconds, "images": images}

  return {"images": length, "versions": hardware.versions("torch", "pillow")}, block
