"""What ends a run on purpose, and with which exit code."""

from __future__ import annotations


class UserError(Exception):
  """The command or its input is wrong. Printed as one line, exit code 2, no traceback."""


class RunError(Exception):
  """The run cannot go on for a reason outside of it: storage, a lost process. Printed as one line, exit code 1."""


class NonFiniteError(Exception):
  """The loss or the gradient became infinite or not a number. Printed as one line, exit code 3."""
