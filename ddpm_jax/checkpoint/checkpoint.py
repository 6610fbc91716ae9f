"""Checkpoints: the one module that knows Orbax (v0 `CheckpointManager`). Restoring is exact or it raises."""

from __future__ import annotations

import errno
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as managers

from ddpm_jax.checkpoint import manifest as manifest_lib
from ddpm_jax.checkpoint.manifest import DamagedError, Manifest, OtherPastError
from ddpm_jax.devices.parallel import on_any_process
from ddpm_jax.errors import RunError, UserError, root_cause
from ddpm_jax.training.state import TrainState, from_stored, to_stored

# What Orbax and TensorStore raise where a file is missing, cut short or changed, or cannot be written: any type at all,
# down to AssertionError and Exception itself. Each `try` holds one call of Orbax and nothing of ours.
_ORBAX_ERRORS = Exception
# Not the checkpoint's fault: the same file may be read tomorrow.
_NOT_DAMAGE = re.compile(
  "RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|gloo", re.I
)
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_PATIENCE_S = 300  # for the others, where a process cannot write its part of a checkpoint

Expect = Callable[[Manifest], TrainState]


class Restored(NamedTuple):
  """A checkpoint that was read and found to be what was saved."""

  step: int
  state: TrainState
  manifest: Manifest
  damaged: dict[int, str]  # newer checkpoints that were not, and why
  passed: list[int]  # newer ones that are of another past, in order


class NoneInCommonError(UserError):
  """No checkpoint is left from before the step at which a run of this length parts from the one that wrote them.

  Attributes:
    since: that step.
    damaged: checkpoints that are not what was saved, and why.
    passed: those that are of another past, in order.
  """

  def __init__(self, errors: Mapping[int, OtherPastError], damaged: dict[int, str]):
    super().__init__(str(errors[min(errors)]))
    self.since = min(error.since for error in errors.values())
    self.damaged, self.passed = damaged, sorted(errors)


