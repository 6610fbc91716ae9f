"""Keeps what libraries print apart from what a person can use: a failure is one line of ours, not a page of theirs."""

from __future__ import annotations

import logging
import sys

from absl import logging as absl_logging


def quiet() -> None:
  """Silences what is told elsewhere. `--verbosity`, if given, is for whoever wants to see the libraries' own words."""
  absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs a failed save as some 500 lines; `checkpoint.py` tells it
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # the rest of such a save, never awaited
  usual = sys.unraisablehook

  def hook(unraisable: sys.UnraisableHookArgs) -> None:
    # TensorStore, for each array of such a save.
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
      usual(unraisable)

  sys.unraisablehook = hook
