import importlib.util
import pathlib

import jax
import pytest

from ddpm_jax import distributed
from ddpm_jax.errors import UserError

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM_STEP = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.fixture(autouse=True)
def no_tpu(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def joined(monkeypatch) -> list[dict]:
  """What `jax.distributed.initialize` was called with."""
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
  monkeypatch.setattr(type(jax.config), "update", lambda self, name, value: None)
  for name in (*EXPLICIT, *SLURM_STEP, *OPEN_MPI, *KUBERNETES):
    monkeypatch.delenv(name, raising=False)
  return calls


@pytest.mark.parametrize(
  ("environment", "kind"),
  [
    ({}, "single"),
    ({"HOME": "home", "PATH": "bin"}, "single"),
    (EXPLICIT, "explicit"),
    (EXPLICIT | SLURM_STEP | OPEN_MPI | KUBERNETES, "explicit"),
    (EXPLICIT | {"JAX_PROCESS_ID": "0"}, "explicit"),
    (SLURM_STEP, "slurm"),
    # A shell inside an allocation (salloc, the batch script itself): nobody started the other tasks.
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "4"}, "single"),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "single"),
    (SLURM_STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "single"),
    (OPEN_MPI, "openmpi"),
    ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, "single"),
    (KUBERNETES, "kubernetes"),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "single"),  # a pod that is no part of an indexed job
    ({"JAX_COORDINATOR_ADDRESS": "", "JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": ""}, "single"),
  ],
)
def test_detect(environment, kind):
  assert distributed.detect(environment) == kind


@pytest.mark.parametrize(
  "present", [names for k in (1, 2) for names in (list(EXPLICIT)[:k], list(EXPLICIT)[-k:])], ids=",".join
)
def test_part_of_the_three_variables_is_an_error(present):
  with pytest.raises(UserError) as caught:
    distributed.detect({name: EXPLICIT[name] for name in present})
  text = str(caught.value)
  assert text.startswith("distributed: ")
  assert "--distributed=off" in text
  for name in EXPLICIT:
    assert name in text


@pytest.mark.parametrize(("libtpu", "kind"), [(True, "tpu"), (False, "single")])
def test_a_tpu_needs_its_device_and_its_library(monkeypatch, libtpu, kind):
  monkeypatch.setattr(pathlib.Path, "glob", lambda self, pattern: iter([self / "accel0"]))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if libtpu and name == "libtpu" else None)
  assert distributed.detect({}) == kind


def test_off_joins_nothing(joined, monkeypatch):
  for name, value in EXPLICIT.items():
    monkeypatch.setenv(name, value)
  assert distributed.initialize("off") == "off"
  assert joined == []


def test_alone_joins_nothing(joined):
  assert distributed.initialize("auto") == "single"
  assert joined == []


def test_explicit_job(joined, monkeypatch):
  for name, value in EXPLICIT.items():
    monkeypatch.setenv(name, value)
  assert distributed.initialize("auto") == "explicit"
  assert joined == [{"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}]


def test_what_jax_knows_is_left_to_jax(joined, monkeypatch):
  for name, value in SLURM_STEP.items():
    monkeypatch.setenv(name, value)
  assert distributed.initialize("auto") == "slurm"
  assert joined == [{}]


def test_a_job_that_cannot_be_joined(joined, monkeypatch):
  def fail(**options):
    raise RuntimeError("barrier timed out\nand a long story")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  for name, value in OPEN_MPI.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(
    UserError, match=r"distributed: could not join the openmpi job .*\(barrier timed out\).*--distributed=off$"
  ):
    distributed.initialize("auto")


def test_a_process_id_that_is_no_number(joined, monkeypatch):
  for name, value in (EXPLICIT | {"JAX_PROCESS_ID": "three"}).items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match="'three'"):
    distributed.initialize("auto")
  assert joined == []
