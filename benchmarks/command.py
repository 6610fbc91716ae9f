"""The command line of the benchmarks: their own options, and any flag of the program for what is measured."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import flags as absl_flags

from benchmarks import report
from benchmarks.worker import Worker
from ddpm_jax import config as config_lib
from ddpm_jax import flags
from ddpm_jax.config import Config
from ddpm_jax.data import sources
from ddpm_jax.errors import RunError, UserError


@dataclasses.dataclass(frozen=True)
class Setting:
  """One side of a comparison.

  Attributes:
    name: A or B.
    config: the run.
    env: variables of its worker.
    flags: what was written on the command line.
  """

  name: str
  config: Config
  env: dict[str, str]
  flags: tuple[str, ...]

  def __str__(self) -> str:
    variables = [f"{name}={value}" for name, value in self.env.items()]
    return " ".join([*variables, *self.flags]) or "the defaults"

  def job(self, image_shape: tuple[int, int, int], **more: Any) -> dict[str, Any]:
    """What its worker is told."""
    return {"config": config_lib.to_json(self.config), "image_shape": list(image_shape), **more}


class Parser(argparse.ArgumentParser):
  """Options of a benchmark; an error is one line and exit code 2."""

  def __init__(self, name: str, description: str, *, timed: bool = True):
    super().__init__(
      prog=f"python -m benchmarks.{name}",
      description=description,
      allow_abbrev=False,
      epilog="All flags of ddpm_jax.main (its --help lists them) may be given too: they are what is measured, such as "
      "--flagfile=experiments/fashion_mnist.flags --dtype=bfloat16.",
    )
    self.add_argument("--json", default="", metavar="FILE", help="also write everything that was measured to FILE")
    if not timed:
      return
    self.add_argument("--rounds", type=positive(int), default=6, help="turns of each setting (6)")
    self.add_argument("--block_seconds", type=positive(float), default=5, help="about how long a turn takes (5)")
    self.add_argument("--image_shape", type=_shape, metavar="H,W,C", help="of the images, if it is not known")

  def add_comparison(self) -> None:
    """Options for a second setting, which takes turns with the first."""
    self.add_argument("--b", metavar="FLAGS", help="setting B: these flags of the program on top of those of A")
    self.add_argument("--b_env", default="", metavar="NAME=VALUE ...", help="setting B: environment variables")
    self.add_argument("--a_env", default="", metavar="NAME=VALUE ...", help="setting A: environment variables")

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message}; --help lists the options")


def parse(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[Setting]]:
  """The options, and the settings that the program's flags mean: A, and B if there is one.

  Raises:
    UserError: for anything that is wrong.
  """
  options, rest = parser.parse_known_args(argv)
  report.check_writable(options.json)
  given = vars(options)
  first = Setting(
    "A",
    config_lib.override(Config(), _parse_flags(rest)),
    _parse_env("a_env", given.get("a_env", "")),
    tuple(rest),
  )
  if given.get("b") is None and not given.get("b_env"):
    return options, [first]
  words = _split("b", options.b or "")
  second = Setting(
    "B",
    config_lib.override(first.config, _parse_flags(words)),
    _parse_env("b_env", options.b_env),
    (*rest, *words),
  )
  return options, [first, second]


def image_shape(config: Config, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
  """(H, W, C) of the images that a run is measured with. Raises UserError if that is not known."""
  if given:
    return given
  try:
    return sources.image_shape(config.data)
  except UserError as error:
    raise UserError(f"{error}; or give --image_shape=H,W,C") from error


@contextlib.contextmanager
def workers(works: dict[str, tuple[str, dict[str, str]]], python: dict[str, str] | None = None) -> Iterator[dict]:
  """Starts a worker for each name -> (work, environment), and ends them all."""
  with contextlib.ExitStack() as started:
    yield {
      name: started.enter_context(
        contextlib.closing(Worker(name, work, env=env, python=(python or {}).get(name, sys.executable)))
      )
      for name, (work, env) in works.items()
    }


def say(text: str) -> None:
  """Tells on standard error what is going on."""
  print(text, file=sys.stderr, flush=True)


def finish(main: Callable[[Sequence[str]], None]) -> NoReturn:
  """Runs a benchmark; an error on purpose is one line and exit code 2 or 1."""
  try:
    main(sys.argv[1:])
  except (UserError, RunError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, UserError) else 1)
  sys.exit(0)


def _parse_flags(words: Sequence[str]) -> dict[str, Any]:
  registry = absl_flags.FlagValues()
  flags.define(registry)
  try:
    left = registry(["benchmarks", *flags.expand_flagfiles(words)])[1:]
  except absl_flags.Error as error:
    raise UserError(flags.one_line(error)) from error
  if left:
    raise UserError(f"unexpected argument {left[0]!r}; flags are written --name=value")
  for name in ("workdir", "mode"):
    if registry[name].present:
      raise UserError(f"{name}: has no effect on a benchmark; leave it out")
  return flags.given(registry)


def _parse_env(option: str, text: str) -> dict[str, str]:
  words = _split(option, text)
  for word in words:
    if not word.partition("=")[0].isidentifier() or "=" not in word:
      raise UserError(f'{option}: {word!r} is no NAME=VALUE; write --{option}="XLA_FLAGS=... OTHER=..."')
  return dict(word.split("=", 1) for word in words)


def _split(option: str, text: str) -> list[str]:
  try:
    return shlex.split(text)
  except ValueError as error:
    raise UserError(f"{option}: {text!r} cannot be split into words ({error}); close the quotes") from error


def positive(kind: type) -> Callable[[str], Any]:
  """How argparse reads a number above 0."""

  def parse_number(text: str) -> Any:
    value = kind(text)
    if value <= 0:
      raise ValueError
    return value

  parse_number.__name__ = f"positive {'whole ' if kind is int else ''}number"
  return parse_number


def _shape(text: str) -> tuple[int, ...]:
  sizes = tuple(int(part) for part in text.split(","))
  if len(sizes) != 3 or min(sizes) < 1:
    raise ValueError
  return sizes


_shape.__name__ = "H,W,C"
