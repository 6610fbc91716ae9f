"""Every option of diffusers is understood, at the values that our networks have, or refused by name."""

import dataclasses

import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.config import BETA_SCHEDULES, Config
from ddpm_jax.errors import UserError
from ddpm_jax.weights import options
from ddpm_jax.weights.options import diffusion_settings, model_settings, scheduler_options, unet_options
from tests.weights.folders import golden_json
from tests.weights.make_diffusers_golden import NETWORKS, PUBLISHED

# config.json of google/ddpm-cifar10-32 and google/ddpm-celebahq-256, and of their schedulers, as published.
CIFAR10 = PUBLISHED | {
  "_class_name": "UNet2DModel",
  "_diffusers_version": "0.0.4",
  "block_out_channels": [128, 256, 256, 256],
  "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
  "in_channels": 3,
  "out_channels": 3,
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "sample_size": 32,
}
CELEBAHQ = CIFAR10 | {
  "block_out_channels": [128, 128, 256, 256, 512, 512],
  "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
  "sample_size": 256,
}
SCHEDULER = {
  "_class_name": "DDPMScheduler",
  "_diffusers_version": "0.1.1",
  "beta_end": 0.02,
  "beta_schedule": "linear",
  "beta_start": 0.0001,
  "clip_sample": True,
  "num_train_timesteps": 1000,
  "trained_betas": None,
  "variance_type": "fixed_large",
}


def preset(name: str) -> Config:
  """The settings of the paper, as tests/experiments holds them."""
  import pathlib

  from absl import flags as absl_flags

  from ddpm_jax import flags

  registry = absl_flags.FlagValues()
  flags.define(registry)
  registry(["main", f"--flagfile={pathlib.Path(__file__).parents[2] / 'experiments' / name}.flags"])
  return config_lib.override(Config(), flags.given(registry))


@pytest.mark.parametrize(("options", "name"), [(CIFAR10, "cifar10"), (CELEBAHQ, "celebahq256")])
def test_published_models_are_the_presets(options, name):
  settings, shape = model_settings(options)
  stated = config_lib.values(preset(name))
  assert shape == (options["sample_size"], options["sample_size"], 3)
  for option in ("channels", "channel_multipliers", "num_res_blocks", "attention_resolutions"):
    assert settings[option] == stated[option]
  variance = stated["variance"]
  found = diffusion_settings(SCHEDULER | {"variance_type": variance})
  assert found.items() >= {name: stated[name] for name in ("num_timesteps", "beta_start", "beta_end")}.items()
  assert (found["prediction"], found["variance"], found["threshold"]) == ("eps", variance, "static")


