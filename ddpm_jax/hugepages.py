"""Memory in pages of 2 MiB, on Linux: for the arrays of CPUs.

XLA asks the system for hundreds of megabytes in every update and gives them back after it. In pages of 4 KiB the system
then spends a third of the time on filling in pages; `benchmarks/README.md` has what it brings.
"""

from __future__ import annotations

import os
import pathlib
import sys

_TUNABLE = "glibc.malloc.hugetlb"
_MODES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
  """Starts this command anew in the same process, once, where glibc can ask for huge pages and has not been told to.

  glibc reads that variable only when a process begins. What the user has set stays: GLIBC_TUNABLES with
  glibc.malloc.hugetlb=0 is without huge pages.
  """
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  if _TUNABLE in tunables or not _on_request() or not sys.orig_argv:
    return
  os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{_TUNABLE}=1"]))
  sys.stdout.flush()
  sys.stderr.flush()
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _on_request() -> bool:
  """Whether the system gives huge pages to who asks for them, and to nobody else, and glibc (from 2.35) can ask."""
  try:
    _, version = str(os.confstr("CS_GNU_LIBC_VERSION")).split()
    return tuple(map(int, version.split(".")[:2])) >= (2, 35) and "[madvise]" in _MODES.read_text()
  except (AttributeError, OSError, ValueError):
    return False  # no Linux, or another C library
