"""One absl flag for each option of `Config`, and back: the only module beside `main.py` that knows absl.flags."""

from __future__ import annotations

import argparse
import difflib
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import flags

from ddpm_jax import config as config_lib
from ddpm_jax import presets
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import paths

MODES = ("train", "sample", "evaluate", "export", "plan")


class _TupleParser(flags.ArgumentParser):
  """Parses '1,2,2,2' or 'kid,bound' into a tuple; the empty text is the empty tuple."""

  syntactic_help = "a comma separated list"

  def __init__(self, item: type[int] | type[float] | type[str]):
    self._item = item

  def parse(self, argument: str | tuple) -> tuple:
    if isinstance(argument, tuple):
      return argument
    try:
      return tuple(self._item(part.strip()) for part in argument.split(",")) if argument else ()
    except ValueError:
      kind, example = ("numbers", "1,1.5,2") if self._item is float else ("integers", "1,2,2,2")
      raise ValueError(f"expected {kind} separated by commas, such as {example}") from None


class _NumberParser(flags.ArgumentParser):
  """Parses as another parser does, and says in its own words what it expects."""

  def __init__(self, parser: flags.ArgumentParser, expected: str):
    self._parser, self._expected, self.syntactic_help = parser, expected, parser.syntactic_help

  def parse(self, argument: Any) -> Any:
    try:
      return self._parser.parse(argument)
    except (TypeError, ValueError):
      raise ValueError(f"expected {self._expected}") from None

  def flag_type(self) -> str:
    return self._parser.flag_type()


_INTEGER = _NumberParser(flags.IntegerParser(), "a whole number in digits, such as 2000")
_FLOAT = _NumberParser(flags.FloatParser(), "a number, such as 0.5 or 1e-4")


class _SizeParser(flags.ArgumentParser):
  """Parses '64' and '48x64'; what is no size is left for the option to refuse."""

  syntactic_help = "a number, or HEIGHTxWIDTH"

  def parse(self, argument: int | str) -> int | str:
    if isinstance(argument, int) or argument.isdecimal():
      return int(argument)
    height, _, width = argument.partition("x")
    return int(height) if height == width and height.isdecimal() else argument

  def flag_type(self) -> str:
    return "size"


class _TupleSerializer(flags.ArgumentSerializer):
  def serialize(self, value: tuple) -> str:
    return config_lib.flag_text(value)


