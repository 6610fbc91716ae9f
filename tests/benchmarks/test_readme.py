"""The commands in benchmarks/README.md, and at the head of each benchmark, can be given."""

import ast
import importlib
import re
import shlex

import pytest

from benchmarks import command
from benchmarks.worker import ROOT

README = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
NAMES = ("train_step", "sample", "input", "loop", "pytorch", "grids", "features")
HEADS = {
  name: ast.get_docstring(ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))) for name in NAMES
}


def commands(text):
  """(benchmark, words) of each command in a text."""
  lines = text.replace("\\\n", " ").splitlines()
  found = [re.match(r" *python -m benchmarks\.(\w+)(.*)", line) for line in lines]
  return [(match[1], shlex.split(match[2])) for match in found if match]


@pytest.mark.parametrize(("name", "words"), [pair for text in (README, *HEADS.values()) for pair in commands(text)])
def test_commands_can_be_given(name, words, monkeypatch):
  monkeypatch.chdir(ROOT)
  module = importlib.import_module(f"benchmarks.{name}")
  assert command.parse(module.make_parser(), words)[1]


def test_each_benchmark_has_commands():
  assert {name for name, _ in commands(README)} == set(NAMES)
  assert all(commands(text)[0][0] == name for name, text in HEADS.items())


def test_lines_are_short_and_name_no_machine():
  assert not [line for line in README.splitlines() if len(line) > 120 and not line.startswith("|")]
  assert not re.findall(r"(?<![\w.])/(?:work|tmp|home|root|Users)\b", README)


def test_every_option_is_explained():
  for name in NAMES:
    parser = importlib.import_module(f"benchmarks.{name}").make_parser()
    options = {text for action in parser._actions for text in action.option_strings if text.startswith("--")}
    assert options - {"--help"} <= set(re.findall(r"--\w+", README)), name
