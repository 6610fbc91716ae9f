"""Folders of diffusers against what diffusers computed with them; `tests/interop` asks diffusers itself."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.diffusion.denoiser import thresholded
from ddpm_jax.diffusion.samplers import make_sampler, sample
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.errors import UserError
from ddpm_jax.models.build import UNetNetwork, build_denoiser, build_model
from ddpm_jax.weights import diffusers
from tests.weights.folders import (
  change_json,
  contents,
  golden,
  published,
  read_tensors,
  saved,
  write_tensors,
)
from tests.weights.make_diffusers_golden import (
  BATCH,
  NETWORKS,
  STEPS,
  TIMESTEPS,
  TRAJECTORIES,
  labels_of,
  network_input,
)


def open_folder(folder):
  """(config, image shape, params)."""
  settings, shape, _ = diffusers.describe(folder)
  few = {"preview_steps": 50 if settings["num_timesteps"] >= 50 else 1}
  config = config_lib.override(Config(), settings | few)
  return config, shape, diffusers.read_params(folder, config.model, shape)


def refusal(folder) -> str:
  with pytest.raises(UserError) as caught:
    open_folder(folder)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_diffusers(tmp_path, name):
  config, shape, params = open_folder(published(tmp_path / "model", name))
  network = UNetNetwork(build_model(config.model, shape))
  ours = jax.jit(network)(params, network_input(name, shape), jnp.asarray(TIMESTEPS), labels_of(NETWORKS[name]))
  theirs = golden(f"{name}/output")
  assert np.abs(ours - theirs).max() < 5e-6 * np.abs(theirs).max()


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_a_ddim_trajectory_is_that_of_diffusers(tmp_path, name):
  config, shape, params = open_folder(saved(tmp_path / "model", name))
  d = config.diffusion
  schedule = make_schedule(d.beta_schedule, d.num_timesteps, beta_start=d.beta_start, beta_end=d.beta_end)
  denoise = thresholded(build_denoiser(config.model, d.prediction, shape).bind(params), "static")
  start, keys = network_input("start", shape), jax.random.split(jax.random.key(0), BATCH)
  middle, end = golden(f"{name}/ddim")
  whole = make_sampler(schedule, "ddim", num_steps=STEPS, grid="trailing")
  half = jax.tree.map(lambda column: column[:5], whole)
  for table, theirs in ((half, middle), (whole, end)):
    ours, _ = jax.jit(lambda x, table=table: sample(table, denoise, keys, shape, start=x))(start)
    assert np.abs(ours - theirs).max() < 1e-4  # of numbers up to 1; their tables are float32


def test_both_layouts_are_one_model(tmp_path):
  flat, nested = open_folder(published(tmp_path / "a")), open_folder(saved(tmp_path / "b"))
  assert flat[:2] == nested[:2]
  assert flat[0].diffusion.variance == "fixed_small" and flat[0].diffusion.num_timesteps == 100
  for ours, theirs in zip(jax.tree.leaves(flat[2]), jax.tree.leaves(nested[2]), strict=True):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_written_is_what_was_read(tmp_path, name):
  """Bit for bit, and with the options of diffusers' own file."""
  (tmp_path / "b").mkdir()
  source = saved(tmp_path / "a", name)
  config, shape, params = open_folder(source)
  diffusers.write_folder(tmp_path / "b", config, shape, params, ["a", "b", "c"][: config.model.num_classes])
  assert diffusers.describe(tmp_path / "b").classes == (("a", "b", "c") if config.model.num_classes else ())
  weights = "unet/diffusion_pytorch_model.safetensors"
  before, after = read_tensors(source / weights), read_tensors(tmp_path / "b" / weights)
  assert set(before) == set(after)
  for name, tensor in before.items():
    np.testing.assert_array_equal(after[name].view(np.uint32), tensor.view(np.uint32))
  for file in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
    old, new = (json.loads((folder / file).read_text()) for folder in (source, tmp_path / "b"))
    # The limit of dynamic thresholding, which is off; what is left out of ours are options that are off.
    free = {"_diffusers_version", "sample_max_value"}
    assert {name: new.get(name) for name in old if name not in free} == {n: v for n, v in old.items() if n not in free}
  assert open_folder(tmp_path / "b")[:2] == (config, shape)


def test_the_spacing_of_timesteps_is_no_part_of_a_model(tmp_path):
  """Release 0.1.0 wrote 'trailing'; whatever a folder says, --sampler and its flags say how to draw."""
  read = []
  for spacing in ("leading", "trailing", "linspace"):
    folder = saved(tmp_path / spacing)
    change_json(folder / "scheduler" / "scheduler_config.json", timestep_spacing=spacing)
    read.append(open_folder(folder)[0])
  assert read[0] == read[1] == read[2]


