"""A run on images that are no squares, 8 x 12 pixels, from their folder to the export. No option says their size."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.data import sources
from ddpm_jax.data.pipeline import batches
from ddpm_jax.devices import make_mesh
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import evaluate as evaluate_lib
from ddpm_jax.evaluation.network import network_features
from ddpm_jax.runs import evaluate as evaluate_run
from ddpm_jax.runs import export as export_run
from ddpm_jax.runs import sample as sample_run
from ddpm_jax.runs import train as train_lib
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.training.setup import build_run, make_train_step
from ddpm_jax.weights import initial
from tests.sampling.conftest import perfect_for, pictures, save_pictures
from tests.training.tiny import host, newest_intact, tiny_config

SHAPE = (8, 12, 1)
STEPS = 4
LITTLE = dict(channels=4, attention_resolutions=(0,), dropout=0.0, num_timesteps=20, beta_end=0.4, batch_size=8)
SAMPLER = dict(sampler="ddim", sampling_steps=2, num_samples=2, sample_batch_size=8)


def train(workdir, config) -> bool:
  with StopRequest() as stop:
    return train_lib.train(config, workdir, train_lib.Invocation(stop, clock=lambda: 0.0))


@pytest.fixture(scope="module")
def trained(shared_programs, tmp_path_factory):
  """(workdir, settings) of four training steps, with a checkpoint after two, and a sample grid."""
  folder = tmp_path_factory.mktemp("oblong")
  data = save_pictures(folder / "data", pictures(20, SHAPE))
  config = tiny_config(
    dataset=f"folder:{data}", num_steps=STEPS, checkpoint_every=2, sample_every=STEPS, **LITTLE, **SAMPLER
  )
  assert train(folder / "run", config)
  return folder / "run", config_lib.from_json((folder / "run" / "config.json").read_text())


@pytest.fixture
def workdir(trained, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(trained[0], tmp_path / "run"))


def losses(workdir) -> list[float]:
  return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def params_of(workdir, config):
  run = build_run(config, SHAPE, make_mesh("pmap"))
  checkpoints = train_lib.Checkpoints(workdir / "checkpoints")
  state = newest_intact(checkpoints, run.abstract_state).state
  checkpoints.close()
  return jax.tree.leaves(host(state.params))


def size_of(path) -> tuple[int, int]:
  with Image.open(path) as image:
    return image.height, image.width


def test_what_was_left_open_is_settled_by_height(trained):
  """The lowest level has 4 x 6 pixels. Both halves of a grid have a row of four tiles of 40 x 60 pixels."""
  workdir, config = trained
  assert config.data.image_size == 0 and config.model.attention_resolutions == (4,)
  assert size_of(workdir / "samples" / f"step_{STEPS:08d}.png") == (18 + 2 + 42, 2 * (2 + 4 * 62) + 12)


def test_resumed_is_uninterrupted(trained, workdir):
  shutil.rmtree(workdir / "checkpoints" / str(STEPS))
  assert train(workdir, trained[1])
  assert losses(workdir) == losses(trained[0]) and len(losses(workdir)) == STEPS
  for mine, theirs in zip(*(params_of(path, trained[1]) for path in (workdir, trained[0])), strict=True):
    np.testing.assert_array_equal(mine, theirs)


def test_eight_devices_are_one(trained):
  _, config = trained
  run, device, alone = build_run(config, SHAPE, make_mesh("pmap")), jax.devices()[0], []
  state, step = jax.device_put(host(run.initial_state()), device), jax.jit(make_train_step(run))
  stream = batches(
    sources.open_source(config.data), batch_size=config.data.batch_size, seed=config.train.seed, start_step=0
  )
  for _ in range(STEPS):
    state, metrics = step(state, jax.device_put(next(stream), device))
    alone.append(float(metrics["loss"]))
  stream.close()
  np.testing.assert_allclose(losses(trained[0]), alone, rtol=2e-5)


TASKS = {  # task -> rows and columns of its picture, and how many gaps of 12 + 2 pixels are in a row
  "progressive": (2, 3, 0),
  "interpolate": (2, 11, 2),
  "slerp": (2, 9, 0),
  "inpaint": (2, 6, 1),
  "reconstruct": (2, 4, 0),
}


def test_every_task_draws_them(trained, workdir, monkeypatch):
  """With a network that compiles in a moment."""
  weights = perfect_for(trained[1], SHAPE)
  monkeypatch.setattr(sample_run, "find_weights", lambda config, path: weights)
  for task, (rows, columns, gaps) in TASKS.items():
    config = config_lib.override(trained[1], {"sample_task": task} | ({"repaint_jump": 1} if task == "inpaint" else {}))
    sample_run.sample(config, workdir)
    with np.load(workdir / "samples" / f"{task}.npz") as archive:
      images, given = archive["images"], archive.get("given")
    assert images.shape[-3:] == SHAPE, task
    if task == "inpaint":  # what is not hidden, all but the middle quarter, is the given image's
      np.testing.assert_array_equal(images[:, :, :2], np.repeat(given[:, None, :2], images.shape[1], axis=1))
    assert size_of(workdir / "samples" / f"{task}.png") == (2 + rows * 42, 2 + columns * 62 + gaps * 14), task


def test_they_are_measured(trained, workdir, monkeypatch, capsys):
  monkeypatch.setattr(evaluate_lib, "network_features", functools.partial(network_features, num_steps=2))
  measured = dict(measures=("frechet", "neighbours", "bound", "ode"), features="network", evaluate_samples=4)
  config = config_lib.override(trained[1], measured | dict(bound_timesteps=2, ode_steps=1, likelihood_examples=4))
  evaluate_run.evaluate(config, workdir)
  result = json.loads((workdir / "eval" / f"{STEPS}.json").read_text())
  assert result["measures"]["network_distance"] > 0 and result["reference"]["fingerprint"]["shape"] == "8x12x1"
  assert all(np.isfinite(result[name]["train"]["total"]) for name in ("bits_per_dim", "ode_bits_per_dim"))
  stats = workdir.parent / "stats.npz"
  evaluate_run.evaluate(config_lib.override(config, {"write_reference": str(stats)}), workdir)
  with np.load(stats) as archive:
    assert archive["mu"].shape == archive["sigma"].shape[:1]
  assert (workdir / "report.html").stat().st_size > 10_000


def test_they_go_out_and_come_in_again(trained, workdir, tmp_path, capsys):
  for form in ("diffusers", "safetensors", "jax"):
    only = {"export_platforms": ("cpu",)} if form == "jax" else {}
    options = {"export_format": form, "export_dir": str(tmp_path / form)} | only
    export_run.export(config_lib.override(trained[1], options), workdir)
  assert json.loads((tmp_path / "diffusers" / "unet" / "config.json").read_text())["sample_size"] == [8, 12]
  assert "8x12x1" in (tmp_path / "diffusers" / "README.md").read_text()
  assert "uint8 [N, 8, 12, 1]" in (tmp_path / "jax" / "README.md").read_text()

  sample_run.sample(trained[1], workdir)
  with np.load(workdir / "samples" / "samples.npz") as archive:
    drawn = archive["images"]
  assert drawn.shape == (2, *SHAPE) and drawn.dtype == np.uint8
  np.testing.assert_array_equal(ddpm_jax.load(workdir).sample(2, steps=2, sampler="ddim", batch_size=8), drawn)
  drawn = drawn.astype(int)
  for path in (tmp_path / "diffusers", tmp_path / "safetensors" / "model.safetensors"):
    assert initial.inspect_source(str(path)).image_shape == SHAPE
    model = ddpm_jax.load(path)
    assert model.config.model.attention_resolutions == (4,)
    assert np.abs(model.sample(2, steps=2, sampler="ddim", batch_size=8) - drawn).max() <= 1
  program = jax_export.deserialize(bytearray((tmp_path / "jax" / "sampler.stablehlo").read_bytes()))
  weights = dict(np.load(tmp_path / "jax" / "weights.npz"))
  assert np.abs(np.asarray(program.call(weights, np.uint32(0), np.arange(2, dtype=np.int32))) - drawn).max() <= 1

  tuned = config_lib.override(
    initial.base_config(str(tmp_path / "diffusers")), {"init_from": str(tmp_path / "diffusers")}
  )
  params, shape = initial.read_params(tuned)
  assert shape == SHAPE
  for mine, theirs in zip(
    jax.tree.leaves(host(params)), jax.tree.leaves(host(ddpm_jax.load(workdir).params)), strict=True
  ):
    np.testing.assert_array_equal(mine, theirs)


def test_a_size_that_the_network_cannot_take_is_refused_before_anything_is_prepared(trained, tmp_path, monkeypatch):
  """Of a folder before it is decoded, of a data set of TFDS before it is looked for."""
  monkeypatch.setattr(sources, "decode_all", None)
  monkeypatch.setattr(sources.prepared, "_prepare", None)
  (tmp_path / "data").mkdir()
  for changes, message in (
    (
      {"channel_multipliers": (1, 1, 1, 1)},
      "image_size: 8x12 is not divisible by 8, as the 4 levels of .* use --image_size=8 or 8x16, ",
    ),
    (
      {"image_size": "50x66", "channel_multipliers": (1, 1, 1, 1)},
      "image_size: 50x66 is .* use --image_size=48x64 or 56x72, or fewer levels",
    ),
    (
      {"dataset": "cifar10", "image_size": "50x64", "channel_multipliers": (1, 1, 1)},
      "use --image_size=48x64 or 52x64, or",
    ),
    (
      {"dataset": "cifar10", "channel_multipliers": (1,) * 7},
      "image_size: 32 is .* use --image_size=64, or fewer levels",
    ),
  ):
    config = config_lib.override(trained[1], {"data_dir": str(tmp_path / "data")} | changes)
    with pytest.raises(UserError, match=message):
      train(tmp_path / "run", config)
  assert [path.name for path in tmp_path.iterdir()] == ["data"] and not list((tmp_path / "data").iterdir())
