"""The launchers are well-formed, run the program with flags that exist, and say what must be equal on every host."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess

import pytest
import yaml
from absl import flags as absl_flags

from ddpm_jax import flags

LAUNCH = pathlib.Path(__file__).parents[2] / "experiments" / "launch"
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
  assert {path.name for path in LAUNCH.iterdir()} == {*SCRIPTS, MANIFEST}


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


@pytest.mark.parametrize(("stop", "code", "expected"), [(False, 0, 0), (False, 3, 3), (True, 0, 143)])
def test_pod_that_was_told_to_stop_is_not_done(tmp_path, stop, code, expected):
  # A program that exits with 0 when it is told to stop, as ours does after saving.
  fake = tmp_path / "python"
  body = "while :; do sleep 0.02; done" if stop else f"exit {code}"
  fake.write_text(f"#!/bin/bash\ntrap 'echo saved; exit 0' TERM\necho up\n{body}\n")
  fake.chmod(0o755)
  (job,) = jobset()["spec"]["replicatedJobs"]
  (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
  command = [*container["command"], *container["args"]]
  environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
  with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as shell:
    assert shell.stdout is not None
    assert shell.stdout.readline() == "up\n"
    if stop:
      shell.terminate()
    try:
      rest, _ = shell.communicate(timeout=20)
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(shell.pid, signal.SIGKILL)
  assert shell.returncode == expected
  assert rest == ("saved\n" if stop else "")
