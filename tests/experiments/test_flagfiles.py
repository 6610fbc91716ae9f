"""Every experiment parses, says what it is and states all its numbers; the paper's have the numbers of the paper."""

from __future__ import annotations

import dataclasses
import pathlib
import re

import pytest
from absl import flags as absl_flags

from ddpm_jax import config as config_lib
from ddpm_jax import flags
from ddpm_jax.config import Config
from ddpm_jax.models.build import fitted

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "experiments").glob("*.flags"))
NAMES = [path.stem for path in FILES]

# Height of the images as the data set delivers them, where the flagfile does not resize them.
NATIVE_SIZE = {"digits": 8, "fashion_mnist": 28, "cifar10": 32, "imagenet64": 64}
NATIVE_SIZE |= {f"{name}_cond": NATIVE_SIZE[name] for name in ("fashion_mnist", "cifar10")}
BY_CLASS = ("fashion_mnist_cond", "emoji32_cond", "cifar10_cond")

# What makes an experiment what it is: every flagfile states these, so that a changed default changes no experiment.
OF_ALL = {
  *("split", "image_size", "batch_size", "random_flip", "loss"),
  *("channels", "channel_multipliers", "num_res_blocks", "attention_resolutions", "norm_groups", "dropout", "dtype"),
  *("learning_rate", "lr_schedule", "warmup_steps", "grad_clip", "ema_decay"),
  *("seed", "num_steps"),
}
STATED = OF_ALL | {
  *("num_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction", "loss_weighting"),
  *("sampler", "sampling_steps"),
}
STATED_OF_AUTOENCODER = OF_ALL | {
  *("stage", "regularizer", "latent_channels", "perceptual", "discriminator_weight", "adam_b1", "adam_b2"),
}
WITHOUT_DATA = ("images32", "images64", "ldm_kl_f8", "ldm_vq_f4")  # the command names them

# Ho et al. 2020, section 4 and appendix B; warm-up, clipping, norm groups and variances from the released code.
PAPER = {
  "num_timesteps": 1000,
  "beta_schedule": "linear",
  "beta_start": 0.0001,
  "beta_end": 0.02,
  "prediction": "eps",
  "loss": "l2",
  "loss_weighting": "constant",
  "channels": 128,
  "num_res_blocks": 2,
  "attention_resolutions": (16,),
  "norm_groups": 32,
  "lr_schedule": "constant",
  "warmup_steps": 5000,
  "grad_clip": 1.0,
  "ema_decay": 0.9999,
  "dtype": "float32",
  "sampler": "ddpm",
  "sampling_steps": 0,
}
PAPER_32 = PAPER | {
  "image_size": 0,
  "channel_multipliers": (1, 2, 2, 2),
  "dropout": 0.1,
  "learning_rate": 2e-4,
  "batch_size": 128,
  "variance": "fixed_large",
}
PAPER_256 = PAPER | {
  "image_size": 256,
  "channel_multipliers": (1, 1, 2, 2, 4, 4),
  "dropout": 0.0,
  "learning_rate": 2e-5,
  "batch_size": 64,
  "variance": "fixed_small",
}
PAPERS = {
  "cifar10": PAPER_32 | {"dataset": "cifar10", "random_flip": True, "num_steps": 800_000},
  "celebahq256": PAPER_256 | {"dataset": "celeb_a_hq/256", "random_flip": True, "num_steps": 500_000},
  "lsun_bedroom": PAPER_256 | {"dataset": "lsun/bedroom", "random_flip": False, "num_steps": 2_400_000},
  "lsun_church": PAPER_256 | {"dataset": "lsun/church_outdoor", "random_flip": True, "num_steps": 1_200_000},
  "lsun_cat": PAPER_256 | {"dataset": "lsun/cat", "random_flip": False, "num_steps": 1_800_000},
}

