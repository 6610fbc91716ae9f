"""Joins the processes of a job, if there is a job: one call to `jax.distributed`, nothing home-made."""

from __future__ import annotations

import importlib.util
import os
import pathlib
from collections.abc import Mapping

import jax

from ddpm_jax.errors import UserError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def detect(environment: Mapping[str, str]) -> str:
  """Which kind of job the environment describes: 'explicit', 'slurm', 'openmpi', 'kubernetes', 'tpu' or 'single'.

  Only marks that every process of a job has, and a shell inside an allocation has not, count: `SLURM_NTASKS` alone, for
  example, is also set where nobody started the other tasks.

  Raises:
    UserError: if the three JAX_ variables are set in part.
  """
  present = [name for name in _EXPLICIT if environment.get(name)]
  if present and len(present) < len(_EXPLICIT):
    missing = ", ".join(name for name in _EXPLICIT if name not in present)
    raise UserError(f"distributed: {', '.join(present)} set without {missing}; set all three, or --distributed=off")
  if present:
    return "explicit"
  if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "SLURM_PROCID" in environment:
    return "slurm"
  if int(environment.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
    return "openmpi"
  if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
    return "kubernetes"
  on_tpu_vm = any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(pathlib.Path("/dev").glob("vfio/[0-9]*"))
  if on_tpu_vm and importlib.util.find_spec("libtpu"):
    return "tpu"
  return "single"


def initialize(mode: str) -> str:
  """Joins the job, before any device is touched. Returns what `detect` found ('off' for mode 'off').

  Args:
    mode: 'auto' or 'off'.

  Raises:
    UserError: if there is a job but it cannot be joined.
  """
  if mode == "off":
    return "off"
  found = detect(os.environ)
  if found == "single":
    return found
  explicit = {}
  try:
    if found == "explicit":
      explicit = {
        "coordinator_address": os.environ["JAX_COORDINATOR_ADDRESS"],
        "num_processes": int(os.environ["JAX_NUM_PROCESSES"]),
        "process_id": int(os.environ["JAX_PROCESS_ID"]),
      }
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**explicit)
  except (ValueError, RuntimeError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(
      f"distributed: could not join the {found} job that was found ({reason}); mend it, or train alone with "
      "--distributed=off"
    ) from error
  return found
