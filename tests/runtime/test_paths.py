"""Homes that are not there, and commands that can be pasted."""

import os
import pathlib
import pwd
import shlex
import subprocess
import sys

import pytest
from absl import flags as absl_flags

from ddpm_jax import flags
from ddpm_jax.config import Config, DataConfig, override
from ddpm_jax.data import prepared
from ddpm_jax.errors import UserError
from ddpm_jax.runs import workdirs
from ddpm_jax.runtime import compilation, paths

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def no_entry(monkeypatch, tmp_path):
  """A user id without an entry, in a working directory of its own."""

  def unknown(uid):
    raise KeyError(uid)

  monkeypatch.setattr(pwd, "getpwuid", unknown)
  for name in ("XDG_CACHE_HOME", "TFDS_DATA_DIR"):
    monkeypatch.delenv(name, raising=False)
  (tmp_path / "work").mkdir()
  monkeypatch.chdir(tmp_path / "work")


@pytest.mark.parametrize("home", [None, "", "~", "relative"])
def test_without_a_home_nothing_is_called_tilde(no_entry, monkeypatch, home):
  monkeypatch.delenv("HOME", raising=False)
  if home is not None:
    monkeypatch.setenv("HOME", home)
  assert paths.home() is None
  assert compilation.default_folder() is None
  monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
  assert compilation.default_folder() is None
  for text in ("~", "~/runs", "~nobody_of_that_name/runs"):
    with pytest.raises(UserError, match=r"workdir: .* begins with the home of nobody here; write the whole path"):
      paths.absolute("workdir", text, "")
  assert prepared.image_shape(DataConfig(dataset="cifar10")) == (32, 32, 3)
  with pytest.raises(UserError, match=r"data_dir: 'fashion_mnist' .* no home folder; name a folder with --data_dir"):
    prepared.open_prepared(DataConfig(dataset="fashion_mnist"))
  assert list(pathlib.Path.cwd().iterdir()) == []


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch):
  """A relative path is refused in one line; an absolute one needs none."""
  (tmp_path / "gone").mkdir()
  monkeypatch.chdir(tmp_path / "gone")
  (tmp_path / "gone").rmdir()
  with pytest.raises(UserError, match="workdir: 'runs/a' is relative, and the working directory no longer exists"):
    paths.absolute("workdir", "runs/a", "")
  assert paths.absolute("workdir", str(tmp_path / "a"), "") == tmp_path / "a"
  registry = absl_flags.FlagValues()
  flags.define(registry)
  registry(["main", "--dataset=folder:x"])
  with pytest.raises(UserError, match="dataset: 'x' is relative"):
    flags.given(registry)


def test_prepared_data_sets_lie_in_the_home(no_entry, monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert prepared.make_builder(DataConfig(dataset="cifar10")).data_dir_root == tmp_path / "tensorflow_datasets"
  assert paths.expanded("data_dir", "~/data") == str(tmp_path / "data")


def test_printed_commands_can_be_pasted(tmp_path, monkeypatch):
  workdir = tmp_path / "it's a $run; #1"
  assert shlex.split(paths.command(f"--workdir={workdir}")) == ["python", "-m", "ddpm_jax.main", f"--workdir={workdir}"]
  assert paths.command("--workdir=/runs/a-b_1.2") == "python -m ddpm_jax.main --workdir=/runs/a-b_1.2"
  few = override(Config(), {"num_steps": 2})
  farewell = workdirs._farewell(workdir, 1, few)
  quickly = ["--mode=sample", "--sampler=dpmpp", "--sampling_steps=20", f"--workdir={workdir}"]
  assert shlex.split(farewell.splitlines()[-1].removeprefix("  draw images   "))[3:] == quickly
  assert " --sampling_steps=7 " in workdirs._farewell(
    workdir, 1, override(few, {"num_timesteps": 7, "preview_steps": 7})
  )  # more than T is refused
  assert "tensorboard" not in farewell  # it wrote nothing
  (workdir / "tensorboard").mkdir(parents=True)
  for installed in (None, "a specification"):
    monkeypatch.setattr(workdirs.importlib.util, "find_spec", lambda name, found=installed: found)
    board = workdirs._farewell(workdir, 1, few).partition("and tensorboard ")[2]
    assert shlex.split(board.partition("\n")[0]) == ([f"--logdir={workdir}"] if installed else [])
  # Latents are of the images that the first stage was trained on.
  of = {"dataset": "folder:/my pictures", "image_size": 32, "crop": "random", "stage": "autoencoder"}
  line = workdirs._farewell(workdir, 2, override(few, of)).splitlines()[-1]
  assert shlex.split(line.removeprefix("  diffuse       "))[3:] == [
    *(f"--first_stage={workdir}", "--dataset=folder:/my pictures", "--image_size=32", "--crop=random"),
    "--workdir=MODEL",
  ]


def test_a_locale_that_cannot_spell_a_path_is_named():
  code = (
    "import sys, pathlib; from ddpm_jax.runtime import paths; paths.check_name('workdir', pathlib.Path(sys.argv[1]))"
  )
  locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-c", code, "é"]
  done = subprocess.run(command, env=os.environ | locale, capture_output=True, text=True)
  assert "this locale cannot spell the name" in done.stderr and "PYTHONUTF8=1" in done.stderr
