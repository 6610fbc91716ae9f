"""What a checkpoint is of, and whether a run may go on from it: the same settings, the same images."""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.checkpoint.manifest import Manifest, OtherPastError
from ddpm_jax.config import Config
from ddpm_jax.data import fingerprint, shuffle
from ddpm_jax.data.labels import listed
from ddpm_jax.data.sources import Source, class_names
from ddpm_jax.devices.hosts import all_gather_host
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import console, numerics
from ddpm_jax.training.optimizer import decay_start
from ddpm_jax.training.setup import Run
from ddpm_jax.training.state import TrainState
from ddpm_jax.workdir import layout, lock


def facts(run: Run, source: Source, earlier: Manifest | None = None) -> dict[str, Any]:
  """What the manifests of a run say beside the arrays: image_shape, config, data, what changed before, surroundings.

  Args:
    run: the parts of the run.
    source: its images.
    earlier: the manifest that it goes on from.
  """
  changes = list(earlier["data_changes"]) if earlier else []
  data = _data(source, run.config)
  if earlier and fingerprint.differences(earlier["data"], data, labels=run.conditional):
    changes.append({"after_update": earlier["step"], "before": earlier["data"]})
  elif earlier:  # what was known of all pixels, where this run does not keep them in memory
    data = earlier["data"] | data
  return {
    "image_shape": list(run.image_shape),
    "config": json.loads(config_lib.to_json(run.config)),
    "data": data,
    "data_changes": changes,
    "lr_restarts": restarts(run.config, earlier),
    "surroundings": numerics.surroundings(),
    **({"classes": list(class_names(source, run.config.model.num_classes))} if run.conditional else {}),
    **({"own": run.own} if run.own else {}),
    **({"first_stage": run.first_stage_facts} if run.first_stage_facts else {}),
    **({"perceptual": run.perceptual.sha256} if run.perceptual else {}),
  }


def restarts(config: Config, earlier: Manifest | None) -> list[int]:
  """The steps after which the learning rate restarted, as a run of `config.RESTARTING` was given another length.

  Args:
    config: of the run.
    earlier: the manifest that it goes on from.
  """
  made = list(earlier.get("lr_restarts", ())) if earlier else []
  total = config.train.num_steps
  if (
    earlier and config.optimizer.lr_schedule in config_lib.RESTARTING and _num_steps(earlier) != total > earlier["step"]
  ):
    made.append(earlier["step"])
  return made


def _data(source: Source, config: Config) -> fingerprint.Fingerprint:
  """The images, the order in which they are seen, and their classes.

  Of an unconditional run, only where those are known without reading records.
  """
  labels = _labels_sha256(source) if config_lib.reads_classes(config) else source.known_classes().sha256
  return source.fingerprint | {"order": shuffle.KIND} | ({"labels": labels} if labels else {})


class Start(NamedTuple):
  """Where a run begins or goes on.

  Attributes:
    step: the number of training steps made; 0 for a new run.
    state: after them, placed; None for a new run.
    manifest: of the checkpoint; empty for a new run.
    damaged: step -> reason, of newer checkpoints that are not what was saved.
    other_past: the steps of newer checkpoints that a run of this length does not come by, in order.
  """

  step: int
  state: TrainState | None
  manifest: Manifest
  damaged: dict[int, str]
  other_past: list[int]


def find_start(checkpoints: Checkpoints, run: Run, source: Source, workdir: pathlib.Path) -> Start:
  """The newest checkpoint from which `run` can go on exactly, or a new beginning where there is none.

  Raises:
    UserError: if the checkpoints are of another run or of other images, or none is intact, or all that are left come
      after the step at which a run of this length parts from the one that wrote them.
  """
  candidates = checkpoints.candidates(on_corrupt=run.config.train.on_corrupt)
  others: dict[int, OtherPastError] = {}
  for candidate in candidates:
    try:
      check_resume(candidate.manifest, run.config, source, workdir)
    except OtherPastError as error:
      others[candidate.step] = error
      continue
    check_first_stage(candidate.manifest, run, workdir)
    state = candidate.restore(run.abstract_state)
    if state is not None:
      return Start(candidate.step, state, candidate.manifest, candidates.damaged, sorted(others))
  if others and min(error.since for error in others.values()) > 0:
    damaged = ", ".join(map(str, candidates.damaged))
    hint = f" (checkpoint {damaged} is damaged)" if damaged else ""
    raise UserError(f"{others[min(others)]}{hint}") from others[min(others)]
  return Start(0, None, {}, candidates.damaged, sorted(others))  # both begin with the same initial state


