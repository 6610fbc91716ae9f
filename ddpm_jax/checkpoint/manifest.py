"""The manifest of a checkpoint: what it is of, and the SHA-256 of every leaf, so that no changed bit goes unnoticed.

Neither Orbax nor the file system looks: a bit that flips in an array of a checkpoint is restored in silence.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
from typing import Any

import jax
import numpy as np

from ddpm_jax.devices.hosts import gather
from ddpm_jax.errors import NonFiniteError, UserError

_FORMAT = 1
Manifest = dict[str, Any]  # JSON values
Tree = Any  # of arrays: `state.to_stored` of a state


class DamagedError(Exception):
  """A checkpoint is not what was saved."""


class OtherPastError(Exception):
  """A checkpoint holds steps that this run would make otherwise, so that it goes on from an earlier one.

  Attributes:
    since: the last step that both have in common.
  """

  def __init__(self, message: str, since: int):
    super().__init__(message)
    self.since = since


def make(state: Tree, step: int, facts: dict[str, Any]) -> Manifest:
  """The manifest of `state`, which all processes must ask for together.

  Args:
    state: global arrays.
    step: the number of training steps in it.
    facts: what the checkpoint is of: JSON values under names of their own.

  Returns:
    `facts`, and: format; step; leaves, name -> {shape, dtype, sha256 of the bytes in C order}; sha256 of the rest.

  Raises:
    NonFiniteError: if a leaf is not finite; no such state may be committed.
  """
  leaves = describe(state)
  for name, leaf in leaves.items():
    if not leaf.pop("finite"):
      raise NonFiniteError(
        f"step {step}: {name} is no longer finite, so this state is not saved; what was saved before is intact; try "
        "a lower --learning_rate in another --workdir"
      )
  manifest = facts | {"format": _FORMAT, "step": step, "leaves": leaves}
  return manifest | {"sha256": _seal(manifest)}


def check(manifest: Any, step: int) -> None:
  """Raises DamagedError unless this is, unchanged, the manifest that `make` made for `step`.

  Raises UserError if a later version of ddpm_jax made it.
  """
  if not isinstance(manifest, dict) or manifest.get("sha256") != _seal(manifest):
    raise DamagedError("its manifest is not what was saved")
  if manifest["format"] != _FORMAT:
    raise UserError(
      f"checkpoint {step} has a manifest of format {manifest['format']}, this version of ddpm_jax reads {_FORMAT}; use "
      "the version that wrote it"
    )
  if manifest["step"] != step:
    raise DamagedError(f"its manifest is of step {manifest['step']}")


def verify(manifest: Manifest, state: Tree) -> None:
  """Compares a state of NumPy arrays, bit for bit, with what was saved.

  Raises:
    DamagedError: names the leaves that differ.
  """
  wanted, found = manifest["leaves"], describe(state)
  wrong = [name for name in wanted if found[name]["sha256"] != wanted[name]["sha256"]]
  if wrong:
    others = f" and {len(wrong) - 1} more" if wrong[1:] else ""
    raise DamagedError(f"{wrong[0]}{others}: not the numbers that were saved (SHA-256)")


def differences(manifest: Manifest, abstract_state: Tree) -> list[str]:
  """How the leaves of a manifest differ from those of a run in name, shape or type; each as a phrase."""
  stored = {name: (leaf["dtype"], list(leaf["shape"])) for name, leaf in manifest["leaves"].items()}
  needed = {name: (str(leaf.dtype), list(leaf.shape)) for name, leaf in _named_leaves(abstract_state).items()}
  phrases = [
    f"only {'this run' if name in needed else 'it'} has {name}" for name in sorted(stored.keys() ^ needed.keys())
  ]
  for name in sorted(stored.keys() & needed.keys()):
    if stored[name] != needed[name]:
      (its_type, its_shape), (our_type, our_shape) = stored[name], needed[name]
      phrases.append(f"{name} is {its_type}{its_shape}, this run needs {our_type}{our_shape}")
  return phrases


def describe(state: Tree) -> dict[str, dict[str, Any]]:
  """Name -> shape, dtype, sha256, finite of every leaf. Hashed on all cores: hashlib releases the GIL."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    # Gathered one after the other: with several processes this is a collective.
    whole = ((name, gather(x) if isinstance(x, jax.Array) else x) for name, x in _named_leaves(state).items())
    tasks = {name: pool.submit(_describe_leaf, array) for name, array in whole}
    return {name: task.result() for name, task in tasks.items()}


def _describe_leaf(array: np.ndarray) -> dict[str, Any]:
  contents = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  return {
    "shape": list(array.shape),
    "dtype": str(array.dtype),
    "sha256": hashlib.sha256(contents.data).hexdigest(),
    "finite": bool(np.all(np.isfinite(array))),
  }


def _seal(manifest: Manifest) -> str:
  rest = {name: value for name, value in manifest.items() if name != "sha256"}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _named_leaves(tree: Any) -> dict[str, Any]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
  }
