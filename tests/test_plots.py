"""The loss curve is a picture in which the loss goes where the numbers go."""

import json
import os

import numpy as np
import pytest
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


def test_updates_without_a_loss_are_left_out(tmp_path):
  plain = [f'{{"step": {step}, "loss": {2 / step}}}\n' for step in range(1, 60)]
  (tmp_path / "a.jsonl").write_text("".join(plain))
  others = ['{"step": 70, "loss": null}\n', '{"step": 71, "loss": NaN}\n', '{"step": 72, "loss": 1']
  (tmp_path / "b.jsonl").write_text("".join(plain[:30] + others[:2] + plain[30:] + others))
  for name in "ab":
    loss_curve(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.png")
  with Image.open(tmp_path / "a.png") as first, Image.open(tmp_path / "b.png") as second:
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize("text", ["", '{"step": 1, "loss": null}\n'])
def test_no_loss_at_all(tmp_path, text):
  (tmp_path / "metrics.jsonl").write_text(text)
  loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
  assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_full_disk_leaves_the_earlier_picture(tmp_path, monkeypatch):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
  (tmp_path / "loss.png").write_bytes(b"earlier")

  def fsync(file):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", fsync)
  with pytest.raises(OSError, match="No space"):
    loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
  assert (tmp_path / "loss.png").read_bytes() == b"earlier"
  assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png"}
