"""Where an evaluation happens, and who listens."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

from ddpm_jax.runtime import console
from ddpm_jax.runtime.progress import Done, counted


@dataclasses.dataclass(frozen=True)
class Surroundings:
  """Where an evaluation happens, and who listens.

  Attributes:
    workdir: of the run; `eval/` in it is made.
    beat: called after each batch with what was done. May raise `Abandoned`.
    quiet: print nothing.
    given: names of the flags of this command.
    budget_s: seconds that drawing and likelihoods may take together, where their numbers are left open.
    estimates: say first how long it will take.
  """

  workdir: pathlib.Path
  beat: Callable[[str], None]
  quiet: bool
  given: frozenset[str] = frozenset()
  budget_s: float = 600.0
  estimates: bool = False

  @property
  def cache(self) -> pathlib.Path:
    """What may be deleted, and is then computed again."""
    return self.workdir / "eval" / "cache"

  def say(self, line: str) -> None:
    """Prints it."""
    if not self.quiet:
      console.say(line)

  @contextlib.contextmanager
  def counted(self, task: str, what: str, total: int) -> Iterator[Done]:
    """A progress bar that also beats: a function of how many of `what` are done in which task."""
    with counted(what, total=total, quiet=self.quiet) as (done, _):

      def done_and_beat(number: float, text: str = "") -> None:
        text = text or f"{task}: {what} {number}/{total}"
        done(number, text)
        self.beat(text)

      yield done_and_beat


class Abandoned(Exception):
  """An evaluation that was asked to stop; what it drew so far is kept."""
