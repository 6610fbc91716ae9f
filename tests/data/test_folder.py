"""folder:PATH, with files written by Pillow."""

import importlib.machinery
import os
import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageFile

from ddpm_jax.config import DataConfig
from ddpm_jax.data import files, folder, images, labels, sources
from ddpm_jax.errors import UserError


def write(path, image, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  image.save(path, **options)


def plain(value, size=(8, 8), mode="RGB"):
  return Image.new(mode, size, value)


def open_folder(path, **options):
  return sources.open_source(DataConfig(dataset=f"folder:{path}", **options))


def encoded_images(path, **options):
  data = DataConfig(dataset=f"folder:{path}", **options)
  return files.open_files(data, folder.find(data))


def refuse(path, match, **options):
  with pytest.raises(UserError, match=match) as caught:
    open_folder(path, **options)
  assert "\n" not in str(caught.value)


def read_all(source):
  return source.read(np.arange(len(source))).images


def test_png_jpeg_and_webp_sorted_by_relative_path(tmp_path):
  write(tmp_path / "b.PNG", plain((10, 20, 30)))
  write(tmp_path / "a" / "z.jpg", plain((200, 200, 200)), quality=100)
  write(tmp_path / "c.webp", plain((1, 2, 3)), lossless=True)
  write(tmp_path / "B.JPeG", plain((99, 99, 99)), quality=100)
  (tmp_path / "notes.txt").write_text("no image")
  source = open_folder(tmp_path)
  assert source.image_shape == (8, 8, 3)
  assert len(source) == 4
  assert source.name == f"folder:{tmp_path}"
  pixels = read_all(source)
  assert pixels.dtype == np.uint8
  assert pixels.shape == (4, 8, 8, 3)
  np.testing.assert_array_equal(pixels[:, 0, 0], [[99] * 3, [200] * 3, [10, 20, 30], [1, 2, 3]])
  np.testing.assert_array_equal(source.read(np.array([2, 2, 0])).images[:, 0, 0, 0], [10, 10, 99])


def test_hidden_files_and_links_that_lead_out_are_left_out(tmp_path):
  root = tmp_path / "root"
  write(root / "x.png", plain("red"))
  write(root / ".hidden.png", plain("red"))
  write(root / ".cache" / "y.png", plain("red"))
  write(tmp_path / "outside" / "secret.png", plain("red"))
  (root / "file.png").symlink_to(tmp_path / "outside" / "secret.png")
  (root / "folder").symlink_to(tmp_path / "outside")
  (root / "loop").symlink_to(root)
  (root / "inside.png").symlink_to(root / "x.png")
  assert len(open_folder(root)) == 2  # x.png and inside.png


@pytest.mark.parametrize(("modes", "channels"), [(["L", "1", "LA", "I;16"], 1), (["L", "RGB"], 3)])
def test_grey_only_if_all_are(tmp_path, modes, channels):
  for number, mode in enumerate(modes):
    write(tmp_path / f"{number}.png", plain(0, mode=mode))
  assert open_folder(tmp_path).image_shape == (8, 8, channels)


def paletted(*colours):
  """An image of a column for each colour, repeated."""
  image = Image.fromarray(np.arange(8, dtype=np.uint8)[None].repeat(8, 0) % len(colours), "P")
  image.putpalette([value for colour in colours for value in colour])
  return image


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp", "tif"])
def test_a_palette_of_greys_is_grey(tmp_path, suffix):
  """Each format has its own order of the numbers of a palette. In release 0.1 all palettes were colour."""
  write(tmp_path / f"a.{suffix}", paletted((200, 200, 200), (7, 7, 7), (100, 100, 100)))
  source = open_folder(tmp_path)
  assert source.image_shape == (8, 8, 1)
  assert read_all(source)[0, 3, :4, 0].tolist() == [200, 7, 100, 200]
  write(tmp_path / f"b.{suffix}", paletted((200, 200, 200), (7, 7, 7), (100, 101, 100)))
  source = open_folder(tmp_path)
  assert source.image_shape == (8, 8, 3)
  assert read_all(source)[:, 3, 2].tolist() == [[100, 100, 100], [100, 101, 100]]


def test_a_run_of_release_0_1_goes_on_with_the_files_that_it_took(tmp_path, capsys):
  write(tmp_path / "a.png", paletted((200, 200, 200), (7, 7, 7)))
  write(tmp_path / "b.jpeg", plain(9, mode="L"))
  before = open_folder(tmp_path, formats="basic")
  write(tmp_path / "c.bmp", plain("red"))
  assert (before.image_shape, len(before)) == ((8, 8, 3), 2)
  assert open_folder(tmp_path, formats="basic").fingerprint == before.fingerprint
  assert "left out: 1 file of another format (.bmp 1)" in capsys.readouterr().err
  assert len(open_folder(tmp_path)) == 3


def test_every_suffix_that_is_taken_is_decoded(tmp_path):
  grey = ("pgm", "pbm")
  kinds = {"jfif": "JPEG", "jp2": "JPEG2000", "pnm": "PPM", "pbm": "PPM", "pgm": "PPM"}
  suffixes = sorted(suffix.removeprefix(".") for suffix in images.SUFFIXES - images.HEIC_SUFFIXES)
  for suffix in suffixes:
    image = plain(255, mode="1" if suffix == "pbm" else "L") if suffix in grey else plain((200, 100, 50))
    write(tmp_path / f"x.{suffix}", image, **({"format": kinds[suffix]} if suffix in kinds else {}))
  source = open_folder(tmp_path)
  assert len(source) == len(suffixes) == 15
  for suffix, pixel in zip(suffixes, read_all(source)[:, 4, 4].astype(int), strict=True):
    assert np.abs(pixel - ([255] * 3 if suffix in grey else [200, 100, 50])).max() <= 3, suffix


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
  for suffix in ("gif", "webp", "png"):
    later = [plain("blue"), plain("red")]
    write(tmp_path / f"a.{suffix}", plain((0, 255, 0)), save_all=True, append_images=later, duration=100)
  assert (np.abs(read_all(open_folder(tmp_path))[:, 0, 0].astype(int) - [0, 255, 0]) <= 3).all()


def test_heic_is_left_out_until_its_plugin_is_there(tmp_path, capsys, monkeypatch):
  """A plugin in the place of the real one reads its own kind of file, and is asked once it is needed."""
  write(tmp_path / "a.png", plain(3, mode="L"))
  (tmp_path / "b.heic").write_bytes(b"heic: 7")
  monkeypatch.setattr(images, "SUFFIXES", images.SUFFIXES - images.HEIC_SUFFIXES)
  assert len(open_folder(tmp_path)) == 1
  told = "left out: 1 file of another format (.heic 1; pip install 'ddpm_jax[heic]' to read HEIC)\n"
  assert capsys.readouterr().err.endswith(told)

  class Plugin(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self):
      self._mode, self._size = "L", (8, 8)
      self.tile = []

    def load(self):
      self.im = Image.new("L", (8, 8), 7).im

  module = types.ModuleType(images.HEIC_PLUGIN)
  module.__spec__ = importlib.machinery.ModuleSpec(images.HEIC_PLUGIN, None)
  module.register_heif_opener = lambda: Image.register_open("HEIF", Plugin, lambda head: head.startswith(b"heic"))
  monkeypatch.setitem(sys.modules, images.HEIC_PLUGIN, module)
  monkeypatch.setattr(images, "SUFFIXES", images.SUFFIXES | images.HEIC_SUFFIXES)
  monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
  monkeypatch.setattr(Image, "ID", list(Image.ID))
  images._register_heic.cache_clear()
  try:
    assert read_all(open_folder(tmp_path))[:, 0, 0, 0].tolist() == [3, 7]
  finally:
    images._register_heic.cache_clear()


def test_16_bit_grey_and_transparency(tmp_path):
  write(tmp_path / "deep.png", plain(128 * 257, mode="I;16"))
  write(tmp_path / "half.png", plain((0, 51), mode="LA"))
  np.testing.assert_array_equal(read_all(open_folder(tmp_path))[:, 0, 0, 0], [128, 204])


def test_mixed_sizes_need_image_size(tmp_path):
  write(tmp_path / "a.png", plain("red", (20, 10)))
  write(tmp_path / "b.png", plain("blue", (8, 8)))
  refuse(tmp_path, "image_size: 0, .* different sizes; set --image_size")
  source = open_folder(tmp_path, image_size=4)
  assert source.image_shape == (4, 4, 3)
  np.testing.assert_array_equal(read_all(source)[:, 2, 2], [[255, 0, 0], [0, 0, 255]])


def test_images_of_one_size_need_no_image_size_also_where_they_are_no_squares(tmp_path):
  write(tmp_path / "a.png", plain("red", (20, 10)))
  write(tmp_path / "b.png", plain("blue", (20, 10)))
  source = open_folder(tmp_path)
  assert source.image_shape == (10, 20, 3)
  np.testing.assert_array_equal(read_all(source)[:, 9, 19], [[255, 0, 0], [0, 0, 255]])
  assert open_folder(tmp_path, image_size="4x6").image_shape == (4, 6, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
  """All have one size once they are upright, whatever their size is as stored; TIFF tells the upright one itself."""
  exif = Image.Exif()
  exif[0x0112] = orientation
  upright = np.arange(96, dtype=np.uint8).reshape(8, 12)
  stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T}
  stored |= {6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1)}
  image = Image.fromarray(stored[orientation])
  write(tmp_path / "a.png", image, exif=exif)
  write(tmp_path / "b.webp", image.convert("RGB"), exif=exif, lossless=True)
  write(tmp_path / "c.jpg", image, exif=exif, format="TIFF")
  write(tmp_path / "d.png", Image.fromarray(upright))
  source = open_folder(tmp_path)
  assert source.image_shape == (8, 12, 3)
  for image in read_all(source):
    np.testing.assert_array_equal(image, np.repeat(upright[..., None], 3, axis=2))


