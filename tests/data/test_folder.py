"""folder:PATH, with files written by Pillow."""

import os

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data import sources
from ddpm_jax.errors import UserError


def write(path, image, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  image.save(path, **options)


def plain(value, size=(8, 8), mode="RGB"):
  return Image.new(mode, size, value)


def open_folder(path, **options):
  return sources.open_source(DataConfig(dataset=f"folder:{path}", **options))


def refuse(path, match, **options):
  with pytest.raises(UserError, match=match) as caught:
    open_folder(path, **options)
  assert "\n" not in str(caught.value)


def read_all(source):
  return source.read(np.arange(len(source)))


def test_png_jpeg_and_webp_sorted_by_relative_path(tmp_path):
  write(tmp_path / "b.PNG", plain((10, 20, 30)))
  write(tmp_path / "a" / "z.jpg", plain((200, 200, 200)), quality=100)
  write(tmp_path / "c.webp", plain((1, 2, 3)), lossless=True)
  write(tmp_path / "B.JPeG", plain((99, 99, 99)), quality=100)
  (tmp_path / "notes.txt").write_text("no image")
  source = open_folder(tmp_path)
  assert source.image_shape == (8, 8, 3)
  assert len(source) == 4
  assert source.name == f"folder:{tmp_path}"
  pixels = read_all(source)
  assert pixels.dtype == np.uint8
  assert pixels.shape == (4, 8, 8, 3)
  np.testing.assert_array_equal(pixels[:, 0, 0], [[99] * 3, [200] * 3, [10, 20, 30], [1, 2, 3]])
  np.testing.assert_array_equal(source.read(np.array([2, 2, 0]))[:, 0, 0, 0], [10, 10, 99])


def test_hidden_files_and_links_that_lead_out_are_left_out(tmp_path):
  root = tmp_path / "root"
  write(root / "x.png", plain("red"))
  write(root / ".hidden.png", plain("red"))
  write(root / ".cache" / "y.png", plain("red"))
  write(tmp_path / "outside" / "secret.png", plain("red"))
  (root / "file.png").symlink_to(tmp_path / "outside" / "secret.png")
  (root / "folder").symlink_to(tmp_path / "outside")
  (root / "loop").symlink_to(root)
  (root / "inside.png").symlink_to(root / "x.png")
  assert len(open_folder(root)) == 2  # x.png and inside.png


@pytest.mark.parametrize(("modes", "channels"), [(["L", "1", "LA", "I;16"], 1), (["L", "RGB"], 3), (["L", "P"], 3)])
def test_grey_only_if_all_are(tmp_path, modes, channels):
  for number, mode in enumerate(modes):
    write(tmp_path / f"{number}.png", plain(0, mode=mode))
  assert open_folder(tmp_path).image_shape == (8, 8, channels)


def test_16_bit_grey_and_transparency(tmp_path):
  write(tmp_path / "deep.png", plain(128 * 257, mode="I;16"))
  write(tmp_path / "half.png", plain((0, 51), mode="LA"))
  np.testing.assert_array_equal(read_all(open_folder(tmp_path))[:, 0, 0, 0], [128, 204])


def test_mixed_sizes_need_image_size(tmp_path):
  write(tmp_path / "a.png", plain("red", (20, 10)))
  write(tmp_path / "b.png", plain("blue", (8, 8)))
  refuse(tmp_path, "image_size: 0, .* different sizes; set --image_size")
  source = open_folder(tmp_path, image_size=4)
  assert source.image_shape == (4, 4, 3)
  np.testing.assert_array_equal(read_all(source)[:, 2, 2], [[255, 0, 0], [0, 0, 255]])


def test_one_size_that_is_not_square_needs_image_size(tmp_path):
  write(tmp_path / "a.png", plain("red", (20, 10)))
  refuse(tmp_path, "10 x 20, not square; set --image_size")


def test_exif_orientation(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 3
  stored = np.arange(64, dtype=np.uint8).reshape(8, 8)
  write(tmp_path / "a.png", Image.fromarray(stored), exif=exif)
  np.testing.assert_array_equal(read_all(open_folder(tmp_path))[0, ..., 0], stored[::-1, ::-1])


@pytest.mark.parametrize("content", [b"", b"no image", "half"])
def test_a_broken_image_is_named(tmp_path, content):
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
  write(tmp_path / "good.png", noise)
  if content == "half":
    content = (tmp_path / "good.png").read_bytes()[:1500]
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "bad.png").write_bytes(content)
  refuse(tmp_path, r"sub/bad.png is .* repair or remove it")


def test_a_broken_image_is_named_when_read_on_demand(tmp_path):
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
  write(tmp_path / "bad.png", noise)
  os.truncate(tmp_path / "bad.png", 1500)
  source = open_folder(tmp_path, cache_gib=0.0)
  with pytest.raises(UserError, match=r"bad.png is broken"):
    source.read(np.array([0]))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_named(tmp_path, monkeypatch):
  write(tmp_path / "bomb.png", plain("red", (11, 11)))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
  refuse(tmp_path, "bomb.png is too large")


def test_the_cache_holds_what_reading_on_demand_gives(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (300, 9, 12, 3), np.uint8)  # more than one chunk
  for number, image in enumerate(noise):
    write(tmp_path / f"{number:03}.png", Image.fromarray(image))
  cached = open_folder(tmp_path, image_size=6)
  on_demand = open_folder(tmp_path, image_size=6, cache_gib=0.0)
  assert cached.read is not on_demand.read
  indices = np.random.default_rng(1).permutation(300)
  np.testing.assert_array_equal(cached.read(indices), on_demand.read(indices))
  assert len(np.unique(cached.read(indices).reshape(300, -1), axis=0)) == 300


def test_what_is_no_folder_of_images(tmp_path):
  refuse(tmp_path / "missing", "dataset: 'folder:.*missing' names no folder")
  refuse("", "dataset: 'folder:' names no folder")
  refuse(tmp_path, r"holds no .*\.png.* file")
  write(tmp_path / "a.png", plain("red"))
  refuse(tmp_path, "split: 'test' is unknown", split="test")
