"""What a plan says."""

import math
import types

import pytest

from ddpm_jax.plan import report
from ddpm_jax.plan.batches import Largest
from ddpm_jax.plan.collectives import Collective
from ddpm_jax.plan.compiling import CompiledStep, Memory
from ddpm_jax.plan.hardware import Peaks
from ddpm_jax.plan.roofline import roofline
from ddpm_jax.plan.topology import OutOfMemory, Topology
from tests.training.tiny import tiny_config, tiny_run

PEAKS = Peaks(flops=197e12, bandwidth=819e9, interconnect=200e9, source="by hand")
MEMORY = Memory(2**30, 2**30, 2**31, 16, 3 * 2**10, 0, 2**32, 512, 2**20)
STEP = CompiledStep(
  64, MEMORY, 1.97e12, 1638 * 10**6, [Collective("all-reduce", 10**9, 2, 1), Collective("all-gather", 8, 2, None)]
)


def v5e(memory, devices=4):
  return Topology("v5e:2x2", [types.SimpleNamespace(device_kind="TPU v5 lite")] * devices, 4, memory)


def test_memory_has_a_line_for_each_kind_and_the_answer():
  text = report.memory_table(MEMORY, v5e(int(15.75 * 2**30)))
  lines = [line.split("  ") for line in text.splitlines()]
  found = {parts[1].strip(): parts[-1].strip() for parts in lines if len(parts) > 2}
  assert found == {
    "parameters": "1.00 GiB",
    "their moving average": "1.00 GiB",
    "optimiser": "2.00 GiB",
    "counters": "16 B",
    "batch": "3.00 KiB",
    "temporaries: activations, gradients": "4.00 GiB",
    "output: metrics": "512 B",
    "program": "1.00 MiB",
    "all": "8.00 GiB",
  }  # no padding, no line
  assert text.endswith("fits: 8.00 GiB of 15.75 GiB\n")


def test_what_does_not_fit_says_what_to_try():
  for text in (report.fits(MEMORY, v5e(2**32)), report.refusal(OutOfMemory(2**33, 2**32))):
    assert text.startswith("does not fit: 8.00 GiB of 4.00 GiB;\n  try a smaller --batch_size, --remat=blocks, ")
    assert "--parallel=fsdp" in text
  assert report.refusal(OutOfMemory(None, None)).startswith("does not fit: the compiler refuses it;")
  assert "does not say how much" in report.fits(MEMORY, v5e(None))


def test_a_step_with_and_without_peaks():
  times = roofline(STEP, PEAKS)
  text = report.step_table(STEP, PEAKS, times)
  for part in ("1.97 TFLOP at 197 TFLOP/s: 10 ms", "1.638 GB at 819 GB/s: 2 ms", "1 GB sent at 200 GB/s: 5 ms"):
    assert part in text
  assert "1202.7 FLOP for each byte" in text
  assert "all-reduce     1 of 1 GB in all; each device sends 1 GB" in text
  assert "1 of them in a loop of unknown length, counted once" in text
  often = report.step_table(
    STEP._replace(collectives=[Collective("all-gather", 10**6, 2, n) for n in (1, 4)]), None, None
  )
  assert "all-gather     5 of 5 MB in all; each device sends 2.5 MB" in often and "unknown" not in often
  bare = report.step_table(STEP, None, None)
  assert "1.97 TFLOP\n" in bare and "/s" not in bare
  alone = report.step_table(STEP._replace(collectives=[]), PEAKS, times)
  assert alone.endswith("no collectives\n")


def test_the_bound():
  run = tiny_run(tiny_config(num_steps=3_600_000))
  text = report.bound(run, STEP, roofline(STEP, PEAKS))
  assert "step at least 10 ms; limit: compute" in " ".join(text.split())
  assert "at most 100.0 steps/s, 6,400 images/s" in text
  assert "at most 100% of its peak" in text
  assert "3,600,000 steps at least 10.0 hours" in " ".join(text.split())


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
def test_the_headline_names_everything(mode):
  run = tiny_run(tiny_config(parallel=mode))
  text = report.headline(run, v5e(1, devices=8), PEAKS)
  for part in ("44,969 parameters", "float32", "8x8x1 (digits), 16 in", "v5e:2x2: 8 x TPU v5 lite (4 chips)"):
    assert part in text
  assert f"--parallel={mode}" in text and "197 TFLOP/s, memory 819 GB/s, links 200 GB/s out" in text
  assert "ridge point  241 FLOP for each byte" in text and "by hand" in text
  assert "(4 chips)" not in report.headline(run, v5e(1), PEAKS)
  assert "none are known for TPU v5 lite: no roofline" in report.headline(run, v5e(1), None)
  assert "links" not in report.headline(run, v5e(1), PEAKS._replace(interconnect=None))
  assert all(len(line) <= 100 for line in text.splitlines())


def test_the_largest_batch():
  text = report.largest_text(Largest(256, 512, 3e9, True), 4, {256: 2.0**30, 16: 5.0}, 2**31)
  assert text == (
    "largest batch: --batch_size=256, 64 on each device, 1.00 GiB;\n  512 would need about 2.79 GiB, by extrapolation\n"
  )
  compiled = report.largest_text(Largest(256, 512, 3e9, True), 4, {256: 2.0**30, 512: 3e9}, 2**31)
  assert "512 needs 2.79 GiB, says the compiler" in compiled
  assert "512 needs more, says" in report.largest_text(Largest(256, 512, math.inf, True), 4, {256: 1.0}, 2**31)
  assert "that was tried" in report.largest_text(Largest(256, 512, 3.0, False), 4, {256: 1.0}, 2**31)
  none = report.largest_text(Largest(0, 16, math.inf, True), 4, {16: math.inf}, 2**31)
  assert none == "largest batch: none; a batch of 16 already needs more than 2.00 GiB\n"


@pytest.mark.parametrize(
  ("function", "number", "text"),
  [
    (report.size_text, 1023, "1023 B"),
    (report.size_text, 1024, "1.00 KiB"),
    (report.size_text, 1.5 * 2**20, "1.50 MiB"),
    (report.seconds_text, 2.5, "2.5 s"),
    (report.seconds_text, 0.00123, "1.23 ms"),
    (report.seconds_text, 4.5e-6, "4.5 us"),
    (report.duration_text, 30, "30 s"),
    (report.duration_text, 90, "1.5 minutes"),
    (report.duration_text, 9000, "2.5 hours"),
    (report.duration_text, 86400 * 3, "3.0 days"),
    (lambda n: report.rate(n, "B"), 999, "999 B"),
    (lambda n: report.rate(n, "B"), 1.5e6, "1.5 MB"),
    (lambda n: report.rate(n, "FLOP"), 2.345e15, "2.345 PFLOP"),
  ],
)
def test_numbers_for_people(function, number, text):
  assert function(number) == text
