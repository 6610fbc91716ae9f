import ast
import dataclasses
import json
import pathlib
import re

import pytest
from absl import flags as absl_flags

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax import flags
from ddpm_jax.config import Config
from ddpm_jax.config.text import WITHOUT_THE_OPTION
from ddpm_jax.errors import UserError

PACKAGE = pathlib.Path(ddpm_jax.__file__).parent
OPTIONS = [(section, field) for section, field, _ in config_lib.options(Config())]
NUMBERS = [f.name for _, f in OPTIONS if isinstance(f.default, int | float) and not isinstance(f.default, bool)]
FLOATS = [f.name for _, f in OPTIONS if isinstance(f.default, float)]
TUPLES = [f.name for _, f in OPTIONS if isinstance(f.default, tuple) and f.metadata["item"] is not str]
CHOICES = [f.name for _, f in OPTIONS if f.metadata["choices"] and not isinstance(f.default, tuple)]

# Every number is refused at 0 but these, where 0 means something.
ZERO_MEANS = {
  "image_size": "as they are",
  "cache_gib": "no cache",
  "data_workers": "threads of this process",
  "norm_groups": "automatic",
  "head_channels": "as num_heads says",
  "dropout": "none",
  "warmup_steps": "none",
  "weight_decay": "none",
  "grad_clip": "none",
  "classifier_scale": "no guidance",
  "ema_decay": "no average",
  "seed": "a seed",
  "sample_seed": "a seed",
  "sample_every": "never",
  "max_unsaved_steps": "twice checkpoint_every",
  "keep_every": "none",
  "num_classes": "those of the data set",
  "label_dropout": "none",
  "step_timeout": "never",
  "sampling_steps": "all T",
  "eta": "deterministic",
  "sample_batch_size": "what fits",
  "interpolation_timestep": "T/2",
  "evaluate_every": "never",
  "likelihood_examples": "all",
  "evaluate_samples": "as many as fit",
  "bound_timesteps": "all T",
  "stop_exit_code": "as when it is finished",
  "adam_b1": "no momentum",
  "adam_b2": "the sign of the gradient",
  "kl_weight": "no pull",
  "discriminator_weight": "no discriminator",
  "discriminator_start": "from the first step on",
  "discriminator_warmup": "none",
}

# The defaults are tuned from time to time; the tests that need numbers bring their own.
BASE = {
  "classifier": "runs/classifier",
  "batch_size": 128,
  "cache_gib": 4.0,
  "data_threads": 2,
  "loss": "huber",
  "channels": 32,
  "channel_multipliers": (1, 2, 2),
  "num_res_blocks": 2,
  "attention_resolutions": (4,),
  "norm_groups": 0,
  "dropout": 0.1,
  "learning_rate": 1e-3,
  "lr_schedule": "cosine",
  "warmup_steps": 100,
  "grad_clip": 1.0,
  "ema_decay": 0.995,
  "num_steps": 4000,
  "grad_accum_steps": 1,
  "log_every": 50,
  "checkpoint_every": 1000,
  "sample_every": 1000,
  "keep_checkpoints": 3,
  "preview_images": 16,
  "preview_steps": 20,
  "num_samples": 64,
  "sample_batch_size": 64,
}