def define(registry: flags.FlagValues = flags.FLAGS) -> None:
  """Registers --workdir, --mode, --version and a flag for every option. Call once for each registry."""
  flags.DEFINE_string(
    "workdir",
    None,
    "Folder of this run: config, checkpoints, metrics, samples. Created if absent; "
    "--workdir alone goes on where it stopped, with the run's own settings, over which flags win.",
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
  flags.DEFINE_boolean(
    "version", False, "Print the versions of ddpm_jax, JAX, jaxlib and Python.", flag_values=registry
  )
  flags.DEFINE_string(
    "preset",
    "",
    f"Named settings, as --flagfile=experiments/NAME.flags: {', '.join(presets.names())}; {presets.NONE}: the plain "
    "defaults. Empty: those too, but for a new run on own images, see --dataset.",
    flag_values=registry,
  )
  for _, field, default in config_lib.options(Config()):
    text = field.metadata["help"]
    if isinstance(default, tuple):
      flags.DEFINE(_TupleParser(field.metadata["item"]), field.name, default, text, registry, _TupleSerializer())
    elif field.metadata["choices"]:
      flags.DEFINE_enum(field.name, default, field.metadata["choices"], text, flag_values=registry)
    elif isinstance(default, bool):
      flags.DEFINE_boolean(field.name, default, text, flag_values=registry)
    elif field.metadata["size"]:
      flags.DEFINE(_SizeParser(), field.name, default, text, registry, flags.ArgumentSerializer())
    elif isinstance(default, int):
      flags.DEFINE(_INTEGER, field.name, default, text, registry, flags.ArgumentSerializer())
    elif isinstance(default, float):
      flags.DEFINE(_FLOAT, field.name, default, text, registry, flags.ArgumentSerializer())
    else:
      flags.DEFINE_string(field.name, default, text, flag_values=registry)


def expand_flagfiles(words: Sequence[str]) -> list[str]:
  """The words of a command with the lines of its flagfiles in front, so that a flag on the command line always wins.

  A flagfile is named as `--flagfile=PATH` or `--flagfile PATH`, with one dash or two, anywhere among the flags, and a
  preset, which is one too, as `--preset=NAME`. Of several, the later one wins. A flagfile may name others, and the same
  rule holds: its own lines win over theirs. absl alone puts the lines where the flagfile is named, so that it wins over
  the flags before it.

  Args:
    words: what follows the name of the program.

  Returns:
    Words without flagfiles, for absl, of which the last one wins. `--preset` stays among them: its name, or 'none'
    where the last one that was named is a flagfile.

  Raises:
    UserError: if a flagfile has no name, cannot be read, is not UTF-8 text, or names itself, or for an unknown preset.
  """
  return _expand(words, ())


def _expand(words: Sequence[str], within: tuple[str, ...]) -> list[str]:
  """`expand_flagfiles` for the words of a command, or of the file that is the last of `within`."""
  lines, others, rest = [], [], list(words)
  while rest:
    word = rest.pop(0)
    name, equals, path = word.partition("=")
    if name in ("--flagfile", "-flagfile", "--preset", "-preset"):
      if not equals:
        path = rest.pop(0) if rest else ""
      path, preset = path.strip(), presets.NONE
      if name.endswith("preset"):
        preset, path = path, "" if path == presets.NONE else presets.path(path)
        lines += _lines_of(path, within) if path else []
      else:
        lines += _lines_of(paths.expanded("flagfile", path), within)
      lines.append(f"--preset={preset}")
      continue
    others.append(word)
    if word == "--" or not word.startswith("-"):  # absl takes no flag after these
      break
    if not equals and rest and not rest[0].startswith("-"):
      others.append(rest.pop(0))  # the value of `--flag value`
  return [*lines, *others, *rest]


def _lines_of(path: str, within: tuple[str, ...]) -> list[str]:
  """The flags in a file, which the files `within` lead to, after those of the flagfiles that it names itself."""
  if not path:
    raise UserError("flagfile: empty; name a file of flags, such as --flagfile=runs/digits/flags.txt")
  if os.path.realpath(path) in within:
    raise UserError(f"flagfile: {path} includes itself, directly or through other files; remove that line")
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a byte-order mark
  except OSError as error:
    raise UserError(f"flagfile: cannot read {path} ({error.strerror}); name another file") from error
  except ValueError as error:
    raise UserError(f"flagfile: {path} is not UTF-8 text ({error}); name another file") from error
  words = []
  for line in map(str.strip, text.split("\n")):
    if line.startswith(("--flagfile ", "-flagfile ")):
      words += line.split(maxsplit=1)
    elif line and not line.startswith(("#", "//")):
      words.append(line)
  return _expand(words, (*within, os.path.realpath(path)))


def one_line(error: flags.Error) -> str:
  """What absl says of a wrong flag, with the flags that may have been meant by an unknown one."""
  text = " ".join(str(error).split()).removeprefix("ERROR:: ")
  if not isinstance(error, flags.UnrecognizedFlagError):
    return text
  text, near = text.partition(" Did you mean: ")[0], _meant_by(error.flagname)
  return f"{text.rstrip('.')}, did you mean --{' or --'.join(near[:3])}?" if near else text


def _meant_by(word: str) -> list[str]:
  """The flags that have an unknown one as initials or as one of their words (--lr, --steps), or that read alike."""
  names = ["preset", "workdir", *config_lib.values(Config())]
  initials = [name for name in names if len(word) > 1 and word == "".join(part[0] for part in name.split("_"))]
  words = [name for name in names if set(word.split("_")) <= set(name.split("_"))]
  words.sort(key=lambda name: not name.startswith("num_"))
  return list(dict.fromkeys([*initials, *words])) or difflib.get_close_matches(word, names, n=2, cutoff=0.7)


# Where the data of a run lie: kept in its workdir, and looked for again by commands from other working directories.
_PLACES = ("data_dir", "manual_dir", "inception_weights", "lpips_weights", "reference_stats")


def given(registry: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
  """The options that the command line or a flagfile names, with their values; places of data as absolute paths.

  Raises:
    UserError: if a path begins with the home of nobody.
  """
  return placed({name: registry[name].value for name in config_lib.values(Config()) if registry[name].present})


def placed(found: dict[str, Any]) -> dict[str, Any]:
  """The options with places of data as absolute paths. Raises UserError if a path begins with the home of nobody."""
  found = found | {name: _absolute(name, found[name]) for name in found.keys() & _PLACES}
  if own := config_lib.own_images(found.get("dataset", "")):
    kind, place = own
    found["dataset"] = f"{kind}:{_absolute('dataset', place)}"
  return found


class ToolParser(argparse.ArgumentParser):
  """Arguments of a tool that also takes flags of training. A wrong one raises UserError."""

  def parse(self, words: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any], str | None]:
    """The tool's own arguments, the options of training that are given, as `given`, and `preset`. Raises UserError.

    An argument `source` is --dataset.
    """
    own, rest = self.parse_known_args(words)
    registry = flags.FlagValues()
    define(registry)
    try:
      _, *left = registry([self.prog, *expand_flagfiles(rest), f"--dataset={own.source}"])
    except flags.Error as error:
      self.error(one_line(error))
    if left:
      self.error(f"unexpected argument {left[0]!r}; flags are written --name=value")
    return own, given(registry), preset(registry)

  def error(self, message: str) -> NoReturn:
    """Raises UserError."""
    raise UserError(f"{message}; --help lists the arguments")


def _absolute(name: str, text: str) -> str:
  """The path that a flag names, absolute; no path and the address of something else stay, for others to refuse."""
  if not text or "://" in text:
    return text
  path = paths.from_here(name, paths.expanded(name, text))
  plain = os.path.normpath(path)  # behind a symbolic link, `..` leads elsewhere than it reads
  return plain if os.path.realpath(plain) == os.path.realpath(path) else str(pathlib.Path(path))


def preset(registry: flags.FlagValues = flags.FLAGS) -> str | None:
  """The value of --preset, 'none' if a flagfile was named after it; None if neither was named."""
  return registry["preset"].value or None


def of_preset(name: str) -> dict[str, Any]:
  """The options that a preset sets. Raises UserError if there is none of that name."""
  registry = flags.FlagValues()
  define(registry)
  registry(["preset", *expand_flagfiles([f"--preset={name}"])])
  return given(registry)


def has_workdir(registry: flags.FlagValues = flags.FLAGS) -> bool:
  """Whether the command names a workdir."""
  return bool(registry["workdir"].value)


def workdir(registry: flags.FlagValues = flags.FLAGS) -> pathlib.Path:
  """The absolute path of --workdir. Raises UserError if it is missing, or none."""
  text = registry["workdir"].value
  if not text:
    raise UserError("workdir: missing; name a folder for this run, such as --workdir=runs/digits")
  return paths.absolute("workdir", text, "mount the storage and name the folder")
