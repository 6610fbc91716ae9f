"""Images: files to uint8 pixels, and their mirroring."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import io
import logging
import os
import pathlib
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from ddpm_jax.config import DataConfig
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
_ON_THE_SIDE = frozenset(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))  # those that swap height and width
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"})
# Tags of TIFF.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0

File = bytes | str | pathlib.Path  # an encoded image, or the path to it
# A file of which reading and opening would take about as long as decoding, and which is read as a whole, in bytes.
_SMALL = 2**16
# PNG: signature, first chunk with its checksum (in it: bits, kind of colour, methods), and the head of the others.
_PNG, _PNG_HEADER, _PNG_CHUNK = b"\x89PNG\r\n\x1a\n", struct.Struct(">8sI4sII5sI"), struct.Struct(">I4s")
_PLAIN_MODES = {b"\x08\0\0\0\0": "L", b"\x08\2\0\0\0": "RGB", b"\x08\6\0\0\0": "RGBA"}

# Of HEIC Pillow knows nothing without the plugin.
HEIC_SUFFIXES = frozenset({".heic", ".heif"})
HEIC_PLUGIN = "pillow_heif"
# Those of release 0.1, see `DataConfig.formats`.
BASIC_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
# By which a source of files knows an image. What is in the file decides how it is decoded.
SUFFIXES = (
  BASIC_SUFFIXES
  | {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".pbm", ".pgm", ".pnm", ".ppm", ".tif", ".tiff"}
  | (HEIC_SUFFIXES if importlib.util.find_spec(HEIC_PLUGIN) else frozenset())
)


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


class Resizing(NamedTuple):
  """How images come to one size; see the options of that name."""

  resize: str = "crop"
  crop: str = "center"
  resample: str = "bicubic"


DEFAULT = Resizing()


def resizing(data: DataConfig) -> Resizing:
  """The one that the options name."""
  return Resizing(data.resize, data.crop, data.resample)


_FILTERS = {
  "bicubic": Image.Resampling.BICUBIC,
  "lanczos": Image.Resampling.LANCZOS,
  "box": Image.Resampling.BOX,
}


def resized(image: Image.Image, size: tuple[int, int], how: Resizing = DEFAULT) -> Image.Image:
  """An image of that size, or for random crops one that covers it and has its height or its width.

  Pillow widens the kernel of each filter when it shrinks: no aliasing. The centre is cropped and resized in one step,
  so that a panorama is not first resized as a whole.

  Args:
    image: an image of mode L or RGB.
    size: height and width of the result, in pixels.
    how: in which way.

  Returns:
    The image itself if it has that size already.
  """
  height, width = size
  if image.size == (width, height):
    return image
  resample = _FILTERS[how.resample]
  match how.resize, how.crop:
    case "crop", "center":
      return ImageOps.fit(image, (width, height), resample)
    case "crop", "random":
      tall = max(height, round(image.height * width / image.width))
      wide = max(width, round(image.width * height / image.height))
      return image.resize((wide, height) if image.width * height > image.height * width else (width, tall), resample)
    case "squash", _:
      return image.resize((width, height), resample)
    case "pad", _:
      return ImageOps.pad(image, (width, height), resample, color="white")
    case _:
      raise ValueError(f"unknown way of resizing {how}")


def sizes_text(sizes: np.ndarray) -> str:
  """Sizes int [N, 2], heights and widths, N at least 1: '64x64', or '3 sizes, 20x30 to 60x40', by their areas."""
  found = np.unique(sizes, axis=0)
  found = found[np.argsort(found.astype(np.int64).prod(axis=1), kind="stable")]
  first, last = ("x".join(map(str, size)) for size in found[[0, -1]].tolist())
  return first if len(found) == 1 else f"{len(found)} sizes, {first} to {last}"


def read_header(file: File, name: str, *, grey_palettes: bool = True) -> tuple[int, int, bool]:
  """Height and width in pixels, upright, and whether the image is grey. Reads no pixels.

  Args:
    file: the encoded image, or the path to it.
    name: what to call the image in an error.
    grey_palettes: an image is grey, too, if its palette has nothing but greys.

  Raises:
    BadRecord: the file cannot be read, is no image that is decoded, or has more pixels than Pillow accepts.
  """
  plain = _plain_png(file) if isinstance(file, bytes) else None
  if plain is not None:
    return plain.size[1], plain.size[0], plain.mode == "L"
  with _opened(file, name) as image:
    height, width = image.height, image.width
    if height != width and image.format != "TIFF" and _to_upright(image) in _ON_THE_SIDE:  # of a TIFF they are upright
      height, width = width, height
    return height, width, image.mode in _GREY_MODES or (grey_palettes and _has_grey_palette(image, name))


def decode(
  file: File,
  channels: int,
  name: str,
  size: tuple[int, int] | None = None,
  how: Resizing = DEFAULT,
) -> np.ndarray:
  """One encoded image as uint8 [H, W, channels].

  Turned upright as its EXIF (or XMP) orientation says, whatever else the metadata hold; transparency shows white;
  grey of 9 to 16 bits is scaled to 8 bits; of an animation it is the first frame.

  Args:
    file: the encoded image, or the path to it.
    channels: 1 (grey) or 3 (RGB).
    name: what to call the image in an error.
    size: height and width in pixels, see `resized` (None: as it is).
    how: see `resized`.

  Raises:
    BadRecord: the image is broken, has grey values whose range nothing says, of 32 bits, or more pixels than Pillow
      accepts (`PIL.Image.MAX_IMAGE_PIXELS`); those of a larger one are never decoded.
    RunError: this process has no file handle or memory left to open it.
  """
  mode = "L" if channels == 1 else "RGB"
  with _pillow(name, "is broken"):
    plain = _plain_png(file) if isinstance(file, bytes) else None
    pixels = None if plain is None else plain.pixels()
    if pixels is None:
      pixels = _load(file, name, mode)
    elif pixels.mode != mode:
      pixels = _to_8_bits(pixels, mode)
    if size is not None:
      pixels = resized(pixels, size, how)
    return np.frombuffer(pixels.tobytes(), np.uint8).reshape(pixels.height, pixels.width, channels)


def small_or_path(file: str | pathlib.Path) -> File:
  """The content of a small file, which costs less than to have Pillow read it; the path of any other, or a bad one."""
  try:
    descriptor = os.open(file, os.O_RDONLY)
    try:
      status = os.fstat(descriptor)
      if not stat.S_ISREG(status.st_mode) or status.st_size > _SMALL:
        return file
      content = os.read(descriptor, status.st_size)
    finally:
      os.close(descriptor)
  except OSError:
    return file  # whoever opens it meets the same
  return content if len(content) == status.st_size else file


def read(file: str | pathlib.Path, name: str) -> bytes:
  """The content of a file, `name` in errors. Raises BadRecord, or RunError as `decode`."""
  try:
    return pathlib.Path(file).read_bytes()
  except OSError as error:
    raise _unreadable(error.errno or 0, name) from error


def _unreadable(code: int, name: str) -> BadRecord | RunError:
  """The error for one of the system: of the file, or of this process."""
  if code in OF_THE_PROCESS:
    return RunError(f"dataset: {name} cannot be opened ({os.strerror(code)}); raise that limit of the process")
  return BadRecord(f"{name} cannot be read ({os.strerror(code)})", "repair or remove it")  # it is gone, say


def png(pixels: np.ndarray) -> bytes:
  """uint8 [H, W], [H, W, 1] or [H, W, 3] as a PNG file."""
  file = io.BytesIO()
  Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).save(file, "PNG")
  return file.getvalue()


class _PlainPng(NamedTuple):
  """A PNG with 8 bits a channel that holds nothing but pixels.

  Attributes:
    mode: L, RGB or RGBA.
    size: width and height.
    data: the compressed pixels.
  """

  mode: str
  size: tuple[int, int]
  data: bytes

  def pixels(self) -> Image.Image | None:
    """The decoded image; None if it is broken."""
    try:
      return Image.frombytes(self.mode, self.size, self.data, "zip", self.mode)
    except ValueError:
      return None


def _plain_png(content: bytes) -> _PlainPng | None:
  """What is in a small PNG that holds nothing but pixels; None for any other file, and for one that is damaged.

  Most images that are made for training are such files. Pillow's objects and its calls for each chunk take a third of
  the time that one of 64x64 needs, and hold Python's lock, where its decoder does not. As in Pillow, the checksums of
  the pixels' chunks do not count.
  """
  end = len(content)
  if not _PNG_HEADER.size <= end <= _SMALL:
    return None
  signature, length, kind, width, height, how, checksum = _PNG_HEADER.unpack_from(content)
  mode = _PLAIN_MODES.get(how)
  if signature != _PNG or (length, kind) != (13, b"IHDR") or mode is None or zlib.crc32(content[12:29]) != checksum:
    return None
  if not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or 0):
    return None
  parts, at = [], _PNG_HEADER.size
  while at + 12 <= end:
    length, kind = _PNG_CHUNK.unpack_from(content, at)
    if kind == b"IEND":
      return _PlainPng(mode, (width, height), parts[0] if len(parts) == 1 else b"".join(parts))
    if kind != b"IDAT":
      return None
    parts.append(content[at + 8 : at + 8 + length])
    at += length + 12
  return None


def _load(file: File, name: str, mode: str) -> Image.Image:
  """An image of any format, upright and in mode L or RGB. Raises BadRecord, RunError, and what Pillow raises."""
  with _opened(file, name) as image:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
      # Else Pillow maps the file, of one that lies on its side with height and width in each other's place.
      image.filename = ""
    image.load()  # which turns a TIFF itself, and takes its orientation away
    upright = _to_upright(image)
    pixels = _to_8_bits(image, mode)
    return pixels if upright is None else pixels.transpose(upright)


def _opened(file: File, name: str) -> Image.Image:
  """Opens an image and reads its header. Raises BadRecord, RunError."""
  with _pillow(name, "is not an image that Pillow can read"):
    content = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
      image = Image.open(content)
    except UnidentifiedImageError:
      if not _register_heic():
        raise
      image = Image.open(content)
  refusal = None
  # Between one and two times the limit Pillow only warns.
  if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
    reason = f"{image.width} x {image.height} pixels, the limit is {Image.MAX_IMAGE_PIXELS}"
    refusal = BadRecord(f"{name} is too large ({reason})", "resize or remove it")
  elif image.format == "EPS":  # a program in PostScript, which Pillow would have Ghostscript run
    refusal = BadRecord(f"{name} is EPS, which is not decoded", "convert or remove it")
  elif image.mode == "F" or (image.mode == "I" and image.format not in ("PPM", "PNG")):  # of these two it is 16 bits
    refusal = BadRecord(f"{name} has 32-bit or signed grey values, of no known range", "convert it to 8 or 16 bits")
  if refusal:
    image.close()
    raise refusal
  return image


@functools.cache
def _register_heic() -> bool:
  """Teaches Pillow HEIC, once. Returns False if the plugin is not installed."""
  if importlib.util.find_spec(HEIC_PLUGIN) is None:
    return False
  importlib.import_module(HEIC_PLUGIN).register_heif_opener()
  return True


def _has_grey_palette(image: Image.Image, name: str) -> bool:
  """True for an image with a palette, of which no colour is anything but grey. Reads no pixels. Raises BadRecord."""
  if image.mode not in ("P", "PA") or image.palette is None:
    return False
  with _pillow(name, "is broken"):
    alone = Image.new("P", (1, 1))
    alone.putpalette(image.palette)  # which Pillow unpacks from the order that the format has
    colours = np.array(alone.getpalette("RGB"), np.uint8).reshape(-1, 3)
  return bool((colours == colours[:, :1]).all())


def _to_upright(image: Image.Image) -> Image.Transpose | None:
  """The transpose that turns an image upright; None where its EXIF block cannot be read: the pixels may be sound."""
  try:
    with _pillow("EXIF block", "is broken"):
      # `image.getexif` would read the pixels of a PNG whose block may lie behind them.
      return _UPRIGHT.get(Image.Image.getexif(image).get(_ORIENTATION, 1))
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
    if code:  # of the system and not of Pillow
      raise _unreadable(code, name) from error
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
  if image.mode.startswith("I"):  # 9 to 16 bits, which Pillow's own conversion clips at 255 instead of scaling
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    white = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1  # Pillow unpacks 12 bits, but does not scale them
    values = np.asarray(image).astype(np.int64).clip(0, white)
    grey = ((values * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow heeds up to 8 bits
      grey = 255 - grey
    if isinstance(image.info.get("transparency"), int):
      grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert(mode)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
  return image.convert(mode)
