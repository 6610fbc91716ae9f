"""The look at a data set before training. The oracle of the picture is what the training step is given."""

import io
import itertools
import re
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import command
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config, DataConfig
from ddpm_jax.data import pipeline, prepare, sources, summary
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.first_stage.pixels import Pixels
from ddpm_jax.training.objective import DenoiserObjective
from ddpm_jax.training.step import example_keys
from ddpm_jax.workdir import grids
from tests.data import mixed  # noqa: F401  TFDS knows the data set once this is imported
from tests.data.packing import classes, encoded, pictures, write, write_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
  """Runs `ddpm inspect` with these words. Returns the exit code, and what it printed: (code, stdout, stderr)."""

  def call(*words, preset=("--preset=none",), output=tmp_path / "look.png"):
    monkeypatch.setattr(sys, "argv", ["ddpm", "inspect", *preset, *map(str, words), f"--output={output}"])
    return (command.main(), *capsys.readouterr())

  return call


def table(out: str) -> dict[str, str]:
  """What the lines say, by their first word; lines that go on with one are joined to it."""
  found, last = {}, ""
  for line in out.splitlines()[1:]:
    last = line[:14].strip() or last
    found[last] = " ".join([*found.get(last, "").split(), *line[14:].split()])
  return found


def test_odd_files(tmp_path, run):
  """Sizes, channels, classes, what is left out, bad, or there twice."""
  files = pictures(12)
  files["ape/00.bmp"] = files.pop("ape/00.png")
  with Image.open(io.BytesIO(files["bee/04.png"])) as image:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=0)
  files |= {
    "bee/again.png": stream.getvalue(),
    "cow/copy.png": files["bee/04.png"],
    "cow/cut.png": files["ape/03.png"][:80],
  }
  files |= {"ape/x.txt": b"", "ape/wide.png": encoded(np.zeros((5, 30, 3), np.uint8)), "bee/none.png": b"no image"}
  code, out, err = run(write("folder", tmp_path, files))
  told = table(out)
  assert (code, err) == (0, "") and out.startswith(f"folder:{tmp_path}/folder: 17 images of train\n"), err
  assert told["splits"] == "train"
  assert told["sizes"] == "2 sizes, 8x8 to 5x30 8x8 14 ############################## 5x30 1 ###"
  assert told["channels"] == "colour, 3 in a batch; 3 images are grey"
  assert told["classes"] == "3: ape 5, bee 6, cow 6"
  assert told["left out"] == "1 file of another format (.txt 1)"
  assert told["bad"].startswith("2 cannot be read:") and "none.png" in told["bad"] and "cut.png" in told["bad"]
  twice = told["duplicates"]
  assert twice.startswith("2 equal an earlier image in every pixel, 1 in every byte:")
  for name, how in (("again", "pixels"), ("copy", "bytes")):
    assert re.search(rf"{name}\.png \(image \d+\) = \S+/04\.png \(image \d+\) \({how}\)", twice), twice
  assert "image_size: 0, but the images of" in told["training"]
  assert "64x64" in told["batch"] and (tmp_path / "look.png").exists()
  sized = table(run(f"folder:{tmp_path}/folder", "--image_size=4x6", "--batch_size=3")[1])
  assert "on_bad_record: fail" in sized["training"]
  assert sized["batch"].startswith("all 3 images, 4x6, --resize=crop --crop=center --resample=bicubic: ")
  assert "training" not in table(run(f"folder:{tmp_path}/folder", "--image_size=4x6", "--on_bad_record=skip")[1])


def test_own_images_take_the_preset_that_training_takes(tmp_path, run):
  dataset = write("folder", tmp_path, pictures(4) | {"ape/wide.png": encoded(np.zeros((5, 30, 3), np.uint8))})
  code, out, err = run(dataset, "--batch_size=2", preset=())
  assert code == 0 and err.startswith("own images, with the settings that a new run takes here: --preset=images32")
  told = table(out)
  assert "all 2 images, 32x32, " in told["batch"] and "mirrored at random" in told["batch"] and "training" not in told


@pytest.fixture(scope="module")
def mixed_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  prepare.prepare(DataConfig(dataset="mixed/half", data_dir=str(folder)))
  return folder


def test_tfds(run, mixed_dir):
  """Its splits and classes; images of no declared size are read although training would refuse them."""
  code, out, err = run("mixed/half", f"--data_dir={mixed_dir}", "--split=train[:10]")
  told = table(out)
  assert (code, err) == (0, "") and out.startswith("mixed/half: 10 images of train[:10]\n"), err
  assert (told["splits"], told["sizes"], told["left out"], told["bad"]) == ("train, test", "8x8", "nothing", "none")
  assert told["channels"] == "colour, 3 in a batch; 4 images are grey"
  assert told["classes"].startswith("3: b/c ") and told["classes"].endswith(", of no image 0")
  assert "image_size: 0, but the images of" in told["training"] and "64x64" in told["batch"]
  told = table(run("mixed/half", f"--data_dir={mixed_dir}", "--split=test", "--image_size=6x4")[1])
  assert re.fullmatch("none: the data set has none for image [0-9]+ of test", told["classes"])
  assert "training" not in told and "6x4" in told["batch"]


def test_a_size_that_the_network_cannot_take(tmp_path, run):
  dataset = write("folder", tmp_path, pictures(4))
  told = table(run(dataset, "--image_size=9x12", "--channel_multipliers=1,2,2")[1])
  assert told["training"].startswith("would be refused: image_size: 9x12 is not divisible by 4, as the 3 levels of")
  assert "training" not in table(run(dataset, "--image_size=8x12", "--channel_multipliers=1,2,2")[1])


