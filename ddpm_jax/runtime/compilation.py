"""What is arranged with XLA before it compiles: where compiled programs are kept, and its flags that matter here."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import warnings

from ddpm_jax.errors import UserError
from ddpm_jax.runtime.paths import cache_folder, expanded

_USUAL_GARBAGE = gc.get_threshold()
MAX_CACHE_BYTES = 2 * 2**30  # of the folder of `auto`, at each start

# What makes programs faster on CPUs, by version of jaxlib: docs/results/speed.md has what it brings. XLA ends the
# process at a flag that it does not know, so only what was tried is here.
_YNNPACK = {
  # Products, element-wise operations and reductions by the library YNNPACK, as convolutions.
  "xla_cpu_experimental_ynn_fusion_type": "individual_convolution,individual_dot,dot,eltwise,reduce",
}
_ONEDNN = {
  # Convolutions and products by the library oneDNN, which jaxlib has for x86-64; only reductions by YNNPACK.
  "xla_cpu_use_onednn": "true",
  "xla_cpu_experimental_onednn_custom_call": "true",
  "xla_cpu_experimental_ynn_fusion_type": "reduce",
}
_NOT_KEPT = ("xla_cpu_use_onednn", "xla_cpu_experimental_onednn_custom_call")  # XLA cannot write such a program down
_CPU_FLAGS: dict[tuple[int, ...], dict[str, str]] = {(0, 10): _YNNPACK, (0, 11): _ONEDNN, (0, 12): _ONEDNN}
# Where one CPU stands for several devices: else some may wait in one collective and others in another, for ever.
_SIMULATED = "xla_force_host_platform_device_count"
_IN_ONE_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def set_xla_flags() -> None:
  """Adds to XLA_FLAGS what makes programs faster on CPUs. Before JAX starts; what the user has set stays."""
  keep_simulated_devices_in_step()
  ours = _CPU_FLAGS.get(_version_of_jaxlib(), {}) if platform.machine() in ("x86_64", "AMD64") else {}
  _add_unless_any_is_set(ours)


def keep_simulated_devices_in_step() -> None:
  """Adds to XLA_FLAGS what jaxlib 0.12 needs where they simulate devices. Before JAX starts."""
  if _version_of_jaxlib() == (0, 12) and _SIMULATED in os.environ.get("XLA_FLAGS", ""):
    _add_unless_any_is_set(_IN_ONE_ORDER)


def options_to_be_kept(kind: str) -> dict[str, bool]:
  """Compiler options with which a program is kept for the next start, where the flags of XLA keep it from that.

  For what computes less than it takes to compile. kind: of the devices, JAX's name of their platform.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  return {name: False for name in _NOT_KEPT if kind == "cpu" and f"--{name}=true" in flags}


def _version_of_jaxlib() -> tuple[int, ...]:
  return tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])


def _add_unless_any_is_set(ours: dict[str, str]) -> None:
  flags = os.environ.get("XLA_FLAGS", "")
  if not any(name in flags for name in ours):
    os.environ["XLA_FLAGS"] = " ".join([flags, *(f"--{name}={value}" for name, value in ours.items())]).strip()


def relax_gc() -> None:
  """Importing and tracing make many objects, which stay: Python would look for garbage among them again and again."""
  gc.set_threshold(100_000)


def look_for_garbage_as_usual() -> None:
  """Once the step is compiled."""
  gc.set_threshold(*_USUAL_GARBAGE)


