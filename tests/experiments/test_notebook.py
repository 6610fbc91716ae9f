"""The notebook of the API runs from start to end and makes its picture."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
from PIL import Image

from tests.sampling.conftest import make_workdir

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments" / "notebook.py"


def test_runs_from_start_to_end(tmp_path):
  trained, picture = make_workdir(tmp_path), tmp_path / "notebook.png"
  variables = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
  said = subprocess.run(
    [sys.executable, NOTEBOOK, trained.path, picture], env=variables, check=True, capture_output=True, text=True
  ).stdout
  assert "8x8x1 images" in said and "the ema weights after step 5" in said
  errors = re.findall(r"t +(\d+)  error of x0_hat ([\d.]+)  of eps_hat ([\d.]+)", said)
  assert [int(errors[0][0]), int(errors[-1][0])] == [1, 200] and len(errors) == 9
  assert float(errors[0][1]) < float(errors[-1][1])  # little noise hides little of the image
  with Image.open(picture) as image:
    assert image.size == (800, 1100)
    assert np.asarray(image.convert("L")).std() > 20


def test_every_cell_can_be_read():
  cells = re.split(r"^# %%", NOTEBOOK.read_text(), flags=re.MULTILINE)
  assert cells[0] == "" and len(cells) > 10
  for cell in cells[1:]:
    head, _, body = cell.partition("\n")
    assert head in ("", " [markdown]")
    lines = body.strip().splitlines()
    assert lines if head == "" else all(line.startswith(("#", '"""')) for line in lines)
    compile(body, "cell", "exec")
