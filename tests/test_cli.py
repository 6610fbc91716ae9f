"""The command as a person runs it: one process and two, killed and resumed, then sampling."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from tests import command
from tests.command import STEPS, TIME, checkpoints, digests, finish, metrics, start, start_job, wait_for, wait_for_line


@pytest.fixture(scope="module", autouse=True)
def compiled_as_for_a_person():
  """With the flags of XLA that the program sets, and no others."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(command, "XLA_FLAGS", "")
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("cli")


def losses(workdir):
  return np.array([[row["loss"], row["grad_norm"]] for row in metrics(workdir)])


def drawn(workdir):
  """The samples, which stand for the EMA weights of the newest checkpoint."""
  with np.load(workdir / "samples" / "samples.npz") as archive:
    return archive["images"]


def sample(folder, name, *flags, **options):
  return finish(start(folder, name, "--mode=sample", *flags, **options))


@pytest.fixture(scope="module")
def uninterrupted(folder):
  process = start(folder, "whole")
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0 and len(TIME.findall(out)) == len(out.splitlines()), "every line has a time"
  assert f"done: {STEPS} training steps" in out and str(folder / "whole" / "metrics.jsonl") in out
  assert "1797 images 8x8x1 of digits" in out and "compiled" in out
  assert "data: 8x8, grey" in out and "  classes: 10: 0 178, 1 182, " in out
  assert err == ""
  sample(folder, "whole", "--num_samples=5", "--sampling_steps=10")
  return folder / "whole"


def test_a_run_leaves_what_it_says(uninterrupted):
  assert [row["step"] for row in metrics(uninterrupted)] == list(range(2, STEPS + 1, 2))
  assert checkpoints(uninterrupted) == [6, 12, 18, 24]
  names = {path.name for path in (uninterrupted / "samples").iterdir()}  # a slow machine draws early grids too
  assert names >= {"samples.npz", "samples.png", "step_00000012.png", "step_00000024.png"}
  images = drawn(uninterrupted)
  assert images.dtype == np.uint8 and images.shape == (5, 8, 8, 1)
  assert len(np.unique(images.reshape(5, -1), axis=0)) == 5
  with Image.open(uninterrupted / "samples" / "samples.png") as grid:
    assert grid.size[0] > 100


@pytest.mark.slow
def test_terminated_killed_and_resumed_is_uninterrupted(folder, uninterrupted):
  workdir = folder / "broken"
  process = start(folder, "broken")
  wait_for(lambda: (workdir / "metrics.jsonl").exists() and (workdir / "metrics.jsonl").read_text(), process)
  process.send_signal(signal.SIGTERM)
  out, _ = finish(process)
  assert "stopped on request after step" in out or "done" in out

  process = start(folder, "broken")
  wait_for(lambda: (workdir / "checkpoints" / "18").exists(), process)
  process.kill()
  process.communicate()
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"step": 19, "lo')  # as a kill in the middle of a line would leave it

  out, _ = finish(start(folder, "broken"))
  assert "resuming" in out or "nothing to do" in out
  assert metrics(workdir) == metrics(uninterrupted)
  assert digests(workdir) == digests(uninterrupted)
  sample(folder, "broken", "--num_samples=5", "--sampling_steps=10")
  np.testing.assert_array_equal(drawn(workdir), drawn(uninterrupted))

  out, _ = finish(start(folder, "broken"))
  assert "already holds all 24 steps: nothing to do" in out
  assert len(metrics(workdir)) == STEPS // 2


@pytest.mark.slow
def test_samples_depend_on_their_index_alone(folder, uninterrupted):
  before = drawn(uninterrupted)
  sample(folder, "whole", "--num_samples=7", "--sampling_steps=10", "--sample_batch_size=3", devices=1)
  assert np.abs(drawn(uninterrupted)[:5].astype(int) - before).max() <= 1  # rounding to uint8
  sample(folder, "whole", "--num_samples=5", "--sampling_steps=10", "--sample_seed=1")
  assert np.abs(drawn(uninterrupted).astype(int) - before).mean() > 5
  # Nothing was overwritten.
  with np.load(uninterrupted / "samples" / "samples.1.npz") as first:
    np.testing.assert_array_equal(first["images"], before)
    assert json.loads(str(first["settings"]))["checkpoint"] == STEPS
  assert (uninterrupted / "samples" / "samples.2.npz").exists()


