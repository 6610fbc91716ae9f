"""Folders of ours in diffusers, and folders of diffusers here: the same numbers.

pip install -e '.[test,interop]'
python -m pytest tests/interop
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.devices import make_mesh
from ddpm_jax.diffusion.denoiser import Denoiser, thresholded
from ddpm_jax.diffusion.guidance import guided, pair_of
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.diffusion.samplers import make_sampler, sample, steps_table
from ddpm_jax.diffusion.schedules import make_schedule, reverse_variance
from ddpm_jax.export.card import card
from ddpm_jax.models.build import UNetNetwork, build_denoiser, build_model, num_params
from ddpm_jax.training.setup import build_run
from ddpm_jax.weights import diffusers as folders
from ddpm_jax.weights.load import Weights
from ddpm_jax.weights.options import diffusion_settings, scheduler_options, unet_options
from tests.weights.make_diffusers_golden import (
  ADM,
  IDDPM,
  LDM,
  PUBLISHED,
  ddim_trajectory,
  image_shape,
  labels_of,
  nchw,
  network_input,
  nhwc,
  of_openai,
  options,
  output_of,
  random_network,
)

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  import torch
  from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

pytestmark = pytest.mark.filterwarnings("ignore")  # what others warn of is theirs

# The architectures of google/ddpm-cifar10-32 and of the 256x256 models.
CIFAR10 = options(32, 3, [128, 256, 256, 256], "-A--", 2, 32)
LARGE = options(256, 3, [128, 128, 256, 256, 512, 512], "----A-", 2, 32)
SMALL = {
  "one level": options(8, 3, [16], "A", 1, 8),
  "attention at two levels, grey": options(16, 1, [12, 24, 36], "-AA", 2, 3),
  "attention in the middle only": options(8, 1, [8, 8], "--", 3, 1),
  "wider, then narrower": options(8, 3, [8, 24, 16], "A-A", 1, 4),
  "not square": options(8, 3, [8, 16], "-A", 1, 2) | {"sample_size": [8, 16]},
  "classes": options(8, 3, [8, 16], "-A", 1, 2) | {"num_class_embeds": 3},
}
for name, block in {"ldm": LDM, "iddpm": IDDPM, "adm": ADM}.items():
  for classes in (None, 3):
    SMALL[f"{name}, {classes or 'no'} classes"] = of_openai(block, options(8, 3, [8, 24, 16], "AA-", 2, 4), 4, classes)


def make_folder(folder, unet, scheduler=None):
  """What diffusers saves of a random network."""
  network = random_network(unet)
  DDPMPipeline(network, scheduler or DDPMScheduler()).save_pretrained(folder)
  return network


def open_folder(folder):
  options, shape, _ = folders.describe(folder)
  config = config_lib.override(Config(), options | {"preview_steps": min(50, options["num_timesteps"])})
  return config, shape, folders.read_params(folder, config.model, shape)


def relative(ours, theirs) -> float:
  return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(
  ("unet", "parameters"),
  [(CIFAR10, 35_746_307), (LARGE, 113_673_219), *((unet, None) for unet in SMALL.values())],
  ids=["cifar10", "256x256", *SMALL],
)
def test_one_network(tmp_path, unet, parameters):
  """Theirs to ours: the outputs agree. Ours to theirs: every bit of every array is back."""
  theirs = make_folder(tmp_path / "theirs", unet)
  config, shape, params = open_folder(tmp_path / "theirs")
  assert parameters is None or num_params(params) == parameters
  batch = 1 if parameters else 2
  x, t = network_input("x", shape)[:batch], np.array([1, 990])[-batch:]
  ours = jax.jit(UNetNetwork(build_model(config.model, shape)))(params, x, jnp.asarray(t - 1), labels_of(unet))
  expected = output_of(theirs, x, t - 1)
  error = relative(ours, expected)
  print(f"relative error {error:.1e}")
  assert expected.std() > 0.05 and error < 5e-6

  (tmp_path / "ours").mkdir()
  folders.write_folder(tmp_path / "ours", config, shape, params)
  again = DDPMPipeline.from_pretrained(tmp_path / "ours")
  before, after = theirs.state_dict(), again.unet.state_dict()
  assert list(before) == list(after)
  assert all(torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)) for name in before)
  assert relative(output_of(again.unet.eval(), x, t - 1), expected) < 1e-5  # PyTorch alone, whose runs differ so much


def test_a_whole_trajectory(tmp_path):
  """100 steps of DDIM over the published schedule of 1,000; with v, as a random eps is clipped everywhere."""
  unet, velocity = SMALL["attention at two levels, grey"], {"prediction_type": "v_prediction"}
  theirs = make_folder(tmp_path / "theirs", unet, DDPMScheduler(**velocity))
  config, shape, params = open_folder(tmp_path / "theirs")
  start = network_input("start", shape)
  expected = ddim_trajectory(theirs, start, velocity, 100)[-1]
  schedule = make_schedule("linear", 1000)
  denoise = thresholded(build_denoiser(config.model, config.diffusion.prediction, shape).bind(params), "static")
  table, keys = (
    make_sampler(schedule, "ddim", num_steps=100, grid="trailing"),
    jax.random.split(jax.random.key(0), len(start)),
  )
  ours, _ = jax.jit(lambda x: sample(table, denoise, keys, shape, start=x))(start)
  print(f"largest difference {np.abs(ours - expected).max():.1e}, deviation {expected.std():.2f}")
  assert 0.1 < expected.std() < 0.9 and np.abs(ours - expected).max() < 1e-3


def test_the_published_layout_with_older_names(tmp_path):
  """Everything at the root, config.json without younger options, attention as it was called then."""
  import json
  import pathlib

  from tests.weights.folders import OLDER, read_tensors, write_tensors

  unet = options(8, 3, [8, 16], "-A", 1, 4)
  theirs = make_folder(tmp_path / "today", unet)
  today, flat = pathlib.Path(tmp_path / "today"), tmp_path / "published"
  flat.mkdir()
  (flat / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4"} | unet))
  (flat / "scheduler_config.json").write_bytes((today / "scheduler" / "scheduler_config.json").read_bytes())
  state = read_tensors(today / "unet" / "diffusion_pytorch_model.safetensors")
  for now, once in OLDER.items():
    state = {name.replace(f".{now}.", f".{once}."): tensor for name, tensor in state.items()}
  write_tensors(flat / "diffusion_pytorch_model.safetensors", state)
  config, shape, params = open_folder(flat)
  x, t = network_input("x", shape), np.array([5, 500])
  ours = jax.jit(UNetNetwork(build_model(config.model, shape)))(params, x, jnp.asarray(t - 1))
  assert relative(ours, output_of(theirs, x, t - 1)) < 1e-4
  assert PUBLISHED.items() <= json.loads((flat / "config.json").read_text()).items()


def test_half_precision(tmp_path):
  network = random_network(SMALL["one level"]).to(torch.bfloat16)
  DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "model")
  _, _, params = open_folder(tmp_path / "model")
  theirs = network.state_dict()["conv_in.weight"].float().numpy().transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(params["conv_in"]["kernel"], theirs)


def test_options_are_those_that_diffusers_keeps():
  """It ignores what it does not know: what is written must be known to it, and come back."""
  written = unet_options(Config().model, (8, 8, 1))
  kept = dict(random_network(written).config)
  assert {name: kept[name] for name in written} == written
  written = scheduler_options(Config())
  kept = dict(DDPMScheduler(**written).config)
  assert {name: kept[name] for name in written} == written


# The scheduler.

SCHEDULES = [
  {"beta_schedule": "linear"},
  {"beta_schedule": "quadratic", "beta_start": 0.001, "beta_end": 0.05},
  {"beta_schedule": "scaled_linear"},
  {"beta_schedule": "cosine", "num_timesteps": 200},
  {"beta_schedule": "sigmoid", "num_timesteps": 300},
]


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda options: options["beta_schedule"])
def test_betas(options):
  config = config_lib.override(Config(), options)
  d, theirs = config.diffusion, DDPMScheduler(**scheduler_options(config))
  ours = make_schedule(d.beta_schedule, d.num_timesteps, beta_start=d.beta_start, beta_end=d.beta_end)
  np.testing.assert_allclose(theirs.betas.numpy(), ours.betas[1:], rtol=3e-5)
  read = config_lib.override(Config(), diffusion_settings(dict(theirs.config) | {"_class_name": "DDPMScheduler"}))
  expected = {"quadratic": "scaled_linear"}.get(d.beta_schedule, d.beta_schedule)
  assert read.diffusion == config_lib.override(config, {"beta_schedule": expected}).diffusion
  if d.beta_schedule not in ("sigmoid",):
    listed = DDIMScheduler(trained_betas=[float(beta) for beta in theirs.betas], num_train_timesteps=d.num_timesteps)
    again = diffusion_settings(dict(listed.config) | {"_class_name": "DDIMScheduler"})
    assert (again["beta_schedule"], again["num_timesteps"]) == (expected, d.num_timesteps)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("threshold", ["static", "dynamic", "none"])
def test_a_step_of_the_scheduler(prediction, variance, threshold):
  """The mean, the noise and the thresholding of DDPMScheduler as it is exported are those of the ancestral sampler."""
  options = {"prediction": prediction, "variance": variance, "threshold": threshold}
  config = config_lib.override(Config(), options | ({"threshold_quantile": 0.9} if threshold == "dynamic" else {}))
  theirs, schedule = DDPMScheduler(**scheduler_options(config)), make_schedule("linear", 1000)
  read = config_lib.override(Config(), diffusion_settings(dict(theirs.config) | {"_class_name": "DDPMScheduler"}))
  assert (read.diffusion, read.sample) == (config.diffusion, config.sample)
  x, output, t = network_input("x", (8, 8, 3)), network_input("output", (8, 8, 3)), 300
  generator = torch.Generator().manual_seed(0)
  stepped = theirs.step(nchw(output), t - 1, nchw(x), generator=generator)
  noise = nhwc(torch.randn(nchw(x).shape, generator=torch.Generator().manual_seed(0)))

  denoise = Denoiser(lambda *_, **__: jnp.asarray(output), PARAMETERIZATIONS[prediction]).bind({})
  ours = np.asarray(thresholded(denoise, threshold, config.sample.threshold_quantile)(x, schedule.level(t)).x0)
  np.testing.assert_allclose(ours, nhwc(stepped.pred_original_sample), atol=2e-4)
  table = make_sampler(schedule, "ddpm", variance=variance)
  row = 1000 - t
  assert table.t[row] == t
  mean = table.c_xt[row] * x + table.c_x0[row] * ours
  np.testing.assert_allclose(mean + table.sigma[row] * noise, nhwc(stepped.prev_sample), atol=2e-4)
  expected = reverse_variance(schedule, variance, np.asarray(t - 1), np.asarray(t))
  np.testing.assert_allclose(theirs._get_variance(t - 1).numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_no_noise_is_left_in_an_image(variance):
  """Of a network that knows the one image there is, a scheduler as it is exported draws that image, to rounding."""
  config, image = config_lib.override(Config(), {"variance": variance}), 0.25
  for make in (DDPMScheduler, DDIMScheduler):
    scheduler = make.from_config(DDPMScheduler(**scheduler_options(config)).config)
    for steps in (20, 50, 250, 300, 1000):
      scheduler.set_timesteps(steps)
      generator = torch.Generator().manual_seed(0)
      x = torch.randn((8, 1, 8, 8), generator=generator)
      for t in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[t]
        eps = (x - alpha_bar**0.5 * image) / (1 - alpha_bar) ** 0.5
        x = scheduler.step(eps, t, x, generator=generator).prev_sample
      left = 127.5 * (x - image).abs().max()
      assert left < 0.01, f"{make.__name__}, {steps} steps: {left:.2g} grey levels"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """A folder as it is exported, of a random network that predicts v (a random eps would be clipped everywhere)."""
  folder, unet = tmp_path_factory.mktemp("exported"), SMALL["attention at two levels, grey"]
  make_folder(folder / "theirs", unet, DDPMScheduler(prediction_type="v_prediction", variance_type="fixed_large"))
  config, shape, params = open_folder(folder / "theirs")
  (folder / "ours").mkdir()
  folders.write_folder(folder / "ours", config, shape, params)
  return folder / "ours"


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_a_draw_of_50_steps_is_that_of_the_pipeline(exported, kind):
  """Their DDPMPipeline and DDIMPipeline from an exported folder; our sampler at their timesteps, with their noise."""
  theirs = {"ddpm": DDPMPipeline, "ddim": DDIMPipeline}[kind].from_pretrained(exported)
  theirs.set_progress_bar_config(disable=True)
  own = {"ddim": {"use_clipped_model_output": True}, "ddpm": {}}[kind]
  drawn = theirs(2, torch.Generator().manual_seed(0), num_inference_steps=50, output_type="np", **own).images
  config, shape, params = open_folder(exported)
  generator = torch.Generator().manual_seed(0)
  x = nhwc(torch.randn((2, shape[2], *shape[:2]), generator=generator))
  d = config.diffusion
  schedule = make_schedule(d.beta_schedule, d.num_timesteps, beta_start=d.beta_start, beta_end=d.beta_end)
  denoise = jax.jit(thresholded(build_denoiser(config.model, d.prediction, shape).bind(params), "static"))
  times = np.append(np.asarray(theirs.scheduler.timesteps) + 1, 0)
  assert (times[0], times[-2], len(times)) == (981, 1, 51)
  table = steps_table(schedule, kind, times[:-1], times[1:], eta=0.0, variance=d.variance)
  for t, c_xt, c_x0, sigma in zip(table.t, table.c_xt, table.c_x0, table.sigma, strict=True):
    noise = nhwc(torch.randn(nchw(x).shape, generator=generator)) if sigma else 0.0
    x = (c_xt * x + c_x0 * np.asarray(denoise(x, schedule.level(int(t))).x0) + sigma * noise).astype(np.float32)
  ours = (x / 2 + 0.5).clip(0, 1)
  print(f"largest difference {np.abs(ours - drawn).max():.1e}, deviation {drawn.std():.2f}")
  assert drawn.std() > 0.05 and np.abs(ours - drawn).max() < 1e-3


@pytest.mark.parametrize("label_dropout", [0.0, 0.1])
def test_the_lines_of_the_card_draw_by_class(tmp_path, label_dropout):
  """With guidance of scale 2 where there is a label for no class; the steps and the noise are those of our sampler."""
  unet = of_openai(ADM, options(8, 3, [8, 16], "-A", 1, 2), 4, classes=3 + (label_dropout > 0))
  make_folder(tmp_path / "theirs", unet, DDPMScheduler(num_train_timesteps=20, prediction_type="v_prediction"))
  config, shape, params = open_folder(tmp_path / "theirs")
  config = config_lib.override(config, {"num_classes": 3, "label_dropout": label_dropout})
  (tmp_path / "ours").mkdir()
  folders.write_folder(tmp_path / "ours", config, shape, params, ["a", "b", "c"])
  read, _, classes = folders.describe(tmp_path / "ours")
  assert (read["num_classes"], read["label_dropout"], classes) == (3, label_dropout, ("a", "b", "c"))

  weights = Weights(build_run(config, shape, make_mesh("pmap")), params, 0, "ema", "", classes=classes)
  text = card(config, weights, None, "")
  assert "0 `a`, 1 `b`, 2 `c`" in text and ("by_none" in text) == (label_dropout > 0)
  lines = re.search(r"```python\n(.*?)```", text, re.DOTALL)
  assert lines
  torch.manual_seed(0)
  drawn: dict = {}
  exec(lines[1].replace("PATH", str(tmp_path / "ours")).replace("sample.png", str(tmp_path / "sample.png")), drawn)

  torch.manual_seed(0)
  x, d = nhwc(torch.randn(3, 3, 8, 8)), config.diffusion
  schedule, times = make_schedule("linear", 20), np.arange(20, -1, -1)
  bind = build_denoiser(config.model, d.prediction, shape).bind
  main, none = bind(params, jnp.arange(3)), bind(params, jnp.full(3, 3))
  denoise = jax.jit(thresholded(guided(main, pair_of(main, none), 2.0 if label_dropout else 1.0), "static"))
  table = steps_table(schedule, "ddpm", times[:-1], times[1:], eta=0.0, variance=d.variance)
  for t, c_xt, c_x0, sigma in zip(table.t, table.c_xt, table.c_x0, table.sigma, strict=True):
    noise = nhwc(torch.randn(3, 3, 8, 8)) if t > 1 else 0.0
    x = (c_xt * x + c_x0 * np.asarray(denoise(x, schedule.level(int(t))).x0) + sigma * noise).astype(np.float32)
  assert x.std() > 0.05 and np.abs(nhwc(drawn["x"]) - x).max() < 1e-3
  assert (tmp_path / "sample.png").exists() and len(drawn["images"]) == 3


def test_the_pipeline_draws(tmp_path):
  """From an exported folder, as the model card says: all steps, and images come out."""
  config = config_lib.override(Config(), {"num_timesteps": 20, "preview_steps": 5})
  network = random_network(unet_options(config.model, (8, 8, 1)))
  DDPMPipeline(network, DDPMScheduler(**scheduler_options(config))).save_pretrained(tmp_path / "theirs")
  config, shape, params = open_folder(tmp_path / "theirs")
  (tmp_path / "ours").mkdir()
  folders.write_folder(tmp_path / "ours", config, shape, params)
  pipeline = DDPMPipeline.from_pretrained(tmp_path / "ours")
  pipeline.set_progress_bar_config(disable=True)
  images = pipeline(batch_size=2, num_inference_steps=20, output_type="np").images
  assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all() and images.std() > 0.05
  assert image_shape(dict(pipeline.unet.config)) == shape
