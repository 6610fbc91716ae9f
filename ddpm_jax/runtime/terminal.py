"""Keeps what libraries print apart from what a person can use: a failure is one line of ours, not a page of theirs."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator

from absl import logging as absl_logging


def quiet() -> None:
  """Silences what this package reports itself. With `--verbosity` the libraries' own messages are shown."""
  # Orbax logs a failed save as some 500 lines; `checkpoint.py` reports it.
  absl_logging.set_verbosity(absl_logging.FATAL)
  # The rest of a save or a restore that fails: one message for each array, never awaited.
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
  usual = sys.unraisablehook

  def hook(unraisable: sys.UnraisableHookArgs) -> None:
    closed = isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
    if not (closed or inspect.iscoroutine(unraisable.object)):
      usual(unraisable)

  sys.unraisablehook = hook


@contextlib.contextmanager
def errors_alone() -> Iterator[None]:
  """Libraries log nothing below an error meanwhile, in a process that is somebody else's: Orbax warns as it reads."""
  before = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.ERROR)
  try:
    yield
  finally:
    absl_logging.set_verbosity(before)
