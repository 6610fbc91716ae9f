"""One absl flag for each knob of `Config`, and back: the only module beside `main.py` that knows absl.flags."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from ddpm_jax import config as config_lib
from ddpm_jax import paths
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError

MODES = ("train", "sample", "evaluate", "export", "plan")


class _TupleParser(flags.ArgumentParser):
  """Parses '1,2,2,2' or 'kid,bound' into a tuple; the empty text is the empty tuple."""

  syntactic_help = "a comma separated list"

  def __init__(self, item: type[int] | type[str]):
    self._item = item

  def parse(self, argument: str | tuple) -> tuple:
    if isinstance(argument, tuple):
      return argument
    try:
      return tuple(self._item(part.strip()) for part in argument.split(",")) if argument else ()
    except ValueError:
      raise ValueError("expected integers separated by commas, such as 1,2,2,2") from None


class _TupleSerializer(flags.ArgumentSerializer):
  def serialize(self, value: tuple) -> str:
    return config_lib.flag_text(value)


def define(registry: flags.FlagValues = flags.FLAGS) -> None:
  """Registers --workdir, --mode and a flag for every knob. Call once for each registry."""
  flags.DEFINE_string(
    "workdir",
    None,
    "Folder of this run: config, checkpoints, metrics, samples. Created if absent; "
    "the same command goes on where it stopped.",
    flag_values=registry,
    required=False,
  )
  flags.DEFINE_enum(
    "mode",
    "train",
    MODES,
    "train: train, or go on training. sample: draw images from a workdir. evaluate: measure a workdir's model. "
    "export: write its weights for other programs. plan: say what training would need on --topology, and how fast it "
    "could be.",
    flag_values=registry,
  )
  for _, field, default in config_lib.knobs(Config()):
    text = field.metadata["help"]
    if field.metadata["choices"] and isinstance(default, tuple):
      flags.DEFINE(_TupleParser(str), field.name, default, text, registry, _TupleSerializer())
    elif field.metadata["choices"]:
      flags.DEFINE_enum(field.name, default, field.metadata["choices"], text, flag_values=registry)
    elif isinstance(default, bool):
      flags.DEFINE_boolean(field.name, default, text, flag_values=registry)
    elif isinstance(default, int):
      flags.DEFINE_integer(field.name, default, text, flag_values=registry)
    elif isinstance(default, float):
      flags.DEFINE_float(field.name, default, text, flag_values=registry)
    elif isinstance(default, tuple):
      flags.DEFINE(_TupleParser(int), field.name, default, text, registry, _TupleSerializer())
    else:
      flags.DEFINE_string(field.name, default, text, flag_values=registry)


def flagfiles_first(words: Sequence[str]) -> list[str]:
  """The words of a command with its flagfiles first, wherever they stand: a flag on the command line always wins."""
  return sorted(words, key=lambda word: not word.startswith("--flagfile="))


def one_line(error: flags.Error) -> str:
  """What absl says of a wrong flag."""
  return " ".join(str(error).split()).removeprefix("ERROR:: ")


# Where the data of a run lie: kept in its workdir, and looked for again by commands from other working directories.
_PLACES = ("data_dir", "manual_dir", "inception_weights")


def given(registry: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
  """The knobs that the command line or a flagfile names, with their values; places of data as absolute paths.

  Raises:
    UserError: if a path begins with the home of nobody.
  """
  found: dict[str, Any] = {name: registry[name].value for name in config_lib.values(Config()) if registry[name].present}
  for name in found.keys() & _PLACES:
    found[name] = _absolute(name, found[name])
  if str(found.get("dataset")).startswith(config_lib.FOLDER):
    place = found["dataset"].removeprefix(config_lib.FOLDER)
    found["dataset"] = config_lib.FOLDER + _absolute("dataset", place)
  return found


def _absolute(name: str, text: str) -> str:
  """The path that a flag names, absolute; no path and the address of something else stay, for others to refuse."""
  if not text or "://" in text:
    return text
  path = os.path.join(os.getcwd(), paths.expanded(name, text))
  plain = os.path.normpath(path)  # behind a symbolic link, `..` leads elsewhere than it reads
  return plain if os.path.realpath(plain) == os.path.realpath(path) else str(pathlib.Path(path))


def has_workdir(registry: flags.FlagValues = flags.FLAGS) -> bool:
  """Whether the command names a workdir."""
  return bool(registry["workdir"].value)


def workdir(registry: flags.FlagValues = flags.FLAGS) -> pathlib.Path:
  """The absolute path of --workdir. Raises UserError if it is missing, or none."""
  text = registry["workdir"].value
  if not text:
    raise UserError("workdir: missing; name a folder for this run, such as --workdir=runs/digits")
  return paths.absolute("workdir", text, "mount the storage and name the folder")
