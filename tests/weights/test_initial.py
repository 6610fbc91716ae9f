"""Where weights come from: three kinds of PATH that are one model, and what is not taken."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.runs import export as exchange_run
from ddpm_jax.runs import train as train_lib
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.weights import initial
from ddpm_jax.weights.load import load_weights
from ddpm_jax.workdir import layout
from tests.sampling.conftest import make_workdir
from tests.training.tiny import CONDITIONAL, IMAGE_SHAPE, host, tiny_config, tiny_run
from tests.weights.folders import change_json, contents, saved


@pytest.fixture(scope="module")
def paths(original, tmp_path_factory):
  """Kind -> PATH of one model."""
  folder = tmp_path_factory.mktemp("paths")
  for form in ("diffusers", "safetensors"):
    exchange_run.export(original.having(export_format=form, export_dir=str(folder / form)), original.path)
  return {
    "diffusers": str(folder / "diffusers"),
    "file": str(folder / "safetensors" / "model.safetensors"),
    "workdir": str(original.path),
  }


def begun_with(path, **changes) -> Config:
  return config_lib.override(initial.base_config(path), {"init_from": path} | changes)


def refusal(path, **changes) -> str:
  with pytest.raises(UserError) as caught:
    initial.find_weights(begun_with(str(path), **changes), None)
  text = str(caught.value)
  assert text.startswith("init_from: ") and "\n" not in text
  return text


@pytest.mark.parametrize("kind", ["diffusers", "file", "workdir"])
def test_every_kind_of_path_is_the_same_model(original, paths, kind):
  origin = initial.inspect_source(paths[kind])
  assert (origin.kind, origin.image_shape) == (kind, None if kind == "workdir" else IMAGE_SHAPE)
  config = begun_with(paths[kind])
  d, m = original.config.diffusion, original.config.model
  assert dataclasses.replace(config.diffusion, loss=d.loss) == d
  assert dataclasses.replace(config.model, norm_groups=0, dropout=m.dropout) == m
  found, expected = initial.find_weights(config, None), load_weights(original.config, original.path)
  assert found.run.image_shape == IMAGE_SHAPE and (found.step, found.which) == (0, "ema")
  assert found.identity == expected.identity
  for ours, theirs in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_the_checkpoint_of_a_workdir_may_be_named(original, paths):
  found = initial.find_weights(begun_with(paths["workdir"], checkpoint="3", sample_weights="raw"), None)
  expected = load_weights(original.having(checkpoint="3", sample_weights="raw"), original.path)
  assert found.identity == expected.identity
  assert "is no workdir, so --checkpoint=3 has no effect" in refusal(paths["file"], checkpoint="3")
  assert "is no workdir, so --sample_weights=raw has no effect" in refusal(paths["diffusers"], sample_weights="raw")


def test_a_workdir_with_checkpoints_draws_with_them(original, paths):
  """PATH is where the first weights came from, and no more."""
  config = original.having(init_from=paths["file"], checkpoint="3")
  with pytest.raises(UserError, match=r"init_from: checkpoint 3 in .* was trained with ''"):
    initial.find_weights(config, original.path)
  assert initial.find_weights(original.having(checkpoint="3"), original.path).step == 3


# What is not taken.


def test_nothing_there(tmp_path):
  assert f"there is no {tmp_path / 'none'}; nothing is downloaded" in refusal(tmp_path / "none")
  (tmp_path / "empty").mkdir()
  assert "is no folder of diffusers (no model_index.json) and no workdir" in refusal(tmp_path / "empty")
  with pytest.raises(UserError, match="init_from: 'hf://google/ddpm-cifar10-32' is no path in a file system"):
    initial.absolute("hf://google/ddpm-cifar10-32")
  assert initial.absolute("") == "" and initial.absolute("a/b").endswith("/a/b")


def test_a_path_that_cannot_be_looked_at(tmp_path, monkeypatch):
  long = tmp_path / ("a" * 300)
  with pytest.raises(
    UserError, match=r"^init_from: .*a cannot be looked at \(File name too long\); name another path$"
  ):
    initial.base_config(str(long))

  def stat(self, **_):
    raise PermissionError(13, "Permission denied", str(self))

  monkeypatch.setattr(pathlib.Path, "stat", stat)  # root may look everywhere, so the answer is faked
  with pytest.raises(UserError, match=r"^/home/other/model cannot be looked at \(Permission denied\); name another"):
    initial.inspect_source("/home/other/model")


def test_files_that_are_not_ours(tmp_path, paths):
  whole = saved(tmp_path / "model")
  weights = whole / "unet" / "diffusion_pytorch_model.safetensors"
  assert "was not written by --export_format=safetensors" in refusal(weights)
  (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04" * 9)
  assert "is a pickle, which is not opened" in refusal(tmp_path / "model.ckpt")
  broken = tmp_path / "broken.safetensors"
  with open(paths["file"], "rb") as file:
    contents = bytearray(file.read())
  contents[-1] ^= 1
  broken.write_bytes(contents)
  assert "does not hold what was written (SHA-256)" in refusal(broken)
  broken.write_bytes(contents[:-100])
  assert "is no whole safetensors file" in refusal(broken)


def test_flags_win_and_what_does_not_fit_is_listed(paths):
  for kind, name in (("file", "conv_in.kernel is [3, 3, 1, 8]"), ("diffusers", "conv_in.weight is [8, 1, 3, 3]")):
    text = refusal(paths[kind], channels=16)
    assert f"{name}, not [" in text and text.count(", not [") > 30
  assert "down0_block1.conv1.kernel is missing" in refusal(paths["workdir"], num_res_blocks=2)


def test_what_an_unsupported_folder_says(tmp_path):
  folder = saved(tmp_path / "model")
  change_json(folder / "unet" / "config.json", act_fn="gelu")
  with pytest.raises(UserError, match=r"^init_from: .*config\.json: act_fn: 'gelu' is not supported"):
    initial.base_config(str(folder))


# Training from it.


@pytest.fixture
def noise_images(monkeypatch):
  images = np.random.default_rng(0).integers(0, 256, (40, *IMAGE_SHAPE), dtype=np.uint8)
  rows = DecodedRows(images, np.zeros(40, bool))
  fingerprint, labels = {"probe": "0" * 64}, lambda: np.arange(40, dtype=np.int32) % 3
  source = Source("noise", image_shape=IMAGE_SHAPE, length=40, read=rows.take, fingerprint=fingerprint, labels=labels)
  monkeypatch.setattr(train_lib, "open_source", lambda *_: source)


SHORT = dict(
  *(),
  batch_size=16, warmup_steps=0, lr_schedule="constant", num_steps=2, checkpoint_every=2, log_every=1, sample_every=0
)  # fmt: skip


def train(workdir, path, **changes):
  stored = layout.load_config(workdir) if layout.holds_run(workdir) else None
  config = config_lib.override(initial.base_config(str(path), stored), SHORT | {"init_from": str(path)} | changes)
  with StopRequest() as stop:
    train_lib.train(config, workdir, train_lib.Invocation(stop))
  return config


def test_the_first_state_holds_the_weights_twice_and_no_memory():
  run = tiny_run(tiny_config())
  params = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32),
                        run.abstract_state.params)  # fmt: skip
  state, plain = run.initial_state(params), host(run.initial_state())
  for tree in (state.params, state.ema["ema"]):
    for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
      np.testing.assert_array_equal(ours, theirs)
  for ours, theirs in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(plain.opt_state), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert state.step == 0


def test_training_starts_there_and_goes_on_without_it(noise_images, original, paths, tmp_path):
  """Updates that change next to nothing: the weights are still those of PATH. Then PATH is gone."""
  path = tmp_path / "copy"
  shutil.copytree(paths["diffusers"], path)
  config = train(tmp_path / "run", path, learning_rate=1e-9)
  assert layout.load_config(tmp_path / "run").exchange.init_from == str(path)
  assert f"--init_from={path}\n" in (tmp_path / "run" / "flags.txt").read_text()
  expected = load_weights(original.config, original.path)
  for which in ("ema", "raw"):
    found = load_weights(config_lib.override(config, {"sample_weights": which}), tmp_path / "run")
    assert found.step == 2
    for ours, theirs in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-7)
  shutil.rmtree(path)
  train(tmp_path / "run", path, learning_rate=1e-9, num_steps=3)
  assert load_weights(config_lib.override(config, {"num_steps": 3}), tmp_path / "run").step == 3
  shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if the first process had been killed before one
  with pytest.raises(UserError, match=r"init_from: there is no .*copy"):
    train(tmp_path / "run", path, learning_rate=1e-9)


def test_what_does_not_fit_writes_nothing(noise_images, paths, tmp_path):
  for changes in ({"channels": 16}, {"checkpoint": "7"}):
    with pytest.raises(UserError, match=r"^init_from: "):
      train(tmp_path / "run", paths["file"], **changes)
  assert contents(tmp_path) == {} and list(tmp_path.iterdir()) == []


def test_checkpoints_that_disappear_are_no_reason_to_begin_with_random_weights(
  noise_images, paths, tmp_path, monkeypatch
):
  monkeypatch.setattr(layout, "has_checkpoints", lambda *_: True)
  with pytest.raises(RunError, match=r"the checkpoints of .* are gone"):
    train(tmp_path / "run", paths["file"])


def test_what_named_the_first_weights_names_none_of_the_run_itself(noise_images, original, tmp_path, monkeypatch):
  """Neither in the workdir, nor for evaluations meanwhile. The best checkpoint alone is nothing to go on from."""
  measured = []

  class Evaluations(train_lib.Evaluations):
    def __init__(self, run, *parts, **given):
      measured.append(run.config.sample.sample_weights)
      super().__init__(run, *parts, **given)

  monkeypatch.setattr(train_lib, "Evaluations", Evaluations)
  folder, named = tmp_path / "run", {"checkpoint": "3", "sample_weights": "raw", "learning_rate": 1e-9}
  train(folder, original.path, **named)
  expected = load_weights(original.having(checkpoint="3", sample_weights="raw"), original.path)

  def check(step):
    stored = layout.load_config(folder)
    assert (stored.sample.checkpoint, stored.sample.sample_weights) == ("newest", "ema")
    found = load_weights(stored, folder)
    assert found.step == step
    for ours, theirs in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-7)

  check(2)
  train(folder, original.path, num_steps=3, **named)
  check(3)
  assert measured == ["ema", "ema"]
  (folder / "best").mkdir()
  (folder / "checkpoints" / "3").rename(folder / "best" / "3")
  shutil.rmtree(folder / "checkpoints")
  train(folder, original.path, **named)
  check(2)


# Labels.


def test_labels_go_with_their_names(tmp_path, original, capsys):
  """From a workdir, a file and a folder of diffusers; what they lack begins at the mean or at zero, said aloud."""
  trained = make_workdir(tmp_path, ("cats", "dogs", "flags"), **CONDITIONAL)
  layout.keep_classes(trained.path, ["cats", "dogs", "flags"])
  exchange_run.export(trained.having(export_format="safetensors", export_dir=str(tmp_path / "out")), trained.path)
  file = tmp_path / "out" / "model.safetensors"
  weights = load_weights(trained.config, trained.path)
  rows = np.asarray(weights.params["label_embedding"]["embedding"])
  mean, zero = rows[:3].mean(0), np.zeros(32, np.float32)
  exchange_run.export(trained.having(export_dir=str(tmp_path / "folder")), trained.path)
  assert "no pipeline of diffusers draws by class: the README.md has the lines that do" in capsys.readouterr().out
  note = "the labels of --init_from: "
  cases = [  # PATH, classes, label_dropout, the rows, what is said
    (trained.path, ("cats", "dogs", "flags"), 0.3, [*rows], []),
    (file, ("cats", "dogs", "flags"), 0.3, [*rows], []),
    (tmp_path / "folder", ("cats", "dogs", "flags"), 0.3, [*rows], []),
    (file, ("dogs", "flags"), 0.2, rows[[1, 2, 3]], ["cats are left out"]),
    (file, ("birds", "cats", "dogs", "flags"), 0.0, [mean, *rows[:3]], ["birds begin anew, at the mean of the others",
                                                                        "(no class) are left out"]),
    (original.path, ("a", "b"), 0.1, [zero] * 3, ["a, b, (no class) begin anew, at zero"]),
  ]  # fmt: skip
  for path, names, dropout, expected, said in cases:
    settings = {"conditioning": "class", "num_classes": len(names), "label_dropout": dropout}
    params, shape = initial.read_params(begun_with(str(path), **settings), IMAGE_SHAPE, names)
    np.testing.assert_allclose(params["label_embedding"]["embedding"], np.stack(list(expected)), rtol=1e-6)
    assert shape == IMAGE_SHAPE and capsys.readouterr().err.splitlines() == [note + line for line in said]
  for path in (file, tmp_path / "folder"):
    found = initial.find_weights(begun_with(str(path)), None)
    assert found.class_names == ("cats", "dogs", "flags") and found.identity == weights.identity
    assert found.run.null_label == 3
  assert initial.find_weights(begun_with(str(trained.path)), None).class_names == found.class_names
  for path, changes, part in (
    (file, {"num_classes": 4}, "is a model of 3 classes, not 4; leave --num_classes out"),
    (file, {"conditioning": "none", "num_classes": 0, "label_dropout": 0.0}, "is a model of 3 classes; use --cond"),
    (original.path, {"conditioning": "class", "num_classes": 3}, "is unconditional, and draws by class once it is"),
  ):
    assert part in refusal(path, **changes)


def test_a_fine_tuned_model_begins_as_what_it_was(original, noise_images, tmp_path, capsys):
  """An unconditional model that learns classes says of each, at first, what it said of all."""
  config = train(tmp_path / "run", original.path, conditioning="class", label_dropout=0.1, learning_rate=1e-9)
  assert "labels of --init_from: 0, 1, 2, (no class) begin anew, at zero" in capsys.readouterr().err
  mine, theirs = ddpm_jax.load(tmp_path / "run"), ddpm_jax.load(original.path)
  x = np.random.default_rng(0).standard_normal((2, *IMAGE_SHAPE), np.float32)
  for label in (None, 0, [1, 2]):
    np.testing.assert_allclose(mine.eps(x, 50, label), theirs.eps(x, 50), atol=1e-4)
  assert layout.load_config(tmp_path / "run").model.num_classes == 3 and config.model.num_classes == 0


# A workdir for weights of elsewhere.


def test_a_workdir_for_weights_of_elsewhere(paths, tmp_path, original):
  config = begun_with(paths["file"])
  initial.ensure_workdir(config, tmp_path / "run")
  assert layout.load_config(tmp_path / "run") == config
  initial.ensure_workdir(config_lib.override(config, {"num_samples": 7}), tmp_path / "run")
  assert layout.load_config(tmp_path / "run") == config  # how to draw is for each command to say
  other = config_lib.override(config, {"dataset": "mnist"})
  initial.ensure_workdir(other, tmp_path / "run")
  assert layout.load_config(tmp_path / "run") == other
  before = contents(original.path)
  initial.ensure_workdir(original.having(init_from=paths["file"]), original.path)
  assert contents(original.path) == before
