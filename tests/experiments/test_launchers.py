"""The launchers are well-formed, run the program with flags that exist, and say what must be equal on every host."""

from __future__ import annotations

import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
import tomllib

import pytest
import yaml
from absl import flags as absl_flags

from ddpm_jax import config as config_lib
from ddpm_jax import flags
from ddpm_jax.config import Config

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = ["tpu_pod.sh", "slurm.sbatch"]
MANIFEST = "kubernetes_jobset.yaml"
SETTINGS = ("WORKDIR", "DATA_DIR", "FLAGFILE")


def text(name: str) -> str:
  return (LAUNCH / name).read_text()


def comments(name: str) -> str:
  lines = (line.strip() for line in text(name).splitlines())
  return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def fill(manifest: str, values: dict[str, str]) -> str:
  """What envsubst makes of the manifest, given the names that its header lists."""
  (listed,) = re.findall(r"envsubst '(.*)'", manifest)
  assert {f"${name}" for name in values} == set(listed.split())
  for name, value in values.items():
    manifest = manifest.replace(f"${{{name}}}", value)
  return manifest


def jobset() -> dict:
  values = {
    "NAME": "cifar10",
    "IMAGE": "registry/ddpm_jax:1",
    "VOLUME_CLAIM": "shared",
    "NUM_HOSTS": "2",
    "GPUS_PER_HOST": "8",
    "WORKDIR": "/shared/runs/cifar10",
    "DATA_DIR": "/shared/tfds",
    "FLAGFILE": "experiments/cifar10.flags",
  }
  return yaml.safe_load(fill(text(MANIFEST), values))


