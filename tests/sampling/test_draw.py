"""Many images: the same ones whatever they are drawn with, and no more than once each."""

import contextlib
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import config as config_lib
from ddpm_jax import main
from ddpm_jax.data.sources import open_source
from ddpm_jax.devices import make_mesh
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.evaluation import likelihood
from ddpm_jax.first_stage import pixels
from ddpm_jax.keys import seeded
from ddpm_jax.runs import sample as sampling
from ddpm_jax.runs.preview import Preview
from ddpm_jax.sampling import drawn as drawn_lib
from ddpm_jax.sampling.draw import bind_for_sampling, fit_batch, largest_batch, make_draw, make_long_draw, table_of
from ddpm_jax.sampling.drawn import Drawn
from ddpm_jax.weights.load import load_weights
from ddpm_jax.workdir import grids
from tests.sampling.conftest import pictures, save_pictures
from tests.training.tiny import tiny_config, tiny_run


def nothing(*_) -> None:
  pass


@pytest.fixture(scope="module")
def config(perfect):
  return perfect.run.config


def having(config, **changes):
  return config_lib.override(config, changes)


def draw(perfect, config, folder, number):
  """The images of a draw that nothing disturbs."""
  drawn = Drawn(perfect, config, folder)
  drawn.draw(number, done=nothing, say=nothing)
  drawn.close()
  return np.array(drawn.images(number))


@pytest.fixture(scope="module")
def twenty(perfect, config, tmp_path_factory):
  return draw(perfect, config, tmp_path_factory.mktemp("twenty"), 20)


def assert_close(mine, theirs):
  """Equal but for the rounding to uint8."""
  assert mine.shape == theirs.shape and mine.dtype == theirs.dtype == np.uint8
  assert np.abs(mine.astype(int) - theirs).max() <= 1


def test_images_are_what_the_sampler_says(perfect, config, twenty, tmp_path):
  """Image by image, row by row, with the network called by itself."""
  config, run = having(config, eta=0.7), perfect.run
  table = table_of(config.sample, run.schedule, "fixed_large")
  root = jax.random.fold_in(jax.random.key(0), 0xF10B76C3)  # zlib.crc32(b"sample")
  network = jax.jit(lambda xt, t: run.denoiser.network(perfect.params, xt, t - 1, None))
  got = draw(perfect, config, tmp_path, 3)
  for i in range(3):
    key = jax.random.fold_in(root, i)
    noise = lambda number, key=key: jax.random.normal(jax.random.fold_in(key, number), (1, 8, 8, 1))  # noqa: E731
    xt = noise(0)
    for row, t in enumerate(table.t):
      ab = run.schedule.alpha_bar[t]
      x0_hat = jnp.clip((xt - np.float32(np.sqrt(1 - ab)) * network(xt, jnp.asarray([t]))) / np.sqrt(ab), -1, 1)
      xt = table.c_xt[row] * xt + table.c_x0[row] * x0_hat + table.sigma[row] * noise(row + 1)
    assert_close(got[i : i + 1], np.asarray(pixels.to_uint8(xt)))
  assert np.abs(got.astype(int) - twenty[:3]).mean() > 2  # eta matters
  assert len(np.unique(twenty.reshape(20, -1), axis=0)) == 20


@pytest.mark.parametrize(("number", "batch"), [(20, 20), (5, 3), (3, 1), (7, 0)])
def test_an_image_depends_on_its_index_alone(perfect, config, twenty, tmp_path, number, batch):
  assert_close(draw(perfect, having(config, sample_batch_size=batch), tmp_path, number), twenty[:number])


def test_one_device_draws_what_eight_draw(perfect, config, twenty, tmp_path, monkeypatch):
  first = jax.devices()[:1]
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  monkeypatch.setattr(jax, "devices", lambda: first)
  few = make_mesh("pmap")
  assert few.num_devices == 1
  params = jax.device_put(perfect.params, few.replicated)
  alone = perfect._replace(run=perfect.run._replace(mesh=few), params=params)
  assert_close(draw(alone, config, tmp_path, 9), twenty[:9])


# In stretches.


def both_draws(weights, options):
  """The images as one program draws them, and what draws them in stretches."""
  run = weights.run
  predictor = bind_for_sampling(run, options)
  table = table_of(options, run.schedule, "fixed_large")
  shared = dict(first_stage=run.first_stage, mesh=run.mesh, stream="sample")
  index = np.arange(5, dtype=np.int32)
  return (
    make_draw(predictor, table, **shared)(seeded(weights.params, 3), index),
    make_long_draw(predictor, table, **shared),
    index,
  )