# Rombach et al. 2022, tables 12 and 15, and the released configurations.
FIRST_STAGE = {
  "stage": "autoencoder",
  "image_size": 256,
  "channels": 128,
  "num_res_blocks": 2,
  "attention_resolutions": (),
  "norm_groups": 32,
  "dropout": 0.0,
  "loss": "l1",
  "perceptual": "lpips",
  "perceptual_weight": 1.0,
  "discriminator_layers": 3,
  "lr_schedule": "constant",
  "warmup_steps": 0,
  "adam_b1": 0.5,
  "adam_b2": 0.9,
  "grad_clip": 0.0,
  "ema_decay": 0.0,
}
LATENT = {
  "image_size": 256,
  "num_timesteps": 1000,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.0015,
  "prediction": "eps",
  "loss_weighting": "constant",
  "num_res_blocks": 2,
  "norm_groups": 32,
  "dropout": 0.0,
  "lr_schedule": "constant",
  "weight_decay": 0.01,
  "grad_clip": 0.0,
  "ema_decay": 0.9999,
  "dtype": "float32",
  "sampler": "ddim",
}
LATENT_DIFFUSION = {
  "ldm_kl_f8": FIRST_STAGE
  | {
    "regularizer": "kl",
    "channel_multipliers": (1, 2, 4, 4),
    "latent_channels": 4,
    "kl_weight": 1e-6,
    "discriminator_weight": 0.5,
    "discriminator_start": 50_001,
    "batch_size": 12 * 2,
    "learning_rate": pytest.approx(4.5e-6 * 12 * 2),
    "num_steps": 246_803,
  },
  "ldm_vq_f4": FIRST_STAGE
  | {
    "regularizer": "vq",
    "channel_multipliers": (1, 2, 4),
    "latent_channels": 3,
    "codebook_size": 8192,
    "discriminator_weight": 0.75,
    "discriminator_start": 0,
    "batch_size": 8,
    "learning_rate": pytest.approx(4.5e-6 * 8),
    "num_steps": 533_066,
  },
  "ldm_celebahq256": LATENT
  | {
    "channels": 224,
    "channel_multipliers": (1, 2, 3, 4),
    "attention_resolutions": (32, 16, 8),
    "block": "ldm",
    "head_channels": 32,
    "beta_end": 0.0195,
    "loss": "l2",
    "batch_size": 48,
    "learning_rate": pytest.approx(2e-6 * 48),
    "warmup_steps": 0,
    "num_steps": 410_000,
    "sampling_steps": 200,
    "eta": 0.0,
  },
  "ldm_church256": LATENT
  | {
    "channels": 192,
    "channel_multipliers": (1, 2, 2, 4, 4),
    "attention_resolutions": (32, 16, 8, 4),
    "block": "adm",
    "num_heads": 8,
    "beta_end": 0.0155,
    "loss": "l1",
    "batch_size": 96,
    "learning_rate": 5e-5,
    "warmup_steps": 10_000,
    "num_steps": 500_000,
    "sampling_steps": 400,
    "eta": 0.0,
  },
  "ldm_imagenet256": LATENT
  | {
    "channels": 192,
    "channel_multipliers": (1, 2, 3, 5),
    "attention_resolutions": (32, 16, 8),
    "block": "ldm",
    "num_heads": 1,
    "conditioning": "class",
    "num_classes": 1000,
    "beta_end": 0.0195,
    "loss": "l2",
    "batch_size": 1200,
    "learning_rate": 1e-4,
    "warmup_steps": 0,
    "num_steps": 178_000,
    "sampling_steps": 250,
    "eta": 1.0,
    "guidance_scale": (1.5,),
  },
}
FIRST_STAGES = {  # of each second stage
  "emoji64_ldm": "emoji64_ae",
  "ldm_celebahq256": "ldm_vq_f4",
  "ldm_church256": "ldm_kl_f8",
  "ldm_imagenet256": "ldm_vq_f4",
}


def parse(*arguments: str) -> dict:
  """The options that the arguments name, by a registry of their own."""
  registry = absl_flags.FlagValues()
  flags.define(registry)
  rest = registry(["ddpm_jax.main", *arguments])
  assert rest == ["ddpm_jax.main"], f"not flags: {rest[1:]}"
  return flags.given(registry)


def load(name: str) -> Config:
  return config_lib.override(Config(), parse(f"--flagfile={ROOT / 'experiments' / name}.flags"))


def header(path: pathlib.Path) -> str:
  """The comment at the top, without its marks."""
  lines = []
  for line in path.read_text().splitlines():
    if not line.startswith("#"):
      break
    lines.append(line[2:])
  return "\n".join(lines)


def test_each_is_a_link_to_a_preset():
  """An editor that writes a file anew makes a copy, which then goes its own way."""
  assert FILES and [path.name for path in FILES if not path.is_symlink()] == []


def test_all_experiments_are_here():
  assert set(NAMES) == {
    *PAPERS,
    *LATENT_DIFFUSION,
    *FIRST_STAGES,
    *FIRST_STAGES.values(),
    "digits",
    "fashion_mnist",
    "images32",
    "images64",
    "emoji32",
    "emoji64",
    "imagenet64",
    *BY_CLASS,
  }