def test_all_launchers_are_here():
  assert {path.name for path in LAUNCH.iterdir() if path.is_file()} == {*SCRIPTS, MANIFEST, "sweep.py"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_valid_bash(name):
  subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize("name", [*SCRIPTS, MANIFEST])
def test_says_what_must_be_equal_and_how_to_stop_and_resume(name):
  said = comments(name)
  (equal,) = re.findall(r"Must be equal on every host: (.*?) +(?:To |The processes)", said)
  for item in ("the command and its flags", "package versions", "the data set", "the workdir"):
    assert item in equal
  assert re.search(r"\bstop\b", said, re.IGNORECASE)
  assert "To resume" in said


@pytest.mark.parametrize("name", [*SCRIPTS, MANIFEST])
def test_runs_the_program_with_flags_that_exist(name):
  registry = absl_flags.FlagValues()
  flags.define(registry)
  if name == MANIFEST:
    (job,) = jobset()["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    command = " ".join(container["args"])
  else:
    (command,) = re.findall(r"-m ddpm_jax\.main((?:[^\n]*\\\n)*[^\n]*)", text(name))
  named = re.findall(r"--(\w+)=", command)
  assert {"workdir", "data_dir", "flagfile"} <= set(named)
  assert set(named) - {"flagfile"} <= set(registry)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_names_what_is_missing(name, tmp_path):
  for setting in SETTINGS:
    assert f'"${{{setting}:?' in text(name)
  arguments = ["train"] if name == "tpu_pod.sh" else []
  environment = {"PATH": "/usr/bin:/bin", "TPU_NAME": "slice", "ZONE": "zone"}
  done = subprocess.run(
    ["bash", LAUNCH / name, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
  )
  assert done.returncode != 0
  assert "WORKDIR: name the folder of this run" in done.stderr


def test_tpu_script_sends_one_command_to_every_worker(tmp_path):
  fake = tmp_path / "gcloud"
  fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
  fake.chmod(0o755)
  environment = {
    "PATH": f"{tmp_path}:/usr/bin:/bin",
    "TPU_NAME": "slice",
    "ZONE": "zone",
    "WORKDIR": "/mnt/my runs/cifar10",
    "DATA_DIR": "/mnt/tfds",
    "FLAGFILE": "experiments/cifar10.flags",
    "REPOSITORY": "url",
    "REVISION": "1234abc",
  }
  sent = {}
  for action in ("install", "train", "log", "stop"):
    done = subprocess.run(
      ["bash", LAUNCH / "tpu_pod.sh", action], env=environment, capture_output=True, text=True, check=True
    )
    assert "--worker=all" in done.stdout
    sent[action] = done.stdout.split("--command=", 1)[1]
    subprocess.run(["bash", "-n", "-c", sent[action]], check=True)
  assert r"--workdir=/mnt/my\ runs/cifar10" in sent["train"]
  assert "git checkout --detach 1234abc" in sent["install"]
  assert ".[tpu]" in sent["install"]
  assert "kill -TERM" in sent["stop"]


def script(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/sh\n{text}\n")
  path.chmod(0o755)


def test_tpu_script_tells_a_stop_from_an_end(tmp_path):
  """The log of a worker, which is this machine here, ends with how the training ended."""
  script(tmp_path / "bin/gcloud", 'for last; do :; done; exec bash -c "${last#--command=}"')
  python = tmp_path / "ddpm_jax/.venv/bin/python"
  names = {"TPU_NAME": "slice", "ZONE": "zone", "WORKDIR": "/w", "DATA_DIR": "/d", "FLAGFILE": "f"}
  environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path), **names}
  log = tmp_path / "ddpm_jax/train.log"

  def act(action: str) -> str:
    command = ["bash", LAUNCH / "tpu_pod.sh", action]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout

  def last_line(begins: str) -> str:
    for _ in range(600):
      if log.exists() and (last := act("log").rpartition("\n")[0].rpartition("\n")[2]).startswith(begins):
        return last
      time.sleep(0.05)
    raise AssertionError(f"no line {begins!r}: {log.read_text()}")

  with pytest.raises(subprocess.CalledProcessError):  # it is not installed, and nothing is written
    act("train")
  assert not (tmp_path / "train.log").exists() and not log.exists()
  python.parent.mkdir(parents=True)
  (tmp_path / "ddpm_jax/train.pid").write_text(f"{os.getpid()}\n")  # of before a reboot: today another process
  act("stop")
  script(python, "trap 'exit 75' TERM; echo \"$@\"; while :; do sleep 0.05; done")
  act("train")
  assert "--stop_exit_code=75" in last_line("-m ddpm_jax.main")
  with pytest.raises(subprocess.CalledProcessError):  # it trains already
    act("train")
  act("stop")
  assert last_line("exit code 75") == "exit code 75: stopped before it was finished; train resumes it"
  for code, how in ((0, "finished"), (3, "failed")):
    script(python, f"exit {code}")
    act("train")
    assert last_line(f"exit code {code}") == f"exit code {code}: {how}"


@pytest.mark.parametrize("code", [0, 1, 3, 75, 137])
def test_slurm_job_requeues_itself_only_if_it_was_stopped(tmp_path, code):
  """Also where that is refused, as after Requeue=0, its exit code is that of the training."""
  script(tmp_path / "srun", f'echo srun "$@"; exit {code}')
  script(tmp_path / "scontrol", 'echo scontrol "$@"; exit 1')
  names = {"WORKDIR": "/w", "DATA_DIR": "/d", "FLAGFILE": "f", "VENV": "/venv", "SLURM_JOB_ID": "17"}
  environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **names}
  done = subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == code
  ran, *after = done.stdout.splitlines()
  assert ran.startswith("srun ") and "--stop_exit_code=75" in ran and "--kill-on-bad-exit=0" in ran
  assert after == (["scontrol requeue 17"] if code == 75 else [])


def test_slurm_job_has_a_task_for_each_gpu_and_warning_before_it_ends():
  directives = re.findall(r"^#SBATCH (\S+)", text("slurm.sbatch"), re.MULTILINE)
  assert "--signal=TERM@60" in directives
  assert "--requeue" in directives
  for variable in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"):
    assert variable in comments("slurm.sbatch")


def test_jobset_gives_every_pod_its_place():
  document = jobset()
  assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (job,) = document["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  assert spec["completionMode"] == "Indexed"
  assert spec["completions"] == spec["parallelism"] == 2
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  environment = {entry["name"]: entry for entry in container["env"]}
  # JobSet's name for pod 0 of job 0: JOBSET-JOB-0-0.SUBDOMAIN
  host, port = environment["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
  assert host == f"{document['metadata']['name']}-{job['name']}-0-0.{document['spec']['network']['subdomain']}"
  assert int(port) in [entry["containerPort"] for entry in container["ports"]]
  assert environment["JAX_NUM_PROCESSES"]["value"] == "2"
  index = environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
  assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_a_pod_that_was_told_to_stop_is_no_failure_and_not_done():
  """Python is the pod's own process, and its exit code after a stop is the one that the rules know."""
  spec = jobset()["spec"]
  (job,) = spec["replicatedJobs"]
  job = job["template"]["spec"]
  (container,) = job["template"]["spec"]["containers"]
  assert container["command"] == ["python", "-m", "ddpm_jax.main"]
  registry = absl_flags.FlagValues()
  absl_flags.DEFINE_string("flagfile", "", "", flag_values=registry)
  flags.define(registry)
  assert registry(["main", *(word for word in container["args"] if not word.startswith("--flagfile="))]) == ["main"]
  config = config_lib.override(Config(), flags.given(registry))
  (rule,) = job["podFailurePolicy"]["rules"]
  codes = {"containerName": container["name"], "operator": "In", "values": [config.train.stop_exit_code]}
  assert rule == {"action": "FailJob", "onExitCodes": codes} and config.train.stop_exit_code > 3
  again = {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
  assert spec["failurePolicy"]["rules"] == [again] and spec["failurePolicy"]["maxRestarts"] > 0
  # What Kubernetes asks of a job with such a policy.
  assert job["template"]["spec"]["restartPolicy"] == "Never"
  assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 120


TINY = [
  *("--channels=4", "--channel_multipliers=1", "--attention_resolutions=", "--batch_size=8", "--num_timesteps=20"),
  *("--preview_steps=2", "--num_steps=4", "--log_every=1", "--sample_every=0", "--lr_schedule=constant"),
]


def test_a_sweep_compiles_once_and_each_of_its_runs_is_that_of_the_command(tmp_path):
  """With another seed each, so with other losses; the same command again does nothing."""
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_cpu_use_onednn=false",
  }
  environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
  cache = tmp_path / "cache"

  def python(*words):
    command = [sys.executable, *words, *TINY, f"--compilation_cache={cache}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, {path.name for path in cache.glob("*-cache")}

  _, kept = python("-m", "ddpm_jax.main", f"--workdir={tmp_path / 'alone'}", "--seed=3")
  assert max(path.stat().st_size for path in cache.iterdir()) > 30_000, "the step is kept, not only small programs"
  out, after = python(LAUNCH / "sweep.py", f"--workdir={tmp_path / 'sweep'}", "--seeds=3,5")
  assert after == kept, "another seed compiles another program"
  losses = {}
  for name in ("alone", "sweep/seed_3", "sweep/seed_5"):
    losses[name] = [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
  assert losses["sweep/seed_3"] == losses["alone"] and len(losses["alone"]) == 4
  assert not set(losses["sweep/seed_5"]) & set(losses["alone"])
  for seed in (3, 5):
    expected = statistics.fmean(losses[f"sweep/seed_{seed}"])
    assert f"seed_{seed}  loss {expected:.4g}, the mean of 4 lines" in out
  out, _ = python(LAUNCH / "sweep.py", f"--workdir={tmp_path / 'sweep'}", "--seeds=3,5")
  assert out.count("nothing to do") == 2


def test_a_sweep_refuses_what_is_wrong_in_one_line(tmp_path):
  for words, message in (
    (["--workdir=x"], "seeds: empty"),
    (["--seeds=1"], "workdir: missing"),
    (["--seeds=1", "--workdir=x", "--chanels=3"], "Unknown command line flag 'chanels'"),
    (["--seeds=a", "--workdir=x"], "flag --seed=a"),
    (["--seeds=1", "--workdir=x", "--dataset=folder:x", "--stop_exit_code=0"], "stop_exit_code: 0 is also"),
    (
      ["--seeds=1", "--workdir=x", "--dataset=folder:x", "--stop_exit_code=2"],
      "stop_exit_code: 2 says",
    ),  # not replaced
  ):
    command = [sys.executable, LAUNCH / "sweep.py", *words]
    done = subprocess.run(
      command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"error: {message}")
  assert list(tmp_path.iterdir()) == []


# The image.


def dockerfile() -> list[tuple[str, str]]:
  """The instructions of the Dockerfile, each as (its name, the rest on one line)."""
  lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
  text = "\n".join(lines).replace("\\\n", " ")
  return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_image_copies_what_there_is_and_leaves_nothing_out():
  """What an instruction copies exists and is not kept back by .dockerignore; the package's own files are all there."""
  ignored = (ROOT / ".dockerignore").read_text().splitlines()
  let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
  assert "*" in ignored
  copied = [
    word for name, rest in dockerfile() if name == "COPY" and "--from=" not in rest for word in rest.split()[:-1]
  ]
  assert set(copied) == let_in and all((ROOT / name).exists() for name in copied)
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  needed = {project["readme"], *project["license-files"], "pyproject.toml", "ddpm_jax"}
  assert all(any(name == part or name.startswith(f"{part}/") for part in copied) for name in needed)


def test_the_image_runs_the_command_as_nobody_in_particular():
  instructions = dockerfile()
  assert [rest for name, rest in instructions if name == "ENTRYPOINT"] == ['["python", "-m", "ddpm_jax.main"]']
  (user,) = [rest for name, rest in instructions if name == "USER"]
  assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
  (variables,) = [rest for name, rest in instructions if name == "ENV" and "PATH=" in rest]
  assert "XDG_CACHE_HOME=/tmp/" in variables and "MPLCONFIGDIR=/tmp/" in variables
  stages = [rest for name, rest in instructions if name == "FROM"]
  assert stages == ["python:${PYTHON}-slim AS build", "python:${PYTHON}-slim"]
  assert instructions[0] == ("ARG", "PYTHON=3.13")


def test_what_the_image_installs_is_valid_and_locked():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  named = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
  for name, rest in dockerfile():
    if name == "RUN":
      subprocess.run(["bash", "-n", "-c", rest], check=True)
      removed = re.findall(r"pip uninstall --yes ([\w. -]+)", rest)
      assert set(" ".join(removed).split()) <= named
  said = (ROOT / "Dockerfile").read_text()
  extras = re.findall(r"--build-arg=EXTRA=([\w,]+)", said)
  assert extras and set(",".join(extras).split(",")) <= project["optional-dependencies"].keys()
  assert "--build-arg=EXTRA=cuda" in comments(MANIFEST)


@pytest.mark.parametrize("name", ["Dockerfile", "experiments/launch/sweep.py", f"experiments/launch/{MANIFEST}"])
def test_commands_in_comments_have_flags_that_exist(name):
  text = (ROOT / name).read_text().replace("# ", "")
  registry = absl_flags.FlagValues()
  flags.define(registry)
  found = re.findall(r"(?:ddpm_jax:cuda|ddpm_jax|ddpm_jax\.main|sweep\.py) ((?:\\?\s*--\w+=\S+)+)", text)
  named = {flag for words in found for flag in re.findall(r"--(\w+)=", words)}
  assert named - {"flagfile", "seeds"} <= set(registry)