# A run in which no option is as in BASE, but those of a task that it does not have.
OTHER = {
  "dataset": "parquet:/data/a b#c,d=e",
  "only": "cat,7",
  "conditioning": "class",
  "label_field": "kind",
  "image_field": "picture",
  "split": "train[:90%]",
  "data_dir": "/data/tfds",
  "manual_dir": "/data/manual",
  "follow_links": True,
  "formats": "basic",
  "image_size": "48x64",
  "resize": "pad",
  "resample": "lanczos",
  "batch_size": 64,
  "random_flip": True,
  "cache_gib": 0.1,
  "data_threads": 3,
  "data_workers": 2,
  "on_bad_record": "skip",
  "allow_data_change": True,
  "num_timesteps": 500,
  "beta_schedule": "sigmoid",
  "beta_start": 1 / 3000,
  "beta_end": 0.1 + 0.2,
  "prediction": "v",
  "loss": "l2",
  "loss_weighting": "min_snr",
  "variance": "fixed_small",
  "channels": 128,
  "channel_multipliers": (1, 1, 2, 2, 4, 4),
  "num_res_blocks": 3,
  "attention_resolutions": (),
  "block": "adm",
  "num_heads": 4,
  "norm_groups": 32,
  "dropout": 0.0,
  "num_classes": 1000,
  "label_dropout": 0.1,
  "dtype": "bfloat16",
  "matmul_precision": "highest",
  "remat": "blocks",
  "learning_rate": 2e-5,
  "lr_schedule": "constant_then_decay",
  "decay_fraction": 0.5,
  "warmup_steps": 5000,
  "adam_b1": 0.5,
  "adam_b2": 0.99,
  "weight_decay": 0.05,
  "grad_clip": 0.125,
  "ema_decay": 0.9999,
  "seed": 2**32 - 1,
  "num_steps": 800_000,
  "parallel": "fsdp",
  "grad_accum_steps": 4,
  "log_every": 7,
  "checkpoint_every": 70,
  "sample_every": 0,
  "keep_checkpoints": 1,
  "keep_every": 140,
  "max_unsaved_steps": 900,
  "on_corrupt": "fail",
  "on_nonfinite": "skip",
  "max_nonfinite": 3,
  "step_timeout": 60,
  "heartbeat_timeout": 10,
  "preview_images": 9,
  "preview_steps": 10,
  "distributed": "off",
  "steps_per_dispatch": 8,
  "compilation_cache": "/data/cache dir",
  "writers": "wandb, my.package:Writer",
  "stop_exit_code": 75,
  "profile_steps": "100:110",
  "num_samples": 50_000,
  "sampler": "ddim",
  "sampling_steps": 100,
  "eta": 0.5,
  "sample_batch_size": 500,
  "sample_seed": 3,
  "sample_weights": "raw",
  "sample_task": "inpaint",
  "checkpoint": "best",
  "time_grid": "quadratic",
  "threshold": "dynamic",
  "threshold_quantile": 0.9,
  "classes": ("cat b#c", "7"),
  "guidance_scale": (1.0, 2.5, 1 / 3),
  "guidance_interval": (0.1 + 0.2, 1.5),
  "guide_with": "/data/worse one",
  "classifier": "/data/a classifier",
  "classifier_scale": 2.5,
  "input_images": "/data/a b,c",
  "mask": "/data/mask#1.png",
  "repaint_jump": 5,
  "repaint_resamples": 3,
  "evaluate_every": 200,
  "best_measure": "ode",
  "measures": ("ode", "kid"),
  "features": "inception",
  "inception_weights": "/data/inception.safetensors",
  "inception_resize": "clean",
  "evaluate_samples": 1000,
  "evaluate_labels": "uniform",
  "reference_split": "test",
  "likelihood_splits": "train,test",
  "likelihood_examples": 500,
  "bound_timesteps": 50,
  "ode_steps": 20,
  "ode_probes": 2,
  "evaluate_batch_size": 40,
  "topology": "v5e:4x4",
  "export_format": "jax",
  "export_dir": "/data/exported here",
  "export_platforms": ("tpu", "cpu"),
  "export_batch_sizes": (1, 64),
  "init_from": "/data/weights.safetensors",
}
INPAINT_ALONE = ("mask", "repaint_jump", "repaint_resamples")
# The same with another task: its own options.
OTHER_TASKS = [
  {k: v for k, v in OTHER.items() if k not in INPAINT_ALONE}
  | {"sample_task": "interpolate", "interpolation_timestep": 250},
  {k: v for k, v in OTHER.items() if k not in (*INPAINT_ALONE, "input_images")}
  | {"sample_task": "progressive", "sampler": "heun", "eta": 0.0},
  {k: v for k, v in OTHER.items() if k not in (*INPAINT_ALONE, "input_images", "sample_task")}
  | {"sample_png_dir": "/data/png out"},
  {k: v for k, v in OTHER.items() if k != "reference_split"} | {"reference_stats": "/data/stats of it.npz"},
  OTHER | {"write_reference": "/data/out of it.npz"},
  {k: v for k, v in OTHER.items() if k != "resize"} | {"crop": "random"},
  {k: v for k, v in OTHER.items() if k != "num_heads"} | {"head_channels": 64},
  {"first_stage": "/data/first stage", "prediction": "v"},
  {"stage": "classifier", "num_classes": 12, "loss": "l2"},
  {
    "stage": "autoencoder",
    "loss": "l1",
    "regularizer": "vq",
    "latent_channels": 3,
    "codebook_size": 8192,
    "perceptual": "lpips",
    "perceptual_weight": 0.5,
    "lpips_weights": "/data/weights of lpips.safetensors",
    "discriminator_weight": 0.75,
    "discriminator_start": 900,
    "discriminator_warmup": 100,
    "discriminator_layers": 2,
  },
  {"stage": "autoencoder", "kl_weight": 1e-4},
]
AUTOENCODER = {"stage": "autoencoder"}
OF_AUTOENCODERS = {field.name for section, field in OPTIONS if section == "autoencoder"}


def make(**changes) -> Config:
  return config_lib.override(Config(), BASE | changes)


def refusal(**changes) -> str:
  with pytest.raises(UserError) as caught:
    make(**changes)
  text = str(caught.value)
  assert "\n" not in text
  return text


def test_default_is_the_digits_run():
  config = Config()
  assert (config.data.dataset, config.train.parallel) == ("digits", "pmap")
  assert config == config_lib.override(config, {})


