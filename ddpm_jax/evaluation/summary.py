"""Results of evaluations (`eval/N.json`) for people: names of measures, numbers as text, which values can be compared.

Any key of a result but `step` may be missing, and any value may be of another type: what cannot be read is left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

Result = dict[str, Any]  # one eval/N.json

# What a measure of samples is compared with, see evaluation/yardsticks.py: in a sentence, and in a row of a table.
YARDSTICKS = {
  "data": ("the data against itself has", "the data itself"),
  "noise": ("pure noise", "pure noise"),
  "untrained": ("an untrained network", "untrained network"),
  "mean_image": ("the mean image has", "the mean image"),
  "resized": ("images shrunk to the size of the latents have", "images shrunk to the latents' size"),
}
# Keys of the result. Those of latent models are of densities of latents, and not to be compared with those of pixels.
LIKELIHOODS = ("bits_per_dim", "ode_bits_per_dim", "latent_bits_per_dim", "ode_latent_bits_per_dim")
OF_AUTOENCODERS = ("reconstruction", "latents")  # likewise
ARITHMETIC = ("dtype", "matmul_precision")
_SPREADS = ("_std", "_standard_error")
# Measures by their names in the file, or the ends of these; the names of features may stand before them.
_TITLES = {"fid": "FID", "intra_fid": "Intra-FID", "kid": "KID", "inception_score": "Inception Score"}
# The same of measures whose names end with a split.
_TITLES_OF_SPLITS = {
  "psnr": "PSNR",
  "ssim": "SSIM",
  "lpips": "LPIPS",
  "rfid": "rFID",
  "kl": "KL",
}
_LOWER_OF_SPLITS = (
  *("lpips", "rfid", "classifier_reconstruction_distance", "network_reconstruction_distance"),
  *LIKELIHOODS,
)
_HIGHER_OF_SPLITS = ("psnr", "ssim", "codebook_use", "codebook_perplexity")
_LOWER = ("fid", "distance", "kid")
_HIGHER = ("score", "precision", "recall", "density", "coverage", "accuracy")
_ORDER = (*_LOWER, *_HIGHER)
# Two values are comparable if these are equal.
_OF_SAMPLES = {
  "samples": (
    *("number", "sampler", "evaluations", "time_grid", "eta", "variance", "threshold", "threshold_quantile"),
    *ARITHMETIC,
  ),
  "reference": ("dataset", "split", "number", "fingerprint", "sha256"),
  "features": ("name", "identity", "resize"),
  "measures": ("set_size",),
}
# Likewise, of conditional and guided draws; those of others say nothing, or this.
_OF_GUIDANCE = {
  "labels": None,
  "classes": [],
  "guidance_scale": [1.0],
  "guidance_interval": [],
  "guide_with": "",
  "classifier": "",
  "classifier_scale": 1.0,
}
_OF_LIKELIHOOD = {
  "bits_per_dim": ("bound", ("examples", "timesteps_per_example", *ARITHMETIC)),
  "ode_bits_per_dim": ("ODE", ("examples", "steps", "probes", *ARITHMETIC)),
}
_OF_LIKELIHOOD |= {
  kind.replace("bits", "latent_bits"): (remark, (*facts, "first_stage"))
  for kind, (remark, facts) in _OF_LIKELIHOOD.items()
}


def part(result: Any, *names: str) -> dict[str, Any]:
  """The object at a path of keys; {} if it is missing or no object."""
  for name in names:
    result = result.get(name) if isinstance(result, dict) else None
  return result if isinstance(result, dict) else {}


def finite(value: object) -> float | None:
  """A number of a file; None for anything else, and for what no chart could show."""
  if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
    return None
  return float(value) if abs(value) > 1e-100 else 0.0


def number(value: Any, digits: int = 4) -> str:
  """A number as text: integers in full, others to `digits` significant digits. Other values as they are."""
  if (known := finite(value)) is None:
    return str(value)
  if known == int(known) and abs(known) < 1e15:
    return f"{int(known):,}"
  if 10**digits <= abs(known) < 1e15:
    return f"{known:,.0f}"
  return f"{known:.{digits}g}".replace("e-0", "e-").replace("e+", "e")


def decimals(values: Iterable[float]) -> int:
  """Digits after the point for a column of numbers: four significant ones of the largest."""
  largest = max((abs(value) for value in values), default=0.0)
  return min(7, max(0, 3 - math.floor(math.log10(largest)))) if largest else 1


def duration(seconds: float) -> str:
  """'40 s', '12 min', '3.5 h', '2.1 days'."""
  if seconds < 100:
    return f"{max(seconds, 1):.0f} s"
  if seconds < 6000:
    return f"{seconds / 60:.0f} min"
  return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def direction(name: str) -> str:
  """'lower' or 'higher', whichever values of a measure are better, by its name; '' if neither is known."""
  if _rank(name, *_LOWER) < len(_LOWER) or name.startswith((*_LOWER_OF_SPLITS, "near_duplicates")):
    return "lower"
  is_higher = _rank(name, *_HIGHER) < len(_HIGHER) or name.startswith(_HIGHER_OF_SPLITS)
  return "higher" if is_higher else ""


def title_of(name: str) -> str:
  """The title of a measure, from its name in the file."""
  words = (name[:1].upper() + name[1:]).replace("_", " ")
  first, _, split = name.partition("_")
  if first in _TITLES_OF_SPLITS:
    return f"{_TITLES_OF_SPLITS[first]} {split}".strip()
  return _TITLES.get(name, words.removesuffix(" kid") + (" KID" if name.endswith("_kid") else ""))


def in_words(title: str, name: str, value: float, others: Mapping[str, float]) -> str:
  """A sentence with a measure and its yardsticks; says so where noise is better, as the measure then says nothing.

  Args:
    title: of the measure.
    name: its name in the file, from which the better direction follows.
    value: of the samples, or of the model.
    others: its yardsticks, kind -> value.
  """
  better = direction(name)
  listed = ", ".join(f"{words} {number(others[kind], 3)}" for kind, (words, _) in YARDSTICKS.items() if kind in others)
  sentence = f"{title} {number(value, 3)}: {listed}{f'; {better} is better' if better else ''}."
  rivals = value, others.get("data", value)
  if "noise" in others and any(
    others["noise"] != rival and better == ("lower" if others["noise"] < rival else "higher") for rival in rivals
  ):
    sentence += " Noise does better than that: here this measure says nothing."
  mean = others.get("mean_image", value)
  if mean != value and better == ("lower" if mean < value else "higher"):
    return sentence + " The mean image does better: here reconstructions say nothing of their images."
  small = others.get("resized", value)
  if small != value and better == ("lower" if small < value else "higher"):
    sentence += " Shrunk images do better: train longer, or with more --channels, before you diffuse the latents."
  return sentence


def guidance_of(result: Result) -> dict[str, str]:
  """How classes and guidance were chosen, as text by name; {} for an unconditional model without guidance."""
  drawn = part(result, "samples")
  set_to = {name: drawn[name] for name, usual in _OF_GUIDANCE.items() if drawn.get(name, usual) != usual}
  return {name: ", ".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in set_to.items()}


def sweep(result: Result) -> dict[float, Result]:
  """The results of the guidance scales that were compared, by scale, in their order; {} if there was but one.

  Each is like a result of its own, but does not say its scale, so that all have the same columns.
  """
  found: dict[float, Result] = {}
  entries = result.get("guidance")
  shared = {name: result[name] for name in ("weights", "reference", "features", "yardsticks") if name in result}
  unguided = {name: value for name, value in part(result, "samples").items() if name not in _OF_GUIDANCE}
  for entry in entries if isinstance(entries, list) else ():
    if (scale := finite(part(entry).get("guidance_scale"))) is not None:
      found[scale] = shared | {"samples": unguided} | entry
  return found


def by_class(result: Result) -> dict[str, dict[str, float]]:
  """What was measured of the samples of each class: class -> measure -> value, that of the data beside it."""
  found: dict[str, dict[str, float]] = {}
  for name in part(result, "classes"):
    own, data = part(result, "classes", name), part(result, "yardsticks", "data", "classes", name)
    row: dict[str, float] = {}
    for key in own:
      for title, values in ((key, own), (f"{key}_of_the_data", data if key != "number" else {})):
        if (value := finite(values.get(key))) is not None:
          row[title] = value
    found[name] = row
  return found


def yardsticks(result: Result) -> dict[str, dict[str, float]]:
  """Values of the data itself, noise and an untrained network: measure -> kind -> value, kinds in that order.

  Measures have the names of the metrics, without `evaluation/`. Results of release 0.1 have none.
  """
  found: dict[str, dict[str, float]] = {}
  for kind in YARDSTICKS:
    values = dict(part(result, "yardsticks", kind, "values"))
    for measure in _OF_LIKELIHOOD:
      for split in part(result, measure):
        values[f"{measure}_{split}"] = part(result, measure, split, "yardsticks").get(kind)
    for split in part(result, "reconstruction"):
      of_split = part(result, "reconstruction", split, "yardsticks", kind)
      values |= {f"{name}_{split}": value for name, value in of_split.items()}
    for name, value in values.items():
      amount = finite(value)
      if amount is not None and direction(name):  # a spread, or a number of images, has no better direction
        found.setdefault(name, {})[kind] = amount
  return found


def numbers_of(facts: Mapping[str, Any]) -> dict[str, float]:
  """The measures of one split of an autoencoder, by name; without their standard errors."""
  pairs = ((name, finite(value)) for name, value in facts.items())
  return {
    name: value
    for name, value in pairs
    if value is not None and name != "examples" and not name.endswith("_standard_error")
  }


def completed(result: Result, dtype: str) -> Result:
  """A result with the arithmetic, which release 0.1 did not write: that of the run, at the default precision.

  On CPUs the default precision of float32 products is the highest.

  dtype: of the run's activations.
  """
  usual = dict(zip(ARITHMETIC, (dtype, "default"), strict=True))
  exact = dtype == "float32" and str(result.get("machine")).endswith(" x cpu")
  of_likelihoods = usual | {"matmul_precision": "highest"} if exact else usual
  full = dict(result)
  if part(result, "samples"):
    full["samples"] = usual | part(result, "samples")
  for kind in _OF_LIKELIHOOD:
    if splits := part(result, kind):
      full[kind] = {split: of_likelihoods | terms if part(terms) else terms for split, terms in splits.items()}
  return full


@dataclasses.dataclass
class Column:
  """The comparable values of a measure.

  Attributes:
    name: as in `yardsticks`.
    title: for people.
    remark: the features, or the split.
    better: see `direction`.
    conditions: of the measurement, as JSON; the same for all values.
    values: value, and its spread or None, by the key of the result.
    how: in which conditions it differs from the other columns of this measure; empty if it is the only one.
  """

  name: str
  title: str
  remark: str
  better: str
  conditions: str
  values: dict[Any, tuple[float, float | None]] = dataclasses.field(default_factory=dict)
  how: str = ""

  @property
  def best(self) -> Any:
    """The key of the best of several values; None if there is only one, or no better direction."""
    if not self.better or len(self.values) < 2:
      return None
    return {"lower": min, "higher": max}[self.better](self.values, key=lambda key: self.values[key][0])


def columns(results: Mapping[Any, Result]) -> list[Column]:
  """Every measure of results by any key: one column for each way in which it was measured.

  A key `data` of a result, which files do not have, sets likelihoods of different data apart.
  """
  found: dict[tuple[str, str], dict[str, Column]] = {}

  def add(key: Any, value: Any, spread: Any, conditions: dict[str, Any], name: str, title: str, remark: str) -> None:
    if (known := finite(value)) is not None:
      key_text = json.dumps({"weights": str(results[key].get("weights")), **conditions}, sort_keys=True)
      same = found.setdefault((name, remark), {})
      same.setdefault(key_text, Column(name, title, remark, direction(name), key_text)).values[key] = (
        known,
        finite(spread),
      )

  for key, result in results.items():
    features = str(part(result, "features").get("name", "unknown"))
    measures = part(result, "measures")
    conditions = {name: {key: part(result, name).get(key) for key in keys} for name, keys in _OF_SAMPLES.items()}
    conditions["samples"] |= guidance_of(result)
    for name in sorted(measures, key=lambda name: _rank(name, *_ORDER)):
      if name != "set_size" and not any(name.endswith(e) and name.removesuffix(e) in measures for e in _SPREADS):
        remark = f"features: {features}"
        if _rank(name, "distance", "kid") < 2 and name not in _TITLES:
          remark = f"not {'an FID' if name.endswith('distance') else 'the usual KID'}; {remark}"
        spread = next((measures[name + end] for end in _SPREADS if name + end in measures), None)
        add(key, measures[name], spread, conditions, name, title_of(name), remark)
  for kind, (remark, keys) in _OF_LIKELIHOOD.items():
    for key, result in results.items():
      for split, terms in part(result, kind).items():
        conditions = {kind: {name: part(terms).get(name) for name in keys}}
        conditions |= {"data": result["data"]} if "data" in result else {}
        total, error = (part(terms).get(name) for name in ("total", "standard_error"))
        given = ", given the class" if "given" in part(terms) else ""
        title = "Latent bits/dim" if "latent" in kind else "Bits/dim"
        add(key, total, error, conditions, f"{kind}_{split}", title, f"{remark}, {split}{given}")
  for key, result in results.items():
    features = str(part(result, "features").get("name", "unknown"))
    for kind, what in (("reconstruction", "reconstructions"), ("latents", "latents")):
      for split in part(result, kind):
        facts = part(result, kind, split)
        for name, value in numbers_of(facts).items():
          is_distance = name.endswith(("distance", "rfid"))
          conditions = {kind: {"examples": facts.get("examples")}}
          if is_distance:
            conditions["features"] = {key: part(result, "features").get(key) for key in _OF_SAMPLES["features"]}
          conditions |= {"data": result["data"]} if "data" in result else {}
          remark = f"{what}, {split}" + (f"; features: {features}" if is_distance else "")
          add(key, value, facts.get(f"{name}_standard_error"), conditions, f"{name}_{split}", title_of(name), remark)
  for same in found.values():
    flat = {key_text: _flat(json.loads(key_text)) for key_text in same}
    for key_text, mine in flat.items():
      names = [name for name in mine if any(other.get(name) != mine[name] for other in flat.values())]
      same[key_text].how = ", ".join(f"no {n}" if mine[n] is None else f"{n} {str(mine[n])[:24]}" for n in names)
  return [column for same in found.values() for column in same.values()]


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
  """The leaves of a tree, named by the keys on the way to them."""
  if isinstance(tree, dict):
    return {path: leaf for key, inner in tree.items() for path, leaf in _flat(inner, f"{name} {key}".strip()).items()}
  return {name: tree}


def _rank(name: str, *endings: str) -> int:
  """Index of the ending that a measure's name has; their number if it has none."""
  return next((i for i, end in enumerate(endings) if name == end or name.endswith("_" + end)), len(endings))
