"""`--topology`: a name such as v5e:4x4, v5e-16 or cpu becomes devices that a step can be compiled for."""

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

EXAMPLES = "v5e:4x4, v5e-16, v5p:2x2x2, v6e:2x4 or cpu"
_NAME = re.compile(r"(v\w+|tpu\w+):(\d+(?:x\d+){1,2})")
# Cloud TPU's slices: for each kind, what the number in its name counts on a chip (TensorCores, or the chip itself), and
# their topologies. From the pages of Google Cloud's TPU documentation, https://cloud.google.com/tpu/docs/v2, /v3, /v4,
# /v5p, /v5e and /v6e; where several topologies have a number of chips, the one that is most like a cube.
_2D = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_SLICES = {
  "v2": (2, "2x2 4x4 8x8 8x16 16x16"),
  "v3": (2, "2x2 4x4 8x8 8x16 16x16 16x32 32x32"),
  "v4": (2, "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16"),
  "v5p": (2, "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24"),
  "v5e": (1, _2D),
  "v6e": (1, _2D),
}
_CLOUD_NAME = re.compile(rf"({'|'.join(_SLICES)}|v5litepod)-(\d+)")
# GPUs by their maker or model, and machines of Google, Amazon and Microsoft that have them.
_GPUS = re.compile(
  r"gpu|cuda|rocm|nvidia|geforce|radeon|[rg]tx"
  r"|(?<![a-z0-9])(?:\d+x)?(?:a(?:10g?|16|30|40|100)|[bg]?b[23]00|g?h(?:20|100|200|800)|l(?:4|40s?)|t4|[pv]100|k80|mi\d{3}x?)"
  r"(?![a-z0-9])"
  r"|^(?:a[234]x?|g[24])-|^(?:p[2-6]|g[3-7])[a-z]*\.|^(?:standard_)?n[cdvg]\d",
  re.IGNORECASE,
)
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
    name: KIND:AxB, KIND:AxBxC or 'cpu'; behind it, in brackets, what the user wrote, if that is another name.
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
    name: KIND:AxB or KIND:AxBxC; KIND-N, a slice as Cloud TPU calls it; or 'cpu' for the CPU devices of this machine.

  Raises:
    UserError: no such topology, it is one of GPUs, or libtpu is not installed.
  """
  if name == "cpu":
    devices = jax.devices("cpu")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Topology(name, devices, len(devices), memory // len(devices))
  asked, name = name, _topology_of_slice(name)
  parts = _NAME.fullmatch(name)
  if not parts and _GPUS.search(name):
    raise UserError(
      f"topology: {name!r} has GPUs, and XLA compiles for those only where they are; run there, with these flags but "
      "without --mode and --topology, in the root of a clone: python -m benchmarks.train_step"
    )
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
  shown = name if name == asked else f"{name} ({asked})"
  return Topology(shown, devices, chips, _usable_memory(devices[0]))


def _topology_of_slice(name: str) -> str:
  """KIND:AxB of what Cloud TPU calls KIND-N; other names as they are. Raises UserError where it has no such slice."""
  parts = _CLOUD_NAME.fullmatch(name)
  if not parts:
    return name
  kind = parts[1].replace("v5litepod", "v5e")
  counted, topologies = _SLICES[kind]
  slices = {counted * math.prod(map(int, topology.split("x"))): topology for topology in topologies.split()}
  if int(parts[2]) not in slices:
    raise UserError(
      f"topology: {name} is no slice of Cloud TPU, whose number counts {'chips' if counted == 1 else 'TensorCores'}; "
      f"use one of {', '.join(f'{parts[1]}-{number}' for number in slices)}"
    )
  return f"{kind}:{slices[int(parts[2])]}"


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