@pytest.mark.parametrize("content", [b"", b"no image", "half"])
def test_a_broken_image_is_named(tmp_path, content):
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
  write(tmp_path / "good.png", noise)
  if content == "half":
    content = (tmp_path / "good.png").read_bytes()[:1500]
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "bad.png").write_bytes(content)
  refuse(tmp_path, r"sub/bad.png \(image 1\) is .* repair or remove it, or use --on_bad_record=skip$")


def test_an_image_that_breaks_or_goes_after_opening_is_named(tmp_path):
  for number in range(5):
    write(tmp_path / f"{number}.png", Image.fromarray(np.full((32, 32, 3), number, np.uint8)))
  source = open_folder(tmp_path, cache_gib=0.0)
  forgiving = open_folder(tmp_path, cache_gib=0.0, on_bad_record="skip")
  os.truncate(tmp_path / "1.png", 60)
  (tmp_path / "2.png").unlink()
  write(tmp_path / "4.png", plain((4, 4, 4), (32, 31)))
  for index, reason in [
    (1, "is broken"),
    (2, r"cannot be read \(No such file or directory\)"),
    (4, "has another size"),
  ]:
    with pytest.raises(UserError, match=rf"^dataset: {tmp_path}/{index}.png \(image {index}\) {reason}[^\n]*$"):
      source.read(np.array([0, index]))
  rows = forgiving.read(np.arange(5))
  np.testing.assert_array_equal(rows.images[:, 0, 0, 0], [0, 3, 3, 3, 0])
  np.testing.assert_array_equal(rows.replaced, [False, True, True, False, True])


