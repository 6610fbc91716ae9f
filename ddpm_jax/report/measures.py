"""The part of a run's report about what was measured: `eval/N.json` of every evaluated checkpoint N.

Any key of these files but `step` may be missing, and any value may be of another type: what cannot be shown is left
out. Two checkpoints are only compared in a measure if it was taken under the same conditions.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ddpm_jax.report.charts import Series, line_chart
from ddpm_jax.report.page import Html, decimals, finite, join, number, table, tag, tile

Evaluation = dict[str, Any]  # one eval/N.json

_SIZE = (290, 150)  # of a chart of one measure
_SPREADS = ("_std", "_standard_error")
# Measures by their names in the file, or the ends of these; the names of features may stand before them.
_TITLES = {"fid": "FID", "kid": "KID", "inception_score": "Inception Score"}
_LOWER = ("fid", "distance", "kid")
_HIGHER = ("score", "precision", "recall", "density", "coverage")
_ORDER = (*_LOWER, *_HIGHER)
# What a measure of samples is held against, see evaluation/yardsticks.py: in a sentence, and in a row of a table.
_YARDSTICKS = {
  "data": ("the data against itself has", "the data itself"),
  "noise": ("pure noise", "pure noise"),
  "untrained": ("an untrained network", "untrained network"),
}
# How well the network of the features does, on images that it was not trained on.
_SHARES = {
  "accuracy": "the images held out are classified right",
  "explained": "the noise is predicted in the images held out",
}
_OF_MODEL = ("bits_per_dim", "ode_bits_per_dim")
# What must be equal for two values to be comparable; of samples, the weights too.
_ARITHMETIC = ("dtype", "matmul_precision")
_SAMPLER = ("sampler", "evaluations", "time_grid", "eta", "variance", "threshold", "threshold_quantile")
_CONDITIONS = {
  "samples": ("number", *_SAMPLER, *_ARITHMETIC),
  "reference": ("dataset", "split", "number", "fingerprint", "sha256"),
  "features": ("name", "identity", "resize"),
  "measures": ("set_size",),
}
_TOLD = ("sampler", "time_grid", "seed", "sample_seed", *_ARITHMETIC)
_TERMS = ("total", "prior", "chain", "decoder", "rate", "distortion")
_BOUND = ("examples", "timesteps_per_example", *_ARITHMETIC)
_ODE = ("examples", "steps", "probes", *_ARITHMETIC)


@dataclasses.dataclass
class Column:
  """A measure over the checkpoints: value, spread or None, and conditions by update."""

  name: str  # as in `yardsticks`
  title: str
  remark: str
  better: str  # "lower", "higher", or "" if neither is
  values: dict[int, tuple[float, float | None, str]] = dataclasses.field(default_factory=dict)

  def comparable(self) -> dict[int, float]:
    """The values that were taken like the newest one, by update."""
    newest = self.values[max(self.values)][2]
    return {step: value for step, (value, _, conditions) in self.values.items() if conditions == newest}

  def best(self) -> float | None:
    """The best value among those that can be compared, if there are several and a direction."""
    values = self.comparable().values()
    if len(values) < 2 or not self.better:
      return None
    return min(values) if self.better == "lower" else max(values)


def part(evaluation: Any, *names: str) -> dict[str, Any]:
  """A part of an evaluation, {} if it is missing or something else."""
  for name in names:
    evaluation = evaluation.get(name) if isinstance(evaluation, dict) else None
  return evaluation if isinstance(evaluation, dict) else {}


def completed(evaluation: Evaluation, dtype: str) -> Evaluation:
  """With the arithmetic that results of release 0.1 do not name: that of the run, of the default precision.

  On CPUs the products of float32 are of the highest precision by default.

  dtype: of the run's activations.
  """
  usual = dict(zip(_ARITHMETIC, (dtype, "default"), strict=True))
  exact = dtype == "float32" and str(evaluation.get("machine")).endswith(" x cpu")
  of_likelihoods = usual | {"matmul_precision": "highest"} if exact else usual
  full = dict(evaluation)
  if part(evaluation, "samples"):
    full["samples"] = usual | part(evaluation, "samples")
  for kind in ("bits_per_dim", "ode_bits_per_dim"):
    splits = part(evaluation, kind)
    if splits:
      full[kind] = {split: of_likelihoods | terms if part(terms) else terms for split, terms in splits.items()}
  return full


def yardsticks(evaluation: Evaluation) -> dict[str, dict[str, float]]:
  """What the data itself, noise and an untrained network have: measure -> kind -> value, kinds in that order.

  Measures have the names of the metrics, without `evaluation/`. Results of release 0.1 have none.
  """
  found: dict[str, dict[str, float]] = {}
  for kind in _YARDSTICKS:
    values = dict(part(evaluation, "yardsticks", kind, "values"))
    for measure in _OF_MODEL:
      for split in part(evaluation, measure):
        values[f"{measure}_{split}"] = part(evaluation, measure, split, "yardsticks").get(kind)
    for name, value in values.items():
      amount = finite(value)
      if amount is not None and direction(name):  # of a spread, or a number of images, there is no better or worse
        found.setdefault(name, {})[kind] = amount
  return found


def direction(name: str) -> str:
  """Whether 'lower' or 'higher' values of a measure are better, by its name; empty if neither is known."""
  if _rank(name, *_LOWER) < len(_LOWER) or name.startswith((*_OF_MODEL, "near_duplicates")):
    return "lower"
  return "higher" if _rank(name, *_HIGHER) < len(_HIGHER) else ""


def in_words(title: str, name: str, value: float, others: Mapping[str, float]) -> str:
  """A measure and what it is held against, as a sentence; says where noise is better, so that it tells nothing.

  Args:
    title: what the measure is called.
    name: its name, which says what is better.
    value: of the samples, or of the model.
    others: its yardsticks, kind -> value.
  """
  better = direction(name)
  told = ", ".join(f"{words} {number(others[kind], 3)}" for kind, (words, _) in _YARDSTICKS.items() if kind in others)
  sentence = f"{title} {number(value, 3)}: {told}{f'; {better} is better' if better else ''}."
  rivals = value, others.get("data", value)
  if "noise" in others and any(
    others["noise"] != rival and better == ("lower" if others["noise"] < rival else "higher") for rival in rivals
  ):
    sentence += " Noise does better than that: here this measure tells nothing."
  return sentence


def title_of(name: str) -> str:
  """What a measure is called on a page, by its name in the file."""
  return _TITLES.get(name, _words(name).removesuffix(" kid") + (" KID" if name.endswith("_kid") else ""))


def said(value: Any) -> str:
  """A value out of a file as text."""
  amount = finite(value)
  return str(value) if amount is None else number(amount)


def _words(name: str) -> str:
  """A key of a file as a person writes it."""
  return (name[:1].upper() + name[1:]).replace("_", " ")


def _rank(name: str, *endings: str) -> int:
  """Which of the endings a measure's name has; their number if none."""
  return next((i for i, end in enumerate(endings) if name == end or name.endswith("_" + end)), len(endings))


