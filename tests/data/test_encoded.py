"""Bad images and what takes their place, with images whose pixels are their numbers. The oracle is a loop over sets."""

import concurrent.futures
import errno
import io
import itertools
import pathlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ddpm_jax.data import images, pipeline
from ddpm_jax.data.encoded import EncodedImages, decode_all, on_demand
from ddpm_jax.data.images import BadRecord
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import RunError, UserError

# With a text, a PNG is one that Pillow opens.
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("note", "words")


def png(value, size=2, **options):
  stream = io.BytesIO()
  Image.new("L", (size, size), value).save(stream, "PNG", **options)
  return stream.getvalue()


KINDS = (b"", b"no image", png(0)[:44], png(0, size=3), pathlib.Path("/nowhere"), BadRecord("it is damaged", "mend it"))


def data_set(length, bad):
  """Image i has the pixels i % 256, unless i is in `bad`: those are bad in all the ways there are, in turn."""
  files = [png(i % 256) for i in range(length)]
  for index, kind in zip(sorted(bad), itertools.cycle(KINDS), strict=False):
    files[index] = kind
  return EncodedImages(
    name="numbers",
    length=length,
    shape=(2, 2, 1),
    resize=False,
    identity="numbers",
    listing="",
    fetch=lambda indices: [files[i] for i in indices],
    label=lambda index: f"number {index}",
  )


def readers(encoded):
  return on_demand(encoded, skip=True), decode_all(encoded, skip=True).take


def stand_in(index, length, bad):
  while index in bad:
    index = (index + 1) % length
  return index


@pytest.mark.parametrize(
  ("length", "bad"),
  [
    (9, set()),
    (9, {4}),
    (9, {0, 3, 4, 5}),
    (9, {7, 8, 0}),  # the search goes on at the beginning
    (9, set(range(9)) - {2}),
    (1, set()),
    (600, set(range(250, 262)) | {599} | set(range(0, 600, 7))),  # more than one chunk
  ],
)
def test_the_next_good_image_takes_the_place_of_a_bad_one(length, bad):
  indices = np.concatenate([np.random.default_rng(0).permutation(length), [0, 0, length - 1]])
  expected = [stand_in(index, length, bad) % 256 for index in indices]
  for read in readers(data_set(length, bad)):
    rows = read(indices)
    assert rows.images.shape == (len(indices), 2, 2, 1)
    assert (rows.images.dtype, rows.replaced.dtype) == (np.uint8, bool)
    np.testing.assert_array_equal(rows.images, np.tile(np.reshape(expected, (-1, 1, 1, 1)), (1, 2, 2, 1)))
    np.testing.assert_array_equal(rows.replaced, [index in bad for index in indices])


@pytest.mark.parametrize("start", [10, 190])
def test_a_hundred_in_a_row_are_skipped_and_no_more(start):
  length = 200

  def run(count):
    return {(start + k) % length for k in range(count)}

  for read in readers(data_set(length, run(100))):
    assert read(np.array([start])).images[0, 0, 0, 0] == (start + 100) % length
  encoded = data_set(length, run(101))
  with pytest.raises(UserError, match=rf"^dataset: too many .* 101 in a row from number {start} on;[^\n]*$"):
    on_demand(encoded, skip=True)(np.array([0 if start == 190 else 5, start]))
  with pytest.raises(UserError, match=rf"101 in a row from number {start} on"):
    decode_all(encoded, skip=True)


@pytest.mark.parametrize("length", [1, 3, 101])
def test_nothing_but_bad_images(length):
  encoded = data_set(length, set(range(length)))
  with pytest.raises(UserError, match=f"too many images of numbers are bad, {length} in a row"):
    on_demand(encoded, skip=True)(np.array([0]))
  with pytest.raises(UserError, match=f"too many images of numbers are bad, {length} in a row"):
    decode_all(encoded, skip=True)


def test_without_skip_the_first_bad_image_is_an_error(capsys):
  encoded = data_set(700, {3, 300, 600})
  read = on_demand(encoded, skip=False)
  assert read(np.array([2, 4])).images[:, 0, 0, 0].tolist() == [2, 4]
  assert not read(np.array([2, 4])).replaced.any()
  for indices, named in [([1, 600, 3], 600), ([3], 3)]:
    with pytest.raises(BadRecord, match=rf"number {named} .*, or use --on_bad_record=skip$"):
      read(np.array(indices))
  with pytest.raises(BadRecord, match="number 3 "):
    decode_all(encoded, skip=False)
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cached", [False, True])
def test_each_bad_image_is_told_once_however_many_threads_meet_it(capsys, cached):
  bad = {5, 6, 7, 40, 261}  # 5 and 261 have the same place in their chunks
  encoded = data_set(300, bad)
  read = decode_all(encoded, skip=True).take if cached else on_demand(encoded, skip=True)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(read, [np.arange(300)] * 24))
  captured = capsys.readouterr()
  assert captured.out == ""
  lines = captured.err.splitlines()
  assert len(lines) == len(bad)
  assert all(line.startswith("skipped: ") and line.endswith((")", "it is damaged")) for line in lines)