@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_skipping_keeps_the_places_of_all_others(tmp_path, capsys, cache_gib):
  for number in (1, 2, 4):
    write(tmp_path / f"{number}.png", plain(number, mode="L"))
  (tmp_path / "0.png").write_bytes(b"no image")
  write(tmp_path / "3.png", plain((9, 9, 9), (32, 32)))  # neither its size nor its colour counts
  os.truncate(tmp_path / "3.png", 20)
  source = open_folder(tmp_path, cache_gib=cache_gib, on_bad_record="skip")
  assert (len(source), source.image_shape) == (5, (8, 8, 1))
  for _ in range(3):
    rows = source.read(np.array([4, 3, 2, 1, 0]))
  np.testing.assert_array_equal(rows.images[:, 0, 0, 0], [4, 4, 2, 1, 1])
  np.testing.assert_array_equal(rows.replaced, [False, True, False, False, True])
  told = sorted(capsys.readouterr().err.splitlines())
  assert len(told) == 2
  assert told[0] == f"skipped: {tmp_path}/0.png (image 0) is not an image that Pillow can read (unknown format)"
  assert told[1].startswith(f"skipped: {tmp_path}/3.png (image 3) is ")


def test_nothing_but_broken_images(tmp_path):
  for name in ("a.png", "b.jpg"):
    (tmp_path / name).write_bytes(b"no image")
  refuse(tmp_path, "none of the 2 files of 'folder:.*' is an image", on_bad_record="skip")


