"""A process of its own for each setting: it prepares (compiles) once, and runs a block of work whenever it is asked.

So environment variables, libraries and compilation caches of two settings do not meet, and only one computes at a time.
The two sides talk in lines of JSON over the child's standard input and output. Standard library only: a worker may run
with another Python, which has PyTorch and no JAX.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from ddpm_jax.errors import RunError, UserError
from ddpm_jax.runtime import compilation, hugepages

ROOT = pathlib.Path(__file__).parents[1]
# What a worker can do: modules of this folder with prepare(job) -> (facts, block), block(case, count) -> measurement.
WORKS = ("draw_work", "read_work", "step_work", "torch_loop", "torch_read")
ENVIRONMENT = {
  "JAX_ENABLE_COMPILATION_CACHE": "false",  # compile times are those of a first start
  "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the workers share the devices
}


class Worker:
  """The parent's side of a worker."""

  def __init__(self, name: str, work: str, *, python: str = sys.executable, env: dict[str, str] | None = None):
    """Starts the process; it has nothing to do until `prepare`.

    Args:
      name: what messages call it.
      work: one of WORKS.
      python: the interpreter.
      env: variables for it, over those of this process and ENVIRONMENT.

    Raises:
      UserError: if there is no such interpreter.
    """
    self.name = name
    variables = ENVIRONMENT | os.environ | (env or {})
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by `close`
    try:
      self._process = subprocess.Popen(
        [python, "-m", "benchmarks.worker", work],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=self._log,
        env=variables,
        text=True,
      )
    except OSError as error:
      self._log.close()
      raise UserError(f"cannot start {python!r} ({error.strerror}); name a Python interpreter") from error

  def prepare(self, job: dict[str, Any]) -> dict[str, Any]:
    """Lets it get ready. Returns facts about the setting, such as how long it took to compile."""
    return self._ask(job)

  def block(self, case: str, count: int) -> dict[str, Any]:
    """Lets it run `count` units of work. Returns the measurement.

    At least `images`, `seconds`, and `cpu_seconds`: the time of all cores for it.
    """
    return self._ask({"case": case, "count": count})

  def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
    """Raises UserError for what the worker refuses, RunError if it is gone."""
    assert self._process.stdin and self._process.stdout
    with contextlib.suppress(BrokenPipeError):  # then the answer is empty
      self._process.stdin.write(json.dumps(request) + "\n")
      self._process.stdin.flush()
    answer = self._process.stdout.readline()
    if not answer:
      self._process.wait()
      self._log.seek(0)
      code, why = self._process.returncode, last_words(self._log.read())
      raise RunError(f"the worker of {self.name} ended with exit code {code}: {why}")
    parsed = json.loads(answer)
    if "refused" in parsed:
      raise UserError(parsed["refused"])
    return parsed

  def close(self) -> None:
    """Ends the process."""
    assert self._process.stdin and self._process.stdout
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    try:
      self._process.wait(timeout=20)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()
    self._log.close()


def last_words(said: str) -> str:
  """The line of a dead process's standard error that tells most: that of its last exception, or else the last one."""
  lines = said.strip().splitlines()
  errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
  return [*lines, *errors][-1].strip() if lines else "it said nothing"


def serve(prepare: Callable, requests: Iterator[str], answer: Callable[[dict], None]) -> None:
  """The child's side: the first line is the job, each other one a block, until there are no more."""
  try:
    facts, block = prepare(json.loads(next(requests)))
    answer(facts)
    for line in requests:
      answer(block(**json.loads(line)))
  except UserError as error:
    answer({"refused": str(error)})


def main() -> None:
  """Serves over standard input and output. What libraries print goes to standard error."""
  work = sys.argv[1]
  assert work in WORKS
  with os.fdopen(os.dup(1), "w") as answers:
    os.dup2(2, 1)

    def answer(facts: dict) -> None:
      answers.write(json.dumps(facts) + "\n")
      answers.flush()

    if not work.startswith("torch"):
      compilation.set_xla_flags()  # as the command does
    serve(importlib.import_module(f"benchmarks.{work}").prepare, sys.stdin, answer)


if __name__ == "__main__":
  hugepages.restart_with_huge_pages("benchmarks.worker")  # as the command does; benchmarks.pytorch says for PyTorch
  main()