def test_names_are_unique_over_the_tree():
  names = [field.name for _, field in OPTIONS]
  assert len(names) == len(set(names))
  assert len(names) == sum(len(part) for part in dataclasses.asdict(Config()).values())
  assert not {"workdir", "mode"} & set(names)


def test_every_option_has_help():
  """A sentence that ends in a full stop, with single spaces: strings that are joined may have two, or none."""
  texts = {field.name: field.metadata["help"] for _, field in OPTIONS}
  assert not {name: text for name, text in texts.items() if not re.fullmatch(r"\S+( \S+)*\.", text) or len(text) < 6}


def test_the_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Config().data.batch_size = 1


# Ranges.


def message(make, *args, **changes) -> str:
  """The text of the UserError that a call raises, or 'is allowed'."""
  try:
    make(*args, **changes)
  except UserError as error:
    return str(error)
  return "is allowed"


def wrong(cases) -> list[str]:
  """Of (changes, pattern of the whole message) those with another message."""
  told = [(changes, message(make, **changes), pattern) for changes, pattern in cases]
  return [f"{changes}: {text}" for changes, text, pattern in told if not re.fullmatch(pattern, text)]


def test_every_number_is_refused_outside_its_range():
  above = r"must be (at least|greater than) \d+"
  cases = [({name: -1}, f"{name}: -1 {above}") for name in NUMBERS]
  zero = "0 must be (at least [125]|greater than 0)"
  cases += [
    (
      {name: 0} | (AUTOENCODER if name in OF_AUTOENCODERS else {}),
      "is allowed" if name in ZERO_MEANS else f"{name}: {zero}",
    )
    for name in NUMBERS
  ]
  for value in (float("nan"), float("inf"), float("-inf")):
    cases += [({name: value}, f"{name}: {value} is not a finite number") for name in FLOATS]
  for value in ((-1,), (1, -2)):
    least = {"attention_resolutions": 0, "guidance_scale": 0, "guidance_interval": 0}  # 0: where it fits
    cases += [({name: value}, f"{name}: {value[-1]} must be at least {least.get(name, 1)}") for name in TUPLES]
  assert len(NUMBERS) > 40 and len(FLOATS) > 8 and len(TUPLES) > 1
  assert not wrong(cases)


def test_an_unknown_choice_is_refused_with_all_that_are_known():
  choices = {field.name: field.metadata["choices"] for _, field in OPTIONS}
  told = {name: refusal(**{name: "nonsense"}) for name in CHOICES}
  assert len(told) > 15
  assert not {
    name: text
    for name, text in told.items()
    if not text.startswith(f"{name}: 'nonsense' is unknown; use one of ") or not all(map(text.count, choices[name]))
  }
  assert not [field.name for _, field in OPTIONS if field.name in CHOICES and field.default not in choices[field.name]]


LIMITS = [
  ("beta_start", 1.0, "less than 1"),
  ("beta_end", 1.5, "less than 1"),
  ("dropout", 1.0, "less than 1"),
  ("label_dropout", 1.0, "less than 1"),
  ("ema_decay", 1.0, "less than 1"),
  ("adam_b1", 1.0, "less than 1"),
  ("adam_b2", 1.0, "less than 1"),
  ("discriminator_layers", 7, "at most 6"),
  ("channels", 1, "at least 2"),
  ("eta", 1.01, "at most 1"),
  ("threshold_quantile", 1.01, "at most 1"),
  ("stop_exit_code", 126, "at most 125"),
  ("seed", 2**32, "less than 4294967296"),
  ("sample_seed", 2**32, "less than 4294967296"),
]


def test_upper_and_odd_limits():
  assert not wrong([({name: value}, re.escape(f"{name}: {value} must be {most}")) for name, value, most in LIMITS])


def test_words_of_a_list_are_checked():
  assert refusal(measures=("kid", "fid")).startswith("measures: 'fid' is unknown; use one of frechet, kid, score, ")
  assert "is not of its type" in refusal(measures=("kid", 3))
  assert "is not of its type" in refusal(measures="kid")
  assert make(measures=("ode",)).evaluate.measures == ("ode",)


# Options that contradict each other: field, value, the other field or what to do.


