"""Images: files to uint8 pixels, and their mirroring."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import pathlib
import re
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm_jax.errors import RunError, UserError

# Nothing is wrong with a file when one of these is what keeps it from being opened.
OF_THE_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# What Pillow logs, of damaged TIFF files, is in the error that follows: without a handler, `logging` would print it.
logging.getLogger("PIL").addHandler(logging.NullHandler())
# As an entry of `warnings.filters`.
_IGNORED = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
# EXIF orientation: how the stored pixels become upright. 1 is upright, and so is whatever is not in the standard.
_ORIENTATION = 0x0112
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"})


class BadRecord(UserError):
  """An image that cannot be used, and the only error that `--on_bad_record=skip` passes over.

  Attributes:
    what: which image, and in brackets why; the message of the error adds what to do.
  """

  def __init__(self, what: str, remedy: str):
    super().__init__(f"dataset: {what}; {remedy}, or use --on_bad_record=skip")
    self.what, self._remedy = what, remedy

  def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str]]:
    return BadRecord, (self.what, self._remedy)  # as an exception, it would be made anew of its message alone


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


def read_header(file: bytes | pathlib.Path, name: str) -> tuple[int, int, bool]:
  """Height and width in pixels, as stored, and whether the image is grey. Reads no pixels.

  Args:
    file: the encoded image, or the path to it.
    name: what to call the image in an error.

  Raises:
    BadRecord: the file cannot be read, is not an image, or has more pixels than Pillow accepts.
  """
  with _opened(file, name) as image:
    return image.height, image.width, image.mode in _GREY_MODES


def decode(file: bytes | pathlib.Path, channels: int, name: str, size: int = 0) -> np.ndarray:
  """One encoded image as uint8 [H, W, channels].

  Turned upright as its EXIF (or XMP) orientation says, whatever else the metadata hold; transparency shows white;
  16-bit grey is scaled to 8 bits.

  Args:
    file: the encoded image, or the path to it.
    channels: 1 (grey) or 3 (RGB).
    name: what to call the image in an error.
    size: resize and crop to this height and width in pixels (0: as it is).

  Raises:
    BadRecord: the image is broken, or has more pixels than Pillow accepts (`PIL.Image.MAX_IMAGE_PIXELS`); those of a
      larger one are never decoded.
    RunError: this process has no file handle or memory left to open it.
  """
  with _opened(file, name) as image, _pillow(name, "is broken"):
    image.load()  # which turns a TIFF itself, and takes its orientation away
    upright = _to_upright(image)
    pixels = _to_8_bits(image, "L" if channels == 1 else "RGB")
    if upright is not None:
      pixels = pixels.transpose(upright)
    if size:
      pixels = resize_and_crop(pixels, size)
    return np.asarray(pixels, np.uint8).reshape(pixels.height, pixels.width, channels)


def _opened(file: bytes | pathlib.Path, name: str) -> Image.Image:
  """Opens an image and reads its header. Raises BadRecord, RunError."""
  with _pillow(name, "is not an image that Pillow can read"):
    image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
  refusal = None
  # Between one and two times the limit Pillow only warns.
  if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
    reason = f"{image.width} x {image.height} pixels, the limit is {Image.MAX_IMAGE_PIXELS}"
    refusal = BadRecord(f"{name} is too large ({reason})", "resize or remove it")
  elif image.format == "EPS":  # a program in PostScript, which Pillow would have Ghostscript run
    refusal = BadRecord(f"{name} is EPS, which is not decoded", "convert or remove it")
  if refusal:
    image.close()
    raise refusal
  return image


def _to_upright(image: Image.Image) -> Image.Transpose | None:
  """The transpose that turns an image upright; None where its EXIF block cannot be read: the pixels may be sound."""
  try:
    with _pillow("EXIF block", "is broken"):
      return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
  except BadRecord:
    return None


@contextlib.contextmanager
def _pillow(name: str, problem: str) -> Iterator[None]:
  """The boundary to Pillow: whatever it raises inside becomes a BadRecord that says "`name` `problem` (why)".

  Its decoders raise nearly every type that Python has (AttributeError, KeyError, NotImplementedError, RuntimeError,
  zlib.error, ...), and another one with each version, so that no list of types is right for long. Only Pillow's own
  functions may be called inside.

  Raises:
    BadRecord: for the file.
    RunError: this process has no file handle or memory left.
  """
  _ignore_warnings()
  try:
    yield
  except (BadRecord, RunError):
    raise
  except Image.DecompressionBombError as error:
    raise BadRecord(f"{name} is too large ({_reason(error)})", "resize or remove it") from error
  except UnidentifiedImageError as error:  # Pillow's own words name an object in memory
    raise BadRecord(f"{name} {problem} (unknown format)", "repair or remove it") from error
  except Exception as error:
    code = errno.ENOMEM if isinstance(error, MemoryError) else error.errno if isinstance(error, OSError) else None
    if code in OF_THE_PROCESS:
      raise RunError(
        f"dataset: {name} cannot be opened ({os.strerror(code)}); raise that limit of the process"
      ) from error
    if code:  # of the system and not of Pillow: the file is gone, say
      raise BadRecord(f"{name} cannot be read ({os.strerror(code)})", "repair or remove it") from error
    raise BadRecord(f"{name} {problem} ({_reason(error)})", "repair or remove it") from error


def _ignore_warnings() -> None:
  """Keeps what Pillow only warns of (odd metadata, large images) from being printed, and from being an error.

  One filter for the process, at the front of the list: `warnings.catch_warnings` is not safe with threads.
  """
  if warnings.filters[:1] != [_IGNORED]:
    warnings.filterwarnings(_IGNORED[0], module=_IGNORED[3].pattern)


def _reason(error: BaseException) -> str:
  """The message of an error on one line."""
  return " ".join(str(error).split()) or type(error).__name__


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
