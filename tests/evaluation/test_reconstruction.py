"""The evaluation of an autoencoder, of one that NumPy can follow: means of squares of pixels, and back."""

import dataclasses
import json
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.devices import make_mesh
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import evaluate as evaluate_lib
from ddpm_jax.evaluation import reconstruction, results, summary
from ddpm_jax.evaluation.evaluate import check, evaluate
from ddpm_jax.evaluation.features import Extracted, Features
from ddpm_jax.evaluation.measures import frechet_distance
from ddpm_jax.evaluation.similarity import ssim
from ddpm_jax.evaluation.surroundings import Surroundings
from ddpm_jax.weights.load import Weights
from tests.training.tiny import tiny_config, tiny_run

SHAPE = (12, 16, 1)
NUMBER = {"train": 37, "test": 23}
PROJECT = np.random.default_rng(1).normal(size=(12 * 16, 3)) / 255
LOG_VARIANCE, SCALE = -3.0, 2.0


@dataclasses.dataclass(frozen=True)
class Squares:
  """Means over squares of `side` pixels, times SCALE. Its codebook has the latents of black, grey and white."""

  regularizer: str
  side: int = 2

  def latent_shape(self, image_shape):
    return (image_shape[0] // self.side, image_shape[1] // self.side, image_shape[2])

  def moments(self, params, x):
    batch, (height, width, channels) = len(x), self.latent_shape(x.shape[1:])
    mean = params["scale"] * x.reshape(batch, height, self.side, width, self.side, channels).mean((2, 4))
    return mean if self.regularizer == "vq" else jnp.concatenate([mean, jnp.full_like(mean, LOG_VARIANCE)], -1)

  def quantize(self, params, z):
    codes = jnp.argmin(jnp.abs(z - params["codebook"][None, None, None]), -1).astype(jnp.int32)
    return params["codebook"][codes][..., None], codes

  def decode(self, params, z):
    return jnp.repeat(jnp.repeat(z / params["scale"], self.side, 1), self.side, 2)


CODES = np.asarray([0, 128, 255, 90])  # in pixels; the last one is far from what any image has
PARAMS = {"scale": np.float32(SCALE), "codebook": (SCALE * (CODES / 127.5 - 1)).astype(np.float32)}


def images_of(split):
  """Multiples of 4, so that means of four are whole numbers."""
  rng = np.random.default_rng(len(split))
  images = 4 * rng.integers(25, 60, (NUMBER[split], *SHAPE))
  images[:, :6] = 4 * rng.integers(0, 10, (NUMBER[split], 1, 1, 1))
  return images.astype(np.uint8)


def source_of(split="train"):
  read = DecodedRows(images_of(split), np.zeros(NUMBER[split], bool)).take
  return Source("squares", SHAPE, NUMBER[split], read, {"split": split}, lambda: np.zeros(NUMBER[split], np.int32))


def features_of(*_):
  def extract(images):
    return Extracted((images.reshape(len(images), -1) @ PROJECT).astype(np.float32), np.zeros((len(images), 0)))

  return Features("classifier", "sums", {"classes": 1}, extract)


@pytest.fixture(autouse=True)
def parts(monkeypatch):
  monkeypatch.setattr(evaluate_lib, "_features", features_of)
  monkeypatch.setattr(evaluate_lib, "open_source", lambda data: source_of(data.split))
  monkeypatch.setattr(evaluate_lib, "has_split", lambda data, split: split == "test")


def config_of(**changes):
  defaults = dict(stage="autoencoder", evaluate_batch_size=9, likelihood_examples=30, dropout=0.0)
  return tiny_config(**(defaults | changes))


def measured(monkeypatch, folder, network, *, params=PARAMS, mesh=None, **changes):
  monkeypatch.setattr(reconstruction, "build_autoencoder", lambda *_: network)
  run = tiny_run(tiny_config())
  run = run._replace(first_stage=dataclasses.replace(run.first_stage, image_shape=SHAPE), mesh=mesh or run.mesh)
  placed = jax.device_put({"autoencoder": params}, run.mesh.replicated)
  config = config_of(**changes)
  around = Surroundings(folder, lambda what: None, quiet=True)
  return evaluate(config, Weights(run, placed, 5, "ema", "identity"), source_of(), around)


def evenly(split, number=30):
  images = images_of(split)
  return images if len(images) <= number else images[np.arange(number) * len(images) // number]


def reconstructed(images, regularizer="kl"):
  means = images.reshape(len(images), 6, 2, 8, 2, 1).astype(int).mean((2, 4))
  if regularizer == "vq":
    means = CODES[np.abs(means - CODES).argmin(-1)][..., None]
  return means.repeat(2, 1).repeat(2, 2).astype(np.uint8), means


def resized(images):
  """By Pillow."""
  small = [
    Image.fromarray(image[..., 0].astype(np.float32)).resize((8, 6), Image.Resampling.BICUBIC) for image in images
  ]
  whole = [np.asarray(image.resize((16, 12), Image.Resampling.BICUBIC)) for image in small]
  return np.clip(np.round(np.stack(whole)), 0, 255)[..., None]


def psnr_by_hand(images, others):
  return -10 * np.log10(((images / 255 - others / 255) ** 2).mean((1, 2, 3)))


def distance_by_hand(images, others):
  moments = []
  for one in (images, others):
    features = features_of().extract(one).features.astype(np.float64)
    moments += [features.mean(0), np.cov(features, rowvar=False)]
  return frechet_distance(*moments)


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_every_number_is_that_of_numpy(monkeypatch, tmp_path, regularizer):
  found, pictures = measured(
    monkeypatch,
    tmp_path,
    Squares(regularizer),
    regularizer=regularizer,
    **({} if regularizer == "kl" else {"codebook_size": 4}),
  )
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  assert list(found["reconstruction"]) == list(found["latents"]) == ["train", "test"]
  for split in NUMBER:
    images = evenly(split)
    others, means = reconstructed(images, regularizer)
    facts = found["reconstruction"][split]
    each = psnr_by_hand(images, others)
    assert facts["examples"] == len(images) == {"train": 30, "test": 23}[split]
    assert facts["psnr"] == pytest.approx(each.mean(), rel=1e-6)
    assert facts["psnr_standard_error"] == pytest.approx(each.std(ddof=1) / np.sqrt(len(each)), rel=1e-5)
    assert facts["ssim"] == pytest.approx(float(jax.vmap(ssim)(images, others).mean()), abs=1e-6)
    assert facts["classifier_reconstruction_distance"] == pytest.approx(distance_by_hand(images, others), rel=1e-4)
    assert "lpips" not in facts
    mean = np.broadcast_to(np.round(images.mean(0)).astype(np.uint8), images.shape)
    beside = facts["yardsticks"]
    assert set(beside) == {"data", "mean_image", "resized"} and set(beside["data"]) == {
      "classifier_reconstruction_distance"
    }
    assert beside["mean_image"]["psnr"] == pytest.approx(psnr_by_hand(images, mean).mean(), rel=1e-6)
    wanted = distance_by_hand(images, mean)
    assert beside["mean_image"]["classifier_reconstruction_distance"] == pytest.approx(wanted, rel=1e-4)
    assert beside["resized"]["psnr"] == pytest.approx(psnr_by_hand(images, resized(images)).mean(), abs=1e-3)
    latents = found["latents"][split]
    z = SCALE * (images.reshape(len(images), 6, 2, 8, 2, 1).astype(int).mean((2, 4)) / 127.5 - 1)
    (channel,) = latents["channels"].values()
    assert latents["shape"] == [6, 8, 1] and channel["mean"] == pytest.approx(z.mean(), rel=1e-5)
    if regularizer == "kl":
      kl = (z**2 + np.exp(LOG_VARIANCE) - 1 - LOG_VARIANCE).sum((1, 2, 3)).mean() / 2
      assert latents["kl"] == pytest.approx(kl, rel=1e-5) == channel["kl"]
      assert channel["std"] == pytest.approx(np.sqrt(z.var() + np.exp(LOG_VARIANCE)), rel=1e-5)
      assert latents["active_units"] == pytest.approx((z.var(0) > 0.01).mean())
    else:
      shares = np.asarray([(means == code).mean() for code in CODES])
      assert shares[3] == 0 and latents["codebook_use"] == 0.75
      known = shares[shares > 0]
      assert latents["codebook_perplexity"] == pytest.approx(np.exp(-(known * np.log(known)).sum()), rel=1e-9)
      assert channel == {"mean": channel["mean"], "std": pytest.approx(z.std(), rel=1e-5)}, "of what is quantised"
  assert set(pictures) == {"reconstructions", "worst"} and found["warnings"] == []


@pytest.mark.parametrize("changes", [dict(evaluate_batch_size=37), "one device"])
def test_neither_batches_nor_devices_matter(monkeypatch, tmp_path, changes):
  mesh = make_mesh("pmap", jax.devices()[:1]) if changes == "one device" else None
  first, _ = measured(monkeypatch, tmp_path / "a", Squares("kl"))
  other, _ = measured(
    monkeypatch, tmp_path / "b", Squares("kl"), mesh=mesh, **(changes if isinstance(changes, dict) else {})
  )
  kept, again = (flat({key: found[key] for key in ("reconstruction", "latents")}) for found in (first, other))
  assert again == pytest.approx(kept, rel=1e-6) and len(kept) > 30


def flat(tree, name=""):
  if isinstance(tree, dict | list):
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {key: value for part, inner in pairs for key, value in flat(inner, f"{name}/{part}").items()}
  return {name: tree}


def test_what_comes_back_unchanged_is_perfect(monkeypatch, tmp_path):
  found, _ = measured(monkeypatch, tmp_path, Squares("kl", side=1), likelihood_splits="test")
  facts = found["reconstruction"]["test"]
  assert facts["ssim"] == pytest.approx(1) and facts["classifier_reconstruction_distance"] == pytest.approx(0, abs=1e-9)
  assert facts["psnr"] == pytest.approx(10 * np.log10(255**2 * 12 * 16), rel=1e-6)
  assert set(facts["yardsticks"]) == {"data", "mean_image"}, "latents of the size of the images are not shrunk"


def test_latents_that_say_nothing_are_warned_of(monkeypatch, tmp_path):
  one_code = PARAMS | {"codebook": np.full(100, 0, np.float32)}
  changes = dict(regularizer="vq", codebook_size=100, measures=("latents",))
  found, pictures = measured(monkeypatch, tmp_path, Squares("vq"), params=one_code, **changes)
  assert found["latents"]["test"]["codebook_perplexity"] == 1 and not pictures and "reconstruction" not in found
  wanted = "the codebook has collapsed: of its 100 vectors 1 occur in "
  assert [text.startswith(wanted) for text in found["warnings"]] == [True, True]
  found, _ = measured(
    monkeypatch, tmp_path, Squares("kl"), params=PARAMS | {"scale": np.float32(1e-4)}, measures=("latents",)
  )
  assert [text.startswith("the posterior has collapsed: ") for text in found["warnings"]] == [True, True]


def test_all_images_are_measured_where_they_fit_and_as_many_the_next_time(monkeypatch, tmp_path):
  found, _ = measured(monkeypatch, tmp_path, Squares("kl"), likelihood_examples=0)
  counts = {split: facts["examples"] for split, facts in found["reconstruction"].items()}
  assert counts == NUMBER and found["chosen"] == ["likelihood_examples"]
  monkeypatch.setattr(reconstruction.estimate, "NUMBERS", (10,))
  few, _ = measured(monkeypatch, tmp_path / "few", Squares("kl"), likelihood_examples=0)
  assert {facts["examples"] for facts in few["reconstruction"].values()} == {10}
  results.write_result(tmp_path, found, {})
  again, _ = measured(monkeypatch, tmp_path, Squares("kl"), likelihood_examples=0)
  assert {split: facts["examples"] for split, facts in again["reconstruction"].items()} == NUMBER


def test_the_result_in_words_and_columns(monkeypatch, tmp_path):
  found, pictures = measured(monkeypatch, tmp_path, Squares("kl"))
  results.write_result(tmp_path, found, pictures)
  found = results.read_result(tmp_path / "eval" / "5.json")
  assert found and set(found["pictures"]) == {"reconstructions", "worst"}
  numbers = results.scalars(found)
  names = ("psnr", "ssim", "classifier_reconstruction_distance", "kl", "active_units")
  assert set(numbers) == {f"evaluation/{name}_{split}" for name in names for split in NUMBER}
  assert results.measure_of(found, "frechet") == numbers["evaluation/classifier_reconstruction_distance_test"]
  columns = {column.name: column for column in summary.columns({5: found})}
  assert set(columns) == {name.removeprefix("evaluation/") for name in numbers}
  assert (columns["psnr_test"].title, columns["psnr_test"].remark) == ("PSNR", "reconstructions, test")
  better = {name: columns[f"{name}_train"].better for name in names}
  assert better == dict(zip(names, ("higher", "higher", "lower", "", ""), strict=True))
  beside = summary.yardsticks(found)["psnr_train"]
  assert list(beside) == ["mean_image", "resized"]
  text = summary.in_words("PSNR", "psnr_train", 12.0, {"mean_image": 13.5})
  assert text.endswith(" The mean image does better: here reconstructions say nothing of their images.")
  for psnr, said in ((17.3, True), (24.1, False)):
    text = summary.in_words("PSNR", "psnr_train", psnr, {"mean_image": 13.5, "resized": 24.0})
    assert text.endswith("or with more --channels, before you diffuse the latents.") == said, psnr
  conditions = json.loads(columns["psnr_test"].conditions)
  assert conditions == {"weights": "ema", "reconstruction": {"examples": 23}}


def test_another_evaluation_renews_what_belongs_together(monkeypatch, tmp_path):
  """Distances of two kinds of features do not stand side by side; latents that were measured before stay."""
  found, pictures = measured(monkeypatch, tmp_path, Squares("kl"))
  results.write_result(tmp_path, found, pictures)
  changes = dict(measures=("reconstruction",), likelihood_splits="test")
  results.write_result(tmp_path, *measured(monkeypatch, tmp_path, Squares("kl"), **changes))
  both = results.read_result(tmp_path / "eval" / "5.json")
  assert both and list(both["reconstruction"]) == ["test"] and "features" not in both
  assert both["latents"] == found["latents"]
  results.write_result(tmp_path, *measured(monkeypatch, tmp_path, Squares("kl"), measures=("latents",)))
  again = results.read_result(tmp_path / "eval" / "5.json")
  assert again and again["reconstruction"] == both["reconstruction"] and again["pictures"] == both["pictures"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(measures=("kid",)), "measures: kid has no effect with stage=autoencoder; name some of reconstruction, "),
    (dict(measures=("latents",), evaluate_every=5), "best_measure: frechet is none of --measures=latents; add it"),
    (dict(evaluate_samples=9), "evaluate_samples: 9 has no effect with stage=autoencoder; leave it out"),
    (dict(stage="denoiser", measures=("latents",)), "measures: latents has no effect with stage=denoiser; it is of "),
    (dict(lpips_weights="/nowhere"), "lpips_weights: "),
    (dict(likelihood_splits="tset"), "split: 'tset'"),
  ],
)
def test_what_is_refused(tmp_path, monkeypatch, changes, message):
  def open_split(data):
    if data.split not in NUMBER:
      raise UserError(f"split: {data.split!r}")
    return source_of(data.split)

  monkeypatch.setattr(evaluate_lib, "open_source", open_split)
  with pytest.raises(UserError) as caught:
    check(config_of(**changes), tmp_path, source_of(), cast(Weights, None))
  assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
  assert not list(tmp_path.iterdir())
