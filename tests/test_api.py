"""A trained model in Python: what the command draws, and what the equations say."""

import inspect
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging

import ddpm_jax
from ddpm_jax import api
from ddpm_jax import config as config_lib
from ddpm_jax.diffusion.denoiser import Denoiser
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.errors import UserError
from ddpm_jax.runs import export as exchange
from ddpm_jax.runs import sample as sampling
from tests.sampling.conftest import Trained, make_workdir, noise
from tests.training.tiny import CONDITIONAL, IMAGE_SHAPE, host


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
  """A workdir with checkpoints 3 and 5."""
  return make_workdir(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def model(trained) -> api.Model:
  return ddpm_jax.load(trained.path)


@pytest.fixture(scope="module")
def by_class(tmp_path_factory) -> Trained:
  """The same of a conditional run."""
  return make_workdir(tmp_path_factory.mktemp("by_class"), ("cats", "dogs", "flags"), **CONDITIONAL)


def having_network(model, network, **changes) -> api.Model:
  """The same model with another network and other settings."""
  config = config_lib.override(model.config, changes)
  denoiser = Denoiser(network, PARAMETERIZATIONS[config.diffusion.prediction])
  run = model.weights.run._replace(denoiser=denoiser)
  return api.Model(config, model.weights._replace(run=run))


def refusal(function, *arguments, **options) -> str:
  with pytest.raises(UserError) as caught:
    function(*arguments, **options)
  text = str(caught.value)
  assert "\n" not in text
  return text


def test_the_package_imports_no_jax_until_it_loads():
  """And shows its API all the same: to dir(), and to help(), which imports it."""
  code = """
import pydoc
import sys
import ddpm_jax
shown = dir(ddpm_jax)
assert {*ddpm_jax.__all__, "__version__"} <= set(shown) and "TYPE_CHECKING" not in shown
assert "jax" not in sys.modules and "numpy" not in sys.modules
page = pydoc.plain(pydoc.render_doc(ddpm_jax))
assert "class Model(" in page and "Reads a trained model." in page and "__getattr__" not in page
assert callable(ddpm_jax.load) and "jax" in sys.modules
try:
  ddpm_jax.lode
except AttributeError as error:
  assert "'ddpm_jax' has no attribute 'lode'" in str(error)
"""
  subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_model_says_of_itself(trained, model):
  assert model.config == config_lib.override(trained.config, {})
  assert model.image_shape == IMAGE_SHAPE
  assert model.schedule.num_timesteps == 200 and model.schedule.alpha_bar[0] == 1
  assert repr(model).startswith("<Model of 8x8x1 images, ") and repr(model).endswith(
    " parameters: the ema weights after step 5>"
  )


@pytest.mark.parametrize(
  ("options", "step", "seed"),
  [({}, 5, 50), ({"checkpoint": 3}, 3, 30), ({"checkpoint": "3", "weights": "raw"}, 3, 3)],
)
def test_the_weights_that_were_asked_for(trained, options, step, seed):
  before = absl_logging.get_verbosity()
  model = ddpm_jax.load(str(trained.path), **options)
  assert absl_logging.get_verbosity() == before
  assert model.weights.step == step
  kernel = host(model.params)["conv_in"]["kernel"]
  first = host(model.weights.run.initial_state()).params["conv_in"]["kernel"]
  np.testing.assert_allclose(kernel, first + noise(first.shape, seed), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
  ("asked", "options"),
  [
    ({}, {}),
    ({"seed": 2**32 - 1}, {"sample_seed": 2**32 - 1}),
    (
      {"seed": 1, "sampler": "dpmpp", "steps": 6, "eta": 1.0},
      {"sample_seed": 1, "sampler": "dpmpp", "sampling_steps": 6, "eta": 1.0},
    ),
    (
      {"sampler": "ddim", "steps": 5, "time_grid": "quadratic", "threshold": "dynamic", "threshold_quantile": 0.8},
      {
        "sampler": "ddim",
        "sampling_steps": 5,
        "time_grid": "quadratic",
        "threshold": "dynamic",
        "threshold_quantile": 0.8,
      },
    ),
    (
      {"sampler": "ddpm", "steps": 4, "variance": "fixed_small", "threshold": "none", "batch_size": 8},
      {"sampler": "ddpm", "sampling_steps": 4, "variance": "fixed_small", "threshold": "none"},
    ),
  ],
)
def test_draws_what_the_command_draws(trained, model, tmp_path, asked, options):
  shutil.copytree(trained.path, tmp_path / "run")
  copy = Trained(tmp_path / "run", trained.config)
  sampling.sample(copy.having(num_samples=11, **options), copy.path)
  got, theirs = model.sample(11, **asked), copy.load()["images"]  # in batches of 8
  assert got.shape == theirs.shape and got.dtype == theirs.dtype == np.uint8
  assert np.abs(got.astype(int) - theirs).max() <= 1  # equal but for the rounding to uint8
  assert len(np.unique(got.reshape(11, -1), axis=0)) == 11


@pytest.mark.parametrize(
  ("asked", "options"),
  [
    ({"classes": "flags", "guidance_scale": 2}, {"classes": ("flags",), "guidance_scale": (2.0,)}),
    (
      {"classes": ["dogs", 0], "guidance_scale": 1.5, "guidance_interval": (0.3, 2)},
      {"classes": ("dogs", "0"), "guidance_scale": (1.5,), "guidance_interval": (0.3, 2.0)},
    ),
    ({"guidance_scale": 3.0, "guide_with": 3}, {"guidance_scale": (3.0,), "guide_with": "3"}),
  ],
)
def test_draws_by_class_what_the_command_draws(by_class, tmp_path, asked, options):
  shutil.copytree(by_class.path, tmp_path / "run")
  copy = Trained(tmp_path / "run", by_class.config)
  sampling.sample(copy.having(num_samples=5, **options), copy.path)
  model = ddpm_jax.load(by_class.path)
  assert model.class_names == ("cats", "dogs", "flags")
  if "guide_with" in asked:
    asked = asked | {"guide_with": ddpm_jax.load(by_class.path, checkpoint=3)}
  got = model.sample(5, **asked).astype(int)
  assert np.abs(got - copy.load()["images"]).max() <= 1
  plain = model.sample(5, classes=asked.get("classes"), guidance_scale=1.0)
  assert np.abs(got - plain).max() > 5
  programs = len(model._draws)
  assert np.abs(model.sample(5, **asked | {"guidance_scale": 8.0, "classes": "cats"}) - got).max() > 5
  assert len(model._draws) == programs  # neither the scale nor the classes are a part of one


def test_what_a_conditional_model_sees(by_class):
  """With the class of each, of all, or of none."""
  model, x = ddpm_jax.load(by_class.path), np.random.default_rng(0).standard_normal((2, *IMAGE_SHAPE), np.float32)
  for function in (model.denoise, model.eps):
    cats, flags, both = (function(x, 150, label) for label in (0, np.int64(2), [0, 2]))
    np.testing.assert_allclose(both, [cats[0], flags[1]], rtol=1e-4, atol=1e-5)
    assert np.abs(cats - flags).max() > 1e-3
  run = model.weights.run
  nothing = run.denoiser.bind(model.params, jnp.full(2, 3))(jnp.asarray(x), run.schedule.level(jnp.asarray(150)))
  np.testing.assert_allclose(model.eps(x, 150), nothing.eps, rtol=1e-4, atol=1e-5)


def test_options_of_the_process_change_nothing(trained, model):
  """As a script has them that computes in 64 bits."""
  wanted = model.sample(2, seed=9)
  with (
    jax.enable_x64(True),
    jax.threefry_partitionable(False),
    jax.default_prng_impl("rbg"),
    jax.default_matmul_precision("bfloat16"),
  ):
    np.testing.assert_array_equal(ddpm_jax.load(trained.path).sample(2, seed=9), wanted)


def test_the_arithmetic_may_be_another_than_in_training(trained, model):
  other = ddpm_jax.load(trained.path, dtype="bfloat16", matmul_precision="highest")
  assert config_lib.changed(model.config, other.config) == [
    ("dtype", "float32", "bfloat16"),
    ("matmul_precision", "default", "highest"),
  ]
  x, t = np.random.default_rng(0).standard_normal((2, *IMAGE_SHAPE)), [50, 150]
  difference = np.abs(other.eps(x, t) - model.eps(x, t)).max()
  assert 1e-4 < difference < 0.1  # a bfloat16 has 8 bits
  assert refusal(ddpm_jax.load, trained.path, dtype="float16").startswith("dtype: 'float16' is unknown")


def test_another_seed_compiles_nothing(model):
  first, compiled = model.sample(2, seed=5), []

  def hear(event, seconds, **more):
    if event.endswith("backend_compile_duration"):
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(hear)
  try:
    assert np.abs(model.sample(2, seed=6).astype(int) - first).max() > 1
    assert not compiled
    model.sample(2, seed=6, sampler="ddim", steps=2)
    assert compiled, "the listener hears nothing"
  finally:
    jax.monitoring.unregister_event_duration_listener(hear)


def test_integers_of_numpy_are_integers(model):
  theirs = model.sample(np.int64(2), seed=np.uint32(5), sampler="ddim", steps=np.int32(2))
  np.testing.assert_array_equal(theirs, model.sample(2, seed=5, sampler="ddim", steps=2))


def test_floats_of_numpy_are_floats(model):
  theirs = model.sample(2, sampler="ddim", steps=2, eta=np.float64(0.5), threshold="dynamic", threshold_quantile=1)
  how = {"sampler": "ddim", "steps": 2, "eta": 0.5, "threshold": "dynamic", "threshold_quantile": 1.0}
  np.testing.assert_array_equal(theirs, model.sample(2, **how))


# Flags that the command draws with and the API has not, and why.
NOT_IN_API = {
  "sample_png_dir": "files are for the command; the images are here",
  **dict.fromkeys(
    ("sample_task", "input_images", "mask", "interpolation_timestep", "repaint_jump", "repaint_resamples"),
    "the tasks make pictures and files of their own",
  ),
}


def test_the_api_has_what_the_command_draws_with():
  """All flags of the group, and what else may differ from the training."""
  rules = {field.name: field.metadata for _, field, _ in config_lib.options(config_lib.Config())}
  command = {field.name for section, field, _ in config_lib.options(config_lib.Config()) if section == "sample"}
  command |= {name for name, rule in rules.items() if rule["may_change_once_trained"] and not rule["may_change"]}
  command |= {"variance"}
  here = {*inspect.signature(ddpm_jax.load).parameters, *inspect.signature(api.Model.sample).parameters}
  here = {api.SHORT_NAMES.get(name, name) for name in here - {"self", "path", "network"}}
  here = here - {"weights"} | {"sample_weights"}  # of `load`
  assert command - here == NOT_IN_API.keys(), "no parameter, and no reason"
  assert here <= command
  names = inspect.signature(api.Model.sample).parameters
  text = inspect.getdoc(api.Model.sample)
  assert all(f"\n  {name}: " in text for name in names if name != "self")


def test_x0_hat_and_eps_hat_of_a_network_that_predicts_v(model):
  """x0 = a x_t - b v, eps = b x_t + a v (Salimans and Ho 2022), at the t of each example."""
  v = np.random.default_rng(0).standard_normal(IMAGE_SHAPE).astype(np.float32)
  mine = having_network(
    model, lambda params, xt, time, cond: jnp.asarray(v)[None] * (time[:, None, None, None] + 1), prediction="v"
  )
  xt, t = np.random.default_rng(1).standard_normal((3, *IMAGE_SHAPE)), np.array([1, 60, 200])
  alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.05, 200))[t - 1, None, None, None]
  a, b, said = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), v * t[:, None, None, None]
  np.testing.assert_allclose(mine.denoise(xt, t), np.clip(a * xt - b * said, -1, 1), atol=2e-4)
  np.testing.assert_allclose(mine.eps(xt, t), b * xt + a * said, rtol=1e-4, atol=2e-4)
  # One t for all; more examples than devices.
  np.testing.assert_allclose(mine.denoise(np.repeat(xt[1:2], 9, 0), 60)[8], mine.denoise(xt, t)[1], atol=1e-6)


