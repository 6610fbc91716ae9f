"""The command that compares runs: its exit codes, and that it starts without JAX."""

import os
import pathlib
import subprocess
import sys

from ddpm_jax import compare
from tests.report.test_comparison import lines, make

ROOT = pathlib.Path(__file__).parents[1]


def test_it_reads_files_and_needs_no_jax(tmp_path):
  for name in "ab":
    make(tmp_path / name, lines((10, 20), 1.0))
  code = "import runpy, sys; sys.argv[1:] = ['a', 'b']; from ddpm_jax import compare; code = compare.main(); "
  code += "assert not {'jax', 'flax'} & set(sys.modules); sys.exit(code)"
  ran = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert (ran.returncode, ran.stderr) == (0, "") and ran.stdout == f"done: {tmp_path / 'compare.html'}\n"
  assert "2 runs compared" in (tmp_path / "compare.html").read_text()


def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys):
  run = str(make(tmp_path / "run"))
  for words, message in (
    ([], "error: RUN: name the workdirs of two runs or more"),
    ([run, str(tmp_path / "none")], "error: RUN: there is no folder"),
    ([run, "gs://bucket/run"], "error: RUN: 'gs://bucket/run' is no path in a file system"),
    ([run, "~nobody_here/run"], "error: RUN: '~nobody_here/run' begins with the home of nobody"),
  ):
    monkeypatch.setattr(sys, "argv", ["compare", *words, f"--out={tmp_path / 'page.html'}"])
    assert compare.main() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message) and err.count("\n") == 1
  assert not (tmp_path / "page.html").exists()
