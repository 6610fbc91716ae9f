import json
import os
import resource

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ddpm_jax.workdir import grids


def pictures(number: int, height: int, width: int, channels: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (number, height, width, channels), np.uint8)


def test_five_in_a_grid_of_three_by_two():
  images = pictures(5, 50, 60, 3)
  grid = grids.image_grid(images)
  assert grid.shape == (2 + 2 * 52, 2 + 3 * 62, 3)
  assert grid.dtype == np.uint8
  corners = [(2, 2), (2, 64), (2, 126), (54, 2), (54, 64)]  # top, left
  rest = np.ones(grid.shape[:2], bool)
  for image, (top, left) in zip(images, corners, strict=True):
    np.testing.assert_array_equal(grid[top : top + 50, left : left + 60], image)
    rest[top : top + 50, left : left + 60] = False
  assert (grid[rest] == 255).all()  # margins and the empty sixth tile


def test_columns_can_be_named():
  assert grids.image_grid(pictures(6, 50, 50, 3), columns=6).shape == (54, 2 + 6 * 52, 3)
  assert grids.image_grid(pictures(6, 50, 50, 3), columns=1).shape == (2 + 6 * 52, 54, 3)


@pytest.mark.parametrize(("size", "scale"), [(8, 8), (28, 2), (24, 2), (16, 4), (48, 1), (256, 1), (1, 64)])
def test_small_images_are_enlarged_by_a_whole_factor(size, scale):
  image = pictures(1, size // 2 or 1, size, 3)
  tile = grids.image_grid(image)[2:-2, 2:-2]
  assert tile.shape == ((size // 2 or 1) * scale, size * scale, 3)
  for row, column in ((0, 0), ((size // 2 or 1) - 1, 0), (size // 4, size - 1)):
    block = tile[row * scale : (row + 1) * scale, column * scale : (column + 1) * scale]
    assert (block == image[0, row, column]).all()


def test_gray_becomes_three_equal_channels():
  images = pictures(4, 50, 50, 1)
  grid = grids.image_grid(images)
  assert grid.shape == (106, 106, 3)
  for channel in range(3):
    np.testing.assert_array_equal(grid[54:104, 2:52, channel], images[2, :, :, 0])


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_as_they_are_arranged(channels):
  images = pictures(6, 40, 50, channels).reshape(2, 3, 40, 50, channels)
  page = grids.image_rows(images)
  np.testing.assert_array_equal(page, grids.image_grid(images.reshape(6, 40, 50, channels), columns=3))


@pytest.mark.parametrize(
  ("apart", "lefts"),
  [
    ((), [2, 54, 106, 158]),
    ((0,), [2, 68, 120, 172]),  # 2 of margin, 12, 2 instead of 2
    ((1,), [2, 54, 120, 172]),
    ((0, 2), [2, 68, 120, 186]),
    ((0, 1, 2), [2, 68, 134, 200]),
  ],
)
def test_wider_gaps_in_rows(apart, lefts):
  images = pictures(12, 40, 50, 3).reshape(3, 4, 40, 50, 3)
  page = grids.image_rows(images, apart=apart)
  assert page.shape == (2 + 3 * 42, lefts[-1] + 52, 3) and page.dtype == np.uint8
  rest = np.ones(page.shape[:2], bool)
  for row in range(3):
    for column, left in enumerate(lefts):
      top = 2 + row * 42
      np.testing.assert_array_equal(page[top : top + 40, left : left + 50], images[row, column])
      rest[top : top + 40, left : left + 50] = False
  assert (page[rest] == 255).all()


def test_small_images_in_rows_are_enlarged():
  images = pictures(2, 8, 8, 1).reshape(1, 2, 8, 8, 1)
  page = grids.image_rows(images, apart=(0,))
  assert page.shape == (68, 68 + 12 + 68, 3)
  np.testing.assert_array_equal(page[2:66:8, 2:66:8, 1], images[0, 0, :, :, 0])
  np.testing.assert_array_equal(page[2:66:8, 82:146:8, 2], images[0, 1, :, :, 0])


def test_images_are_left_alone():
  images = pictures(3, 8, 8, 1)
  before = images.copy()
  grids.image_grid(images)[:] = 0
  np.testing.assert_array_equal(images, before)


def test_names_of_classes_may_be_any_text_and_alike():
  """Of several lines, without end, twice: each row is there, beside a name of bounded width."""
  images = np.zeros((2, 8, 8, 1), np.uint8)
  plain = grids.named_rows([("crane", images), ("crane", images)])
  assert plain.shape[0] == 2 * (64 + 2) + 2
  for name in ("a\nb", "\udcff", "\0", "日本語", ""):
    assert grids.named_rows([(name, images)]).shape[0] == 64 + 4
    assert grids.image_grid(images, captions=[name, name]).shape[:2] == (64 + 14 + 4, 2 * (64 + 2) + 2)
  long = grids.named_rows([("x" * 1000, images)])
  assert plain.shape[1] < long.shape[1] <= 240 + 9 + 2 * (64 + 2) + 2
  assert (long[:, :240] < 255).any()  # as much of it as there is room for


def test_captions_stand_above_their_pictures():
  left, right = pictures(2, 100, 150, 3)
  page = grids.captioned({"EMA weights": left, "raw weights": right})
  assert page.shape == (118, 312, 3)
  assert page.dtype == np.uint8
  np.testing.assert_array_equal(page[18:, :150], left)
  np.testing.assert_array_equal(page[18:, 162:], right)
  assert (page[:, 150:162] == 255).all()
  for strip in (page[:18, :150], page[:18, 162:]):
    assert strip.min() < 100, "no caption"
    assert (strip[:, :3] == 255).all(), "the caption is cut off"
  assert (page[:18, :150] != page[:18, 162:]).any(), "the captions differ"


def test_one_caption_needs_no_gap():
  assert grids.captioned({"samples": pictures(1, 60, 80, 3)[0]}).shape == (78, 80, 3)


def test_png_keeps_every_pixel(tmp_path):
  picture = pictures(1, 21, 34, 3)[0]
  grids.save_png(tmp_path / "a.png", picture, {})
  with Image.open(tmp_path / "a.png") as image:
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (34, 21))
    np.testing.assert_array_equal(np.asarray(image), picture)


def test_a_picture_says_what_it_is_of(tmp_path):
  path, facts = tmp_path / "a.png", {"checkpoint": 139, "sampler": "ddpm", "weights": "é"}
  grids.save_png(path, pictures(1, 21, 34, 3)[0], facts)
  assert grids.facts_of(path) == facts
  with Image.open(path) as image:  # as any program can read it
    assert json.loads(image.text["ddpm_jax"]) == facts


@pytest.mark.parametrize("text", [None, "", "[7]", "[" * 10**5, '{"checkpoint": '])
def test_a_picture_that_says_nothing_or_nonsense(tmp_path, text):
  said = PngImagePlugin.PngInfo()
  if text is not None:
    said.add_itxt("ddpm_jax", text)
  Image.fromarray(pictures(1, 21, 34, 3)[0]).save(tmp_path / "a.png", pnginfo=said)
  (tmp_path / "b.png").write_bytes(b"none")
  assert [grids.facts_of(tmp_path / f"{name}.png") for name in ("a", "b", "missing")] == [{}, {}, {}]


def test_a_full_disk_leaves_the_earlier_picture(tmp_path):
  old, new = pictures(2, 21, 34, 3)
  grids.save_png(tmp_path / "a.png", old, {})
  before = (tmp_path / "a.png").read_bytes()
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
  try:
    for name in ("a.png", "b.png"):
      with pytest.raises(OSError, match="File too large"):
        grids.save_png(tmp_path / name, new, {})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
  assert (tmp_path / "a.png").read_bytes() == before


def test_a_kill_leaves_no_half_picture(tmp_path, monkeypatch):
  old, new = pictures(2, 21, 34, 3)
  grids.save_png(tmp_path / "a.png", old, {})

  def killed(*_):
    raise KeyboardInterrupt

  for name in ("fsync", "replace"):
    with monkeypatch.context() as patch:
      patch.setattr(os, name, killed)
      with pytest.raises(KeyboardInterrupt):
        grids.save_png(tmp_path / "a.png", new, {})
    with Image.open(tmp_path / "a.png") as image:
      np.testing.assert_array_equal(np.asarray(image), old)
  grids.save_png(tmp_path / "a.png", new, {})
  assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