@pytest.mark.parametrize("name", NETWORKS)
def test_what_diffusers_writes_comes_back(name):
  options = golden_json(f"{name}/config")
  settings, shape = model_settings(options)
  written = unet_options(config_lib.override(Config(), settings).model, shape)
  assert written.items() <= options.items()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"class_embed_type": "timestep"}, "class_embed_type: 'timestep' is not supported, only None"),
    ({"num_class_embeds": 0}, "num_class_embeds: 0 is no number of at least 1"),
    ({"num_class_embeds": 1, "_label_dropout": 0.1}, "_label_dropout: 0.1 is no rate"),
    ({"num_class_embeds": 9, "_label_dropout": "x"}, "_label_dropout: 'x' is no rate"),
    ({"norm_eps": 1e-5}, "norm_eps: 1e-05 is not supported, only 1e-06"),
    ({"freq_shift": 0}, "freq_shift: 0 is not supported, only 1"),
    ({"flip_sin_to_cos": True}, "flip_sin_to_cos: True"),
    ({"downsample_padding": 1}, "downsample_padding: 1 is not supported, only 0"),
    ({"mid_block_scale_factor": 1.4142}, "mid_block_scale_factor: 1.4142"),
    ({"add_attention": False}, "add_attention: False"),
    ({"mid_block_type": None}, "mid_block_type: None"),
    ({"act_fn": "gelu"}, "act_fn: 'gelu' is not supported, only 'silu' or 'swish'"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type: 'fourier'"),
    ({"time_embedding_dim": 256}, "time_embedding_dim: 256 is not supported, only None or 512"),
    ({"attention_head_dim": 96}, "attention_head_dim: 96 does not divide 256 channels"),
    ({"attention_head_dim": 0}, "attention_head_dim: 0 is no number of at least 1"),
    ({"attn_norm_num_groups": 8}, "attn_norm_num_groups: 8 is not supported, only None or 32"),
    ({"down_block_types": [*["DownBlock2D"] * 3, "KDownBlock2D"]}, "down_block_types: 'KDownBlock2D'"),
    ({"down_block_types": ["DownBlock2D"] * 4}, "up_block_types: attention is not at the levels"),
    ({"down_block_types": ["DownBlock2D"]}, "down_block_types: "),
    ({"up_block_types": "UpBlock2D"}, "up_block_types: "),
    ({"block_out_channels": [128, 200]}, "block_out_channels: "),
    ({"block_out_channels": []}, "block_out_channels: "),
    ({"block_out_channels": [0]}, "block_out_channels: "),
    ({"out_channels": 6}, "out_channels: 6 is not supported, only 3"),
    ({"sample_size": None}, "sample_size: None"),
    ({"sample_size": [32, 32, 32]}, "sample_size: "),
    ({"sample_size": True}, "sample_size: True is no size of images"),
    ({"sample_size": [32, True]}, "sample_size: [32, True] is no size"),
    ({"norm_num_groups": None}, "norm_num_groups: None"),
    ({"dual_cross_attention": True}, "dual_cross_attention: True is an option that is not supported"),
    ({"_class_name": "UNet2DConditionModel"}, "_class_name: 'UNet2DConditionModel'"),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_of_the_network_that_are_refused(changes, message):
  with pytest.raises(UserError) as caught:
    model_settings(CIFAR10 | changes)
  assert str(caught.value).startswith(message)


ADM = CIFAR10 | {
  "attention_head_dim": 64,
  "attn_norm_num_groups": 32,
  "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3],
  "downsample_padding": 1,
  "downsample_type": "resnet",
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "norm_eps": 1e-5,
  "resnet_time_scale_shift": "scale_shift",
  "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
  "upsample_type": "resnet",
}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    # Without it attention in the middle has no norm, and diffusers leaves its weights out with a warning.
    ({"attn_norm_num_groups": None}, "attn_norm_num_groups: None is not supported, only 32"),
    ({"upsample_type": "conv"}, "downsample_type: 'resnet' is not supported, only 'conv'"),
    ({"norm_eps": 1e-6}, "norm_eps: 1e-06 is not supported, only 1e-05"),
    ({"down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3]}, "down_block_types: 'DownBlock2D' is not supp"),
  ],
)
def test_options_that_do_not_belong_together_are_refused(changes, message):
  with pytest.raises(UserError) as caught:
    model_settings(ADM | changes)
  assert str(caught.value).startswith(message)


def test_the_network_of_adm():
  settings, _ = model_settings(ADM | {"num_class_embeds": 1000})
  found = {"block": "adm", "num_heads": 1, "head_channels": 64, "attention_resolutions": (16, 8, 4)}
  assert found.items() <= settings.items()
  assert (settings["conditioning"], settings["num_classes"], settings["label_dropout"]) == ("class", 1000, 0.0)
  assert model_settings(ADM | {"downsample_padding": 0})[0]["block"] == "adm"  # it has no such convolution


OF_OURS = [
  {"block": "ldm", "head_channels": 8},
  {"block": "iddpm", "num_heads": 4, "attention_resolutions": (4,)},
  {"block": "adm", "conditioning": "class", "num_classes": 3},
  {"block": "adm", "conditioning": "class", "num_classes": 3, "label_dropout": 0.1, "head_channels": 16},
  {"conditioning": "class", "num_classes": 10},
]


@pytest.mark.parametrize("changes", OF_OURS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_a_network_of_ours_comes_back(changes):
  config = config_lib.override(Config(), {"channel_multipliers": (1, 2), "attention_resolutions": (8, 4)} | changes)
  written = unet_options(config.model, (8, 8, 1))
  settings, shape = model_settings(written | {"_class_name": "UNet2DModel"})
  back = config_lib.override(Config(), settings)
  assert shape == (8, 8, 1) and back.data.conditioning == config.data.conditioning
  heads = {"num_heads": 1, "head_channels": 16} if config.model.num_heads > 1 else {}
  assert back.model == dataclasses.replace(config.model, norm_groups=8, **heads)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"channels": 2}, "channels: with 2"),
    ({"channel_multipliers": (2, 4)}, "channel_multipliers: the first is 2"),
    ({"num_heads": 2, "attention_resolutions": (8,)}, "num_heads: 2 heads have 16 or 32 channels"),
  ],
)
def test_networks_that_diffusers_does_not_have(changes, message):
  config = config_lib.override(Config(), changes)
  with pytest.raises(UserError, match=message):
    unet_options(config.model, (8, 8, 1))


