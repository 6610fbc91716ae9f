"""How fast a step could go: the roofline model (Williams et al. 2009), with the interconnect as a third roof."""

from __future__ import annotations

from typing import NamedTuple

from ddpm_jax.plan.compiling import CompiledStep
from ddpm_jax.plan.hardware import Peaks


class Roofline(NamedTuple):
  """The least time of a step on one device, in seconds, by what takes it.

  Attributes:
    compute: its operations at the peak of arithmetic.
    memory: its bytes at the peak of its memory.
    interconnect: what it sends at the peak of its links; None if that is unknown.
  """

  compute: float
  memory: float
  interconnect: float | None

  @property
  def seconds(self) -> float:
    """The least time of the step, if all three go on at the same time."""
    return max(self.compute, self.memory, self.interconnect or 0.0)

  @property
  def limit(self) -> str:
    """What takes that time: 'compute', 'memory' or 'interconnect'."""
    times = {"compute": self.compute, "memory": self.memory, "interconnect": self.interconnect or 0.0}
    return max(times, key=lambda name: times[name])

  @property
  def utilisation(self) -> float:
    """The largest share of the arithmetic's peak that the step can reach, at most 1."""
    return self.compute / self.seconds


def roofline(step: CompiledStep, peaks: Peaks) -> Roofline:
  """The times of a step at the peaks of a device."""
  return Roofline(
    compute=step.flops / peaks.flops,
    memory=step.bytes / peaks.bandwidth,
    interconnect=None if peaks.interconnect is None else step.sent / peaks.interconnect,
  )
