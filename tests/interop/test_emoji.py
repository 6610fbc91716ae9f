"""experiments/make_emoji.py on a font of five bitmaps, with HarfBuzz itself.

pip install -e '.[test,interop]'
python -m pytest tests/interop
"""

import io
import json
import struct
import sys
import zipfile

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables._g_l_y_f import Glyph
from PIL import Image

from experiments import make_emoji

EMOJI_TEST = """# emoji-test.txt
# group: Smileys & Emotion
# subgroup: face-smiling
1F602             ; fully-qualified     # same as the next
1F600             ; fully-qualified     # sorted first
2600 FE0F         ; fully-qualified     # sun
2600              ; unqualified         # sun
2728              ; fully-qualified     # the font has no picture of this with U+FE0F
1F9FF             ; fully-qualified     # the font knows nothing of this
# group: Component
1F3FB             ; component           # skin
# group: Flags
1F1E9 1F1EA       ; fully-qualified     # two letters, one picture
1F1E9 1F1EB       ; fully-qualified     # two letters, no picture
"""
RED, BLUE = (200, 30, 40, 255), (10, 20, 250, 255)


def picture(width, height, colour):
  stream = io.BytesIO()
  image = Image.new("RGBA", (width, height), colour)
  image.paste((0, 0, 0, 0), (width // 2 - 8, height // 2 - 8, width // 2 + 8, height // 2 + 8))  # a hole
  image.save(stream, "PNG")
  return stream.getvalue()


def table(tag, data):
  made = newTable(tag)
  made.data, made.compile = data, lambda _: data
  return made


def font():
  """Tables CBLC and CBDT as OpenType 1.9 describes them: one size, index format 1, image format 17."""
  bitmaps = {
    "grin": picture(136, 128, RED),
    "joy": picture(136, 128, RED),
    "sun": picture(128, 128, BLUE),
    "stars": picture(128, 128, (1, 2, 3, 255)),
    "de": picture(128, 64, BLUE),
  }
  names = [".notdef", *bitmaps, "space", "d", "e", "f"]
  builder = FontBuilder(unitsPerEm=2048)
  builder.setupGlyphOrder(names)
  codes = {
    0x1F600: "grin",
    0x1F602: "joy",
    0x2600: "sun",
    0x2728: "stars",
    0x20: "space",
  }  # the space stands for a U+FE0F of no use
  codes |= {0x1F1E9: "d", 0x1F1EA: "e", 0x1F1EB: "f"}
  builder.setupCharacterMap(codes, uvs=[(0x2600, 0xFE0F, None)])
  builder.setupGlyf({name: Glyph() for name in names})
  builder.setupHorizontalMetrics(dict.fromkeys(names, (2048, 0)))
  builder.setupHorizontalHeader()
  builder.setupOS2()
  builder.setupPost()
  builder.addOpenTypeFeatures("feature ccmp { sub d e by de; } ccmp;")
  records = [struct.pack(">5BI", 128, 128, 0, 100, 128, len(file)) + file for file in bitmaps.values()]
  ends = np.cumsum([0, *map(len, records)])
  index = struct.pack(">HHI", 1, len(records), 8) + struct.pack(">HHI", 1, 17, 4) + ends.astype(">u4").tobytes()
  size = struct.pack(">4I", 56, len(index), 1, 0) + bytes(24) + struct.pack(">2H4B", 1, len(records), 109, 109, 32, 1)
  builder.font["CBLC"] = table("CBLC", struct.pack(">HHI", 3, 0, 1) + size + index)
  builder.font["CBDT"] = table("CBDT", struct.pack(">HH", 3, 0) + b"".join(records))
  stream = io.BytesIO()
  builder.save(stream)
  return stream.getvalue()


@pytest.fixture
def make(tmp_path, monkeypatch):
  """Runs the script; returns the path of its zip."""
  (tmp_path / "emoji-test.txt").write_text(EMOJI_TEST)
  (tmp_path / "font.ttf").write_bytes(font())

  def run(out="emoji.zip", **files):
    files = {"font": tmp_path / "font.ttf", "emoji_test": tmp_path / "emoji-test.txt"} | files
    words = [f"--{name}={path}" for name, path in files.items()]
    monkeypatch.setattr(sys, "argv", ["make_emoji.py", *words, f"--out={tmp_path / out}"])
    make_emoji.main()
    return tmp_path / out

  return run


def test_a_zip_of_pictures_and_labels(make):
  path = make()
  with zipfile.ZipFile(path) as archive:
    assert archive.namelist() == [
      "smileys-emotion/1f600.png",
      "smileys-emotion/2600.png",
      "flags/1f1e9-1f1ea.png",
      "dataset.json",
    ]
    assert json.loads(archive.read("dataset.json")) == {
      "labels": [["smileys-emotion/1f600.png", 0], ["smileys-emotion/2600.png", 0], ["flags/1f1e9-1f1ea.png", 1]],
      "label_names": ["smileys-emotion", "flags"],
    }
    grin, sun, flag = (np.asarray(Image.open(archive.open(name))) for name in archive.namelist()[:3])
    assert {entry.date_time for entry in archive.infolist()} == {make_emoji._DATE}, "not that of today"
  for pixels in (grin, sun, flag):
    assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
    np.testing.assert_array_equal(pixels[32, 32], 255)  # the hole
  # 4 of 136 rows above and below the picture are white.
  np.testing.assert_array_equal(grin[[0, -1]], 255)
  np.testing.assert_array_equal(grin[[5, -6], :8], np.broadcast_to(RED[:3], (2, 8, 3)))
  np.testing.assert_array_equal(sun[[0, -1], :8], np.broadcast_to(BLUE[:3], (2, 8, 3)))
  np.testing.assert_array_equal(flag[:12], 255)
  np.testing.assert_array_equal(flag[20, :16], np.broadcast_to(BLUE[:3], (16, 3)))
  assert make("again.zip").read_bytes() == path.read_bytes()


def test_what_is_missing_is_one_line(make, tmp_path, monkeypatch):
  (tmp_path / "text").write_text("no font, and no list")
  (tmp_path / "broken.deb").write_text("no package")
  whole = FontBuilder(unitsPerEm=1000)
  whole.setupGlyphOrder([".notdef"])
  whole.save(tmp_path / "plain.ttf")
  for files, message in (
    ({"font": tmp_path / "none.ttf"}, "There is no file .*none.ttf"),
    ({"font": tmp_path / "text"}, "The font cannot be read"),
    ({"font": tmp_path / "plain.ttf"}, "The font has no bitmaps"),
    ({"font": tmp_path / "broken.deb"}, "broken.deb (is not a whole package|needs dpkg-deb)"),
    ({"emoji_test": tmp_path / "text"}, "text has no groups"),
  ):
    with pytest.raises(SystemExit, match=rf"^[^\n]*{message}[^\n]*$"):
      make(**files)
  monkeypatch.setitem(sys.modules, "uharfbuzz", None)
  with pytest.raises(SystemExit, match=r"^uharfbuzz[^\n]* run: pip install uharfbuzz$"):
    make()
  assert not list(tmp_path.glob("*.zip"))
