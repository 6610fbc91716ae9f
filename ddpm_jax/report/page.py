"""The parts that a run's report is put together from: HTML elements, tables, pictures, the page around them.

Text becomes HTML in one place, `tag`, which escapes whatever is not an element already: names of data sets, paths and
notes are text of users. The page fetches nothing: pictures are data URIs, there is no script, and its own
Content-Security-Policy forbids both to anything that would slip in.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence

from PIL import Image

VOID = frozenset({"meta", "img"})  # elements without an end tag
COLOURS = 8  # of curves, c1 to c8
_EMBED_AS_IS = 1 << 20  # bytes of a picture; a larger one is embedded as a JPEG of at most so many pixels a side
_LONGEST_SIDE = {True: 1600, False: 640}  # if it is shown large, and if not
_LARGEST_ANIMATION = 4 << 20  # bytes
_ROOM = 1150, 600  # pixels; a large picture is enlarged by a whole factor as far as this has room
_WIDE = 640  # pixels; what is at least so wide is not made to fit a narrow screen, where it could not be made out

_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #ffffff; --ink: #1c2230; --soft: #626b7a; --line: #e2e4e8;
  --mark: #e5eefc; --one: #2360c5; --two: #c05a14; --three: #23805a; --four: #8a4bb0; --five: #b8295a;
  --six: #0e7f94; --seven: #7a6412; --eight: #5b6472; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12151a; --card: #1a1e25; --ink: #e5e8ed; --soft: #9ba4b3; --line: #2d333d; --mark: #21395f;
    --one: #7fabf8; --two: #f2a660; --three: #68cfa0; --four: #cf9af0; --five: #f58bb0;
    --six: #5fd0e2; --seven: #dcc35a; --eight: #b3bcc9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 44px 0 10px; }
h3 { font-size: 15px; margin: 26px 0 8px; }
p { max-width: 84ch; margin: 6px 0 12px; overflow-wrap: anywhere; }
p.lead, .soft, small { color: var(--soft); }
small { font-size: 12px; font-weight: 400; }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)); }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); }
.grid.tiles { grid-template-columns: repeat(auto-fit, minmax(min(45%, 200px), 1fr)); margin: 22px 0 8px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; margin: 0;
  min-width: 0; }
.tile b { display: block; font-size: 25px; line-height: 1.25; font-weight: 620; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile span { display: block; font-size: 13px; color: var(--soft); }
.notes { border-left: 4px solid var(--two); }
.notes ul { margin: 4px 0 0; padding-left: 18px; overflow-wrap: anywhere; }
figcaption { font-size: 13px; color: var(--soft); margin-bottom: 6px; }
figcaption b { color: var(--ink); font-weight: 620; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 4px; background: #ffffff; }
figure.large { width: fit-content; max-width: 100%; }
.row { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
.card + .grid, .row + .grid, .grid + .grid { margin-top: 14px; }
img.pixel { image-rendering: pixelated; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft);
  font-variant-numeric: tabular-nums; }
svg .rule { stroke: var(--line); stroke-width: 1; fill: none; }
svg .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .dots { fill: none; stroke-width: 3.4; stroke-linecap: round; opacity: 0.4; }
svg .c1 { stroke: var(--one); } svg .c2 { stroke: var(--two); }
svg .c3 { stroke: var(--three); } svg .c4 { stroke: var(--four); }
svg .c5 { stroke: var(--five); } svg .c6 { stroke: var(--six); }
svg .c7 { stroke: var(--seven); } svg .c8 { stroke: var(--eight); }
svg circle { fill: var(--card); stroke-width: 1.8; }
.key { white-space: nowrap; margin-left: 10px; }
.key i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; }
.key i.c1 { background: var(--one); } .key i.c2 { background: var(--two); }
.key i.c3 { background: var(--three); } .key i.c4 { background: var(--four); }
.key i.c5 { background: var(--five); } .key i.c6 { background: var(--six); }
.key i.c7 { background: var(--seven); } .key i.c8 { background: var(--eight); }
th > .key, figcaption > .key:first-child { margin-left: 0; }
.key i.faint { opacity: 0.45; }
.scroll { overflow-x: auto; padding: 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
.scroll table { width: 100%; }
th, td { padding: 6px 9px; text-align: right; vertical-align: baseline; border-top: 1px solid var(--line);
  white-space: nowrap; }
thead th { border-top: 0; white-space: normal; font-weight: 620; vertical-align: bottom; }
thead small { display: block; }
tbody th { font-weight: 620; }
th:first-child, td:first-child { text-align: left; padding-left: 14px; }
th:last-child, td:last-child { padding-right: 14px; }
td.best { background: var(--mark); font-weight: 650; }
.settings { columns: 3 330px; column-gap: 14px; }
.settings .card { break-inside: avoid; margin-bottom: 14px; padding: 10px 0 4px; }
.settings h3 { margin: 0 14px 6px; }
.settings table { width: 100%; font-size: 13px; table-layout: fixed; }
.settings td { padding: 3px 14px; white-space: normal; overflow-wrap: anywhere; }
.settings tr.changed td { background: var(--mark); }
.settings small { display: block; }
pre { margin: 8px 0; padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
summary { cursor: pointer; color: var(--soft); }
@media (max-width: 640px) {
  main { padding: 20px 12px 48px; }
  .card { padding: 10px 12px; }
  .scroll, .settings .card { padding: 0; }
  .settings h3 { margin-top: 10px; }
  .pan { overflow-x: auto; }
  .pan img { width: 180%; max-width: none; } }
@media print { body { background: #ffffff; } .card, tr { break-inside: avoid; } }
"""


