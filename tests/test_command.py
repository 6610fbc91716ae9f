"""The console command `ddpm`: subcommands are modes and tools, and what it prints names it."""

import os
import subprocess
import sys

import pytest

from ddpm_jax import command
from ddpm_jax.runtime import paths
from tests.report.test_comparison import lines, make
from tests.test_main import REPOSITORY, VERSIONS

SCRIPT = "import sys\nfrom ddpm_jax.command import main\nsys.exit(main())\n"  # as pip writes it


@pytest.fixture
def started(monkeypatch):
  """Calls `_subcommand` with these words; returns the tool, and the words that are left."""

  def call(*words):
    monkeypatch.setattr(sys, "argv", ["ddpm", *words])
    return command._subcommand(), sys.argv[1:]

  return call


def test_subcommands_are_modes_and_tools(started):
  for words, tool, left in (
    ([], "", []),
    (["--workdir=a", "--mode=plan"], "", ["--workdir=a", "--mode=plan"]),
    (["sample", "--workdir=a"], "", ["--mode=sample", "--workdir=a"]),
    (["plan", "--help"], "", ["--mode=plan", "--help"]),
    (["compare", "a", "b"], "ddpm_jax.compare", ["a", "b"]),
    (["prepare", "--dataset=x"], "ddpm_jax.data.prepare", ["--dataset=x"]),
    (["pack", "digits", "zip:x"], "ddpm_jax.data.pack", ["digits", "zip:x"]),
    (["inspect", "digits"], "ddpm_jax.data.inspect", ["digits"]),
  ):
    assert started(*words) == (tool, left)


def test_what_is_no_subcommand_is_one_line(started, monkeypatch, capsys):
  for words, parts in (
    (["smaple"], ["ddpm: 'smaple' is no command (did you mean sample", "train, sample, evaluate"]),
    (["runs/digits"], ["'runs/digits' is no command; use train"]),
    (["sample", "--mode=train"], ["mode: 'ddpm sample' is --mode=sample already"]),
  ):
    monkeypatch.setattr(sys, "argv", ["ddpm", *words])
    assert command.main() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_commands_are_printed_as_the_program_was_started(monkeypatch):
  for program, words in (("main.py", "python -m ddpm_jax.main --mode=sample"), ("/bin/ddpm", "ddpm sample")):
    monkeypatch.setattr(sys, "argv", [program])
    assert paths.command("--mode=sample", "--workdir=a b") == f"{words} '--workdir=a b'"
  assert paths.command("--workdir=a") == "ddpm --workdir=a"
  assert paths.command("--dataset=x", module="ddpm_jax.data.prepare") == "ddpm prepare --dataset=x"


def test_the_installed_command(tmp_path):
  """Through the script that an installation makes, restarted for huge pages where this machine has them on request."""
  (tmp_path / "ddpm").write_text(SCRIPT)
  for name in "ab":
    make(tmp_path / name, lines((10, 20), 1.0))
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  environment.pop("GLIBC_TUNABLES", None)
  commands = {
    "help": ["export", "--help"],
    "version": ["--version"],
    "no run": ["sample", f"--workdir={tmp_path / 'none'}"],
    "compare": ["compare", "a", "b"],
    "compare help": ["compare", "--help"],
  }
  options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, "cwd": tmp_path}
  children = {name: subprocess.Popen([sys.executable, "ddpm", *words], **options) for name, words in commands.items()}
  ended = {name: (*child.communicate(timeout=120), child.returncode) for name, child in children.items()}
  out, err, code = ended["help"]
  assert (err, code) == ("", 0) and out.startswith("Trains a denoising diffusion model")
  assert "\n  ddpm --workdir=runs/digits\n" in out and "--channel_multipliers" in out and "--export_format" in out
  assert ended["version"] == (VERSIONS, "", 0)
  out, err, code = ended["no run"]
  assert (out, code) == ("", 2) and err.count("\n") == 1 and f"by ddpm --workdir={tmp_path / 'none'}\n" in err
  assert ended["compare"] == (f"done: {tmp_path / 'compare.html'}\n", "", 0)
  assert ended["compare help"][0].startswith("usage: ddpm compare ")