@pytest.mark.parametrize(
  "options", [{"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.7}, {"sampler": "dpmpp"}, {"sampler": "heun"}], ids=str
)
def test_stretches_change_no_bit(perfect, config, monkeypatch, options):
  whole, draw, index = both_draws(perfect, having(config, sampling_steps=15, **options).sample)
  monkeypatch.setattr(draw, "_adapt", lambda made, seconds: None)
  for at_once, numbers in ((1, [*range(1, 16)]), (4, [4, 8, 12, 15]), (15, [15]), (99, [15])):
    draw._at_once, told = at_once, []
    np.testing.assert_array_equal(draw(seeded(perfect.params, 3), index, done=told.append), whole)
    assert told == numbers


def test_stretches_of_a_network_change_no_bit(original):
  """Convolutions and norms, with a sampler that looks back."""
  weights = load_weights(original.config, original.path)
  whole, draw, index = both_draws(weights, original.having(sampler="dpmpp", eta=1.0, sampling_steps=7).sample)
  np.testing.assert_array_equal(draw(seeded(weights.params, 3), index), whole)
  assert len(np.unique(whole.reshape(5, -1), axis=0)) == 5


def test_stretches_grow_until_they_take_half_a_second(perfect, config):
  _, draw, _ = both_draws(perfect, config.sample)
  sizes = []
  for made, seconds in ((1, 0.01), (4, 0.04), (16, 0.16), (50, 0.5), (50, 1.0), (10, 5.0), (25, 60.0), (1, 2.0)):
    draw._adapt(made, seconds)
    sizes.append(draw._at_once)
  assert sizes == [4, 16, 50, 50, 25, 25, 1, 1]  # the last call of a loop, of 10, says nothing


# A draw that is stopped.


class Killed(BaseException):
  pass


def stop_after(perfect, config, folder, number, images):
  """Begins to draw `number` images and is killed when there are `images`."""

  def done(at):
    if at.images >= images:
      raise Killed

  drawn = Drawn(perfect, config, folder)
  with pytest.raises(Killed):
    drawn.draw(number, done=done, say=nothing)
  drawn.close()
  return drawn.path


def test_two_processes_do_not_draw_the_same_images(perfect, config, tmp_path):
  first = Drawn(perfect, config, tmp_path)
  with pytest.raises(UserError, match=r"workdir: another process is drawing the same images in .*--sample_seed"):
    Drawn(perfect, config, tmp_path)
  other = Drawn(perfect, having(config, sample_seed=1), tmp_path)
  first.forget()
  again = Drawn(perfect, config, tmp_path)
  for drawn in (other, again):
    drawn.close()


@pytest.mark.parametrize("torn", [0, -10, 30])
def test_a_draw_that_was_killed_goes_on(perfect, config, twenty, quick, capsys, torn):
  """With a batch lost or half an image more, as a kill may leave it."""
  config = quick.having(num_samples=20)
  path = stop_after(perfect, config, quick.samples, 20, 8)
  assert quick.files() == [path.name]
  data = path.read_bytes()
  assert data == twenty[:8].tobytes()
  path.write_bytes(data[:torn] if torn < 0 else data + bytes(torn))
  sampling.sample(config, quick.path)
  np.testing.assert_array_equal(quick.load()["images"], twenty)
  out = capsys.readouterr().out
  assert f"{7 if torn < 0 else 8} of them were drawn before" in out
  assert quick.files() == ["samples.npz", "samples.png"]


def test_nothing_is_drawn_twice(perfect, config, twenty, tmp_path, monkeypatch):
  stop_after(perfect, config, tmp_path, 20, 16)
  asked = []
  real = drawn_lib.make_long_draw

  def watched(*args, **options):
    function = real(*args, **options)

    class Watched:
      def __call__(self, constants, index, *, size, done):
        asked.extend(index.tolist())
        return function(constants, index, size=size, done=done)

    return Watched()

  monkeypatch.setattr(drawn_lib, "make_long_draw", watched)
  counts, drawn = [], Drawn(perfect, config, tmp_path)

  def done(at):
    counts.append(at.images)

  drawn.draw(20, done=done, say=nothing)
  assert asked == [16, 17, 18, 19] and counts[0] == 16 and counts[-1] == 20
  assert counts == sorted(counts) and len(counts) > 2, "nothing is told on the way"
  np.testing.assert_array_equal(drawn.images(20), twenty)
  del counts[:]
  drawn.draw(20, done=done, say=nothing)  # all there: no network
  drawn.draw(5, done=done, say=nothing)
  assert len(asked) == 4 and counts == [20, 5]
  np.testing.assert_array_equal(drawn.images(5), twenty[:5])
  drawn.draw(22, done=done, say=nothing)
  assert asked[4:] == [20, 21]
  drawn.forget()
  assert list(tmp_path.iterdir()) == []


def test_other_settings_use_another_file(perfect, config, tmp_path):
  def path(perfect=perfect, **changes):
    with contextlib.closing(Drawn(perfect, having(config, **changes), tmp_path)) as drawn:
      return drawn.path

  ours = path()
  free = [{"num_samples": 9}, {"sample_batch_size": 3}, {"sample_png_dir": "x"}, {"checkpoint": "5"}]
  assert {path(**changes) for changes in free} | {path(perfect._replace(step=9))} == {ours}
  others = [
    *({"sample_seed": 1}, {"eta": 0.5}, {"sampling_steps": 5}, {"sampler": "dpmpp"}, {"time_grid": "uniform"}),
    *({"threshold": "none"}, {"threshold": "dynamic"}, {"variance": "fixed_small"}),
    {"threshold": "dynamic", "threshold_quantile": 0.9},
  ]
  paths = [path(**changes) for changes in others]
  paths.append(path(perfect._replace(identity="1" * 64)))  # another checkpoint, or the raw weights
  assert len({ours, *paths}) == len(paths) + 1


@pytest.mark.parametrize(("sampler", "grid"), [("ddpm", "trailing"), ("dpmpp", "logistic")])
def test_what_auto_stands_for_is_part_of_the_settings(perfect, config, tmp_path, sampler, grid):
  """So a draw that an earlier release began with another grid is not gone on with."""
  drawn = []
  for time_grid in ("auto", grid):
    with contextlib.closing(
      Drawn(perfect, having(config, sampler=sampler, eta=0.0, time_grid=time_grid), tmp_path)
    ) as one:
      drawn.append((one.path, one.settings["time_grid"]))
  assert drawn[0] == drawn[1] and drawn[0][1] == grid


def test_a_disk_that_is_full_while_drawing(perfect, config, twenty, tmp_path, monkeypatch):
  """What was drawn before stays, and the draw goes on from there."""
  drawn = Drawn(perfect, config, tmp_path)
  drawn.draw(8, done=nothing, say=nothing)

  def full(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr("os.pwrite", full)
    with pytest.raises(RunError, match=r"workdir: cannot write the samples into .* \(No space left on device\)"):
      drawn.draw(20, done=nothing, say=nothing)
    drawn.close()
  assert drawn.path.read_bytes() == twenty[:8].tobytes()
  np.testing.assert_array_equal(draw(perfect, config, tmp_path, 20), twenty)


def test_a_folder_that_cannot_be_made(perfect, config, tmp_path):
  (tmp_path / "samples").write_text("a file")
  with pytest.raises(RunError, match=r"workdir: cannot write the samples into .*File exists"):
    Drawn(perfect, config, tmp_path / "samples")


# How many at once.


@pytest.mark.parametrize(
  ("each", "free", "most", "first", "size", "tries"),
  [
    (10, 10_000, 64, 64, 64, [64]),  # 640 of 8,500 bytes, but no more are wanted
    (10, 10_000, 1000, 64, 850, [64]),  # 0.85 * 10,000 / 10
    (10, 10_000, 500, 64, 500, [64]),
    (100, 10_000, 1000, 64, 85, [64]),  # 85 would fit: less than twice as many
    (100, 1_000, 1000, 64, 8, [64]),
    (100, 50, 1000, 64, 1, [64]),  # nothing fits: try one
    (0, 10_000, 1000, 64, 1000, [64]),  # no plan
    (10, 10_000, 5, 64, 5, [5]),
  ],
)
def test_the_largest_batch(each, free, most, first, size, tries):
  asked = []

  def needed(number):
    asked.append(number)
    return each * number

  got = largest_batch(needed, free, most=most, first=first)
  assert got == (64 if (each, free) == (100, 10_000) else size)
  assert asked == tries


def test_the_batch_fits_the_memory_of_the_devices(perfect, config, monkeypatch):
  run = perfect.run
  predictor = bind_for_sampling(run, config.sample)
  table = table_of(config.sample, run.schedule, "fixed_large")
  function = make_draw(predictor, table, first_stage=run.first_stage, mesh=run.mesh, stream="sample")
  constants = seeded(perfect.params, 0)
  needed = function.bytes_needed(constants, np.zeros(1, np.int32), size=64)
  assert needed > 64 * 64 / 8  # its share of the state at least
  monkeypatch.setattr("ddpm_jax.sampling.draw.free_memory", lambda: 10 * needed)
  assert fit_batch(function, constants, np.zeros(1, np.int32), number=64) == 64
  monkeypatch.setattr("ddpm_jax.sampling.draw.free_memory", lambda: needed // 2)
  assert fit_batch(function, constants, np.zeros(1, np.int32), number=64) in (26, 27)  # 0.85 / 2 of 64
  monkeypatch.setattr("ddpm_jax.sampling.draw.free_memory", lambda: 0)
  assert fit_batch(function, constants, np.zeros(1, np.int32), number=64) == 1


@pytest.mark.parametrize("png", [False, True])
def test_too_little_room_is_said_before_anything_is_drawn(quick, monkeypatch, capsys, png):
  usage = shutil.disk_usage(quick.path)
  monkeypatch.setattr(sampling, "Drawn", None)  # nothing is begun
  needed = 1_000_000 * 64 * 2
  config = quick.having(num_samples=1_000_000, **({"sample_png_dir": str(quick.path / "a" / "b")} if png else {}))
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=(needed // 2 if png else needed) - 1))
  with pytest.raises(
    UserError, match=r"num_samples: 1000000 images need up to (128.0|64.0) MB in .*; draw fewer"
  ) as caught:
    sampling.sample(config, quick.path)
  assert str(quick.path / "a" / "b") in str(caught.value) or not png
  assert main._exit_code(caught.value) == 2
  assert not quick.samples.exists() and capsys.readouterr().err.count("\n") == 1


def _likelihood(perfect, config, folder, name, seed):
  run, weights = perfect.run, perfect.params
  source = open_source(having(config, dataset=f"folder:{save_pictures(folder / name / str(seed), pictures())}").data)
  common = dict(source=source, examples=2, batch_size=8, mesh=run.mesh, seed=seed)
  if name == "bound":
    likelihood.bound(
      run.denoiser, weights, run.schedule, run.first_stage, variance="fixed_large", timesteps=2, **common
    )
  else:
    likelihood.ode(run.denoiser, weights, run.schedule, run.first_stage, steps=2, probes=1, **common)


def _preview(config, seed):
  run = tiny_run(tiny_config(channels=4, channel_multipliers=(1,), attention_resolutions=(), seed=seed))
  Preview(run, None)(run.initial_state())()


def test_a_seed_is_no_part_of_a_program(quick, perfect, config, tmp_path, monkeypatch):
  """So the folder of compiled programs serves every seed. What is drawn differs."""
  compiled, programs = jax.stages.Lowered.compile, []

  def heard(self, *options, **more):
    programs.append(self.as_text())
    return compiled(self, *options, **more)

  monkeypatch.setattr(jax.stages.Lowered, "compile", heard)

  def made(do, seed):
    programs.clear()
    do(seed)
    assert programs
    return list(programs)

  def task(name, seed):
    sampling.sample(quick.having(sample_task=name, sample_seed=seed, sampler="ddim"), quick.path)

  tasks = ("images", "progressive", "interpolate", "slerp", "inpaint", "reconstruct")
  doing = {name: functools.partial(task, name) for name in tasks}
  doing |= {name: functools.partial(_likelihood, perfect, config, tmp_path, name) for name in ("bound", "ode")}
  doing["preview"] = functools.partial(_preview, config)
  assert [name for name, do in doing.items() if made(do, 1) != made(do, 2)] == []
  for name in ("samples", "slerp", "progressive"):
    second = quick.load(name)["images"]
    assert quick.settings(name)["sample_seed"] == 2
    with np.load(quick.samples / f"{name}.1.npz") as first:
      assert np.abs(first["images"].astype(int) - second).max() > 1, name


# What is left behind.


def test_a_draw_leaves_images_their_settings_and_a_picture(quick, twenty, capsys):
  sampling.sample(quick.having(checkpoint="newest"), quick.path)
  np.testing.assert_array_equal(quick.load()["images"], twenty[:3])
  settings = quick.settings()
  assert settings["checkpoint"] == 5 and settings["variance"] == "fixed_large"
  assert (settings["sampler"], settings["sampling_steps"], settings["num_samples"]) == ("ddim", 4, 3)
  also = {"variance", "dtype", "matmul_precision", "device"}
  assert set(settings) == also | set(vars(quick.config.sample))
  told = grids.facts_of(quick.samples / "samples.png")
  assert told.pop("weights_sha256") == "0" * 64
  assert set(settings) - set(told) == {"sample_png_dir", "input_images", "mask", "guide_with", "classifier"}, (
    "no path of this machine"
  )
  assert told == {name: settings[name] for name in told}
  with Image.open(quick.samples / "samples.png") as picture:
    assert picture.size == (2 + 2 * 66, 2 + 2 * 66)
    np.testing.assert_array_equal(np.asarray(picture)[2:66:8, 2:66:8, 0], twenty[0, :, :, 0])
  out, err = capsys.readouterr()
  assert "drawing 3 images 8x8x1 with the ema weights after step 5: ddim, 4 network evaluations each" in out
  assert "drawing: 3 images, network evaluation 4/4" in out
  assert out.endswith(f"done: {quick.samples / 'samples.npz'} and {quick.samples / 'samples.png'}\n") and err == ""


def test_earlier_draws_get_numbers(quick):
  for seed in range(4):
    sampling.sample(quick.having(sample_seed=seed), quick.path)
    if seed == 2:
      (quick.samples / "samples.1.npz").unlink()  # its picture still holds the number
  assert quick.files() == [
    *("samples.1.png", "samples.2.npz", "samples.2.png", "samples.3.npz", "samples.3.png"),
    *("samples.npz", "samples.png"),
  ]
  assert [quick.settings(name)["sample_seed"] for name in ("samples.2", "samples.3", "samples")] == [1, 2, 3]


def test_more_than_a_picture_holds(quick, capsys, monkeypatch):
  monkeypatch.setattr(sampling, "_GRID_IMAGES", 4)
  sampling.sample(quick.having(num_samples=9), quick.path)
  assert "samples.png (the first 4)\n" in capsys.readouterr().out
  with Image.open(quick.samples / "samples.png") as picture:
    assert picture.size == (134, 134)


def test_png_files(quick, twenty, capsys):
  target = quick.path.parent / "a" / "png"
  sampling.sample(quick.having(sample_png_dir=str(target)), quick.path)
  assert sorted(path.name for path in target.iterdir()) == ["000000.png", "000001.png", "000002.png"]
  for i in range(3):
    with Image.open(target / f"{i:06d}.png") as image:
      assert image.mode == "L" and json.loads(image.text["ddpm_jax"])["checkpoint"] == 5
      np.testing.assert_array_equal(np.asarray(image), twenty[i, :, :, 0])
  assert f"3 PNG files in {target}" in capsys.readouterr().out
  before = quick.files()
  for folder in (target, target / "000000.png"):
    with pytest.raises(UserError, match=r"sample_png_dir: .* exists and is not an empty folder; name another"):
      sampling.sample(quick.having(sample_png_dir=str(folder)), quick.path)
  assert quick.files() == before
  (quick.path.parent / "empty").mkdir()
  sampling.sample(quick.having(sample_png_dir=str(quick.path.parent / "empty")), quick.path)
  assert len(list((quick.path.parent / "empty").iterdir())) == 3


def test_a_full_disk_at_the_end_loses_no_image(quick, twenty, monkeypatch, capsys):
  sampling.sample(quick.having(sample_seed=7), quick.path)
  before = {name: (quick.samples / name).read_bytes() for name in quick.files()}

  def full(*_, **__):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(np, "savez_compressed", full)
    with pytest.raises(RunError, match=r"workdir: cannot write the samples .*\(No space left on device\); make room"):
      sampling.sample(quick.config, quick.path)
  kept = [name for name in quick.files() if name.startswith(".drawn-")]
  assert len(kept) == 1 and quick.files() == sorted([*kept, *before])
  assert all((quick.samples / name).read_bytes() == data for name, data in before.items())
  capsys.readouterr()
  sampling.sample(quick.config, quick.path)
  assert "3 of them were drawn before" in capsys.readouterr().out
  np.testing.assert_array_equal(quick.load()["images"], twenty[:3])
