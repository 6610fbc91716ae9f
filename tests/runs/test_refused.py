"""What a refused command says is true, and its remedy works."""

import dataclasses
import errno
import json
import shutil

import numpy as np
import pytest

from ddpm_jax.checkpoint import resume
from ddpm_jax.data.sources import from_array, open_source
from ddpm_jax.devices import make_mesh
from ddpm_jax.errors import UserError
from ddpm_jax.resolve import Command, with_named_preset
from ddpm_jax.runs import evaluate as evaluate_lib
from ddpm_jax.runs import train as train_lib
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.workdir import layout
from ddpm_jax.workdir.storage import remedy
from tests.training.tiny import tiny_config

CONFIG = tiny_config(channels=4, channel_multipliers=(1,), attention_resolutions=(), dropout=0.0, num_steps=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp("refused") / "run"
  with StopRequest() as stop:
    train_lib.train(CONFIG, folder, train_lib.Invocation(stop))
  return folder


@pytest.fixture
def run(trained, tmp_path):
  return shutil.copytree(trained, tmp_path / "run")


def refusal(function, *arguments, **options):
  with pytest.raises(UserError) as caught:
    function(*arguments, **options)
  return str(caught.value)


def test_an_edited_config_is_told_from_another_command(run):
  """The command that names what the checkpoint was trained with is right, and config.json is not."""
  path, rate = run / "config.json", CONFIG.optimizer.learning_rate
  text = path.read_text()
  path.write_text(text.replace(f'"learning_rate": {rate}', '"learning_rate": 0.5'))
  assert refusal(layout.check, run, CONFIG) == (
    f"learning_rate: config.json of {run} says '0.5', its checkpoint 2 '{rate}'; restore config.json"
  )
  path.write_text(text)
  assert layout.check(run, CONFIG)
  other = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=0.5))
  assert "was trained with" in refusal(layout.check, run, other)


def test_a_config_that_is_gone_is_in_each_checkpoint(run):
  (run / "config.json").unlink()
  said = refusal(layout.check, run, CONFIG)
  assert said.startswith(f"workdir: config.json of {run} is missing; checkpoints/2/manifest/metadata has its text")
  facts = json.loads((run / "checkpoints" / "2" / "manifest" / "metadata").read_text())
  (run / "config.json").write_text(json.dumps(facts["config"]))
  assert layout.check(run, CONFIG)


def test_images_of_another_size_are_named_before_what_the_network_says_of_them(run):
  resume.check_size(open_source(CONFIG.data), run)
  larger = from_array(np.zeros((40, 16, 16, 1), np.uint8))
  said = f"dataset: the images of array are 16x16x1, those of checkpoint 2 in {run} were 8x8x1; restore them"
  assert refusal(resume.check_size, larger, run).startswith(said)
  with StopRequest() as stop:
    own = train_lib.Own(source=larger)
    assert refusal(train_lib.train, CONFIG, run, train_lib.Invocation(stop, own=own)).startswith(said)


def test_changed_images_are_measured_with_a_warning(run, capsys):
  evaluate_lib._warn_of_changed_images(open_source(CONFIG.data), run)
  assert not capsys.readouterr().err
  evaluate_lib._warn_of_changed_images(from_array(np.zeros((40, 8, 8, 1), np.uint8)), run)
  (line,) = capsys.readouterr().err.splitlines()
  assert "have changed since checkpoint 2" in line and line.endswith("they are compared with as they are now")


def test_a_batch_size_that_is_kept_is_not_what_may_be_changed():
  mesh = make_mesh("pmap")
  assert refusal(mesh.check_batch, 12).endswith("use --batch_size=8 or 16")
  assert refusal(mesh.check_batch, 12, fixed=True) == (
    "batch_size: 12, which this run keeps, cannot be divided among 8 devices; use 3 or 4 or 6 of them, or more that "
    "divide it"
  )


def test_a_batch_size_that_no_number_of_devices_divides_names_one_that_may():
  assert "use --batch_size=" in refusal(make_mesh("pmap").check_batch, 8, 3, fixed=True)


def test_what_a_preset_says_is_not_laid_to_the_command():
  error = UserError("batch_size: runs/a was trained with '8', this command says '64'; leave --batch_size out")
  for given, preset, named in (
    ({"batch_size": 64}, "digits", True),
    ({"batch_size": 32}, "digits", False),
    ({"batch_size": 64}, "none", False),
    ({"batch_size": 64}, None, False),
  ):
    said = str(with_named_preset(error, Command("train", given, preset, None)))
    assert said == f"{error}{' (--preset=digits says so: leave that out)' * named}"


def test_only_a_full_disk_needs_room():
  assert remedy(OSError(errno.ENOSPC, "full")) == "make room" != remedy(OSError(errno.EROFS, "read-only"))