def test_a_line_says_which_image_and_why(capsys):
  files = {2: b"no image", 3: png(0, size=5), 4: BadRecord("number 4 cannot be read (crc)", "mend it")}
  encoded = EncodedImages(
    **{**vars(data_set(9, set())), "fetch": lambda indices: [files.get(i, png(i)) for i in indices]}
  )
  on_demand(encoded, skip=True)(np.array([2]))
  first, second, third = capsys.readouterr().err.splitlines()
  assert first == "skipped: number 2 is not an image that Pillow can read (unknown format)"
  assert second == "skipped: number 3 has another size (5 x 5 and not 2 x 2)"
  assert third == "skipped: number 4 cannot be read (crc)"


@pytest.mark.parametrize("side", [11, 30])  # Pillow itself warns above the limit and refuses above twice the limit
def test_a_decompression_bomb_is_skipped_and_not_decoded(monkeypatch, capsys, tmp_path, side):
  """Both as a record, which TFDS has, and as a file."""
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
  (tmp_path / "bomb.png").write_bytes(png(0, side))
  (tmp_path / "text.png").write_bytes(png(4, pnginfo=TEXT))
  files = [png(0), png(1, side), tmp_path / "bomb.png", tmp_path / "text.png", png(2, side, pnginfo=TEXT), png(6)]
  encoded = EncodedImages(**{**vars(data_set(6, set())), "resize": True, "fetch": lambda at: [files[i] for i in at]})
  decoded = []
  load, frombytes = PngImagePlugin.PngImageFile.load, Image.frombytes
  monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: decoded.append(image.size) or load(image))
  monkeypatch.setattr(Image, "frombytes", lambda mode, size, *a: decoded.append(size) or frombytes(mode, size, *a))
  for read in readers(encoded):
    rows = read(np.arange(6))
    np.testing.assert_array_equal(rows.images[:, 0, 0, 0], [0, 4, 4, 4, 6, 6])
    np.testing.assert_array_equal(rows.replaced, [False, True, True, False, True, False])
  assert set(decoded) == {(2, 2)}
  assert "number 1 is too large" in capsys.readouterr().err


def test_only_bad_records_are_skipped(monkeypatch):
  def no_memory(indices):
    raise MemoryError

  encoded = EncodedImages(**{**vars(data_set(4, set())), "fetch": no_memory})
  for read in (lambda: on_demand(encoded, skip=True)(np.array([0])), lambda: decode_all(encoded, skip=True)):
    with pytest.raises(MemoryError):
      read()

  monkeypatch.setattr(images, "decode", lambda *_: no_memory([]))
  with pytest.raises(MemoryError):
    on_demand(data_set(4, set()), skip=True)(np.array([0]))
  monkeypatch.undo()

  def no_handle(file):
    raise OSError(errno.EMFILE, "Too many open files", "x.png")

  monkeypatch.setattr(Image, "open", no_handle)  # else another image would be trained on, here and this time only
  encoded = EncodedImages(**{**vars(data_set(4, set())), "fetch": lambda _: [png(0, pnginfo=TEXT)]})
  with pytest.raises(RunError, match=r"number 0 cannot be opened \(Too many open files\)"):
    on_demand(encoded, skip=True)(np.array([0]))


def test_batches_with_bad_images_are_a_function_of_seed_and_step():
  length, bad = 50, {3, 4, 20, 49}
  indices = pipeline.order(length, batch_size=16, seed=7)

  def take(start, count, **options):
    source = Source("numbers", (2, 2, 1), length, on_demand(data_set(length, bad), skip=True))
    stream = pipeline.batches(source, batch_size=16, seed=7, start_step=start, **options)
    try:
      return list(itertools.islice(stream, count))
    finally:
      stream.close()

  alone, later = take(0, 6), take(4, 2, threads=1)
  shares = [take(0, 6, process_index=p, process_count=2, threads=5) for p in range(2)]
  for step, batch in enumerate(alone):
    expected = [stand_in(int(index), length, bad) for index in indices[step]]
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], expected)
    np.testing.assert_array_equal(batch["replaced"], [int(index) in bad for index in indices[step]])
    for name, value in batch.items():
      np.testing.assert_array_equal(np.concatenate([share[step][name] for share in shares]), value)
      if step >= 4:
        np.testing.assert_array_equal(later[step - 4][name], value)
  assert sum(batch["replaced"].sum() for batch in alone) > 0
