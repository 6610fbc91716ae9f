"""Checkpoints: the one module that knows Orbax (v0 `CheckpointManager`). Restoring is exact or it raises."""

from __future__ import annotations

import errno
import functools
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as managers

from ddpm_jax.checkpoint import manifest as manifest_lib
from ddpm_jax.checkpoint.manifest import DamagedError, Manifest
from ddpm_jax.devices.hosts import any_host
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

_MIN_SLICE_BYTES = 2**20
_T = TypeVar("_T")


@functools.cache
def _save_small_arrays_whole() -> None:
  """Else every device writes a slice of a replicated array, of any size: thousands of transfers that steps wait for."""
  handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES)
  verbosity = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.ERROR)  # it would warn that there was a handler before
  ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
  absl_logging.set_verbosity(verbosity)


class Checkpoints:
  """The folder `checkpoints/` of a workdir: `N/` holds the state after N training steps and its manifest.

  Attributes:
    directory: the folder.
    read_only: whether nothing can be saved there.
  """

  def __init__(
    self, directory: pathlib.Path, *, keep: int | None = None, keep_step: int | None = None, keep_every: int = 0
  ):
    """Opens the folder, to write or only to read.

    Args:
      directory: the folder.
      keep: the newest checkpoints that are kept; None: only to read.
      keep_step: the training step of one that is kept beside them.
      keep_every: those at multiples of it are kept, too; 0: none.
    """
    self.directory, self._keep, self._keep_step, self._keep_every = directory, keep, keep_step, keep_every
    self.read_only = keep is None
    self._saving: int | None = None
    self._lame = False  # a save has failed on one of several processes: nothing collective works any more
    # What an earlier process left half-written is removed: the caller holds the workdir's lock.
    self._open(clean=keep is not None)

  def _open(self, *, clean: bool = False) -> None:
    _save_small_arrays_whole()
    if self._keep is None:
      options = ocp.CheckpointManagerOptions(read_only=True)
    else:
      kept = [managers.LatestN(self._keep), managers.CustomSteps([] if self._keep_step is None else [self._keep_step])]
      kept += [managers.EveryNSteps(self._keep_every)] if self._keep_every else []
      options = ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(kept),
        create=True,
        cleanup_tmp_directories=clean,
        async_options=ocp.AsyncOptions(timeout_secs=_PATIENCE_S),
      )
    handlers = {"state": ocp.StandardCheckpointHandler(), "manifest": ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

  def steps(self) -> list[int]:
    """The numbers of training steps in the checkpoints that are complete, in order."""
    return sorted(self._manager.all_steps())

  def newest(self) -> int | None:
    """The number of training steps in the newest checkpoint, or None."""
    return max(self.steps(), default=None)

  # Writing.

  def save(self, state: TrainState, step: int, facts: dict[str, Any]) -> None:
    """Starts writing the state after `step` training steps; returns once the state may be donated again.

    Args:
      state: global arrays.
      step: the number of training steps in it.
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
      raise RunError(f"checkpoint {step} was not written: {self.directory} already holds {self.newest()}")

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
    shutil.rmtree(self.directory / f"{step}.orbax-checkpoint-tmp", ignore_errors=True)
    try:
      self._open()
    except _ORBAX_ERRORS as second:
      return RunError(f"{what}; {_one_line(second)})")
    return RunError(f"{what}); the newest is {self.newest()}")

  # Reading.

  def candidates(self, *, on_corrupt: str = "fallback", only: int | None = None) -> Candidates:
    """The checkpoints to be tried in order, newest first.

    Args:
      on_corrupt: 'fallback' goes on to the next older one where one is damaged, 'fail' raises UserError.
      only: the step of the one checkpoint to read; None: all.
    """
    return Candidates(self, on_corrupt, only)

  def set_aside(self, step: int) -> pathlib.Path:
    """Moves a damaged checkpoint to `damaged/` beside the folder, so that its number can be saved again."""
    folder = self.directory.parent / "damaged"
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
          (self.directory / str(step)).rename(target)
        except OSError as error:
          raise RunError(f"checkpoint {step} cannot be moved to {target} ({error.strerror})") from error
    multihost_utils.sync_global_devices("the checkpoints have been moved")
    self._manager.close()
    self._open()

  def _agree(self, read: Callable[[], _T]) -> _T:
    """The result of `read`; DamagedError on all processes where one of them raises it."""
    problem, found = None, []
    try:
      found.append(read())
    except DamagedError as error:
      problem = error
    if any_host(problem is not None):
      raise problem or DamagedError("another process cannot read it")
    return found[0]

  def _read_manifest(self, step: int) -> Manifest:
    folder = self.directory / str(step) / "manifest"
    try:
      manifest = dict(ocp.JsonCheckpointHandler().restore(epath.Path(folder)))
    except _ORBAX_ERRORS as error:
      raise self._unreadable(step, error) from error
    manifest_lib.check(manifest, step)
    return manifest

  def _read_verified(self, step: int, manifest: Manifest, abstract_state: dict[str, Any]) -> dict[str, Any]:
    """The whole state as NumPy arrays, without a collective. Raises DamagedError, RunError."""
    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract_state)
    folder = self.directory / str(step) / "state"
    try:
      arrays = ocp.StandardCheckpointHandler().restore(epath.Path(folder), args=ocp.args.StandardRestore(target))
    except _ORBAX_ERRORS as error:
      raise self._unreadable(step, error) from error
    manifest_lib.verify(manifest, arrays)
    return arrays

  def _restore(self, step: int, manifest: Manifest, abstract_state: TrainState) -> TrainState:
    """The state of a checkpoint, verified. Raises DamagedError, on all processes or none; UserError, RunError."""
    stored = to_stored(abstract_state)
    differences = manifest_lib.differences(manifest, stored)
    if differences:  # Orbax would cast another type in silence
      others = f" (and {len(differences) - 1} more)" if differences[1:] else ""
      raise UserError(f"checkpoint {step} in {self.directory} is of another network: {differences[0]}{others}")
    # Each process reads and verifies everything by itself. Orbax would read in collectives, in which a process that
    # finds damage alone would leave the others for ever, and what is replicated once for each device.
    arrays = self._agree(lambda: self._read_verified(step, manifest, stored))
    state = jax.tree.map(_place, arrays, stored)
    # Arrays may share NumPy's memory, which cannot be donated; a compiled copy owns its own.
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
      return RunError(f"checkpoint {step} in {self.directory} cannot be read ({_one_line(root)})")
    return DamagedError(_one_line(root))

  def close(self) -> None:
    """Waits and ends the background threads. What failed in the background has been reported by `wait`."""
    if self._lame:
      return
    try:
      self._manager.close()
    except _ORBAX_ERRORS as error:
      raise self._failed(error) from error


class Candidate:
  """A checkpoint whose manifest is intact.

  Attributes:
    step: the number of training steps in it.
    manifest: what it is of.
  """

  def __init__(self, candidates: Candidates, step: int, manifest: Manifest):
    self.step, self.manifest, self._candidates = step, manifest, candidates

  def restore(self, abstract_state: TrainState) -> TrainState | None:
    """The state, bit for bit what was saved; None if its arrays are damaged, which `Candidates.damaged` then says.

    Args:
      abstract_state: shapes, types and shardings (ShapeDtypeStructs).

    Raises:
      UserError: if the arrays have other names, shapes or types than `abstract_state`.
      RunError: if the machine cannot read them now.
    """
    return self._candidates._try(self.step, lambda folder: folder._restore(self.step, self.manifest, abstract_state))


class Candidates:
  """The checkpoints of a folder, to be tried in order, newest first, until one is restored.

  An iteration that comes to its end has found nothing to restore. It raises UserError if that is because all are
  damaged, so that nobody trains anew over what was lost.

  Attributes:
    damaged: step -> reason, of those found so far that are not what was saved.
  """

  def __init__(self, checkpoints: Checkpoints, on_corrupt: str, only: int | None):
    self._folder, self._on_corrupt, self._only = checkpoints, on_corrupt, only
    self.damaged: dict[int, str] = {}
    self._vanished = False

  def __iter__(self) -> Iterator[Candidate]:
    """Raises UserError if all are damaged, or one is and that is an error; or if there are some, but not `only`."""
    todo, refused = self._steps(), False
    while todo:
      step = todo.pop()
      manifest = self._try(step, lambda folder, step=step: folder._agree(lambda: folder._read_manifest(step)))
      if manifest is not None:
        yield Candidate(self, step, manifest)
        refused |= step not in self.damaged and not self._vanished
      if self._vanished:  # deleted by the run that trains here, which has saved newer ones since
        self._folder._open()
        todo, self._vanished = self._steps(), False
    if not self.damaged or refused:
      return
    if self._only is not None:
      raise UserError(
        f"checkpoint: {self._only} in {self._folder.directory} is damaged: {self.damaged[self._only]}; use another one"
      )
    listed = "; ".join(f"{step}: {reason:.100}" for step, reason in self.damaged.items())
    raise UserError(
      f"workdir: no checkpoint in {self._folder.directory} is intact ({listed}); restore one from a copy, or use "
      "another --workdir"
    )

  def _steps(self) -> list[int]:
    steps = self._folder.steps()
    if self._only is None or not steps:
      return steps
    if self._only not in steps:
      listed = ", ".join(map(str, steps))
      raise UserError(f"checkpoint: {self._folder.directory} has no {self._only}, only {listed}")
    return [self._only]

  def _try(self, step: int, read: Callable[[Checkpoints], _T]) -> _T | None:
    """The result of `read`; None where it finds damage, which is noted, or a checkpoint deleted meanwhile."""
    try:
      return read(self._folder)
    except DamagedError as error:
      if self._folder.read_only and not (self._folder.directory / str(step)).exists():
        self._vanished = True
        return None
      self.damaged[step] = str(error)
      if self._on_corrupt == "fail":
        raise UserError(
          f"on_corrupt: checkpoint {step} in {self._folder.directory} is damaged: {error}; use --on_corrupt=fallback "
          "to go back to the newest intact one"
        ) from error
      return None


def _place(array: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  """The array where `leaf` says."""
  return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: np.asarray(array)[index])


def _one_line(error: BaseException) -> str:
  """The message of an error on one line; the middle of a long one is left out."""
  text = str(error).split(" See full TensorStore details")[0].split(" [tensorstore_spec=")[0]
  text = " ".join(text.split()) or type(error).__name__
  return text if len(text) <= 300 else f"{text[:150]} ... {text[-145:]}"
