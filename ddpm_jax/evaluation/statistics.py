"""Reference statistics in a file: what samples are compared with where the images are not at hand, or not to be read.

Three kinds of npz files are read, none of them with pickle:

- ours: `mu` [D], `sigma` [D, D], `feats` [K, D], the features of at most 10,000 images, and `facts`, a JSON text that
  says which features these are and of which data;
- those of pytorch-fid and clean-fid: `mu` and `sigma`, the mean and the unbiased covariance of features, and nothing
  about which;
- those of clean-fid for KID: `feats` alone.

Whoever reads `mu` and `sigma` reads ours too.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config, EvaluateConfig
from ddpm_jax.data.sources import Source
from ddpm_jax.devices.hosts import all_gather_host
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.evaluation.comparison import MOST
from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.moments import Moments, add, covariance, no_moments
from ddpm_jax.evaluation.reference import Reference, evenly_spaced
from ddpm_jax.workdir.storage import remedy, write_whole

OF_REFERENCE = ("frechet", "kid", "precision_recall", "density_coverage")  # measures between samples and data
_OF_FEATURES = OF_REFERENCE[1:]  # those for which mean and covariance are not enough
_FORMAT = 1
_REMEDY = "name a file that --write_reference, pytorch-fid or clean-fid wrote"
# What NumPy raises for something that is no npz file of plain arrays.
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, NotImplementedError, MemoryError, BadZipFile, zlib.error)


class Statistics(NamedTuple):
  """What a file holds.

  Attributes:
    path: of the file.
    sha256: of its bytes, hexadecimal.
    mean: float64 [D], of the features.
    covariance: float64 [D, D], unbiased.
    features: float32 [K, D], of some of the images; K is 0 where the file has none.
    facts: what it says of itself: `features`, `dataset`, `split`, `number`, `fingerprint`; {} for files of others.
  """

  path: pathlib.Path
  sha256: str
  mean: np.ndarray
  covariance: np.ndarray
  features: np.ndarray
  facts: dict[str, Any]

  @property
  def reference(self) -> Reference:
    """The same as `measure_reference` gives it."""
    # Where the number is not known, any gives this covariance back.
    count = max(2, int(self.facts.get("number", 2)))
    moments = Moments(count, self.mean, self.covariance * (count - 1))
    return Reference(moments, np.arange(len(self.features)), self.features)

  @property
  def description(self) -> dict[str, Any]:
    """For the result: which file, and of which data."""
    facts = {name: value for name, value in self.facts.items() if name not in ("features", "version", "ddpm_jax")}
    return {"file": self.path.name, "sha256": self.sha256, **facts}


def write_statistics(path: pathlib.Path, source: Source, split: str, features: Features, reference: Reference) -> None:
  """Writes a file of ours, whole or not at all.

  Args:
    path: of the file, which must not exist.
    source: the images.
    split: their split, as the settings name it.
    features: what they are compared by.
    reference: how these see them.

  Raises:
    RunError: if it cannot be written.
  """
  kept = reference.features[evenly_spaced(len(reference.features), MOST)]
  facts = {
    "ddpm_jax": _FORMAT,
    "version": ddpm_jax.__version__,
    "features": features.about | {"name": features.name, "identity": features.identity},
    "dataset": source.name,
    "split": split,
    "number": len(source),
    "fingerprint": source.fingerprint,
  }
  data = io.BytesIO()
  np.savez(
    data,
    mu=reference.moments.mean,
    sigma=covariance(reference.moments),
    feats=kept,
    facts=np.asarray(json.dumps(facts, sort_keys=True)),
  )
  try:
    write_whole(path, data.getvalue())
  except OSError as error:
    raise RunError(
      f"write_reference: cannot write {path} ({error.strerror}); {remedy(error)}, or name another"
    ) from error


def read_statistics(path: str) -> Statistics:
  """Reads a file of one of the three kinds. Raises UserError if it is none of them, or damaged."""
  with _opened(path) as archive:
    names = set(archive.files)
    if not ({"mu", "sigma"} <= names or "feats" in names):
      raise UserError(f"reference_stats: {path} has neither mu and sigma nor feats; {_REMEDY}")
    features = _numbers(path, archive, "feats", 2, np.float32) if "feats" in names else None
    if {"mu", "sigma"} <= names:
      mean, sigma = (_numbers(path, archive, name, rank, np.float64) for name, rank in (("mu", 1), ("sigma", 2)))
    else:
      assert features is not None
      mean, sigma = _moments_of(path, features)
    facts = _facts(path, archive) if "facts" in names else {}
  width = len(mean)
  if sigma.shape != (width, width) or (features is not None and features.shape[1] != width):
    raise UserError(f"reference_stats: mean and covariance in {path} are not of one length; {_REMEDY}")
  if not np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * float(np.abs(sigma).max(initial=0))):
    raise UserError(f"reference_stats: sigma in {path} is no covariance, as it is not symmetric; {_REMEDY}")
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  features = np.zeros((0, width), np.float32) if features is None else features
  return Statistics(pathlib.Path(path), digest, mean, sigma, features, facts)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
  try:
    with open(path, "rb") as file:  # which NumPy leaves open where it raises
      archive = np.load(file, allow_pickle=False)
      if not hasattr(archive, "files"):
        raise ValueError("it is a single array")
      with archive:
        yield archive
  except FileNotFoundError as error:
    raise UserError(f"reference_stats: there is no file {path}; {_REMEDY}") from error
  except _UNREADABLE as error:
    reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    if "contains pickled" in reason:  # so NumPy says of whatever is no array, and how to load it all the same
      reason = "it is no archive of arrays"
    raise UserError(f"reference_stats: {path} is no npz file that can be read ({reason}); {_REMEDY}") from error


def _numbers(path: str, archive: Any, name: str, rank: int, dtype: type) -> np.ndarray:
  array = archive[name]
  if array.ndim != rank or not array.size or not np.issubdtype(array.dtype, np.floating):
    raise UserError(f"reference_stats: {name} in {path} is {array.dtype} {list(array.shape)}; {_REMEDY}")
  if not np.isfinite(array).all():
    raise UserError(f"reference_stats: {name} in {path} has numbers that are not finite; {_REMEDY}")
  return array.astype(dtype)


def _moments_of(path: str, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  if len(features) < 2:
    raise UserError(f"reference_stats: feats in {path} are of one image, which has no covariance; {_REMEDY}")
  moments = add(no_moments(features.shape[1]), features)
  return moments.mean, covariance(moments)


def _facts(path: str, archive: Any) -> dict[str, Any]:
  facts = json.loads(str(archive["facts"]))  # a ValueError is reported by `_opened`
  if not isinstance(facts, dict) or not isinstance(facts.get("features"), dict):
    raise ValueError("its facts are none of ours")
  if facts.get("ddpm_jax") != _FORMAT:
    raise UserError(f"reference_stats: {path} is of another version of ddpm_jax; write it anew with --write_reference")
  return facts


def measurable(config: Config, asked: Config) -> tuple[Config, str]:
  """What can be measured against `--reference_stats`.

  Args:
    config: of the run, with what is about to be measured.
    asked: with what the command names.

  Returns:
    The settings with those of the measures for which the file has enough, and a line that says which were left out;
    empty if none were.

  Raises:
    UserError: nothing that is asked for is compared with data; or the file cannot be read, or lacks what a measure
      needs that was named, or by which the best checkpoint is to be kept.
  """
  path, measures = config.evaluate.reference_stats, config.evaluate.measures
  if path and not set(asked.evaluate.measures) & set(OF_REFERENCE):
    named = config_lib.flag_text(asked.evaluate.measures)
    raise UserError(f"reference_stats: has no effect with --measures={named}, which need no data; leave it out")
  needy = [name for name in measures if name in _OF_FEATURES]
  if not path or not needy:
    return config, ""
  with _opened(path) as archive:
    if "feats" in archive.files:
      return config, ""
  reason = f"{path} has mean and covariance alone, not the features of images"
  if asked.evaluate.measures != EvaluateConfig().measures:
    raise UserError(f"measures: {', '.join(needy)} cannot be measured, as {reason}; leave out what cannot")
  if config.train.evaluate_every and config.train.best_measure in needy:
    raise UserError(f"best_measure: {config.train.best_measure} cannot be measured, as {reason}; use another")
  kept = tuple(name for name in measures if name not in needy)
  return config_lib.override(config, {"measures": kept}), f"left out: {', '.join(needy)} ({reason})"


def check_name(statistics: Statistics, options: EvaluateConfig, width: int | None) -> None:
  """Raises UserError if the file says that it is of other features than those of the options.

  width: how many numbers these are for an image, if that is known; for files that say nothing.
  """
  stored, path = statistics.facts.get("features"), statistics.path
  if stored is None:
    if width is not None:
      _check_width(statistics, options.features, width)
    return
  if stored.get("name") != options.features:
    raise UserError(
      f"reference_stats: {path} is of --features={stored.get('name')}, and this command compares by "
      f"{options.features}; use --features={stored.get('name')}, or another file"
    )
  if options.features == "inception" and stored.get("resize") != options.inception_resize:
    raise UserError(
      f"reference_stats: {path} is of --inception_resize={stored.get('resize')}, and this command says "
      f"{options.inception_resize}; use --inception_resize={stored.get('resize')}, or another file"
    )


def check_features(statistics: Statistics, features: Features, width: int) -> None:
  """Raises UserError if the file is of other features, or not the same for all processes, which must all call it.

  width: how many numbers the features are for an image.
  """
  stored, path = statistics.facts.get("features"), statistics.path
  digest = np.frombuffer(bytes.fromhex(statistics.sha256), np.uint8)
  if np.any(all_gather_host(digest) != digest[None]):
    raise UserError(f"reference_stats: {path} is not the same for all processes; give every host a copy")
  if stored is not None and (stored.get("name"), stored.get("identity")) != (features.name, features.identity):
    raise UserError(
      f"reference_stats: {path} is of another {stored.get('name')}, with other weights or arithmetic ("
      f"{str(stored.get('identity'))[:12]}, this one is {features.identity[:12]}); write it anew with --write_reference"
    )
  _check_width(statistics, features.name, width)


def _check_width(statistics: Statistics, name: str, width: int) -> None:
  if len(statistics.mean) != width:
    raise UserError(
      f"reference_stats: {statistics.path} is of features of {len(statistics.mean)} numbers, and those of {name} have "
      f"{width}; use the --features that it is of, or another file"
    )


def unstated(statistics: Statistics, about: Mapping[str, Any], name: str) -> str:
  """A line if nobody can say whether the file is of these features; else empty. about: `Features.about`."""
  if statistics.facts:
    return ""
  resize = f" with --inception_resize={about['resize']}" if "resize" in about else ""
  return f"{statistics.path} does not say which features it is of; taken for those of --features={name}{resize}"
