"""The exported sampler draws what the run `sample` draws, without the package that wrote it."""

import dataclasses
import functools
import re
import subprocess
import sys
from typing import Any, cast

import jax
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image

from ddpm_jax import config as config_lib
from ddpm_jax.devices import make_mesh
from ddpm_jax.errors import UserError
from ddpm_jax.export.program import export_sampler, write_program
from ddpm_jax.keys import seeded
from ddpm_jax.runs import export as run
from ddpm_jax.sampling.classes import Classes
from ddpm_jax.sampling.draw import bind_for_sampling, make_draw, table_of
from ddpm_jax.sampling.drawn import Drawn
from ddpm_jax.training.setup import build_run
from ddpm_jax.weights.load import Weights
from tests.sampling.conftest import make_workdir
from tests.training.tiny import CONDITIONAL, IMAGE_SHAPE, tiny_config

# Of custom calls, this alone may be left: it checks shapes, and jax.export promises it.
STABLE = {"shape_assertion"}
PROGRAM = "sampler.stablehlo"


def tiny(shape=IMAGE_SHAPE, **changes):
  """(config, weights) of a network that has something to say, of two levels with attention."""
  config = tiny_config(sampling_steps=4, sample_batch_size=8, export_format="jax", **changes)
  parts = build_run(config, shape, make_mesh("pmap"))
  rng = np.random.default_rng(0)
  noise = lambda leaf: 0.07 * rng.standard_normal(leaf.shape, np.float32)  # noqa: E731
  params = jax.tree.map(lambda leaf: leaf + noise(leaf), parts.initial_state().params)
  return config, Weights(parts, jax.device_put(params, parts.mesh.replicated), 5, "ema", "0" * 64)


def having(config, **changes):
  return config_lib.override(config, changes)


def drawn_by_the_run(config, weights, folder, number, seed, classes=None):
  """What `--mode=sample` draws, on eight devices."""
  drawn = Drawn(weights, having(config, sample_seed=seed), folder, classes)
  drawn.draw(number, done=lambda _: None, say=lambda _: None)
  drawn.close()
  return np.array(drawn.images(number))


def load_and_call(folder, program, seed, index, *condition):
  sampler = jax_export.deserialize(bytearray((folder / program).read_bytes()))
  weights = dict(np.load(folder / "weights.npz"))
  return np.asarray(sampler.call(weights, np.uint32(seed), np.asarray(index, np.int32), *condition))


def assert_close(mine, theirs):
  """Equal but for the rounding to uint8."""
  assert mine.shape == theirs.shape and mine.dtype == theirs.dtype == np.uint8
  assert np.abs(mine.astype(int) - theirs).max() <= 1


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """(config, weights, folder) of an export with the defaults."""
  config, weights = tiny()
  folder = tmp_path_factory.mktemp("program")
  write_program(config, weights, folder)
  return config, weights, folder


def test_the_folder_holds_what_a_person_needs(written):
  _, weights, folder = written
  assert {path.name for path in folder.iterdir()} == {PROGRAM, "weights.npz", "run.py", "README.md"}
  arrays = dict(np.load(folder / "weights.npz"))
  assert set(map(str, {array.dtype for array in arrays.values()})) == {"float32"}
  np.testing.assert_array_equal(arrays["down0_block0.conv1.kernel"], weights.params["down0_block0"]["conv1"]["kernel"])
  assert len(arrays) == len(jax.tree.leaves(weights.params))
  readme = (folder / "README.md").read_text()
  for line in (
    "| sampler | ddpm |",
    "| variance | fixed_large |",
    "| network evaluations for each image | 4 |",
    "| weights | the ema weights after step 5 |",
  ):
    assert line in readme.splitlines()
  program = jax_export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
  assert f"Exported with JAX {jax.__version__} for cpu, cuda, tpu; calling convention" in readme
  assert f"calling convention {program.calling_convention_version}." in readme
  assert program.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize("seed", [0, 7, 2**31 + 1, 2**32 - 1])
def test_image_i_of_a_seed_is_that_of_the_run_sample(written, tmp_path, seed):
  config, weights, folder = written
  theirs = drawn_by_the_run(config, weights, tmp_path, 8, seed)
  assert_close(load_and_call(folder, PROGRAM, seed, range(8)), theirs)
  assert len(np.unique(theirs.reshape(8, -1), axis=0)) == 8
  if seed == 7:  # any number, any of them
    assert_close(load_and_call(folder, PROGRAM, seed, range(3)), theirs[:3])
    assert_close(load_and_call(folder, PROGRAM, seed, [6]), theirs[6:7])


