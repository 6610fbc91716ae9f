"""Further loggers of metrics, named by `--writers`: Weights & Biases, or a class of the user.

`metrics.jsonl` and TensorBoard's files, written by `writers.py`, are part of the workdir, and a checkpoint is not
written without them. These loggers are extras: the first failure of each is reported, and the run goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.runtime import console
from ddpm_jax.workdir.storage import write_whole

Settings = Mapping[str, Mapping[str, Any]]  # section -> option -> value, JSON values


class Logger(Protocol):
  """The interface of a class that `--writers=package.module:Class` names.

  It is made by Class(workdir, settings, resume_step): the folder of the run, its settings by section without folders of
  the machine, and the step after which training goes on; 0 for a new run. Steps up to there have been logged before. A
  run that was killed takes some later steps again: they then come again, with the same values.

  It is called by the training thread, on process 0. The first error that it raises is reported.
  """

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Takes the metrics of a training step. Those of an evaluation at the same step may follow."""
    ...

  def image(self, step: int, name: str, picture: np.ndarray) -> None:
    """Takes a picture uint8 [height, width, 3]."""
    ...

  def close(self) -> None:
    """The run has ended, or stops."""
    ...


class WandB:
  """A run of Weights & Biases. Project, entity, mode and so on are those of its environment variables, WANDB_*."""

  def __init__(self, workdir: pathlib.Path, settings: Settings, resume_step: int):
    """Starts the run, or resumes that of this workdir."""
    import wandb  # pyright: ignore[reportMissingImports]  an extra

    if (workdir / "wandb").is_symlink():
      raise RuntimeError(f"{workdir / 'wandb'} is a link, which may lead anywhere; remove it")
    self._wandb = wandb
    self._run = wandb.init(
      dir=workdir,
      id=_run_id(workdir / "wandb_id.txt"),
      resume="allow",
      project=os.environ.get("WANDB_PROJECT", "ddpm_jax"),
      name=os.environ.get("WANDB_NAME", workdir.name),
      config={name: dict(section) for name, section in settings.items()},
      settings=wandb.Settings(console="off", silent=True),  # it would put itself in the place of sys.stdout
    )
    console.say(f"Weights & Biases: {self._run.url or workdir / 'wandb'}")

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Logs them."""
    self._run.log(values, step=step)

  def image(self, step: int, name: str, picture: np.ndarray) -> None:
    """Logs it."""
    self._run.log({name: self._wandb.Image(picture)}, step=step)

  def close(self) -> None:
    """Ends the run, once all is uploaded."""
    self._run.finish()


def _run_id(path: pathlib.Path) -> str:
  """The identity of a workdir's run, kept in this file so that it stays when the run is resumed."""
  if not path.exists():
    write_whole(path, uuid.uuid4().hex.encode())
  return path.read_text(encoding="ascii").strip()


def find(names: Sequence[str]) -> dict[str, Callable[[pathlib.Path, Settings, int], Logger]]:
  """The classes of `--writers` by name, without 'tensorboard', which has none here.

  Raises:
    UserError: if one cannot be imported.
  """
  found = {}
  for name in names:
    if name == "wandb":
      package = importlib.util.find_spec("wandb")
      if package is None or package.origin is None:  # a folder of that name, as wandb makes them, is no package
        raise UserError("writers: wandb is not installed; pip install -e '.[wandb]', or leave it out of --writers")
      found[name] = WandB
    elif name != "tensorboard":
      found[name] = _imported(name)
  return found


def _imported(name: str) -> Any:
  module, _, attribute = name.partition(":")
  try:
    found = getattr(importlib.import_module(module), attribute)
  except (Exception, SystemExit) as error:  # the user's code, which may raise anything
    raise UserError(f"writers: {name} cannot be imported ({_line(error)}); mend it, or leave it out") from error
  if not callable(found):
    raise UserError(f"writers: {name} is a {type(found).__name__} and no class; name one")
  return found


class Loggers:
  """All of them. Nothing here raises."""

  def __init__(
    self,
    classes: Mapping[str, Callable[[pathlib.Path, Settings, int], Logger]],
    workdir: pathlib.Path,
    settings: Settings,
    resume_step: int,
  ):
    """Makes one of each of the classes that `find` found. One that fails is reported and left out."""
    self._failing: set[str] = set()
    self._loggers: dict[str, Logger] = {}
    for name, kind in classes.items():
      made = self._try(name, lambda kind=kind: kind(workdir, settings, resume_step))
      if made is not None:
        self._loggers[name] = made

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Hands the metrics of a step to all."""
    self._each(lambda logger: logger.scalars(step, dict(values)))

  def image(self, step: int, name: str, picture: np.ndarray) -> None:
    """Hands a picture uint8 [height, width, 3] to all."""
    self._each(lambda logger: logger.image(step, name, picture))

  def close(self) -> None:
    """Closes all."""
    self._each(lambda logger: logger.close())

  def _each(self, call: Callable[[Logger], None]) -> None:
    for name, logger in self._loggers.items():
      self._try(name, lambda logger=logger: call(logger))

  def _try(self, name: str, call: Callable[[], Any]) -> Any:
    """Returns what the call returns, None if it fails. The first failure of each logger is reported."""
    try:
      return call()
    except (Exception, SystemExit) as error:  # the user's code, which may raise anything
      if name not in self._failing:
        console.warn(f"writers: {name} fails ({_line(error)}); the run goes on, and metrics.jsonl has everything")
      self._failing.add(name)
    return None


def _line(error: BaseException) -> str:
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
