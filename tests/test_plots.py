"""The loss curve is a picture in which the loss goes where the numbers go."""

import json

import numpy as np
from PIL import Image

from ddpm_jax.plots import loss_curve


def test_loss_curve(tmp_path):
  losses = np.geomspace(1.0, 0.01, 60)
  lines = [json.dumps({"step": 10 * i, "loss": loss}) + "\n" for i, loss in enumerate(losses)]
  (tmp_path / "metrics.jsonl").write_text("".join(lines))
  loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
  with Image.open(tmp_path / "loss.png") as image:
    picture = np.asarray(image.convert("RGB")).astype(int)
  blue = np.argwhere(picture[..., 2] - picture[..., 0] > 60)  # rows and columns of the curve
  left, right = blue[blue[:, 1] < 150, 0], blue[blue[:, 1] > 750, 0]
  assert len(left) > 0 and len(right) > 0
  assert left.min() + 150 < right.max()  # rows count downwards: the curve falls


def test_one_line_is_enough(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
  loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
  assert (tmp_path / "loss.png").stat().st_size > 1000
