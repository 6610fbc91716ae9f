"""The images that a task starts from, and what is said where they do not fit."""

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.errors import UserError
from ddpm_jax.runs import sample as sampling
from ddpm_jax.sampling.inputs import given_images, read_mask
from tests.sampling.conftest import pictures, save_pictures

SHAPE = (8, 8, 1)


@pytest.fixture
def config(quick):
  return lambda **changes: quick.having(**({"sample_task": "inpaint"} | changes))


def refusal(function, *arguments) -> str:
  with pytest.raises(UserError) as caught:
    function(*arguments)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_the_first_of_the_data_set(config):
  np.testing.assert_array_equal(given_images(config(), SHAPE, 4).images, pictures()[:4])
  text = refusal(given_images, config(), SHAPE, 7)
  assert text.startswith("num_samples: 7 images are needed, folder:") and "has 6; lower --num_samples" in text
  assert "8x8x1, the model draws 8x8x3; name some with --input_images" in refusal(given_images, config(), (8, 8, 3), 1)


def test_a_folder_in_the_order_of_its_names(config, tmp_path):
  images = pictures()[::-1]
  folder = save_pictures(tmp_path / "mine", images)
  (folder / "notes.txt").write_text("no image")
  np.testing.assert_array_equal(given_images(config(input_images=str(folder)), SHAPE, 3).images, images[:3])
  text = refusal(given_images, config(input_images=str(folder)), SHAPE, 7)
  assert text.startswith("num_samples: 7 images are needed, input_images=") and "has 6" in text


def test_one_file_of_any_kind(config, tmp_path, monkeypatch):
  Image.fromarray(pictures()[2, :, :, 0]).save(tmp_path / "one.bmp")
  got = given_images(config(input_images=str(tmp_path / "one.bmp")), SHAPE, 1).images
  np.testing.assert_array_equal(got, pictures()[2:3])
  assert "has 1; lower" in refusal(given_images, config(input_images=str(tmp_path / "one.bmp")), SHAPE, 2)
  monkeypatch.setenv("HOME", str(tmp_path))
  np.testing.assert_array_equal(given_images(config(input_images="~/one.bmp"), SHAPE, 1).images, got)


def test_files_become_what_the_model_draws(config, tmp_path):
  """Grey or colours as the model has them; resized and cropped only where the run does so."""
  colour = np.repeat(pictures(1, (16, 24, 1)), 3, axis=3)
  folder = save_pictures(tmp_path / "mine", colour)
  text = refusal(given_images, config(input_images=str(folder)), SHAPE, 1)
  assert text == (f"input_images: {folder / '00.png'} is 16x24x1, the model draws 8x8x1; resize the file")
  got = given_images(config(input_images=str(folder), image_size=8), SHAPE, 1).images
  assert got.shape == (1, 8, 8, 1)
  assert np.abs(got[0].astype(int) - colour[0, ::2, 4:20:2, :1]).max() < 80  # the middle of it
  assert given_images(config(input_images=str(folder), image_size=8), (8, 8, 3), 1).images.shape == (1, 8, 8, 3)
  got = given_images(config(input_images=str(folder), image_size="8x12"), (8, 12, 1), 1).images  # all of it
  assert np.abs(got[0].astype(int) - colour[0, ::2, ::2, :1]).max() < 80


def test_the_file_that_does_not_fit_is_named(config, tmp_path):
  folder = save_pictures(tmp_path / "mine", pictures(2))
  Image.fromarray(np.zeros((9, 8), np.uint8)).save(folder / "01.png")
  assert "01.png is 9x8x1" in refusal(given_images, config(input_images=str(folder)), SHAPE, 2)
  assert len(given_images(config(input_images=str(folder)), SHAPE, 1).images) == 1
  (folder / "00.png").write_bytes(b"no image")
  text = refusal(given_images, config(input_images=str(folder)), SHAPE, 1)
  assert "input_images: " in text and "00.png is not an image that Pillow can read" in text


def test_nothing_there(config, tmp_path):
  for path in (tmp_path / "nowhere", tmp_path / "empty"):
    (tmp_path / "empty").mkdir(exist_ok=True)
    text = refusal(given_images, config(input_images=str(path)), SHAPE, 1)
    assert text == f"input_images: {str(path)!r} names no image file and no folder of some; use --input_images=PATH"


def test_the_mask_in_the_middle(config):
  mask = read_mask(config(), (8, 8, 1))
  assert mask.dtype == bool and mask[2:6, 2:6].all() and mask.sum() == 16
  assert read_mask(config(), (5, 9, 3)).sum() == 3 * 5  # 1..3, 2..6


def save_mask(path, pixels):
  Image.fromarray(np.asarray(pixels)).save(path)
  return str(path)


def test_a_mask_is_white_where_pixels_are_drawn(config, tmp_path):
  pixels = np.zeros((8, 8, 3), np.uint8)
  pixels[3], pixels[0, 0] = 255, 120
  path = save_mask(tmp_path / "mask.png", pixels)
  wanted = np.zeros((8, 8), bool)
  wanted[3] = True
  np.testing.assert_array_equal(read_mask(config(mask=path), SHAPE), wanted)


def test_masks_that_do_not_do(config, tmp_path):
  black = save_mask(tmp_path / "black.png", np.zeros((8, 8), np.uint8))
  white = save_mask(tmp_path / "white.png", np.full((8, 8), 255, np.uint8))
  large = save_mask(tmp_path / "large.png", np.eye(9, 16, dtype=np.uint8) * 255)
  (tmp_path / "broken.png").write_bytes(b"no image")
  assert refusal(read_mask, config(mask=black), SHAPE) == (f"mask: {black} covers nothing; make the part to draw white")
  assert refusal(read_mask, config(mask=white), SHAPE) == (
    f"mask: {white} covers everything; make the part to draw white"
  )
  assert refusal(read_mask, config(mask=large), SHAPE) == (
    f"mask: {large} is 9x16, the images are 8x8; make it of their size"
  )
  # A size that the run resizes its data to does not resize a mask.
  assert "is 9x16" in refusal(read_mask, config(mask=large, image_size=8), SHAPE)
  for path in (tmp_path / "nowhere.png", tmp_path):
    assert refusal(read_mask, config(mask=str(path)), SHAPE).startswith(
      f"mask: {str(path)!r} is no file; name an image"
    )
  assert "broken.png is not an image" in refusal(read_mask, config(mask=str(tmp_path / "broken.png")), SHAPE)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sample_task": "interpolate", "num_samples": 4}, "num_samples: 8 images are needed"),
    ({"sample_task": "reconstruct", "num_samples": 7}, "num_samples: 7 images are needed"),
    ({"sample_task": "inpaint", "num_samples": 7}, "num_samples: 7 images are needed"),
    ({"sample_task": "inpaint", "mask": "/nowhere/mask.png"}, "mask: '/nowhere/mask.png' is no file"),
    ({"sample_task": "reconstruct", "input_images": "/nowhere"}, "input_images: '/nowhere' names no image"),
  ],
)
def test_nothing_is_drawn_from_what_does_not_fit(quick, changes, message, capsys):
  text = refusal(sampling.sample, quick.having(**changes), quick.path)
  assert message in text
  assert quick.files() == [] and "drawing" not in capsys.readouterr().out
