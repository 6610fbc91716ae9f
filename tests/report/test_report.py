"""The report is one page that needs nothing else, says the numbers that are in the files, and survives any file."""

import base64
import html.parser
import io
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from ddpm_jax.config import Config, override, to_flagfile, to_json, values, without_effect
from ddpm_jax.report import charts
from ddpm_jax.report.report import write_report
from ddpm_jax.workdir import grids

VOID = {"meta", "img"}  # elements without an end tag
NASTY = "folder:/tmp/<script>alert('1')</script>&\"x\""


class Page(html.parser.HTMLParser):
  """A page that was read again: its tags must be balanced, and its texts and attributes are kept."""

  def __init__(self, path):
    super().__init__(convert_charrefs=True)
    self.open, self.elements, self.texts, self.cells = [], [], [], []
    self.source = path.read_text(encoding="utf-8")
    self.feed(self.source)
    self.close()
    assert self.open == [], "unclosed"
    assert self.source.startswith("<!DOCTYPE html>\n<html")

  def handle_starttag(self, tag, attrs):
    assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice: {attrs}"
    self.elements.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)
    if tag in ("td", "th"):
      assert not {"td", "th"} & set(self.open[:-1]), "a cell in a cell, of which browsers make two"
      self.cells.append((dict(attrs).get("class"), ""))

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

  def handle_data(self, data):
    if "style" not in self.open:
      self.texts.append(data)
    if {"td", "th"} & set(self.open):
      self.cells[-1] = self.cells[-1][0], self.cells[-1][1] + data

  @property
  def text(self):
    return "\n".join(self.texts)

  def all(self, tag):
    return [attributes for name, attributes in self.elements if name == tag]

  @property
  def best(self):
    return [text.split()[0] for style, text in self.cells if style == "best"]

  def charts(self):
    return {svg["aria-label"].split(":")[0]: svg["aria-label"] for svg in self.all("svg")}


def picture(path, side=32, kind="PNG", noise=False):
  path.parent.mkdir(exist_ok=True)
  pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
  Image.fromarray(pixels if noise else np.full_like(pixels, 99)).save(path, format=kind)


def metrics(workdir, rows, more=""):
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + more)


def evaluate(workdir, step, **parts):
  (workdir / "eval").mkdir(exist_ok=True)
  (workdir / f"eval/{step}.json").write_text(json.dumps({"step": step, "weights": "ema", **parts}))


def samples(**measures):
  return {
    "samples": {"number": 1000, "sampler": "ddpm", "evaluations": 250, "seed": 0},
    "reference": {"dataset": "fashion_mnist", "split": "train", "number": 60000, "fingerprint": "f"},
    "features": {"name": "classifier", "identity": "i", "width": 64, "accuracy": 0.9},
    "measures": {**measures, "set_size": 900},
  }


def bound(total, **more):
  by_timestep = {"t_low": [1, 2, 4], "t_high": [1, 3, 10], "bits": [0.5, 0.4, 0.7], "eps_mse": [0.9, 0.1, 0.02]}
  terms = {"prior": 0.00001, "chain": 1.75, "decoder": 1.95, "rate": 1.75, "distortion": 1.95}
  return {"total": total, "standard_error": 0.0125, "examples": 1000, **terms, "by_timestep": by_timestep, **more}


@pytest.fixture
def workdir(tmp_path):
  path = tmp_path / "run"
  path.mkdir()
  config = override(Config(), {"dataset": "fashion_mnist", "batch_size": 50, "num_steps": 4000})
  (path / "config.json").write_text(to_json(config))
  (path / "flags.txt").write_text(to_flagfile(config))
  return path


