"""What else can be drawn, end to end: what the files hold, and what it must be where that is known."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ddpm_jax.diffusion.denoiser import Denoiser
from ddpm_jax.diffusion.inpainting import repaint_jumps
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.diffusion.samplers import time_grid
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.first_stage import pixels
from ddpm_jax.runs import sample as sampling
from ddpm_jax.workdir import grids
from tests.sampling.conftest import STD, pictures, save_pictures

HEADLINE = "{} 8x8x1 with the ema weights after step 5: {}"


def picture_of(quick, name):
  with Image.open(quick.samples / f"{name}.png") as image:
    return np.asarray(image)


def tile(picture, row, column, apart=()):
  """The image at a place of a picture of 8x8 images, 8 times as large, with wider gaps after the columns `apart`."""
  top = 2 + row * 66
  left = 2 + column * 66 + sum(2 + 12 for last in apart if last < column)  # a block has its own margins
  assert (picture[top - 2 : top, left : left + 64] == 255).all() and (
    picture[top : top + 64, left - 2 : left] == 255
  ).all()
  return picture[top : top + 64 : 8, left : left + 64 : 8, :1]


def draw(quick, **changes):
  sampling.sample(quick.having(**changes), quick.path)
  name = changes.get("sample_task", "samples").replace("images", "samples")
  return quick.load(name), quick.settings(name)


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_progressive(quick, capsys, sampler):
  plain, _ = draw(quick, sampler=sampler, sampling_steps=15)
  arrays, settings = draw(quick, sampler=sampler, sampling_steps=15, sample_task="progressive")
  np.testing.assert_array_equal(arrays["images"], plain["images"])
  assert arrays["x0_hat"].shape == (3, 15, 8, 8, 1) and arrays["x0_hat"].dtype == np.uint8
  assert arrays["timesteps"][0] == 200 and (np.diff(arrays["timesteps"]) <= 0).all() and len(arrays["timesteps"]) == 15
  np.testing.assert_array_equal(arrays["x0_hat"][:, -1], arrays["images"])  # the last step gives x0_hat
  # At first nothing is known but the mean of the data.
  assert np.abs(arrays["x0_hat"][:, 0].astype(int) - pictures(1)).max() < 40
  picture = picture_of(quick, "progressive")
  assert picture.shape == (2 + 3 * 66, 2 + 10 * 66, 3)
  np.testing.assert_array_equal(tile(picture, 2, 9), arrays["images"][2])
  np.testing.assert_array_equal(tile(picture, 1, 0), arrays["x0_hat"][1, 0])
  with Image.open(quick.samples / "progressive.gif") as movie:
    frames = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(movie)]
    assert movie.info["loop"] == 0 and json.loads(movie.info["comment"])["checkpoint"] == 5
  assert sum(duration for _, duration in frames) == 100 * 25 and frames[0][0].shape == (134, 134, 3)
  # A palette has 256 colours: the images are grey.
  np.testing.assert_array_equal(tile(frames[0][0], 1, 0), arrays["x0_hat"][2, 0])
  np.testing.assert_array_equal(tile(frames[-1][0], 0, 1), arrays["images"][1])
  assert len(frames) >= 13  # equal ones are one that lasts longer
  assert quick.files() == [*("progressive.gif", "progressive.npz", "progressive.png", "samples.npz", "samples.png")]
  assert settings["sample_task"] == "progressive" and settings["checkpoint"] == 5
  out = capsys.readouterr().out
  assert HEADLINE.format("progressive: 3 rows, 3 images", f"{sampler}, 15 network evaluations each\n") in out
  assert out.splitlines()[-1].startswith("done: ") and out.splitlines()[-1].endswith("progressive.gif")


def test_a_long_draw_keeps_fifty_frames(quick, capsys):
  arrays, _ = draw(quick, sampler="ddpm", sampling_steps=0, sample_task="progressive", num_samples=1)
  assert arrays["x0_hat"].shape == (1, 50, 8, 8, 1)
  assert arrays["timesteps"][0] == 200 and arrays["timesteps"][-1] == 1
  assert set(np.diff(arrays["timesteps"])) == {-4, -5}
  faster = "; --sampler=dpmpp --sampling_steps=20 is about 10 times faster\n"
  line = HEADLINE.format("progressive: 1 row, 1 image", f"ddpm, 200 network evaluations each{faster}")
  assert line in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_slerp_begins_and_ends_at_images_of_a_plain_draw(quick, sampler):
  plain, _ = draw(quick, sampler=sampler, num_samples=4)
  arrays, _ = draw(quick, sampler=sampler, num_samples=2, sample_task="slerp")
  between = arrays["images"]
  assert between.shape == (2, 9, 8, 8, 1) and between.dtype == np.uint8
  for pair in (0, 1):
    assert np.abs(between[pair, 0].astype(int) - plain["images"][2 * pair]).max() <= 1
    away = np.abs(between[pair, -1].astype(int) - plain["images"][2 * pair + 1]).max()
    assert away <= 1 if sampler == "ddim" else away > 5  # the noise of the rows is that of the pair's first image
  steps = np.abs(np.diff(between.astype(int), axis=1)).mean((0, 2, 3, 4))
  assert steps.max() < 3 * steps.min()
  assert picture_of(quick, "slerp").shape == (2 + 2 * 66, 2 + 9 * 66, 3)


def test_slerp_is_as_long_as_noise_in_the_middle(quick):
  """With a linear denoiser and no clipping images are linear in the noise: what lies between deviates as much."""
  arrays, _ = draw(quick, num_samples=80, sample_task="slerp", threshold="none", sample_batch_size=240)
  off = arrays["images"][:, [0, 4, 8]].astype(int) - pictures(1)[0].astype(int)
  inner = np.abs(pictures(1)[0].astype(int) - 128) < 60  # where uint8 does not clip
  start, middle, end = off[:, :, inner].std((0, 2))
  assert 0.93 < middle / np.mean([start, end]) < 1.07  # lerp would make it 0.71


def test_interpolation_of_hardly_diffused_images_is_the_mean_of_them(quick, tmp_path):
  given = pictures()
  folder = save_pictures(tmp_path / "mine", given)
  arrays, settings = draw(
    quick, sample_task="interpolate", interpolation_timestep=1, input_images=str(folder), num_samples=3
  )
  np.testing.assert_array_equal(arrays["given"], given)
  assert arrays["images"].shape == (3, 9, 8, 8, 1)
  shares = np.linspace(0, 1, 9)[None, :, None, None, None]
  expected = (1 - shares) * given[0::2, None] + shares * given[1::2, None]
  assert np.abs(arrays["images"] - expected).max() < 8
  assert settings["timestep"] == 1
  facts = grids.facts_of(quick.samples / "interpolate.png")
  assert (facts["checkpoint"], facts["timestep"]) == (5, 1) and "input_images" not in facts
  picture = picture_of(quick, "interpolate")
  assert picture.shape == (2 + 3 * 66, 68 + 12 + (2 + 9 * 66) + 12 + 68, 3)
  np.testing.assert_array_equal(tile(picture, 1, 0), given[2])
  np.testing.assert_array_equal(tile(picture, 1, 3, (0, 9)), arrays["images"][1, 2])
  np.testing.assert_array_equal(tile(picture, 2, 10, (0, 9)), given[5])


def test_interpolation_half_way_takes_the_first_of_the_data_set(quick, capsys):
  arrays, settings = draw(quick, sample_task="interpolate", sampling_steps=0, num_samples=2)
  np.testing.assert_array_equal(arrays["given"], pictures()[:4])
  assert settings["timestep"] == 100
  line = HEADLINE.format("interpolate: 2 rows, 18 images", "ddim, 100 network evaluations each\n")
  assert line in capsys.readouterr().out
  # The closed form: x_t and so x_0 are linear in the given image, with the noise of the pair in common.
  ab = np.cumprod(1 - np.linspace(1e-4, 0.05, 200))[99]
  gain = np.sqrt(ab) * STD / np.sqrt(ab * STD**2 + 1 - ab)  # of the probability flow
  ends = arrays["images"][:, [0, -1]].astype(float)
  inner = ((ends > 0) & (ends < 255)).all(1) & (np.abs(ends[:, 0] - ends[:, 1]) > 4)
  wanted = gain * (arrays["given"][0::2].astype(float) - arrays["given"][1::2])
  slope = np.sum((ends[:, 0] - ends[:, 1])[inner] * wanted[inner]) / np.sum(wanted[inner] ** 2)
  assert 0.8 < slope < 1.1


def test_one_timestep_is_enough_to_interpolate(perfect, quick, monkeypatch):
  """T/2 of T = 1 would be no noise at all."""
  one = perfect._replace(run=perfect.run._replace(schedule=make_schedule("linear", 1, beta_start=0.01, beta_end=0.01)))
  denoiser = Denoiser(lambda params, xt, time, cond: xt * 0, PARAMETERIZATIONS["eps"])
  one = one._replace(run=one.run._replace(denoiser=denoiser))
  monkeypatch.setattr(sampling, "find_weights", lambda config, path: one)
  arrays, settings = draw(quick, sample_task="interpolate", sampling_steps=0, num_samples=1)
  assert settings["timestep"] == 1
  assert np.abs(arrays["images"][0, 0].astype(int) - arrays["given"][0]).max() > 5  # some noise was added


@pytest.mark.parametrize("options", [{"sampler": "ddim", "eta": 0.5}, {"sampler": "ddpm"}])
def test_inpainting_leaves_what_is_known(quick, options, capsys):
  arrays, settings = draw(
    quick, sample_task="inpaint", sampling_steps=8, repaint_jump=2, repaint_resamples=3, num_samples=2, **options
  )
  drawn, given, mask = arrays["images"], arrays["given"], arrays["mask"]
  assert drawn.shape == (2, 4, 8, 8, 1) and given.shape == (2, 8, 8, 1)
  assert mask.shape == (8, 8) and mask.sum() == 16 and mask[2:6, 2:6].all()
  known = np.broadcast_to(given[:, None], drawn.shape)[:, :, mask == 0]
  np.testing.assert_array_equal(drawn[:, :, mask == 0], known)
  inside = drawn[:, :, mask == 1].reshape(8, -1)
  assert len(np.unique(inside, axis=0)) == 8
  # The pixels of this data are independent: what is drawn has its mean and deviation, whatever surrounds it.
  mean = pictures(1)[0][mask == 1].astype(float).reshape(1, -1)
  away = (inside - mean)[:, (np.abs(mean - 127.5) < 60)[0]] / 127.5
  assert abs(away.mean()) < 0.15 and 0.6 * STD < away.std() < 1.4 * STD
  jumps = repaint_jumps(time_grid_of(quick), 2, 3)
  assert settings["network_evaluations"] == len(jumps.t) == 8 + 2 * 2 * 3
  line = HEADLINE.format("inpaint: 2 rows, 8 images", f"{options['sampler']}, 20 network evaluations each\n")
  assert line in capsys.readouterr().out
  picture = picture_of(quick, "inpaint")
  assert picture.shape == (2 + 2 * 66, 2 + 2 * 66 + 12 + 2 + 4 * 66, 3)
  np.testing.assert_array_equal(tile(picture, 1, 0), given[1])
  np.testing.assert_array_equal(tile(picture, 1, 1), np.where(mask[:, :, None] == 1, 128, given[1]))
  np.testing.assert_array_equal(tile(picture, 0, 5, (1,)), drawn[0, 3])


def time_grid_of(quick):
  return time_grid(sampling.find_weights(quick.config, quick.path).run.schedule, 8)


def test_inpainting_draws_where_the_mask_is_white(quick, tmp_path, capsys):
  mask = np.zeros((8, 8), np.uint8)
  mask[:, 5:], mask[0, 0], mask[0, 1] = 255, 128, 127  # white is what is above the middle
  Image.fromarray(mask).save(tmp_path / "mask.png")
  arrays, _ = draw(quick, sample_task="inpaint", repaint_resamples=1, num_samples=1, mask=str(tmp_path / "mask.png"))
  changed = (arrays["images"] != arrays["given"][:, None]).any((0, 1, 4))
  np.testing.assert_array_equal(changed, mask > 127)
  np.testing.assert_array_equal(arrays["mask"], mask > 127)
  line = HEADLINE.format("inpaint: 1 row, 4 images", "ddim, 4 network evaluations each\n")
  assert line in capsys.readouterr().out


def test_reconstruction_comes_back_and_better_with_more_steps(quick, capsys):
  errors = []
  for steps in (50, 100, 200):
    arrays, settings = draw(quick, sample_task="reconstruct", sampling_steps=steps, num_samples=6)
    away = arrays["images"].astype(float) - arrays["given"]
    errors.append(np.sqrt(np.mean(away**2)))
    np.testing.assert_allclose(settings["rms_error_in_grey_levels"], errors[-1])
    np.testing.assert_allclose(settings["peak_signal_to_noise_db"], 10 * np.log10(255**2 / errors[-1] ** 2))
    assert settings["network_evaluations"] == 2 * steps
  assert errors[0] > 1.5 * errors[1] > 2.0 * errors[2]
  assert errors[2] < 25  # a coarse chain
  assert arrays["noise"].shape == (6, 8, 8, 1) and arrays["noise"].dtype == np.float32
  np.testing.assert_allclose(settings["deviation_of_the_noise"], arrays["noise"].std(), rtol=1e-5)
  np.testing.assert_array_equal(arrays["given"], pictures())
  picture = picture_of(quick, "reconstruct")
  assert picture.shape == (2 + 6 * 66, 2 + 4 * 66, 3)
  np.testing.assert_array_equal(tile(picture, 4, 0), arrays["given"][4])
  np.testing.assert_array_equal(tile(picture, 4, 2), arrays["images"][4])
  ten = (128 + 10 * (arrays["images"][4].astype(int) - arrays["given"][4])).clip(0, 255)
  np.testing.assert_array_equal(tile(picture, 4, 3), ten)
  out = capsys.readouterr().out
  assert "rms error in grey levels: " in out
  # Twice 200 are many, but no other sampler can be run backwards.
  assert HEADLINE.format("reconstruct: 6 rows, 6 images", "ddim, 400 network evaluations each\n") in out
  assert quick.files()[:3] == ["reconstruct.1.npz", "reconstruct.1.png", "reconstruct.2.npz"]


def test_reconstruction_does_not_clip(quick, perfect, monkeypatch):
  """Whatever --threshold says: what was cut off on the way up could not come back."""
  beyond = perfect._replace(params={"mean": 2 * perfect.params["mean"]})  # x0_hat leaves [-1, 1]
  monkeypatch.setattr(sampling, "find_weights", lambda config, path: beyond)
  arrays, _ = draw(quick, sample_task="reconstruct", sampling_steps=50)
  ab, mean = np.cumprod(np.append(1.0, 1 - np.linspace(1e-4, 0.05, 200))), 2 * np.asarray(perfect.params["mean"])
  x = arrays["given"] / 127.5 - 1
  times = time_grid(beyond.run.schedule, 50, "uniform")[::-1]
  for before, now in itertools.pairwise(times):
    t = max(before, 1)  # eps_hat, and an Euler step in xbar = x / sqrt(alpha_bar)
    eps = np.sqrt(1 - ab[t]) * (x - np.sqrt(ab[t]) * mean) / (ab[t] * STD**2 + 1 - ab[t])
    levels = np.sqrt((1 - ab[[before, now]]) / ab[[before, now]])
    x = np.sqrt(ab[now]) * (x / np.sqrt(ab[before]) + (levels[1] - levels[0]) * eps)
    assert now < 150 or np.abs((x - np.sqrt(1 - ab[now]) * eps) / np.sqrt(ab[now])).max() > 1.2
  np.testing.assert_allclose(arrays["noise"], x, atol=2e-3)


@pytest.mark.parametrize("task", ["progressive", "slerp", "interpolate", "inpaint", "reconstruct"])
def test_tasks_do_not_depend_on_the_size_of_a_batch(quick, task):
  options = dict(sample_task=task, num_samples=2, sampling_steps=2)
  many = draw(quick, sample_batch_size=64, **options)[0]["images"]
  few = draw(quick, sample_batch_size=3, **options)[0]["images"]
  assert many.shape == few.shape and np.abs(many.astype(int) - few).max() <= 1


def test_the_evaluations_of_a_task_are_counted(quick, capsys):
  draw(quick, sample_task="slerp", num_samples=2, sample_batch_size=8)
  assert "drawing: images 17 to 18 of 18, network evaluation 4/4  " in capsys.readouterr().out


def test_colours(quick, perfect, monkeypatch, tmp_path):
  """Three channels from end to end."""
  images = np.stack([pictures(6)[..., 0], pictures(6)[::-1, ..., 0], 255 - pictures(6)[..., 0]], -1)
  folder = save_pictures(tmp_path / "colour", images)
  params = {"mean": pixels.to_float(images[0])}
  wide = perfect._replace(run=perfect.run._replace(first_stage=pixels.Pixels((8, 8, 3))), params=params)
  monkeypatch.setattr(sampling, "find_weights", lambda config, path: wide)
  png = tmp_path / "png"
  plain, _ = draw(quick, sample_png_dir=str(png))
  assert plain["images"].shape == (3, 8, 8, 3)
  with Image.open(png / "000001.png") as image:
    np.testing.assert_array_equal(np.asarray(image), plain["images"][1])
  arrays, _ = draw(quick, sample_task="inpaint", repaint_resamples=1, num_samples=2, input_images=str(folder))
  np.testing.assert_array_equal(arrays["given"], images[:2])
  changed = (arrays["images"] != arrays["given"][:, None]).any((0, 1, 4))
  np.testing.assert_array_equal(changed, arrays["mask"] == 1)