class Html(str):
  """Text that is HTML already, so that it is not escaped again."""

  __slots__ = ()


def join(parts: Iterable[str | None], between: str = "") -> Html:
  """One piece of HTML of several; text among them is escaped, None left out."""
  return Html(between.join(part if isinstance(part, Html) else html.escape(part) for part in parts if part is not None))


def tag(name: str, /, *children: str | None, **attributes: object) -> Html:
  """An element. `class_` is written class, `stroke_width` stroke-width; attributes that are None are left out."""
  written = "".join(
    f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
    for key, value in attributes.items()
    if value is not None
  )
  return Html(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{join(children)}</{name}>")


def finite(value: object) -> float | None:
  """A number out of a file, or None for whatever else stands there; what no chart could show counts as that."""
  if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
    return None
  return float(value) if abs(value) > 1e-100 else 0.0


def number(value: float, digits: int = 4) -> str:
  """A number as text: whole ones in full, others to some significant digits."""
  if value == int(value) and abs(value) < 1e15:
    return f"{int(value):,}"
  if abs(value) >= 10**digits:
    return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.{digits}g}"
  return short_exponent(f"{value:.{digits}g}")


def short_exponent(text: str) -> str:
  """1e-05 as 1e-5."""
  for long, short in (("e-0", "e-"), ("e+0", "e"), ("e+", "e")):
    text = text.replace(long, short)
  return text


def decimals(values: Iterable[float]) -> int:
  """How many digits after the point a column of numbers takes, so that its largest has four that matter."""
  largest = max((abs(value) for value in values), default=0.0)
  return min(7, max(0, 3 - math.floor(math.log10(largest)))) if largest else 1


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
  """A table; each row's first cell is its heading. A cell may be a `td` of its own."""
  body = [
    tag(
      "tr", tag("th", row[0], scope="row"), *(cell if cell.startswith("<td") else tag("td", cell) for cell in row[1:])
    )
    for row in rows
  ]
  heading = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
  return tag("div", tag("table", heading, tag("tbody", *body)), class_="card scroll")


def tile(label: str, value: str, detail: str = "") -> Html:
  """A number that matters, with its name above and a remark below."""
  return tag("div", tag("span", label), tag("b", value), tag("span", detail), class_="card tile")


def picture(data: bytes, alt: str, caption: str, large: bool) -> Html:
  """A picture as a figure that carries its own data.

  Raises:
    ValueError: if `data` is no PNG, GIF or JPEG, is damaged, or an animation too large for a page.
  """
  try:
    with Image.open(io.BytesIO(data), formats=("PNG", "GIF", "JPEG")) as image:
      kind, (width, height) = image.format, image.size
      if len(data) > _EMBED_AS_IS and kind != "GIF":
        image.thumbnail((_LONGEST_SIDE[large], _LONGEST_SIDE[large]))
        smaller = io.BytesIO()
        image.convert("RGB").save(smaller, format="JPEG", quality=88)
        kind, data, (width, height) = "JPEG", smaller.getvalue(), image.size
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f"is no picture that can be read ({error})") from None
  if len(data) > _LARGEST_ANIMATION:
    raise ValueError(f"has {len(data) / 2**20:.1f} MiB, too much for a page")
  times = max(1, min(_ROOM[0] // width, _ROOM[1] // height)) if large else 1
  source = f"data:image/{str(kind).lower()};base64,{base64.b64encode(data).decode('ascii')}"
  shown = tag(
    "img",
    src=source,
    alt=alt,
    width=width * times,
    height=height * times,
    class_="pixel" if large and kind != "JPEG" else None,
  )
  if width >= _WIDE:
    shown = tag("div", shown, class_="pan")
  return tag("figure", tag("figcaption", caption), shown, class_="card large" if large else "card")


def document(title: str, body: Iterable[str | None]) -> Html:
  """The whole page."""
  policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
  head = tag(
    "head",
    tag("meta", charset="utf-8"),
    tag("meta", http_equiv="Content-Security-Policy", content=policy),
    tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
    tag("title", title),
    tag("style", Html(_STYLE)),
  )
  page = tag("html", head, "\n", tag("body", tag("main", join(body, "\n"))), lang="en")
  return Html(f"<!DOCTYPE html>\n{page}\n")