def test_half_precision_is_widened(tmp_path):
  folder = published(tmp_path / "model")
  path = folder / "diffusion_pytorch_model.safetensors"
  half = {name: tensor.astype(np.float16) for name, tensor in read_tensors(path).items()}
  write_tensors(path, half)
  _, _, params = open_folder(folder)
  assert params["conv_in"]["kernel"].dtype == np.float32
  np.testing.assert_array_equal(params["conv_in"]["bias"], half["conv_in.bias"].astype(np.float32))


# What is refused.


def test_another_kind_of_model(tmp_path):
  folder = saved(tmp_path / "model")
  change_json(folder / "model_index.json", _class_name="StableDiffusionPipeline")
  text = refusal(folder)
  assert text.startswith(f"{folder / 'model_index.json'}: a StableDiffusionPipeline is another kind of model")
  folder = published(tmp_path / "flat", _class_name="UNet2DConditionModel")
  assert refusal(folder).startswith(f"{folder / 'config.json'}: _class_name: 'UNet2DConditionModel' is not supported")


def test_an_option_is_named_with_its_file(tmp_path):
  folder = published(tmp_path / "model", resnet_time_scale_shift="scale_shift")
  assert refusal(folder) == (
    f"{folder / 'config.json'}: resnet_time_scale_shift: 'scale_shift' is not supported, only 'default'"
  )
  folder = saved(tmp_path / "other")
  change_json(folder / "scheduler" / "scheduler_config.json", beta_schedule="laplace")
  assert refusal(folder).startswith(
    f"{folder / 'scheduler' / 'scheduler_config.json'}: beta_schedule: 'laplace' is not supported, only linear, "
  )


def test_weights_of_another_network_are_listed(tmp_path):
  folder = published(tmp_path / "model", layers_per_block=1)
  text = refusal(folder)
  assert f"{folder / 'diffusion_pytorch_model.safetensors'}: the weights do not fit the network: " in text
  for name in ("down_blocks.0.resnets.1.norm1.weight is too much", "down_blocks.1.attentions.1.to_q.bias is too much"):
    assert name in text
  assert text.count(" is too much") > 50


@pytest.mark.parametrize("missing", ["scheduler/scheduler_config.json", "unet/config.json"])
def test_a_part_is_missing(tmp_path, missing):
  folder = saved(tmp_path / "model")
  (folder / missing).unlink()
  assert refusal(folder) == f"there is no {folder / missing}; name the folder of a whole pipeline"


def test_a_file_is_no_json(tmp_path):
  folder = saved(tmp_path / "model")
  for text in ("{", "[1]", "\xff", '{"a":' * 100_000):
    (folder / "unet" / "config.json").write_text(text, encoding="latin-1")
    assert refusal(folder).startswith(f"{folder / 'unet' / 'config.json'} is no JSON")


def test_weights_in_other_forms(tmp_path):
  folder = published(tmp_path / "model")
  weights = folder / "diffusion_pytorch_model.safetensors"
  weights.unlink()
  assert refusal(folder) == f"{folder} has no diffusion_pytorch_model.safetensors"
  (folder / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
  text = refusal(folder)
  assert "diffusion_pytorch_model.bin is a pickle" in text and f"from_pretrained('{folder}').save_pretrained(" in text
  (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
  assert refusal(folder).endswith(".index.json: weights in several files are not supported; save them in one")


def test_links_that_lead_outside_are_refused(tmp_path):
  """But for the Hub's cache, whose snapshots are links to the blobs beside them."""
  folder = published(tmp_path / "model")
  for name in ("config.json", "diffusion_pytorch_model.safetensors"):
    shutil.copytree(folder, tmp_path / name, symlinks=True)
    (tmp_path / name / name).unlink()
    (tmp_path / name / name).symlink_to(folder / name)
    assert refusal(tmp_path / name).startswith(f"{tmp_path / name / name} is a link that leads outside, to {folder}")
  snapshot, blobs = tmp_path / "hub" / "snapshots" / "0123", tmp_path / "hub" / "blobs"
  snapshot.mkdir(parents=True)
  shutil.copytree(folder, blobs)
  for path in blobs.iterdir():
    (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
  assert open_folder(snapshot)[1] == (8, 8, 3)
  (snapshot / "config.json").unlink()
  (snapshot / "config.json").symlink_to(folder / "config.json")
  assert "is a link that leads outside" in refusal(snapshot)


def test_two_channels_cannot_be_written(tmp_path):
  """sin and cos of one frequency: diffusers divides zero by zero."""
  config = config_lib.override(Config(), {"channels": 2, "channel_multipliers": (1,), "attention_resolutions": ()})
  with pytest.raises(UserError, match="channels: with 2"):
    diffusers.write_folder(tmp_path, config, (8, 8, 1), {})
  assert contents(tmp_path) == {}
