"""Several runs on one page: `python -m ddpm_jax.compare RUN RUN ... [--out=compare.html]`.

RUN is a workdir. The page has loss curves over training steps, images and seconds, sample grids beside each other,
measures, and the settings that differ. It reads files of the workdirs alone, and needs no JAX. Exit code 2: one line on
standard error says what is wrong.
"""

from __future__ import annotations

import argparse
import sys

from ddpm_jax.errors import UserError
from ddpm_jax.report.comparison import write_comparison
from ddpm_jax.runtime import console, paths


def main() -> int:
  """Returns the exit code."""
  parser = argparse.ArgumentParser(
    prog=paths.command(module="ddpm_jax.compare"), description="Makes one page of several runs.", allow_abbrev=False
  )
  parser.add_argument("runs", nargs="*", metavar="RUN", help="workdirs, two or more")
  parser.add_argument(
    "--out", default="compare.html", help="the page (default: %(default)s); an earlier one is replaced"
  )
  arguments = parser.parse_args()
  try:
    out = paths.absolute("out", arguments.out, "name a file on disk")
    runs = [paths.absolute("RUN", text, "mount the storage and name the folder") for text in arguments.runs]
    write_comparison(runs, out)
  except UserError as error:
    console.error(str(error))
    return 2
  console.say(f"done: {out}")
  return 0


if __name__ == "__main__":
  console.protect_streams()
  sys.exit(main())