def enable_compilation_cache(where: str) -> None:
  """Lets JAX keep what it compiles, so that a later process with the same program need not compile it again.

  A damaged entry is noticed (entries are compressed with a checksum); its program is then compiled again, and the
  folder of `auto` emptied, as JAX would not write that entry anew. A line on standard error says so, and wherever else
  programs are not kept that were to be.

  Args:
    where: 'off'; a folder; or 'auto': JAX_COMPILATION_CACHE_DIR if it is set, else `default_folder()`, brought
      below `MAX_CACHE_BYTES` first. Without a folder that can be written, 'auto' is 'off'.

  Raises:
    UserError: if the folder that was named cannot be written.
  """
  import jax

  if where == "off":
    jax.config.update("jax_enable_compilation_cache", False)
    return
  if where == "auto" and (chosen := os.environ.get("JAX_COMPILATION_CACHE_DIR")):
    folder = pathlib.Path(expanded("JAX_COMPILATION_CACHE_DIR", chosen))
    _hear_warnings(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return  # as the user has set it, with its limits
  folder = default_folder() if where == "auto" else pathlib.Path(expanded("compilation_cache", where))
  if folder is None:
    jax.config.update("jax_enable_compilation_cache", False)
    _tell("none, as this user has no home folder; --compilation_cache names a folder")
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
      raise PermissionError(13, "Permission denied", str(folder))
  except OSError as error:
    if where == "auto":
      jax.config.update("jax_enable_compilation_cache", False)
      _tell(f"none, as {folder} cannot be written ({error.strerror}); --compilation_cache names another folder")
      return
    raise UserError(
      f"compilation_cache: cannot write to {folder} ({error.strerror}); name another folder, or 'off'"
    ) from error
  if where == "auto":
    _prune(folder)
  _hear_warnings(folder, ours=where == "auto")
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small ones take seconds together


def default_folder() -> pathlib.Path | None:
  """MACHINE in the folder of the program's caches; None where there is none.

  A program for a CPU uses what that CPU can do, and divides its work among the cores that it has; a home directory may
  be shared by machines of several kinds. MACHINE tells them apart.
  """
  folder = cache_folder()
  return folder and folder / _machine()


def cores() -> int:
  """Those that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine() -> str:
  """A short digest of the kind of CPU, what it can do, and the number of cores that this process may use."""
  facts = [platform.machine(), platform.processor(), str(cores())]
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []  # no Linux
  for name in ("model name", "flags", "Features"):
    facts += [line for line in lines if line.startswith(name)][:1]
  return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _programs(folder: pathlib.Path) -> list[pathlib.Path]:
  """JAX's entries. XLA for GPUs has a folder of its own beside them."""
  return list(folder.glob("*-cache"))


def _prune(folder: pathlib.Path) -> None:
  """Removes the programs that were not used for longest, until the others take less than half of what is allowed."""
  entries = []
  for path in _programs(folder):
    try:
      entries.append((path.stat(), path))
    except FileNotFoundError:
      continue  # another process has removed it
  total = sum(stat.st_size for stat, _ in entries)
  if total <= MAX_CACHE_BYTES:
    return
  entries.sort(key=lambda entry: max(entry[0].st_atime, entry[0].st_mtime))
  left, removed = total, 0
  while left > MAX_CACHE_BYTES // 2:
    stat, path = entries[removed]
    path.unlink(missing_ok=True)
    left, removed = left - stat.st_size, removed + 1
  _tell(f"{removed} of {len(entries)} programs removed, as those in {folder} took {total / 2**30:.2g} GiB")


def _hear_warnings(folder: pathlib.Path, *, ours: bool = False) -> None:
  """Says in one line what JAX warns of in two, and no more than once.

  A program that XLA cannot write down is no news: with oneDNN that is so at every start. When JAX cannot read an entry
  of our own folder, all of them are removed, as it does not say which one.
  """
  usual, told = warnings.showwarning, set()

  def tell(text: str) -> None:
    if text not in told:
      told.add(text)
      _tell(text)

  def show(message, category, *where, **more) -> None:
    text = " ".join(str(message).split())
    reason = text.rpartition("': ")[2]
    if text.startswith("Error reading persistent compilation cache entry"):
      for path in _programs(folder) if ours else ():
        path.unlink(missing_ok=True)
      what = "all are removed" if ours else "empty that folder"
      tell(f"a program in {folder} cannot be read and is compiled again ({reason}); {what}")
    elif not text.startswith("Error writing persistent compilation cache entry"):
      usual(message, category, *where, **more)
    elif "Errno" in reason:
      tell(f"programs cannot be kept in {folder} ({reason})")

  warnings.showwarning = show


def _tell(text: str) -> None:
  from ddpm_jax.runtime import console  # with absl, which a worker of the benchmarks has not

  console.note(f"compilation cache: {text}")