def _conditions(evaluation: Evaluation, of: dict[str, tuple[str, ...]]) -> str:
  chosen = {name: {key: part(evaluation, name).get(key) for key in keys} for name, keys in of.items()}
  return _text(evaluation, chosen)


def _text(evaluation: Evaluation, conditions: dict[str, dict[str, Any]]) -> str:
  return json.dumps({"weights": str(evaluation.get("weights")), **conditions}, sort_keys=True)


def columns(evaluations: Sequence[Evaluation]) -> list[Column]:
  """Every measure that any checkpoint has, in the order of the table."""
  found: dict[tuple[str, str], Column] = {}
  for evaluation in evaluations:
    features = str(part(evaluation, "features").get("name", "unknown"))
    measures = part(evaluation, "measures")
    for name in sorted(measures, key=lambda name: _rank(name, *_ORDER)):
      value = finite(measures[name])
      if (
        value is None
        or name == "set_size"
        or any(name.endswith(end) and name.removesuffix(end) in measures for end in _SPREADS)
      ):
        continue
      remark = f"features: {features}"
      if _rank(name, "distance", "kid") < 2 and name not in _TITLES:
        remark = f"not an FID; {remark}" if name.endswith("distance") else f"not the usual KID; {remark}"
      spread = next((finite(measures[name + end]) for end in _SPREADS if name + end in measures), None)
      column = found.setdefault((name, features), Column(name, title_of(name), remark, direction(name)))
      column.values[evaluation["step"]] = value, spread, _conditions(evaluation, _CONDITIONS)
  for kind, remark, keys in (("bits_per_dim", "bound", _BOUND), ("ode_bits_per_dim", "ODE", _ODE)):
    for evaluation in evaluations:
      for split, terms in part(evaluation, kind).items():
        value, spread = (finite(part(terms).get(key)) for key in ("total", "standard_error"))
        if value is not None:
          column = found.setdefault((kind, split), Column(f"{kind}_{split}", "Bits/dim", f"{remark}, {split}", "lower"))
          same = _text(evaluation, {kind: {key: part(terms).get(key) for key in keys}})
          column.values[evaluation["step"]] = value, spread, same
  return list(found.values())


