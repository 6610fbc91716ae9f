import json
import os
import pathlib
import shutil
import types

import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.workdir import layout


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
    layout.check(folder, config)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_create_then_check_and_load(tmp_path):
  folder, config = tmp_path / "a" / "b", make(channels=64, attention_resolutions=(8, 4))
  assert not layout.check(folder, config)
  layout.create(folder, config)
  assert layout.check(folder, config)
  assert layout.load_config(folder) == config


def test_what_create_writes(tmp_path):
  layout.create(tmp_path, make(channels=64, random_flip=True))
  assert {path.name for path in tmp_path.iterdir()} == {"config.json", "flags.txt", "samples"}
  stored = json.loads((tmp_path / "config.json").read_text())
  assert (stored["model"]["channels"], stored["data"]["random_flip"]) == (64, True)
  lines = (tmp_path / "flags.txt").read_text().splitlines()
  assert {"--channels=64", "--random_flip=true", "--channel_multipliers=1,2,2", "--data_dir=", "# model"} <= set(lines)


def test_check_writes_nothing(tmp_path):
  layout.check(tmp_path / "new" / "run", Config())
  assert tree(tmp_path) == {}
  layout.create(tmp_path, make(channels=32))
  before = tree(tmp_path)
  layout.check(tmp_path, make(channels=32, log_every=1))
  refusal(tmp_path, make(channels=64))
  assert tree(tmp_path) == before


def test_an_empty_folder_will_do(tmp_path):
  assert not layout.check(tmp_path, Config())


def test_another_config_is_refused_with_both_values_and_the_remedy(tmp_path):
  layout.create(tmp_path, make(channel_multipliers=(1, 2)))
  text = refusal(tmp_path, make(channel_multipliers=(1, 4)))
  assert text.startswith("channel_multipliers: ")
  for part in ("'1,2'", "'1,4'", "leave --channel_multipliers out", "another --workdir"):
    assert part in text


def test_all_differences_are_named(tmp_path):
  layout.create(tmp_path, make())
  text = refusal(tmp_path, make(batch_size=64, dropout=0.2, seed=1))
  assert text.startswith("batch_size: ")
  assert "2 more: dropout, seed" in text


def test_what_may_change_may_change(tmp_path):
  layout.create(tmp_path, make())
  longer = make(num_steps=9000, log_every=1, parallel="fsdp", data_dir="elsewhere", num_samples=1)
  assert layout.check(tmp_path, longer)
  layout.create(tmp_path, longer)
  assert layout.load_config(tmp_path) == longer


def test_what_others_put_into_a_folder_is_left_alone(tmp_path):
  """A log, what file systems and desktops leave, the script that starts the run, a link to the data."""
  folder = tmp_path / "run"
  for name in (
    "slurm-12.out",
    "log.txt",
    "nohup.out",
    ".DS_Store",
    "Thumbs.db",
    ".nfs0001",
    "code/main.py",
    "stuck.txt",
  ):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"mine")
  for name in ("lost+found", "tensorboard", "checkpoints", "samples"):  # a launcher may make some that are empty
    (folder / name).mkdir()
  (folder / "data").symlink_to(tmp_path)
  (folder / "code" / "data").symlink_to(tmp_path)
  before = tree(tmp_path)
  assert not layout.check(folder, Config())
  layout.create(folder, Config())
  assert layout.check(folder, Config())
  assert layout.load_config(folder) == Config()
  after = tree(tmp_path)
  assert {name: after[name] for name in before} == before


def test_what_a_run_would_write_over_is_named(tmp_path):
  files = ["flags.txt", "metrics.jsonl", "loss.png", "report.html", "stuck.0.txt"]
  folders = ["checkpoints", "best", "damaged", "earlier", "samples", "eval", "tensorboard"]
  for name in [*files, *(f"{folder}/mine" for folder in folders)]:
    folder = tmp_path / name.replace("/", "_")
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"mine")
    assert refusal(folder, Config()) == (
      f"workdir: {folder} holds no run, but has {name.split('/')[0]}, which a run would overwrite; move it away, or "
      "use another --workdir"
    )
    assert (folder / name).read_bytes() == b"mine"