@pytest.fixture
def full(workdir):
  """A workdir with everything that the page can show."""
  rows = [
    {
      "step": 25 * i,
      "loss": 2 / i,
      "grad_norm": 1 / i,
      "learning_rate": 1e-4,
      "steps_per_second": 5,
      "images_per_second": 250,
    }
    for i in range(1, 121)
  ]
  metrics(workdir, rows)
  for step in range(500, 3001, 500):
    picture(workdir / f"samples/step_{step:08d}.png")
  for name in ("samples", "progressive", "interpolate", "slerp", "inpaint", "reconstruct"):
    picture(workdir / f"samples/{name}.png")
  picture(workdir / "samples/progressive.gif", kind="GIF")
  values = {"classifier_kid_std": 0.0004, "classifier_score": 8.5, "precision": 0.75, "recall": 0.5}
  for step, distance in ((1000, 31.75), (2000, 12.25), (3000, 14.5)):
    evaluate(
      workdir,
      step,
      **samples(classifier_distance=distance, classifier_kid=0.0125, **values),
      bits_per_dim={"train": bound(3.7), "test": bound(3.9 - step / 1e4)},
      ode_bits_per_dim={"test": {"total": 3.55, "standard_error": 0.02, "examples": 100, "steps": 100}},
      neighbours={"pixels": {"near_duplicates": 0.0625, "median_distance": 3.25, "number": 1000}},
      pictures={"samples": f"eval/{step}.samples.png", "neighbours": f"eval/{step}.neighbours.png"},
      seconds=12.3,
      machine="2 x cpu",
      date="2026-11-23T07:00:00Z",
    )
    for name in ("samples", "neighbours"):
      picture(workdir / f"eval/{step}.{name}.png")
  return workdir


@pytest.fixture
def undrawn(monkeypatch):
  """Charts without their curves, which take most of the time of a page."""
  monkeypatch.setattr(charts, "_svg", lambda *_: Markup(""))
  monkeypatch.setattr(charts, "loss_png", lambda *_: b"")


def test_a_full_page(full):
  path = write_report(full)
  assert path == full / "report.html"
  page = Page(path)
  for said in ("3,000", "of 4,000 (75%)", "150,000", "10 min", "Classifier distance", "12.25", "step 2,000"):
    assert said in page.text, said
  for said in ("250 network evaluations", "60,000 images of fashion_mnist (train)", "1,000 samples", "ema weights"):
    assert said in page.text, said
  assert "not an FID; features: classifier" in page.text
  assert "0.0125" in page.text and "± 0.0004" in page.text  # the KID and its spread, which has no column of its own
  assert "kid std" not in page.text.lower() and "set size" not in page.text.lower()
  assert "compare 900 of each" in page.text
  assert {"3.700", "0.0000100", "1.750", "0.06250", "3.550"} <= {text.split(" ")[0] for _, text in page.cells if text}
  assert {"Loss", "Gradient norm", "Images per second", "Learning rate"} <= page.charts().keys()
  assert {"Classifier distance", "Precision", "Bits/dim of one timestep"} <= page.charts().keys()
  assert page.charts()["Classifier distance"].endswith("31.75 at 1,000, 14.5 at 3,000 training steps")
  assert "FID" not in {text.split()[0] for style, text in page.cells if text}
  assert write_report(full).read_text() == page.source  # from the same files, the same page


def test_a_page_of_an_autoencoder(workdir):
  config = {"stage": "autoencoder", "regularizer": "vq", "codebook_size": 512, "channel_multipliers": (1, 2, 4)}
  (workdir / "config.json").write_text(to_json(override(Config(), config)))
  terms = {"loss/reconstruction": 0.5, "loss/kl": 0.25, "mean/codes": 7.0}
  metrics(workdir, [{"step": i, "loss": 2 / i, **terms} for i in range(1, 5)])
  picture(workdir / "samples/step_00000004.png")
  channels = {"0": {"mean": 0.125, "std": 1.75}, "1": {"mean": -0.5, "std": 2.25}}
  for step, psnr in ((2, 21.5), (4, 24.25)):
    of_split = {
      "examples": 100,
      "psnr": psnr,
      "psnr_standard_error": 0.25,
      "ssim": 0.875,
      "classifier_reconstruction_distance": 1.5,
      "yardsticks": {
        "data": {"classifier_reconstruction_distance": 2.5},
        "mean_image": {"psnr": 11.5, "ssim": 0.25},
        "resized": {"psnr": 18.5, "ssim": 0.625},
      },
    }
    latents = {"examples": 100, "codebook_use": 0.75, "codebook_perplexity": 200.5, "channels": channels}
    shown = {"reconstructions": f"eval/{step}.reconstructions.png", "worst": f"eval/{step}.worst.png"}
    features = {"name": "classifier", "identity": "i", "width": 64}
    splits = {"reconstruction": {"train": of_split, "test": of_split}, "latents": {"test": latents}}
    evaluate(workdir, step, **splits, features=features, pictures=shown)
    for name in shown.values():
      picture(workdir / name)
  page = Page(write_report(workdir))
  for said in ("latents of 1/4 of the height and width with 4 channels, codebook of 512 vectors", "24.25", "200.5"):
    assert said in page.text, said
  for said in ("Reconstructions over the run", "Images, and below each its reconstruction", "reconstructed worst"):
    assert said in page.text, said
  for said in ("test, channel 0", "images shrunk to the latents' size", "reconstructions, test; features: classifier"):
    assert said in page.text, said
  assert "U-Net" not in page.text and "pure noise" not in page.text
  names = {text for _, text in page.cells}
  assert {"loss", "codebook_size"} <= names
  idle = {"num_timesteps", "beta_schedule", "prediction", "variance", "kl_weight", "discriminator_start", "sampler"}
  assert not idle & names
  assert {"PSNR", "SSIM", "Reconstruction", "KL", "Codes", "Codebook use"} <= page.charts().keys()
  assert {"24.25", "0.8750", "2.250"} <= {text.split(" ")[0] for _, text in page.cells if text}
  assert len(page.all("img")) == 1 + 2