def tiles(evaluations: Sequence[Evaluation]) -> list[Html]:
  """The numbers for the top of the page: distances, scores and likelihoods, each of the best checkpoint."""
  shown = []
  for column in columns(evaluations):
    if column.title in ("FID", "Bits/dim") or column.title.lower().endswith(("distance", "score")):
      values = column.comparable()
      best = column.best()
      step = max(values) if best is None else min(step for step, value in values.items() if value == best)
      detail = f"{column.remark}; {'best, ' if best is not None else ''}update {step:,}"
      others = _beside(column, evaluations)
      detail += "".join(f"; {_YARDSTICKS[kind][1]} {number(value, 3)}" for kind, value in others.items())
      shown.append(tile(column.title, number(values[step]), detail))
  return shown


def _beside(column: Column, evaluations: Sequence[Evaluation]) -> dict[str, float]:
  """The yardsticks of a measure, of the newest checkpoint that has it."""
  newest = max(column.values)
  return next((yardsticks(one).get(column.name, {}) for one in evaluations if one["step"] == newest), {})


def _by_checkpoint(evaluations: Sequence[Evaluation]) -> list[Html]:
  """The table of all measures at all checkpoints."""
  shown = columns(evaluations)
  if not shown:
    return []
  head = ["Update"]
  for column in shown:
    arrow = {"lower": "↓", "higher": "↑"}.get(column.better)
    direction = tag("span", arrow, title=f"{column.better} is better") if arrow else None
    head.append(join([column.title, "\N{NO-BREAK SPACE}", direction, tag("small", column.remark)]))
  rows = []
  for evaluation in evaluations:
    step = evaluation["step"]
    cells = [Html(f"{step:,}")]
    for column in shown:
      value, spread, _ = column.values.get(step, (None, None, ""))
      if value is None:
        cells.append(tag("td"))
        continue
      digits = decimals(value for value, _, _ in column.values.values())
      best = column.best() == value and step in column.comparable()
      margin = tag("small", f" ± {number(spread, 2)}") if spread is not None else None
      cells.append(tag("td", f"{value:.{digits}f}", margin, class_="best" if best else None))
    rows.append(cells)
  beside = [_beside(column, evaluations) for column in shown]
  for kind, (_, words) in _YARDSTICKS.items():
    if any(kind in others for others in beside):
      cells = [tag("small", words)]
      cells += [tag("td", tag("small", number(others[kind], 3)) if kind in others else None) for others in beside]
      rows.append(cells)
  text = "↓ lower is better, ↑ higher is better."
  if any(beside):
    text += (
      " The last rows are the same measures of the data itself (images of the data set against the others of it: the "
      "what a perfect model would have, but for chance), of pure noise, and of a network that was not trained."
    )
  if not all(beside):
    text += (
      " A column without them was measured by a release that did not say what the data itself, noise and an untrained "
      "network have. By itself such a number says little: in some features noise has a high precision. Measure again."
    )
  if len(evaluations) > 1:
    text += " The best value of a column is shaded."
  if any(len(column.comparable()) < len(column.values) for column in shown):
    text += " Checkpoints that were measured in another way than the newest do not take part, nor in the charts."
  charts = []
  for column in shown:
    points = [(float(step), value) for step, value in sorted(column.comparable().items())]
    if len(points) > 1:
      remark = column.remark + (f"; {column.better} is better" if column.better else "")
      series = [Series(column.title, points, marks=True)]
      charts.append(line_chart(column.title, series, remark=remark, log_y=False, size=_SIZE))
  return [table(head, rows), tag("p", text, class_="soft"), tag("div", *charts, class_="grid") if charts else Html()]


