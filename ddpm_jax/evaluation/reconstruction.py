"""An autoencoder over the images of some splits: how it reconstructs them, and what its latents are like."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.data.sources import Source
from ddpm_jax.devices.batched import BatchedFn
from ddpm_jax.devices.hosts import all_gather_host, any_host
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import estimate, measures, perceptual, yardsticks
from ddpm_jax.evaluation.comparison import LEAST_IMAGES, NAMES
from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.latents import (
  LatentSums,
  add_latents,
  channels,
  codebook_use,
  no_latents,
  perplexity,
)
from ddpm_jax.evaluation.moments import Moments, add, covariance, no_moments
from ddpm_jax.evaluation.reference import Reference, batches_of, evenly_spaced, measure_reference
from ddpm_jax.evaluation.results import earlier_results
from ddpm_jax.evaluation.similarity import SSIM_WINDOW, psnr, ssim
from ddpm_jax.evaluation.summary import duration, finite, part
from ddpm_jax.evaluation.surroundings import Surroundings
from ddpm_jax.first_stage.pixels import to_float, to_uint8
from ddpm_jax.models.build import AutoencoderNetwork, Params, build_autoencoder, lpips
from ddpm_jax.sampling.draw import fit_batch
from ddpm_jax.weights.load import Weights
from ddpm_jax.workdir import grids
from ddpm_jax.workdir.arrays import save_arrays

PRECISION = "highest"  # of products, as that of features: the numbers do not depend on the machine
_SHOWN, _WORST = 32, 16  # images in the pictures
_COLUMNS = 8
_FEW_CODES = 0.05  # share of the codebook below which it has collapsed
_VERSION = 1  # of the yardsticks; to be counted up when something else is computed

Values = dict[str, np.ndarray]  # float64 [N] of N images: "psnr", "ssim", "lpips", as far as they are defined


class Passed(NamedTuple):
  """What a pass over N images gives.

  Attributes:
    similarity: of each image with its reconstruction.
    seen: the moments of the features of the reconstructions; of no images where there is no extractor.
    latents: their statistics.
    codes: how often each of the codebook occurs, int64 [K]; None where there is none.
  """

  similarity: Values
  seen: Moments
  latents: LatentSums
  codes: np.ndarray | None


class Meter:
  """The compiled functions of a measurement, for one autoencoder, and how many images they take at once.

  Attributes:
    network: the autoencoder, of float32 whatever it was trained in.
    latent_shape: h, w, z.
    lpips_identity: SHA-256 of the weights of LPIPS; empty without it.
    size: images at once, over all devices.
  """

  def __init__(
    self, config: Config, weights: Weights, features: Features | None, lpips_weights: tuple[Params, str] | None
  ):
    """Args:
    config: the settings.
    weights: of the autoencoder.
    features: the extractor; None if no distance is asked for.
    lpips_weights: see `perceptual.lpips_to_measure`.
    """
    run, self._features = weights.run, features
    exact = dataclasses.replace(config.model, dtype="float32")
    self.network = build_autoencoder(exact, config.autoencoder, run.image_shape)
    self._params = weights.params["autoencoder"]
    self.latent_shape = self.network.latent_shape(run.image_shape)
    self._codebook_size = config.autoencoder.codebook_size
    self._lpips: Any = {}
    self.lpips_identity = ""
    if lpips_weights:
      params, self.lpips_identity = lpips_weights
      self._lpips = jax.device_put(params, run.mesh.replicated)
    compiled = functools.partial(BatchedFn, mesh=run.mesh, matmul_precision=PRECISION)
    self._reconstruct = compiled(functools.partial(reconstruct, self.network))
    self._compare = compiled(similarity)
    self._resize = compiled(functools.partial(shrink_and_enlarge, self.latent_shape[:2]))
    one = np.zeros((1, *run.image_shape), np.uint8)
    self.size = fit_batch(self._reconstruct, self._params, one, number=config.evaluate.evaluate_batch_size)
    self.size = fit_batch(self._compare, self._lpips, one, one, number=self.size)

  def reconstruct(self, images: np.ndarray) -> dict[str, np.ndarray]:
    """See `reconstruct`, of at most `size` images."""
    return self._reconstruct(self._params, images, size=self.size)

  def resize(self, images: np.ndarray) -> np.ndarray:
    """See `shrink_and_enlarge`, of at most `size` images."""
    return self._resize({}, images, size=self.size)

  def compare(self, images: np.ndarray, others: np.ndarray) -> dict[str, np.ndarray]:
    """See `similarity`, of at most `size` images."""
    return self._compare(self._lpips, images, others, size=self.size)

  def see(self, images: np.ndarray) -> np.ndarray:
    """Features float32 [B, D]; D is 0 where there is no extractor."""
    return np.zeros((len(images), 0), np.float32) if self._features is None else self._features.extract(images).features

  def over(self, source: Source, done: Callable[[int], None]) -> Passed:
    """Encodes and decodes all images of a source, as they are."""
    found: list[dict[str, np.ndarray]] = []
    seen: Moments | None = None
    latents, codes = no_latents(self.latent_shape), None
    for first, images in batches_of(source, np.arange(len(source)), self.size):
      output = self.reconstruct(images)
      found.append(self.compare(images, output["images"]))
      features = self.see(output["images"])
      seen = add(seen or no_moments(features.shape[1]), features)
      if "codes" in output:
        counts = np.bincount(output["codes"].ravel(), minlength=self._codebook_size)
        latents, codes = add_latents(latents, output["moments"]), counts if codes is None else codes + counts
      else:
        latents = add_latents(latents, *np.split(output["moments"], 2, axis=-1))
      done(first + len(images))
    assert seen is not None  # a source holds at least one image
    return Passed(_joined(found), seen, latents, codes)


def reconstruct(network: AutoencoderNetwork, params: Any, images: jax.Array) -> dict[str, jax.Array]:
  """Images uint8 [B, H, W, C] through an autoencoder; of a posterior the mean is decoded.

  Returns:
    `images`, uint8 like the images; `moments`, see `AutoencoderNetwork.moments`; of a codebook `codes`, int32
    [B, h, w].
  """
  moments = network.moments(params, to_float(images))
  output = {"moments": moments}
  if network.regularizer == "vq":
    latents, output["codes"] = network.quantize(params, moments)
  else:
    latents, _ = jnp.split(moments, 2, axis=-1)
  return output | {"images": to_uint8(network.decode(params, latents))}


def similarity(lpips_params: Any, images: jax.Array, others: jax.Array) -> dict[str, jax.Array]:
  """Of images uint8 [B, H, W, C] with others: float32 [B] each, "psnr", "ssim" if they are large enough, "lpips".

  lpips_params: see `models.lpips.lpips`; {} leaves it out.
  """
  found = {"psnr": jax.vmap(psnr)(images, others)}
  if min(images.shape[1:3]) >= SSIM_WINDOW:
    found["ssim"] = jax.vmap(ssim)(images, others)
  if lpips_params:
    found["lpips"] = lpips(lpips_params, to_float(images), to_float(others))
  return found


def shrink_and_enlarge(size: tuple[int, int], constants: Any, images: jax.Array) -> jax.Array:
  """Images uint8 [B, H, W, C] resized to `size`, height and width, and back: bicubic, antialiased."""
  del constants
  batch, height, width, channels = images.shape
  small = jax.image.resize(to_float(images), (batch, *size, channels), "cubic")
  return to_uint8(jax.image.resize(small, (batch, height, width, channels), "cubic"))


def check(config: Config, workdir: pathlib.Path, splits: Mapping[str, Source]) -> None:
  """Raises UserError for what would otherwise be found out later: weights of LPIPS, images of a split."""
  if "reconstruction" in config.evaluate.measures:
    perceptual.lpips_to_measure(config, workdir)
  least = LEAST_IMAGES["frechet"]
  for source in splits.values():
    if "frechet" in config.evaluate.measures and len(source) < least:
      raise UserError(f"measures: frechet needs {least} images, and {source.name} has {len(source)}; leave it out")


def _defined(config: Config, image_shape: tuple[int, int, int], around: Surroundings) -> tuple[Params, str] | None:
  """The weights of LPIPS, where it is asked for and defined; says which measures are not, of images so small."""
  if "reconstruction" not in config.evaluate.measures:
    return None
  found = perceptual.lpips_to_measure(config, around.workdir)
  for name, side in (("ssim", SSIM_WINDOW), *([("lpips", perceptual.SMALLEST)] if found else [])):
    if min(image_shape[:2]) < side:
      size = "x".join(map(str, image_shape[:2]))
      around.say(f"left out: {name} (it needs images of at least {side}x{side} pixels, and these have {size})")
  return found if min(image_shape[:2]) >= perceptual.SMALLEST else None


def measure(
  config: Config, weights: Weights, splits: Mapping[str, Source], features: Features | None, around: Surroundings
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """What `--measures` names of an autoencoder, of each split. All processes must call it.

  Args:
    config: the settings.
    weights: of the autoencoder.
    splits: name -> images.
    features: the extractor; None if no distance is asked for.
    around: where.

  Returns:
    Parts of the result, JSON values, and pictures uint8 [height, width, 3] by name.

  Raises:
    UserError: the weights of LPIPS cannot be read.
    Abandoned: by `around.beat`.
  """
  names = config.evaluate.measures
  meter = Meter(config, weights, features, _defined(config, weights.run.image_shape, around))
  number, result = _settle(config, meter, splits, around)
  result |= {"warnings": []}
  of_images, of_latents, pictures = {}, {}, {}
  for split, source in splits.items():
    index = evenly_spaced(len(source), number)
    images = _part_of(source, index)
    around.say(f"reconstructing {len(images):,} images of {source.name} ({split})")
    with around.counted(f"reconstructions of {split}", "image", len(images)) as done:
      passed = meter.over(images, done)
    values = _means(passed.similarity) if "reconstruction" in names else {}
    beside: dict[str, dict[str, float]] = {}
    reference = None
    if features is not None:
      reference = _reference(images, features, meter.size, around)
      values[NAMES[features.name]["reconstruction"]] = _distance(passed.seen, reference.moments)
    if values:
      beside = _yardsticks(meter, images, features, reference, similar="reconstruction" in names, around=around)
      of_images[split] = {"examples": len(images), **values, "yardsticks": beside}
    if "latents" in names:
      of_latents[split] = {"examples": len(images), **_of_latents(meter, passed)}
      result["warnings"] += _warnings(meter, passed, split)
    pictures = _pictures(meter, images, passed.similarity["psnr"])  # those of the last split are kept
  result |= {name: found for name, found in (("reconstruction", of_images), ("latents", of_latents)) if found}
  if features is not None:
    result["features"] = features.about | {"name": features.name, "identity": features.identity}
    result["features"]["width"] = passed.seen.mean.size
  return result, pictures if of_images else {}


def _settle(
  config: Config, meter: Meter, splits: Mapping[str, Source], around: Surroundings
) -> tuple[int, dict[str, Any]]:
  """How many images of each split are measured, and what the result says of that; prints how long it will take."""
  asked, chosen = config.evaluate.likelihood_examples, []
  number = asked or max(map(len, splits.values()))
  source = next(iter(splits.values()))
  images = source.read(np.arange(meter.size) % len(source)).images

  def one_batch() -> None:
    output = meter.reconstruct(images)
    meter.compare(images, output["images"])
    meter.see(output["images"])

  one = float(all_gather_host(np.asarray(estimate.seconds(one_batch) / meter.size))[0])
  if not asked and "likelihood_examples" not in around.given:
    chosen = ["likelihood_examples"]
    before = int(all_gather_host(np.asarray(_examples_before(around)))[0])
    number = before or estimate.largest(estimate.NUMBERS, around.budget_s / (len(splits) * one))
  total = sum(min(number, len(source)) for source in splits.values())
  how: dict[str, Any] = {"chosen": chosen}
  if around.estimates:
    around.say(f"estimate, from a timed batch: about {duration(one * total)} for {total:,} images")
    how["estimated_seconds"] = round(one * total, 1)
  around.beat("the estimate")
  return number, how


def _examples_before(around: Surroundings) -> int:
  """Images of a split in the newest earlier result that has reconstructions; 0 if there is none."""
  for result in earlier_results(around.workdir):
    counts = [finite(part(result, "reconstruction", split).get("examples")) for split in part(result, "reconstruction")]
    if any(counts):
      return int(max(count or 0 for count in counts))
  return 0


def _part_of(source: Source, index: np.ndarray) -> Source:
  return dataclasses.replace(source, length=len(index), read=lambda rows: source.read(index[rows]))


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> Values:
  return {name: np.concatenate([part[name] for part in parts]).astype(np.float64) for name in parts[0]}


def _means(values: Values) -> dict[str, float]:
  """The mean of each, and its standard error where there are several images."""
  found = {}
  for name, each in values.items():
    found[name] = float(each.mean())
    if len(each) > 1:
      found[f"{name}_standard_error"] = float(each.std(ddof=1) / np.sqrt(len(each)))
  return found


def _distance(seen: Moments, reference: Moments) -> float:
  return measures.frechet_distance(seen.mean, covariance(seen), reference.mean, covariance(reference))


def _reference(images: Source, features: Features, size: int, around: Surroundings) -> Reference:
  with around.counted("features of the data", "image", len(images)) as done:
    return measure_reference(images, features, cache=around.cache, batch_size=size, say=around.say, done=done)


def _of_latents(meter: Meter, passed: Passed) -> dict[str, Any]:
  """What is known of the latents, JSON values."""
  found, is_kl = channels(passed.latents), passed.codes is None
  values: dict[str, Any] = {"shape": list(meter.latent_shape)}
  if passed.codes is None:
    values |= {"kl": float(found.kl.sum()), "active_units": float(found.active.mean())}
  else:
    values |= {"codebook_use": codebook_use(passed.codes), "codebook_perplexity": perplexity(passed.codes)}
  columns = {"mean": found.mean, "std": found.std}
  columns |= {"kl": found.kl, "active_units": found.active} if is_kl else {}
  values["channels"] = {
    str(i): {name: float(column[i]) for name, column in columns.items()} for i in range(len(found.mean))
  }
  return values


def _warnings(meter: Meter, passed: Passed, split: str) -> Iterator[str]:
  """Lines about latents that say little."""
  if passed.codes is None and not channels(passed.latents).active.any():
    yield f"the posterior has collapsed: no latent tells images of {split} apart; in a new run, use a lower --kl_weight"
  if passed.codes is not None and codebook_use(passed.codes) < _FEW_CODES:
    yield (
      f"the codebook has collapsed: of its {len(passed.codes):,} vectors {np.count_nonzero(passed.codes):,} occur in "
      f"{split}; in a new run, use a smaller --codebook_size, fewer --latent_channels or a lower --learning_rate"
    )


def _yardsticks(
  meter: Meter,
  images: Source,
  features: Features | None,
  reference: Reference | None,
  *,
  similar: bool,
  around: Surroundings,
) -> dict[str, dict[str, float]]:
  """The measures of reconstructions of the data itself, of its mean image, and of images shrunk to the latents' size.

  They are kept in the cache under everything that they depend on, and so computed once. All processes must call it.
  """
  identity = features.identity if features else "", meter.lpips_identity if similar else ""
  of = [_VERSION, images.fingerprint, len(images), list(meter.latent_shape[:2]), *identity, similar]
  task = json.dumps(of, sort_keys=True)
  path = around.cache / f"yardsticks-{hashlib.sha256(task.encode()).hexdigest()[:16]}.safetensors"
  found = yardsticks.from_cache(path, task, around.say)
  if not any_host(found is None) and found is not None:
    return found
  around.say("measuring the mean image, and images shrunk to the size of the latents")
  mean = sum(batch.sum(0, dtype=np.float64) for _, batch in batches_of(images, np.arange(len(images)), meter.size))
  mean_image = np.round(mean / len(images)).astype(np.uint8)
  others: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean_image": lambda batch: np.broadcast_to(mean_image, batch.shape)
  }
  if meter.latent_shape[:2] != images.image_shape[:2]:
    others["resized"] = meter.resize
  found = {}
  if features is not None and reference is not None and len(reference.index) >= 2 * LEAST_IMAGES["frechet"]:
    halves = (
      yardsticks.part_of(reference, rows).moments for rows in yardsticks.halves(len(reference.index), len(images))
    )
    found["data"] = {NAMES[features.name]["reconstruction"]: _distance(*halves)}
  for kind, other in others.items():
    values, seen = [], None
    for first, batch in batches_of(images, np.arange(len(images)), meter.size):
      made = other(batch)
      values.append(meter.compare(batch, made))
      extracted = meter.see(made)
      seen = add(seen or no_moments(extracted.shape[1]), extracted)
      around.beat(f"yardstick {kind}, image {first + len(batch)}")
    found[kind] = {name: float(each.mean()) for name, each in _joined(values).items()} if similar else {}
    if features is not None and reference is not None and seen is not None:
      found[kind][NAMES[features.name]["reconstruction"]] = _distance(seen, reference.moments)
  if jax.process_index() == 0:
    try:
      save_arrays(path, {}, {"of": task, "found": found})
    except OSError as error:
      around.say(f"warning: cannot keep {path} ({error.strerror}); it will be computed again")
  return found


def _pictures(meter: Meter, images: Source, psnr_of_each: np.ndarray) -> dict[str, np.ndarray]:
  """Images above their reconstructions: some evenly spaced ones, and those that are reconstructed worst."""

  def picture(rows: np.ndarray) -> np.ndarray:
    originals = images.read(rows).images
    parts = [
      meter.reconstruct(originals[first : first + meter.size])["images"]
      for first in range(0, len(originals), meter.size)
    ]
    return grids.image_pairs(originals, np.concatenate(parts), _COLUMNS)

  worst = np.argsort(psnr_of_each, kind="stable")[:_WORST]
  return {"reconstructions": picture(evenly_spaced(len(images), _SHOWN)), "worst": picture(worst)}
