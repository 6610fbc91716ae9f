"""Trains a denoising diffusion model, or draws images from one.

  python -m ddpm_jax.main --workdir=runs/digits
  python -m ddpm_jax.main --workdir=runs/cifar10 --flagfile=experiments/cifar10.flags
  python -m ddpm_jax.main --workdir=runs/cifar10 --mode=sample

The same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import app, logging
from absl import flags as absl_flags

from ddpm_jax import config as config_lib
from ddpm_jax import distributed, flags, workdir
from ddpm_jax.config import Config
from ddpm_jax.errors import NonFiniteError, UserError


def resolve_config(mode: str, given: dict, folder) -> Config:
  """The run that a command means: for training its flags over the defaults, else its flags over the workdir's config.

  Raises:
    UserError: if a flag would change what the workdir was trained with.
  """
  if mode == "train":
    return config_lib.override(Config(), given)
  stored = workdir.load_config(folder)
  config = config_lib.override(stored, given)
  if "variance" in given and config.sample.sampler != "ddpm":
    raise UserError(
      f"variance: {config.diffusion.variance} has no effect with sampler={config.sample.sampler}; leave "
      "--variance out, or use --sampler=ddpm"
    )
  for name, old, new in config_lib.changed(stored, config, on_resume=True):
    raise UserError(
      f"{name}: {folder} was trained with {config_lib.flag_text(old)!r}, not "
      f"{config_lib.flag_text(new)!r}; leave --{name} out"
    )
  return config


def main(argv: Sequence[str]) -> int:
  """Runs the mode that the flags name. Returns the exit code."""
  try:
    if len(argv) > 1:
      raise UserError(f"unexpected argument {argv[1]!r}; flags are written --name=value")
    if not absl_flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # absl's default shows every line that Orbax and JAX log
    mode, folder = absl_flags.FLAGS.mode, flags.workdir()
    config = resolve_config(mode, flags.given(), folder)
    distributed.initialize(config.train.distributed)
    match mode:
      case "train":
        from ddpm_jax.training import loop

        loop.train(config, folder)
      case "sample":
        from ddpm_jax.sampling import run

        run.sample(config, folder)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except NonFiniteError as error:
    print(f"error: {error}", file=sys.stderr)
    return 3
  except KeyboardInterrupt:
    print("interrupted before there was anything to save; the same command starts again", file=sys.stderr)
    return 130
  return 0


def _parse_flags(argv: Sequence[str]) -> list[str]:
  # Flagfiles first, wherever they stand: a flag on the command line always wins.
  files = [argument for argument in argv[1:] if argument.startswith("--flagfile=")]
  others = [argument for argument in argv[1:] if not argument.startswith("--flagfile=")]
  try:
    return absl_flags.FLAGS([argv[0], *files, *others])
  except SystemExit:
    sys.exit(0)  # --help has been printed, which absl ends with 1
  except absl_flags.Error as error:
    message = " ".join(str(error).split()).removeprefix("ERROR:: ")
    print(f"error: {message}; --help lists the flags", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  flags.define()
  absl_flags.adopt_module_key_flags(flags)  # so that --help lists them
  app.run(main, flags_parser=_parse_flags)