def _sentence(evaluations: Sequence[Evaluation]) -> list[Html]:
  """The newest distance in words, and what tells nothing, as noise does as well."""
  told = []
  for column in columns(evaluations):
    others = _beside(column, evaluations)
    sentence = in_words(column.title, column.name, column.values[max(column.values)][0], others) if others else ""
    if sentence and (not told or "nothing" in sentence):
      told.append(sentence)
  return [tag("p", " ".join(told))] if told else []


def _how(evaluation: Evaluation) -> Html:
  """What was compared with what, in which features, where and when."""
  samples, reference, features = (part(evaluation, name) for name in ("samples", "reference", "features"))
  sentences = []
  if samples:
    how = [
      f"{said(samples['evaluations'])} network evaluations each" if "evaluations" in samples else "",
      *(f"{key.replace('_', ' ')} {samples[key]}" for key in _TOLD if key in samples),
      f"{evaluation['weights']} weights" if "weights" in evaluation else "",
    ]
    sentences.append(f"{said(samples.get('number', '?'))} samples ({', '.join(text for text in how if text)}).")
  if reference:
    size = said(reference.get("number", "?"))
    name = f"{reference.get('dataset', 'an unnamed data set')} ({reference.get('split', 'unknown split')})"
    file = f"the statistics in {reference.get('file')} (SHA-256 {str(reference.get('sha256'))[:12]})"
    with_what = (
      f"{size} images of {name}" if "file" not in reference or "dataset" in reference else "data it does not name"
    )
    sentences.append(f"Compared with {f'{file}, of ' if 'file' in reference else ''}{with_what}.")
  size = finite(part(evaluation, "measures").get("set_size"))
  if size is not None:
    sentences.append(f"KID, precision, recall, density and coverage compare {number(size)} of either.")
  if "precision" in part(evaluation, "measures"):
    sentences.append(
      "Precision and recall are those of Kynkäänniemi et al. 2019 (k = 3) in these features and of so many images. "
      "Theirs are of 50,000 of either in features of VGG-16: not to be compared."
    )
  if features:
    more = [f"{said(features['width'])} numbers an image"] if "width" in features else []
    for key, words in _SHARES.items():
      share = finite(features.get(key))
      if share is not None:
        more.append(f"{100 * share:.1f}% of {words}")
    sentences.append(f"Features: {features.get('name', 'unknown')}{' (' + '; '.join(more) + ')' if more else ''}.")
    if features.get("name") != "inception":
      sentences.append("A distance in these features is not an FID and cannot be compared with one.")
  seconds = finite(evaluation.get("seconds"))
  place = [
    f"on {evaluation['machine']}" if "machine" in evaluation else "",
    f"in {number(round(seconds, 1))} seconds" if seconds is not None else "",
    str(evaluation.get("date", "")),
    f"ddpm_jax {evaluation['version']}" if "version" in evaluation else "",
  ]
  if any(place):
    sentences.append(f"Measured {', '.join(text for text in place if text)}.")
  return tag("p", " ".join(sentences), class_="soft") if sentences else Html()