STAGE = {
  "format": 1,
  "image_shape": [32, 48, 3],
  "network": {"regularizer": "kl", "codebook_size": 0, "latent_channels": 3, "channel_multipliers": [1, 2, 4]},
  "sha256": "70454eb832dbb4c0" * 4,
}
LATENT = {"first_stage": "/data/vq", "conditioning": "class", "num_classes": 9, "label_dropout": 0.1}


def test_a_page_of_a_latent_model_tells_its_first_stage(workdir):
  (workdir / "first_stage").mkdir()
  (workdir / "config.json").write_text(to_json(override(Config(), LATENT)))
  vq = STAGE["network"] | {"regularizer": "vq", "codebook_size": 2048}
  for network, kind in ((STAGE["network"], "KL autoencoder"), (vq, "VQ autoencoder with 2,048 vectors")):
    (workdir / "first_stage/settings.json").write_text(json.dumps(STAGE | {"network": network}))
    page = Page(write_report(workdir))
    cells = [text for _, text in page.cells]
    lead = "Latent diffusion model of digits (train), by class (9 classes, label dropout 0.1): latents of 8x12x3 of a "
    assert f"{lead}{kind}, U-Net with 32 channels (1 : 2), T = 1,000" in page.text
    assert "Denoising diffusion" not in page.text and "Notes" not in page.text
    shown = dict(zip(cells[::2], cells[1::2], strict=True))
    assert (shown["kind"], shown["latents"], shown["digest"]) == (kind, "8x12x3", "70454eb832db")
    assert f"{len(LATENT)} differ from the defaults" in page.text
    assert not {"regularizer", "latent_channels", "codebook_size", "kl_weight", "perceptual"} & shown.keys()
  config = override(Config(), {"stage": "classifier", "num_classes": 9, "first_stage": "/data/vq"})
  (workdir / "config.json").write_text(to_json(config))
  lead = "Classifier of noisy latents of images of digits (train): latents of 8x12x3 of a VQ autoencoder"
  assert lead in Page(write_report(workdir)).text


@pytest.mark.parametrize(
  "text",
  [
    *("", "[]", "7", "{}", '{"network": 7, "image_shape": [1, 2, 3], "sha256": "ab"}', "[" * 100_000),
    *(json.dumps(STAGE | change) for change in ({"image_shape": [4, 4]}, {"sha256": NASTY}, {"sha256": None})),
    json.dumps(STAGE | {"network": STAGE["network"] | {"regularizer": NASTY}}),
    json.dumps(STAGE | {"network": STAGE["network"] | {"regularizer": []}}),
    json.dumps(STAGE | {"network": STAGE["network"] | {"codebook_size": "7"}}),
  ],
)
def test_settings_of_a_first_stage_may_be_anything(workdir, text):
  (workdir / "config.json").write_text(to_json(override(Config(), LATENT)))
  page = Page(write_report(workdir))
  lead = "Latent diffusion model of digits (train), by class (9 classes, label dropout 0.1): U-Net with 32 channels"
  assert lead in page.text and "Notes" not in page.text
  (workdir / "first_stage").mkdir()
  (workdir / "first_stage/settings.json").write_text(text)
  page = Page(write_report(workdir))
  assert lead in page.text and "first_stage/settings.json is damaged." in page.text and NASTY not in page.text


