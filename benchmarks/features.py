"""Features: how far apart damaged images are from whole ones, by kind of features, damage and its size.

  python -m benchmarks.features --dataset=folder:PATH --image_size=32
  python -m benchmarks.features --dataset=digits --kinds=untrained,network --images=500

The kinds are those of `--features`; `untrained`, the network of `network` before it is trained; and `unet`, the middle
of a run's own U-Net. One half of the data set is the reference, on which the features are trained as an evaluation
does; images of the other half are damaged in ways and sizes that are known. Told is the Fréchet distance of these to
the reference, divided by that of the same images without damage, for each size of a damage; and Spearman's rank
correlation between distance and size: 1 if more damage is always farther away. Missing classes need labels.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import ddpm_jax
from benchmarks import command, report
from ddpm_jax.api import Model
from ddpm_jax.data.sources import Source, open_source
from ddpm_jax.devices import make_mesh
from ddpm_jax.diffusion.forward import q_sample
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import trained
from ddpm_jax.evaluation.classifier import classifier_features
from ddpm_jax.evaluation.measures import frechet_distance
from ddpm_jax.evaluation.moments import Moments, add, covariance, no_moments
from ddpm_jax.evaluation.network import network_features, network_for
from ddpm_jax.first_stage.pixels import to_float
from ddpm_jax.models.build import build_model

KINDS = ("untrained", "classifier", "network", "unet")
_USUAL = "untrained,classifier,network"
_BATCH = 200
_UNET_TIMESTEP = 0.1  # of T
SIZES = {
  "blur": (0.4, 0.7, 1, 2, 4),  # standard deviation in pixels
  "noise": (2, 4, 8, 16, 32),  # standard deviation in grey levels
  "colour": (4, 8, 16, 32, 64),  # shift of the first channel in grey levels
  "missing": (1, 2, 4, 6, 8),  # classes
  "swap": (0.1, 0.2, 0.4, 0.7, 1),  # share of images whose lower half is that of another
  "hide": (0.1, 0.2, 0.3, 0.4, 0.6),  # side of a grey square as a share of the image's
  "clouds": (0.1, 0.2, 0.4, 0.7, 1),  # share of images that are noise with the mean and covariance of the data's pixels
  "repeat": (800, 400, 200, 100, 50),  # different images that are left
}

Extract = Callable[[np.ndarray], np.ndarray]  # uint8 [B, H, W, C] -> [B, D]


def make_parser() -> command.Parser:
  """The options."""
  parser = command.Parser("features", "Measures how well kinds of features tell damage.", timed=False)
  parser.add_argument("--kinds", default=_USUAL, help=f"of {', '.join(KINDS)} ({_USUAL})")
  parser.add_argument("--images", type=command.positive(int), default=1000, help="to damage (1000)")
  parser.add_argument("--model", default="", metavar="PATH", help="a trained model, for the kind unet")
  return parser


def main(argv: Sequence[str]) -> None:
  """Measures and prints."""
  options, (setting,) = command.parse(make_parser(), argv)
  kinds = parse_kinds(options.kinds, options.model)
  source = open_source(setting.config.data)
  reference, other = halves(source)
  images = other.read(np.arange(min(options.images, len(other)))).images
  labels = other.labels()[: len(images)] if other.labels else None
  damaged = {
    (name, size): damage(name, size, images, labels)
    for name, sizes in SIZES.items()
    for size in sizes
    if name != "missing" or labels is not None
  }
  results = {}
  for kind in kinds:
    command.say(f"measuring {kind}")
    extract = extractor(kind, reference, options.model)
    results[kind] = measure(extract, reference, images, damaged)
  print(report.heading(f"{source.name}: {len(images)} images against {len(reference)} others"))
  print(f"{text(results)}\n\n{report.machine()}")
  listed = {
    kind: {f"{name} {size:g}": value for (name, size), value in found.items()} for kind, found in results.items()
  }
  report.write_json(options.json, report.document("features", {"flags": setting.flags}, {}, [], listed))


def parse_kinds(text: str, model: str) -> list[str]:
  """'network,untrained' -> ['network', 'untrained']. Raises UserError."""
  kinds = [kind.strip() for kind in text.split(",")]
  for kind in kinds:
    if kind not in KINDS:
      raise UserError(f"kinds: {kind!r} is none of {', '.join(KINDS)}")
  if ("unet" in kinds) != bool(model):
    raise UserError("model: the kind unet needs a trained model, and nothing else does; name both or none")
  return kinds


def halves(source: Source) -> tuple[Source, Source]:
  """Two disjoint random parts of a data set."""
  order = np.random.default_rng(0).permutation(len(source))
  return _part(source, order[: len(order) // 2]), _part(source, order[len(order) // 2 :])


def _part(source: Source, rows: np.ndarray) -> Source:
  labels = source.labels
  return dataclasses.replace(
    source,
    length=len(rows),
    read=lambda indices: source.read(rows[indices]),
    labels=labels and (lambda: labels()[rows]),
  )


def damage(name: str, size: float, images: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
  """Damaged copies of images uint8 [N, H, W, C]; what is random is the same every time."""
  random, (number, height, width, _) = np.random.default_rng(1), images.shape
  changed = images.astype(np.float32)
  match name:
    case "blur":
      radius = int(np.ceil(4 * size))
      kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / size) ** 2)
      for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (radius, radius)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(changed, pad, mode="edge"), len(kernel), axis)
        changed = windows @ (kernel / kernel.sum()).astype(np.float32)
    case "noise":
      changed += size * random.standard_normal(images.shape, np.float32)
    case "colour":
      changed[..., 0] += size if changed[..., 0].mean() < 128 else -size
    case "missing":
      assert labels is not None
      gone = random.permutation(np.unique(labels))[: int(size)]
      changed = changed[random.choice(np.flatnonzero(~np.isin(labels, gone)), number)]
    case "swap":
      some = int(size * number)
      changed[:some, height // 2 :] = np.roll(changed, 1, axis=0)[:some, height // 2 :]
    case "hide":
      side = max(1, round(size * min(height, width)))
      for i in range(number):
        y, x = random.integers(height - side + 1), random.integers(width - side + 1)
        changed[i, y : y + side, x : x + side] = 128
    case "clouds":
      some, pixels = int(size * number), changed.reshape(number, -1)
      mixed = random.standard_normal((some, number)).astype(np.float32) / np.sqrt(number)
      mean = pixels.mean(axis=0)
      changed[:some] = (mean + mixed @ (pixels - mean)).reshape(some, *images.shape[1:])
    case "repeat":
      changed = changed[random.integers(min(int(size), number), size=number)]
  return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def extractor(kind: str, reference: Source, model: str) -> Extract:
  """The features of a kind, trained on `reference` as an evaluation would."""
  if kind == "unet":
    return unet_extractor(ddpm_jax.load(model))
  mesh = make_mesh("pmap")
  if kind == "untrained":
    network = network_for(reference.image_shape)
    fresh = trained.flat(trained.fresh(network.init, 0))
    extract = trained.extractor(network.forward, (network.num_features, 0), mesh, _BATCH)(fresh)
  else:
    train = classifier_features if kind == "classifier" else network_features
    with tempfile.TemporaryDirectory() as folder:
      cache = pathlib.Path(folder)
      extract = train(reference, cache=cache, mesh=mesh, batch_size=_BATCH, say=command.say).extract
  return lambda images: extract(images).features


def unet_extractor(model: Model) -> Extract:
  """What the middle of a trained U-Net holds of an image with noise, the same noise for all: the means of its maps."""
  run = model.weights.run
  network, t = build_model(model.config.model, run.image_shape), round(_UNET_TIMESTEP * run.schedule.num_timesteps)
  eps = jax.random.normal(jax.random.key(0), run.image_shape)

  @jax.jit
  def middle(params: dict, images: jax.Array) -> jax.Array:
    level = run.schedule.level(t)
    xt = jax.vmap(lambda x0: q_sample(x0, eps, level))(to_float(images))
    _, state = network.apply(
      {"params": params},
      xt,
      jnp.full(len(images), level.time, jnp.int32),
      capture_intermediates=lambda module, _: module.name == "mid_block1",
    )
    return jnp.asarray(state["intermediates"]["mid_block1"]["__call__"][0]).mean(axis=(1, 2))

  return lambda images: np.asarray(middle(model.params, images))


def measure(
  extract: Extract, reference: Source, images: np.ndarray, damaged: dict[tuple[str, float], np.ndarray]
) -> dict[tuple[str, float], float]:
  """(damage, size) -> distance to the reference; ('none', 0) without damage."""
  whole = moments_of(extract, (reference.read(rows).images for rows in np.array_split(np.arange(len(reference)), 50)))

  def distance(changed: np.ndarray) -> float:
    found = moments_of(extract, [changed])
    return frechet_distance(found.mean, covariance(found), whole.mean, covariance(whole))

  return {("none", 0.0): distance(images)} | {key: distance(changed) for key, changed in damaged.items()}


def moments_of(extract: Extract, blocks: Iterable[np.ndarray]) -> Moments:
  """Of the features of all images in the blocks [B, H, W, C]."""
  moments = None
  for block in blocks:
    for first in range(0, len(block), _BATCH):
      features = extract(block[first : first + _BATCH])
      moments = add(moments or no_moments(features.shape[1]), features)
  assert moments is not None
  return moments


def rank_correlation(values: Sequence[float]) -> float:
  """Spearman's, between values and their places: 1 if they rise, -1 if they fall."""
  ranks, number = np.argsort(np.argsort(values)), len(values)
  return float(1 - 6 * np.square(ranks - np.arange(number)).sum() / (number * (number**2 - 1)))


def text(results: dict[str, dict[tuple[str, float], float]]) -> str:
  """The table: a row for each damage and kind, with its distances over that of no damage, by growing size."""
  rows = []
  for name in SIZES:
    for kind, found in results.items():
      values = [value for (damage, _), value in found.items() if damage == name]
      if values:
        none = found["none", 0.0]
        cells = [report.number(value / none) for value in values]
        rows.append([name, kind, *cells, f"{rank_correlation([none, *values]):.2f}"])
  return report.table(["damage", "features", *(f"size {i + 1}" for i in range(5)), "rank"], rows)


if __name__ == "__main__":
  command.finish(main)
