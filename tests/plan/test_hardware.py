"""Peaks: those that are published, for each device; those that are measured."""

import types

import pytest

from ddpm_jax.plan import hardware, topology
from ddpm_jax.plan.hardware import peaks
from ddpm_jax.plan.topology import Topology


def tpu(kind, devices, chips):
  return Topology("t:2x2", [types.SimpleNamespace(device_kind=kind)] * devices, chips, 10**9)


# TFLOP/s in bfloat16, GB/s of memory, GB/s of the interconnect in both directions: the documentation's tables.
@pytest.mark.parametrize(
  ("kind", "flops", "bandwidth", "both_ways"),
  [
    ("TPU v4", 275, 1200, 600),
    ("TPU v5 lite", 197, 819, 400),
    ("TPU v5", 459, 2765, 1200),
    ("TPU v6 lite", 918, 1640, 800),
  ],
)
def test_published_numbers(kind, flops, bandwidth, both_ways):
  found = peaks(tpu(kind, 4, 4))
  assert found and found.source.startswith("published")
  assert found[:3] == (flops * 1e12, bandwidth * 1e9, both_ways / 2 * 1e9)


def test_a_device_that_is_half_a_chip():
  found = peaks(tpu("TPU v3", 8, 4))
  assert found and found[:3] == (61.5e12, 450e9, 164e9)


def test_an_unknown_kind_has_none():
  assert peaks(tpu("TPU7x", 8, 4)) is None


def test_a_cpu_is_measured_and_divided(monkeypatch):
  monkeypatch.setattr(hardware, "_SIZE", 128)
  monkeypatch.setattr(hardware, "_COPY", 2**16)
  seconds = iter((0.001, 0.002))
  real = hardware._seconds

  def timed(function, argument):
    assert real(function, argument) > 0
    return next(seconds)

  monkeypatch.setattr(hardware, "_seconds", timed)
  found = peaks(topology.find("cpu"))
  assert found and found.interconnect is None and found.source.startswith("measured here: ")
  assert found.flops == pytest.approx(2 * 128**3 / 0.001 / 8)
  assert found.bandwidth == pytest.approx(2 * 4 * 2**16 / 0.002 / 8)


def test_the_shortest_of_several_runs_counts(monkeypatch):
  clock = iter((0.0, 5.0, 10.0, 12.0, 20.0, 29.0, 30.0, 33.0, 40.0, 44.0))
  monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
  assert hardware._seconds(lambda x: x, hardware.jnp.zeros(1)) == 2.0
