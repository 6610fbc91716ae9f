"""The loss curve as a picture."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter


def loss_curve(metrics: pathlib.Path, picture: pathlib.Path) -> None:
  """Draws the losses of a `metrics.jsonl` over the updates, and their moving average, into a PNG file.

  The loss of one update is noisy, above all because some timesteps are much harder than others: the average over about
  a twentieth of the run shows where it is going.
  """
  rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
  steps = np.array([row["step"] for row in rows])
  losses = np.array([row["loss"] for row in rows])
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
    label="one update",
    marker="o" if len(steps) < 4 else None,
  )
  if window > 1:
    average = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], average, linewidth=1.8, color="tab:blue", label=f"mean of {window} logged updates")
    axes.legend()
  axes.set(xlabel="updates", ylabel="loss", yscale="log")
  for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
    ticks(StrMethodFormatter("{x:g}"))
  axes.grid(visible=True, which="both", alpha=0.3)
  figure.savefig(picture, dpi=120)
