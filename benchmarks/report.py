"""What was measured, as an aligned table and as JSON."""

from __future__ import annotations

import datetime
import json
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

from benchmarks import hardware
from benchmarks.alternate import Block, Spread
from ddpm_jax.errors import UserError

WIDTH = 110


def number(value: float) -> str:
  """Three significant digits, without an exponent."""
  if value == 0:
    return "0"
  digits = 2 - int(f"{abs(value):e}".partition("e")[2])
  return f"{round(value, digits):,.{max(0, digits)}f}"


def with_spread(values: Spread, scale: float = 1.0) -> str:
  """'median (lower quartile to upper quartile)'."""
  low, median, high = (number(value * scale) for value in values)
  return f"{median} ({low} to {high})"


def heading(text: str) -> str:
  """What was measured, in lines of at most WIDTH."""
  return textwrap.fill(text, WIDTH, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Lines of aligned columns, the first to the left, the others to the right; at most WIDTH wide.

  What is too wide loses the end of its first column.
  """
  cells = [list(map(str, row)) for row in (header, *rows)]
  widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
  widths[0] = max(8, min(widths[0], WIDTH - sum(width + 2 for width in widths[1:])))
  lines = []
  for row in cells:
    first = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 1] + "…"
    others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    lines.append("  ".join([first.ljust(widths[0]), *others]).rstrip())
  return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def document(
  benchmark: str, settings: dict[str, Any], facts: dict[str, Any], blocks: Sequence[Block], results: dict[str, Any]
) -> dict[str, Any]:
  """What goes into the JSON file.

  Args:
    benchmark: its name.
    settings: for each setting its flags and environment.
    facts: for each setting what its worker said of itself: devices, versions, compilation, memory.
    blocks: every single measurement, in order.
    results: what the table says.
  """
  return {
    "benchmark": benchmark,
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "machine": hardware.describe(),
    "settings": settings,
    "facts": facts,
    "results": results,
    "measurements": [block._asdict() for block in blocks],
  }


def machine() -> str:
  """The machine in a line, and how busy it is."""
  about = hardware.describe()
  return f"{about['cpu']}, {about['cores']} cores; load in the last minute {about['load']}"


def check_writable(path: str) -> None:
  """Raises UserError if the folder of a file that will be written is not there: before hours of measuring."""
  if path and not pathlib.Path(path).absolute().parent.is_dir():
    raise UserError(f"json: the folder of {path!r} does not exist; make it first")


def write_json(path: str, content: dict[str, Any]) -> None:
  """Writes the file, if there is a path. Raises UserError if it cannot be written."""
  if not path:
    return
  try:
    pathlib.Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
  except OSError as error:
    raise UserError(f"json: cannot write {path!r} ({error.strerror}); name another file") from error
