"""The console command `ddpm`: the modes of `ddpm_jax.main`, and the tools, as subcommands.

ddpm --workdir=runs/digits                      python -m ddpm_jax.main --workdir=runs/digits
ddpm sample --workdir=runs/digits               python -m ddpm_jax.main --mode=sample --workdir=runs/digits
ddpm compare runs/a runs/b                      python -m ddpm_jax.compare runs/a runs/b
ddpm prepare --dataset=fashion_mnist            python -m ddpm_jax.data.prepare --dataset=fashion_mnist
ddpm inspect folder:images                      python -m ddpm_jax.data.inspect folder:images
ddpm pack folder:images zip:images.zip          python -m ddpm_jax.data.pack folder:images zip:images.zip
"""

from __future__ import annotations

import difflib
import importlib
import sys

from ddpm_jax import flags
from ddpm_jax import main as program
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import console

TOOLS = {
  "compare": "ddpm_jax.compare",
  "prepare": "ddpm_jax.data.prepare",
  "pack": "ddpm_jax.data.pack",
  "inspect": "ddpm_jax.data.inspect",
}


def main() -> int:
  """Runs the subcommand that `sys.argv` names, or trains. Returns the exit code of a tool; a mode ends the process."""
  console.protect_streams()
  try:
    tool = _subcommand()
  except UserError as error:
    console.error(str(error))
    return 2
  return importlib.import_module(tool).main() if tool else program.start()


def _subcommand() -> str:
  """The module of a tool, whose words then are those of `sys.argv`; '' for a mode, which becomes a flag there.

  Raises:
    UserError: if there is no such subcommand, or a mode is named twice.
  """
  words = sys.argv[1:]
  if not words or words[0].startswith("-"):
    return ""
  name, rest = words[0], words[1:]
  if name in TOOLS:
    sys.argv[1:] = rest
    return TOOLS[name]
  if name not in flags.MODES:
    near = difflib.get_close_matches(name, [*flags.MODES, *TOOLS], n=2)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise UserError(
      f"ddpm: {name!r} is no command{hint}; use {', '.join([*flags.MODES, *TOOLS])}, or flags alone to train"
    )
  if any(word.partition("=")[0] in ("--mode", "-mode") for word in rest):
    raise UserError(f"mode: 'ddpm {name}' is --mode={name} already; leave --mode out")
  sys.argv[1:] = [f"--mode={name}", *rest]
  return ""
