"""Workdirs that release 0.1.0 wrote (commit 5409a42, JAX 0.10.2): they are resumed, drawn from, measured, exported.

`release_0_1_0.tar.xz` holds two of the same run, a small network on the digits: `pmap`, trained on one device, with its
checkpoints 120 (in the second epoch) and 150 (the end), and `fsdp`, trained on two, with its last one.
"""

import hashlib
import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.config.text import WITHOUT_THE_OPTION
from ddpm_jax.evaluation.results import read_result
from ddpm_jax.report.report import write_report
from ddpm_jax.resolve import resolve_config
from ddpm_jax.runs import evaluate
from ddpm_jax.runs import export as exchange
from ddpm_jax.runs import train as train_lib
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.weights import initial
from ddpm_jax.weights.load import load_weights
from ddpm_jax.workdir import layout
from ddpm_jax.workdir.metrics import training_seconds
from tests.command import digests

ARCHIVE = pathlib.Path(__file__).with_name("release_0_1_0.tar.xz")
NAMES = ("pmap", "fsdp")


@pytest.fixture
def old(tmp_path):
  """The workdirs, as they were, to change."""
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(tmp_path, filter="data")
  return tmp_path


def weights_of(folder, **changes):
  config = config_lib.override(resolve_config("sample", {}, folder), changes)
  return load_weights(config, folder)


def test_what_it_stored_are_the_settings(old):
  """And a setting that it did not know means what it did."""
  for name in NAMES:
    config = resolve_config("train", {}, old / name)
    stored = json.loads((old / name / "config.json").read_text())
    values = config_lib.values(config)
    for section in stored.values():
      for key, value in section.items():
        assert values[key] == (tuple(value) if isinstance(value, list) else value), key
    assert config.optimizer.lr_schedule == "cosine" and config.model.matmul_precision == "default"
    assert layout.check(old / name, config)


def test_what_an_old_file_lacks_is_what_that_release_did(old):
  """An option that is added must say so in `WITHOUT_THE_OPTION`: its default may be another, now or later."""
  stored = json.loads((old / "pmap" / "config.json").read_text())
  names = {name for section in stored.values() for name in section}
  added = config_lib.values(config_lib.Config()).keys() - names
  assert set(WITHOUT_THE_OPTION) == added, "say what release 0.1.0 did in place of each option that was added since"
  config = layout.load_config(old / "pmap")
  assert {name: config_lib.values(config)[name] for name in added} == WITHOUT_THE_OPTION


def test_a_default_of_today_is_none_of_an_old_run(old, monkeypatch):
  """Whatever it becomes: here as if plain float32 products were no longer what a new run has."""
  monkeypatch.setitem(WITHOUT_THE_OPTION, "matmul_precision", "high")
  assert layout.load_config(old / "pmap").model.matmul_precision == "high"
  layout.create(old / "new", config_lib.Config())
  assert layout.load_config(old / "new").model.matmul_precision == "default"


def test_the_same_bits_are_restored_and_begun_with(old):
  """By the digests that it kept in its own manifest, which are those of the arrays' bytes."""
  for name in NAMES:
    weights = weights_of(old / name)
    assert weights.step == 150
    path = str(old / name)
    begun, shape = initial.read_params(config_lib.override(initial.base_config(path), {"init_from": path}))
    assert shape == (8, 8, 1)
    kept = digests(old / name, 150)
    for tree in (weights.params, begun):
      leaves = jax.tree_util.tree_leaves_with_path(tree)
      found = {jax.tree_util.keystr(at, simple=True, separator="/"): digest(leaf) for at, leaf in leaves}
      assert found == {name.removeprefix("ema_params/"): kept[name] for name in kept if name.startswith("ema_params/")}


def digest(leaf):
  return hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()


def test_training_goes_on_in_the_middle_of_an_epoch(old):
  """From its checkpoint 120 to 150, where this release comes to what that one came to."""
  folder = old / "pmap"
  (ours, theirs), keep = ([], []), folder / "checkpoints" / "150"
  for weights in ("raw", "ema"):
    theirs += jax.tree.leaves(jax.device_get(weights_of(folder, sample_weights=weights).params))
  keep.rename(old / "kept")
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  config = resolve_config("train", {}, folder)
  with StopRequest() as stop:
    assert train_lib.train(config, folder, train_lib.Invocation(stop))
  for weights in ("raw", "ema"):
    ours += jax.tree.leaves(jax.device_get(weights_of(folder, sample_weights=weights).params))
  for leaf, wanted in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(leaf, wanted, rtol=1e-3, atol=2e-5)
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == list(range(10, 151, 10))
  assert [json.loads(line) for line in lines[:12]] == rows[:12]
  for row, line in zip(rows[12:], lines[12:], strict=True):
    np.testing.assert_allclose(row["grad_norm"], json.loads(line)["grad_norm"], rtol=1e-3)
  assert rows[-1]["seconds"] > training_seconds(rows[:12])[-1] > 0


def test_it_is_drawn_from_exported_reported_and_begun_with(old, monkeypatch):
  for name in NAMES:
    model = ddpm_jax.load(old / name)
    images = model.sample(4, sampler="dpmpp", steps=5)
    assert images.shape == (4, 8, 8, 1) and images.std() > 20
    target = old / f"exported_{name}"
    given = {"export_format": "safetensors", "export_dir": str(target)}
    exchange.export(resolve_config("export", given, old / name), old / name)
    begun = ddpm_jax.load(target / "model.safetensors")
    np.testing.assert_array_equal(begun.sample(4, sampler="dpmpp", steps=5), images)
    config = initial.base_config(str(old / name))
    assert config.model.channels == 8 and config.diffusion.num_timesteps == 50
    assert "150" in write_report(old / name).read_text()
    assert read_result(old / name / "eval/150.json") is None


def test_it_is_measured(old):
  folder = old / "pmap"
  given = {"measures": ("bound",), "likelihood_splits": "train", "likelihood_examples": 16, "bound_timesteps": 5}
  evaluate.evaluate(resolve_config("evaluate", given, folder), folder, given)
  result = read_result(folder / "eval/150.json")
  assert result["step"] == 150 and 1 < result["bits_per_dim"]["train"]["total"] < 9
  assert layout.load_config(folder) == resolve_config("train", {}, folder)