@pytest.mark.slow
def test_the_next_start_compiles_nothing(folder, uninterrupted):
  """Without a word from the user, programs are kept in the home directory; the numbers are the same with them."""
  home = {"XDG_CACHE_HOME": str(folder / "home"), "JAX_COMPILATION_CACHE_DIR": ""}
  finish(start(folder, "first", "--num_steps=2", **home))
  kept = {path: path.stat().st_mtime_ns for path in (folder / "home" / "ddpm_jax").glob("*/*")}
  assert kept
  _, err = finish(start(folder, "second", "--num_steps=2", **home))
  assert err == ""
  assert {path: path.stat().st_mtime_ns for path in (folder / "home" / "ddpm_jax").glob("*/*")} == kept
  np.testing.assert_array_equal(losses(folder / "second"), losses(folder / "first"))
  np.testing.assert_array_equal(losses(folder / "first"), losses(folder / "whole")[:1])


@pytest.mark.slow
def test_two_processes_are_one(folder, uninterrupted):
  """Half of the run with pmap, half with fsdp; then one process samples what two have trained."""
  for flags in (["--parallel=pmap", "--num_steps=12"], ["--parallel=fsdp"]):
    (out, _), (quiet, _) = (finish(process) for process in start_job(folder, "pair", *flags))
    assert "2 processes, this is 0" in out
    assert "step" not in quiet
  assert [row["step"] for row in metrics(folder / "pair")] == [row["step"] for row in metrics(uninterrupted)]
  np.testing.assert_allclose(losses(folder / "pair"), losses(uninterrupted), rtol=1e-4)
  sample(folder, "pair", "--num_samples=5", "--sampling_steps=10")
  with np.load(uninterrupted / "samples" / "samples.1.npz") as first:
    assert np.abs(drawn(folder / "pair").astype(int) - first["images"]).mean() < 0.5
  alone = drawn(folder / "pair")
  job = start_job(folder, "pair", "--mode=sample", "--num_samples=5", "--sampling_steps=10")
  (out, _), (quiet, _) = (finish(process) for process in job)
  assert "5 images at once" in out  # both know how much memory there is
  assert "image" not in quiet
  assert np.abs(drawn(folder / "pair").astype(int) - alone).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(folder, number):
  workdir = folder / f"stopped{number}"
  code = {signal.SIGTERM: 75, signal.SIGINT: 0}[number]
  processes = start_job(folder, workdir.name, "--num_steps=5000", "--sample_every=0", f"--stop_exit_code={code}")
  lines = workdir / "metrics.jsonl"
  wait_for(lambda: lines.exists() and lines.read_text(), processes[0])
  processes[1].send_signal(number)
  for process in processes:
    assert "is lost" not in finish(process, code)[1]
  newest = checkpoints(workdir)[-1]
  assert 0 < newest < 5000
  assert newest - 2 < metrics(workdir)[-1]["step"] <= newest


@pytest.mark.slow
def test_an_evaluation_killed_and_made_again(folder, uninterrupted):
  """All of it, from the classifier on: what is drawn is not drawn again, and what was measured is in the report."""
  shutil.copytree(uninterrupted, folder / "measured")
  workdir = folder / "measured"
  options = ["--measures=bound,frechet,kid,neighbours", "--evaluate_samples=400", "--sample_batch_size=16"]
  options += ["--sampler=dpmpp", "--sampling_steps=10", "--likelihood_examples=21", "--bound_timesteps=5"]
  process = start(folder, "measured", "--mode=evaluate", *options)
  wait_for(lambda: any(path.stat().st_size >= 32 * 64 for path in (workdir / "samples").glob(".drawn-*")), process)
  process.kill()
  process.communicate()
  assert not list((workdir / "eval").glob("*.json"))
  out, err = finish(start(folder, "measured", "--mode=evaluate", *options))
  assert err == ""
  before_the_kill = [int(number) for number in re.findall(r"^(\d+) of them were drawn before", out, re.M)]
  assert len(before_the_kill) == 1 and 32 <= before_the_kill[0] < 400
  assert "training a classifier" not in out and "computing the features" not in out, "both are in the cache"
  result = json.loads((workdir / "eval" / f"{STEPS}.json").read_text())
  assert (result["step"], result["weights"], result["samples"]["number"]) == (STEPS, "ema", 400)
  assert (result["samples"]["sampler"], result["samples"]["evaluations"]) == ("dpmpp", 10)
  assert (result["features"]["name"], result["features"]["classes"]) == ("classifier", 10)
  assert result["features"]["accuracy"] > 0.8 and result["reference"]["number"] == 1797
  assert set(result["measures"]) == {"classifier_distance", "classifier_kid", "classifier_kid_std", "set_size"}
  assert result["neighbours"]["pixels"]["training_images"] == 1797
  assert result["bits_per_dim"]["train"]["examples"] == 21 and result["bits_per_dim"]["train"]["total"] > 0
  assert all((workdir / path).exists() for path in result["pictures"].values()) and len(result["pictures"]) == 2
  assert f"{result['measures']['classifier_distance']:.5g}" in out
  page = (workdir / "report.html").read_text()
  assert "classifier" in page and f"{result['measures']['classifier_distance']:.4g}"[:5] in page
  assert not list((workdir / "samples").glob(".drawn-*"))


