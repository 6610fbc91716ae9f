"""What is secret stays so, and nothing that lies in a workdir is executed or leads out of it."""

import pathlib
import pickle

import pytest

from tests.command import checkpoints
from tests.faults.conftest import STEPS

pytestmark = pytest.mark.slow

CANARY = "canary5eb1d3"
ENVIRONMENT = {
  "AWS_SECRET_ACCESS_KEY": CANARY,
  "WANDB_API_KEY": CANARY,
  "HF_TOKEN": CANARY,
  "HTTP_PROXY": f"http://user:{CANARY}@127.0.0.1:9",
  "HTTPS_PROXY": f"http://user:{CANARY}@127.0.0.1:9",
  "USER": CANARY,
  "LOGNAME": CANARY,
}


def test_no_variable_of_the_environment_is_written_or_told(folder, launch, tmp_path):
  home = tmp_path / CANARY
  home.mkdir()
  workdir, environment = folder / "secrets", ENVIRONMENT | {"HOME": str(home)}
  told = launch("secrets", "--num_steps=4", "--sample_every=2", "--checkpoint_every=2", **environment).finish()
  # Stuck: the stacks of all threads. Refused. A checkpoint that cannot be read.
  slow = ["--preview_steps=50", "--preview_images=512", "--sample_every=6", "--step_timeout=1"]
  told += launch("secrets", "--num_steps=8", *slow, **environment).finish(1)
  assert (workdir / "stuck.0.txt").exists()
  told += launch("secrets", "--seed=1", **environment).finish(2)
  (workdir / "checkpoints" / str(checkpoints(workdir)[-1]) / "state" / "manifest.ocdbt").write_bytes(b"no")
  told += launch("secrets", "--mode=sample", "--on_corrupt=fail", **environment).finish(2)
  told += launch("secrets", "--mode=sample", "--num_samples=4", "--sampling_steps=2", **environment).finish()
  assert "damaged" in told[-1] and "innermost call first" in told[3], "nothing went wrong, so this shows nothing"

  assert CANARY not in "".join(told)
  files = [path for root in (workdir, folder / "tfds") for path in root.rglob("*") if path.is_file()]
  assert len(files) > 20
  assert [str(path) for path in files if CANARY.encode() in path.read_bytes() or CANARY in path.name] == []


class Payload:
  """Makes a file when it is unpickled."""

  def __init__(self, marker):
    self._marker = marker

  def __reduce__(self):
    return pathlib.Path.touch, (self._marker,)


@pytest.fixture
def payload(tmp_path):
  """(what unpickling would make, the pickle)"""
  marker = tmp_path / "executed"
  data = pickle.dumps(Payload(marker))
  pickle.loads(data)
  assert marker.exists()
  marker.unlink()
  return marker, data


def test_a_pickle_among_the_checkpoints_is_never_executed(folder, launch, payload):
  """In the place of each file that is read, in one checkpoint after the other, and beside them."""
  marker, data = payload
  read = [
    "manifest/metadata",
    "state/manifest.ocdbt",
    "state/_METADATA",
    "state/d/*",
  ]
  older_format, newest = "state/checkpoint", len(read) + 2
  launch("pickled", f"--num_steps={newest}", "--checkpoint_every=1").finish()
  workdir = folder / "pickled"
  for number, pattern in enumerate(read, 3):
    paths = list((workdir / "checkpoints" / str(number)).glob(pattern))
    assert paths, pattern
    for path in paths:
      path.write_bytes(data)
  (workdir / "checkpoints" / "2" / older_format).write_bytes(data)
  intact = workdir / "checkpoints" / "1"
  for name in ("checkpoint.pkl", "data.pkl", "treedef.pickle", "aux_data", "_sharding", "_CHECKPOINT_METADATA"):
    for place in (workdir, workdir / "checkpoints", intact, intact / "state", intact / "manifest"):
      (place / name).write_bytes(data)
  out, err = launch("pickled", "--mode=sample", "--num_samples=4", "--sampling_steps=2").finish()
  assert "after step 1:" in out
  assert len(err.splitlines()) == newest - 1 == err.count("is damaged: "), err
  out, err = launch("pickled", f"--num_steps={newest}").finish()
  assert f"after step 1 of {newest}" in out
  assert len(err.splitlines()) == newest - 1 == err.count("is damaged: "), err
  assert not marker.exists(), "a pickle was executed"


def test_a_link_that_leads_out_of_the_workdir_is_refused(folder, whole, launch, copy, tmp_path):
  workdir = copy("whole", "linked")
  for path in (workdir / "samples").iterdir():
    path.unlink()
  (workdir / "samples").rmdir()
  (workdir / "samples").symlink_to(tmp_path)
  for flags in (["--mode=sample"], [f"--num_steps={STEPS + 1}", "--sample_every=1"]):
    out, err = launch("linked", *flags).finish(2)
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and "leads outside" in err, err
  assert list(tmp_path.iterdir()) == []
