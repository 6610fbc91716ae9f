"""Checkpoints: the one module that knows Orbax (v0 `CheckpointManager`). Restoring is exact or it raises."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ddpm_jax.errors import UserError
from ddpm_jax.training.state import TrainState


class Checkpoints:
  """The folder `checkpoints/` of a workdir: `N/` holds the state after N updates, and what is needed to rebuild it."""

  def __init__(self, directory: pathlib.Path, *, keep: int | None = None):
    """Opens the folder: to write, keeping the newest `keep` checkpoints, or only to read if `keep` is None."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None, enable_async_checkpointing=True)
    handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
    self._directory = directory

  def latest_step(self) -> int | None:
    """The number of updates in the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, state: TrainState, step: int, meta: dict[str, Any]) -> None:
    """Starts writing the state after `step` updates; returns once the state may be donated again.

    Args:
      state: global arrays.
      step: the number of updates in it.
      meta: what is needed to rebuild the network, JSON values.

    Raises:
      RuntimeError: if Orbax declines the save, which it does without a word for a step that is not newer than the
        newest; or whatever made an earlier asynchronous save fail.
    """
    self._manager.check_for_errors()
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    if not self._manager.save(step, args=args):
      raise RuntimeError(f"checkpoint {step} was not written: {self._directory} already holds {self.latest_step()}")

  def meta(self, step: int) -> dict[str, Any]:
    """The `meta` of checkpoint `step`."""
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

  def restore(self, abstract_state: TrainState, step: int) -> TrainState:
    """Reads checkpoint `step` into the shapes, types and shardings of `abstract_state` (ShapeDtypeStructs).

    Raises:
      UserError: if the checkpoint's arrays have other names, shapes or types.
    """
    self._check_arrays(abstract_state, step)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
    state = self._manager.restore(step, args=args)["state"]
    # Orbax's arrays may share buffers that cannot be donated; a compiled copy owns its own.
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(state)

  def _check_arrays(self, abstract_state: TrainState, step: int) -> None:
    """Compares names, shapes and types before anything is read: Orbax would cast another type in silence."""
    where = f"checkpoint {step} in {self._directory}"
    stored = _named_leaves(self._manager.item_metadata(step)["state"].tree)
    wanted = _named_leaves(abstract_state)
    for name in sorted(stored.keys() ^ wanted.keys()):
      raise UserError(f"{where} is of another network: only {'this run' if name in wanted else 'it'} has {name}")
    for name, leaf in wanted.items():
      found = stored[name]
      if (tuple(found.shape), found.dtype) != (tuple(leaf.shape), leaf.dtype):
        raise UserError(
          f"{where}: {name} is {found.dtype}{list(found.shape)}, this run needs {leaf.dtype}{list(leaf.shape)}"
        )

  def wait(self) -> None:
    """Waits until everything is on disk. Raises whatever made an asynchronous save fail."""
    self._manager.wait_until_finished()
    self._manager.check_for_errors()

  def close(self) -> None:
    """Waits and ends the background threads."""
    self._manager.close()


def _named_leaves(tree: Any) -> dict[str, Any]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
  }