@pytest.mark.slow
def test_weights_out_and_in_again(folder, uninterrupted):
  """Drawn with and measured elsewhere: the same images."""
  before = drawn(uninterrupted)
  formats = {"diffusers": folder / "exported", "safetensors": folder / "file"}
  for form, target in formats.items():
    export = ["--mode=export", f"--export_format={form}", f"--export_dir={target}"]
    out, err = finish(start(folder, "whole", *export))
    assert f"done: {target} holds the ema weights after step {STEPS}" in out and err == ""
  paths = {"a": folder / "exported", "b": folder / "file" / "model.safetensors", "c": uninterrupted}
  draw = ["--mode=sample", "--num_samples=5", "--sampling_steps=10", "--sample_seed=77"]
  for name, path in paths.items():
    out, _ = finish(start(folder, f"borrowed_{name}", *draw, f"--init_from={path}"))
    assert "with the weights of --init_from" in out
  finish(start(folder, "whole", *draw))
  for name in paths:
    np.testing.assert_array_equal(drawn(folder / f"borrowed_{name}"), drawn(uninterrupted))
  assert not np.array_equal(drawn(uninterrupted), before)
  measure = ["--mode=evaluate", "--measures=bound", "--likelihood_examples=8", "--bound_timesteps=5"]
  finish(start(folder, "borrowed_a", *measure))
  assert json.loads((folder / "borrowed_a" / "eval" / "0.json").read_text())["bits_per_dim"]["train"]["examples"] == 8


@pytest.mark.slow
def test_bad_input_is_one_line_and_writes_nothing(folder):
  """What is found out before JAX starts, with the devices, and with the data; tests/test_main.py has many more."""
  bad = {
    "--nonsense=1": "nonsense",
    "--batch_size=15": "batch_size: 15 cannot be divided among 2 devices; use --batch_size=14 or 16",
    "--dataset=folder:/nowhere": "dataset: ",
  }
  processes = {flag: start(folder, f"bad{number}", flag) for number, flag in enumerate(bad)}
  for flag, process in processes.items():
    _, err = finish(process, code=2)
    assert bad[flag] in err and err.startswith("error: ") and err.count("\n") == 1, err
  assert not list(folder.glob("bad*"))


@pytest.mark.slow
def test_a_plan_of_a_run(folder, uninterrupted):
  """The stored run with another batch. Nothing is written."""
  before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
  process = start(folder, "whole", "--mode=plan", "--topology=cpu", "--batch_size=32")
  out = wait_for_line(process, "24 steps")
  assert "8x8x1 (digits), 32 in a training step" in out and "cpu: 2 x cpu" in out and "fits: " in out
  process.send_signal(signal.SIGTERM)  # the largest batch is not waited for
  _, err = finish(process, code=128 + signal.SIGTERM)
  assert err.startswith("compiling the step for a batch of 32 ... ") and "Traceback" not in err
  assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_workdir_of_another_run_is_refused(folder, uninterrupted):
  before = {path: path.read_bytes() for path in uninterrupted.glob("*.*")}
  _, err = finish(start(folder, "whole", "--seed=1"), code=2)
  assert err.count("\n") == 1 and "seed: " in err and "'0'" in err and "'1'" in err and "another --workdir" in err
  _, err = finish(start(folder, "whole", "--mode=sample", "--num_timesteps=40"), code=2)
  assert err.count("\n") == 1 and "num_timesteps: " in err and "'50'" in err and "'40'" in err
  assert {path: path.read_bytes() for path in uninterrupted.glob("*.*")} == before
