"""Training from Python with own parts: the examples of experiments/, exact resume; the command refuses them."""

import dataclasses

import jax
import numpy as np
import pytest

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.data.sources import open_source
from ddpm_jax.devices import make_mesh
from ddpm_jax.errors import UserError
from ddpm_jax.resolve import resolve_config
from ddpm_jax.training.setup import build_run, make_train_step
from ddpm_jax.training.step import abstract_batch
from ddpm_jax.weights import initial
from experiments import own_loop
from experiments.own_loss import own_loss
from experiments.own_network import OwnNetwork
from tests.command import digests, metrics

TINY = {
  "channels": 8,
  "channel_multipliers": (1,),
  "num_timesteps": 20,
  "beta_end": 0.4,
  "batch_size": 16,
  "log_every": 1,
  "sample_every": 0,
  "lr_schedule": "constant",
  "prediction": "v",
  "checkpoint_every": 2,
}


def tiny(**changes) -> Config:
  return config_lib.override(Config(), TINY | changes)


def refusal(function, *arguments, **options) -> str:
  with pytest.raises(UserError) as caught:
    function(*arguments, **options)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_an_own_network_is_trained_resumed_and_drawn_from(tmp_path):
  network, whole, broken = OwnNetwork(width=8), tmp_path / "whole", tmp_path / "broken"
  model = ddpm_jax.train(tiny(num_steps=4), whole, network=network)
  ddpm_jax.train(tiny(num_steps=2), broken, network=network)
  ddpm_jax.train(tiny(num_steps=4), broken, network=network)
  assert digests(broken) == digests(whole) and metrics(broken) == metrics(whole)
  images = ddpm_jax.load(whole, network=network).sample(4, sampler="ddim", steps=3)
  np.testing.assert_array_equal(images, model.sample(4, sampler="ddim", steps=3))
  assert images.shape == (4, 8, 8, 1)

  # Nobody takes it for the U-Net of its settings.
  said = f"network: {whole} was trained with an own network, OwnNetwork(width=8); in Python, give it to ddpm_jax."
  for mode in ("train", "sample", "evaluate", "export"):
    assert refusal(resolve_config, mode, {}, whole).startswith(said)
  assert refusal(ddpm_jax.load, whole).startswith(said)
  assert "OwnNetwork(width=8), not OwnNetwork(width=4)" in refusal(ddpm_jax.load, whole, network=OwnNetwork(width=4))
  assert refusal(ddpm_jax.train, tiny(num_steps=4), whole).startswith(said)
  assert refusal(initial.base_config, str(whole)).startswith(f"init_from: {said}")


def test_an_own_network_is_told_the_class():
  seen = []

  @dataclasses.dataclass(frozen=True)
  class Told(OwnNetwork):
    def __call__(self, params, x, time, cond=None, *, dropout_keys=None):
      seen.append(cond)
      return super().__call__(params, x, time, cond, dropout_keys=dropout_keys)

  for labels in (False, True):
    config = tiny(**({"conditioning": "class", "num_classes": 10, "label_dropout": 0.1} if labels else {}))
    run = build_run(config, (8, 8, 1), make_mesh("pmap"), Told(width=4))
    jax.eval_shape(make_train_step(run), run.abstract_state, abstract_batch((8, 8, 1), 16, labels=labels))
    told = seen.pop()
    assert (told.shape, told.dtype) == ((16,), np.int32) if labels else told is None


def test_an_own_loss_is_minimised_and_only_training_needs_it(tmp_path):
  folder = tmp_path / "run"
  model = ddpm_jax.train(tiny(num_steps=40, learning_rate=1e-2, warmup_steps=0), folder, objective=own_loss)
  losses = [row["loss"] for row in metrics(folder)]
  assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
  assert refusal(resolve_config, "train", {}, folder).startswith(
    f"objective: {folder} was trained with an own objective"
  )
  assert resolve_config("sample", {}, folder) == model.config
  assert "objective: " in refusal(ddpm_jax.train, tiny(num_steps=41, learning_rate=1e-2, warmup_steps=0), folder)


def test_own_images_are_those_of_one_run(tmp_path):
  source = dataclasses.replace(open_source(Config().data), name="mine")
  model = ddpm_jax.train(tiny(num_steps=2), tmp_path / "run", source=source)
  assert model.config.data.dataset == "own:mine"
  other = dataclasses.replace(source, fingerprint={"pixels": "0" * 64})
  assert "have changed" in refusal(ddpm_jax.train, tiny(num_steps=4), tmp_path / "run", source=other)
  said = "dataset: this run is of images that Python gave it, 'mine'; give them to ddpm_jax.train again"
  assert refusal(open_source, resolve_config("train", {}, tmp_path / "run").data).startswith(said)
  unmarked = dataclasses.replace(source, fingerprint={})
  assert "it has no fingerprint" in refusal(ddpm_jax.train, tiny(num_steps=4), tmp_path / "other", source=unmarked)


def test_an_array_of_images_is_a_source(tmp_path):
  """The digits as an array are the digits: the same losses, and a changed pixel is another data set."""
  digits = open_source(Config().data)
  images = digits.read(np.arange(len(digits))).images
  ddpm_jax.train(tiny(num_steps=2), tmp_path / "array", source=images)
  ddpm_jax.train(tiny(num_steps=2), tmp_path / "digits")
  assert metrics(tmp_path / "array") == metrics(tmp_path / "digits")
  images[0, 0, 0] += 1
  assert "have changed" in refusal(ddpm_jax.train, tiny(num_steps=4), tmp_path / "array", source=images)
  for wrong in (images.astype(np.float32), images[0], images[:0], "digits"):
    assert "is not uint8 [N, H, W, C]" in refusal(ddpm_jax.train, tiny(), tmp_path / "no", source=wrong)


def test_an_own_loop_makes_the_training_steps_of_the_command(tmp_path):
  losses, images = own_loop.run(tiny(), 3)
  ddpm_jax.train(tiny(num_steps=3), tmp_path / "run")
  np.testing.assert_allclose(losses, [row["loss"] for row in metrics(tmp_path / "run")], rtol=1e-5)
  assert images.shape == (16, 8, 8, 1) and images.dtype == np.uint8 and images.std() > 20
