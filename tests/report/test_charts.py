"""Curves go where the numbers go, in the page and in loss.png."""

import io
import json
import math
import os
import re

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.report.charts import Series, line_chart, loss_png, running_mean
from ddpm_jax.report.report import write_report


def places(svg) -> np.ndarray:
  """The points of the first curve, [N, 2], counted from the lower left."""
  path = re.search(r'd="([^"]*)" style="fill: none; stroke: var\(--c1\)', svg)[1]
  x, y = np.array(re.findall(r"[-\d.]+", path), float).reshape(-1, 2).T
  return np.stack([x, -y], 1)


def labels(chart, axis) -> list[float]:
  """The numbers along an axis."""
  anchor = {"x": "middle", "y": "end"}[axis]
  found = re.findall(rf"text-anchor: {anchor};[^>]*>([^<]*)<", chart.svg)
  return [float(text.replace(",", "")) for text in found if text != "training steps"]


@pytest.mark.parametrize("log", [False, True])
def test_a_curve_goes_where_the_numbers_go(log):
  chart = line_chart("title", [Series("a", [(10.0, 1.0), (20.0, 10.0), (40.0, 100.0)])], log_y=log)
  (x0, y0), (x1, y1), (x2, y2) = places(chart.svg)
  assert x2 - x1 == pytest.approx(2 * (x1 - x0), abs=0.3)
  assert y2 - y1 == pytest.approx((y1 - y0) * (1 if log else 10), abs=1.2) and y2 > y0


def test_a_long_curve_is_small_and_keeps_its_peaks():
  points = [(float(i), math.sin(i / 500)) for i in range(30000)]
  points[12345], points[23456] = (12345.0, 77.0), (23456.0, -77.0)
  chart = line_chart("title", [Series("a", points)])
  curve = places(chart.svg)
  assert len(chart.svg) < 20_000
  # 77 and 0 of the other points, in heights of the drawing
  top, middle, bottom = curve[:, 1].max(), np.median(curve[:, 1]), curve[:, 1].min()
  assert top - middle == pytest.approx(middle - bottom, rel=0.05) and top - bottom > 140


@pytest.mark.parametrize(
  ("low", "high", "log"),
  [(0, 1000, False), (-0.3, 0.25, False), (3.71, 3.79, False), (0.02, 3, True), (1, 1000, True), (1e-8, 1, True)],
)
def test_numbers_along_the_axes(low, high, log):
  chart = line_chart("title", [Series("a", [(1.0, low or 1e-9), (2000.0, high)])], log_y=log)
  across, up = labels(chart, "x"), labels(chart, "y")
  assert 3 <= len(up) <= 8 and 3 <= len(across) <= 8 and len({*up}) == len(up)
  room = 0.1 * (high - low)
  assert all(low / 2 <= value <= high * 2 if log else low - room <= value <= high + room for value in up)


def test_running_mean():
  points = [(i, float(i % 2)) for i in range(40)]
  assert running_mean(points) == [(i, 0.5) for i in range(1, 40)]
  assert running_mean(points[:5]) == points[:5] and running_mean([]) == []


def blue(data) -> np.ndarray:
  """Rows and columns of the curve of loss.png."""
  with Image.open(io.BytesIO(data)) as image:
    picture = np.asarray(image.convert("RGB")).astype(int)
  return np.argwhere(picture[..., 2] - picture[..., 0] > 60)


def test_loss_png():
  found = blue(loss_png([(10.0 * i, loss) for i, loss in enumerate(np.geomspace(1.0, 0.01, 60))]))
  left, right = found[found[:, 1] < 150, 0], found[found[:, 1] > 750, 0]
  assert len(left) > 0 and len(right) > 0
  assert left.min() + 150 < right.max()  # rows count downwards: the curve falls
  assert len(blue(loss_png([(1.0, 0.5)]))) > 10 and len(blue(loss_png([]))) == 0
  # Losses that are not positive are drawn too.
  found = blue(loss_png([(10.0 * i, loss) for i, loss in enumerate(np.linspace(1.0, -1.0, 60))]))
  assert found[found[:, 1] > 750, 0].min() > found[found[:, 1] < 150, 0].max()


def test_steps_without_a_loss_are_left_out(tmp_path):
  plain = [f'{{"step": {step}, "loss": {2 / step}}}\n' for step in range(1, 60)]
  others = ['{"step": 70, "loss": null}\n', '{"step": 71, "loss": NaN}\n', '{"step": 72, "loss": 1']
  pictures = []
  for lines in (plain, plain[:30] + others[:2] + plain[30:] + others):
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    write_report(tmp_path)
    pictures.append((tmp_path / "loss.png").read_bytes())
  assert pictures[0] == pictures[1]


def test_a_full_disk_leaves_the_earlier_pictures(tmp_path, monkeypatch):
  (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
  (tmp_path / "loss.png").write_bytes(b"earlier")

  def fsync(file):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", fsync)
  with pytest.raises(OSError, match="No space"):
    write_report(tmp_path)
  assert (tmp_path / "loss.png").read_bytes() == b"earlier"
  assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png"}