def test_a_new_workdir_does_not_lie_among_the_images(tmp_path):
  """Its sample grids would be taken for some of them, and the run could not be resumed."""
  pictures = tmp_path / "pictures"
  pictures.mkdir()
  (tmp_path / "link").symlink_to(pictures)
  config = make(dataset=f"folder:{pictures}")
  for folder in (pictures, pictures / "run", tmp_path / "link" / "a" / "b"):
    assert "would become training images; use another --workdir" in refusal(folder, config)
  for folder in (tmp_path, tmp_path / "pictures2", pictures / ".runs" / "a", tmp_path / "link" / ".." / "run"):
    assert not layout.check(folder, config)
  layout.create(pictures / "old", config)  # by a release that did not look: it goes on
  assert layout.check(pictures / "old", config)


def test_a_file_is_no_folder(tmp_path):
  (tmp_path / "a").write_text("mine")
  assert refusal(tmp_path / "a", Config()) == f"workdir: {tmp_path / 'a'} is a file; name a folder"


def test_a_path_below_a_file(tmp_path):
  (tmp_path / "a").write_text("mine")
  text = refusal(tmp_path / "a" / "b" / "c", Config())
  assert text == f"workdir: {tmp_path / 'a'} is a file, not a folder; use another --workdir"
  with pytest.raises(UserError, match="cannot write"):
    layout.create(tmp_path / "a" / "b", Config())


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_without_permission(tmp_path, monkeypatch, exists):
  folder = tmp_path / "run"
  if exists:
    layout.create(folder, Config())
  locked = folder if exists else tmp_path
  # Root may write everywhere, so the answer is faked.
  monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path) != locked or not mode & os.W_OK)
  assert refusal(folder, Config()) == f"workdir: {locked} cannot be written; make it writable, or use another --workdir"


def test_a_path_that_the_system_refuses(tmp_path):
  folder = tmp_path / ("a" * 300)  # no file system has names that long

  def start():
    layout.check(folder, Config())
    layout.create(folder, Config())

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
    layout.load_config(tmp_path)
  layout.create(tmp_path / "digits", Config())
  with pytest.raises(UserError, match=rf"\(no config.json\) \(did you mean {tmp_path}/digits\?\); name"):
    layout.load_config(tmp_path / "digit")


def test_a_config_that_was_cut_short(tmp_path):
  layout.create(tmp_path, Config())
  text = (tmp_path / "config.json").read_text()
  (tmp_path / "config.json").write_text(text[: len(text) // 2])
  assert "config.json is not" in refusal(tmp_path, Config())


@pytest.mark.parametrize("folder", ["checkpoints", "samples", "tensorboard"])
def test_a_folder_inside_without_permission(tmp_path, monkeypatch, folder):
  layout.create(tmp_path, Config())
  (tmp_path / folder).mkdir(exist_ok=True)
  monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path) != tmp_path / folder or not mode & os.W_OK)
  assert (
    refusal(tmp_path, Config())
    == f"workdir: {tmp_path / folder} cannot be written; make it writable, or use another --workdir"
  )


def test_a_file_in_place_of_a_folder(tmp_path):
  layout.create(tmp_path, Config())
  (tmp_path / "checkpoints").write_text("mine")
  assert "checkpoints is a file" in refusal(tmp_path, Config())


# Tried with Orbax 0.12: it fails in the middle of a run, writes elsewhere, or cannot read what it wrote.
@pytest.mark.parametrize("name", ["a\udcff", "back\\slash", "[1]", "*", "?", "two\nlines", "gs:", "\x7f"])
@pytest.mark.parametrize("below", ["", "run"])
def test_names_that_cannot_be_written(tmp_path, name, below):
  folder = tmp_path / name / below
  text = refusal(folder, Config())
  assert text.isprintable()
  assert text.startswith("workdir: ")
  assert text.endswith(("use another --workdir", "does not end in a colon"))
  with pytest.raises(UserError, match=r"^workdir: .*(is not UTF-8|has the character|reads like)"):
    layout.load_config(folder)
  assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["sp ace", "é", "a#b", "50%", "a:b", "~", "'"])
