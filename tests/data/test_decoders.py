"""Pictures with odd metadata are used; whatever a decoder raises is the error that names the file."""

import io
import itertools
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from ddpm_jax.config import DataConfig
from ddpm_jax.data import images, sources
from tests.data import fuzz

ROWS, COLUMNS = np.mgrid[:24, :40]
PICTURE = np.stack([ROWS * 10, COLUMNS * 6, 250 - ROWS * 4 - COLUMNS * 3], -1).astype(np.uint8)


def encoded(kind, **options):
  stream = io.BytesIO()
  Image.fromarray(PICTURE).save(stream, kind, **options)
  return stream.getvalue()


def ifd(entries, start):
  """A directory of TIFF: entries are (tag, type, count, bytes, or the entries of a directory of its own)."""
  end = start + 2 + 12 * len(entries) + 4
  head, extra = struct.pack(">H", len(entries)), b""
  for tag, kind, count, data in entries:
    place = struct.pack(">L", end + len(extra))
    if isinstance(data, list):
      extra += ifd(data, end + len(extra))
    elif len(data) <= 4:
      place = data.ljust(4, b"\0")
    else:
      extra += data
    head += struct.pack(">HHL", tag, kind, count) + place
  return head + struct.pack(">L", 0) + extra


def exif(*entries):
  return b"Exif\0\0MM\0*" + struct.pack(">L", 8) + ifd(list(entries), 8)


TURNED = (0x0112, 3, 1, struct.pack(">H", 6))
# A value of each type of TIFF 6.0, as no field here should have it: text that is no number, 5/0, -2/0, ...
VALUES = {
  1: b"\xff",
  2: b"72\0",
  3: struct.pack(">H", 6),
  4: struct.pack(">L", 77777),
  5: struct.pack(">LL", 5, 0),
  6: b"\xff",
  7: b"ab\0d",
  8: struct.pack(">h", -1),
  9: struct.pack(">l", -1),
  10: struct.pack(">ll", -2, 0),
  11: struct.pack(">f", 1.5),
  12: struct.pack(">d", 1.5),
}
FIELDS = [0x100, 0x102, 0x103, 0x10E, 0x11A, 0x128, 0x131, 0x132, 0x13B, 0x213, 0x8769, 0x8825]
FIELDS += [
  (0x8769, 0x9204),
  (0x8769, 0x9286),
  (0x8769, 0x927C),
  (0x8769, 0xA005),
  (0x8825, 1),
  (0x8825, 5),
  (0x8825, 6),
]


def test_whatever_else_the_exif_block_holds_the_picture_is_turned():
  plain = images.decode(encoded("JPEG"), 3, "x")
  wrong = []
  for field, (kind, value), count in itertools.product(FIELDS, VALUES.items(), (1, 2)):
    entry = (field, kind, count, value * count)
    if isinstance(field, tuple):
      entry = (field[0], 4, 1, [(field[1], kind, count, value * count)])
    decoded = images.decode(encoded("JPEG", exif=exif(TURNED, entry)), 3, "x")
    if not np.array_equal(decoded, np.rot90(plain, -1)):
      wrong.append((field, kind, count))
  assert not wrong


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0no block", exif(TURNED)[:20], exif((0x0112, 2, 1, b"6\0"))])
def test_a_picture_whose_orientation_cannot_be_read_is_taken_as_it_is_stored(block):
  plain = images.decode(encoded("JPEG"), 3, "x")
  np.testing.assert_array_equal(images.decode(encoded("JPEG", exif=block), 3, "x"), plain)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF", "MPO"])
def test_every_format_is_turned_once(kind):
  options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": "4:4:4"} if kind == "AVIF" else {}
  plain = images.decode(encoded(kind, **options), 3, "x")
  assert np.abs(plain.astype(int) - PICTURE).mean() < 5
  block = Image.Exif()
  block[0x0112] = 6
  turned = images.decode(encoded(kind, exif=block, **options), 3, "x")
  np.testing.assert_array_equal(turned, np.rot90(plain, -1))


def test_an_orientation_of_xmp_counts_where_exif_has_none():
  packet = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
  text = PngImagePlugin.PngInfo()
  text.add_itxt("XML:com.adobe.xmp", packet)
  np.testing.assert_array_equal(images.decode(encoded("PNG", pnginfo=text), 3, "x"), np.rot90(PICTURE, -1))


@pytest.mark.parametrize("kind", ["AVIF", "DDS", "JPEG2000", "TIFF", "TGA", "GIF", "BMP"])
def test_the_content_decides_and_not_the_suffix(tmp_path, kind):
  (tmp_path / "a.jpg").write_bytes(encoded(kind))
  source = sources.open_source(DataConfig(dataset=f"folder:{tmp_path}", image_size=24))
  assert source.image_shape == (24, 24, 3)
  centre = source.read(np.array([0])).images[0].astype(int)
  assert np.abs(centre - PICTURE[:, 8:32]).mean() < 5


class Odd(Exception):
  """One that no list of exceptions has."""


RAISED = [AttributeError, IndexError, KeyError, NotImplementedError, Odd, OverflowError, RecursionError, RuntimeError]
RAISED += [SyntaxError, TypeError, ValueError, ZeroDivisionError, struct.error, zlib.error]