_OF_SIZE = (("resize", "squash"), ("crop", "random"), ("resample", "box"))
CONTRADICTIONS = [
  ({"num_classes": 10}, ("num_classes", "10", "conditioning=none", "--conditioning=class")),
  ({"label_dropout": 0.1}, ("label_dropout", "0.1", "conditioning=none", "--conditioning=class")),
  ({"guidance_scale": ()}, ("guidance_scale", "empty", "use 1")),
  ({"guidance_scale": (1.0, 2.0, 2.0)}, ("guidance_scale", "1.0,2.0,2.0", "once")),
  ({"classifier": "", "measures": ("classes",)}, ("measures", "classes", "--conditioning=class", "leave it out")),
  (
    {"classifier": "", "evaluate_labels": "uniform"},
    ("evaluate_labels", "uniform", "conditioning=none", "leave it out"),
  ),
  ({"guidance_interval": (0.2, 1.0)}, ("guidance_interval", "0.2,1.0", "guidance_scale=1")),
  ({"guide_with": "raw"}, ("guide_with", "raw", "guidance_scale=1")),
  ({"classifier": "", "classifier_scale": 2.0}, ("classifier_scale", "2.0", "--classifier")),
  *(
    ({"stage": "classifier", "loss": "l2", name: value}, (name, str(value), "stage=classifier", "leave it out"))
    for name, value in (
      *(("conditioning", "class"), ("label_dropout", 0.1), ("prediction", "v"), ("loss", "huber")),
      *(("loss_weighting", "min_snr"), ("evaluate_every", 5), ("init_from", "/data/w")),
    )
  ),
  *(
    (AUTOENCODER | {name: value}, (name, str(value), "stage=autoencoder", "leave it out"))
    for name, value in (
      *(("conditioning", "class"), ("num_classes", 3), ("prediction", "v")),
      *(("first_stage", "/data/f"), ("block", "adm"), ("num_heads", 2), ("head_channels", 4), ("init_from", "/data/w")),
    )
  ),
  (
    AUTOENCODER | {"loss": "l2", "loss_weighting": "min_snr"},
    ("loss_weighting", "min_snr", "stage=autoencoder", "leave it out"),
  ),
  ({"regularizer": "vq"}, ("regularizer", "vq", "stage=denoiser", "--stage=autoencoder")),
  ({"kl_weight": 0.0}, ("kl_weight", "0", "stage=denoiser", "--stage=autoencoder")),
  (AUTOENCODER | {"codebook_size": 9}, ("codebook_size", "9", "regularizer=kl", "--regularizer=vq")),
  (AUTOENCODER | {"regularizer": "vq", "kl_weight": 0.5}, ("kl_weight", "0.5", "regularizer=vq", "--regularizer=kl")),
  (AUTOENCODER | {"perceptual_weight": 2.0}, ("perceptual_weight", "2.0", "perceptual=none", "--perceptual=lpips")),
  (AUTOENCODER | {"perceptual": "lpips"}, ("lpips_weights", "missing", "--perceptual=features")),
  *(
    (AUTOENCODER | {name: 2}, (name, "2", "discriminator_weight=0", "--discriminator_weight=0.5"))
    for name in ("discriminator_start", "discriminator_layers", "discriminator_warmup")
  ),
  (
    AUTOENCODER | {"discriminator_weight": 0.5, "discriminator_start": 4, "discriminator_warmup": 5},
    ("discriminator_warmup", "5", "discriminator_start=4", "lower it"),
  ),
  ({"guidance_scale": (2.0,), "guidance_interval": (0.2,)}, ("guidance_interval", "0.2", "LO,HI")),
  ({"guidance_scale": (2.0,), "guidance_interval": (1.0, 0.2)}, ("guidance_interval", "1.0,0.2", "lower one first")),
  ({"guidance_scale": (2.0,), "guidance_interval": (1.0, 1.0)}, ("guidance_interval", "1.0,1.0", "lower one first")),
  ({"beta_start": 0.03}, ("beta_start", "0.03", "beta_end=0.02")),
  ({"beta_schedule": "cosine", "beta_start": 0.001}, ("beta_start", "0.001", "beta_schedule=cosine", "leave it out")),
  ({"beta_schedule": "cosine", "beta_end": 0.03}, ("beta_end", "0.03", "beta_schedule=cosine", "leave it out")),
  ({"loss_weighting": "min_snr", "loss": "l1"}, ("loss_weighting", "min_snr", "--loss=l2")),
  ({"loss_weighting": "truncated_snr", "loss": "l2"}, ("loss_weighting", "truncated_snr", "--prediction=v")),
  ({"sampling_steps": 1001}, ("sampling_steps", "1001", "num_timesteps=1000")),
  ({"evaluate_samples": 1}, ("evaluate_samples", "1", "at least 2", "0 for as many as fit")),
  ({"num_timesteps": 19}, ("preview_steps", "20", "num_timesteps=19")),
  ({"eta": 0.5}, ("eta", "0.5", "sampler=ddpm", "--sampler=ddim")),
  ({"channel_multipliers": ()}, ("channel_multipliers", "empty", "1,2,2,2")),
  ({"channels": 33}, ("channels", "33", "even")),
  ({"norm_groups": 32}, ("norm_groups", "32", "one channel in a group", "--norm_groups=0")),
  ({"norm_groups": 5}, ("norm_groups", "5", "channels=32", "divisor")),
  ({"num_heads": 4, "head_channels": 8}, ("num_heads", "4", "head_channels=8", "leave one of them out")),
  ({"max_nonfinite": 3}, ("max_nonfinite", "3", "on_nonfinite=halt", "--on_nonfinite=skip")),
  ({"grad_accum_steps": 3}, ("grad_accum_steps", "3", "batch_size=128")),
  ({"decay_fraction": 0.5}, ("decay_fraction", "0.5", "lr_schedule=cosine", "--lr_schedule=constant_then_decay")),
  ({"eta": 0.5, "sampler": "heun"}, ("eta", "0.5", "sampler=heun", "--sampler=ddim or dpmpp", "--eta=0")),
  ({"mask": "m.png"}, ("mask", "'m.png'", "sample_task=images", "--sample_task=inpaint,")),
  ({"repaint_jump": 5, "sample_task": "slerp"}, ("repaint_jump", "5", "sample_task=slerp", "=inpaint")),
  ({"repaint_resamples": 5}, ("repaint_resamples", "5", "sample_task=images", "=inpaint")),
  ({"input_images": "x"}, ("input_images", "'x'", "sample_task=images", "interpolate or inpaint or reconstruct")),
  ({"input_images": "x", "sample_task": "progressive"}, ("input_images", "sample_task=progressive")),
  ({"interpolation_timestep": 5, "sample_task": "slerp"}, ("interpolation_timestep", "5", "=interpolate")),
  ({"sample_png_dir": "x", "sample_task": "inpaint"}, ("sample_png_dir", "sample_task=inpaint", "=images")),
  (
    {"interpolation_timestep": 1001, "sample_task": "interpolate"},
    ("interpolation_timestep", "1001", "num_timesteps=1000"),
  ),
  ({"sample_task": "inpaint", "sampler": "dpmpp"}, ("sampler", "dpmpp", "--sampler=ddpm or ddim")),
  ({"sample_task": "inpaint", "sampler": "heun"}, ("sampler", "heun", "--sampler=ddpm or ddim")),
  ({"sample_task": "reconstruct"}, ("sample_task", "reconstruct", "--sampler=ddim", "--eta=0")),
  ({"sample_task": "reconstruct", "sampler": "heun"}, ("sample_task", "reconstruct", "--sampler=ddim")),
  ({"sample_task": "reconstruct", "sampler": "ddim", "eta": 0.1}, ("sample_task", "reconstruct", "--eta=0")),
  ({"sample_task": "reconstruct", "sampler": "ddim", "threshold": "dynamic"}, ("sample_task", "--threshold")),
  ({"threshold_quantile": 0.9}, ("threshold_quantile", "0.9", "threshold=auto", "--threshold=dynamic")),
  ({"threshold_quantile": 0.9, "threshold": "none"}, ("threshold_quantile", "threshold=none")),
  ({"checkpoint": "last"}, ("checkpoint", "'last'", "newest, best, or a number")),
  ({"checkpoint": ""}, ("checkpoint", "''", "newest, best, or a number")),
  ({"checkpoint": "-1"}, ("checkpoint", "'-1'", "newest, best, or a number")),
  ({"checkpoint": "1.5"}, ("checkpoint", "'1.5'", "newest, best, or a number")),
  ({"checkpoint": "²"}, ("checkpoint", "'²'", "newest, best, or a number")),
  ({"measures": ()}, ("measures", "empty", "frechet", "ode")),
  ({"num_timesteps": 90, "bound_timesteps": 91}, ("bound_timesteps", "91", "num_timesteps=90")),
  ({"num_timesteps": 90, "ode_steps": 91}, ("ode_steps", "91", "num_timesteps=90")),
  ({"features": "inception"}, ("inception_weights", "missing", "--features=auto")),
  ({"inception_weights": "x"}, ("inception_weights", "features=auto", "--features=inception")),
  ({"inception_resize": "clean"}, ("inception_resize", "features=auto", "--features=inception")),
  *(({"image_size": text}, ("image_size", repr(text), "no size", "48x64")) for text in ("", "a", "48", "0x8", "8x")),
  *(({name: value}, (name, value, "image_size=0", "--image_size")) for name, value in _OF_SIZE),
  ({"image_size": 8, "resize": "pad", "crop": "random"}, ("crop", "random", "resize=pad", "--resize=crop")),
  ({"image_size": "64x64"}, ("image_size", "'64x64' is a square", "write 64")),
  ({"image_size": (48, 64)}, ("image_size", "(48, 64)", "not of its type")),
  ({"writers": "tensorbord"}, ("writers", "'tensorbord' is unknown", "package.module:Class")),
  ({"writers": "my.package:"}, ("writers", "'my.package:' is unknown")),
  ({"writers": "wandb,wandb"}, ("writers", "wandb,wandb names one twice")),
  ({"reference_stats": "x.npz", "write_reference": "y.npz"}, ("write_reference", "leave --reference_stats out")),
  ({"reference_stats": "x.npz", "reference_split": "test"}, ("reference_split", "test", "--reference_stats")),
  ({"write_reference": "x.np"}, ("write_reference", "x.np", ".npz")),
  ({"evaluate_every": 5, "measures": ("kid",)}, ("best_measure", "frechet", "--measures=kid")),
  ({"best_measure": "kid"}, ("best_measure", "kid", "--evaluate_every")),
  *(({"stop_exit_code": code}, ("stop_exit_code", str(code), "how a run failed", "75")) for code in (1, 2, 3)),
  *(({"profile_steps": text}, ("profile_steps", repr(text), "such as")) for text in ("5", ":", "1:", "a:b", "1:²")),
  *(({"profile_steps": text}, ("profile_steps", text, "1:4000")) for text in ("0:5", "1:4001")),
  ({"profile_steps": "5:4"}, ("profile_steps", "5:4", "4:5")),
  ({"profile_steps": "1:2:3"}, ("profile_steps", "'1:2:3'", "such as")),
  ({"num_classes": 3}, ("num_classes", "3", "conditioning=none", "--conditioning=class")),
  ({"label_dropout": 0.1}, ("label_dropout", "0.1", "conditioning=none", "--conditioning=class")),
  ({"guidance_scale": ()}, ("guidance_scale", "empty", "1 for no guidance")),
  ({"guidance_interval": (0.2, 1.6)}, ("guidance_interval", "0.2,1.6", "guidance_scale=1", "--guidance_scale=2")),
  ({"guide_with": "raw"}, ("guide_with", "raw", "guidance_scale=1", "--guide_with=")),
  *(
    ({"guidance_scale": (2.0,), "guidance_interval": interval}, ("guidance_interval", text))
    for interval, text in (
      ((1.6,), "is not LO,HI"),
      ((1.6, 0.2), "holds no noise level"),
      ((1.0, 1.0), "no noise level"),
    )
  ),
]


