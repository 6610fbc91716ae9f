"""Verdicts on the options of diffusers: understood at these values, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddpm_jax.errors import UserError

Options = Mapping[str, Any]  # of a config.json


def check_class(options: Options, known: Sequence[str]) -> None:
  """Raises UserError unless the model is of one of these classes."""
  if options.get("_class_name") not in known:
    raise UserError(f"_class_name: {options.get('_class_name')!r} is not supported, only {' and '.join(known)}")


def check_known(options: Options, understood: set[str], only: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> None:
  """Raises UserError for an option that is in neither, or in `only` (default, values) with another value."""
  for name in options:
    if not name.startswith("_") and name not in understood and name not in only:
      raise UserError(f"{name}: {options[name]!r} is an option that is not supported")
  for name, (default, values) in only.items():
    check_value(options, name, default, values)


def check_value(options: Options, name: str, default: Any, values: Sequence[Any]) -> None:
  """Raises UserError unless the option, or its default, is one of the values."""
  value = options.get(name, default)
  if value not in values:
    missing = "" if name in options else " (it is missing, which means that)"
    raise UserError(f"{name}: {value!r} is not supported, only {' or '.join(map(repr, values))}{missing}")


def one_of(options: Options, name: str, default: str, ours_to_theirs: Mapping[str, str]) -> str:
  """The key of the mapping whose value the option has. Raises UserError if there is none."""
  value = options.get(name, default)
  for ours, theirs in ours_to_theirs.items():
    if theirs == value:
      return ours
  raise UserError(f"{name}: {value!r} is not supported, only {', '.join(dict.fromkeys(ours_to_theirs.values()))}")


def whole_number(options: Options, name: str, default: int) -> int:
  """The option as a number of at least 1. Raises UserError."""
  value = options.get(name, default)
  if type(value) is not int or value < 1:
    raise UserError(f"{name}: {value!r} is no number of at least 1")
  return value


def whole_numbers(options: Options, name: str, default: Sequence[int]) -> tuple[int, ...]:
  """The option as such numbers, at least one of them. Raises UserError."""
  values = options.get(name, default)
  if not isinstance(values, list | tuple) or not values or any(type(value) is not int or value < 1 for value in values):
    raise UserError(f"{name}: {values!r} is no list of numbers of at least 1")
  return tuple(values)


def image_shape_of(options: Options) -> tuple[int, int, int]:
  """H, W, C of the images of a network. Raises UserError."""
  channels = whole_number(options, "in_channels", 3)
  check_value(options, "out_channels", 3, (channels,))
  match options.get("sample_size"):
    case [height, width] if all(type(side) is int and side > 0 for side in (height, width)):
      return height, width, channels
    case side if type(side) is int and side > 0:
      return side, side, channels
    case size:
      raise UserError(f"sample_size: {size!r} is no size of images; write one number, or height and width")
