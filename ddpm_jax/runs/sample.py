"""The run `sample`: draws images from a workdir's checkpoint, or with the weights of --init_from, and nothing else."""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.diffusion.samplers import SamplerTable
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.runtime import console
from ddpm_jax.runtime.paths import expanded
from ddpm_jax.runtime.progress import counted
from ddpm_jax.sampling import inputs, tasks
from ddpm_jax.sampling.classes import Classes, known_by, number_within, of_given, one_scale, wanted
from ddpm_jax.sampling.draw import QUICK
from ddpm_jax.sampling.drawn import Drawn, cannot_write, check_room, facts_of_picture, settings
from ddpm_jax.weights.initial import ensure_workdir, find_weights
from ddpm_jax.weights.load import Weights, keep_place
from ddpm_jax.workdir import grids, layout
from ddpm_jax.workdir.storage import remedy, sync_file

_GRID_IMAGES = 256  # more than that is no picture any more
_FRAME_MS = 100
_MANY = 200  # network evaluations, for which a CPU takes long
Written = dict[str, Callable[[pathlib.Path], None]]  # suffix -> what writes that file


def sample(config: Config, workdir: pathlib.Path) -> None:
  """Draws what `--sample_task` names into `samples/`.

  `images`: `samples.npz` (`images` uint8 [N, H, W, C], `settings` JSON) and `samples.png`; the other tasks NAME.npz
  and NAME.png. Earlier draws are kept as samples.1.npz, samples.2.npz and so on.

  Raises:
    UserError: if the workdir holds no such checkpoint, or what a task is given does not fit.
    RunError: if the samples cannot be written.
  """
  layout.check_writable(workdir)
  one_scale(config.sample)
  weights = find_weights(config, workdir)
  if config.sample.sample_task == "images":
    _draw_images(config, weights, workdir)
  else:
    _do_task(config, weights, workdir)


def _draw_images(config: Config, weights: Weights, workdir: pathlib.Path) -> None:
  options, shape, folder = config.sample, weights.run.image_shape, workdir / "samples"
  png_folder = None
  if options.sample_png_dir:
    png_folder = pathlib.Path(expanded("sample_png_dir", options.sample_png_dir))
    _check_png_folder(png_folder)
    check_room("num_samples", png_folder, shape, options.num_samples, copies=1)
  check_room(
    "num_samples", folder, shape, options.num_samples, copies=2
  )  # while they are drawn, and then in the archive
  classes = wanted(options, weights)
  ensure_workdir(config, workdir)
  drawn = Drawn(weights, config, folder, classes)
  quiet = jax.process_index() != 0
  with contextlib.closing(drawn), counted("image", total=options.num_samples, quiet=quiet) as (done, say):
    say(_headline(config, weights, f"drawing {_number(options.num_samples, 'image')}", drawn.table))
    drawn.draw(options.num_samples, done=lambda at: done(at.images, str(at)), say=say)
  if jax.process_index() == 0:
    images, facts = drawn.images(options.num_samples), facts_of_picture(drawn.settings, weights)
    arrays = {"images": images}
    if classes is None:
      picture = grids.image_grid(np.asarray(images[:_GRID_IMAGES]))
    else:
      arrays["labels"] = classes.of(np.arange(options.num_samples))
      picture = _grid_of_classes(images, arrays["labels"], classes)
    _write(
      folder,
      "samples",
      {
        ".npz": lambda path: _save_npz(path, arrays, drawn.settings),
        ".png": lambda path: grids.save_png(path, picture, facts),
      },
    )
    if png_folder is not None:
      _save_pngs(png_folder, images, facts)
    shown = "" if len(images) <= _GRID_IMAGES else f" (the first {_GRID_IMAGES})"
    console.say(f"done: {folder / 'samples.npz'} and {folder / 'samples.png'}{shown}")
  drawn.forget()


def _grid_of_classes(images: np.ndarray, labels: np.ndarray, classes: Classes) -> np.ndarray:
  """A picture uint8 [height, width, 3]: a row for each class, in the order in which they are drawn.

  Where the rows would be short, a grid with the name of its class below each image.
  """
  shown = list(dict.fromkeys(classes.turn.tolist()))
  number = min(len(images), _GRID_IMAGES)
  if number < 2 * len(shown):
    return grids.image_grid(np.asarray(images[:number]), captions=classes.names_of(labels[:number]))
  most = _GRID_IMAGES // len(shown)
  rows = [np.asarray(images[np.flatnonzero(labels == label)[:most]]) for label in shown]
  names = classes.names_of(np.array(shown))
  return grids.named_rows(zip(names, rows, strict=True))