def test_names_that_can_be_written(tmp_path, name):
  assert not layout.check(tmp_path / name, Config())
  layout.create(tmp_path / name, Config())
  assert layout.check(tmp_path / name, Config())


LINKS = ["checkpoints", "checkpoints/5", "checkpoints/5/state/d/a", "samples", "metrics.jsonl", "config.json", "lock"]


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_leads_outside(tmp_path, name, dangling):
  folder, outside = tmp_path / "run", tmp_path / "outside"
  layout.create(folder, Config())
  link = folder / name
  if link.is_dir():
    link.rmdir()
  link.parent.mkdir(parents=True, exist_ok=True)
  if not dangling and name == "config.json":
    shutil.move(link, outside)
  elif not dangling:
    outside.mkdir()
  link.unlink(missing_ok=True)
  link.symlink_to("/".join([".."] * len(pathlib.PurePath(name).parts) + ["outside"]))
  before = tree(tmp_path)
  if name != "config.json" or not dangling:  # without a configuration the folder is refused for that
    expected = f"workdir: {link} is a link that leads outside, to {outside}; remove it, or use another --workdir"
    assert refusal(folder, Config()) == expected
  with pytest.raises(UserError, match=f"{link} is a link"):
    layout.load_config(folder)
  assert tree(tmp_path) == before


def test_a_link_in_a_folder_that_holds_no_run_yet(tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "samples").symlink_to(tmp_path)
  assert "leads outside" in refusal(tmp_path / "run", Config())


def test_a_name_that_begins_alike_is_outside(tmp_path):
  layout.create(tmp_path / "run", Config())
  (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "run2")
  assert "leads outside" in refusal(tmp_path / "run", Config())


def test_links_to_the_workdir_and_within_it_are_followed(tmp_path):
  layout.create(tmp_path / "disk" / "run", Config())
  (tmp_path / "here").symlink_to("disk")
  folder = tmp_path / "here" / "run"
  (folder / "latest").symlink_to("checkpoints/5")
  (folder / "first").symlink_to(tmp_path / "disk" / "run" / "samples")
  (folder / "again").symlink_to(".")
  assert layout.check(folder, Config())
  assert layout.load_config(folder) == Config()


MB = 10**6


def space(monkeypatch, free: int, total: int = 10**12) -> list[pathlib.Path]:
  asked = []

  def disk_usage(path):
    asked.append(path)
    return types.SimpleNamespace(total=total, used=total - free, free=free)

  monkeypatch.setattr(shutil, "disk_usage", disk_usage)
  return asked