def test_contradictions_are_refused():
  """Each message begins with the first of these parts and has the others."""
  assert not wrong(
    [
      (changes, f"{re.escape(parts[0])}: " + "".join(rf"(?=.*{re.escape(part)})" for part in parts[1:]) + ".*")
      for changes, parts in CONTRADICTIONS
    ]
  )


ALLOWED = [
  {"beta_schedule": "cosine"},
  {"beta_start": 0.02},
  {"sampling_steps": 1000},
  {"num_timesteps": 50},
  {"eta": 1.0, "sampler": "ddim"},
  {"eta": 1.0, "sampler": "dpmpp"},
  {"norm_groups": 16},
  {"grad_accum_steps": 128},
  {"warmup_steps": 5000},
  {"decay_fraction": 1.0, "lr_schedule": "constant_then_decay"},
  {"attention_resolutions": ()},
  {"seed": 2**32 - 1},
  {"sample_task": "interpolate", "interpolation_timestep": 1000},
  {"sample_task": "reconstruct", "sampler": "ddim", "threshold": "none", "input_images": "x"},
  {"sample_task": "inpaint", "sampler": "ddim", "eta": 1.0},
  {"sample_task": "progressive", "sampler": "heun"},
  {"sample_task": "slerp", "sampler": "dpmpp"},
  {"threshold": "dynamic", "threshold_quantile": 1.0},
  {"image_size": "1x2"},
  {"checkpoint": "0"},
  {"checkpoint": "4000"},
  {"num_timesteps": 50, "bound_timesteps": 100, "ode_steps": 100},
  {"evaluate_every": 5, "best_measure": "ode", "measures": ("ode",)},
  {"stop_exit_code": 4},
  {"stop_exit_code": 125},
  {"conditioning": "class", "label_dropout": 0.1},
  {"guidance_scale": (1.0, 2.0), "guidance_interval": (0.0, 0.1), "guide_with": "raw"},
  AUTOENCODER | {"discriminator_weight": 0.5, "discriminator_start": 5, "discriminator_warmup": 5},
  AUTOENCODER | {"perceptual": "features", "perceptual_weight": 0.1},
]