def _terms(title: str, remark: str, groups: dict[str, Any]) -> list[Html]:
  """A table with a row for each group, and a column for each number that any of them has."""
  rows: dict[str, dict[str, float]] = {}
  for name in groups:
    pairs = ((key, finite(value)) for key, value in part(groups, name).items())
    rows[name] = {key: value for key, value in pairs if value is not None}
  keys = [*dict.fromkeys(key for row in rows.values() for key in row)]
  keys = [key for key in keys if key != "standard_error" or "total" not in keys]
  keys.sort(key=lambda key: _TERMS.index(key) if key in _TERMS else len(_TERMS))
  if not keys:
    return []
  cells = []
  for name, row in rows.items():
    cells.append([name])
    for key in keys:
      known = [other[key] for other in rows.values() if key in other]
      whole = all(value == int(value) for value in known) and key not in _TERMS
      value = row.get(key)
      text = "" if value is None else number(value) if whole else f"{value:.{decimals(known)}f}"
      error = row.get("standard_error") if key == "total" else None
      cells[-1].append(tag("td", text, tag("small", f" ± {number(error, 2)}") if error is not None else None))
  head = ["", *map(_words, keys)]
  return [tag("h3", title), tag("p", remark, class_="soft"), table(head, cells)]


def _by_timestep(splits: dict[str, Any]) -> list[Html]:
  """Where in the chain the bits are, and how well the noise is predicted there."""
  bits, errors = [], []
  for i, (split, terms) in enumerate(splits.items()):
    lists = part(terms, "by_timestep")
    low, high = (lists[key] if isinstance(lists.get(key), list) else [] for key in ("t_low", "t_high"))
    for key, series in (("bits", bits), ("eps_mse", errors)):
      values = lists[key] if isinstance(lists.get(key), list) else []
      points = []
      for triple in zip(low, high, values, strict=False):
        start, end, value = map(finite, triple)
        if start is not None and end is not None and value is not None and 0 < start <= end:
          points.append((math.sqrt(start * end), value))
      series.append(Series(split, sorted(points), colour=i % 4 + 1, marks=len(points) <= 60))
  drawn = [
    line_chart(title, series, x_label="timestep t", remark=remark, log_x=True, log_y=True)
    for title, series, remark in (
      ("Bits/dim of one timestep", bits, "mean over each range of timesteps"),
      ("Squared error of the noise", errors, "eps MSE of one dimension"),
    )
  ]
  return [tag("div", *drawn, class_="grid wide")] if any(drawn) else []


def _in_what(splits: dict[str, Any]) -> str:
  """In which arithmetic likelihoods were computed, as a sentence."""
  kinds = {tuple(str(part(terms).get(key, "unknown")) for key in _ARITHMETIC) for terms in splits.values()}
  return "".join(f" Computed in {dtype} with products of {precision} precision." for dtype, precision in sorted(kinds))


def measured(evaluations: Sequence[Evaluation]) -> list[Html]:
  """The sections about what was measured, oldest checkpoint first in `evaluations`; nothing if there is none."""
  if not evaluations:
    return []
  newest = evaluations[-1]
  shown = [tag("h2", "Measures"), *_sentence(evaluations), _how(newest), *_by_checkpoint(evaluations)]
  at = f"Update {newest['step']:,}."
  bound, ode = part(newest, "bits_per_dim"), part(newest, "ode_bits_per_dim")
  remark = (
    f"{at} Bits per dimension of the image, prior + chain + decoder: an upper bound on the negative log-likelihood."
  )
  shown += _terms("Variational bound", remark + _in_what(bound), bound) + _by_timestep(bound)
  remark = f"{at} Bits per dimension, an estimate."
  shown += _terms("Likelihood of the probability-flow ODE", remark + _in_what(ode), ode)
  remark = f"{at} Near duplicates are the share of samples that seem to copy an image of the training; orientations: 2 "
  remark += "where mirrored copies count too, as the run mirrors its images."
  return shown + _terms("Nearest neighbours", remark, part(newest, "neighbours"))
