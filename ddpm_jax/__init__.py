"""Denoising diffusion probabilistic models (Ho et al. 2020) in JAX: training, sampling, exact resume.

In Python, `ddpm_jax.load(path)` returns a trained model, a `ddpm_jax.Model`, which draws and denoises:

  model = ddpm_jax.load("runs/digits")
  images = model.sample(16, steps=50)  # uint8 [16, H, W, C]

`ddpm_jax.train(config, workdir)` trains one as the command does, also with a network, a loss or images of your own.
What a user can mend raises `ddpm_jax.errors.UserError`. The command: python -m ddpm_jax.main --help
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from ddpm_jax.api import Model, load, train

__version__ = "0.2.0"
__all__ = ["Model", "load", "train"]


def __getattr__(name: str) -> Any:
  """Imports the API when it is asked for: the command refuses a wrong flag before it imports JAX."""
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from ddpm_jax import api

  return getattr(api, name)


def __dir__() -> list[str]:
  """What dir(), help() and tab completion show: the API before it is imported, too."""
  return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "annotations", "__dir__", "__getattr__"})