def test_the_edge_of_each_rule_is_allowed():
  assert not wrong([(changes, "is allowed") for changes in ALLOWED])
  assert all(changes.items() <= config_lib.values(make(**changes)).items() for changes in ALLOWED)


def test_what_is_refused_as_without_effect_is_what_says_nothing_of_a_model():
  """Of options of the model that is trained; an autoencoder leaves those of the diffusion alone, but for one."""
  reasons = ("stage", "conditioning", "beta_schedule", "head_channels", "lr_schedule")
  reasons += ("regularizer", "perceptual", "discriminator_weight")
  different = {name: value for run in (OTHER, *OTHER_TASKS) for name, value in run.items()}
  idle = {"num_timesteps", "beta_schedule", "beta_start", "beta_end", "variance"}
  for changes in (
    {},
    {"conditioning": "class", "beta_schedule": "cosine", "head_channels": 8, "lr_schedule": "cosine"},
    {"first_stage": "/data/first stage"},
    {"stage": "classifier"},
    AUTOENCODER,
    AUTOENCODER | {"regularizer": "vq", "perceptual": "features", "discriminator_weight": 0.5},
  ):
    config, refused = config_lib.override(Config(), changes), set()
    for name in different.keys() - {"stage", "measures"} - changes.keys():  # of which values are refused
      try:
        config_lib.override(config, {name: different[name]})
      except UserError as error:
        if re.match(rf"{name}: .* has no effect with ({'|'.join(reasons)})=\S+;", str(error)):
          refused.add(name)
    if config.model.stage == "autoencoder":
      refused |= idle
    assert config_lib.without_effect(config) == refused, changes


