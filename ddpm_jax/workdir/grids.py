"""Sample grids as pictures that say what they are of."""

from __future__ import annotations

import io
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

from ddpm_jax.runtime import console
from ddpm_jax.workdir.storage import write_whole

_MARGIN = 2  # pixels between tiles
_STRIP = 14  # pixels, of a caption
_FRAME = (230, 120, 0)
_FACTS = "ddpm_jax"  # the text chunk of a PNG that holds them
_NAME = 240  # pixels of the name of a row, at most
_TILE = 64  # small images are enlarged, by a whole factor, to at least about this many pixels


def image_grid(images: np.ndarray, columns: int | None = None, captions: Sequence[str] | None = None) -> np.ndarray:
  """Tiles images row by row.

  Args:
    images: uint8 [N, H, W, C], C 1 or 3.
    columns: of the grid; by default about as many as rows.
    captions: a text below each, in one line and cut to its width.

  Returns:
    uint8 [height, width, 3] with a thin white margin; small images are enlarged by a whole factor.
  """
  number, height, width, channels = images.shape
  columns = columns or math.ceil(math.sqrt(number))
  rows = math.ceil(number / columns)
  scale = max(1, _TILE // max(height, width))
  images = np.repeat(np.repeat(images, scale, axis=1), scale, axis=2)
  if channels == 1:
    images = np.repeat(images, 3, axis=3)
  if captions is not None:
    images = np.stack([_with_caption(*pair) for pair in zip(images, captions, strict=True)])
    height, width, scale = images.shape[1], images.shape[2], 1
  tall, wide = height * scale + _MARGIN, width * scale + _MARGIN
  grid = np.full((rows * tall + _MARGIN, columns * wide + _MARGIN, 3), 255, np.uint8)
  for i, image in enumerate(images):
    top, left = _MARGIN + i // columns * tall, _MARGIN + i % columns * wide
    grid[top : top + height * scale, left : left + width * scale] = image
  return grid


def _with_caption(image: np.ndarray, caption: str) -> np.ndarray:
  """uint8 [H, W, 3] on a white page, at least as wide as `_TILE`, with a strip for the text below it."""
  height, width, _ = image.shape
  page = Image.new("RGB", (max(width, _TILE), height + _STRIP), "white")
  page.paste(Image.fromarray(image), (0, 0))
  pen = ImageDraw.Draw(page)
  pen.text((0, height + 1), _cut(pen, caption, page.width), fill="black")
  return np.asarray(page)


def _cut(pen: ImageDraw.ImageDraw, text: str, width: int) -> str:
  """A text, of one line, or as much of its beginning as is at most so many pixels wide."""
  whole = text = console.one_line(text)
  while text and pen.textlength(text if text == whole else f"{text}...") > width:
    text = text[:-1]
  return text if text == whole else f"{text}..."


def framed(grid: np.ndarray, chosen: np.ndarray) -> np.ndarray:
  """A grid of `image_grid` with a coloured frame in the margin around the tiles `chosen`, bool [rows, columns]."""
  grid = grid.copy()
  tall, wide = ((side - _MARGIN) // number for side, number in zip(grid.shape, chosen.shape, strict=False))
  for row, column in np.argwhere(chosen):
    top, left = row * tall, column * wide
    tile = grid[top + _MARGIN : top + tall, left + _MARGIN : left + wide].copy()
    grid[top : top + tall + _MARGIN, left : left + wide + _MARGIN] = _FRAME
    grid[top + _MARGIN : top + tall, left + _MARGIN : left + wide] = tile
  return grid


def image_rows(images: np.ndarray, apart: tuple[int, ...] = ()) -> np.ndarray:
  """Tiles images uint8 [rows, columns, H, W, C] as they are arranged, with a wider gap after the columns `apart`.

  Returns:
    uint8 [height, width, 3].
  """
  _, columns, height, width, channels = images.shape
  blocks, first = [], 0
  for last in (*apart, columns - 1):
    block = images[:, first : last + 1]
    blocks.append(image_grid(block.reshape(-1, height, width, channels), columns=block.shape[1]))
    blocks.append(np.full((blocks[0].shape[0], 6 * _MARGIN, 3), 255, np.uint8))
    first = last + 1
  return np.concatenate(blocks[:-1], axis=1)


def image_pairs(images: np.ndarray, others: np.ndarray, columns: int) -> np.ndarray:
  """Tiles images uint8 [N, H, W, C] in rows, below each row those that belong to it, with gaps between the pairs.

  Returns:
    uint8 [height, width, 3].
  """
  blocks: list[np.ndarray] = []
  for first in range(0, len(images), columns):
    rows = [part[first : first + columns] for part in (images, others)]
    blank = np.full((max(0, min(columns, len(images)) - len(rows[0])), *images.shape[1:]), 255, np.uint8)
    block = image_grid(np.concatenate([part for row in rows for part in (row, blank)]), len(rows[0]) + len(blank))
    blocks += [block, np.full((4 * _MARGIN, *block.shape[1:]), 255, np.uint8)]
  return np.concatenate(blocks[:-1])


def named_rows(rows: Iterable[tuple[str, np.ndarray]]) -> np.ndarray:
  """Rows of images uint8 [N, H, W, C], of any N, each with its name at the left; names may be alike.

  Returns:
    uint8 [height, width, 3].
  """
  names, parts = zip(*rows, strict=True)
  columns = max(map(len, parts))
  blank = np.full((1, *parts[0].shape[1:]), 255, np.uint8)
  padded = np.concatenate([np.concatenate([row, *[blank] * (columns - len(row))]) for row in parts])
  grid = image_grid(padded, columns)
  tall = (grid.shape[0] - _MARGIN) // len(parts)
  pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
  names = [_cut(pen, name, _NAME) for name in names]
  left = 8 + math.ceil(max(pen.textlength(name) for name in names))
  page = Image.new("RGB", (left + grid.shape[1], grid.shape[0]), "white")
  page.paste(Image.fromarray(grid), (left, 0))
  pen = ImageDraw.Draw(page)
  for i, name in enumerate(names):
    pen.text((left - 4, _MARGIN + (i + 0.5) * tall), name, fill="black", anchor="rm")
  return np.asarray(page)


def captioned(panels: dict[str, np.ndarray]) -> np.ndarray:
  """Sets pictures uint8 [height, width, 3] of one size side by side, each under its caption."""
  strip, gap = 18, 12
  tall, wide, _ = next(iter(panels.values())).shape
  wide = max(wide, 80)  # room for the caption
  page = Image.new("RGB", (len(panels) * (wide + gap) - gap, tall + strip), "white")
  pen = ImageDraw.Draw(page)
  for i, (caption, picture) in enumerate(panels.items()):
    page.paste(Image.fromarray(picture), (i * (wide + gap), strip))
    pen.text((i * (wide + gap) + 4, 3), caption, fill="black")
  return np.asarray(page)


def png(picture: np.ndarray, facts: Mapping[str, Any]) -> bytes:
  """A PNG file of uint8 [height, width] or [height, width, 3].

  facts: JSON values, which the file carries: `checkpoint`, the training steps of the weights that drew it,
    and how.
  """
  file, text = io.BytesIO(), PngImagePlugin.PngInfo()
  text.add_itxt(_FACTS, json.dumps(facts))
  Image.fromarray(picture).save(file, format="PNG", pnginfo=text)
  return file.getvalue()


def save_png(path: pathlib.Path, picture: np.ndarray, facts: Mapping[str, Any]) -> None:
  """Writes `png` of uint8 [height, width, 3], whole or not at all. Raises OSError."""
  write_whole(path, png(picture, facts))


def facts_of(path: pathlib.Path) -> dict[str, Any]:
  """What a file of `png` carries; {} if it carries nothing, as those of release 0.1, or cannot be read."""
  try:
    with Image.open(path, formats=("PNG",)) as image:
      facts = json.loads(image.info.get(_FACTS, "{}"))
  except (OSError, SyntaxError, ValueError, TypeError, RecursionError, Image.DecompressionBombError):
    return {}
  return facts if isinstance(facts, dict) else {}
