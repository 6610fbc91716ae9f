"""A run that trains a classifier of noisy images: the same loop and workdir, and nothing that draws."""

import json

import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.errors import UserError
from ddpm_jax.resolve import resolve_config
from ddpm_jax.runs import train as train_lib
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.weights.load import load_weights
from ddpm_jax.workdir import layout
from tests.sampling.conftest import pictures, save_pictures
from tests.training.tiny import tiny_config

CONFIG = tiny_config(
  stage="classifier",
  channels=4,
  channel_multipliers=(1,),
  attention_resolutions=(),
  num_steps=3,
  sample_every=1,
  weight_decay=0.05,
  num_classes=10,
)


def train(folder, **changes):
  with StopRequest() as stop:
    train_lib.train(config_lib.override(CONFIG, changes), folder, train_lib.Invocation(stop))
  return load_weights(layout.load_config(folder), folder)


def test_a_classifier_is_trained_resumed_exactly_and_draws_nothing(tmp_path, capsys):
  whole, folder = train(tmp_path / "whole"), tmp_path / "run"
  said = capsys.readouterr()
  assert "--mode=sample --classifier=" in said.out + said.err
  first = train(folder, num_steps=2)
  assert (first.step, first.class_names) == (2, tuple("0123456789"))
  assert train(folder).identity == whole.identity != first.identity
  metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in metrics] == [1, 2, 3]
  assert all(0 <= line["mean/accuracy"] <= 1 and line["loss"] > 0 for line in metrics)
  assert not list((folder / "samples").iterdir())
  for mode in ("sample", "evaluate", "export"):
    with pytest.raises(UserError) as caught:
      resolve_config(mode, {"export_dir": "out"} if mode == "export" else {}, folder)
    assert str(caught.value).startswith(f"mode: {mode} ") and "--classifier" in str(caught.value)


def test_images_without_classes_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"^stage: classifier needs the class of each image, and folder:\S+ has [^-]*$"):
    train(tmp_path / "run", dataset=f"folder:{save_pictures(tmp_path / 'data', pictures())}")
  assert not (tmp_path / "run").exists()