class Checkpoints:
  """The folder `checkpoints/` of a workdir: `N/` holds the state after N updates and the manifest of it."""

  def __init__(self, directory: pathlib.Path, *, keep: int | None = None, keep_step: int | None = None):
    """Opens the folder: to write, keeping the newest `keep` checkpoints and that of `keep_step`, or only to read.

    Only to read if `keep` is None.
    """
    self._directory, self._keep, self._keep_step = directory, keep, keep_step
    self._saving: int | None = None
    self._lame = False  # a save has failed on one of several processes: nothing collective works any more
    # What an earlier process left half-written is removed: the caller holds the workdir's lock.
    self._open(clean=keep is not None)

  def _open(self, *, clean: bool = False) -> None:
    if self._keep is None:
      options = ocp.CheckpointManagerOptions(read_only=True)
    else:
      kept = [managers.LatestN(self._keep), managers.CustomSteps([] if self._keep_step is None else [self._keep_step])]
      options = ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(kept),
        create=True,
        cleanup_tmp_directories=clean,
        async_options=ocp.AsyncOptions(timeout_secs=_PATIENCE_S),
      )
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
    stored = to_stored(state)
    manifest = manifest_lib.make(stored, step, facts)
    args = ocp.args.Composite(state=ocp.args.StandardSave(stored), manifest=ocp.args.JsonSave(manifest))
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
    what = f"checkpoint {step} could not be written ({_one_line(root_cause(error))}"
    if jax.process_count() > 1:  # opening is a collective, and the others may not be here
      self._lame = True
      return RunError(f"{what})")
    # What there is of it takes space that is missing. Orbax may believe that the checkpoint exists: look again.
    shutil.rmtree(self._directory / f"{step}.orbax-checkpoint-tmp", ignore_errors=True)
    try:
      self._open()
    except _ORBAX_ERRORS as second:
      return RunError(f"{what}; {_one_line(second)})")
    return RunError(f"{what}); the newest is {self.newest()}")

  # Reading.

  def restore(self, expect: Expect, *, on_corrupt: str = "fallback", only: int | None = None) -> Restored | None:
    """Reads the newest checkpoint that is, bit for bit, what was saved. None if there is no checkpoint at all.

    Args:
      expect: manifest -> shapes, types and shardings of the state (ShapeDtypeStructs). It raises UserError if the
        manifest is of another run, and OtherPastError, with the message for a person, if an older checkpoint is needed.
      on_corrupt: 'fallback' goes on to the next older one where one is damaged, 'fail' does not.
      only: the number of the one checkpoint to read.

    Raises:
      UserError: if a checkpoint's arrays have other names, shapes or types than `expect` wants; or if one is damaged
        and `on_corrupt` is 'fail', or none is intact; or if there are some, but not `only`.
      NoneInCommonError: a UserError: all are of another past.
    """
    damaged: dict[int, str] = {}
    passed: dict[int, OtherPastError] = {}
    steps = self.steps()
    if only is not None and steps:
      if only not in steps:
        raise UserError(f"checkpoint: {self._directory} has no {only}, only {', '.join(map(str, steps))}")
      steps = [only]
    for step in reversed(steps):
      try:
        manifest, abstract_state = self._check_alone(step, expect)
        state = self._read_state(step, manifest, abstract_state)
      except DamagedError as error:
        if self._keep is None and not (self._directory / str(step)).exists():
          self._open()  # deleted by the run that trains here, which has saved newer ones since
          return self.restore(expect, on_corrupt=on_corrupt, only=only)
        damaged[step] = str(error)
        if on_corrupt == "fail":
          raise UserError(
            f"on_corrupt: checkpoint {step} in {self._directory} is damaged: {error}; use --on_corrupt=fallback to go "
            "back to the newest intact one"
          ) from error
      except OtherPastError as error:
        passed[step] = error
      else:
        return Restored(step, state, manifest, damaged, sorted(passed))
    if passed:
      raise NoneInCommonError(passed, damaged) from passed[min(passed)]
    if damaged:
      if only is not None:
        raise UserError(f"checkpoint: {only} in {self._directory} is damaged: {damaged[only]}; use another one")
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
    self.move({step: target})
    return target

  def move(self, targets: Mapping[int, pathlib.Path]) -> None:
    """Moves checkpoints, one after the other, so that their numbers can be saved again; all processes must call it.

    Raises:
      RunError: if one cannot be moved.
    """
    if jax.process_index() == 0:
      for step, target in targets.items():
        try:
          target.parent.mkdir(parents=True, exist_ok=True)
          (self._directory / str(step)).rename(target)
        except OSError as error:
          raise RunError(f"checkpoint {step} cannot be moved to {target} ({error.strerror})") from error
    multihost_utils.sync_global_devices("the checkpoints have been moved")
    self._manager.close()
    self._open()

  def _check_alone(self, step: int, expect: Expect) -> tuple[Manifest, dict[str, Any]]:
    """The manifest, and the abstract state that it leads to; DamagedError or OtherPastError on all processes or none.

    Orbax reads in collectives, in which a process that finds damage alone would leave the others for ever. So where
    there are several, each reads and verifies all by itself first, and they compare what they found.
    """
    problem, past, found = None, None, None
    try:
      manifest = self._read_manifest(step)
      found = manifest, self._expected(expect, manifest, step)
      if jax.process_count() > 1:
        manifest_lib.verify_host(manifest, self._read_on_host(step, found[1]))
    except DamagedError as error:
      problem = error
    except OtherPastError as error:  # of the same manifest on all
      past = error
    if on_any_process(problem is not None):
      raise problem or DamagedError("another process cannot read it")
    if past:
      raise past
    assert found is not None
    return found

  def _read_manifest(self, step: int) -> Manifest:
    folder = self._directory / str(step) / "manifest"
    try:
      manifest = dict(ocp.JsonCheckpointHandler().restore(epath.Path(folder)))
    except _ORBAX_ERRORS as error:
      raise self._unreadable(step, error) from error
    manifest_lib.check(manifest, step)
    return manifest

  def _read_on_host(self, step: int, abstract_state: dict[str, Any]) -> dict[str, Any]:
    """The whole state as NumPy arrays, without a collective."""
    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract_state)
    folder = self._directory / str(step) / "state"
    try:
      return ocp.StandardCheckpointHandler().restore(epath.Path(folder), args=ocp.args.StandardRestore(target))
    except _ORBAX_ERRORS as error:
      raise self._unreadable(step, error) from error

  def _expected(self, expect: Expect, manifest: Manifest, step: int) -> dict[str, Any]:
    abstract_state = to_stored(expect(manifest))
    differences = manifest_lib.differences(manifest, abstract_state)
    if differences:  # Orbax would cast another type in silence
      others = f" (and {len(differences) - 1} more)" if differences[1:] else ""
      raise UserError(f"checkpoint {step} in {self._directory} is of another network: {differences[0]}{others}")
    return abstract_state

  def _read_state(self, step: int, manifest: Manifest, abstract_state: dict[str, Any]) -> TrainState:
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
    try:
      state = self._manager.restore(step, args=args)["state"]
    except _ORBAX_ERRORS as error:
      raise self._unreadable(step, error) from error
    manifest_lib.verify(manifest, state)
    # Orbax's arrays may share buffers that cannot be donated; a compiled copy owns its own.
    return from_stored(jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(state))

  def _unreadable(self, step: int, error: Exception) -> Exception:
    """What an error of Orbax means: a damaged checkpoint, or a machine that cannot read it now."""
    root = root_cause(error)  # Orbax wraps TensorStore's
    text = str(root)
    codes = [int(code) for code in re.findall(r"os_error_code='(\d+)'", text)]
    if isinstance(root, OSError) and root.errno is not None:
      codes.append(root.errno)
    strange = isinstance(root, MemoryError | jax.errors.JaxRuntimeError) or any(code not in _MISSING for code in codes)
    if strange or _NOT_DAMAGE.search(text):
      return RunError(f"checkpoint {step} in {self._directory} cannot be read ({_one_line(root)})")
    return DamagedError(_one_line(root))

  def close(self) -> None:
    """Waits and ends the background threads. What failed in the background has been told by `wait`."""
    if self._lame:
      return
    try:
      self._manager.close()
    except _ORBAX_ERRORS as error:
      raise self._failed(error) from error


def _one_line(error: BaseException) -> str:
  """The message of an error on one line; the middle of a long one is left out."""
  text = str(error).split(" See full TensorStore details")[0].split(" [tensorstore_spec=")[0]
  text = " ".join(text.split()) or type(error).__name__
  return text if len(text) <= 300 else f"{text[:150]} ... {text[-145:]}"