def test_sizes_still_differ_when_bad_images_are_skipped(tmp_path):
  write(tmp_path / "a.png", plain("red", (20, 20)))
  write(tmp_path / "b.png", plain("blue"))
  refuse(tmp_path, "image_size: 0, .* different sizes", on_bad_record="skip")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
  write(tmp_path / "a.png", plain("red"))
  write(tmp_path / "shut" / "b.png", plain("red"))
  scandir = os.scandir

  def refusing(path):
    if str(path).endswith("shut"):
      raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refusing)
  refuse(tmp_path, "the folder .*/shut cannot be listed .Permission denied.", on_bad_record="skip")


def test_a_decompression_bomb_is_named(tmp_path, monkeypatch):
  write(tmp_path / "bomb.png", plain("red", (11, 11)))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
  refuse(tmp_path, r"bomb.png \(image 0\) is too large")


def test_the_cache_holds_what_reading_on_demand_gives(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (300, 9, 12, 3), np.uint8)  # more than one chunk
  for number, image in enumerate(noise):
    write(tmp_path / f"{number:03}.png", Image.fromarray(image))
  cached = open_folder(tmp_path, image_size=6)
  on_demand = open_folder(tmp_path, image_size=6, cache_gib=0.0)
  assert cached.read is not on_demand.read
  indices = np.random.default_rng(1).permutation(300)
  for ours, theirs in zip(cached.read(indices), on_demand.read(indices), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert len(np.unique(cached.read(indices).images.reshape(300, -1), axis=0)) == 300


def test_first_folders_are_classes(tmp_path):
  for level, path in enumerate(["dog/1.png", "cat/z/b.png", "cat/a.png", "Zebra/9.png", "ape/x/y/1.png", "dog/0.png"]):
    write(tmp_path / path, plain(level, mode="L"))
  (tmp_path / "aardvark").mkdir()  # without images
  write(tmp_path / ".hidden" / "1.png", plain(9, mode="L"))
  source = open_folder(tmp_path)
  assert read_all(source)[:, 0, 0, 0].tolist() == [3, 4, 2, 1, 5, 0]
  labels = source.labels()
  assert labels.dtype == np.int32
  assert labels.tolist() == [0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("paths", [["a.png", "b.png"], ["x/a.png", "x/y/b.png"], ["x/a.png", "y/b.png", "c.png"]])
def test_other_folders_have_no_classes(tmp_path, paths):
  for path in paths:
    write(tmp_path / path, plain(0, mode="L"))
  source = open_folder(tmp_path)
  with pytest.raises(UserError) as caught:
    source.labels()
  assert str(caught.value) == (
    f"features: 'classifier' needs labels, and folder:{tmp_path} has none; use --features=network, or inception "
    "with --inception_weights"
  )


def test_opening_looks_for_no_classes(tmp_path, monkeypatch):
  for path in ("x/a.png", "y/b.png"):
    write(tmp_path / path, plain(0, mode="L"))
  before = open_folder(tmp_path)

  def read(*_):
    raise AssertionError("read")

  monkeypatch.setattr(labels, "of_files", read)
  source = open_folder(tmp_path)
  assert source.fingerprint == before.fingerprint
  with pytest.raises(AssertionError, match="read"):
    source.labels()


def test_a_folder_has_one_split(tmp_path):
  data = DataConfig(dataset=f"folder:{tmp_path}")
  assert [sources.has_split(data, split) for split in ("train", "test")] == [True, False]


def write_classes(root, number=40, classes=5):
  """Image i of class c is of the grey 10 c + i % 10, so that each class has its own greys; 'a' to 'e' are unequal."""
  for c in range(classes):
    for i in range(number):
      write(root / "abcde"[c] / f"{i:03d}.png", plain(10 * c + i % 10, mode="L"))


def test_slices_of_a_folder(tmp_path):
  """Every slice is a part of each class, no two share an image, and together they are the folder."""
  root, moved = tmp_path / "root", tmp_path / "elsewhere"
  write_classes(root)
  whole = encoded_images(root)
  everything = whole.fetch(list(range(200)))

  def slice_of(split, place=root):
    found = encoded_images(place, split=split)
    return found, [os.path.relpath(path, place) for path in found.fetch(list(range(found.length)))]

  spans = {"train[:70%]": 140, "train[70%:90%]": 40, "train[180:]": 20}
  parts = {split: slice_of(split)[1] for split in spans}
  assert {split: len(paths) for split, paths in parts.items()} == spans
  assert sorted(path for paths in parts.values() for path in paths) == [
    os.path.relpath(path, root) for path in everything
  ]
  for split, paths in parts.items():
    assert paths == sorted(paths), "in the order of the folder"
    counts = [sum(path[0] == name for path in paths) for name in "abcde"]
    expected = spans[split] / 5
    assert all(abs(count - expected) < 3 * (expected**0.5) for count in counts), (split, counts)
  assert slice_of("train[-20:]")[1] == parts["train[180:]"]
  assert slice_of("train[180:]+train[:70%]")[1] == parts["train[180:]"] + parts["train[:70%]"]
  assert slice_of("train[:100%]")[1] == [os.path.relpath(path, root) for path in everything]

  root.rename(moved)
  assert slice_of("train[:70%]", moved)[1] == parts["train[:70%]"], "wherever the folder lies"
  for i in range(10):  # some more images
    write(moved / "b" / f"x{i}.png", plain(3, mode="L"))
  stayed = set(slice_of("train[:70%]", moved)[1]) & set(parts["train[:70%]"])
  assert len(stayed) > 130, "of 140: what was held out stays so"


def test_what_is_known_of_a_slice(tmp_path):
  """Labels are those of the whole folder; each slice has a fingerprint of its own, and all have one shape."""
  write_classes(tmp_path, number=8)
  write(tmp_path / "e" / "colour.png", plain("red"))  # of one of the slices alone
  train, rest = (open_folder(tmp_path, split=split) for split in ("train[:60%]", "train[60%:]"))
  assert train.image_shape == rest.image_shape == (8, 8, 3)
  for source in (train, rest):
    greys, labels = read_all(source)[:, 0, 0, 0], source.labels()
    np.testing.assert_array_equal(np.where(greys == 255, 4, greys // 10), labels)
  whole = open_folder(tmp_path)
  assert len({str(source.fingerprint) for source in (train, rest, whole)}) == 3
  assert whole.fingerprint["dataset"] == "folder", "as before there were slices"


def test_what_is_no_folder_of_images(tmp_path):
  refuse(tmp_path / "missing", "dataset: 'folder:.*missing' is not a folder")
  refuse("", "dataset: 'folder:' is not a folder")
  refuse("~nobody_here/x", "dataset: .~nobody_here/x. begins with the home of nobody here; write the whole path")
  refuse(tmp_path, r"holds no .*\.png.* file")
  write(tmp_path / "a.png", plain("red"))
  for split, message in (
    ("test", r"split: 'test' is no part of a folder \(Unknown split .*; use 'train' or slices of it, such as 'train"),
    ("train[", r"split: 'train\[' is no part of a folder"),
    ("train[:x]", "is no part of a folder"),
    ("train[:2]", r"is no part of a folder \(Requested slice"),
    ("train[1:]", "of 1 images, is empty"),
  ):
    refuse(tmp_path, message, split=split)


def test_what_is_left_out_is_told_by_kind(tmp_path, capsys):
  root, outside = tmp_path / "root", tmp_path / "outside"
  for number in range(3):
    write(root / f"{number}.png", plain(number, mode="L"))
    write(outside / f"{number}.png", plain(number, mode="L"))
    (root / f"link{number}.png").symlink_to(outside / f"{number}.png")
  (root / "inside.png").symlink_to("0.png")
  (root / "more").symlink_to(outside)
  (root / "broken.png").symlink_to("nowhere")
  for name in ("a.psd", "b.PSD", "c.tga", "notes", ".DS_Store", ".hidden/x.png"):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(b"")
  os.mkfifo(root / "pipe.png")
  assert len(open_folder(root)) == 4
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err == (
    f"folder:{root}: 4 images; left out: 4 files of other formats (.psd 2, .tga 1, no suffix 1), 1 hidden file, 1 "
    "hidden folder, 1 special file, 1 broken link, 3 links to files outside, 1 link to a folder (--follow_links "
    "follows links)\n"
  )
  open_folder(outside)
  assert capsys.readouterr().err == ""  # nothing is left out


def test_links_are_followed_where_that_is_asked_for(tmp_path, capsys):
  """As in a cache of huggingface_hub, and to folders. In a circle, each folder is taken once, under its own path."""
  root, outside = tmp_path / "root", tmp_path / "outside"
  (outside / "sub").mkdir(parents=True)
  for number in range(3):
    write(tmp_path / "blobs" / f"{number:040x}", plain(number, mode="L"), format="PNG")
    (root / "hub").mkdir(parents=True, exist_ok=True)
    (root / "hub" / f"{number}.png").symlink_to(f"../../blobs/{number:040x}")
  write(outside / "sub" / "a.png", plain(3, mode="L"))
  write(outside / "b.png", plain(4, mode="L"))
  for link, target in [
    *(("again", outside), ("linked", outside), ("loop", root), ("a_hub", root / "hub")),
    *(("hub/up", root), ("../outside/sub/up", outside), ("../outside/in", root)),
  ]:
    (root / link).symlink_to(target)
  with pytest.raises(UserError, match=r"only 3 links to files outside, 5 links to folders; .* or use --follow_links$"):
    open_folder(root)
  source = open_folder(root, follow_links=True)
  found = folder.find_images(root, follow_links=True)
  assert [str(file.relative_to(root)) for file in found.files] == [
    *("again/b.png", "again/sub/a.png", "hub/0.png", "hub/1.png", "hub/2.png"),
  ]
  assert found.left_out == {} and capsys.readouterr().err == ""
  assert read_all(source)[:, 0, 0, 0].tolist() == [4, 3, 0, 1, 2]
  copy = tmp_path / "copy"
  for file in found.files:
    (copy / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
    (copy / file.relative_to(root)).write_bytes(file.read_bytes())
  assert open_folder(copy).fingerprint == source.fingerprint