def check_resume(manifest: Manifest, config: Config, source: Source, workdir: pathlib.Path) -> None:
  """Checks that a run can go on exactly from the checkpoint of this manifest.

  Raises:
    UserError: if it is of another run, or of other images.
    OtherPastError: if a run of this length needs an older one.
  """
  check_config(manifest, config, workdir)
  _check_past(manifest, config, workdir)
  if config.data.allow_data_change:
    if config_lib.reads_classes(config):
      _warn_of_other_names(manifest, config, source)
    return
  if manifest["data"].get("order") != shuffle.KIND:
    raise UserError(
      f"dataset: checkpoint {manifest['step']} in {workdir} is of a version of ddpm_jax that shuffles the images in "
      "another order; go on with that version, or all the same with --allow_data_change"
    )
  check_images(manifest, source, workdir)
  if config_lib.reads_classes(config):
    _check_labels(manifest, config, source, workdir)


# For people: what a digest of a fingerprint is of.
_FIELDS = {
  "listing": " (names and sizes of the files)",
  "probe": " (pixels of some images)",
  "pixels": " (of all images)",
}


def check_size(source: Source, workdir: pathlib.Path) -> None:
  """Raises UserError if a run was trained with images of another size: before the network says what that does to it."""
  step, facts = layout.newest_facts(workdir)
  before = facts.get("image_shape")
  if before and list(source.image_shape) != before:
    then, now = ("x".join(map(str, shape)) for shape in (before, source.image_shape))
    raise UserError(
      f"dataset: the images of {source.name} are {now}, those of checkpoint {step} in {workdir} were {then}; restore "
      "them, or use another --workdir"
    )


def check_images(manifest: Manifest, source: Source, workdir: pathlib.Path) -> None:
  """Raises UserError if a checkpoint was trained with other images than those of `source`, wherever they lie."""
  before = {name: value for name, value in manifest["data"].items() if name != "order"}
  for field, then, now in fingerprint.differences(before, source.fingerprint):
    raise UserError(
      f"dataset: the images of {source.name} have changed since checkpoint {manifest['step']} in {workdir}: "
      f"{field} was {_short(then)}, is {_short(now)}{_FIELDS.get(field, '')}; restore them, or go on all the same with "
      "--allow_data_change"
    )


def _labels_sha256(source: Source) -> str:
  assert source.labels is not None  # `num_classes` has looked
  return fingerprint.of_classes(source.labels())


def _check_labels(manifest: Manifest, config: Config, source: Source, workdir: pathlib.Path) -> None:
  """Raises UserError if the classes of the images are others than those that a conditional run was trained with."""
  step, names = manifest["step"], list(class_names(source, config.model.num_classes))
  if names != manifest["classes"]:
    what = f"names were {listed(manifest['classes'])}, are {listed(source.known_classes().names or names)}"
  elif _labels_sha256(source) != manifest["data"]["labels"]:
    what = "names are the same, those of some images are not"
  else:
    return
  raise UserError(
    f"dataset: the classes of {source.name} have changed since checkpoint {step} in {workdir}: their {what}; restore "
    "them, or go on all the same with --allow_data_change"
  )


def _warn_of_other_names(manifest: Manifest, config: Config, source: Source) -> None:
  """Says what --allow_data_change makes of the numbers by which a run knows its classes."""
  names = class_names(source, config.model.num_classes)
  moved = [
    f"{number} was {then}, is {now}"
    for number, (then, now) in enumerate(zip(manifest["classes"], names, strict=False))
    if then != now
  ]
  if moved and jax.process_index() == 0:
    console.warn(f"the classes of {source.name} have changed, and go by their numbers: {listed(moved)}")


