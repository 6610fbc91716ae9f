"""Millions of file names in an array: a list of them takes ten times the memory, and cannot be kept in a file."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

_ERRORS = "surrogateescape"  # a name that is no text keeps its bytes


class Names(Sequence[str]):
  """An immutable list of texts.

  Attributes:
    text: uint8, the UTF-8 of all of them, one after the other.
    ends: int64 [N], where each of them ends.
  """

  def __init__(self, text: np.ndarray, ends: np.ndarray):
    self.text, self.ends = text, ends

  @classmethod
  def of(cls, names: Iterable[str]) -> Names:
    """Packs them."""
    parts = [name.encode(errors=_ERRORS) for name in names]
    ends = np.fromiter(itertools.accumulate(map(len, parts)), np.int64, len(parts))
    return cls(np.frombuffer(b"".join(parts), np.uint8), ends)

  def __len__(self) -> int:
    return len(self.ends)

  @overload
  def __getitem__(self, index: int) -> str: ...
  @overload
  def __getitem__(self, index: slice) -> Names: ...
  def __getitem__(self, index: int | slice) -> str | Names:
    """One of them, or a copy of some."""
    if isinstance(index, slice):
      return Names.of(self[i] for i in range(*index.indices(len(self))))
    index = range(len(self))[index]  # negative ones, and the error for one that is none
    start = self.ends[index - 1] if index else 0
    return self.text[start : self.ends[index]].tobytes().decode(errors=_ERRORS)

  def __iter__(self) -> Iterator[str]:
    text, start = self.text.tobytes(), 0
    for end in self.ends.tolist():
      yield text[start:end].decode(errors=_ERRORS)
      start = end
