"""A run goes on wherever its folder of images lies and however that is written; other images are refused."""

import json
import shutil

import numpy as np
import pytest
from absl import flags as absl_flags
from PIL import Image

from ddpm_jax import config as config_lib
from ddpm_jax import flags
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.network import network_features
from ddpm_jax.resolve import resolve_config
from ddpm_jax.runs import evaluate as evaluation_run
from ddpm_jax.runs import sample as sampling_run
from ddpm_jax.runs import train as train_lib
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.workdir import layout
from ddpm_jax.workdir.metrics import TIMES
from tests.data import packing
from tests.training.tiny import tiny_config

LITTLE = dict(channels=4, channel_multipliers=(1,), attention_resolutions=(), dropout=0.0)
DRAWN = dict(num_samples=1, sampling_steps=2, bound_timesteps=2)
TINY = [
  f"--{name}={config_lib.flag_text(value)}"
  for name, value in config_lib.values(tiny_config(**LITTLE)).items()
  if name not in ("dataset", "num_steps")
]


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A working directory with the folder `pictures` of 16 images."""
  write_pictures(tmp_path / "pictures")
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_pictures(folder, seed=0):
  folder.mkdir(parents=True)
  for number, pixels in enumerate(np.random.default_rng(seed).integers(0, 256, (16, 8, 8), np.uint8)):
    Image.fromarray(pixels).save(folder / f"{number}.png")


def resolve(mode, folder, *arguments):
  registry = absl_flags.FlagValues()
  flags.define(registry)
  registry(["main", *arguments])
  return resolve_config(mode, flags.given(registry), folder)


def train(folder, dataset, num_steps, *more):
  """The command `train`. Returns the settings that it kept."""
  config = resolve("train", folder, *TINY, f"--dataset={dataset}", f"--num_steps={num_steps}", *more)
  with StopRequest() as stop:
    train_lib.train(config, folder, train_lib.Invocation(stop))
  return layout.load_config(folder)


def as_release_0_1_0(folder, dataset):
  """The workdir as that release kept it: the folder of images as it was written, and its defaults of measuring."""
  kept = {"dataset": dataset, "features": "classifier", "evaluate_samples": 50_000}
  layout.create(folder, config_lib.override(layout.load_config(folder), kept))


def test_a_run_goes_on_however_its_folder_is_written(place, monkeypatch):
  (place / "elsewhere" / "deep").mkdir(parents=True)
  run = place / "run"
  assert train(run, "folder:pictures", 1).data.dataset == f"folder:{place}/pictures"
  as_release_0_1_0(run, "folder:pictures/")
  for number, (working, written, kept) in enumerate(
    [
      (place, "folder:./pictures/", "pictures"),
      (place / "elsewhere", "folder:../pictures", "pictures"),
      (place / "elsewhere" / "deep", "folder:~/moved", "moved"),
    ],
    start=2,
  ):
    monkeypatch.chdir(working)
    monkeypatch.setenv("HOME", str(place))
    if kept == "moved":
      shutil.move(place / "pictures", place / "moved")
    assert train(run, written, number).data.dataset == f"folder:{place}/{kept}", written
  assert (run / "checkpoints" / "4").is_dir()
  assert not (run / "classes.json").exists()  # they have none


def metrics(folder):
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_images_packed(place):
  """In the middle of an epoch, from a folder to a zip, to shards, to a parquet: the numbers are those of the folder."""
  files = packing.pictures(21)
  kinds = {kind: packing.write(kind, place / "data", files) for kind in packing.KINDS}
  train(place / "alone", kinds["folder"], 4)
  for step, (kind, dataset) in enumerate(kinds.items(), start=1):
    assert train(place / "run", dataset, step).data.dataset == dataset, kind
  assert metrics(place / "run") == metrics(place / "alone")
  assert json.loads((place / "run" / "classes.json").read_text()) == ["ape", "bee", "cow"]
  manifests = [json.loads((place / f"{run}/checkpoints/4/manifest/metadata").read_text()) for run in ("run", "alone")]
  assert manifests[0]["data"] == manifests[1]["data"] and len(manifests[0]["data"]["labels"]) == 64
  (place / "data" / "folder" / "ape" / "00.png").unlink()
  with pytest.raises(UserError, match=r"the images of folder:.* have changed since checkpoint 4"):
    train(place / "run", kinds["folder"], 5)
  with pytest.raises(UserError, match=r"^only: .* was trained with '', this command says 'ape'"):
    train(place / "run", kinds["zip"], 5, "--only=ape")


@pytest.mark.slow
def test_drawing_and_measuring_take_the_new_place_and_keep_it(place, monkeypatch, capsys):
  run = place / "run"
  train(run, "folder:pictures", 1)
  as_release_0_1_0(run, "folder:pictures")
  (place / "elsewhere").mkdir()
  monkeypatch.chdir(place / "elsewhere")
  shutil.move(place / "pictures", place / "moved")
  drawn = [f"--{name}={value}" for name, value in DRAWN.items()]
  task = ["--sample_task=interpolate", *drawn]
  with pytest.raises(
    UserError, match=r"'folder:pictures' is not a folder; use folder:PATH .*its new path if it was moved"
  ):
    sampling_run.sample(resolve("sample", run, *task), run)
  sampling_run.sample(resolve("sample", run, *task, "--dataset=folder:../moved"), run)
  kept = layout.load_config(run)
  assert kept.data.dataset == f"folder:{place}/moved"
  assert kept.sample.num_samples != 1  # the place alone
  sampling_run.sample(resolve("sample", run, *task), run)

  as_release_0_1_0(run, "folder:pictures")
  evaluation_run.evaluate(resolve("evaluate", run, *drawn, f"--dataset=folder:{place}/moved"), run)
  assert layout.load_config(run).data.dataset == f"folder:{place}/moved"
  told = capsys.readouterr().out
  assert "evaluating the ema weights after step 1: bound" in told
  assert "left out: frechet, kid, score, precision_recall, density_coverage, neighbours (features: 'classifier'" in told
  assert "  bits_per_dim" in told
  with pytest.raises(UserError, match="features: 'classifier' needs labels"):
    evaluation_run.evaluate(resolve("evaluate", run, *drawn, "--measures=frechet,bound"), run)


def test_other_images_in_another_place_are_refused_and_not_kept(place):
  run = place / "run"
  before = train(run, "folder:pictures", 1)
  write_pictures(place / "others", seed=1)
  changed = "dataset: the images of folder:.*others have changed since checkpoint 1 in .*run: (listing|probe) was"
  with pytest.raises(UserError, match=changed):
    train(run, "folder:others", 2)
  for mode, start in (("sample", sampling_run.sample), ("evaluate", evaluation_run.evaluate)):
    given = ["--sample_task=reconstruct", "--sampler=ddim", "--num_samples=1", "--dataset=folder:others"]
    with pytest.raises(UserError, match=changed):
      start(resolve(mode, run, *given), run)
  with pytest.raises(UserError, match=r"dataset: .* was trained with 'folder:.*pictures'"):
    train(run, "digits", 2)
  assert layout.load_config(run) == before
  assert train(run, "folder:others", 2, "--allow_data_change").data.dataset == f"folder:{place}/others"


@pytest.mark.slow
def test_unlabelled_images_while_training(place, monkeypatch):
  """By the features of a network that needs no labels; part of the folder is held out."""
  monkeypatch.setitem(network_features.__kwdefaults__, "updates", 2)
  every = ["--evaluate_every=1", "--bound_timesteps=2", "--evaluate_samples=6", "--sampling_steps=2"]
  held_out = ["--split=train[:75%]", "--likelihood_splits=train[:75%],train[75%:]"]
  with pytest.raises(UserError, match=r"has none; use --features=network, or inception .*, or --best_measure=bound"):
    train(place / "run", "folder:pictures", 1, *every, "--features=classifier")
  assert not (place / "run").exists()
  train(place / "run", "folder:pictures", 1, *every, *held_out)
  assert (place / "run" / "best" / "1").is_dir()
  result = json.loads((place / "run" / "eval" / "1.json").read_text())
  assert result["features"]["name"] == "network" and result["reference"]["number"] == 12
  assert {"network_distance", "network_kid", "precision", "coverage"} <= set(result["measures"])
  assert not any("score" in name for name in result["measures"])
  assert result["yardsticks"]["noise"]["values"]["network_distance"] > 0
  assert {split: facts["examples"] for split, facts in result["bits_per_dim"].items()} == {
    "train[:75%]": 12,
    "train[75%:]": 4,
  }
  (line,) = (place / "run" / "metrics.jsonl").read_text().splitlines()
  assert json.loads(line)["evaluation/network_distance"] == result["measures"]["network_distance"]