def test_the_threshold_is_that_of_the_settings(model):
  far = having_network(model, lambda params, xt, time, cond: 0 * xt + 3.0, prediction="x0", threshold="none")
  assert (far.denoise(np.zeros((1, *IMAGE_SHAPE)), 5) == 3).all()


@pytest.mark.parametrize("form", ["safetensors", "diffusers"])
def test_loads_what_was_exported(trained, model, tmp_path, form):
  exchange.export(trained.having(export_format=form, export_dir=str(tmp_path / "out")), trained.path)
  path = tmp_path / "out" / ("model.safetensors" if form == "safetensors" else "")
  other = ddpm_jax.load(path)
  assert other.image_shape == IMAGE_SHAPE and other.config.diffusion.num_timesteps == 200
  x = np.random.default_rng(2).standard_normal((8, *IMAGE_SHAPE))
  np.testing.assert_allclose(other.denoise(x, 50), model.denoise(x, 50), atol=1e-5)
  assert "has no effect; leave it out" in refusal(ddpm_jax.load, path, weights="raw")
  assert "has no effect" in refusal(ddpm_jax.load, path, checkpoint=5)


X = np.zeros((2, *IMAGE_SHAPE), np.float32)


@pytest.mark.parametrize(
  ("call", "parts"),
  [
    (lambda model: model.denoise(X[0], 1), ["x: [8, 8, 1] is not [B, 8, 8, 1]"]),
    (lambda model: model.denoise(X[:0], 1), ["x: [0, 8, 8, 1] is not [B, 8, 8, 1]"]),
    (lambda model: model.eps(X[:, :4], 1), ["x: [2, 4, 8, 1]"]),
    (lambda model: model.denoise(X.astype(np.uint8), 1), ["x: uint8", "encode"]),
    (lambda model: model.denoise(X, 0), ["t: 0 to 0 is not in 1..200"]),
    (lambda model: model.eps(X, [3, 201]), ["t: 3 to 201 is not in 1..200"]),
    (lambda model: model.denoise(X, [3]), ["t: int64 [1]", "[2]"]),
    (lambda model: model.denoise(X, 0.5), ["t: float64 []"]),
    (lambda model: model.denoise([X[0].tolist(), X[0, :4].tolist()], 1), ["x: its rows are not of one length"]),
    (lambda model: model.eps(X, [[1], [2, 3]]), ["t: its rows are not of one length"]),
    (lambda model: model.sample(2.5), ["num: a float is no whole number"]),
    (lambda model: model.sample(2, seed=np.zeros((2, 9))), ["seed: a ndarray is no whole number"]),
    (lambda model: model.sample(0), ["num: 0 must be at least 1"]),
    (lambda model: model.sample(seed=-1), ["seed: -1"]),
    (lambda model: model.sample(sampler="euler"), ["sampler: 'euler' is unknown", "heun"]),
    (lambda model: model.sample(steps=201), ["steps: 201 must not exceed num_timesteps=200; lower steps"]),
    (lambda model: model.sample(sampler="heun", eta=1.0), ["eta: 1.0 has no effect with sampler=heun"]),
    (lambda model: model.sample(eta="1"), ["eta: '1' is not of its type, float"]),
    (lambda model: model.sample(time_grid="even"), ["time_grid: 'even' is unknown", "logistic"]),
    (lambda model: model.sample(threshold_quantile=0.9), ["threshold_quantile: 0.9 has no effect", "dynamic"]),
    (
      lambda model: model.sample(sampler="ddim", variance="fixed_small"),
      ["variance: fixed_small has no effect with sampler=ddim"],
    ),
  ],
)
def test_what_is_wrong_is_one_line(model, call, parts):
  text = refusal(call, model)
  assert all(part in text for part in parts), text


