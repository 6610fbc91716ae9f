"""Which job is found, and two real processes on loopback of which one is lost."""

import contextlib
import importlib.util
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster
from jax._src.clusters.cluster import ClusterEnv

from ddpm_jax.errors import UserError
from ddpm_jax.runtime import distributed

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM_STEP = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"} | {
  "SLURM_STEP_NODELIST": "node[1-2]",
  "SLURM_LOCALID": "0",
}
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
  state = types.SimpleNamespace(num_processes=1, process_id=0, coordinator_address="", client=None)
  monkeypatch.setattr(distributed, "_jax_state", lambda: state)  # of one process, whatever was asked for
  monkeypatch.setattr(type(jax.config), "update", lambda self, name, value: None)
  for name in (*EXPLICIT, *SLURM_STEP, *OPEN_MPI, *KUBERNETES, *distributed._OF_CLUSTERS):
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


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_LOCALID"])
def test_part_of_a_slurm_step_is_an_error(name):
  with pytest.raises(UserError, match=f"4 tasks, but {name} not set;.*--distributed=off"):
    distributed.detect({key: value for key, value in SLURM_STEP.items() if key != name})


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_count_that_is_no_number_is_an_error(name):
  with pytest.raises(UserError, match=f"{name} is '2x'"):
    distributed.detect({name: "2x"})


@pytest.mark.parametrize(("libtpu", "kind"), [(True, "tpu"), (False, "single")])
def test_a_tpu_needs_its_device_and_its_library(monkeypatch, libtpu, kind):
  monkeypatch.setattr(pathlib.Path, "glob", lambda self, pattern: iter([self / "accel0"]))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if libtpu and name == "libtpu" else None)
  assert distributed.detect({}) == kind


def test_a_tpu_pod_of_gke_needs_no_package_kubernetes(monkeypatch):
  """Neither for us nor for JAX, which finds the hosts in the environment."""
  gke = KUBERNETES | {"TPU_WORKER_HOSTNAMES": "localhost,other", "TPU_WORKER_ID": "1"}
  assert distributed.detect(gke) == "kubernetes"  # of CPUs: JAX ignores the names of TPU hosts there
  monkeypatch.setattr(pathlib.Path, "glob", lambda self, pattern: iter([self / "vfio" / "0"]))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None)
  assert distributed.detect(gke) == "tpu"
  assert distributed.detect(KUBERNETES) == "kubernetes"
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  monkeypatch.setitem(sys.modules, "kubernetes", None)
  for name in ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"):
    monkeypatch.setenv(name, "")
  for name, value in gke.items():
    monkeypatch.setenv(name, value)
  found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 10)
  assert found[:3] == ("localhost:8482", 2, 1)


def test_off_joins_nothing(joined, monkeypatch):
  for name, value in EXPLICIT.items():
    monkeypatch.setenv(name, value)
  job = distributed.initialize("off")
  assert (job.kind, job.processes, job.text) == ("off", 1, "1 process (--distributed=off)")
  assert joined == []


def test_alone_joins_nothing(joined):
  job = distributed.initialize("auto")
  assert (job.kind, job.processes, job.text) == ("single", 1, "1 process, on this machine alone")
  assert joined == []
  job.wait_for_verdict(RuntimeError("Gloo: connection closed"))  # nobody to wait for
  assert job.leave(0) is None and job.leave(3) is None


@pytest.mark.parametrize("mark", ["SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST", "PMI_SIZE"])
def test_on_a_cluster_a_job_that_was_not_found_is_said(joined, monkeypatch, mark):
  monkeypatch.setenv(mark, "7")
  job = distributed.initialize("auto")
  assert (job.kind, job.processes, joined) == ("single", 1, [])
  assert "no job of several was found" in job.text and mark in job.text
  assert all(name in job.text for name in EXPLICIT)


LIMITS = {"initialization_timeout": 330, "heartbeat_timeout_seconds": 210}


