import json
import os
import pathlib

import pytest

from ddpm_jax import config as config_lib
from ddpm_jax import workdir
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError


def make(**changes) -> Config:
  base = {
    "batch_size": 128,
    "channel_multipliers": (1, 2, 2),
    "dropout": 0.1,
    "lr_schedule": "cosine",
    "num_steps": 4000,
  }
  return config_lib.override(Config(), base | changes)


def tree(folder: pathlib.Path) -> dict[str, bytes | None]:
  return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(folder: pathlib.Path, config: Config) -> str:
  with pytest.raises(UserError) as caught:
    workdir.check(folder, config)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_create_then_check_and_load(tmp_path):
  folder, config = tmp_path / "a" / "b", make(channels=64, attention_resolutions=(8, 4))
  assert not workdir.check(folder, config)
  workdir.create(folder, config)
  assert workdir.check(folder, config)
  assert workdir.load_config(folder) == config


def test_what_create_writes(tmp_path):
  workdir.create(tmp_path, make(channels=64, random_flip=True))
  assert {path.name for path in tmp_path.iterdir()} == {"config.json", "flags.txt", "samples"}
  stored = json.loads((tmp_path / "config.json").read_text())
  assert (stored["model"]["channels"], stored["data"]["random_flip"]) == (64, True)
  lines = (tmp_path / "flags.txt").read_text().splitlines()
  assert {"--channels=64", "--random_flip=true", "--channel_multipliers=1,2,2", "--data_dir=", "# model"} <= set(lines)


def test_check_writes_nothing(tmp_path):
  workdir.check(tmp_path / "new" / "run", Config())
  assert tree(tmp_path) == {}
  workdir.create(tmp_path, make(channels=32))
  before = tree(tmp_path)
  workdir.check(tmp_path, make(channels=32, log_every=1))
  refusal(tmp_path, make(channels=64))
  assert tree(tmp_path) == before


def test_an_empty_folder_will_do(tmp_path):
  assert not workdir.check(tmp_path, Config())


def test_another_config_is_refused_with_both_values_and_the_remedy(tmp_path):
  workdir.create(tmp_path, make(channel_multipliers=(1, 2)))
  text = refusal(tmp_path, make(channel_multipliers=(1, 4)))
  assert text.startswith("channel_multipliers: ")
  for part in ("'1,2'", "'1,4'", f"--flagfile={tmp_path / 'flags.txt'}", "another --workdir"):
    assert part in text


def test_all_differences_are_named(tmp_path):
  workdir.create(tmp_path, make())
  text = refusal(tmp_path, make(batch_size=64, dropout=0.2, seed=1))
  assert text.startswith("batch_size: ")
  assert "2 more: dropout, seed" in text


def test_what_may_change_may_change(tmp_path):
  workdir.create(tmp_path, make(lr_schedule="constant"))
  longer = make(
    lr_schedule="constant", num_steps=9000, log_every=1, parallel="fsdp", data_dir="elsewhere", num_samples=1
  )
  assert workdir.check(tmp_path, longer)
  workdir.create(tmp_path, longer)
  assert workdir.load_config(tmp_path) == longer


def test_cosine_run_cannot_be_prolonged(tmp_path):
  workdir.create(tmp_path, make())
  text = refusal(tmp_path, make(num_steps=9000))
  assert "num_steps" in text
  assert "4000" in text
  assert "9000" in text


def test_a_folder_that_holds_something_else(tmp_path):
  (tmp_path / "photo.png").write_bytes(b"mine")
  assert refusal(tmp_path, Config()) == (
    f"workdir: {tmp_path} is not empty and holds no run of ddpm_jax; use another --workdir"
  )
  assert tree(tmp_path) == {str(tmp_path / "photo.png"): b"mine"}


def test_a_file_is_no_folder(tmp_path):
  (tmp_path / "a").write_text("mine")
  assert refusal(tmp_path / "a", Config()) == f"workdir: {tmp_path / 'a'} is a file; name a folder"


def test_a_path_below_a_file(tmp_path):
  (tmp_path / "a").write_text("mine")
  text = refusal(tmp_path / "a" / "b" / "c", Config())
  assert text == f"workdir: {tmp_path / 'a'} is a file, not a folder; use another --workdir"
  with pytest.raises(UserError, match="cannot write"):
    workdir.create(tmp_path / "a" / "b", Config())


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_without_permission(tmp_path, monkeypatch, exists):
  folder = tmp_path / "run"
  if exists:
    workdir.create(folder, Config())
  locked = folder if exists else tmp_path
  # Root may write everywhere, so the answer is faked.
  monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path) != locked or not mode & os.W_OK)
  assert refusal(folder, Config()) == f"workdir: {locked} cannot be written; use another --workdir"


def test_a_path_that_the_system_refuses(tmp_path):
  folder = tmp_path / ("a" * 300)  # no file system has names that long

  def start():
    workdir.check(folder, Config())
    workdir.create(folder, Config())

  with pytest.raises(UserError, match=r"^workdir: .*--workdir$"):
    start()


def test_a_folder_that_may_not_be_looked_into(tmp_path, monkeypatch):
  def is_file(self):
    raise PermissionError(13, "Permission denied", str(self))

  monkeypatch.setattr(pathlib.Path, "is_file", is_file)
  text = refusal(tmp_path / "home" / "run", Config())
  monkeypatch.undo()
  assert text.startswith("workdir: ")
  assert "Permission denied" in text


def test_a_folder_without_a_run_cannot_be_loaded(tmp_path):
  with pytest.raises(
    UserError, match=f"workdir: {tmp_path} holds no run .*python -m ddpm_jax.main --workdir={tmp_path}"
  ):
    workdir.load_config(tmp_path)


def test_a_config_that_was_cut_short(tmp_path):
  workdir.create(tmp_path, Config())
  text = (tmp_path / "config.json").read_text()
  (tmp_path / "config.json").write_text(text[: len(text) // 2])
  assert "config.json is not" in refusal(tmp_path, Config())


@pytest.mark.parametrize("name", ["config.json", "flags.txt"])
def test_a_kill_inside_create_does_not_spoil_the_folder(tmp_path, monkeypatch, name):
  replace = os.replace

  def killed(source, target):
    if pathlib.Path(target).name == name:
      raise KeyboardInterrupt
    replace(source, target)

  monkeypatch.setattr(os, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    workdir.create(tmp_path, Config())
  monkeypatch.undo()
  workdir.check(tmp_path, Config())
  workdir.create(tmp_path, Config())
  assert {path.name for path in tmp_path.iterdir()} == {"config.json", "flags.txt", "samples"}