@pytest.mark.parametrize("name", ["freq_shift", "flip_sin_to_cos", "norm_eps", "downsample_padding"])
def test_a_missing_option_has_the_default_of_diffusers(name):
  with pytest.raises(UserError, match=rf"{name}: .* \(it is missing, which means that\)"):
    model_settings({key: value for key, value in CIFAR10.items() if key != name})
  assert model_settings(CIFAR10 | {"attention_head_dim": 256})[0] == model_settings(CIFAR10)[0]
  assert model_settings(CIFAR10 | {"sample_size": [32, 64]})[1] == (32, 64, 3)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"_class_name": "PNDMScheduler"}, "_class_name: 'PNDMScheduler' is not supported, only DDPMScheduler and DDIM"),
    ({"beta_schedule": "laplace"}, "beta_schedule: 'laplace' is not supported, only linear, scaled_linear, "),
    ({"variance_type": "learned_range"}, "variance_type: 'learned_range' is not supported, only fixed_small, "),
    ({"prediction_type": "flow"}, "prediction_type: 'flow'"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: True"),
    ({"clip_sample_range": 2.0}, "clip_sample_range: 2.0 is not supported, only 1.0"),
    ({"thresholding": True, "sample_max_value": 1.5}, "sample_max_value: 1.5"),
    ({"trained_betas": [0.1, 0.7, 0.2]}, "trained_betas: they are those of no schedule"),
    ({"trained_betas": ["0.1"]}, "trained_betas: "),
    ({"trained_betas": [0.9, 0.5, 0.0001]}, "trained_betas: they are those of no schedule"),
    ({"num_train_timesteps": 0}, "num_train_timesteps: 0"),
    ({"solver_order": 2}, "solver_order: 2 is an option that is not supported"),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_of_the_scheduler_that_are_refused(changes, message):
  with pytest.raises(UserError) as caught:
    diffusion_settings(SCHEDULER | changes)
  assert str(caught.value).startswith(message)


def test_schedulers_that_mean_the_same():
  plain = diffusion_settings(SCHEDULER)
  ddim = SCHEDULER | {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "steps_offset": 1}
  del ddim["variance_type"]
  assert diffusion_settings(ddim) == {name: value for name, value in plain.items() if name != "variance"}
  assert diffusion_settings(SCHEDULER | {"variance_type": "fixed_small_log"})["variance"] == "fixed_small"
  missing = {name: value for name, value in SCHEDULER.items() if name != "variance_type"}
  assert diffusion_settings(missing)["variance"] == "fixed_small"  # the default of diffusers, and not ours
  betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
  assert diffusion_settings(SCHEDULER | {"trained_betas": betas, "beta_schedule": "laplace"}) == plain
  assert diffusion_settings(SCHEDULER | {"clip_sample": False})["threshold"] == "none"


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_the_betas_of_a_sigmoid_are_found(kind):
  """As diffusers makes them: sigmoid(linspace(-6, 6, T)) (beta_end - beta_start) + beta_start."""
  betas = 1 / (1 + np.exp(-np.linspace(-6, 6, 50))) * (0.3 - 0.002) + 0.002
  found = diffusion_settings(SCHEDULER | {"trained_betas": [float(kind(beta)) for beta in betas]})
  assert (found["beta_schedule"], found["num_timesteps"]) == ("sigmoid", 50)
  np.testing.assert_allclose([found["beta_start"], found["beta_end"]], [0.002, 0.3], rtol=1e-6)
  assert config_lib.override(Config(), found).diffusion.beta_schedule == "sigmoid"


@pytest.mark.parametrize(
  "changes",
  [
    {"threshold": "dynamic", "threshold_quantile": 0.9},
    {"threshold": "none", "prediction": "v", "variance": "fixed_small"},
    {"threshold": "static", "beta_schedule": "cosine", "prediction": "x0"},
    {"threshold": "static", "beta_schedule": "sigmoid", "beta_start": 0.001, "beta_end": 0.5, "num_timesteps": 77},
  ],
  ids=str,
)
def test_a_scheduler_comes_back(changes):
  config = config_lib.override(Config(), changes)
  written = scheduler_options(config) | {"_class_name": "DDPMScheduler"}
  read = config_lib.override(Config(), diffusion_settings(written))
  assert (read.diffusion, read.sample) == (config.diffusion, config.sample)


def test_every_noise_schedule_comes_back(monkeypatch):
  """By its name in diffusers, and as betas, which is how one that diffusers does not have is written."""
  wrong, names = {}, dict(options._SCHEDULES)
  for name in BETA_SCHEDULES:
    config = config_lib.override(Config(), {"beta_schedule": name, "num_timesteps": 77})
    for known in (names, {}):
      monkeypatch.setattr(options, "_SCHEDULES", known)
      written = scheduler_options(config) | {"_class_name": "DDPMScheduler"}
      monkeypatch.setattr(options, "_SCHEDULES", names)
      found = config_lib.override(Config(), diffusion_settings(written)).diffusion
      same = found.beta_schedule == name or {found.beta_schedule, name} == {"quadratic", "scaled_linear"}
      if not same or found.num_timesteps != 77 or not np.isclose(found.beta_end, config.diffusion.beta_end):
        wrong[name, bool(known)] = found
  assert not wrong