def test_what_a_model_is_told():
  told = {"conditioning": "class", "label_dropout": 0.1}
  texts = [config_lib.conditioning_text(make(**told, num_classes=number)) for number in (0, 1, 1000)]
  assert texts == [f"by class ({classes}label dropout 0.1)" for classes in ("", "1 class, ", "1,000 classes, ")]
  for changes in ({}, {"stage": "classifier", "num_classes": 3}, AUTOENCODER):
    assert config_lib.conditioning_text(config_lib.override(Config(), changes)) == ""


# JSON and flagfiles.


def test_the_other_run_differs_everywhere():
  assert {name for run in (OTHER, *OTHER_TASKS) for name in run} == {field.name for _, field in OPTIONS}
  for run in (OTHER, OTHER_TASKS[0]):
    assert {name for name, _, _ in config_lib.changed(make(), make(**run))} == set(run)


RUNS = [Config(), *(make(**run) for run in (OTHER, *OTHER_TASKS))]


def test_json_round_trip():
  assert [config_lib.from_json(config_lib.to_json(config)) for config in RUNS] == RUNS


def test_json_is_plain_and_by_section():
  tree = json.loads(config_lib.to_json(make()))
  assert tree.pop("format") == 2
  assert list(tree) == [
    *("data", "diffusion", "model", "autoencoder", "optimizer", "train", "sample", "evaluate", "plan", "exchange")
  ]
  assert tree["model"]["channel_multipliers"] == [1, 2, 2]
  assert tree["optimizer"]["learning_rate"] == 0.001


def test_unknown_key_is_refused():
  tree = json.loads(config_lib.to_json(Config()))
  tree["model"]["num_ears"] = 4
  with pytest.raises(UserError, match=r"model\.num_ears.*does not know"):
    config_lib.from_json(json.dumps(tree))


def test_a_key_is_known_by_its_name_whatever_its_section():
  without = config_lib.override(Config(), WITHOUT_THE_OPTION)
  assert config_lib.from_json('{"data": {"dropout": 0.2}}') == config_lib.override(without, {"dropout": 0.2})
  assert config_lib.from_json("{}") == without


def test_a_later_format_is_refused():
  tree = json.loads(config_lib.to_json(Config())) | {"format": 3, "new": [1]}
  with pytest.raises(UserError, match=r"^config.json is of format 3, this version of ddpm_jax reads up to 2; use the"):
    config_lib.from_json(json.dumps(tree))


def test_value_out_of_range_in_json_is_refused():
  with pytest.raises(UserError, match="batch_size: 0 must be at least 1"):
    config_lib.from_json('{"data": {"batch_size": 0}}')


DAMAGED_JSON = [
  "",
  '{"data": {"batch_si',
  "[1, 2]",
  "null",
  '{"data": 3}',
  '{"format": "2"}',
  '{"format": true}',
  '{"model": {"channels": "64"}}',
  '{"model": {"channels": 64.5}}',
  '{"model": {"channels": null}}',
  '{"model": {"channels": true}}',
  '{"model": {"channel_multipliers": 2}}',
  '{"model": {"channel_multipliers": [1, "2"]}}',
  '{"optimizer": {"learning_rate": NaN}}',
  '{"data": {"random_flip": "no"}}',
  '{"data": {"dataset": 1}}',
]


def test_damaged_json_is_refused_in_one_line():
  told = {text: message(config_lib.from_json, text) for text in DAMAGED_JSON}
  assert not {text: told for text, told in told.items() if "\n" in told or told == "is allowed"}


def test_flagfile_text_parses_back_to_the_same_config(tmp_path):
  path = tmp_path / "flags.txt"
  for config in RUNS:
    path.write_text(config_lib.to_flagfile(config))
    registry = absl_flags.FlagValues()
    absl_flags.DEFINE_string("flagfile", "", "", flag_values=registry)
    flags.define(registry)
    registry(["main", f"--flagfile={path}"])
    given = flags.given(registry)
    assert set(given) == {field.name for _, field in OPTIONS}
    assert config_lib.override(Config(), given) == config


