"""A run of --stage=autoencoder: the same loop and workdir; it resumes to the bit, and keeps what it is compared by."""

import json
import shutil

import jax
import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import perceptual
from ddpm_jax.evaluation.results import write_result
from ddpm_jax.resolve import resolve_config
from ddpm_jax.runs import export as export_lib
from ddpm_jax.runs import train as train_lib
from ddpm_jax.runs.alarms import Alarms
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.weights.autoencoders import read_autoencoder
from ddpm_jax.weights.load import load_weights
from ddpm_jax.weights.perceptual import PerceptualWeights
from ddpm_jax.workdir import layout
from ddpm_jax.workdir.arrays import load_arrays, save_arrays
from tests.training.tiny import tiny_config

CONFIG = tiny_config(
  **dict(stage="autoencoder", loss="l1", channels=4, channel_multipliers=(1, 2), attention_resolutions=()),
  **dict(regularizer="vq", codebook_size=8, latent_channels=2, perceptual="features"),
  **dict(discriminator_weight=0.5, discriminator_layers=1, discriminator_start=2, discriminator_warmup=1),
  **dict(warmup_steps=0, num_steps=4, sample_every=2, checkpoint_every=1, preview_images=12, steps_per_dispatch=1),
)


def train(folder, **changes):
  with StopRequest() as stop:
    train_lib.train(config_lib.override(CONFIG, changes), folder, train_lib.Invocation(stop))
  return load_weights(layout.load_config(folder), folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A finished run."""
  folder = tmp_path_factory.mktemp("autoencoder") / "whole"
  return folder, train(folder)


def test_an_autoencoder_is_trained_and_resumed_exactly(whole, tmp_path, capsys, monkeypatch):
  """Stopped before the discriminator's warm-up, between that and its start, and after it. Alarms are raised."""
  (finished, weights), folder = whole, tmp_path / "run"
  monkeypatch.setattr("ddpm_jax.runs.alarms._LEAST_USED", 2.0)
  for steps in (1, 2, 3, 4):
    found = train(folder, num_steps=steps)
  said = capsys.readouterr()
  assert "--first_stage=" in said.out + said.err and "the codebook collapses" in said.out
  assert found.identity == weights.identity
  assert set(found.params) == {"autoencoder", "discriminator"}
  of_both = [
    [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (finished, folder)
  ]
  for one, other in zip(*of_both, strict=True):
    same = {name for name in one if name.startswith(("loss", "mean", "combined", "grad"))}
    assert {name: one[name] for name in same} == {name: other[name] for name in same}
  assert [row["loss/discriminator"] > 0 for row in of_both[0]] == [False, True, True, True]
  assert [row["combined/adversarial_weight"] > 0 for row in of_both[0]] == [False, False, True, True]
  assert len(list((folder / "samples").glob("*.png"))) == 4


def test_what_it_is_compared_by_stays_the_same(whole, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(whole[0], folder)
  path = folder / perceptual.NAME
  arrays, facts = load_arrays(path)
  save_arrays(path, {name: array + 1 for name, array in arrays.items()}, facts)
  with pytest.raises(UserError, match=r"^perceptual: checkpoint 4 in .*other weights than .*restore that file$"):
    train(folder, num_steps=5)
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(UserError, match=r"^perceptual: .*perceptual\.safetensors: .*; restore it$"):
    train(folder, num_steps=5)


def test_the_distance_of_features_is_0_for_equal_images_and_has_a_gradient(whole):
  distance = perceptual._distance(load_arrays(whole[0] / perceptual.NAME)[1])
  params = perceptual.trained.nested(load_arrays(whole[0] / perceptual.NAME)[0])
  x, y = (np.random.default_rng(seed).uniform(-1, 1, (3, 8, 8, 1)).astype(np.float32) for seed in (0, 1))
  np.testing.assert_array_equal(distance(params, x, x), np.zeros(3))
  np.testing.assert_allclose(distance(params, x, y), distance(params, y, x), rtol=1e-6)
  gradient = jax.grad(lambda y: distance(params, x, y).sum())(y)
  assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 0


def test_what_is_exported_says_what_it_was_measured_beside(whole, tmp_path):
  folder, weights = whole
  beside = {"mean_image": {"psnr": 12.5}, "resized": {"psnr": 25.75}}
  of = {"train": {"examples": 9, "psnr": 20.0, "psnr_standard_error": 0.5, "yardsticks": beside}}
  write_result(folder, {"step": 4, "weights": "ema", "reconstruction": of}, {})
  export_lib.export(config_lib.override(layout.load_config(folder), {"export_dir": str(tmp_path / "out")}), folder)
  card = (tmp_path / "out" / "README.md").read_text()
  for line in (
    "| measure | value | the mean image | images shrunk to the latents' size |\n",
    "| psnr_train | 20 | 12.5 | 25.8 |\n",
    "latents of 2 channels that a codebook of 8 vectors bounds",
    "VQModel.from_pretrained",
  ):
    assert line in card, line
  assert (tmp_path / "out" / "samples.png").exists()
  found = read_autoencoder(tmp_path / "out")
  np.testing.assert_array_equal(
    found.params["codebook"]["embedding"], weights.params["autoencoder"]["codebook"]["embedding"]
  )


def test_its_workdir_is_none_to_draw_from(whole):
  with pytest.raises(
    UserError, match=r"^mode: sample .* an autoencoder; .*--first_stage; --mode=evaluate measures it$"
  ):
    resolve_config("sample", {}, whole[0])
  resolve_config("evaluate", {}, whole[0])
  with pytest.raises(UserError, match=r"^stage: \S+ holds an autoencoder, and no denoiser; use another --workdir$"):
    resolve_config("train", {"stage": "denoiser"}, whole[0])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(discriminator_layers=6), r"discriminator_layers: 6 leave nothing of images of 8x8 pixels; use --disc"),
    (dict(channel_multipliers=(1, 1, 1, 1, 1)), r"image_size: 8 is not divisible by 16"),
    (dict(perceptual="lpips", lpips_weights="/none"), r"perceptual: lpips is of images of at least 16x16"),
  ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    train(tmp_path / "run", **changes)
  assert not (tmp_path / "run").exists()


def test_other_weights_of_lpips_are_refused_when_the_command_names_them(tmp_path, monkeypatch):
  """The copy in the workdir is what the run goes on with, whatever has become of the file."""
  file, trees = tmp_path / "lpips.safetensors", [{"a": {"kernel": np.full(3, value, np.float32)}} for value in (1, 2)]
  config = config_lib.override(CONFIG, {"perceptual": "lpips", "lpips_weights": str(file)})
  save_arrays(tmp_path / perceptual.NAME, {"a/kernel": trees[0]["a"]["kernel"]}, {"kind": "lpips"})
  for params in trees:
    monkeypatch.setattr(perceptual, "load_lpips", lambda path, params=params: PerceptualWeights(params, ""))
    perceptual.check(config, tmp_path, (16, 16, 3), given=True)  # there is no such file any more
    file.touch()
    perceptual.check(config, tmp_path, (16, 16, 3))
    if params is trees[0]:
      perceptual.check(config, tmp_path, (16, 16, 3), given=True)
      file.unlink()
  with pytest.raises(UserError, match=rf"^lpips_weights: {file} holds other weights than the run in {tmp_path} began"):
    perceptual.check(config, tmp_path, (16, 16, 3), given=True)


def test_alarms_are_raised_once_and_name_the_remedy():
  alarms = Alarms(discriminator_start=100)
  assert alarms(50, {"loss/discriminator": 1.0, "mean/kl": 0.0, "mean/codes_used": 0.06}) == []
  (line,) = alarms(100, {"mean/codes_used": 0.04})
  assert "4.0% of the codes" in line and "--codebook_size" in line
  assert alarms(600, {"mean/codes_used": 0.04, "loss/discriminator": 0.99}) == []
  (line,) = alarms(700, {"mean/kl": 0.004, "loss/discriminator": 1.01})
  assert "0.004 nats" in line and "--kl_weight" in line
  assert alarms(1599, {"loss/discriminator": 1.0}) == []
  (line,) = alarms(1600, {"loss/discriminator": 1.0, "mean/kl": 0.0})
  assert "since step 600" in line and "--discriminator_start" in line
  lively = Alarms(discriminator_start=0)
  for step in range(100, 5000, 100):
    assert lively(step, {"loss/discriminator": 0.5 if step % 900 == 0 else 1.0, "mean/kl": 0.1}) == []
