"""Images in and out: files to uint8 pixels, and uint8 to the model's range and back.

The only module that knows value ranges: pixels are uint8 in 0..255 on the host and in files, float32 in [-1, 1] in the
model (Ho et al. 2020, section 3.3).
"""

from __future__ import annotations

import io
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from ddpm_jax.errors import UserError

# What Pillow raises for a file that is cut short or damaged: its plugins do not agree on one type.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error)
_BOMB = (Image.DecompressionBombWarning, Image.DecompressionBombError)
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"})


def to_float(images: jax.Array) -> jax.Array:
  """Pixels uint8 [..] in 0..255 as float32 [..] in [-1, 1]."""
  return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
  """Images float [..] as uint8 [..]: the exact inverse of `to_float`; values outside [-1, 1] are clipped."""
  return jnp.round(jnp.clip((images.astype(jnp.float32) + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


def random_flip(key: jax.Array, image: jax.Array) -> jax.Array:
  """Mirrors one image [H, W, C] left-right with probability 1/2. For a batch: `jax.vmap`, with a key for each image."""
  return jnp.where(jax.random.bernoulli(key), image[:, ::-1, :], image)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
  """The centre square of an image, `size` pixels wide.

  The same as resizing the short side to `size` and cropping the centre, but in one step, so that a panorama is not
  first resized as a whole. Pillow widens the bicubic kernel when it shrinks: no aliasing.

  Args:
    image: an image of mode L or RGB.
    size: height and width of the result, in pixels.

  Returns:
    The image itself if it has that size already.
  """
  if image.size == (size, size):
    return image
  return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def read_header(path: pathlib.Path) -> tuple[int, int, bool]:
  """Height and width in pixels, as stored, and whether the image is grey. Reads no pixels.

  Raises:
    UserError: the file is not an image, or has more pixels than Pillow accepts.
  """
  with _open(path, str(path)) as image:
    return image.height, image.width, image.mode in _GREY_MODES


def decode(file: bytes | pathlib.Path, channels: int, name: str, size: int = 0) -> np.ndarray:
  """One encoded image as uint8 [H, W, channels].

  Turned upright as its EXIF data say; transparency shows white; 16-bit grey is scaled to 8 bits.

  Args:
    file: the encoded image, or the path to it.
    channels: 1 (grey) or 3 (RGB).
    name: what to call the image in an error.
    size: resize and crop to this height and width in pixels (0: as it is).

  Raises:
    UserError: the image is broken, or has more pixels than Pillow accepts (`PIL.Image.MAX_IMAGE_PIXELS`).
  """
  with _open(file, name) as image:
    try:
      ImageOps.exif_transpose(image, in_place=True)
      image = _to_8_bits(image, "L" if channels == 1 else "RGB")
    except _BROKEN as error:
      raise UserError(f"dataset: {name} is broken ({error}); repair or remove it") from None
  if size:
    image = resize_and_crop(image, size)
  return np.asarray(image, np.uint8).reshape(image.height, image.width, channels)


def _open(file: bytes | pathlib.Path, name: str) -> Image.Image:
  """Opens an image and reads its header. Raises UserError."""
  try:
    image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
  except _BOMB as error:
    raise UserError(f"dataset: {name} is too large ({error}); resize or remove it") from None
  except _BROKEN as error:
    raise UserError(f"dataset: {name} is not an image that Pillow can read ({error}); repair or remove it") from None
  # Between one and two times the limit Pillow only warns. A warnings filter would be process-wide and not thread-safe.
  if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
    image.close()
    raise UserError(
      f"dataset: {name} is too large ({image.width} x {image.height} pixels, the limit is "
      f"{Image.MAX_IMAGE_PIXELS}); resize or remove it"
    )
  return image


def _to_8_bits(image: Image.Image, mode: str) -> Image.Image:
  """The image in mode L or RGB, on white where it is transparent."""
  if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips at 255 instead of scaling
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):
      grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert(mode)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
  return image.convert(mode)
