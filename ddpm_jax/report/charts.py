"""Line charts as inline SVG: crisp at any size, with text that can be selected, in the colours of the page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ddpm_jax.report.page import Html, join, number, short_exponent, tag

Points = Sequence[tuple[float, float]]

_MOST_POINTS = 1000  # of a curve; more would not be seen
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 8, 34  # around the axes, in units of the drawing
_TEXT = 7  # roughly the width of a digit


@dataclasses.dataclass(frozen=True)
class Series:
  """What one curve shows. `dots`: a faint cloud instead of a line; `marks`: a circle at each point."""

  name: str
  points: Points
  colour: int = 1
  dots: bool = False
  marks: bool = False


def thinned(points: Points, most: int = _MOST_POINTS) -> Points:
  """At most `most` points that look the same: the lowest and the highest of each stretch, so that no peak is lost."""
  if len(points) <= most:
    return points
  kept = []
  stretches = most // 2
  for i in range(stretches):
    stretch = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
    kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
  return kept


def running_mean(points: Points, window: int) -> Points:
  """Each point from the `window`-th on becomes the mean of the last `window` ones."""
  values = np.convolve([y for _, y in points], np.ones(window) / window, mode="valid")
  return [(x, float(y)) for (x, _), y in zip(points[window - 1 :], values, strict=True)]


def ticks(low: float, high: float, log: bool, most: int) -> list[float]:
  """Round numbers between `low` and `high`, at most `most` and where possible at least two."""
  if log:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.floor(math.log10(high)) - math.ceil(math.log10(low)) + 1
    every = max(1, math.ceil(decades / most))
    for digits in ((1,),) if every > 1 else ((1,), (1, 3), (1, 2, 5)):
      found = [float(f"{digit}e{exponent}") for exponent in range(first, last + 1, every) for digit in digits]
      found = [value for value in found if low <= value <= high]
      if 3 <= len(found) <= most:
        return found
    if 2 <= len(found) <= most:
      return found
  span = (high - low) / max(1, most - 1)
  magnitude = 10.0 ** math.floor(math.log10(span))
  step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= span * (1 - 1e-9))
  return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick_text(value: float) -> str:
  if abs(value) >= 1e6:
    return f"{short_exponent(f'{value / 1e6:.6g}')}M"
  return short_exponent(f"{value:,.6g}")


@dataclasses.dataclass(frozen=True)
class _Axis:
  """Values from `low` to `high`, drawn from `start` to `end`."""

  low: float
  high: float
  log: bool
  start: float
  end: float

  def place(self, value: float) -> float:
    low, high = self.low, self.high
    if self.log:
      low, high, value = math.log(low), math.log(high), math.log(value)
    return self.start + (value - low) / (high - low) * (self.end - self.start)


def _axis(values: Sequence[float], log: bool, start: float, end: float, pad: float) -> _Axis:
  """An axis with room for all values. One that is not logarithmic starts at 0 if that is not far off."""
  low, high = min(values), max(values)
  if log:
    factor = (high / low) ** pad if high > low else 2.0
    return _Axis(low / factor, high * factor, True, start, end)
  if high - low <= 1e-9 * max(abs(low), abs(high)):  # all the same
    room = 0.1 * abs(low) or 1.0
    return _Axis(low - room, high + room, False, start, end)
  room = pad * (high - low)
  below = 0.0 if 0 <= low < 0.5 * high else low - room
  return _Axis(max(0.0, below) if low >= 0 else below, high + room, False, start, end)


def _curve(series: Series, across: _Axis, up: _Axis) -> Html:
  places = [(f"{across.place(x):.1f}", f"{up.place(y):.1f}") for x, y in series.points]
  if series.dots:
    return tag("path", d="".join(f"M{x} {y}h0" for x, y in places), class_=f"dots c{series.colour}")
  parts = [tag("path", d="M" + "L".join(f"{x} {y}" for x, y in places), class_=f"curve c{series.colour}")]
  if series.marks or len(places) == 1:
    for (x, y), (left, value) in zip(places, series.points, strict=True):
      hover = tag("title", f"{number(value)} at {number(left)}")
      parts.append(tag("circle", hover, cx=x, cy=y, r=3.2, class_=f"c{series.colour}"))
  return join(parts)


def _frame(across: _Axis, up: _Axis, x_label: str) -> Html:
  """Rules, ticks and their numbers. Numbers along the x axis are left out where they would touch."""
  parts = [tag("path", d=f"M{across.start} {up.start}H{across.end}", class_="rule")]
  for value in ticks(up.low, up.high, up.log, most=max(4, int(up.start - up.end) // 32)):
    y = round(up.place(value), 1)
    parts.append(tag("path", d=f"M{_LEFT} {y}H{across.end}", class_="rule"))
    parts.append(tag("text", _tick_text(value), x=_LEFT - 7, y=y + 4, text_anchor="end"))
  taken = 0.0
  for value in ticks(across.low, across.high, across.log, most=max(4, int(across.end - across.start) // 72)):
    x, text = round(across.place(value), 1), _tick_text(value)
    parts.append(tag("path", d=f"M{x} {up.start}v4", class_="rule"))
    half = len(text) * _TEXT / 2
    if x - half >= taken:
      parts.append(tag("text", text, x=x, y=up.start + 16, text_anchor="middle"))
      taken = x + half + 4
  middle = (across.start + across.end) / 2
  parts.append(tag("text", x_label, x=middle, y=up.start + _BOTTOM - 3, text_anchor="middle"))
  return join(parts)


def line_chart(
  title: str,
  series: Sequence[Series],
  *,
  x_label: str = "updates",
  remark: str = "",
  log_x: bool = False,
  log_y: bool | None = None,
  size: tuple[int, int] = (560, 230),
) -> Html | None:
  """A figure with one or more curves over the same axes, or None if there is no point to draw.

  Args:
    series: whose points must be finite; ones that a logarithmic axis cannot show are left out.
    log_y: by default, if the values are positive and span a factor of ten.
    size: of the drawing; it is scaled to the width that the page has, so this is how large its text looks.
  """
  ys = [y for part in series for _, y in part.points]
  if log_y is None:
    log_y = bool(ys) and min(ys) > 1e-100 and max(ys) >= 10 * min(ys)
  drawn = []
  for part in series:
    points = [(x, y) for x, y in part.points if (x > 1e-100 or not log_x) and (y > 1e-100 or not log_y)]
    if points:
      drawn.append(dataclasses.replace(part, points=thinned(points)))
  if not drawn:
    return None
  xs, ys = ([point[i] for part in drawn for point in part.points] for i in range(2))
  across = _axis(xs, log_x, _LEFT, size[0] - _RIGHT, pad=0.0)
  up = _axis(ys, log_y, size[1] - _BOTTOM, _TOP, pad=0.06)
  keys = []
  if len(drawn) > 1:
    for part in drawn:
      swatch = tag("i", class_=f"c{part.colour}{' faint' if part.dots else ''}")
      keys.append(tag("span", swatch, part.name, class_="key"))
  (first_x, first), (last_x, last) = drawn[-1].points[0], drawn[-1].points[-1]
  said = f"{title}: {number(first)} at {number(first_x)}, {number(last)} at {number(last_x)} {x_label}"
  drawing = tag(
    "svg",
    _frame(across, up, x_label),
    *(_curve(part, across, up) for part in drawn),
    viewBox=f"0 0 {size[0]} {size[1]}",
    role="img",
    aria_label=said,
  )
  caption = tag("figcaption", tag("b", title), f" {remark}" if remark else None, *keys)
  return tag("figure", caption, drawing, class_="card")
