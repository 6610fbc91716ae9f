import subprocess
import sys

import pytest

from benchmarks import command
from benchmarks.worker import ROOT
from ddpm_jax.config import Config
from ddpm_jax.errors import RunError, UserError


def parse(*words):
  parser = command.Parser("x", "y")
  parser.add_comparison()
  return command.parse(parser, words)


def test_without_b_there_is_one_setting_with_the_programs_flags():
  options, settings = parse("--channels=8", "--rounds=3", "--json=")
  assert options.rounds == 3
  assert [setting.name for setting in settings] == ["A"]
  assert settings[0].config.model.channels == 8
  assert str(settings[0]) == "--channels=8"
  assert str(parse()[1][0]) == "the defaults"


def test_b_is_a_with_other_flags():
  _, (a, b) = parse(
    "--channels=8", "--batch_size=16", "--b=--batch_size=32 --dtype=bfloat16", "--b_env=X='1 2' Y=--z=3"
  )
  assert (a.config.data.batch_size, a.config.model.dtype, a.env) == (16, "float32", {})
  assert (b.config.model.channels, b.config.data.batch_size, b.config.model.dtype) == (8, 32, "bfloat16")
  assert b.env == {"X": "1 2", "Y": "--z=3"}
  assert str(b) == "X=1 2 Y=--z=3 --channels=8 --batch_size=16 --batch_size=32 --dtype=bfloat16"


@pytest.mark.parametrize("word", ["--b=", "--b_env=X=1"])
def test_a_setting_can_be_compared_with_itself(word):
  _, (a, b) = parse("--channels=8", word)
  assert a.config == b.config


def test_a_flag_wins_over_a_flagfile_wherever_it_stands():
  file = f"--flagfile={ROOT}/experiments/fashion_mnist.flags"
  for words in (("--channels=8", file), (file, "--channels=8")):
    config = parse(*words)[1][0].config
    assert (config.model.channels, config.data.dataset) == (8, "fashion_mnist")


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--rounds=0"], "argument --rounds: invalid positive whole number value: '0'; --help lists the options"),
    (["--block_seconds=-1"], "argument --block_seconds: invalid positive number value"),
    (["--image_shape=3,3"], "argument --image_shape: invalid H,W,C value: '3,3'"),
    (["--no_such_flag=1"], "Unknown command line flag 'no_such_flag'"),
    (["--channels=many"], "channels"),
    (["--channels=3"], "channels: 3 must be even"),
    (["--b=--no_such_flag"], "Unknown command line flag 'no_such_flag'"),
    (["--b=--channels=5"], "channels: 5 must be even"),
    (["--b='"], 'b: "\'" cannot be split into words'),
    (["--b_env=X"], "b_env: 'X' is no NAME=VALUE"),
    (["--b_env=1=2"], "b_env: '1=2' is no NAME=VALUE"),
    (["digits"], "unexpected argument 'digits'"),
    (["--workdir=x"], "workdir: has no effect on a benchmark"),
    (["--mode=sample"], "mode: has no effect on a benchmark"),
    (["--json=/nowhere/x.json"], "json: the folder of '/nowhere/x.json' does not exist"),
  ],
)
def test_wrong_input(words, message):
  with pytest.raises(UserError) as error:
    parse(*words)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_the_shape_of_the_images():
  def shape(given=None, **changes):
    return command.image_shape(command.config_lib.override(Config(), changes), given)

  assert shape() == (8, 8, 1)
  assert shape(dataset="cifar10") == (32, 32, 3)
  assert shape(dataset="mnist:3.0.1", image_size=32) == (32, 32, 1)
  assert shape(dataset="folder:x", image_size=64) == (64, 64, 3)
  assert shape(dataset="folder:x", image_size="48x64") == (48, 64, 3)
  assert shape((4, 4, 2), dataset="folder:x") == (4, 4, 2)
  with pytest.raises(UserError, match="give --image_shape=H,W,C"):
    shape(dataset="folder:x")


@pytest.mark.parametrize(("error", "code"), [(None, 0), (UserError("u"), 2), (RunError("r"), 1)])
def test_exit_codes(error, code, capsys):
  def main(argv):
    if error:
      raise error

  with pytest.raises(SystemExit) as left:
    command.finish(main)
  assert left.value.code == code
  assert capsys.readouterr().err == (f"error: {error}\n" if error else "")


def test_an_error_is_one_line_and_exit_code_2_for_a_person_too():
  words = [sys.executable, "-m", "benchmarks.train_step", "--rounds=none"]
  left = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
  assert left.returncode == 2
  assert (
    left.stderr == "error: argument --rounds: invalid positive whole number value: 'none'; --help lists the options\n"
  )
  assert left.stdout == ""
