"""The run `export`: whole or not at all, and a card that says what is known and no more."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml
from PIL import Image

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.runs import export as exchange_run
from ddpm_jax.runs import sample as sampling
from ddpm_jax.weights import diffusers, file, initial
from ddpm_jax.weights.load import load_weights
from ddpm_jax.weights.tensors import read_facts
from ddpm_jax.workdir import grids
from tests.config.test_config import OTHER, make
from tests.sampling.conftest import Trained
from tests.weights.folders import contents, read_tensors


@pytest.fixture
def trained(original, tmp_path) -> Trained:
  shutil.copytree(original.path, tmp_path / "run")
  return Trained(tmp_path / "run", original.config)


def export(trained, target: pathlib.Path, **changes) -> None:
  exchange_run.export(trained.having(export_dir=str(target), **changes), trained.path)


def refusal(trained, target, **changes) -> str:
  before = contents(trained.path.parent)
  with pytest.raises(UserError) as caught:
    export(trained, target, **changes)
  assert contents(trained.path.parent) == before
  return str(caught.value)


def test_a_folder_of_diffusers(trained, tmp_path, capsys):
  export(trained, tmp_path / "out")
  assert set(contents(tmp_path / "out")) == {
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
  }
  assert f"done: {tmp_path / 'out'} holds the ema weights after step 5" in capsys.readouterr().out
  assert not (tmp_path / ".out.new").exists()
  params = diffusers.read_params(tmp_path / "out", trained.config.model, (8, 8, 1))
  expected = load_weights(trained.config, trained.path).params
  for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_which_weights(trained, tmp_path):
  """Those of --checkpoint and --sample_weights; the file says which."""
  expected = load_weights(trained.having(checkpoint="3", sample_weights="raw"), trained.path)
  export(trained, tmp_path / "out", export_format="safetensors", checkpoint="3", sample_weights="raw")
  assert set(contents(tmp_path / "out")) == {"model.safetensors"}
  found = safetensors.numpy.load((tmp_path / "out" / "model.safetensors").read_bytes())
  np.testing.assert_array_equal(found["conv_in.kernel"], expected.params["conv_in"]["kernel"])
  facts = read_facts(tmp_path / "out" / "model.safetensors")
  assert (facts["step"], facts["weights"], facts["image_shape"]) == (3, "raw", [8, 8, 1])


def test_exporting_what_was_imported(trained, tmp_path):
  export(trained, tmp_path / "a", export_format="safetensors")
  path = str(tmp_path / "a" / "model.safetensors")
  config = config_lib.override(initial.base_config(path), {"init_from": path, "export_dir": str(tmp_path / "b")})
  exchange_run.export(config, None)
  export(trained, tmp_path / "c")
  found, expected = (
    read_tensors(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("b", "c")
  )
  assert set(found) == set(expected) and all(np.array_equal(found[key], expected[key]) for key in expected)
  card = (tmp_path / "b" / "README.md").read_text()
  assert "Training" not in card and "digits" not in card  # which is not known
  again = config_lib.override(config, {"export_format": "safetensors", "export_dir": str(tmp_path / "d")})
  exchange_run.export(again, None)
  facts = read_facts(tmp_path / "d" / "model.safetensors")
  assert set(facts) == {"ddpm_jax", "config", "image_shape"}
  assert set(facts["config"]) == {"data", "model", "diffusion", "train", "sample"}
  assert set(facts["config"]["data"]) == {"conditioning"}
  assert set(facts["config"]["train"]) == {"preview_steps"}
  assert set(facts["config"]["sample"]) == {"threshold", "threshold_quantile"}
  assert (
    initial.inspect_source(str(tmp_path / "d" / "model.safetensors")).settings == initial.inspect_source(path).settings
  )


def test_a_workdir_where_nothing_was_trained(trained, tmp_path):
  """Its settings say nothing of how the weights were made, so the card does not either."""
  path = str(trained.path)
  config = config_lib.override(initial.base_config(path), {"init_from": path, "dataset": "mnist"})
  initial.ensure_workdir(config, tmp_path / "borrowed")
  exchange_run.export(config_lib.override(config, {"export_dir": str(tmp_path / "out")}), tmp_path / "borrowed")
  card = (tmp_path / "out" / "README.md").read_text()
  assert "Training" not in card and "mnist" not in card and "8x8x1" in card


# Where it goes.


def test_where_something_is_already(trained, tmp_path):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "x").write_text("mine")
  (tmp_path / "file").write_text("mine")
  (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
  for name in ("full", "file", "link"):
    text = refusal(trained, tmp_path / name)
    assert text == f"export_dir: {tmp_path / name} exists and is not an empty folder; name another"
  (tmp_path / "empty").mkdir()
  export(trained, tmp_path / "empty")
  assert len(contents(tmp_path / "empty")) == 5


def test_no_folder(trained, tmp_path):
  with pytest.raises(UserError, match="export_dir: missing"):
    exchange_run.export(trained.config, trained.path)
  with pytest.raises(UserError, match="export_dir: 'gs://bucket/x' is no path"):
    exchange_run.export(trained.having(export_dir="gs://bucket/x"), trained.path)
  with pytest.raises(UserError, match="export_dir: '~nobody_here/x' begins with the home of nobody here"):
    exchange_run.export(trained.having(export_dir="~nobody_here/x"), trained.path)
  for inside in (trained.path / "out", trained.path / "checkpoints" / "9", trained.path):
    assert "is in the workdir, where only the run writes" in refusal(trained, inside)


def test_a_failure_leaves_nothing(trained, tmp_path, monkeypatch):
  def full(*args):
    raise OSError(28, "No space left on device", "x")

  monkeypatch.setattr(exchange_run, "write_whole", full)  # the card, which comes last
  with pytest.raises(RunError, match=r"export_dir: cannot write x \(No space left on device\)"):
    export(trained, tmp_path / "out")
  assert not (tmp_path / "out").exists() and not (tmp_path / ".out.new").exists()
  monkeypatch.undo()
  (tmp_path / ".out.new").mkdir()  # what a kill leaves
  (tmp_path / ".out.new" / "rest").write_text("x")
  export(trained, tmp_path / "out")
  assert "rest" not in contents(tmp_path / "out") and not (tmp_path / ".out.new").exists()


# What is told.


def test_no_folder_of_this_machine_is_told():
  for config in (make(**OTHER), Config()):
    told = file.without_paths(config)
    assert "/data" not in config_lib.to_json(told)
    assert (told.model, told.diffusion, told.optimizer) == (config.model, config.diffusion, config.optimizer)
  assert file.without_paths(make(**OTHER)).data.dataset == "parquet:a b#c,d=e"


def test_the_model_card(trained, tmp_path):
  picture = b"\x89PNG picture"
  (trained.path / "samples").mkdir(exist_ok=True)
  (trained.path / "samples" / "step_00000003.png").write_bytes(b"older")
  (trained.path / "samples" / "step_00000005.png").write_bytes(picture)
  (trained.path / "eval").mkdir()
  result = {
    "step": 5,
    "weights": "ema",
    "samples": {"number": 2000, "sampler": "dpmpp", "evaluations": 20},
    "measures": {"classifier_distance": 12.25, "classifier_kid": 0.5},
    "yardsticks": {
      "data": {"values": {"classifier_distance": 0.5}},
      "noise": {"values": {"classifier_distance": 99.0}},
      "untrained": {"values": {"classifier_distance": 77.5}},
    },
    "bits_per_dim": {"train": {"total": 3.75, "yardsticks": {"noise": 8.0, "untrained": 7.25}}},
  }
  (trained.path / "eval" / "5.json").write_text(json.dumps(result))
  export(trained, tmp_path / "out")
  files = contents(tmp_path / "out")
  assert files["samples.png"] == picture
  text = files["README.md"].decode()
  front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
  assert front["license"] is None and "author" in text  # left to the author, and said so
  assert (front["library_name"], front["pipeline_tag"]) == ("diffusers", "unconditional-image-generation")
  for part in (
    "`folder:data`, split `train`",
    "training steps: 5 of batches of 16 images",
    "| measure | value | the data itself | pure noise | untrained network |",
    "| classifier_distance | 12.25 | 0.5 | 99 | 77.5 |",
    "| bits_per_dim_train | 3.75 |  | 8 | 7.25 |",
    "2,000 samples, dpmpp with 20 steps",
    "| `num_timesteps` | `200` |",
    "after step 5",
    "![Samples](samples.png)",
    "DDPMPipeline.from_pretrained",
  ):
    assert part in text, part
  assert str(tmp_path) not in text and "log_every" not in text
  export(trained, tmp_path / "again", sample_weights="raw")
  files = contents(tmp_path / "again")
  assert files["samples.png"] == picture and b"Not measured." in files["README.md"]


def test_the_card_shows_no_picture_of_other_weights(trained, tmp_path, monkeypatch, capsys):
  """Drawn at 3, trained to 5, exported. Also of other weights of that training step, or of another run's."""
  samples, identity = trained.path / "samples", load_weights(trained.config, trained.path).identity
  ours = {"checkpoint": 5, "sample_weights": "ema", "sampler": "dpmpp", "weights_sha256": identity}

  def exported(name, facts=None, **changes):
    """The picture of an export, after this one was drawn."""
    samples.mkdir(exist_ok=True)
    if facts is not None:
      grids.save_png(samples / "samples.png", np.zeros((8, 8, 3), np.uint8), facts)
    export(trained, tmp_path / name, **changes)
    files = contents(tmp_path / name)
    text, shown = files["README.md"].decode(), files.get("samples.png")
    assert ("samples.png" in text) == (shown is not None)
    assert ("There is no picture here" in text) == ("no picture: nothing is drawn of" in capsys.readouterr().out)
    return shown and ("drawn" if shown == (samples / "samples.png").read_bytes() else shown), text

  others = (
    load_weights(trained.having(**other), trained.path) for other in ({"checkpoint": "3"}, {"sample_weights": "raw"})
  )
  stale = [*(ours | {"weights_sha256": weights.identity} for weights in others), {"checkpoint": 5}, {}]
  for number, facts in enumerate(stale):
    shown, text = exported(f"stale{number}", facts)
    assert shown is None and "`python -m ddpm_jax.main --mode=sample --checkpoint=5 --sample_weights=ema" in text
  (samples / "step_00000003.png").write_bytes(b"of step 3")
  assert exported("another grid")[0] is None
  (samples / "step_00000005.png").write_bytes(b"of step 5")
  shown, text = exported("its grid")
  assert shown == b"of step 5" and "after step 5 of the training" in text
  assert exported("older", checkpoint="3")[0] == b"of step 3"
  shown, text = exported("drawn", ours)
  assert shown == "drawn" and "with these weights by the sampler `dpmpp`" in text


def test_a_drawn_picture_that_is_exported_names_no_folder_of_this_machine(trained, tmp_path):
  sampling.sample(trained.having(sample_png_dir=str(tmp_path / "png")), trained.path)
  export(trained, tmp_path / "out")
  with Image.open(tmp_path / "out" / "samples.png") as image:
    facts = json.loads(image.text["ddpm_jax"])
  assert facts["checkpoint"] == 5 and facts["sampler"] == "ddim"
  assert str(tmp_path).encode() not in (tmp_path / "out" / "samples.png").read_bytes()


def test_text_of_users_is_no_markup(trained, tmp_path):
  config = trained.having(export_dir=str(tmp_path / "out"), split="a|b`c`[x](y)")
  weights = load_weights(trained.config, trained.path)
  text = exchange_run.card(config, weights, trained.path, "")
  assert "| `split` | `a/b'c'[x](y)` |" in text
