"""A stop in any phase of the command: in time, with one line and the right exit code, and nothing is lost."""

import pathlib
import re
import signal
import time

import numpy as np
import pytest

from tests.command import checkpoints, digests, metrics, run

pytestmark = pytest.mark.slow

PROMPT = (
  30.0  # seconds from the signal to the end of the process, beside other tests, where it waits for no compilation
)
STARTED, TRAINING = "compiling", "compiled and made step"


def stop(heard, number, code=0):
  """Sends the signal and waits for the end. Returns what was printed, and for how long the process still ran."""
  began = time.monotonic()
  heard.process.send_signal(number)
  out, err = heard.finish(code)
  took = time.monotonic() - began
  lines = [line for line in err.splitlines() if line]
  assert len(lines) == 1 and lines[0].startswith(f"{signal.Signals(number).name}: "), err
  assert took < PROMPT, f"{took:.1f} s from the signal to the end\n{out}"
  return out, err


def stop_and_save(heard, number, workdir):
  """Stops a run that has made updates. Returns the number of the training step after which it stopped."""
  out, err = stop(heard, number)
  step = int(re.search(r"stopped on request after step (\d+) of", out)[1])
  assert "saving after the training steps under way" in err
  assert checkpoints(workdir)[-1] == step == metrics(workdir)[-1]["step"], "a stop saves where it is"
  return step


def wait_until_it_hears(heard):
  """Waits until the process has a handler for SIGTERM. Before that it is still Python that starts, and dies of it."""
  status = pathlib.Path(f"/proc/{heard.process.pid}/status")
  mask = re.compile(r"SigCgt:\s*(\w+)")
  heard.wait_until(lambda: int(mask.search(status.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("delay", [0.01, 0.2, 0.8])
def test_a_stop_while_it_starts(folder, launch, delay):
  """The modules that are imported by then turn what is raised inside them into errors of their own."""
  name = f"start{delay}"
  heard = launch(name)
  wait_until_it_hears(heard)
  time.sleep(delay)
  out, err = stop(heard, signal.SIGTERM)
  assert TRAINING not in out and "there was nothing to save" in err
  assert checkpoints(folder / name) == []


def test_a_run_that_is_stopped_in_every_phase_is_never_stopped(folder, whole, launch, complete):
  workdir = folder / "stopped"

  heard = launch("stopped")
  heard.wait_for(STARTED)
  out, err = stop(heard, signal.SIGINT)
  assert TRAINING not in out and "there was nothing to save" in err
  assert checkpoints(workdir) == []

  heard = launch("stopped")
  heard.wait_for("step 10/")
  step = stop_and_save(heard, signal.SIGTERM, workdir)

  heard = launch("stopped")
  heard.wait_for(f"step {step + 10}/")
  step = stop_and_save(heard, signal.SIGINT, workdir)

  heard = launch("stopped", "--checkpoint_every=1")
  heard.wait_for(f"step {step + 2}/")
  heard.wait_until(lambda: list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")))
  saving = stop_and_save(heard, signal.SIGTERM, workdir)
  assert saving <= step + 6, f"{saving - step} training steps, each with a checkpoint: it went on after the signal"

  every = ["--preview_steps=50", "--preview_images=64", "--sample_every=2"]
  heard = launch("stopped", *every)
  grid = saving // 2 * 2 + 4  # the second one: the first waits for a compilation
  heard.wait_for(f"step {grid}/")
  time.sleep(0.1)
  assert not (workdir / "samples" / f"step_{grid:08d}.png").exists(), "the grid is too small to be met"
  step = stop_and_save(heard, signal.SIGTERM, workdir)
  assert step <= grid + 1, f"stopped after step {step}, the signal came after step {grid}"
  assert (workdir / "samples" / f"step_{grid:08d}.png").exists()

  # Not the first signal, but the second ends a run at once.
  heard = launch("stopped", *every)
  heard.wait_for(f"step {step // 2 * 2 + 2}/")
  time.sleep(0.2)
  heard.process.send_signal(signal.SIGTERM)
  heard.wait_for("SIGTERM: saving")
  began = time.monotonic()
  heard.process.send_signal(signal.SIGINT)
  heard.finish(128 + signal.SIGINT)
  assert time.monotonic() - began < 1
  assert checkpoints(workdir)[-1] == step

  complete("stopped")


def test_a_stop_while_it_measures(folder, whole, launch):
  """The checkpoint is there, so it ends at once; the same command measures it."""
  flags = ["--evaluate_every=200", "--measures=bound", "--best_measure=bound", "--bound_timesteps=0"]
  heard = launch("measured", *flags, "--likelihood_examples=0")
  heard.wait_for("bound: bits/dim of 1797 images of digits")
  out, err = stop(heard, signal.SIGTERM)
  assert "stopped; everything was saved before" in err and TRAINING in out
  assert checkpoints(folder / "measured") == [200] and not list((folder / "measured").glob("eval/*.json"))
  out, err = launch("measured", *flags, "--likelihood_examples=10").finish()
  assert err == "" and "resuming" in out
  assert sorted(path.name for path in (folder / "measured" / "eval").iterdir()) == ["200.json", "300.json", "best.json"]
  lines = metrics(folder / "measured")
  assert [line["step"] for line in lines if "evaluation/bits_per_dim_train" in line] == [200, 300]
  plain = [{name: value for name, value in line.items() if not name.startswith("evaluation/")} for line in lines]
  assert plain == metrics(whole) and digests(folder / "measured") == digests(whole)


@pytest.fixture(scope="module")
def drawn(folder, whole):
  """Where the samples are, with an earlier draw of 5 images."""
  run(folder, "whole", "--mode=sample", "--num_samples=5", "--sampling_steps=2")
  return whole / "samples"


@pytest.mark.parametrize("phase", ["restoring", "drawing"])
def test_sampling_that_is_stopped_leaves_earlier_samples_as_they_were(drawn, launch, phase):
  """What it has drawn by then stays under a name of its own, and is not drawn again."""
  before = {path: path.read_bytes() for path in drawn.iterdir()}
  heard = launch("whole", "--mode=sample", "--num_samples=100000")
  if phase == "drawing":
    heard.wait_until(lambda: any(path.stat().st_size for path in drawn.glob(".drawn-*")))
  else:
    wait_until_it_hears(heard)
    time.sleep(1.5)
  stop(heard, signal.SIGTERM, 128 + signal.SIGTERM)
  assert {path: path.read_bytes() for path in drawn.iterdir() if not path.name.startswith(".drawn-")} == before
  for path in drawn.glob(".drawn-*"):
    path.unlink()


def test_sampling_that_is_stopped_while_it_writes_leaves_no_half_file(drawn, launch):
  before, number = set(drawn.iterdir()), 40_000
  several = ["--sampling_steps=1", "--sample_batch_size=4000"]
  heard = launch("whole", "--mode=sample", f"--num_samples={number}", *several)
  heard.wait_for(f"to {number} of {number}, network evaluation 1/1")
  heard.wait_until(lambda: set(drawn.iterdir()) - before)
  heard.process.send_signal(signal.SIGTERM)
  heard.process.wait(60)
  assert heard.process.returncode in (128 + signal.SIGTERM, 0), heard.err
  lengths = []
  for path in sorted(drawn.glob("*.npz")):
    try:
      with np.load(path) as archive:
        lengths.append(len(archive["images"]))
    except ValueError as error:
      raise AssertionError(f"{path} is not whole") from error
  assert sorted(lengths) in ([5], [5, number]), "an earlier draw is gone"