def test_nothing_is_fetched_and_nothing_is_run(full):
  page = Page(write_report(full))
  for _, attributes in page.elements:
    for name, value in attributes.items():
      assert name not in ("href", "xlink:href", "srcset", "action", "data") and not name.startswith("on")
      if name == "src":
        assert re.fullmatch(r"data:image/(png|gif|jpeg);base64,[A-Za-z0-9+/]+=*", value)
  assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
  assert "//" not in re.sub(r'src="[^"]*"', "", page.source) and "url(" not in page.source
  assert "@import" not in page.source
  policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
  assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_both_schemes(full):
  source = Page(write_report(full)).source
  light, dark = re.findall(r":root \{([^}]*)\}", source)
  variables = [set(re.findall(r"(--[a-z0-9]+):", text)) for text in (light, dark)]
  assert variables[0] == variables[1] >= set(re.findall(r"var\((--[a-z0-9]+)\)", source))
  assert source.index("prefers-color-scheme: dark") < source.index(dark)
  assert not re.findall(r"<[^>]*(?:fill|stroke): (?!none|var)", source), "a colour that is the same in both"


def test_every_picture_has_a_text_and_can_be_read(full):
  page = Page(write_report(full))
  images = page.all("img")
  assert len(images) == 6 + 6 + 1 + 2  # grids, drawn, the animation, those of the newest evaluation
  for image in images:
    assert len(image["alt"]) > 5
    data = base64.b64decode(image["src"].partition(",")[2])
    with Image.open(io.BytesIO(data)) as opened:
      assert int(image["width"]) % opened.size[0] == 0 and int(image["height"]) % opened.size[1] == 0
  large = [image for image in images if image.get("class") == "pixel"]
  assert len(large) == 1 + 6 + 1 + 2
  assert images[0]["alt"] == "Sample grid, step 3,000" and images[0] in large


def test_only_a_config(workdir):
  (workdir / "flags.txt").unlink()
  page = Page(write_report(workdir))
  assert "fashion_mnist" in page.text
  assert not page.all("img") and not page.all("svg") and "Notes" not in page.text
  assert "Measures" not in page.text and "Training" not in page.text and "repeat" not in page.text


def test_nothing_at_all(tmp_path):
  assert "There is no config.json." in Page(write_report(tmp_path)).text


def test_settings(workdir):
  page = Page(write_report(workdir))
  changed = [index for index, row in enumerate(page.all("tr")) if row.get("class") == "changed"]
  assert len(changed) == 3 and "3 differ from the defaults" in page.text
  cells = [text for _, text in page.cells]
  assert "4000default: 2000" in cells and "50default: 64" in cells and "fashion_mnistdefault: digits" in cells
  assert len(page.all("tr")) == len(cells) // 2 == len(values(Config())) - len(without_effect(Config()))
  assert "python -m ddpm_jax.main --flagfile=flags.txt --workdir=NEW" in page.text
  assert (workdir / "flags.txt").read_text() in page.text
  (workdir / "config.json").write_text(json.dumps({"data": {"colour": 1}}))
  assert "The settings cannot be read: config.json has data.colour" in Page(write_report(workdir)).text


def test_text_of_users_is_escaped(workdir):
  (workdir / "config.json").write_text(to_json(override(Config(), {"dataset": NASTY})))
  (workdir / "flags.txt").write_text(f"--dataset={NASTY}\n")
  parts = samples(**{NASTY: 1.5, "precision": 0.5})
  parts["features"]["name"] = parts["reference"]["dataset"] = parts["samples"]["sampler"] = NASTY
  evaluate(
    workdir,
    7,
    **parts,
    machine=NASTY,
    version=NASTY,
    date=NASTY,
    bits_per_dim={NASTY: bound(3.5, **{NASTY: 2.5})},
    neighbours={NASTY: {NASTY: 1.0}},
    pictures={NASTY: "eval/7.png", "x": NASTY},
  )
  picture(workdir / "eval/7.png")
  page = Page(write_report(workdir))
  assert not page.all("script") and "<script" not in page.source
  assert page.text.count(NASTY) >= 10
  assert any(NASTY in image["alt"] for image in page.all("img"))


