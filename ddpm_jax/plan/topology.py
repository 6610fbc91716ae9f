"""`--topology`: a name such as v5e:4x4, or cpu, becomes devices that a step can be compiled for."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from ddpm_jax.errors import UserError

EXAMPLES = "v5e:4x4, v5p:2x2x2, v6e:2x4 or cpu"
_NAME = re.compile(r"(v\w+|tpu\w+):(\d+(?:x\d+){1,2})")
# What libtpu looks for on the machine of a TPU, and where it writes; it is read when the library is loaded.
_QUIET = {
  "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any; the topology's name counts
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_LOG_DIR": "disabled",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for TPUs, of which none is used: another plan, or training, may run
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_OUT_OF_MEMORY = (
  re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
  re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)


class Topology(NamedTuple):
  """Devices of one kind.

  Attributes:
    name: as the user wrote it.
    devices: of JAX, in the order in which a job would have them.
    chips: how many these are; a chip of some kinds counts as two devices.
    memory: bytes that a program may use on each device; None if nobody says.
  """

  name: str
  devices: Sequence[Any]
  chips: int
  memory: int | None

  @property
  def kind(self) -> str:
    """What JAX calls such a device, such as 'TPU v5 lite'."""
    return self.devices[0].device_kind


class OutOfMemory(NamedTuple):
  """What a compiler says that refuses a program: bytes that it needs and may have on each device, if it says so."""

  needed: int | None
  available: int | None


def find(name: str) -> Topology:
  """The topology of that name. Nothing is asked of a network, and no TPU is touched.

  Args:
    name: KIND:AxB or KIND:AxBxC, or 'cpu' for the CPU devices of this machine.

  Raises:
    UserError: no such topology, or libtpu is not installed.
  """
  if name == "cpu":
    devices = jax.devices("cpu")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Topology(name, devices, len(devices), memory // len(devices))
  parts = _NAME.fullmatch(name)
  if not parts:
    raise UserError(f"topology: {name!r} is no name of a topology; use one such as {EXAMPLES}")
  if not importlib.util.find_spec("libtpu"):
    raise UserError(f"topology: {name} needs libtpu, the compiler for TPUs; run: pip install -e '.[tpu]'")
  for variable, value in _QUIET.items():
    os.environ.setdefault(variable, value)
  chips = math.prod(int(size) for size in parts[2].split("x"))
  options: dict[str, Any] = {}
  if chips == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)  # else a host has four
  if parts[1] == "v4":
    options["chip_config_name"] = "megacore"  # as on Cloud TPU: the two cores of a chip are one device
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
  except (jax.errors.JaxRuntimeError, RuntimeError) as error:
    reason = str(error).splitlines()[0]
    if not reason.startswith("INVALID_ARGUMENT: "):
      raise UserError(f"topology: libtpu cannot be used ({reason}); install it again, or mend what it names") from error
    raise UserError(
      f"topology: {name} is unknown to libtpu ({reason.removeprefix('INVALID_ARGUMENT: ')}); use one such as {EXAMPLES}"
    ) from error
  return Topology(name, devices, chips, _usable_memory(devices[0]))


def out_of_memory(error: RuntimeError) -> OutOfMemory | None:
  """What an error of the compiler says of memory; None if it is another one."""
  text = str(error)
  if not text.startswith("RESOURCE_EXHAUSTED"):
    return None
  for pattern in _OUT_OF_MEMORY:
    found = pattern.search(text)
    if found:
      needed, needed_unit, available, unit = found.groups()
      return OutOfMemory(int(float(needed) * _UNITS[needed_unit]), int(float(available) * _UNITS[unit]))
  return OutOfMemory(None, None)


def _usable_memory(device: Any) -> int | None:
  """Asks the compiler with a program that is sure to be refused, 4 TiB: the system keeps a part of a chip's memory."""
  here = SingleDeviceSharding(device)
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=here)
  huge = jax.jit(lambda x: jnp.broadcast_to(x, (2**40,)), out_shardings=here).lower(scalar)
  try:
    huge.compile()
  except jax.errors.JaxRuntimeError as error:
    refused = out_of_memory(error)
    if refused is None:
      raise
    return refused.available
  return None