def check_config(manifest: Manifest, config: Config, workdir: pathlib.Path, *, once_trained: bool = False) -> None:
  """Raises UserError if a checkpoint was trained with settings that may not change, and have.

  once_trained: its weights are only used, see `config.changed`.
  """
  stored = _config(manifest)
  for name, before, now in config_lib.changed(stored, config, on_resume=True, once_trained=once_trained):
    raise UserError(
      f"{name}: checkpoint {manifest['step']} in {workdir} was trained with {config_lib.flag_text(before)!r}, "
      f"config.json says {config_lib.flag_text(now)!r}; restore config.json, use another --workdir, or "
      f"move {workdir / 'checkpoints' / str(manifest['step'])} away if it is of another run"
    )


def check_first_stage(manifest: Manifest, run: Run, workdir: pathlib.Path) -> None:
  """Raises UserError unless the first stage of a run is the one that a checkpoint was trained with."""
  before, now = manifest.get("first_stage"), run.first_stage_facts
  if before == now:
    return
  of, restore = f"checkpoint {manifest['step']} in {workdir} was trained with", f"restore {workdir / 'first_stage'}"
  if before is None or now is None:
    raise UserError(f"first_stage: {of} {'pixels' if before is None else 'latents'}; restore config.json")
  if before["sha256"] != now["sha256"]:
    raise UserError(
      f"first_stage: {of} another first stage, {_short(before['sha256'])}, is {_short(now['sha256'])}; {restore}"
    )
  raise UserError(f"first_stage: {of} latents of another mean and deviation; {restore}")


def _config(manifest: Manifest) -> Config:
  """The settings of the run that saved a checkpoint."""
  return config_lib.from_json(json.dumps(manifest["config"]))


def _num_steps(manifest: Manifest) -> int:
  """The --num_steps that a checkpoint was trained with."""
  return _config(manifest).train.num_steps


def _check_past(manifest: Manifest, config: Config, workdir: pathlib.Path) -> None:
  """Raises OtherPastError unless a run of this length would have come by this checkpoint.

  That is where the learning rate decays toward another --num_steps. One that was trained so far already is finished.
  """
  step, before, now = manifest["step"], _num_steps(manifest), config.train.num_steps
  their_start, our_start = (decay_start(config.optimizer, num_steps) for num_steps in (before, now))
  if their_start is None or our_start is None or before == now or step >= now or step <= min(their_start, our_start):
    return
  longer = ""
  if step <= their_start:  # a shorter run was asked for
    enough = next(number for number in itertools.count(now) if decay_start(config.optimizer, number) >= step)
    longer = f" or at least --num_steps={enough}"
  raise OtherPastError(
    f"num_steps: with {now} steps the learning rate decays from step {our_start} on, with {before} (checkpoint {step} "
    f"in {workdir}) from step {their_start}; no checkpoint from before both is left; use "
    f"--num_steps={before}{longer}, or another --workdir",
    since=min(their_start, our_start),
  )


def check_hosts(run: Run, source: Source) -> None:
  """Raises UserError if the processes of a job were given different flags, or hold different images; all must call it.

  They would wait for each other for ever, or train on something that no seed gives again.
  """
  local = ("data_dir", "manual_dir")  # where a host keeps its data is its own business
  flags = {name: value for name, value in config_lib.values(run.config).items() if name not in local}
  if config_lib.own_images(run.config.data.dataset):
    flags["dataset"] = "own images"
  images = source.fingerprint | ({"labels": _labels_sha256(source)} if run.conditional else {})
  for what, facts in (("flags", flags), ("images", images)):
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
    for process, other in enumerate(all_gather_host(np.frombuffer(digest, np.uint8))):
      if other.tobytes() != digest:
        raise UserError(
          f"distributed: the {what} of process {process} differ from those of process {jax.process_index()}; give "
          f"every host the same {'command' if what == 'flags' else 'data set'}"
        )


def check_shared(workdir: pathlib.Path) -> None:
  """Raises UserError unless all processes see one workdir, with the lock of the first in it; all must call it."""
  try:
    text = (workdir / lock.NAME).read_bytes()
  except OSError:
    text = b""
  digests = all_gather_host(np.frombuffer(hashlib.sha256(text).digest(), np.uint8))
  if np.any(digests != digests[0]):
    raise UserError(
      f"workdir: {workdir} is not the same folder for all processes; name one that every host has mounted there"
    )


def _short(value: Any) -> str:
  return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else repr(value)
