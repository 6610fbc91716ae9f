"""Where weights come from: --init_from, or the checkpoints of a workdir."""

from __future__ import annotations

import pathlib

from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.sampling.weights import Weights, load_weights


def find_weights(config: Config, workdir: pathlib.Path | None) -> Weights:
  """The weights that a command means: those of the workdir's checkpoints, or, where it has none, of --init_from.

  Args:
    config: of the run.
    workdir: its folder; None if the weights are those of --init_from.

  Raises:
    UserError: if there are none, or they do not fit the network of `config`.
  """
  if workdir is None:
    raise UserError(f"init_from: {config.exchange.init_from!r} cannot be read yet")
  return load_weights(config, workdir)
