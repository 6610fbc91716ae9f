"""Pages from templates. A page is one file that fetches nothing: no script, pictures as data URIs, charts as SVG."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import jinja2

from ddpm_jax.evaluation.summary import YARDSTICKS, Column, decimals, number, part
from ddpm_jax.workdir.storage import write_whole

_ENVIRONMENT = jinja2.Environment(
  loader=jinja2.PackageLoader("ddpm_jax.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters["number"] = number
_ENVIRONMENT.globals["part"] = part


class Cell(NamedTuple):
  """A cell of a table. `small`: a remark; `best`: shaded; `colour`: of the curves of its run, 0 if it has none."""

  text: str = ""
  small: str = ""
  best: bool = False
  colour: int = 0


class Table(NamedTuple):
  """A table; the first cell of each row is its heading."""

  head: list[Cell]
  rows: list[list[Cell]]


def write_page(path: pathlib.Path, template: str, **values: object) -> None:
  """Writes or replaces a page. Raises OSError if it cannot be written; an earlier page is then as it was."""
  text = _ENVIRONMENT.get_template(template).render(values)
  write_whole(path, text.encode("utf-8", "replace"))


def measures_table(
  columns: list[Column], headings: dict[object, list[Cell]], yardsticks: list[dict[str, float]]
) -> Table:
  """A row for each result and for each yardstick, a column for each measure.

  Args:
    columns: the measures.
    headings: the first cells of a row, by the key of its result, in order.
    yardsticks: of each column, kind -> value.
  """
  arrows = {"lower": "\N{NO-BREAK SPACE}↓", "higher": "\N{NO-BREAK SPACE}↑", "": ""}
  head = [Cell(c.title + arrows[c.better], "; ".join(filter(None, (c.remark, c.how)))) for c in columns]
  rows = []
  for key, first in headings.items():
    cells = []
    for column in columns:
      digits = decimals(value for value, _ in column.values.values())
      value, spread = column.values.get(key, (None, None))
      text = "" if value is None else f"{value:.{digits}f}"
      small = "" if spread is None else f"± {number(spread, 2)}"
      cells.append(Cell(text, small, column.best is not None and value == column.values[column.best][0]))
    if any(cell.text for cell in cells):
      rows.append([*first, *cells])
  for kind, (_, words) in YARDSTICKS.items():
    if any(kind in others for others in yardsticks):
      rows.append([Cell("", words), *(Cell("", number(o[kind], 3) if kind in o else "") for o in yardsticks)])
  return Table(head, rows)