def test_the_last_line_may_be_cut_short(workdir):
  rows = [{"step": step, "loss": 0.5} for step in range(1, 11)]
  metrics(workdir, rows)
  whole = Page(write_report(workdir))
  for cut in ('{"step": 11, "lo', '{"step": 11, "loss": 9999}'):
    metrics(workdir, rows, more=cut)
    assert Page(write_report(workdir)).source == whole.source
  metrics(workdir, rows, more='{"step": 11, "lo\n[1]\n')
  assert "damaged lines, which are left out: 2." in Page(write_report(workdir)).text


def test_values_that_no_chart_can_show(workdir):
  odd = [None, math.nan, math.inf, -math.inf, "0.5", True, [1], 10**400, 1e300, 5e-324]
  rows = [{"step": i, "loss": value} for i, value in enumerate(odd)]
  metrics(
    workdir, [{"step": 90, "loss": 0.25}, *rows, {"loss": 3.0}, {"step": None, "loss": 3.0}, {"step": 95, "loss": 1}]
  )
  page = Page(write_report(workdir))
  assert "0.25 at 90, 1 at 95 training steps" in page.charts()["Loss"]
  assert not re.search(r"\b(nan|inf)\b", " ".join(path["d"] for path in page.all("path")))


@pytest.mark.parametrize("value", [0.0, -2.5, 1e-90, 1e90, 3.0])
@pytest.mark.parametrize("rows", [1, 2, 50])
def test_constant_curves(workdir, value, rows):
  metrics(workdir, [{"step": i + 1, "loss": value, "learning_rate": value} for i in range(rows)])
  page = Page(write_report(workdir))
  assert "Loss" in page.charts() and "nan" not in page.source


def test_what_went_wrong_is_said(workdir):
  metrics(workdir, [{"step": 1, "loss": None, "nonfinite": 3, "bad_records": 2}, {"step": 2, "loss": 1.0}])
  text = Page(write_report(workdir)).text
  assert "Training steps skipped as not finite: 3." in text and "Bad records: 2." in text
  evaluate(workdir, 1, warnings=["an older one"])
  evaluate(workdir, 2, warnings=["the schedule does not reach noise"])
  text = Page(write_report(workdir)).text
  assert "The schedule does not reach noise." in text and "older" not in text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
  "text",
  ["", "{", "[1]", "null", '{"weights": "ema"}', '{"step": "7"}', '{"step": -1}', "[" * 100000, "\x00", "1" * 9999],
)
def test_a_damaged_evaluation_is_left_out(full, text):
  whole = Page(write_report(full))
  (full / "eval/7.json").write_text(text)
  (full / "eval/other.json").write_text(text)  # not an evaluation
  page = Page(write_report(full))
  assert "eval/7.json is damaged, and left out." in page.text and "other.json" not in page.text
  assert page.best == whole.best and page.charts() == whole.charts()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("other", [None, 1, "text", [], {}, [[]], {"x": None}, {"x": {"y": []}}, True])
def test_an_evaluation_may_hold_anything(full, other):
  whole = json.loads((full / "eval/3000.json").read_text())
  paths = [[key] for key in whole if key != "step"]
  paths += [[a, b] for a in whole if isinstance(whole[a], dict) for b in whole[a]]
  paths += [["bits_per_dim", "test", key] for key in whole["bits_per_dim"]["test"]]
  paths += [["bits_per_dim", "test", "by_timestep", key] for key in ("t_low", "t_high", "bits", "eps_mse")]
  for path in paths:
    tree = json.loads(json.dumps(whole))
    parent = tree
    for key in path[:-1]:
      parent = parent[key]
    parent[path[-1]] = other
    (full / "eval/3000.json").write_text(json.dumps(tree))
    Page(write_report(full))
    if other is None:
      del parent[path[-1]]
      (full / "eval/3000.json").write_text(json.dumps(tree))
      Page(write_report(full))


def test_text_that_is_no_utf8(workdir):
  evaluate(workdir, 7, machine="\ud800", measures={"fid": 2.5})
  (workdir / "flags.txt").write_bytes(b"--dataset=\xff\n")
  (workdir / "metrics.jsonl").write_bytes(b'\xff\n{"step": 1, "loss": 2.5}\n')
  assert "FID" in Page(write_report(workdir)).text


