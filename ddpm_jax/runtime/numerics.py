"""What JAX's options do to numbers: pinned where we compile, refused, or recorded; see docs/concepts/precision.md."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from ddpm_jax.errors import UserError

# Options that decide what is drawn, or in which types it is computed, and the values that this package is made for.
# Not among them: jax_default_prng_impl, as every key of this package names its implementation (`keys.py`).
_NEEDED = {
  "jax_enable_x64": False,
  "jax_threefry_partitionable": True,
  "jax_random_seed_offset": 0,
  "jax_numpy_dtype_promotion": "standard",
}
# Variables that choose among programs which differ by rounding, as another version of XLA does.
_RECORDED = (
  "XLA_FLAGS",
  "LIBTPU_INIT_ARGS",
  "NVIDIA_TF32_OVERRIDE",
  "JAX_ACCURATE_ERF_INV",
  "JAX_CUSTOM_JVP3",
  "JAX_CUSTOM_VJP3",
  "JAX_DISABLE_JIT",
  "JAX_DISABLE_MOST_OPTIMIZATIONS",
  "JAX_ENABLE_PGLE",
  "JAX_EXEC_TIME_OPTIMIZATION_EFFORT",
  "JAX_OPTIMIZATION_LEVEL",
  "JAX_REMAT3",
  "JAX_SCAN3",
  "JAX_SOFTMAX_CUSTOM_JVP",
  "JAX_USE_DIRECT_LINEARIZE",
  "JAX_USE_HLO_LOGISTIC_LOWERING",
  "JAX_USE_SHARDY_PARTITIONER",
)


@contextlib.contextmanager
def pinned(matmul_precision: str) -> Iterator[None]:
  """Traces, lowers and compiles as this package is made for, whatever the process has set.

  Args:
    matmul_precision: of products and convolutions that name none of their own: 'default', 'high' or 'highest'.
  """
  precision: Any = None if matmul_precision == "default" else matmul_precision
  with (
    jax.default_matmul_precision(precision),
    jax.threefry_partitionable(True),
    jax.numpy_dtype_promotion("standard"),
    jax.enable_x64(False),
  ):
    yield


def check_options(matmul_precision: str) -> None:
  """Raises UserError if JAX's environment asks for other numbers than the flags do.

  matmul_precision: of --matmul_precision.
  """
  for name, needed in _NEEDED.items():
    value = getattr(jax.config, name)
    if value != needed:
      raise UserError(
        f"{name.upper()}: {value} changes the numbers without a trace in checkpoints or results; unset it in the "
        "environment"
      )
  precision = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009  unknown to type checkers
  if (precision or "default") != matmul_precision:
    raise UserError(
      f"JAX_DEFAULT_MATMUL_PRECISION: {precision} contradicts --matmul_precision={matmul_precision}; unset it in the "
      "environment, or set the option"
    )


def surroundings() -> dict[str, Any]:
  """What numbers depend on beside the settings, for the record: JSON values.

  Returns:
    `machine`, the number and kind of all devices; `jax`, the version; `environment`, variables that choose among
    programs which differ by rounding, as far as they are set.
  """
  variables = {name: os.environ[name] for name in _RECORDED if name in os.environ}
  return {"machine": machine(), "jax": jax.__version__, "environment": variables}


def machine() -> str:
  """The number and kind of all devices, such as '8 x TPU v3'."""
  devices = jax.devices()
  return f"{len(devices)} x {devices[0].device_kind}"
