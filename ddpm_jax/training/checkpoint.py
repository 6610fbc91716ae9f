"""Checkpoints: the one module that knows Orbax (v0 `CheckpointManager`). Restoring is exact or it raises."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ddpm_jax.errors import RunError, UserError
from ddpm_jax.training import manifest as manifest_lib
from ddpm_jax.training.manifest import DamagedError, Manifest
from ddpm_jax.training.parallel import on_any_process
from ddpm_jax.training.state import TrainState

# What Orbax and TensorStore raise where a file is missing, cut short or changed, or cannot be written: any type at all,
# down to AssertionError and Exception itself. Each `try` holds one call of Orbax and nothing of ours.
_ORBAX_ERRORS = Exception
# Not the checkpoint's fault: the same file may be read tomorrow.
_NOT_DAMAGE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Permission denied")

Expect = Callable[[Manifest], TrainState]


class Restored(NamedTuple):
  """A checkpoint that was read and found to be what was saved."""

  step: int
  state: TrainState
  manifest: Manifest
  damaged: dict[int, str]  # newer checkpoints that were not, and why


class Checkpoints:
  """The folder `checkpoints/` of a workdir: `N/` holds the state after N updates and the manifest of it."""

  def __init__(self, directory: pathlib.Path, *, keep: int | None = None):
    """Opens the folder: to write, keeping the newest `keep` checkpoints, or only to read if `keep` is None."""
    self._directory, self._keep = directory, keep
    self._saving: int | None = None
    # What an earlier process left half-written is removed: the caller holds the workdir's lock.
    self._open(clean=keep is not None)

  def _open(self, *, clean: bool = False) -> None:
    if self._keep is None:
      options = ocp.CheckpointManagerOptions(read_only=True)
    else:
      options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True, cleanup_tmp_directories=clean)
    handlers = {"state": ocp.StandardCheckpointHandler(), "manifest": ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

  def steps(self) -> list[int]:
    """The numbers of updates in the checkpoints that are complete, in order."""
    return sorted(self._manager.all_steps())

  def newest(self) -> int | None:
    """The number of updates in the newest checkpoint, or None."""
    return max(self.steps(), default=None)

  # Writing.

  def save(self, state: TrainState, step: int, facts: dict[str, Any]) -> None:
    """Starts writing the state after `step` updates; returns once the state may be donated again.

    Args:
      state: global arrays.
      step: the number of updates in it.
      facts: for the manifest, JSON values.

    Raises:
      NonFiniteError: if a leaf is not finite.
      RunError: if it cannot be written, or one of this number or a later one exists. What fails later, in the
        background, is raised by `finished` or `wait`.
    """
    manifest = manifest_lib.make(state, step, facts)
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), manifest=ocp.args.JsonSave(manifest))
    self._saving = step
    try:
      started = self._manager.save(step, args=args)
    except _ORBAX_ERRORS as error:
      raise self._failed(error) from error
    if not started:  # Orbax's only word for an old step
      self._saving = None
      raise RunError(f"checkpoint {step} was not written: {self._directory} already holds {self.newest()}")

  def finished(self) -> bool:
    """Whether nothing is being written. Raises RunError if the last save has failed."""
    if self._saving is not None and not self._manager.is_saving_in_progress():
      self.wait()
    return self._saving is None

  def wait(self) -> None:
    """Waits until everything is on disk. Raises RunError if it could not be written."""
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except _ORBAX_ERRORS as error:
      raise self._failed(error) from error
    self._saving = None

  def _failed(self, error: Exception) -> RunError:
    step, self._saving = self._saving, None
    reason = _one_line(error)
    try:
      # Orbax may believe that the checkpoint exists: look again. Not clean: its threads may still be writing there.
      self._open()
    except _ORBAX_ERRORS as second:
      return RunError(f"checkpoint {step} could not be written ({reason}; {_one_line(second)})")
    return RunError(f"checkpoint {step} could not be written ({reason}); the newest is {self.newest()}")

  # Reading.

  def restore(self, expect: Expect, *, on_corrupt: str = "fallback") -> Restored | None:
    """Reads the newest checkpoint that is, bit for bit, what was saved. None if there is no checkpoint at all.

    Args:
      expect: manifest -> shapes, types and shardings of the state (ShapeDtypeStructs). It raises UserError if the
        manifest is of another run.
      on_corrupt: 'fallback' goes on to the next older one where one is damaged, 'fail' does not.

    Raises:
      UserError: if a checkpoint's arrays have other names, shapes or types than `expect` wants; or if one is damaged
        and `on_corrupt` is 'fail', or none is intact.
    """
    damaged: dict[int, str] = {}
    for step in reversed(self.steps()):
      state = manifest = None
      try:
        manifest = self._read_manifest(step)
        state = self._read_state(step, manifest, self._expected(expect, manifest, step))
      except DamagedError as error:
        damaged[step] = str(error)
      if on_any_process(step in damaged):
        damaged.setdefault(step, "another process cannot read it")
        if on_corrupt == "fail":
          raise UserError(
            f"on_corrupt: checkpoint {step} in {self._directory} is damaged: {damaged[step]}; use "
            "--on_corrupt=fallback to go back to the newest intact one"
          )
        continue
      assert state is not None and manifest is not None
      return Restored(step, state, manifest, damaged)
    if damaged:
      listed = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
      raise UserError(f"workdir: no checkpoint in {self._directory} is intact ({listed}); restore one from a copy")
    return None

  def set_aside(self, step: int) -> pathlib.Path:
    """Moves a damaged checkpoint to `damaged/` beside the folder, so that its number can be saved again."""
    folder = self._directory.parent / "damaged"
    target, number = folder / str(step), 0
    while target.exists():
      number += 1
      target = folder / f"{step}.{number}"
    multihost_utils.sync_global_devices("every process has chosen where to move the checkpoint")
    if jax.process_index() == 0:
      folder.mkdir(exist_ok=True)
      (self._directory / str(step)).rename(target)
    multihost_utils.sync_global_devices("the checkpoint has been moved")
    self._manager.close()
    self._open()
    return target

  def _read_manifest(self, step: int) -> Manifest:
    try:
      manifest = self._manager.restore(step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))["manifest"]
    except _ORBAX_ERRORS as error:
      raise self._unreadable(step, error) from error
    manifest_lib.check(manifest, step)
    return manifest

  def _expected(self, expect: Expect, manifest: Manifest, step: int) -> TrainState:
    abstract_state = expect(manifest)
    differences = manifest_lib.differences(manifest, abstract_state)
    if differences:  # Orbax would cast another type in silence
      others = f" (and {len(differences) - 1} more)" if differences[1:] else ""
      raise UserError(f"checkpoint {step} in {self._directory} is of another network: {differences[0]}{others}")
    return abstract_state

  def _read_state(self, step: int, manifest: Manifest, abstract_state: TrainState) -> TrainState:
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
    try:
      state = self._manager.restore(step, args=args)["state"]
    except _ORBAX_ERRORS as error:
      raise self._unreadable(step, error) from error
    manifest_lib.verify(manifest, state)
    # Orbax's arrays may share buffers that cannot be donated; a compiled copy owns its own.
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(state)

  def _unreadable(self, step: int, error: Exception) -> Exception:
    """What an error of Orbax means: a damaged checkpoint, or a machine that cannot read it now."""
    reason = _one_line(error)
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | FileExistsError)
    if (isinstance(error, OSError) and not missing) or any(word in reason for word in _NOT_DAMAGE):
      return RunError(f"checkpoint {step} in {self._directory} cannot be read ({reason})")
    return DamagedError(reason)

  def close(self) -> None:
    """Waits and ends the background threads. What failed in the background has been told by `wait`."""
    try:
      self._manager.close()
    except _ORBAX_ERRORS as error:
      raise self._failed(error) from error


def _one_line(error: Exception) -> str:
  """The message of an error on one line; the middle of a long one is left out."""
  text = str(error).split(" See full TensorStore details")[0].split(" [tensorstore_spec=")[0]
  text = " ".join(text.split()) or type(error).__name__
  return text if len(text) <= 300 else f"{text[:150]} ... {text[-145:]}"
