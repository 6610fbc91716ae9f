"""What the door to tuning for CPUs holds itself."""

import jax
import jax.numpy as jnp

from ddpm_jax.runtime import cpu


def test_materialized_on_cpus_and_in_one_pass_elsewhere():
  lowered = lambda platform: jax.jit(cpu.materialize).trace(jnp.ones(3)).lower(lowering_platforms=(platform,))  # noqa: E731
  assert "optimization_barrier" in lowered("cpu").as_text()
  for platform in ("tpu", "cuda"):
    assert "optimization_barrier" not in lowered(platform).as_text()
