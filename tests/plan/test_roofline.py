"""The roofline, by hand."""

import pytest

from ddpm_jax.plan.collectives import Collective
from ddpm_jax.plan.compiling import CompiledStep, Memory
from ddpm_jax.plan.hardware import Peaks
from ddpm_jax.plan.roofline import roofline

PEAKS = Peaks(flops=200e12, bandwidth=800e9, interconnect=200e9, source="by hand")


def step(flops, bytes_, sent):
  """Of 4 devices, which gather: each sends 3/4."""
  return CompiledStep(64, Memory(*[0] * 9), flops, bytes_, [Collective("all-gather", sent * 4 // 3, 4, 1)])


@pytest.mark.parametrize(
  ("numbers", "times", "seconds", "limit", "share"),
  [
    ((4e12, 8e9, 3 * 10**9), (0.02, 0.01, 0.015), 0.02, "compute", 1.0),
    ((1e12, 16e9, 3 * 10**9), (0.005, 0.02, 0.015), 0.02, "memory", 0.25),
    ((1e12, 4e9, 6 * 10**9), (0.005, 0.005, 0.03), 0.03, "interconnect", 1 / 6),
  ],
)
def test_the_longest_time_is_the_limit(numbers, times, seconds, limit, share):
  found = roofline(step(*numbers), PEAKS)
  assert tuple(found) == pytest.approx(times)
  assert (found.seconds, found.limit, found.utilisation) == (pytest.approx(seconds), limit, pytest.approx(share))


def test_an_unknown_interconnect_is_no_limit():
  found = roofline(step(1e12, 4e9, 6 * 10**9), PEAKS._replace(interconnect=None))
  assert found.interconnect is None and found.seconds == pytest.approx(0.005)
