"""What the machine is, and the most that it can compute."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ddpm_jax.config import own_images
from ddpm_jax.runtime.compilation import cores
from ddpm_jax.runtime.paths import cache_folder


class Peak(NamedTuple):
  """FLOP/s of dense matrix products of one JAX device, and who says so."""

  bfloat16: float
  float32: float  # as JAX multiplies float32 by default: TF32 on a GPU that has it, bfloat16 passes on a TPU
  source: str


_HOPPER = "NVIDIA H100 and H200 data sheets, without sparsity"
_AMPERE = "NVIDIA A100 data sheet, without sparsity"
_ADA = "NVIDIA Ada data sheets, without sparsity"
# By the beginning of `device_kind`; of two that fit, the longer one.
PEAKS = {
  "NVIDIA H100": Peak(989.4e12, 494.7e12, _HOPPER),
  "NVIDIA H100 PCIe": Peak(756e12, 378e12, _HOPPER),
  "NVIDIA H200": Peak(989.4e12, 494.7e12, _HOPPER),
  "NVIDIA A100": Peak(312e12, 156e12, _AMPERE),
  "NVIDIA L4": Peak(121e12, 60e12, _ADA),
  "NVIDIA L40S": Peak(362e12, 183e12, _ADA),
}


def published_peak(device_kind: str, dtype: str) -> tuple[float, str] | None:
  """(FLOP/s of one device, source), or None if the table has it not."""
  from ddpm_jax.plan.hardware import TPUS  # with JAX, which a worker with PyTorch has not

  source = "Cloud TPU documentation, system architecture"
  known = dict(PEAKS)
  for kind, (tflops, *_) in TPUS.items():
    of_a_device = tflops * 1e12 / (2 if kind == "TPU v3" else 1)  # two JAX devices on a chip
    known[kind] = Peak(of_a_device, of_a_device, source)
  fits = [kind for kind in known if f"{device_kind} ".startswith((f"{kind} ", f"{kind}-"))]
  if not fits:
    return None
  peak = known[max(fits, key=len)]
  return getattr(peak, dtype), peak.source


def fastest(run: Callable[[], Any], repeats: int = 10) -> float:
  """Seconds of the fastest of some runs, after one to be warm."""
  run()
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    run()
    times.append(time.perf_counter() - began)
  return min(times)


def measured_peak(dtype: str, size: int = 2048) -> tuple[float, str]:
  """(FLOP/s of one device, how): the product of two square matrices. On a CPU, one device has all cores."""
  import jax
  import jax.numpy as jnp

  a = jnp.ones((size, size), dtype)
  product = jax.jit(jnp.matmul)
  seconds = fastest(lambda: product(a, a).block_until_ready())
  return 2 * size**3 / seconds, f"measured: {dtype} product of {size}x{size} matrices"


def describe() -> dict[str, Any]:
  """The machine, without its name."""
  return {
    "cpu": _cpu_model(),
    "cores": cores(),
    "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
    "system": platform.system(),
    "load": round(os.getloadavg()[0], 1),  # of the last minute; more than the cores: others were at work too
  }


def _cpu_model() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.machine()


def versions(*packages: str) -> dict[str, str]:
  """Those of Python and of the named packages that are installed here."""
  installed = {"python": platform.python_version()}
  for package in packages:
    try:
      installed[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return installed


def forget(dataset: str) -> None:
  """Asks the system to drop the files of own images from its cache, so that they come from the disk again.

  With what the program has in its own cache about data sets.
  """
  own, cache = own_images(dataset), cache_folder()
  if own is None or not hasattr(os, "posix_fadvise"):
    return
  place = pathlib.Path(own[1])
  files = list(place.rglob("*")) if place.is_dir() else [pathlib.Path(path) for path in glob.glob(own[1])]
  for path in [*files, *((cache / "data").glob("*") if cache else [])]:
    if path.is_file():
      with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_rss() -> int:
  """Bytes of memory that this process has used at most."""
  status = pathlib.Path("/proc/self/status")
  if status.exists():  # what getrusage says there, a child has from its parent
    peaks = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:")]
    return int(peaks[0].split()[1]) * 1024
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return most if sys.platform == "darwin" else most * 1024
