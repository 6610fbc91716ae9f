"""Classes of images, from the places where data sets keep them: folders, `dataset.json`, texts beside the images."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ddpm_jax.data.encoded import Labels, NoLabels
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import console

DATASET_JSON = "dataset.json"
_MOST = 2**20  # classes; a larger number is no class, and names for all below it would fill the memory
_NUMBERED = re.compile(r"\d{5}")  # folders of a thousand images each, as EDM and StyleGAN name them


def of_files(dataset: str, names: Sequence[str], text: bytes | None) -> Labels:
  """Labels of a folder or a zip: those of `dataset.json`, or the first folders in the order of their names.

  Folders are classes where there are two or more and every image lies in one. The first is as in torchvision's
  ImageFolder, the second as in EDM and StyleGAN: `{"labels": [[name, class], ...]}`, or null. Folders with numbers of
  five digits beside a `dataset.json` are theirs, and no classes. "label_names", a list, may name the classes.

  Args:
    dataset: its name, for errors.
    names: of all images, with "/" between folders.
    text: of `dataset.json`; None if there is none.

  Raises:
    NoLabels: there are none.
    UserError: `dataset.json` cannot be used, does not name the images, or folders and it disagree.
  """
  found = None if text is None else _of_dataset_json(dataset, names, text)
  heads = [name.partition("/")[0] if "/" in name else "" for name in names]
  folders = sorted(set(heads))
  if "" in folders or len(folders) < 2 or (text is not None and all(map(_NUMBERED.fullmatch, folders))):
    folders = []  # no classes
  if found is None:
    if not folders:
      raise NoLabels(dataset)
    number = {folder: index for index, folder in enumerate(folders)}
    return Labels(np.array([number[head] for head in heads], np.int32), tuple(folders))
  classes, label_names = found
  labels = Labels(classes, _names(dataset, classes, label_names, folders, heads))
  _check_several(dataset, labels)
  return labels


def _of_dataset_json(
  dataset: str, names: Sequence[str], text: bytes
) -> tuple[np.ndarray, tuple[str, ...] | None] | None:
  """The classes int32 [N] and their names, as `dataset.json` has them; None if it has none."""
  try:
    tree = json.loads(text)
  except (ValueError, RecursionError) as error:  # of JSON, or of the encoding
    raise _bad(dataset, f"is not JSON ({' '.join(str(error).split())})") from None
  pairs = tree.get("labels") if isinstance(tree, dict) else None
  if pairs is None:
    return None
  if not isinstance(pairs, list):
    raise _bad(dataset, 'has no list of [name, class] under "labels"')
  known: dict[str, int] = {}
  for pair in pairs:
    if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
      raise _bad(dataset, f"has {_short(pair)} among its labels, not [name, class]")
    name, number = pair[0].replace("\\", "/"), pair[1]
    if not _is_class(number):
      raise _bad(dataset, f"gives {name} the class {_short(number)}, not a whole number from 0")
    if known.setdefault(name, number) != number:
      raise _bad(dataset, f"gives {name} two classes, {known[name]} and {number}")
  missing = next((name for name in names if name not in known), None)
  if missing is not None:
    raise _bad(dataset, f"has no label for {missing}")
  if len(known) > len(names):
    there = set(names)
    raise _bad(dataset, f"has a label for {next(name for name in known if name not in there)}, which is no image of it")
  label_names = tree.get("label_names")
  if label_names is not None and not (isinstance(label_names, list) and all(isinstance(n, str) for n in label_names)):
    raise _bad(dataset, 'has no list of names under "label_names"')
  return np.array([known[name] for name in names], np.int32), None if label_names is None else tuple(label_names)


def _names(
  dataset: str,
  classes: np.ndarray,
  label_names: tuple[str, ...] | None,
  folders: list[str],
  heads: list[str],
) -> tuple[str, ...]:
  """Names of the classes of a `dataset.json`. Raises UserError where they contradict the folders, or there are none."""
  number = int(classes.max()) + 1
  if label_names is not None:
    if len(label_names) < number:
      raise _bad(dataset, f"names {len(label_names)} classes, and has class {number - 1}")
    if len(set(label_names)) < len(label_names):
      raise _bad(dataset, "names two classes alike")
  if not folders:
    return label_names or tuple(map(str, range(number)))
  disagree = "and its folders disagree"
  of_folder: dict[str, int] = {}
  for head, found in zip(heads, classes.tolist(), strict=True):
    if of_folder.setdefault(head, found) != found:
      raise _bad(dataset, f"{disagree}: {head} holds the classes {of_folder[head]} and {found}")
  for folder, found in of_folder.items():
    if label_names and label_names[found] != folder:
      raise _bad(dataset, f"{disagree}: {folder} holds the class {label_names[found]}")
  if len(set(of_folder.values())) < len(folders):
    raise _bad(dataset, f"{disagree}: two folders hold one class")
  names = {found: folder for folder, found in of_folder.items()}
  return label_names or tuple(names.get(index, str(index)) for index in range(number))


def _bad(dataset: str, problem: str) -> UserError:
  return UserError(f"dataset: {DATASET_JSON} of {dataset} {problem}; correct it, or take it away")


def of_values(dataset: str, values: Iterable[Any], names: Sequence[str] | None = None) -> Labels:
  """Labels of values that stand beside the images: all whole numbers, or all texts, which are sorted.

  Args:
    dataset: its name, for errors.
    values: of each image an int, a str, or None where there is none. A str of digits alone is a number.
    names: of the classes, where values are numbers; None: the numbers.

  Raises:
    NoLabels: an image has none, or all have the same.
    UserError: a value is something else.
  """
  found = [int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value) else value for value in values]
  if all(value is None for value in found):
    raise NoLabels(dataset)
  for index, value in enumerate(found):
    if value is None or (type(value) is int and value == -1):  # -1: as in TFDS and `datasets`
      raise NoLabels(dataset, f"has none for image {index}")
    if not (isinstance(value, str) or _is_class(value)):
      raise UserError(
        f"dataset: the class of image {index} of {dataset} is {_short(value)}; use a whole number from 0, or a text"
      )
  if any(isinstance(value, str) for value in found):
    texts = sorted(set(map(str, found)))
    number = {text: index for index, text in enumerate(texts)}
    labels = Labels(np.array([number[str(value)] for value in found], np.int32), tuple(texts))
  else:
    classes = np.array(found, np.int32)
    most = int(classes.max())
    if names is not None and len(names) <= most:
      raise UserError(f"dataset: {dataset} names {len(names)} classes, and has class {most}; correct the names")
    labels = Labels(classes, tuple(names) if names is not None else tuple(map(str, range(most + 1))))
  _check_several(dataset, labels)
  return labels


def _check_several(dataset: str, labels: Labels) -> None:
  if labels.classes.min() == labels.classes.max():
    raise NoLabels(dataset, "has one and the same for all images")


def numbers_of(only: str, dataset: str, names: Sequence[str]) -> list[int]:
  """The classes that --only names, by name or by number, in rising order. Raises UserError for one that is unknown."""
  return sorted({number_of(part.strip(), "only", dataset, names) for part in only.split(",")})


def listed(names: Sequence[str], most: int = 10) -> str:
  """Names of classes in a line, so many at most."""
  return ", ".join(map(console.one_line, names[:most])) + ", ..." * (len(names) > most)


def number_of(word: str, option: str, owner: str, names: Sequence[str]) -> int:
  """The class that a word means, its name or its number.

  Args:
    word: the word.
    option: that holds it, for errors.
    owner: of the classes, for errors.
    names: of all classes.

  Raises:
    UserError: it means none; offers the nearest names.
  """
  if names.count(word) > 1:
    same = " and ".join(str(number) for number, name in enumerate(names) if name == word)
    raise UserError(f"{option}: {word!r} names several classes of {owner}, {same}; use the number")
  if word in names:
    return list(names).index(word)
  if re.fullmatch(r"\d{1,9}", word) and int(word) < len(names):
    return int(word)
  is_number = re.fullmatch(r"-?[\d.]+", word)  # 10 is not near 1
  near = [] if is_number else difflib.get_close_matches(word, names, n=3, cutoff=0.5)
  hint = f"did you mean {' or '.join(map(console.one_line, near))}?" if near else f"use some of {listed(names, 20)}"
  raise UserError(f"{option}: {word!r} is none of the {len(names)} classes of {owner}; {hint}")


def _is_class(value: Any) -> bool:
  return type(value) is int and 0 <= value < _MOST


def _short(value: Any) -> str:
  text = json.dumps(value, default=str)
  return text if len(text) <= 60 else text[:60] + "..."
