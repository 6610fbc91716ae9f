"""The wheel works away from the clone: all files of the package are in it, the presets and the digits too."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture
def unpacked(tmp_path):
  """The contents of the wheel, built from a copy, as building writes beside the sources."""
  copy = tmp_path / "copy"
  shutil.copytree(ROOT / "ddpm_jax", copy / "ddpm_jax", ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copyfile(ROOT / name, copy / name)
  built = subprocess.run([sys.executable, "-c", BUILD, tmp_path], cwd=copy, capture_output=True, text=True)
  assert built.returncode == 0, built.stderr
  (wheel,) = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / "site")
  return tmp_path / "site"


def files(folder: pathlib.Path) -> set[str]:
  found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
  return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_wheel_works_away_from_the_clone(unpacked, tmp_path):
  assert files(unpacked / "ddpm_jax") == files(ROOT / "ddpm_jax") >= {"py.typed", "presets/cifar10.flags"}
  (scripts,) = unpacked.glob("*.dist-info/entry_points.txt")
  assert "ddpm = ddpm_jax.command:main" in scripts.read_text()
  environment = os.environ | {"PYTHONPATH": str(unpacked)}

  def ran(*words):
    words = [sys.executable, *words]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr

  # An error that the preset's 128 channels make, as the default is 32.
  code, out, err = ran("-m", "ddpm_jax.main", "--preset=cifar10", f"--workdir={tmp_path / 'run'}", "--norm_groups=48")
  assert (code, out) == (2, "") and "norm_groups: 48 does not divide channels=128" in err
  code = "from ddpm_jax.data import digits; print(digits.__file__, *digits._in_order()[0].shape)"
  code, out, err = ran("-c", code)
  assert (code, err) == (0, "") and out == f"{unpacked / 'ddpm_jax/data/digits/__init__.py'} 1797 8 8\n"