@pytest.mark.parametrize(
  "changes",
  [
    {"sampler": "ddim", "eta": 0.5, "threshold": "dynamic", "threshold_quantile": 0.9},
    {"sampler": "dpmpp", "eta": 1.0, "time_grid": "uniform", "prediction": "v"},
    {"sampler": "heun", "threshold": "none", "dtype": "bfloat16"},
    {"variance": "fixed_small", "prediction": "x0", "remat": "blocks"},
    CONDITIONAL | {"guidance_scale": (2.0,), "guidance_interval": (0.2, 5.0), "sampler": "ddim"},
    CONDITIONAL | {"label_dropout": 0.0},
  ],
  ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_the_settings_are_honoured_and_nothing_is_lost_by_writing(changes, tmp_path):
  """Bit for bit what the same function gives where it was never written: one device, as many images at once."""
  config, weights = tiny(**changes)
  write_program(config, weights, tmp_path)
  index = np.arange(4, dtype=np.int32)
  label = [np.array([0, 2, 1, 1], np.int32)] * weights.run.conditional
  (scale,), takes_scale = config.sample.guidance_scale, weights.run.null_label is not None
  got = load_and_call(tmp_path, PROGRAM, 3, index, *label, *[np.float32(scale)] * takes_scale)
  parts, one = weights.run, make_mesh("pmap", jax.devices()[:1])
  draw = functools.partial(
    make_draw,
    bind_for_sampling(parts, config.sample),
    table_of(config.sample, parts.schedule, config.diffusion.variance),
    first_stage=parts.first_stage,
    mesh=one,
    stream="sample",
  )
  params = jax.device_put(weights.params, one.replicated)
  np.testing.assert_array_equal(got, draw()(seeded(params, 3, scale), index, *label))
  if takes_scale:
    unguided = load_and_call(tmp_path, PROGRAM, 3, index, *label, np.float32(1))
    assert_close(unguided, draw()(seeded(params, 3), index, *label))
    assert np.abs(unguided.astype(int) - got).max() > 5
  assert got.std() > 10


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
@pytest.mark.parametrize("number", [None, 2])
def test_each_platform_gets_its_own_convolutions_and_no_unstable_call(platform, number):
  config, weights = tiny()
  text = export_sampler(having(config, export_platforms=(platform,)), weights, number).mlir_module()
  assert set(re.findall(r"custom_call @([\w.$]+)", text)) <= (STABLE if number is None else set())
  # The convolution that halves the image has a stride everywhere but on CPUs, see runtime/cpu/convolution.py.
  assert ("stride = [2, 2]" in text) == (platform != "cpu")


def test_one_program_for_several_platforms(written):
  config, weights, _ = written
  text = export_sampler(config, weights, None).mlir_module()
  assert "stride = [2, 2]" in text and "stablehlo.case" in text
  assert set(re.findall(r"custom_call @([\w.$]+)", text)) <= STABLE


def test_a_platform_that_was_not_named_is_refused(written):
  config, weights, folder = written
  elsewhere = export_sampler(having(config, export_platforms=("tpu",)), weights, 2)
  with pytest.raises(ValueError, match=r"platforms .*tpu.* used on .*cpu"):
    elsewhere.call(dict(np.load(folder / "weights.npz")), np.uint32(0), np.arange(2, dtype=np.int32))


def test_no_kernel_of_one_kind_of_device_is_exported(monkeypatch):
  """Also where the run itself has one."""
  config, weights = tiny(dtype="bfloat16", num_heads=2)
  denoiser = weights.run.denoiser
  fused = dataclasses.replace(denoiser, network=dataclasses.replace(cast(Any, denoiser.network), attention="cudnn"))
  asked, plain = [], jax.nn.dot_product_attention

  def recorded(q, k, v, implementation="xla"):
    asked.append(implementation)
    return plain(q, k, v)

  monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
  jax.eval_shape(fused.network, weights.params, np.zeros((1, *IMAGE_SHAPE), np.float32), np.zeros(1, np.int32))
  assert set(asked) == {"cudnn"}
  asked.clear()
  export_sampler(config, weights._replace(run=weights.run._replace(denoiser=fused)), 2)
  assert set(asked) == {"xla"}


def test_named_batch_sizes(written, tmp_path):
  config, weights, folder = written
  write_program(having(config, export_batch_sizes=(2, 3)), weights, tmp_path)
  assert sorted(path.name for path in tmp_path.glob("*.stablehlo")) == ["sampler_2.stablehlo", "sampler_3.stablehlo"]
  theirs = load_and_call(folder, PROGRAM, 1, range(3))
  assert_close(load_and_call(tmp_path, "sampler_3.stablehlo", 1, range(3)), theirs)
  assert_close(load_and_call(tmp_path, "sampler_2.stablehlo", 1, [1, 2]), theirs[1:])
  with pytest.raises(ValueError, match="shape"):
    load_and_call(tmp_path, "sampler_2.stablehlo", 1, range(3))
  assert "N is 2 or 3, as the file says" in (tmp_path / "README.md").read_text()
  assert "sampler_{number}.stablehlo" in (tmp_path / "run.py").read_text()


# The script runs where neither this package nor Flax can be imported.
_ALONE = """
import runpy, sys
for name in ("ddpm_jax", "flax", "optax", "orbax", "chex", "absl", "safetensors", "matplotlib"):
  sys.modules[name] = None
sys.argv = ["run.py", *sys.argv[2:]]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
  ("shape", "sizes", "changes"), [((8, 8, 1), (), {}), ((8, 4, 3), (2,), {}), ((8, 8, 1), (), CONDITIONAL)]
)
def test_the_script_needs_four_packages(shape, sizes, changes, tmp_path):
  config, weights = tiny(shape, export_batch_sizes=sizes, **changes)
  folder, elsewhere = tmp_path / "exported", tmp_path / "elsewhere"
  for path in (folder, elsewhere):
    path.mkdir()
  write_program(config, weights, folder)
  assert len((folder / "run.py").read_text().splitlines()) <= 18 + 3 * bool(changes)
  number = sizes[0] if sizes else 3
  arguments = ["9"] if sizes else ["9", "3", *["2,0", "1.5"] * bool(changes)]
  alone = _ALONE.format(script=str(folder / "run.py"))
  subprocess.run([sys.executable, "-c", alone, "run.py", *arguments], cwd=elsewhere, check=True)
  archive = np.load(elsewhere / "samples.npz")
  drawn, classes = archive["images"], None
  if changes:
    assert archive["labels"].tolist() == [2, 0, 2]
    config, classes = having(config, guidance_scale=(1.5,)), Classes(np.array([2, 0], np.int32), weights.class_names)
    assert "| `label` | int32 [N], the class of each image: 0 0, 1 1, 2 2 |" in (folder / "README.md").read_text()
  assert_close(drawn, drawn_by_the_run(config, weights, tmp_path / "drawn", number, 9, classes))
  with Image.open(elsewhere / "samples.png") as picture:
    strip = np.asarray(picture).reshape(shape[0], number, shape[1], shape[2])
  np.testing.assert_array_equal(strip.swapaxes(0, 1), drawn)


def test_other_tasks_are_refused(written, tmp_path):
  config, weights, _ = written
  with pytest.raises(UserError, match="sample_task: slerp cannot be exported; leave it out"):
    write_program(having(config, sample_task="slerp"), weights, tmp_path)
  assert not list(tmp_path.iterdir())


def test_the_run_makes_the_folder_whole_or_not_at_all(tmp_path):
  trained = make_workdir(tmp_path)
  config = trained.having(export_format="jax", export_dir=str(tmp_path / "out"), sampler="dpmpp", checkpoint="3")
  with pytest.raises(UserError, match="sample_task: slerp"):
    run.export(having(config, sample_task="slerp"), trained.path)
  assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]
  run.export(config, trained.path)
  assert {path.name for path in (tmp_path / "out").iterdir()} == {*("README.md", "run.py", "weights.npz"), PROGRAM}
  readme = (tmp_path / "out" / "README.md").read_text()
  assert "| variance |" not in readme  # of the ancestral sampler alone
  assert "| sampler | dpmpp |" in readme and "| weights | the ema weights after step 3 |" in readme
