import os
import subprocess
import sys

import pytest

from benchmarks import hardware


@pytest.mark.parametrize(
  ("kind", "dtype", "tflops"),
  [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
    ("NVIDIA H100 80GB HBM3", "float32", 494.7),
    ("NVIDIA H100 PCIe", "bfloat16", 756),
    ("NVIDIA A100-SXM4-40GB", "float32", 156),
    ("NVIDIA L4", "bfloat16", 121),
    ("NVIDIA L40S", "bfloat16", 362),
    ("TPU v5", "bfloat16", 459),
    ("TPU v5 lite", "bfloat16", 197),
    ("TPU v3", "bfloat16", 61.5),
  ],
)
def test_published_peaks(kind, dtype, tflops):
  peak, source = hardware.published_peak(kind, dtype)
  assert peak == pytest.approx(tflops * 1e12)
  assert source


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L4000", "NVIDIA H1000", "TPU v50"])
def test_what_the_table_has_not(kind):
  assert hardware.published_peak(kind, "bfloat16") is None


def test_a_measured_peak_is_that_of_the_fastest_product(monkeypatch):
  monkeypatch.setattr(hardware, "fastest", lambda run: run() is None or 0.5)
  peak, how = hardware.measured_peak("bfloat16", size=64)
  assert peak == 2 * 64**3 / 0.5
  assert how == "measured: bfloat16 product of 64x64 matrices"


def test_the_fastest_run_counts_after_one_to_be_warm(monkeypatch):
  clock = iter([0, 5, 10, 12, 20, 29])
  monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
  runs = []
  assert hardware.fastest(lambda: runs.append(0), repeats=3) == 2
  assert len(runs) == 4


def test_memory_is_in_bytes():
  code = "from benchmarks.hardware import peak_rss; a = peak_rss(); b = b'1' * (300 << 20); print(peak_rss() - a)"
  printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=os.getcwd())
  assert 290 << 20 < int(printed.stdout) < 310 << 20


def test_versions_leave_out_what_is_not_installed():
  installed = hardware.versions("jax", "no_such_package_anywhere")
  assert set(installed) == {"python", "jax"}