@pytest.mark.parametrize(
  ("held", "keep", "saves", "number"),
  [
    (0, 3, None, 4),  # three, and one before the oldest is deleted
    (1, 3, None, 3),
    (3, 3, None, 1),
    (9, 3, None, 1),  # --keep_checkpoints was lowered: the next is still written before the first is deleted
    (0, 3, 2, 2),
    (3, 3, 2, 1),
    (0, 1, None, 2),
    (2, 3, 0, 0),
  ],
)
def test_space_for_checkpoints(tmp_path, monkeypatch, held, keep, saves, number):
  for step in range(held):
    (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
  if held:
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
  space(monkeypatch, free=number * 500 * MB)
  layout.check_space(tmp_path, 500 * MB, keep, saves)
  if not number:
    return
  space(monkeypatch, free=number * 500 * MB - 1)
  with pytest.raises(UserError) as caught:
    layout.check_space(tmp_path, 500 * MB, keep, saves)
  text = str(caught.value)
  assert text.startswith(f"workdir: {tmp_path} has ")
  assert f"{number} more checkpoints of 500.0 MB" in text
  assert f"--keep_checkpoints={keep}" in text
  assert "\n" not in text


def test_space_is_that_of_the_nearest_folder(tmp_path, monkeypatch):
  asked = space(monkeypatch, free=1)
  with pytest.raises(UserError, match=r"has 0\.0 MB .* of 3\.0 GB .*, 12\.0 GB;"):
    layout.check_space(tmp_path / "a" / "b", 3000 * MB, 3)
  assert asked == [tmp_path]


def test_a_file_system_that_does_not_count_is_not_judged(tmp_path, monkeypatch):
  space(monkeypatch, free=0, total=0)
  layout.check_space(tmp_path, 3000 * MB, 3)


def test_space_in_truth(tmp_path):
  layout.check_space(tmp_path, 1, 3)
  with pytest.raises(UserError, match="has "):
    layout.check_space(tmp_path, 2**60, 3)


def test_a_full_disk_leaves_the_configuration_as_it_was(tmp_path, monkeypatch):
  layout.create(tmp_path, Config())
  before = tree(tmp_path)

  def fsync(file):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", fsync)
  with pytest.raises(UserError, match=r"cannot write .*No space left"):
    layout.create(tmp_path, make())
  assert tree(tmp_path) == before


def test_the_place_of_a_folder_of_images_may_change(tmp_path):
  layout.create(tmp_path, make(dataset="folder:pictures"))
  assert layout.check(tmp_path, make(dataset="folder:/elsewhere/pictures"))
  assert "dataset: " in refusal(tmp_path, make(dataset="digits"))
  layout.create(tmp_path / "other", make(dataset="digits"))
  assert "dataset: " in refusal(tmp_path / "other", make(dataset="folder:pictures"))


@pytest.mark.parametrize("left", ["lock", ".config.json.tmp", ".flags.txt.tmp"])
def test_what_a_kill_between_lock_and_create_leaves_is_no_obstacle(tmp_path, left):
  (tmp_path / left).write_text("{")
  assert not layout.check(tmp_path, Config())


@pytest.mark.parametrize("name", ["config.json", "flags.txt"])
def test_a_kill_inside_create_does_not_spoil_the_folder(tmp_path, monkeypatch, name):
  replace = os.replace

  def killed(source, target):
    if pathlib.Path(target).name == name:
      raise KeyboardInterrupt
    replace(source, target)

  monkeypatch.setattr(os, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    layout.create(tmp_path, Config())
  monkeypatch.undo()
  layout.check(tmp_path, Config())
  layout.create(tmp_path, Config())
  assert {path.name for path in tmp_path.iterdir()} == {"config.json", "flags.txt", "samples"}


def test_where_nothing_was_trained_the_model_alone_is_settled(tmp_path):
  """Weights of elsewhere, drawn with and measured: what comes next may be trained and measured as it likes."""
  layout.create(tmp_path, make(init_from="/model"))
  (tmp_path / "eval").mkdir()
  free = {"dataset": "mnist", "learning_rate": 1e-5, "seed": 1, "num_steps": 9000}
  assert layout.check(tmp_path, make(init_from="/model", **free))
  for changes in ({"channels": 64}, {"prediction": "v"}, {"init_from": "/other"}):
    text = refusal(tmp_path, make(**({"init_from": "/model"} | changes)))
    assert text.startswith(f"{next(iter(changes))}: {tmp_path} was made with ")
  (tmp_path / "metrics.jsonl").touch()  # a training has begun
  assert "was trained with" in refusal(tmp_path, make(init_from="/model", **free))
  (tmp_path / "metrics.jsonl").unlink()
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  assert "was trained with" in refusal(tmp_path, make(init_from="/model", **free))


def test_which_checkpoints_there_are(tmp_path):
  assert not layout.has_checkpoints(tmp_path)
  (tmp_path / "best" / "2").mkdir(parents=True)
  (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
  assert layout.has_checkpoints(tmp_path) and not layout.has_checkpoints(tmp_path, ["checkpoints"])
