"""A command starts itself anew, once, where memory comes in huge pages on request."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import pytest

from ddpm_jax.runtime import hugepages

ROOT = pathlib.Path(hugepages.__file__).parents[2]
PROGRAM = """
import os, pathlib, sys
from ddpm_jax.runtime import hugepages
hugepages._MODES = pathlib.Path(sys.argv[1])
print(os.getpid(), flush=True)
hugepages.restart_with_huge_pages("program")
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[2:], sys.stdin.read())
"""


@pytest.fixture
def modes(tmp_path):
  path = tmp_path / "enabled"
  path.write_text("always [madvise] never\n")
  return path


def lines(modes, tunables=None, start=("-m", "program")):
  """What a program prints that is started with the words 'a b' and c, and hears d."""
  environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
  if tunables is not None:
    environment["GLIBC_TUNABLES"] = tunables
  (modes.parent / "program.py").write_text(PROGRAM)
  environment["PYTHONPATH"] = os.pathsep.join([str(modes.parent), str(ROOT)])
  done = subprocess.run(
    [sys.executable, "-W", "error", *start, modes, "a b", "c"],
    env=environment,
    input="d",
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.splitlines()


def test_a_process_that_is_somebody_elses_is_not_replaced(modes):
  """Here one in which `runpy` runs the program; the ways to start it are below."""
  by_runpy = "import runpy; runpy.run_module('program', run_name='__main__')"
  first, *more = lines(modes, start=("-c", by_runpy))
  assert more == [f"{first} None ['a b', 'c'] d"]


@pytest.mark.parametrize(
  ("command", "is_program"),
  [
    ("-m program --flag", True),
    ("-mprogram", True),
    ("-Im program", True),
    ("-X dev -W error -u -m program -m other", True),
    ("-Werror::m -Xm -m program", True),
    ("--check-hash-based-pycs always -m program", True),
    ("", False),
    ("-m pdb -m program", False),
    ("-m tests.other program", False),
    ("-c text -m program", False),
    ("-Ic text -m program", False),
    ("script.py -m program", False),
    ("/bin/coverage run -m program", False),
    ("- -m program", False),
    ("/venv/bin/ddpm sample -m other", True),
    ("-I /venv/bin/ddpm", True),
    ("-c ddpm", False),
    ("/venv/bin/pdb ddpm", False),
  ],
)
def test_which_commands_are_the_program(monkeypatch, command, is_program):
  monkeypatch.setattr(sys, "orig_argv", ["python", *command.split()])
  assert hugepages._is_program("program") == is_program


@pytest.fixture
def glibc(monkeypatch):
  """Of a version that can ask for huge pages, as far as this process is concerned."""
  monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36", raising=False)


def can_ask():
  name, _, version = str(os.confstr("CS_GNU_LIBC_VERSION")).partition(" ")
  return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)


@pytest.mark.parametrize("before", [None, "glibc.malloc.check=0"])
def test_it_starts_anew_once_as_the_same_process_with_the_same_words(modes, before):
  first, *more = lines(modes, before)
  ours = ":".join(f"{name}={value}" for name, value in {"glibc.malloc.hugetlb": 1, **hugepages._kept()}.items())
  tunables = ours if before is None else f"{before}:{ours}"
  if can_ask():
    assert more == [first, f"{first} {tunables} ['a b', 'c'] d"]
  else:
    assert more == [f"{first} {before} ['a b', 'c'] d"]


@pytest.mark.parametrize(
  ("version", "kept"), [("0.10.2", False), ("0.11.2", False), ("0.12.0.1", True), ("1.0", True), (None, False)]
)
def test_freed_memory_stays_where_that_was_seen_to_help(monkeypatch, version, kept):
  def of(name):
    assert name == "jaxlib"
    if version is None:
      raise importlib.metadata.PackageNotFoundError(name)
    return version

  monkeypatch.setattr(importlib.metadata, "version", of)
  assert bool(hugepages._kept()) == kept


@pytest.mark.parametrize("tunables", ["glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=1"])
def test_what_the_user_has_set_stays(modes, tunables):
  first, *more = lines(modes, tunables)
  assert more == [f"{first} {tunables} ['a b', 'c'] d"]


@pytest.mark.parametrize("mode", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_not_where_nobody_or_everybody_gets_them(modes, glibc, monkeypatch, mode):
  monkeypatch.setattr(hugepages, "_MODES", modes)
  assert hugepages._on_request()
  if mode is None:
    modes.unlink()
  else:
    modes.write_text(mode)
  assert not hugepages._on_request()


@pytest.mark.parametrize("answer", ["glibc 2.34", "glibc 1.99", "", None, ValueError()])
def test_not_with_another_library(modes, monkeypatch, answer):
  monkeypatch.setattr(hugepages, "_MODES", modes)

  def confstr(name):
    if isinstance(answer, Exception):
      raise answer
    return answer

  monkeypatch.setattr(os, "confstr", confstr, raising=False)
  assert not hugepages._on_request()
