"""Flips and decoding, against arithmetic done by hand."""

import io
import struct

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data import images
from ddpm_jax.errors import UserError

ALL_VALUES = np.arange(256, dtype=np.uint8)


def encoded(image, kind="PNG", **options):
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


def test_flip_mirrors_half_of_the_images_each_by_its_own_key():
  image = jnp.arange(2 * 3 * 2, dtype=jnp.uint8).reshape(2, 3, 2)
  keys = jax.random.split(jax.random.key(0), 2000)
  flipped = jax.vmap(images.random_flip, (0, None))(keys, image)
  assert flipped.dtype == jnp.uint8
  mirrored = np.array(image)[:, ::-1]
  is_mirrored = (np.array(flipped) == mirrored).all((1, 2, 3))
  is_same = (np.array(flipped) == np.array(image)).all((1, 2, 3))
  np.testing.assert_array_equal(is_mirrored, ~is_same)
  assert abs(is_mirrored.mean() - 0.5) < 5 * 0.5 / 2000**0.5
  chex.assert_trees_all_equal(jax.vmap(images.random_flip, (0, None))(keys[7:9], image), flipped[7:9])


def test_resizing_does_not_alias():
  checkers = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
  small = np.asarray(images.resized(checkers, (8, 8)))
  assert np.abs(small.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("height", [6, 9])
def test_crop_keeps_the_centre(turned, height):
  """Of three thirds the middle one, or two thirds of it where the crop is taller than wide."""
  thirds = np.repeat(np.array([10, 100, 200], np.uint8), 12)[None].repeat(12, 0)
  image, size = Image.fromarray(thirds.T if turned else thirds), (6, height) if turned else (height, 6)
  found = np.asarray(images.resized(image, size)).astype(int)
  found = found.T if turned else found
  assert found.shape == (height, 6)
  np.testing.assert_array_equal(found[:, 2:4], np.full((height, 2), 100))
  assert np.abs(found - 100).max() < 10  # at the borders the kernel sees a little of the neighbours


def test_squashed_or_padded_all_of_it_is_there():
  """An image of 4 x 8 pixels, of four stripes."""
  stripes = np.repeat(np.array([0, 100, 200, 50], np.uint8), 2)[None].repeat(4, 0)
  for mode in ("L", "RGB"):
    image = Image.fromarray(stripes).convert(mode)
    grey = lambda how, size, image=image: np.asarray(images.resized(image, size, how).convert("L"))  # noqa: E731
    padded = grey(images.Resizing("pad"), (8, 8))
    np.testing.assert_array_equal(padded, np.concatenate([np.full((2, 8), 255), stripes, np.full((2, 8), 255)]))
    np.testing.assert_array_equal(
      grey(images.Resizing("pad"), (4, 12)), np.pad(stripes, ((0, 0), (2, 2)), constant_values=255)
    )
    squashed = grey(images.Resizing("squash", resample="box"), (8, 4))
    np.testing.assert_array_equal(squashed, stripes[:, ::2].repeat(2, axis=0))
    for how in ("crop", "squash", "pad"):
      assert images.resized(image, (4, 8), images.Resizing(how)) is image


def test_filters_are_those_of_the_references():
  """The mean of the pixels, rounded twice; and what the converter of StyleGAN and EDM makes of a square, to the bit."""
  noise = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
  small = lambda filter: np.asarray(images.resized(Image.fromarray(noise), (4, 4), images.Resizing(resample=filter)))  # noqa: E731
  assert np.abs(small("box").astype(int) - noise.reshape(4, 2, 4, 2).mean((1, 3))).max() <= 1
  np.testing.assert_array_equal(small("lanczos"), Image.fromarray(noise).resize((4, 4), Image.Resampling.LANCZOS))


def test_an_image_of_the_right_size_is_left_alone():
  noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  np.testing.assert_array_equal(images.decode(encoded(Image.fromarray(noise)), 3, "x", size=(8, 8)), noise)


@pytest.mark.parametrize("kind", ["RGB", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_those_asked_for(kind, channels):
  image = Image.new(kind, (5, 4), "white")
  np.testing.assert_array_equal(images.decode(encoded(image), channels, "x"), np.full((4, 5, channels), 255))


def test_16_bit_grey_is_scaled_not_clipped():
  deep = Image.fromarray((ALL_VALUES.astype(np.uint16) * 257).reshape(16, 16))
  assert deep.mode == "I;16"
  np.testing.assert_array_equal(images.decode(encoded(deep), 1, "x")[..., 0], ALL_VALUES.reshape(16, 16))
  np.testing.assert_array_equal(images.decode(encoded(deep), 3, "x")[..., 2], ALL_VALUES.reshape(16, 16))


def tiff(rows, order, bits, photometric=1, kind=1):
  """A TIFF file of grey values, uncompressed: kind 1 unsigned, 2 signed, 3 float (TIFF 6.0)."""
  if bits == 12:  # two values in three bytes, high bits first
    pairs = [(row[i], row[i + 1]) for row in rows for i in range(0, len(row), 2)]
    pixels = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
  else:
    letter = {(16, 1): "H", (16, 2): "h", (32, 1): "L", (32, 2): "l", (32, 3): "f"}[bits, kind]
    pixels = b"".join(struct.pack(order + letter, value) for row in rows for value in row)
  entries = [(256, 4, len(rows[0])), (257, 4, len(rows)), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
  entries += [(273, 4, 8), (277, 3, 1), (278, 4, len(rows)), (279, 4, len(pixels)), (339, 3, kind)]
  ifd = struct.pack(order + "H", len(entries))
  for tag, size, value in entries:
    ifd += struct.pack(order + ("HHLHxx" if size == 3 else "HHLL"), tag, size, 1, value)
  mark = b"II" if order == "<" else b"MM"
  return mark + struct.pack(order + "HL", 42, 8 + len(pixels)) + pixels + ifd + struct.pack(order + "L", 0)


def pgm(rows, white):
  """A PGM file of two bytes for each value, high byte first."""
  head = f"P5\n{len(rows[0])} {len(rows)}\n{white}\n".encode()
  return head + b"".join(struct.pack(">H", value) for row in rows for value in row)


DEEP = {  # kind of file -> (white, what writes it)
  "TIFF II": (65535, lambda rows: tiff(rows, "<", 16)),
  "TIFF MM": (65535, lambda rows: tiff(rows, ">", 16)),
  "TIFF of 12 bits": (4095, lambda rows: tiff(rows, "<", 12)),
  "PGM": (65535, lambda rows: pgm(rows, 65535)),
  "PGM of 10 bits": (1023, lambda rows: pgm(rows, 1023)),
}


@pytest.mark.parametrize(("white", "write"), DEEP.values(), ids=DEEP)
def test_every_grey_of_more_than_8_bits_is_scaled_by_its_white(white, write):
  values = np.array([[0, 1, white // 510, white // 510 + 1], [white // 5, white // 2, white - 9, white]])
  expected = np.round(values * 255 / white)
  assert expected.tolist() == [[0, expected[0, 1], 0, 1], [51, 127, expected[1, 2], 255]]
  np.testing.assert_array_equal(images.decode(write(values.tolist()), 1, "x")[..., 0], expected)
  np.testing.assert_array_equal(images.decode(write(values.tolist()), 3, "x")[..., 1], expected)


def test_where_zero_is_white_it_is():
  """Pillow turns values of up to 8 bits around, and leaves those of 16 to its caller."""
  file = tiff([[0, 25700, 65535, 65278]], "<", 16, photometric=0)
  assert images.decode(file, 1, "x")[0, :, 0].tolist() == [255, 155, 0, 1]


@pytest.mark.parametrize(("bits", "kind"), [(32, 3), (32, 2), (32, 1), (16, 2)])
def test_grey_values_of_no_known_range_are_refused(tmp_path, bits, kind):
  (tmp_path / "a.tif").write_bytes(tiff([[0, 1]], "<", bits, kind=kind))
  for refused in (lambda path: images.decode(path, 1, "x"), lambda path: images.read_header(path, "x")):
    with pytest.raises(images.BadRecord, match=r"^dataset: x has 32-bit or signed grey values, of no known range; con"):
      refused(tmp_path / "a.tif")


def test_colours_of_four_inks_and_of_one_bit():
  """Without a profile, each colour is what its ink and black leave of white."""
  inks = np.array([[[255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 55], [51, 0, 0, 0]]], np.uint8)
  decoded = images.decode(encoded(Image.fromarray(inks, "CMYK"), "TIFF"), 3, "x")
  assert decoded[0].tolist() == [[0, 255, 255], [255, 0, 255], [255, 255, 0], [200, 200, 200], [204, 255, 255]]
  bits = Image.fromarray(np.array([[0, 255, 0]], np.uint8)).convert("1")
  for kind in ("PNG", "TIFF", "BMP", "GIF", "PPM"):
    assert images.decode(encoded(bits, kind), 1, "x")[0, :, 0].tolist() == [0, 255, 0], kind


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_white(mode):
  colour = np.zeros((1, 3, len(mode)), np.uint8)
  colour[0, :, -1] = [0, 51, 255]
  decoded = images.decode(encoded(Image.fromarray(colour, mode)), 3, "x")
  np.testing.assert_array_equal(decoded[0, :, 0], [255, 204, 0])  # 255 (1 - alpha)


def test_a_transparent_palette_colour_shows_white():
  paletted = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
  paletted.putpalette([9, 9, 9, 50, 60, 70])
  decoded = images.decode(encoded(paletted, transparency=0), 3, "x")
  np.testing.assert_array_equal(decoded[0], [[255, 255, 255], [50, 60, 70]])


@pytest.mark.parametrize(
  ("orientation", "upright"),
  [
    (1, lambda a: a),
    (2, lambda a: a[:, ::-1]),
    (3, lambda a: a[::-1, ::-1]),
    (6, lambda a: np.rot90(a, -1)),
    (8, lambda a: np.rot90(a, 1)),
  ],
)
def test_exif_orientation_is_applied(orientation, upright):
  stored = np.arange(12, dtype=np.uint8).reshape(3, 4)
  exif = Image.Exif()
  exif[0x0112] = orientation
  decoded = images.decode(encoded(Image.fromarray(stored), exif=exif), 1, "x")
  np.testing.assert_array_equal(decoded[..., 0], upright(stored))


@pytest.mark.parametrize("side", [11, 30])  # Pillow itself warns above the limit and refuses above twice the limit
def test_a_decompression_bomb_is_refused_by_name(monkeypatch, side):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
  with pytest.raises(UserError, match=r"holiday.png is too large"):
    images.decode(encoded(Image.new("L", (side, side))), 1, "holiday.png")
  images.decode(encoded(Image.new("L", (10, 10))), 1, "holiday.png")


def test_a_palette_image_without_its_palette_is_refused_by_name():
  """Pillow has nothing but an assertion for it."""
  paletted = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
  paletted.putpalette([9, 9, 9, 50, 60, 70])
  whole = encoded(paletted)
  start = whole.index(b"PLTE") - 4
  length = int.from_bytes(whole[start : start + 4])
  with pytest.raises(UserError, match=r"^dataset: holiday[^\n]*$"):
    images.decode(whole[:start] + whole[start + 12 + length :], 3, "holiday")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_is_refused_by_name(kind):
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
  whole = encoded(noise, kind)
  for part in (whole[: len(whole) // 2], whole[:7], b""):
    with pytest.raises(UserError, match=r"^dataset: holiday[^\n]*$"):
      images.decode(part, 3, "holiday")