def test_override_leaves_its_argument_alone():
  before = Config()
  assert config_lib.override(before, {"channels": 64, "seed": 5}).train.seed == 5
  assert before == Config()


def test_override_refuses_a_name_that_is_no_option():
  with pytest.raises((UserError, TypeError, ValueError, KeyError), match=r"chanels"):
    config_lib.override(Config(), {"chanels": 64})


# What a resumed run may change.

MAY_CHANGE = {
  *("data_dir", "manual_dir", "follow_links", "cache_gib", "data_threads", "data_workers", "variance", "remat"),
  *("num_steps", "parallel", "grad_accum_steps", "log_every", "checkpoint_every", "sample_every", "keep_checkpoints"),
  *(
    "formats",
    "on_bad_record",
    "allow_data_change",
    "max_unsaved_steps",
    "on_corrupt",
    "on_nonfinite",
    "max_nonfinite",
  ),
  *("step_timeout", "heartbeat_timeout", "preview_images", "preview_steps", "distributed"),
  *("steps_per_dispatch", "compilation_cache", "writers", "stop_exit_code", "profile_steps"),
  *("keep_every", "classes", "guidance_scale", "guidance_interval", "guide_with", "classifier", "classifier_scale"),
  *("num_samples", "sampler", "sampling_steps", "eta", "sample_batch_size", "sample_seed", "sample_weights"),
  *("sample_task", "checkpoint", "time_grid", "threshold", "threshold_quantile", "sample_png_dir", "input_images"),
  *("mask", "interpolation_timestep", "repaint_jump", "repaint_resamples", "evaluate_every", "best_measure"),
  *("measures", "features", "inception_weights", "inception_resize", "evaluate_samples", "evaluate_labels"),
  "reference_split",
  *("reference_stats", "write_reference"),
  *("likelihood_splits", "likelihood_examples", "bound_timesteps", "ode_steps", "ode_probes", "evaluate_batch_size"),
  "lpips_weights",
  *("topology", "export_format", "export_dir", "export_platforms", "export_batch_sizes"),
}


def test_changed_names_both_values_in_order():
  before, after = make(batch_size=64), make(batch_size=32, dropout=0.2)
  assert config_lib.changed(before, after) == [("batch_size", 64, 32), ("dropout", 0.1, 0.2)]
  assert config_lib.changed(before, before) == []


def test_on_resume_only_what_is_trained_must_stay():
  differences = config_lib.changed(make(), make(**OTHER), on_resume=True)
  assert {name for name, _, _ in differences} == set(OTHER) - MAY_CHANGE
  assert {field.name for _, field in OPTIONS if field.metadata["may_change"]} == MAY_CHANGE


def test_once_trained_the_arithmetic_may_change_too():
  stored, other = make(lr_schedule="constant"), make(**OTHER)
  resumed, used = (
    {name for name, _, _ in config_lib.changed(stored, other, on_resume=True, once_trained=once_trained)}
    for once_trained in (False, True)
  )
  assert resumed - used == {"dtype", "matmul_precision"} and used < resumed


def test_what_is_for_one_command_is_not_taken_up_again():
  given = make(allow_data_change=True, profile_steps="3:5", on_bad_record="skip")
  assert config_lib.without_one_time_options(given) == make(on_bad_record="skip")
  for given, taken_up in (("wandb, a.b:C,tensorboard", "wandb,tensorboard"), ("a:B", ""), ("", "")):
    assert config_lib.without_one_time_options(make(writers=given)) == make(writers=taken_up)


def test_steps_to_be_profiled():
  for text, want in (("", range(0)), ("1:1", range(1, 2)), ("30:4000", range(30, 4001))):
    assert config_lib.profiled(text, 4000) == want


# One option, one reader.

_OWNERS = {
  "config",
  "options",
  "d",
  "data",
  "diffusion",
  "model",
  "autoencoder",
  "optimizer",
  "train",
  "sample",
  "evaluate",
  "plan",
  "exchange",
}


def option_reads(root: pathlib.Path) -> set[str]:
  """Names that the code reads as an attribute of something that is called like a config or a section of it."""
  found = set()
  for path in root.rglob("*.py"):
    if path.relative_to(root).as_posix() in ("config.py", "sections.py", "flags.py"):
      continue
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in _OWNERS:
        found.add(node.attr)
  return found


def test_every_option_is_read_somewhere():
  unread = {field.name for _, field in OPTIONS} - option_reads(PACKAGE)
  assert not unread, (
    f"options that do nothing (or are read from a variable that is none of {sorted(_OWNERS)}): {unread}"
  )