def test_explicit_job(joined, monkeypatch):
  for name, value in EXPLICIT.items():
    monkeypatch.setenv(name, value)
  job = distributed.initialize("auto")
  assert job.kind == "explicit"
  assert re.fullmatch(r"1 process, this is 0 \(explicit: JAX_.* are set\); --distributed=off trains alone", job.text)
  assert joined == [{"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3} | LIMITS]


def test_what_jax_knows_is_left_to_jax(joined, monkeypatch):
  for name, value in SLURM_STEP.items():
    monkeypatch.setenv(name, value)
  job = distributed.initialize("auto", heartbeat_timeout=10)
  assert job.kind == "slurm" and "Slurm" in job.text
  assert joined == [{"initialization_timeout": 330, "heartbeat_timeout_seconds": 30}]


@pytest.mark.parametrize(
  ("address", "variable", "bind"),
  [
    ("127.0.0.1:{}", None, "127.0.0.1:{}"),
    ("localhost:{}", None, "localhost:{}"),
    ("127.0.0.1:{}", "0.0.0.0:1", None),  # JAX reads the variable
    ("host:{}", None, None),
    ("10.0.0.1:{}", None, None),
  ],
)
def test_a_job_on_one_machine_is_closed_to_others(joined, monkeypatch, address, variable, bind):
  port = free_port()
  for name, value in (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": address.format(port), "JAX_PROCESS_ID": "0"}).items():
    monkeypatch.setenv(name, value)
  if variable:
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", variable)
  distributed.initialize("auto")
  assert joined[0].get("coordinator_bind_address") == (bind and bind.format(port))


def test_a_busy_port(joined, monkeypatch):
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"10.0.0.1:{server.getsockname()[1]}"
    for name, value in (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": "0"}).items():
      monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"port {address.partition(':')[2]} of process 0 is not free.*=off$"):
      distributed.initialize("auto")
  assert joined == []


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


@pytest.mark.parametrize(
  ("wrong", "text"),
  [
    (EXPLICIT | {"JAX_PROCESS_ID": "three"}, "'three'"),
    (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "'10.0.0.1', not HOST:PORT"),
    (KUBERNETES, "package kubernetes"),
  ],
)
def test_a_job_that_is_described_wrongly(joined, monkeypatch, wrong, text):
  for name, value in wrong.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=text):
    distributed.initialize("auto")
  assert joined == []


# Two real processes.

HEARTBEAT = 5
ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import os, sys, time
from ddpm_jax.runtime import distributed
job = distributed.initialize("auto", 5, join_timeout=int(sys.argv[2]))
print(job.text, os.getpid(), flush=True)
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
ones = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), np.ones(1, np.float32))
for step in range(10**9):
  try:
    jax.block_until_ready(total(ones))
  except (ValueError, RuntimeError) as error:
    job.wait_for_verdict(error)
    job.leave(77)
  if step == 5:
    print("running", flush=True)
  time.sleep(0.02)
  {then}
"""


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


class Pair:
  """Two processes that add up numbers until `then` or the test ends them."""

  def __init__(self, then="pass", count=2, join_timeout=60):
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", SCRIPT.replace("{then}", then), "", str(join_timeout)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    self.children = [
      subprocess.Popen(command, cwd=ROOT, env=os.environ | job | {"JAX_PROCESS_ID": str(i)}, **pipes)
      for i in range(count)
    ]

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for child in self.children:
      child.kill()
      child.communicate()

  def wait_until_running(self):
    for child in self.children:
      for line in child.stdout:
        if line == "running\n":
          break
      else:
        pytest.fail(child.stderr.read())
    time.sleep(1.2)  # after the first signs of life

  def ends(self, i):
    """The exit code of a process, and what it said to standard error."""
    _, err = self.children[i].communicate(timeout=60)
    return self.children[i].returncode, err

  def lost(self, i, what):
    """The line about it."""
    who = re.escape(f"(host {socket.gethostname()}, pid {self.children[i].pid})")
    return re.compile(rf"^error: process {i} of 2 is lost {who}: {what}; every process ends", re.M)


def test_a_lost_process():
  # The cases at the same time, as they mostly wait. A stopped process keeps its connections: there the collective of
  # the other one hangs, as on a GPU, where that of a killed one raises.
  cases = [
    (1, signal.SIGKILL, r"silent for \d+ s"),
    (0, signal.SIGKILL, r"its port is closed"),
    (1, signal.SIGSTOP, r"silent for \d+ s"),
    (0, signal.SIGSTOP, r"silent for \d+ s"),
  ]
  with contextlib.ExitStack() as stack:
    pairs = [stack.enter_context(Pair()) for _ in cases]
    for pair in pairs:
      pair.wait_until_running()
    start = time.monotonic()
    for pair, (victim, number, _) in zip(pairs, cases, strict=True):
      pair.children[victim].send_signal(number)
    for pair, (victim, _, what) in zip(pairs, cases, strict=True):
      code, err = pair.ends(1 - victim)
      assert code == 1, err
      assert time.monotonic() - start < HEARTBEAT + 30  # beside other programs
      assert pair.lost(victim, what).search(err), err


def test_ends_of_a_job():
  with contextlib.ExitStack() as stack:
    first, second, alike, clean = (
      stack.enter_context(Pair(f"if step == 50: {then}"))
      for then in (
        "job.process or job.leave(3)",
        "job.process and job.leave(3)",
        "job.process or time.sleep(2.6); job.leave(3)",  # both, and process 0 a little later
        # Process 0 comes later than the heartbeat timeout, which is nobody's loss.
        f"job.process or time.sleep({HEARTBEAT + 2}); job.leave(0); break",
      )
    )
    for i, pair in enumerate((first, second)):
      assert pair.ends(i) == (3, "")
      code, err = pair.ends(1 - i)
      assert code == 1, err
      assert pair.lost(i, "ended with exit code 3").search(err), err
    for pair, code in ((alike, 3), (clean, 0)):
      assert [pair.ends(i) for i in range(2)] == [(code, "")] * 2


def test_a_process_that_does_not_come():
  with Pair(count=1, join_timeout=3) as pair:
    code, err = pair.ends(0)
    assert code == 2
    assert err.startswith("error: distributed: not all processes of the explicit job have come within 3 s"), err