def test_the_best_of_each_column(workdir):
  low, high = ("fid", "classifier_distance", "kid"), ("inception_score", "precision", "recall", "density", "coverage")
  for step, value in ((10, 5.0), (20, 1.0), (30, 9.0)):
    evaluate(
      workdir,
      step,
      **samples(**dict.fromkeys((*low, *high), value), other=value),
      bits_per_dim={"test": bound(value)},
    )
  page = Page(write_report(workdir))
  assert page.best == ["1.000"] * 4 + ["9.000"] * 5  # row by row
  heads = [text for _, text in page.cells if "features:" in text or "bound, test" in text]
  assert ["↓" in head for head in heads] == [True] * 3 + [False] * 6 + [True]
  assert ["↑" in head for head in heads] == [False] * 3 + [True] * 5 + [False] * 2
  assert heads[0].startswith("FID") and "not an FID" not in heads[0] and "not an FID" in heads[1]
  assert len([key for key in page.charts() if key in ("FID", "Precision", "Recall", "Other", "Bits/dim")]) == 5


def test_one_checkpoint_is_not_the_best(workdir):
  evaluate(workdir, 10, **samples(fid=5.0))
  page = Page(write_report(workdir))
  assert page.best == [] and "FID" not in page.charts() and "5.000" in page.text


def test_only_what_was_measured_alike_is_compared(workdir):
  for step, fid in ((10, 5.0), (20, 6.0), (30, 1.0)):
    evaluate(workdir, step, **samples(fid=fid), bits_per_dim={"test": bound(fid)})
  assert Page(write_report(workdir)).best == ["1.000", "1.000"]
  for change in (("samples", "number", 50), ("reference", "fingerprint", "g"), ("features", "identity", "j")):
    parts = samples(fid=1.0)
    parts[change[0]][change[1]] = change[2]
    evaluate(workdir, 15, **parts)
    evaluate(workdir, 30, **samples(fid=5.5), bits_per_dim={"test": bound(1.0, examples=7)})
    page = Page(write_report(workdir))
    assert page.best == ["5.000", "5.000"], change
    assert "measured in another way" in page.text
    assert page.charts()["FID"].endswith("5 at 10, 5.5 at 30 training steps")
  other = samples(fid=1.0)
  other["samples"]["seed"] = 5  # another seed is another draw of the same thing
  evaluate(workdir, 15, **other)
  assert Page(write_report(workdir)).best == ["5.000", "1.000"]


def test_the_arithmetic_is_part_of_how_a_measure_was_taken(workdir):
  """Results of release 0.1 name none: float32 at the default precision, which on CPUs is the highest."""
  ours, old = {"dtype": "float32", "matmul_precision": "highest"}, bound(1.0)
  usual = samples(fid=1.0)
  usual["samples"] |= {"dtype": "float32", "matmul_precision": "default"}
  other = samples(fid=1.0)
  other["samples"] |= {"dtype": "bfloat16", "matmul_precision": "default"}
  for parts, machine, best in (
    (usual, "1 x cpu", ["1.000", "1.000"]),
    (usual, "8 x TPU v3", ["1.000"]),
    (other, "8 x TPU v3", []),
  ):
    evaluate(workdir, 10, **samples(fid=2.0), bits_per_dim={"test": bound(2.0)}, machine=machine)
    evaluate(workdir, 20, **parts, bits_per_dim={"test": old | ours}, machine=machine)
    page = Page(write_report(workdir))
    assert page.best == best, (parts["samples"], machine)
  assert "dtype bfloat16, matmul precision default" in page.text
  assert "Computed in float32 with products of highest precision." in page.text


def test_precision_and_recall_are_not_those_of_the_paper(workdir):
  evaluate(workdir, 10, **samples(fid=2.0))
  assert "VGG-16" not in Page(write_report(workdir)).text
  evaluate(workdir, 10, **samples(precision=0.5, recall=0.25))
  text = Page(write_report(workdir)).text
  assert "compare 900 of each" in text and "50,000 of each in features of VGG-16: not to be compared" in text


def beside(**values):
  """Yardsticks: measure -> (of the data itself, of noise, of an untrained network)."""
  kinds = ("data", "noise", "untrained")
  return {
    kind: {"number": 900, "values": {name: three[i] for name, three in values.items()}} for i, kind in enumerate(kinds)
  }


