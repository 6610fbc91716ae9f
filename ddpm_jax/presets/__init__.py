"""The presets: a flagfile each, part of the package so that `--preset=NAME` works wherever it is installed."""

from __future__ import annotations

import difflib
import pathlib

from ddpm_jax.errors import UserError

NONE = "none"  # the value of --preset for the plain defaults
_FOLDER = pathlib.Path(__file__).parent


def names() -> list[str]:
  """All presets, sorted."""
  return sorted(path.stem for path in _FOLDER.glob("*.flags"))


def path(name: str) -> str:
  """The flagfile of a preset. Raises UserError if there is none of that name."""
  if name not in names():
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(
      f"preset: {name!r} is unknown{hint}; use one of {', '.join(names())}, or {NONE} for the plain defaults"
    )
  return str(_FOLDER / f"{name}.flags")


# For a folder of images on a CPU, and on an accelerator.
OWN_IMAGES = ("images32", "images64")


def for_own_images(platform: str) -> str:
  """The preset of a new run on a folder of images whose command names neither a preset nor a flagfile.

  Args:
    platform: 'cpu', 'gpu' or 'tpu', as JAX names it.
  """
  return OWN_IMAGES[platform != "cpu"]
