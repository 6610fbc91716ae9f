"""What the tests of whole runs share: one folder, one run that nothing happened to, and no process left behind."""

import shutil

import pytest

from tests.command import Heard, digests, metrics, run, start

STEPS = 300
# Nothing but training; all of it may change on resume, so a test slows a run down by what it adds.
PLAIN = [f"--num_steps={STEPS}", f"--checkpoint_every={STEPS}", "--log_every=1", "--sample_every=0"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  """Where the workdirs are, and the data set."""
  return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def whole(folder):
  """The workdir of an uninterrupted run."""
  _, err = run(folder, "whole", *PLAIN)
  assert err == ""
  return folder / "whole"


@pytest.fixture
def launch(folder):
  """(name of the workdir, flags) -> the command, started and listened to; ended with the test, if it still runs."""
  started = []

  def launch(name, *flags, **options):
    mode = [] if any(flag.startswith("--mode") for flag in flags) else PLAIN
    started.append(Heard(start(folder, name, *mode, *flags, **options)))
    return started[-1]

  yield launch
  for heard in started:
    heard.end()


@pytest.fixture
def complete(folder, whole, launch):
  """(name of the workdir) -> runs it to its end, and compares every bit and every line with the uninterrupted run."""

  def complete(name):
    out, err = launch(name).finish()
    assert f"done: {STEPS} training steps" in out
    assert err == ""
    assert metrics(folder / name) == metrics(whole), "other lines of metrics than the uninterrupted run"
    assert digests(folder / name) == digests(whole), "another state than that of the uninterrupted run"
    return out

  return complete


@pytest.fixture
def copy(folder):
  """(from, to) -> copies a workdir."""

  def copy(source, target):
    shutil.copytree(folder / source, folder / target)
    return folder / target

  return copy