def test_names_of_classes_stay_on_their_line(tmp_path, run):
  files = {f"{'ab'[i % 2]}\n/{i}\n.png": content for i, content in enumerate(pictures(4).values())}
  code, out, _ = run(write("folder", tmp_path, files | {"a\n/none\n.png": b"no image"}))
  told = table(out)
  assert code == 0 and told["classes"] == "2: a\\n 3, b\\n 2" and "/a\\n/none\\n.png (image 2)" in told["bad"], out


def test_many_sizes_are_ranges(tmp_path, run):
  files = {f"{side}.png": encoded(np.zeros((side, 40), np.uint8)) for side in range(7, 18)}
  told = table(run(write("folder", tmp_path, files))[1])
  assert told["sizes"].startswith("11 sizes, 7x40 to 17x40; by the shorter side: side 4..7 1 #")
  assert "side 8..15 8 ############################## side 16..31 2 ########" in told["sizes"]
  assert told["channels"] == "grey, 1 in a batch" and told["classes"] == "none: the data set has none"


@pytest.mark.parametrize("options", [{}, {"image_size": 6, "random_flip": True, "crop": "random"}])
def test_the_picture_is_the_first_batch(tmp_path, run, options):
  """As the pipeline gives it to the step, and the objective flips it."""
  random = np.random.default_rng(0)
  wide = {name: encoded(random.integers(0, 256, (8, 14, 3), np.uint8)) for name in pictures(9)}
  wide = {name.replace(".jpg", ".png"): content for name, content in wide.items()}
  dataset = f"folder:{write_folder(tmp_path / 'wide', wide)}"
  config = config_lib.override(Config(), {"dataset": dataset, "batch_size": 6, "seed": 5, **options})
  code, _, err = run(dataset, "--batch_size=6", "--seed=5", *(f"--{name}={value}" for name, value in options.items()))
  assert (code, err) == (0, "")
  source = sources.open_source(config.data)
  (batch,) = itertools.islice(pipeline.batches(source, batch_size=6, seed=5, start_step=0, labels=True), 1)
  pixels, flip = Pixels((6, 6, 3)), config.data.random_flip
  objective = DenoiserObjective(None, make_schedule("linear", 10), pixels, config.diffusion, flip)
  examples = jax.vmap(objective.sample_training_example)(example_keys(5, 0, batch["index"]), batch["image"])
  right = np.asarray(examples.image)
  assert not options or (right != batch["image"]).any(), "some are flipped"
  names = [("ape", "bee", "cow")[label] for label in batch["label"]]
  with Image.open(tmp_path / "look.png") as picture:
    np.testing.assert_array_equal(np.asarray(picture), grids.image_grid(right, captions=names))
  assert grids.facts_of(tmp_path / "look.png")["records"] == batch["record"].tolist()


def test_captions_are_below_their_tiles():
  images = np.zeros((3, 64, 64, 3), np.uint8)
  plain = grids.image_grid(images, 3)
  captioned = grids.image_grid(images, 3, ["", "I", "a name that is longer than its tile"])
  assert captioned.shape[0] > plain.shape[0] and captioned.shape[1] == plain.shape[1]
  np.testing.assert_array_equal(captioned[:66], plain[:66])
  below = [captioned[66:-2, 2 + 66 * i : 66 + 66 * i] for i in range(3)]
  dark = [(strip < 128).all(axis=2).any(axis=0) for strip in below]
  assert not dark[0].any() and 0 < dark[1].sum() < 8 and dark[2][:50].any()
  assert (captioned[66:-2, [0, 1, -1, -2]] == 255).all(), "the long one is cut"


def test_training_says_it_in_two_lines(tmp_path):
  files = pictures(12)
  counts = np.bincount(classes(files)[1]).tolist()
  said = "  classes: 3: " + ", ".join(
    f"{name} {count}" for name, count in zip(("ape", "bee", "cow"), counts, strict=True)
  )
  for kind in ("folder", "zip"):
    data = DataConfig(dataset=write(kind, tmp_path, files), image_size="4x6", random_flip=True)
    assert summary.two_lines(sources.open_source(data), data) == (
      "data: 8x8, colour -> 4x6 (--resize=crop --crop=center --resample=bicubic, mirrored at random)\n" + said
    )
  digits = DataConfig(split="train[:20]")
  first, second = summary.two_lines(sources.open_source(digits), digits).splitlines()
  assert first == "data: 8x8, grey" and second.startswith("  classes: 10: 0 ")


def test_what_is_refused_is_one_line(tmp_path, run):
  for words, part in (
    ([], "required: DATASET"),
    ([f"folder:{tmp_path}/none"], "is not a folder"),
    (["digits", "more"], "unexpected argument 'more'"),
    (["digits", "--batch_size=0"], "batch_size: 0 must be at least 1"),
    (["digits", "--only=x"], "only: 'x' is none of the 10 classes"),
    ([write("folder", tmp_path, {"a.png": encoded(np.zeros((8, 8), np.uint8))[:45]})], "can be decoded"),
  ):
    code, out, err = run(*words)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and part in err, err
  assert not (tmp_path / "look.png").exists()
  code, _, err = run(f"folder:{tmp_path}/none", preset=())
  assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
  for output, part in (("none/x.png", "is no file in a folder that exists"), ("", "is no file in"), ("a\nb", "'\\n'")):
    code, out, err = run("digits", output=f"{tmp_path}/{output}" if output else "")
    assert (code, out) == (2, "") and err.startswith("error: output: ") and err.count("\n") == 1 and part in err, err