@pytest.mark.parametrize("name", NAMES)
def test_parses_and_fits_together(name):
  config = load(name)
  size = config.data.image_size or NATIVE_SIZE[name]
  levels = len(config.model.channel_multipliers)
  if name in FIRST_STAGES:  # a latent is smaller, by the levels of the first stage
    size //= 2 ** (len(load(FIRST_STAGES[name]).model.channel_multipliers) - 1)
  assert size % 2 ** (levels - 1) == 0
  sizes = [size // 2**level for level in range(levels)]
  assert set(fitted(config.model, (size, size, 3)).attention_resolutions) <= set(sizes)
  # The published numbers of steps of two first stages are not round.
  assert config.train.num_steps % config.train.checkpoint_every == 0 or name in ("ldm_kl_f8", "ldm_vq_f4")
  assert config.optimizer.warmup_steps < config.train.num_steps


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_states_every_number_once(path):
  stated = re.findall(r"^--(\w+)=", path.read_text(), re.MULTILINE)
  assert len(stated) == len(set(stated)), "a flag stands twice"
  stage, sampler = load(path.stem).model.stage, load(path.stem).sample.sampler
  wanted = STATED_OF_AUTOENCODER if stage == "autoencoder" else STATED
  wanted = wanted | (set() if path.stem in WITHOUT_DATA else {"dataset"})
  wanted |= {"variance"} if stage == "denoiser" and sampler == "ddpm" else set()  # no other sampler has it
  wanted |= {"first_stage"} if path.stem in FIRST_STAGES else set()
  wanted -= {"lr_schedule"} if path.stem == "digits" else set()  # release 0.1.0 had another default
  assert wanted <= set(stated)
  assert set(stated) <= set(config_lib.values(Config()))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_header_says_what_it_takes_and_how_to_run_it(path):
  text = header(path)
  for item in ("Data: ", "Hardware and time: ", "Published result: "):
    assert f"\n{item}" in text
  (command,) = re.findall(r"^ *python -m ddpm_jax\.main (.*)$", text, re.MULTILINE)
  arguments = command.split()
  assert f"--flagfile=experiments/{path.name}" in arguments
  assert f"--workdir=runs/{path.stem}" in arguments
  # The command parses as it stands, from the root of the repository.
  parse(*(argument.replace("=experiments/", f"={ROOT}/experiments/") for argument in arguments))


def test_digits_is_the_default():
  default = Config()
  default = dataclasses.replace(default, model=fitted(default.model, (8, 8, 1)))
  assert config_lib.changed(load("digits"), default) == []


@pytest.mark.parametrize("name", PAPERS)
def test_has_the_numbers_of_the_paper(name):
  values = config_lib.values(load(name))
  assert {option: values[option] for option in PAPERS[name]} == PAPERS[name]


@pytest.mark.parametrize("name", LATENT_DIFFUSION)
def test_has_the_numbers_of_latent_diffusion(name):
  values = config_lib.values(load(name))
  wanted = LATENT_DIFFUSION[name]
  assert {option: values[option] for option in wanted} == wanted


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_a_second_stage_takes_up_what_the_first_left_behind(name):
  config, first = load(name), load(FIRST_STAGES[name])
  assert config.diffusion.first_stage == f"runs/{FIRST_STAGES[name]}"
  assert first.data.image_size == config.data.image_size


@pytest.mark.parametrize("name", BY_CLASS)
def test_by_class_is_the_unconditional_one_with_labels(name):
  changed = config_lib.changed(load(name.removesuffix("_cond")), load(name))
  assert changed == [("conditioning", "none", "class"), ("label_dropout", 0.0, 0.1)]


def test_only_cifar10_samples_with_the_large_variance():
  variances = {name: load(name).diffusion.variance for name in PAPERS}
  assert [name for name, variance in variances.items() if variance == "fixed_large"] == ["cifar10"]


def test_hours_in_the_headers_follow_from_steps_and_speed():
  # The paper's speed on a TPU v3-8, in steps/s.
  for name in PAPERS:
    speed = 21 if name == "cifar10" else 2.2
    hours = load(name).train.num_steps / speed / 3600
    match = re.search(r"([\d.]+) hours\s+for ([\d,]+) steps", header(ROOT / "experiments" / f"{name}.flags"))
    assert match
    assert float(match[1]) == pytest.approx(hours, abs=0.5)
    assert int(match[2].replace(",", "")) == load(name).train.num_steps


def test_images64_leaves_the_folder_to_the_command():
  given = parse(f"--flagfile={ROOT}/experiments/images64.flags", "--dataset=folder:pictures")
  assert given["dataset"] == f"folder:{pathlib.Path('pictures').absolute()}"
  assert given["random_flip"]


def test_a_flag_that_is_no_knob_fails(tmp_path):
  path = tmp_path / "wrong.flags"
  path.write_text("# a comment\n--dataset=digits\n--batchsize=64\n")
  with pytest.raises(absl_flags.UnrecognizedFlagError, match="batchsize"):
    parse(f"--flagfile={path}")
