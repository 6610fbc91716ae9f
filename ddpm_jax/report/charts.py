"""Line charts by Matplotlib: inline SVG in the colours of the page, and the loss as a PNG file."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ddpm_jax.evaluation.summary import number

Points = Sequence[tuple[float, float]]

COLOURS = 8  # of curves
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 8, 36  # margins around the axes, in units of the drawing
_STYLE: Any = {
  "svg.fonttype": "none",
  "svg.hashsalt": "ddpm_jax",
  "path.simplify": True,
  "path.simplify_threshold": 1.0,
}
# Variables of the page's style, which depend on light or dark, and the colours that stand for them while drawing.
_OF_PAGE = {"soft": "#00fe01", "line": "#00fe02", "card": "#00fe03"} | {f"c{i}": f"#00ff0{i}" for i in range(1, 9)}
_OF_PNG = {"soft": "#444444", "line": "#dddddd", "card": "#ffffff", "c1": "#1f77b4", "c2": "#c05a14"}


class Series(NamedTuple):
  """One curve.

  Attributes:
    name: of the curve.
    points: of it, finite.
    colour: its number.
    faint: thin and pale.
    marks: a circle at each point, which shows its value on hovering.
    labels: a text beside each point, or none.
  """

  name: str
  points: Points
  colour: int = 1
  faint: bool = False
  marks: bool = False
  labels: Sequence[str] = ()


class Chart(NamedTuple):
  """A drawing, and what the page says about it."""

  title: str
  remark: str
  series: list[Series]
  svg: Markup


def smoothed(name: str, points: Points) -> list[Series]:
  """A noisy metric as it was logged, faint, and its moving average over about a twentieth of the points."""
  window = averaging_window(len(points))
  if window == 1:
    return [Series(name, points)]
  return [Series("logged", points, faint=True), Series(f"mean of {window} logged", running_mean(points))]


def averaging_window(points: int) -> int:
  """The number of points over which a noisy metric of `points` points is averaged."""
  return max(1, points // 20)


def running_mean(points: Points) -> Points:
  """The means over `averaging_window`, each at the last of its points."""
  window = averaging_window(len(points))
  values = np.convolve([y for _, y in points], np.ones(window) / window, mode="valid") if points else ()
  return [(x, float(y)) for (x, _), y in zip(points[window - 1 :], values, strict=True)]


def line_chart(
  title: str,
  series: Sequence[Series],
  *,
  x_label: str = "training steps",
  remark: str = "",
  log_x: bool = False,
  log_y: bool | None = None,
  size: tuple[int, int] = (480, 210),
) -> Chart | None:
  """A chart of curves over the same axes; None if there is no point to draw.

  Args:
    title: above it.
    series: curves; their points are finite. Points that a logarithmic axis cannot show are left out.
    x_label: below it.
    remark: beside the title.
    log_x: whether the x axis is logarithmic.
    log_y: the same of the y axis; None: if the values are positive and span a factor of ten.
    size: width and height of the drawing, which the page scales: the smaller, the larger the text.
  """
  ys = [y for part in series for _, y in part.points]
  if log_y is None:
    log_y = bool(ys) and min(ys) > 1e-100 and max(ys) >= 10 * min(ys)
  drawn = [
    part._replace(points=[(x, y) for x, y in part.points if (x > 0 or not log_x) and (y > 0 or not log_y)])
    for part in series
  ]
  drawn = [part for part in drawn if part.points]
  if not drawn:
    return None
  (first_x, first), (last_x, last) = drawn[-1].points[0], drawn[-1].points[-1]
  label = f"{title}: {number(first)} at {number(first_x)}, {number(last)} at {number(last_x)} {x_label}"
  start = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(*size, label)
  return Chart(title, remark, drawn, start + _svg(drawn, x_label, log_x, log_y, size) + Markup("</svg>"))


def _svg(drawn: Sequence[Series], x_label: str, log_x: bool, log_y: bool, size: tuple[int, int]) -> Markup:
  """The elements of a drawing."""
  file = io.StringIO()
  with matplotlib.rc_context(_STYLE):
    figure = _figure(drawn, x_label, log_x, log_y, size, _OF_PAGE)
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
  svg = file.getvalue().partition("</defs>")[2].removesuffix("</svg>\n")  # after a style for all of the page
  # Names and fonts that nothing refers to, and digits that nobody sees.
  svg = re.sub(r' id="[a-z0-9.]+_\d+"| font-family: [^;]*;', "", svg)
  svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]).replace("\n", ""), svg)
  for name, colour in _OF_PAGE.items():
    svg = svg.replace(colour, f"var(--{name})")
  hover = (
    f"{number(y)} at {number(x)}" for part in drawn if part.marks or len(part.points) == 1 for x, y in part.points
  )
  svg = re.sub(r"<defs>.*?</defs>", "", svg, flags=re.DOTALL)  # what a circle is
  svg = re.sub(
    r'<use \S* x="([^"]*)" y="([^"]*)" style="([^"]*)"/>',
    lambda mark: (
      f'<circle cx="{mark[1]}" cy="{mark[2]}" r="2.8" style="{mark[3]}"><title>{next(hover)}</title></circle>'
    ),
    svg,
  )
  return Markup(svg)


def loss_png(points: Points) -> bytes:
  """The losses over the training steps, and their moving average, as a PNG file.

  A logged loss is noisy, above all because some timesteps are much harder than others. The axis is logarithmic unless
  a loss is not positive, as that of an autoencoder beside its discriminator may be.
  """
  log_y = all(y > 0 for _, y in points)
  return chart_png("loss", smoothed("logged", points), "training steps", log_y=log_y)


def chart_png(title: str, series: Sequence[Series], x_label: str, *, log_y: bool) -> bytes:
  """A chart as a PNG file, with the title in its legend. `series`: of colours 1 and 2."""
  file = io.BytesIO()
  with matplotlib.rc_context(_STYLE):
    figure = _figure(series, x_label, False, log_y, (560, 280), _OF_PNG)
    if series[0].points:
      figure.axes[0].legend(title=title)
    FigureCanvasAgg(figure)  # draws without a screen, whatever backend the environment names
    figure.savefig(file, format="png", dpi=108)
  return file.getvalue()


def _figure(
  series: Sequence[Series], x_label: str, log_x: bool, log_y: bool, size: tuple[int, int], colours: Mapping[str, str]
) -> Figure:
  width, height = size
  figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor=colours["card"])
  room = _LEFT / width, _BOTTOM / height, 1 - (_LEFT + _RIGHT) / width, 1 - (_TOP + _BOTTOM) / height
  labelled = any(part.labels for part in series)  # their text stands at the right of the points
  axes = figure.add_axes(room, frame_on=False, xmargin=0.06 if labelled else 0, ymargin=0.1 if labelled else 0.06)
  for part in series:
    axes.plot(
      *zip(*part.points, strict=True),
      label=part.name,
      color=colours[f"c{part.colour}"],
      linewidth=0.8 if part.faint else 1.8,
      alpha=0.45 if part.faint else None,
      marker="o" if part.marks or len(part.points) == 1 else None,
      markersize=5,
      markeredgewidth=1.8,
      markerfacecolor=colours["card"],
      clip_on=False,
    )
    for label, point in zip(part.labels, part.points, strict=False):
      style: Any = {"xytext": (6, 4), "textcoords": "offset points", "size": 10, "color": colours[f"c{part.colour}"]}
      axes.annotate(label, point, annotation_clip=False, **style)
  axes.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
  low, high = axes.dataLim.intervaly
  if not log_y and 0 <= low < 0.5 * high:
    axes.set_ylim(bottom=0)
  low, high = axes.dataLim.intervalx
  if not log_x and 0 <= low < 0.5 * high:
    axes.set_xlim(left=0)
  _ticks(axes.xaxis, log_x, max(3, width // 85))
  _ticks(axes.yaxis, log_y, max(3, height // 38))
  axes.tick_params(length=0, pad=6, labelsize=11, labelcolor=colours["soft"], grid_clip_on=False)
  axes.grid(axis="y", color=colours["line"])
  figure.text(0.5 + (_LEFT - _RIGHT) / width / 2, 4 / height, x_label, size=11, color=colours["soft"], ha="center")
  return figure


def _ticks(axis: Axis, log: bool, most: int) -> None:
  """Round numbers, written as on the rest of the page; more than one in a decade where the axis has few decades."""
  if log:
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 4 else (1,)))
    axis.set_minor_locator(NullLocator())
  else:
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]))
  axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 6)))
