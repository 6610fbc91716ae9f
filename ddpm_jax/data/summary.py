"""Sizes and classes of a data set in some words: `--mode=train` says them, and `ddpm_jax.data.inspect`."""

from __future__ import annotations

from collections.abc import Sequence

from ddpm_jax.config import DataConfig, height_and_width
from ddpm_jax.data.sources import Source
from ddpm_jax.runtime import console

_MOST_CLASSES = 20


def classes_text(names: Sequence[str], counts: Sequence[int], most: int = _MOST_CLASSES) -> str:
  """Classes with the images that each has, `most` of them, in their order; counts may be empty: not known."""
  names = [console.one_line(name) for name in names]
  shown = [f"{name} {count:,}" for name, count in zip(names, counts, strict=True)] if len(counts) else names
  return f"{len(names)}: {', '.join(shown[:most])}{', ...' * (len(shown) > most)}"


def way_text(data: DataConfig, stored: str) -> str:
  """What happens to stored images on their way into a batch; empty if nothing does."""
  parts = []
  if data.image_size and stored != "x".join(map(str, height_and_width(data.image_size))):
    crop = [f"--crop={data.crop}"] if data.resize == "crop" else []
    parts.append(" ".join([f"--resize={data.resize}", *crop, f"--resample={data.resample}"]))
  return ", ".join([*parts, *["mirrored at random"] * data.random_flip])


def two_lines(source: Source, data: DataConfig) -> str:
  """What is known of the images without reading more of them: sizes and what becomes of them, and classes."""
  height, width, channels = source.image_shape
  way, known = way_text(data, source.stored), source.known_classes()
  stored = f"{source.stored or 'images'}, {'grey' if channels == 1 else 'colour'}"
  became = f" -> {height}x{width}{f' ({way})' * bool(way)}" if source.stored != f"{height}x{width}" or way else ""
  labels = f"  classes: {classes_text(known.names, known.counts, 10)}" if known.names else "  no classes"
  return f"data: {stored}{became}\n{labels}"