@pytest.mark.parametrize("where", ["_open", "load"])
def test_whatever_a_decoder_raises_names_the_file_and_can_be_skipped(tmp_path, monkeypatch, capsys, where):
  """The header and the pixels of file 1 cannot be read, with every error in turn."""
  text = PngImagePlugin.PngInfo()
  text.add_text("note", "words")  # so that Pillow opens it
  for number in range(3):
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{number}.png", pnginfo=text)
  broken = (tmp_path / "1.png").read_bytes()
  sound = getattr(PngImagePlugin.PngImageFile, where)
  error: Exception = Odd()

  def raises(self):
    if self.fp and self.fp.getvalue() == broken:
      raise error
    return sound(self)

  monkeypatch.setattr(PngImagePlugin.PngImageFile, where, raises)
  for kind in RAISED:
    error = kind("odd\nlines")
    with pytest.raises(images.BadRecord, match=r"1\.png \(image 1\) is [^\n]*, or use --on_bad_record=skip$"):
      sources.open_source(DataConfig(dataset=f"folder:{tmp_path}"))
    source = sources.open_source(DataConfig(dataset=f"folder:{tmp_path}", on_bad_record="skip"))
    assert source.read(np.arange(3)).images[:, 0, 0, 0].tolist() == [0, 2, 2], kind
  told = capsys.readouterr().err.splitlines()
  assert len(told) == len(RAISED)
  assert all(line.startswith(f"skipped: {tmp_path}/1.png (image 1) is ") for line in told)


@pytest.mark.parametrize(("kind", "where"), [("JPEG", (ImageFile.ImageFile, "load")), ("PNG", (Image, "frombytes"))])
def test_no_memory_is_not_the_fault_of_a_file(monkeypatch, kind, where):
  """Else what is skipped depends on what else the machine does."""

  def raises(*_):
    raise MemoryError

  content = encoded(kind)
  monkeypatch.setattr(*where, raises)
  with pytest.raises(images.RunError, match=r"^dataset: x cannot be opened \(Cannot allocate memory\)"):
    images.decode(content, 3, "x")


def in_mode(mode):
  """A PNG of that mode, with nothing but pixels, and its image."""
  pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 4), np.uint8)
  image = Image.fromarray(pixels, "RGBA").convert(mode)
  stream = io.BytesIO()
  image.save(stream, "PNG")
  return stream.getvalue(), image


def shown(content, channels):
  """What becomes of a file: its header and pixels, or the error of each."""
  found = []
  for call in (lambda: images.read_header(content, "x"), lambda: images.decode(content, channels, "x").tolist()):
    try:
      found.append(call())
    except images.BadRecord as error:
      found.append(str(error))
  return found


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_small_png_with_nothing_but_pixels_is_not_opened_by_pillow(monkeypatch, mode):
  """That takes as long as to decode one. The oracle is the image before it was written."""
  content, image = in_mode(mode)
  monkeypatch.delattr(Image, "open")
  assert images.read_header(content, "x") == (12, 20, mode == "L")
  white, end = Image.new("RGBA", image.size, "white"), 37 + int.from_bytes(content[33:37]) + 4
  halves = [content[41:90], content[90:end]]
  halves = b"".join(struct.pack(">I", len(half)) + b"IDAT" + half + struct.pack(">I", 0) for half in halves)
  for channels, wanted in ((1, "L"), (3, "RGB")):
    flat = Image.alpha_composite(white, image).convert("RGB") if mode == "RGBA" else image
    for file in (content, content[:33] + halves + content[end + 4 :]):
      np.testing.assert_array_equal(images.decode(file, channels, "x").squeeze(), np.asarray(flat.convert(wanted)))


def test_pillow_says_the_same_of_damaged_pngs(monkeypatch):
  """Of files with nothing but pixels, each with a changed, missing or doubled part, and of all of their beginnings."""
  draw, files = random.Random(0), []
  for mode in ("L", "RGB", "RGBA", "LA", "P"):
    content, _ = in_mode(mode)
    files += [content[:length] for length in range(0, len(content), 5)]
    for _ in range(150):
      damaged = bytearray(content)
      for _ in range(draw.choice((1, 1, 3))):
        at = draw.choice((draw.randrange(50), draw.randrange(len(content)), len(content) - 1 - draw.randrange(20)))
        damaged[at : at + draw.choice((0, 1, 4))] = draw.randbytes(draw.choice((0, 1, 4)))
      files += [bytes(damaged), fuzz.with_checksums(bytes(damaged))]
  plain = [bool(images._plain_png(content)) for content in files]
  assert 100 < sum(plain) < len(files) - 100
  quick = [shown(content, channels) for content in files for channels in (1, 3)]
  monkeypatch.setattr(images, "_plain_png", lambda content: None)
  assert quick == [shown(content, channels) for content in files for channels in (1, 3)]


def test_a_text_that_is_a_bomb_is_named():
  text = PngImagePlugin.PngInfo()
  text.add_text("workflow", "x" * 2**21, zip=True)
  with pytest.raises(images.BadRecord, match=r"^dataset: x is [^\n]*too large"):
    images.decode(encoded("PNG", pnginfo=text), 3, "x")


def test_no_file_is_a_program():
  """Pillow would have Ghostscript run it."""
  with pytest.raises(images.BadRecord, match="x is EPS, which is not decoded; convert or remove it"):
    images.decode(encoded("EPS"), 3, "x")


def test_damaged_files_of_all_formats_are_decoded_or_named(capfd):
  """5,000 of them: `python -m tests.data.fuzz`."""
  counts = fuzz.run(0, 330)
  kinds = {kind for kind, _ in counts}
  assert len(kinds) >= 10
  assert {"PNG", "JPEG", "WEBP", "AVIF", "DDS", "JPEG2000", "TIFF", "GIF"} <= kinds
  assert {end for _, end in counts} == {"decoded", "named"}, counts
  assert sum(counts.values()) == 330
  assert sum(count for (_, end), count in counts.items() if end == "decoded") > 50  # so pixels are reached, too
  captured = capfd.readouterr()
  assert captured.out == captured.err == ""
