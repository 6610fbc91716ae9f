"""An option: a dataclass field that carries its help text, its range, and when it may change."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from typing import Any

from ddpm_jax.errors import UserError


def option(
  default: Any,
  help: str,
  *,
  choices: tuple[str, ...] = (),
  size: bool = False,
  item: type = int,
  minimum: float | None = None,
  above: float | None = None,
  maximum: float | None = None,
  below: float | None = None,
  may_change: bool = False,
  may_change_once_trained: bool = False,
) -> Any:
  """A dataclass field that carries its help text, its range, and when it may change.

  Args:
    default: the field's default.
    help: text of the flag.
    choices: all values of a text, or of the parts of a tuple of texts.
    size: the number is the side of square images, and a text 'HEIGHTxWIDTH' may stand in its place.
    item: type of the parts of a tuple without choices.
    minimum, above, maximum, below: the range of a number.
    may_change: a resumed run may have another value.
    may_change_once_trained: drawing, measuring and exporting may use another value than the run that trained the
      weights; a resumed run may not.
  """
  return dataclasses.field(
    default=default,
    metadata={
      "help": help,
      "choices": choices,
      "size": size,
      "item": str if choices else item,
      "minimum": minimum,
      "above": above,
      "maximum": maximum,
      "below": below,
      "may_change": may_change,
      "may_change_once_trained": may_change or may_change_once_trained,
    },
  )


def flag_text(value: Any) -> str:
  """An option's value as it is written on the command line."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, tuple):
    return ",".join(map(str, value))
  return str(value)


def image_size(height: int, width: int) -> int | str:
  """The one value of an option `size` for images of that height and width in pixels, such as 64 or '48x64'."""
  return height if height == width else f"{height}x{width}"


def height_and_width(size: int | str) -> tuple[int, int]:
  """The inverse of `image_size`."""
  if isinstance(size, int):
    return size, size
  height, width = map(int, size.split("x"))
  return height, width


def _check_size(name: str, text: str) -> None:
  """Raises UserError unless a text is one of `image_size`."""
  if not re.fullmatch(r"[1-9][0-9]*x[1-9][0-9]*", text):
    raise UserError(f"{name}: {text!a} is no size; write 64, or height x width such as 48x64")
  height, width = height_and_width(text)
  if height == width:
    raise UserError(f"{name}: {text!r} is a square; write {height}")


def _check_text(name: str, text: str) -> None:
  """Raises UserError for a text that flags.txt could not give back: absl reads a flag a line, and strips the lines."""
  try:
    text.encode()
  except UnicodeEncodeError:
    raise UserError(f"{name}: {text!a} is not UTF-8; rename what it names") from None
  letter = next((letter for letter in "\n\r\0" if letter in text), "")
  if letter or text != text.rstrip():
    problem = f"has the character {letter!a}" if letter else "ends with white space"
    raise UserError(f"{name}: {text!a} {problem}, which a flagfile cannot hold; rename what it names")


_LIMITS = (
  ("minimum", operator.ge, "must be at least"),
  ("above", operator.gt, "must be greater than"),
  ("maximum", operator.le, "must be at most"),
  ("below", operator.lt, "must be less than"),
)


def check_range(field: dataclasses.Field, value: Any) -> None:
  """Raises UserError if `value` is not one of the field's choices or outside its range."""
  rules, kind = field.metadata, type(field.default)
  if kind is float and type(value) is int:
    kind = int
  parts = value if isinstance(value, tuple) else (value,)
  items = (int, float) if rules["item"] is float else (rules["item"],)  # of a tuple
  if rules["size"] and isinstance(value, str):
    _check_size(field.name, value)
    return
  if type(value) is not kind or (kind is tuple and any(type(part) not in items for part in parts)):
    raise UserError(f"{field.name}: {value!r} is not of its type, {kind.__name__}; write it like {field.default!r}")
  for choice in parts if rules["choices"] else ():
    if choice not in rules["choices"]:
      raise UserError(f"{field.name}: {choice!r} is unknown; use one of {', '.join(rules['choices'])}")
  for text in (part for part in parts if isinstance(part, str)):
    _check_text(field.name, text)
  for number in parts:
    if isinstance(number, str | bool):
      continue
    if not math.isfinite(number):
      raise UserError(f"{field.name}: {number} is not a finite number")
    for name, inside, sentence in _LIMITS:
      limit = rules[name]
      if limit is not None and not inside(number, limit):
        raise UserError(f"{field.name}: {number} {sentence} {int(limit) if limit == int(limit) else limit}")
