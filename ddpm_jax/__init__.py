"""Denoising diffusion probabilistic models (Ho et al. 2020) in JAX: training, sampling, exact resume.

In Python, `ddpm_jax.load(path)` gives a trained model, see `ddpm_jax.api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from ddpm_jax.api import Model, load

__version__ = "0.2.0.dev0"
__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
  """Imports the API when it is asked for: the command refuses a wrong flag before it imports JAX."""
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from ddpm_jax import api

  return getattr(api, name)
