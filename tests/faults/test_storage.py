"""Storage that fails under a run: a disk that fills up, a second trainer, a workdir that is deleted."""

import re
import resource
import shutil
import signal

import pytest

from tests.command import checkpoints, digests, metrics
from tests.faults.conftest import STEPS

pytestmark = pytest.mark.slow

# A cache that is cut short by the limit would be everybody's: such a process only reads it.
READ_ONLY = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000000"}


def limit(heard, size):
  """From now on the process can write no file beyond a size: the kernel says EFBIG, as ENOSPC on a full disk."""
  resource.prlimit(heard.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def only(text, *beginnings):
  """Whether there is nothing else on stderr: no traceback, nothing of a library's."""
  strange = [line for line in text.splitlines() if not line.startswith(beginnings)]
  assert not strange, "\n".join(strange)


def test_a_disk_that_is_full_for_a_while_costs_nothing(folder, whole, launch):
  workdir = folder / "full"
  heard = launch("full", "--checkpoint_every=20", "--max_unsaved_steps=280", "--sample_every=20", **READ_ONLY)
  heard.wait_until(lambda: checkpoints(workdir)[-1:] >= [20])
  newest = checkpoints(workdir)[-1]
  limit(heard, 1)
  heard.wait_until(lambda: heard.err.count("; the run goes on and tries again") >= 2)
  assert checkpoints(workdir)[-1] <= newest + 20  # one may have been finished just before
  limit(heard, resource.RLIM_INFINITY)
  out, err = heard.finish()
  assert "done: 300 training steps" in out
  only(err, "warning: ")
  assert "cannot write" in err and err.count("File too large") == len(err.splitlines())
  for line in err.splitlines():
    assert re.search(r"(checkpoint|step) \d+", line), f"what is it that could not be written? {line}"
  assert checkpoints(workdir)[-1] == 300
  assert metrics(workdir) == metrics(whole)
  assert digests(workdir) == digests(whole)


def test_a_disk_that_stays_full_ends_the_run_before_more_is_lost_than_may_be(folder, whole, launch, complete):
  workdir, at_risk = folder / "fuller", 30
  heard = launch("fuller", "--checkpoint_every=10", f"--max_unsaved_steps={at_risk}", **READ_ONLY)
  heard.wait_until(lambda: checkpoints(workdir)[-1:] >= [20])
  limit(heard, 60_000)  # the metrics have room, the arrays have not
  _, err = heard.finish(1)
  only(err, "warning: ", "error: ")
  assert err.count("error: ") == 1 and err.splitlines()[-1].startswith("error: ") and "--max_unsaved_steps" in err
  newest = checkpoints(workdir)[-1]
  assert newest < metrics(workdir)[-1]["step"] <= newest + at_risk
  assert f"after step {newest} of" in complete("fuller"), "an earlier checkpoint is lost, or damaged"


def test_a_stop_on_a_full_disk_says_what_is_lost(folder, whole, launch, copy):
  workdir = copy("whole", "end")
  heard = launch("end", f"--num_steps={STEPS + 300}", "--checkpoint_every=1000", **READ_ONLY)
  heard.wait_for(f"step {STEPS + 10}/")
  limit(heard, 60_000)
  heard.process.send_signal(signal.SIGTERM)
  _, err = heard.finish(1)
  only(err.strip(), "SIGTERM: ", "warning: ", "error: ")
  assert err.count("error: ") == 1 and f"the newest is {STEPS};" in err.splitlines()[-1], err
  assert "the run goes on" not in err, err
  assert checkpoints(workdir)[-1] == STEPS


def test_a_loss_curve_that_cannot_be_written_is_no_failure(folder, whole, launch, copy):
  """Everything that must be kept is on disk by then."""
  workdir = copy("whole", "curve")
  (workdir / "loss.png").unlink()
  (workdir / "loss.png").mkdir()
  out, err = launch("curve", f"--num_steps={STEPS + 1}").finish()
  assert f"done: {STEPS + 1} training steps" in out and checkpoints(workdir)[-1] == STEPS + 1
  only(err, "warning: ")


def test_samples_that_cannot_be_written(folder, whole, launch, copy):
  workdir = copy("whole", "samples")
  before = set((workdir / "samples").iterdir())
  heard = launch("samples", "--mode=sample", "--num_samples=100000", "--sampling_steps=5", **READ_ONLY)
  drawn = lambda: list((workdir / "samples").glob(".drawn-*"))  # noqa: E731
  heard.wait_until(lambda: any(path.stat().st_size for path in drawn()))
  limit(heard, 1000)
  _, err = heard.finish(1)
  only(err, "error: ")
  assert err.count("\n") == 1 and "File too large" in err, err
  assert set((workdir / "samples").iterdir()) == before | set(drawn()), "half a file is left"
  assert all(path.stat().st_size % 64 == 0 for path in drawn()), "half an image is left"


def test_a_second_trainer_is_refused_and_the_first_does_not_notice(folder, whole, launch, complete):
  workdir = folder / "shared"
  first = launch("shared", "--checkpoint_every=1")
  first.wait_for("step 2/")
  second = launch("shared", "--checkpoint_every=1")
  out, err = second.finish(2)
  assert out == "" and err.startswith("error: workdir: ") and err.count("\n") == 1
  assert f"process {first.process.pid} on host" in err
  before = checkpoints(workdir)[-1]
  first.wait_until(lambda: checkpoints(workdir)[-1] > before)
  first.process.kill()
  first.finish(-9)
  assert first.err == ""
  complete("shared")


@pytest.mark.parametrize("saving", [False, True], ids=["between two saves", "in the middle of a save"])
def test_a_workdir_that_is_deleted_is_not_made_anew(folder, launch, saving):
  workdir = folder / f"deleted{saving}"
  heard = launch(workdir.name, "--checkpoint_every=50", "--sample_every=7")
  heard.wait_until(lambda: checkpoints(workdir) == [50])
  if saving:
    heard.wait_until(lambda: list((workdir / "checkpoints").glob("*tmp")))
  while workdir.exists():
    shutil.rmtree(workdir, ignore_errors=True)  # it is being written into
  _, err = heard.finish(1)
  only(err, "warning: ", "error: ")
  assert err.splitlines()[-1].startswith("error: ") and err.count("error: ") == 1, err
  # Orbax makes the folder of a save that is under way anew; without its configuration it passes for no run.
  left = [path.name for path in workdir.iterdir()] if workdir.exists() else []
  assert left == (["checkpoints"] if saving and left else []), left
  assert f"error: workdir: {workdir} has vanished" in err


def test_too_little_space_is_said_at_the_start(folder, launch, tmp_path):
  """Python imports `sitecustomize` when it starts, from wherever it finds it first."""
  (tmp_path / "sitecustomize.py").write_text(
    "import collections, shutil\n"
    "shutil.disk_usage = lambda path: collections.namedtuple('U', 'total used free')(10**9, 10**9 - 10**5, 10**5)\n"
  )
  out, err = launch("little", "--keep_checkpoints=3", PYTHONPATH=str(tmp_path)).finish(2)
  assert out == "" and err.startswith("error: workdir: ") and err.count("\n") == 1 and "0.1 MB" in err, err
  assert not (folder / "little").exists()
