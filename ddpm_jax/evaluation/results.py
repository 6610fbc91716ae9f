"""What evaluations leave in a workdir: `eval/N.json`, pictures, and the best checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ddpm_jax.errors import RunError
from ddpm_jax.evaluation.comparison import NAMES, near_duplicates_of
from ddpm_jax.evaluation.summary import LIKELIHOODS, OF_AUTOENCODERS, Result, columns, numbers_of, yardsticks
from ddpm_jax.workdir import grids
from ddpm_jax.workdir.storage import remedy, write_whole

# What belongs together: measured on the same samples.
_OF_SAMPLES = ("samples", "reference", "features", "measures", "neighbours", "classes", "guidance", "yardsticks")


def write_result(workdir: pathlib.Path, result: Result, pictures: Mapping[str, np.ndarray]) -> pathlib.Path:
  """Writes `eval/N.json` and its pictures. Returns the path of the JSON file.

  What an earlier evaluation of this checkpoint measured and this one did not is kept; the earlier file becomes
  N.1.json, N.2.json and so on.

  Raises:
    RunError: if they cannot be written.
  """
  folder, step = workdir / "eval", result["step"]
  path = folder / f"{step}.json"
  try:
    folder.mkdir(exist_ok=True)
    names, samples = {}, result.get("samples", {})
    facts = {"checkpoint": step, "sample_weights": result.get("weights")}
    facts |= {name: samples[name] for name in ("sampler", "evaluations", "number") if name in samples}
    for name, picture in pictures.items():
      grids.save_png(folder / f"{step}.{name}.png", picture, facts)
      names[name] = f"eval/{step}.{name}.png"
    result = _with_earlier(path, result | {"pictures": names})
    if path.exists():
      number = 1
      while (folder / f"{step}.{number}.json").exists():
        number += 1
      write_whole(folder / f"{step}.{number}.json", path.read_bytes())  # a kill may come before the next line
    write_whole(path, (json.dumps(_finite(result), indent=2, allow_nan=False) + "\n").encode())
  except OSError as error:
    raise RunError(f"workdir: cannot write {error.filename or path} ({error.strerror}); {remedy(error)}") from error
  return path


def _with_earlier(path: pathlib.Path, result: Result) -> Result:
  earlier = read_result(path)
  if earlier is None or earlier.get("weights") != result["weights"]:
    return result
  if "samples" in result or "reconstruction" in result:  # all pictures are of these
    renewed = (*_OF_SAMPLES, "reconstruction", "pictures")
    earlier = {name: value for name, value in earlier.items() if name not in renewed}
  both = {**earlier, **result, "pictures": {**earlier.get("pictures", {}), **result["pictures"]}}
  for name in LIKELIHOODS:
    if name in earlier and name in result:
      both[name] = {**earlier[name], **result[name]}
  return both


def _finite(value: Any) -> Any:
  """The same tree without NaN and infinity, for which JSON has no name: they become null."""
  if isinstance(value, dict):
    return {name: _finite(part) for name, part in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(part) for part in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def read_result(path: pathlib.Path) -> Result | None:
  """A result; None if there is none, or if it cannot be read."""
  try:
    result = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None
  return result if isinstance(result, dict) else None


def earlier_results(workdir: pathlib.Path) -> Iterator[Result]:
  """The results of a workdir that can be read, that of the last checkpoint first."""
  paths = [path for path in (workdir / "eval").glob("*.json") if path.stem.isdecimal()]
  for path in sorted(paths, key=lambda path: -int(path.stem)):
    if (result := read_result(path)) is not None:
      yield result


def scalars(result: Result) -> dict[str, float]:
  """The numbers of a result under one flat name each, for the metrics."""
  found = {f"evaluation/{name}": value for name, value in result.get("measures", {}).items()}
  for name, value in near_duplicates_of(result.get("neighbours", {})).items():
    found[f"evaluation/{name}"] = value
  for name in LIKELIHOODS:
    for split, facts in result.get(name, {}).items():
      found[f"evaluation/{name}_{split}"] = facts["total"]
  for kind in OF_AUTOENCODERS:
    for split, facts in result.get(kind, {}).items():
      found |= {f"evaluation/{name}_{split}": value for name, value in numbers_of(facts).items()}
  return found


def measure_of(result: Result, measure: str) -> float:
  """The number that `--best_measure` names, of an autoencoder the distance; of several splits, that of the last."""
  return scalars(result)[f"evaluation/{_name_of(result, measure)}"]


def _conditions_of(result: Result, measure: str) -> str:
  """How that number was measured: two are comparable if this is equal."""
  name = _name_of(result, measure)
  return next((column.conditions for column in columns({0: result}) if column.name == name), "")


def yardsticks_of(result: Result, measure: str) -> dict[str, float]:
  """What that number is held against: kind -> value."""
  return yardsticks(result).get(_name_of(result, measure), {})


def _name_of(result: Result, measure: str) -> str:
  if measure in ("bound", "ode"):
    prefix = "ode_" if measure == "ode" else ""
    kind = next(kind for kind in (f"{prefix}bits_per_dim", f"{prefix}latent_bits_per_dim") if kind in result)
    return f"{kind}_{list(result[kind])[-1]}"
  names = NAMES[result["features"]["name"]]
  if "reconstruction" in result:
    return f"{names['reconstruction']}_{list(result['reconstruction'])[-1]}"
  return names[measure]


def keep_best(workdir: pathlib.Path, result: Result, measure: str) -> bool:
  """Copies the checkpoint of a result to `best/` if no earlier one was better. Returns whether it did.

  Values that were measured in different ways, such as from another number of samples, are not compared: then the best
  begins anew.

  Raises:
    RunError: if it cannot be copied.
  """
  best, step = workdir / "best", result["step"]
  note, value = workdir / "eval" / "best.json", measure_of(result, measure)
  if not math.isfinite(value):
    return False
  earlier, conditions = read_result(note), _conditions_of(result, measure)
  if (
    earlier
    and earlier.get("measure") == measure
    and earlier.get("conditions", conditions) == conditions  # notes of release 0.1.0 have none
    and earlier["value"] <= value
    and (best / str(earlier["step"])).is_dir()
  ):
    return False
  try:
    note.parent.mkdir(exist_ok=True)
    best.mkdir(exist_ok=True)
    for path in best.iterdir():
      if not path.name.isdecimal():
        shutil.rmtree(path)  # a copy that a kill cut short
    copy = best / f".{step}.new"
    shutil.copytree(workdir / "checkpoints" / str(step), copy)
    if (best / str(step)).exists():  # of a run that was shorter, or that a kill left without its note
      shutil.rmtree(best / str(step))
    os.replace(copy, best / str(step))
    write_whole(note, json.dumps({"measure": measure, "value": value, "step": step, "conditions": conditions}).encode())
    for path in best.iterdir():
      if path.name != str(step):
        shutil.rmtree(path)
  except OSError as error:
    with contextlib.suppress(OSError):
      shutil.rmtree(best / f".{step}.new")
    raise RunError(
      f"workdir: cannot copy checkpoint {step} to {best} ({error.strerror or error}); {remedy(error)}"
    ) from error
  return True
