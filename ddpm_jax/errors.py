"""What ends a run on purpose, and with which exit code."""

from __future__ import annotations


class UserError(Exception):
  """The command or its input is wrong. Printed as one line, exit code 2, no traceback."""


class RunError(Exception):
  """The run cannot go on for a reason outside of it: storage, a lost process. Printed as one line, exit code 1."""


class NonFiniteError(Exception):
  """The loss or the gradient became infinite or not a number. Printed as one line, exit code 3."""


def root_cause(error: BaseException) -> BaseException:
  """The first error of a chain of `raise ... from`: a save that failed because another process is lost, for one."""
  while error.__cause__ is not None:
    error = error.__cause__
  return error