def _do_task(config: Config, weights: Weights, workdir: pathlib.Path) -> None:
  options, run, folder = config.sample, weights.run, workdir / "samples"
  name, number = options.sample_task, options.num_samples
  given = {"interpolate": 2 * number, "inpaint": number, "reconstruct": number}.get(name, 0)
  accept = functools.partial(keep_place, config, workdir, weights)
  known, images, labels = known_by(weights), np.empty(0), None
  if given:
    names = known.class_names if known else ()
    images, labels = inputs.given_images(config, run.image_shape, given, accept, classes=names)
  classes = of_given(options, weights, labels) if given else wanted(options, weights)
  if classes is not None and name == "interpolate" and not options.classes:
    classes = classes._replace(turn=classes.turn[::2])  # of the first of each pair
  mask = inputs.read_mask(config, run.image_shape) if name == "inpaint" else np.empty(0)
  ensure_workdir(config, workdir)
  quiet = jax.process_index() != 0
  parts = tasks.Parts(weights, config, quiet, classes)
  if not quiet:
    what = f"{name}: {_number(number, 'row')}, {_number(number * tasks.rows_for_each(name), 'image')}"
    console.say(_headline(config, weights, what, *tasks.tables(parts)))
  match name:
    case "progressive":
      outcome = tasks.progressive(parts)
    case "interpolate":
      outcome = tasks.interpolate(parts, images)
    case "slerp":
      outcome = tasks.slerp_noises(parts)
    case "inpaint":
      outcome = tasks.inpaint(parts, images, mask)
    case "reconstruct":
      outcome = tasks.reconstruct(parts, images)
    case _:
      raise ValueError(f"unknown task {name!r}")
  if jax.process_index() == 0:
    all_settings = settings(config, weights) | dict(outcome.facts)
    labels = {} if classes is None else {"labels": classes.of(np.arange(number))}
    facts = facts_of_picture(all_settings, weights)
    files: Written = {
      ".npz": lambda path: _save_npz(path, outcome.arrays | labels, all_settings),
      ".png": lambda path: grids.save_png(path, outcome.picture, facts),
    }
    if outcome.frames:
      files[".gif"] = lambda path: _save_gif(path, outcome.frames, facts)
    _write(folder, name, files)
    for fact, value in outcome.facts.items():
      console.say(f"{fact.replace('_', ' ')}: {value if isinstance(value, str) else f'{value:.4g}'}")
    console.say("done: " + ", ".join(str(folder / f"{name}{suffix}") for suffix in files))


def _headline(config: Config, weights: Weights, what: str, *tables: SamplerTable) -> str:
  (height, width, channels), options = weights.run.image_shape, config.sample
  evaluations, quick = sum(len(table.t) for table in tables), ""
  each = f", {_number(evaluations, 'network evaluation')} each"
  if config_lib.guided(options):
    how = f"guided by {one_scale(options):g}"
    if options.guidance_interval:
      within = sum(number_within(options.guidance_interval, table.level) for table in tables)
      how = f"{within} of them {how}"
    each += f", {how}"
  if weights.classifier:
    each += f", guided by a classifier, scale {options.classifier_scale:g}"
  if evaluations >= _MANY and options.sample_task not in ("inpaint", "reconstruct") and jax.default_backend() == "cpu":
    quick = f"; --sampler=dpmpp --sampling_steps={QUICK} is about {evaluations // QUICK} times faster"
  return f"{what} {height}x{width}x{channels} with {weights.text}: {config.sample.sampler}{each}{quick}"


def _number(number: int, noun: str) -> str:
  return f"{number} {noun}{'' if number == 1 else 's'}"


def _check_png_folder(folder: pathlib.Path) -> None:
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f"sample_png_dir: {folder} exists and is not an empty folder; name another")


def _save_pngs(folder: pathlib.Path, images: np.ndarray, facts: dict) -> None:
  """Writes a folder of files, whole or not at all. Raises RunError."""
  new = folder.with_name(f".{folder.name}.new")
  try:
    shutil.rmtree(new, ignore_errors=True)  # of an earlier try
    new.mkdir(parents=True)
    for i, image in enumerate(images):
      grey = image[:, :, 0] if image.shape[-1] == 1 else image
      (new / f"{i:06d}.png").write_bytes(grids.png(np.asarray(grey), facts))
    new.replace(folder)
  except OSError as error:
    shutil.rmtree(new, ignore_errors=True)
    raise RunError(f"sample_png_dir: cannot write {folder} ({error.strerror or error}); {remedy(error)}") from error
  console.say(f"{len(images)} PNG files in {folder}")


def _save_npz(path: pathlib.Path, arrays: dict[str, np.ndarray], facts: dict) -> None:
  with path.open("wb") as file:
    everything: Any = arrays | {"settings": np.asarray(json.dumps(facts))}
    np.savez_compressed(file, **everything)


def _save_gif(path: pathlib.Path, frames: list[np.ndarray], facts: dict) -> None:
  first, *others = [Image.fromarray(frame) for frame in frames]
  how: dict[str, Any] = {"duration": _FRAME_MS, "loop": 0, "comment": json.dumps(facts).encode()}
  first.save(path, format="GIF", save_all=True, append_images=others, **how)


def _write(folder: pathlib.Path, name: str, files: Written) -> None:
  """Puts a draw where the earlier one was, which gets another name; or leaves the folder as it was. Raises RunError."""
  new = {suffix: folder / f".{name}{suffix}.new" for suffix in files}
  try:
    folder.mkdir(exist_ok=True)
    for suffix, write in files.items():
      write(new[suffix])
      sync_file(new[suffix])  # what was drawn is forgotten afterwards
    _set_aside(folder, name, tuple(files))
    for suffix, file in new.items():
      file.replace(folder / f"{name}{suffix}")
  except OSError as error:
    for file in new.values():
      with contextlib.suppress(OSError):
        file.unlink()
    raise cannot_write(folder, error) from error


def _set_aside(folder: pathlib.Path, name: str, suffixes: tuple[str, ...]) -> None:
  """Renames an earlier draw: nothing that exists is overwritten."""
  number = 1
  while any((folder / f"{name}.{number}{suffix}").exists() for suffix in suffixes):
    number += 1
  for suffix in suffixes:
    if (folder / f"{name}{suffix}").exists():
      (folder / f"{name}{suffix}").rename(folder / f"{name}.{number}{suffix}")