def test_a_measure_is_never_told_without_its_yardsticks(workdir):
  values = dict(classifier_distance=0.74, precision=0.625)
  evaluate(
    workdir,
    10,
    **samples(**values),
    yardsticks=beside(classifier_distance=(0.0231, 8.914, 12.14), precision=(0.9, 0.86, 0.4)),
    bits_per_dim={"test": bound(3.5, yardsticks={"noise": 8.0, "untrained": 7.25})},
  )
  page = Page(write_report(workdir))
  assert (
    "Classifier distance 0.74: the data against itself has 0.0231, pure noise 8.91, an untrained network 12.1; lower "
    "is better. Precision 0.625: the data against itself has 0.9, pure noise 0.86, an untrained network 0.4; higher is "
    "better. Noise does better than that: here this measure says nothing."
  ) in page.text
  rows = [text.strip() for _, text in page.cells]
  for head, numbers in (
    ("the data itself", ["0.0231", "0.9", ""]),
    ("pure noise", ["8.91", "0.86", "8"]),
    ("untrained network", ["12.1", "0.4", "7.25"]),
  ):
    assert rows[rows.index(head) + 1 :][:3] == numbers
  assert "; the data itself 0.0231; pure noise 8.91" in page.text, "on the tile too"
  told = "was measured by a release that did not write what the data itself, noise and an untrained network have"
  assert told not in page.text
  evaluate(workdir, 10, **samples(**values))
  assert told in Page(write_report(workdir)).text


def test_measures_in_other_features_have_their_own_column(workdir):
  parts = samples(precision=0.25)
  evaluate(workdir, 10, **parts)
  evaluate(workdir, 20, **{**parts, "features": {"name": "inception"}})
  page = Page(write_report(workdir))
  assert "features: classifier" in page.text and "features: inception" in page.text
  assert page.best == [] and [text for _, text in page.cells].count("0.2500") == 2


def test_by_timestep(full):
  chart = Page(write_report(full)).charts()["Bits/dim of one timestep"]
  assert chart.endswith("0.5 at 1, 0.7 at 6.325 timestep t")
  chart = Page(write_report(full)).charts()["Squared error of the noise"]
  assert chart.endswith("0.9 at 1, 0.02 at 6.325 timestep t")


def test_at_most_eight_grids_spread_over_the_run(workdir):
  for step in range(100, 10001, 100):
    picture(workdir / f"samples/step_{step:08d}.png")
  steps = [int(image["alt"].split()[-1].replace(",", "")) for image in Page(write_report(workdir)).all("img")]
  assert len(steps) == 8 and steps[0] == 10000 and steps[-1] == 100
  assert max(np.diff(steps)) <= -1400 and min(np.diff(steps)) >= -1500  # back from the newest


def test_a_wide_picture_can_be_panned_on_a_narrow_screen(workdir):
  for step, side in ((1, 639), (2, 640)):
    picture(workdir / f"samples/step_{step:08d}.png", side=side)
  picture(workdir / "samples/samples.png", side=640)
  page = Page(write_report(workdir))
  widths = re.findall(r'<div class="pan"><img [^>]*width="(\d+)"', page.source)
  assert widths == ["640", "640"] and len(page.all("img")) == 3
  narrow = page.source.partition("@media (max-width: 640px)")[2].partition("@media")[0]
  assert ".pan { overflow-x: auto; }" in narrow


@pytest.mark.parametrize(("drawn", "first"), [(99, "Step 100"), (100, "Samples, as"), (101, "Samples, as")])
def test_the_newest_samples_come_first(workdir, drawn, first):
  black = np.zeros((8, 8, 3), np.uint8)
  (workdir / "samples").mkdir()
  grids.save_png(workdir / "samples/step_00000100.png", black, {"checkpoint": 100})
  grids.save_png(workdir / "samples/samples.png", black, {"checkpoint": drawn})
  found = captions(write_report(workdir))
  assert len(found) == 2 and found[0].startswith(first)


def captions(path):
  """The text above each picture."""
  return re.findall(r"<figcaption>(.*?)</figcaption>", path.read_text(encoding="utf-8"))


