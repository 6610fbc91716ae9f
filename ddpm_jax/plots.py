"""The loss curve as a picture."""

from __future__ import annotations

import io
import json
import math
import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from ddpm_jax.workdir.storage import write_whole


def loss_curve(metrics: pathlib.Path, picture: pathlib.Path) -> None:
  """Draws the losses of a `metrics.jsonl` over the updates, and their moving average, into a PNG file.

  A logged loss is noisy, above all because some timesteps are much harder than others: the average over about a
  twentieth of the run shows where it is going. The picture is whole, or as it was before.

  Raises:
    OSError: if `metrics` cannot be read or the picture not written.
  """
  rows = [
    json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"
  ]
  # An update that was skipped has no finite loss, and JSON no name for such a number.
  points = [(row["step"], row["loss"]) for row in rows if math.isfinite(row.get("loss") or math.nan)]
  steps, losses = np.array(points).reshape(-1, 2).T
  window = max(1, len(losses) // 20)
  figure = Figure(figsize=(7, 3.5), layout="constrained")
  FigureCanvasAgg(figure)  # draws without a screen, whatever backend the environment names
  axes = figure.subplots()
  axes.plot(
    steps,
    losses,
    linewidth=0.8,
    color="tab:blue",
    alpha=0.4 if window > 1 else 1.0,
    label="logged",
    marker="o" if len(steps) < 4 else None,
  )
  if window > 1:
    average = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], average, linewidth=1.8, color="tab:blue", label=f"mean of {window} logged")
    axes.legend()
  axes.set(xlabel="updates", ylabel="loss", yscale="log")
  for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
    ticks(StrMethodFormatter("{x:g}"))
  axes.grid(visible=True, which="both", alpha=0.3)
  png = io.BytesIO()
  figure.savefig(png, format="png", dpi=120)
  write_whole(picture, png.getvalue())