def test_what_is_wrong_with_a_class_is_one_line(by_class, model):
  other = ddpm_jax.load(by_class.path)
  for call, part in (
    (
      lambda: other.sample(classes="flag"),
      "classes: 'flag' is none of the 3 classes of the model; did you mean flags?",
    ),
    (
      lambda: other.sample(classes=3),
      "classes: '3' is none of the 3 classes of the model; use some of cats, dogs, flags",
    ),
    (lambda: other.sample(guidance_scale=-1), "guidance_scale: -1.0 must be at least 0"),
    (lambda: other.sample(guidance_scale="2"), "guidance_scale: ('2',) is not of its type, tuple"),
    (
      lambda: other.sample(guidance_interval=(0.2, 1)),
      "guidance_interval: 0.2,1.0 has no effect with guidance_scale=1",
    ),
    (
      lambda: other.sample(guidance_scale=2, guidance_interval=(1, 1)),
      "guidance_interval: 1.0,1.0 holds no noise level",
    ),
    (lambda: other.sample(guidance_scale=2, guide_with="5"), "guide_with: '5' is no model; give what ddpm_jax.load"),
    (lambda: other.sample(classes=np.int32(3)), "classes: '3' is none of the 3 classes of the model"),
    (lambda: other.sample(guide_with=model), "guide_with: has no effect with guidance_scale=1"),
    (lambda: other.sample(guidance_scale=2, guide_with=other), "guide_with: it is the model itself"),
    (
      lambda: model.sample(guidance_scale=2, guide_with=other),
      "guide_with: its classes are cats, dogs, flags, those of",
    ),
    (lambda: model.sample(guidance_scale=2), "guidance_scale: 2.0 has no effect, as the model is unconditional"),
    (lambda: model.denoise(X, 5, 0), "label: has no effect, as the model is unconditional; leave it out"),
    (lambda: other.denoise(X, 5, 3), "label: 3 to 3 is not in 0..2, see class_names"),
    (lambda: other.denoise(X, 5, [0, 1, 2]), "label: int64 [3] is neither a whole number nor [2] of them"),
    (lambda: other.denoise(X, 5, 0.5), "label: float64 [] is neither a whole number nor [2] of them"),
  ):
    assert part in refusal(call)


def test_no_model_is_one_line(trained, tmp_path):
  assert f"there is no {tmp_path}/none" in refusal(ddpm_jax.load, tmp_path / "none")
  assert "is no folder of diffusers" in refusal(ddpm_jax.load, tmp_path)
  assert "has no 7, only 3, 5" in refusal(ddpm_jax.load, trained.path, checkpoint=7)
  assert "'mean' is unknown; use one of ema, raw" in refusal(ddpm_jax.load, trained.path, weights="mean")
  assert "no path in a file system" in refusal(ddpm_jax.load, "gs://bucket/run")
  assert "cannot be looked at (File name too long)" in refusal(ddpm_jax.load, "a" * 300)
  assert "begins with the home of nobody here" in refusal(ddpm_jax.load, "~nobody_here/run")