def test_a_picture_of_another_update_says_so(workdir):
  """Drawn and measured at 139, trained to 601."""
  black = np.zeros((8, 8, 3), np.uint8)
  (workdir / "samples").mkdir()
  grids.save_png(
    workdir / "samples/samples.png", black, {"checkpoint": 139, "sample_weights": "ema", "sampler": "ddpm"}
  )
  grids.save_png(workdir / "samples/inpaint.png", black, {"checkpoint": 601, "sample_weights": "raw"})
  grids.save_png(workdir / "samples/slerp.png", black, {"checkpoint": "139"})
  for step in (100, 139):
    grids.save_png(workdir / f"samples/step_{step:08d}.png", black, {"checkpoint": step})
  grids.save_png((workdir / "eval.png"), black, {})
  evaluate(workdir, 139, pictures={"samples": "eval.png"})
  now = [text for text in captions(write_report(workdir)) if "older" in text]
  assert now == [], "there is no newer checkpoint"
  for name in ("139", "601", "601.orbax-checkpoint-tmp", "note"):
    (workdir / "checkpoints" / name).mkdir(parents=True)
  older = "; older than the newest checkpoint, 601"
  assert captions(write_report(workdir)) == [
    f"Samples, as --mode=sample drew them last: step 139, ema weights, ddpm{older}",
    "Interpolation between pairs of noises: unknown step",
    "Inpainting: step 601, raw weights",
    f"Step 139{older}",
    "Step 100",
    f"Samples that were measured, step 139{older}",
  ]


def test_an_evaluation_embeds_few_pictures(workdir):
  for i in range(30):
    picture(workdir / f"eval/{i}.png")
  evaluate(workdir, 7, pictures={str(i): f"eval/{i}.png" for i in range(30)})
  assert len(Page(write_report(workdir)).all("img")) == 8


@pytest.mark.parametrize("path", ["../outside.png", "eval/link.png", "eval/text.png", "eval", "eval/cut.png", "a\x00b"])
def test_pictures_that_are_none_of_the_run(workdir, path):
  picture(workdir.parent / "outside.png")
  (workdir / "eval").mkdir()
  (workdir / "eval/link.png").symlink_to(workdir.parent / "outside.png")
  (workdir / "eval/text.png").write_text("text")
  picture(workdir / "eval/cut.png", side=700, noise=True)
  (workdir / "eval/cut.png").write_bytes((workdir / "eval/cut.png").read_bytes()[: 5 << 18])
  evaluate(workdir, 7, pictures={"samples": path, "missing": "eval/missing.png"}, measures={"fid": 2.5})
  page = Page(write_report(workdir))
  assert not page.all("img") and "left out, as it" in page.text and "missing" not in page.text
  assert "FID" in page.text


def test_a_page_stays_small(workdir):
  rng = np.random.default_rng(0)
  names = ("loss", "grad_norm", "learning_rate", "images_per_second", "steps_per_second")
  metrics(workdir, [{"step": i, **{name: rng.random() for name in names}} for i in range(1, 20001)])
  small = write_report(workdir).stat().st_size
  assert small < 200_000
  picture(workdir / "samples/step_00000000.png", side=1200, noise=True)
  assert (workdir / "samples/step_00000000.png").stat().st_size > 4_000_000
  for step in range(1, 8):
    shutil.copy(workdir / "samples/step_00000000.png", workdir / f"samples/step_{step:08d}.png")
  page = Page(write_report(workdir))
  assert len(page.all("img")) == 8 and len(page.source) < 8_000_000
  picture(workdir / "samples/progressive.gif", kind="GIF")
  with (workdir / "samples/progressive.gif").open("ab") as file:
    file.write(bytes(5 << 20))
  page = Page(write_report(workdir))
  assert len(page.all("img")) == 8 and "too much for a page" in page.text


def test_a_full_disk_leaves_the_earlier_page(full, monkeypatch):
  earlier = write_report(full).read_bytes()
  (full / "flags.txt").unlink()

  def fsync(file):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", fsync)
  with pytest.raises(OSError, match="No space"):
    write_report(full)
  assert (full / "report.html").read_bytes() == earlier


def test_a_logarithmic_chart_leaves_out_what_it_cannot_show(workdir):
  terms = bound(3.5)
  terms["by_timestep"] |= {"bits": [0.0, -0.5, 0.25], "eps_mse": [0, 0, 0]}
  evaluate(workdir, 7, bits_per_dim={"test": terms})
  charts = Page(write_report(workdir)).charts()
  assert charts["Bits/dim of one timestep"].endswith("0.25 at 6.325, 0.25 at 6.325 timestep t")
  assert "Squared error of the noise" not in charts
