"""Memory in pages of 2 MiB that stays, on Linux: for the arrays of CPUs.

XLA asks the system for hundreds of megabytes in every step and gives them back after it. In pages of 4 KiB the system
then spends a third of the time on filling in pages, and in pages of 2 MiB still a tenth, unless memory that is free
stays with the process; `docs/results/speed.md` has what either brings.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import re
import sys

HUGE_PAGES = "glibc.malloc.hugetlb"
KEEP_FREED = {  # bytes: map nothing apart, give nothing back, ask for more at a time
  "glibc.malloc.mmap_threshold": 2**32,
  "glibc.malloc.trim_threshold": 2**36,
  "glibc.malloc.top_pad": 2**26,
}
# Of Python's command line: options of one letter may stand together.
_RUNS_MODULE, _RUNS_TEXT = re.compile("-[a-zA-VY-Z]*?m(.*)"), re.compile("-[a-zA-VY-Z]*?c|-$")
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
_SCRIPT = "ddpm"
_MODES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages(module: str) -> None:
  """Starts this command anew in the same process, once, where glibc can ask for huge pages and does not yet.

  glibc reads that variable only when a process begins. What the user has set stays: GLIBC_TUNABLES with
  glibc.malloc.hugetlb=0 is without huge pages. Nothing may have been printed before.

  Args:
    module: is restarted if it is what `python -m` was asked to run, or if the process is the console command `ddpm`.
      In a process that is somebody else's, such as an interactive session, a debugger or a script that calls `runpy`,
      nothing happens.
  """
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  if HUGE_PAGES in tunables or not _is_program(module) or not _on_request():
    return
  ours = [f"{name}={value}" for name, value in {HUGE_PAGES: 1, **_kept()}.items() if name not in tunables]
  os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, *ours]))
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_program(module: str) -> bool:
  """Whether this process was started as `python [OPTIONS] -m module ...` or as `ddpm ...`, and ends with it."""
  if sys.flags.inspect or not sys.executable:  # `python -i`, PYTHONINSPECT
    return False
  words = iter(sys.orig_argv[1:])
  for word in words:
    if found := _RUNS_MODULE.fullmatch(word):
      return (found[1] or next(words, "")) == module
    if word in _WITH_VALUE:
      next(words, None)
    elif not word.startswith("-") or _RUNS_TEXT.match(word):
      return os.path.basename(word) == _SCRIPT  # the console command is a script
  return False


def _kept() -> dict[str, int]:
  """`KEEP_FREED` where it was seen to help: with jaxlib 0.12; 0.10 is a little slower with it."""
  try:
    major, minor, *_ = importlib.metadata.version("jaxlib").split(".")
  except importlib.metadata.PackageNotFoundError:
    return {}  # a process of the benchmarks, for PyTorch
  return KEEP_FREED if (int(major), int(minor)) >= (0, 12) else {}


def _on_request() -> bool:
  """Whether the system gives huge pages to who asks for them, and to nobody else, and glibc (from 2.35) can ask."""
  try:
    _, version = str(os.confstr("CS_GNU_LIBC_VERSION")).split()
    return tuple(map(int, version.split(".")[:2])) >= (2, 35) and "[madvise]" in _MODES.read_text()
  except (AttributeError, OSError, ValueError):
    return False  # no Linux, or another C library
