"""The end of a run that is made longer: steps whose learning rate decayed, which the longer run makes otherwise."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Sequence

import jax

from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.evaluation import perceptual
from ddpm_jax.workdir import grids, layout


def _step_of(path: pathlib.Path) -> int:
  """The number of training steps of the weights that drew or measured what a file holds; 0 if it does not say."""
  name = path.name.removeprefix("step_").split(".")[0]
  step = int(name) if name.isdecimal() else grids.facts_of(path.with_suffix(".png")).get("checkpoint")
  return step if isinstance(step, int) else 0


def set_aside(workdir: pathlib.Path, checkpoints: Checkpoints, steps: Sequence[int], after: int) -> pathlib.Path:
  """Moves what was made after a step to `earlier/N/`, a workdir of its own to draw from; all processes must call it.

  These are checkpoints, sample grids, draws and evaluations. Checkpoints go last, and the newest of them at the end:
  after a kill the same command finds it, and goes on with moving.

  Args:
    workdir: of the run, with the settings that these steps were trained with.
    checkpoints: its checkpoints.
    steps: the numbers of those to move, in order; N is the last.
    after: the step from which the run goes on.

  Returns:
    The new workdir.

  Raises:
    RunError: if something cannot be moved.
  """
  target, number = workdir / "earlier" / str(steps[-1]), 0
  while (target / "checkpoints" / str(steps[-1])).exists():  # of the same length, set aside before
    number += 1
    target = workdir / "earlier" / f"{steps[-1]}.{number}"
  if jax.process_index() == 0:
    stored = layout.load_config(workdir)
    try:
      layout.create(target, stored, layout.own_parts(workdir))
      for name in ("metrics.jsonl", perceptual.NAME):
        if (workdir / name).exists():
          shutil.copy2(workdir / name, target)
      if (workdir / "first_stage").exists():
        shutil.copytree(workdir / "first_stage", target / "first_stage", dirs_exist_ok=True)
      for folder in ("samples", "eval"):
        (target / folder).mkdir(exist_ok=True)
        found = sorted((workdir / folder).iterdir()) if (workdir / folder).exists() else ()
        for path in [path for path in found if _step_of(path) > after]:
          path.replace(target / folder / path.name)
    except UserError as error:
      raise RunError(f"{error.__cause__ or error}: the end of {workdir} cannot be moved to {target}") from error
    except OSError as error:
      raise RunError(f"workdir: cannot move {error.filename or workdir} to {target} ({error.strerror})") from error
  checkpoints.move({step: target / "checkpoints" / str(step) for step in steps})
  return target
