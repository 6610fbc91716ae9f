"""The parts of a run: its initial state, and what is said of a noise schedule that does not reach noise."""

import pathlib
import re

import chex
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.training.setup import Run, copies_warning, noise_warning
from tests.test_documents import preset
from tests.training.tiny import host, tiny_config, tiny_run, tiny_stage

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


def with_diffusion(run: Run, config: Config) -> Run:
  d = config.diffusion
  schedule = make_schedule(d.beta_schedule, d.num_timesteps, beta_start=d.beta_start, beta_end=d.beta_end)
  return run._replace(config=config, schedule=schedule)


def test_the_flags_that_the_warning_names_silence_it():
  """For every schedule and number of timesteps; with the presets of pixels there is none."""
  run, wrong = tiny_run(tiny_config()), []
  assert "sqrt(alpha_bar) is 0.6 (L_T up to 0.33 bits/dim)" in str(noise_warning(run))
  for schedule in ("linear", "quadratic", "scaled_linear", "sigmoid", "cosine"):
    for number in (1, 3, 8, 10, 20, 100, 250, 999, 1000):
      config = tiny_config(beta_schedule=schedule, num_timesteps=number, preview_steps=1)
      warning = noise_warning(with_diffusion(run, config))
      if warning is None:
        continue
      flags = [dict(re.findall(r"--(\w+)=(\S+?)(?=[,;\s]|$)", part)) for part in warning.split(" or ")]
      for flag in filter(None, flags):
        values = {name: value if name == "beta_schedule" else float(value) for name, value in flag.items()}
        if noise_warning(with_diffusion(run, config_lib.override(config, values))):
          wrong.append((schedule, number, flag))
      if not any(flags) and "more timesteps" not in warning:
        wrong.append((schedule, number, warning))
  assert not wrong
  presets = {path.name: preset(path) for path in EXPERIMENTS.glob("*.flags")}
  pixels = {name: config for name, config in presets.items() if not config.diffusion.first_stage}  # as published
  assert pixels and not [name for name, config in pixels.items() if noise_warning(with_diffusion(run, config))]


def test_a_small_set_of_own_images_and_many_passes_are_warned_of():
  """60 and 300 images with the preset for own images; not the set by which it was chosen, nor the embedded one."""
  own = config_lib.override(preset(EXPERIMENTS / "images32.flags"), {"dataset": "folder:images"})
  for images, passes in ((60, "4,800"), (300, "960")):
    text = str(copies_warning(own, images))
    told = f"9,000 training steps of 32 images are {passes} passes over this small set of {images}, which the model may"
    assert text.startswith(told)
    assert "--random_flip" not in text and "'neighbours' of --mode=evaluate" in text
  assert "--random_flip" in str(copies_warning(config_lib.override(own, {"random_flip": False}), 60))
  assert copies_warning(own, 3754) is None and copies_warning(own, 50_000) is None
  assert copies_warning(config_lib.override(own, {"num_steps": 100}), 60) is None
  assert copies_warning(config_lib.override(own, {"num_steps": 1_000_000}), 5000) is None
  assert copies_warning(config_lib.override(own, {"dataset": "digits"}), 60) is None


def test_latents_have_a_bound_of_their_own():
  """The published schedules of latent diffusion are not warned of; that of Stable Diffusion and one of 10 steps are."""
  run = tiny_run(tiny_config(), tiny_stage())
  latents = {
    path.name: config for path in EXPERIMENTS.glob("ldm_*.flags") if (config := preset(path)).diffusion.first_stage
  }
  assert len(latents) == 3 and not [
    name for name, config in latents.items() if noise_warning(with_diffusion(run, config))
  ]
  pixels = tiny_run(tiny_config())
  assert all(noise_warning(with_diffusion(pixels, config)) for config in latents.values())
  of = dict(beta_schedule="scaled_linear", num_timesteps=1000, beta_start=0.00085, beta_end=0.012)
  for changes in (of, of | {"num_timesteps": 10, "preview_steps": 1}):
    assert re.search(r"\(L_T [\d.]+ bits", str(noise_warning(with_diffusion(run, tiny_config(**changes)))))


def test_the_initial_state_is_compiled_in_less_time_and_is_the_same():
  """To the bit: what its program is compiled with on a CPU has no part in the numbers."""
  run = tiny_run(tiny_config())
  assert run.mesh.once == {"xla_backend_optimization_level": 1}
  wanted = run.initial_state()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(type(run.mesh), "once", {"xla_backend_optimization_level": 3})
    chex.assert_trees_all_equal(host(run.initial_state()), host(wanted))
