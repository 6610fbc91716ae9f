"""Makes the data of the presets emoji32 and emoji64: the pictures of a font, 64x64, in the zip layout of EDM.

  pip install uharfbuzz
  apt-get download fonts-noto-color-emoji
  python experiments/make_emoji.py --font=fonts-noto-color-emoji_2.042-0+deb12u1_all.deb --emoji_test=emoji-test.txt

The first file is Debian 12's package, or a NotoColorEmoji.ttf; the second one, with the names of the groups, is
https://unicode.org/Public/emoji/latest/emoji-test.txt. Both may be left out where the packages fonts-noto-color-emoji
and unicode-data are installed. Version 2.042 of the font and version 17.0 of the list make 3,754 pictures: those that
this project measured with. Other versions make nearly the same.

Each picture is composited on white, centred on a square and resized; of equal ones the first is kept. There is a folder
for each of nine groups of Unicode, and dataset.json has the labels 0 to 8. Same input, same Pillow: the same file. The
pictures are part of the font (SIL Open Font License 1.1). Needs nothing of ddpm_jax.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator

from fontTools.ttLib import TTFont, TTLibError
from PIL import Image

SIZE = 64
FONT = pathlib.Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # where Debian's packages put them
EMOJI_TEST = pathlib.Path("/usr/share/unicode/emoji/emoji-test.txt")
_DATE = (2023, 11, 29, 0, 0, 0)  # of Debian's package


def read(path: pathlib.Path, name: str) -> bytes:
  """The content of a file, or of the file called `name` in a package of Debian. Exits with a message."""
  if not path.is_file():
    sys.exit(f"There is no file {path}: name another one, see --help.")
  if path.suffix != ".deb":
    return path.read_bytes()
  if not shutil.which("dpkg-deb"):
    sys.exit(f"{path} needs dpkg-deb to be unpacked: unpack it elsewhere, and name the file {name} itself.")
  unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE, check=False).stdout
  try:
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
      for member in archive:
        if pathlib.PurePosixPath(member.name).name == name and (file := archive.extractfile(member)):
          return file.read()
  except tarfile.TarError:
    sys.exit(f"{path} is not a whole package of Debian: download it again.")
  sys.exit(f"{path} holds no file {name}: take another package, see --help.")


def read_groups(text: str) -> dict[str, list[tuple[int, ...]]]:
  """Group -> the sequences of code points of its pictures, in the order of Unicode's emoji-test.txt."""
  groups: dict[str, list[tuple[int, ...]]] = {}
  group = ""
  for line in text.splitlines():
    if line.startswith("# group:"):
      group = line.partition(":")[2].strip().lower().replace(" & ", "-")
    fields = line.partition("#")[0].split(";")
    if len(fields) == 2 and fields[1].strip() == "fully-qualified":
      groups.setdefault(group, []).append(tuple(int(code, 16) for code in fields[0].split()))
  return groups


def file_name(codes: tuple[int, ...]) -> str:
  """The code points in hexadecimal; of one character alone without the U+FE0F that asks for a picture."""
  shown = codes[:1] if codes[1:] == (0xFE0F,) else codes
  return "-".join(f"{code:04x}" for code in shown)


class Pictures:
  """The bitmaps of a font."""

  def __init__(self, content: bytes) -> None:
    """Exits with a message if they cannot be read."""
    try:
      import uharfbuzz
    except ImportError:
      sys.exit("uharfbuzz, which finds the picture of a sequence, is missing; run: pip install uharfbuzz")
    try:
      font = TTFont(io.BytesIO(content))
    except TTLibError as error:
      sys.exit(f"The font cannot be read ({error}): take NotoColorEmoji.ttf of Debian's fonts-noto-color-emoji.")
    if "CBDT" not in font:
      sys.exit("The font has no bitmaps (table CBDT): take NotoColorEmoji.ttf of Debian's fonts-noto-color-emoji.")
    self._bitmaps = font["CBDT"].strikeData[0]
    self._names = font.getGlyphOrder()
    self._harfbuzz, self._shaper = uharfbuzz, uharfbuzz.Font(uharfbuzz.Face(content))

  def find(self, codes: tuple[int, ...]) -> Image.Image | None:
    """The picture of a sequence, RGB [SIZE, SIZE]; None where the font has none for the whole of it."""
    buffer = self._harfbuzz.Buffer()
    buffer.add_codepoints(list(codes))
    buffer.guess_segment_properties()
    self._harfbuzz.shape(self._shaper, buffer)
    glyphs = [self._names[glyph.codepoint] for glyph in buffer.glyph_infos]
    if len(glyphs) != 1 or glyphs[0] not in self._bitmaps:
      return None
    picture = Image.open(io.BytesIO(self._bitmaps[glyphs[0]].imageData)).convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def different(pictures: Pictures, groups: dict[str, list[tuple[int, ...]]]) -> Iterator[tuple[str, str, Image.Image]]:
  """Group, file name and picture; the first of those that are equal."""
  seen = set()
  for group, sequences in groups.items():
    for codes in sorted(sequences, key=file_name):
      # One character of the first plane is a letter unless U+FE0F follows, so it is asked for with it.
      picture = pictures.find((*codes, 0xFE0F) if len(codes) == 1 and codes[0] < 0x10000 else codes)
      if picture and picture.tobytes() not in seen:
        seen.add(picture.tobytes())
        yield group, file_name(codes), picture


def write(pictures: Pictures, groups: dict[str, list[tuple[int, ...]]], path: pathlib.Path) -> int:
  """Writes the zip, whole or not at all; returns the number of pictures."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  labels, names = [], []
  with zipfile.ZipFile(temporary, "w") as archive:
    for group, name, picture in different(pictures, groups):
      if group not in names:
        names.append(group)
      file = io.BytesIO()
      picture.save(file, "PNG", optimize=True)
      labels.append([f"{group}/{name}.png", len(names) - 1])
      archive.writestr(zipfile.ZipInfo(labels[-1][0], _DATE), file.getvalue())
    table = json.dumps({"labels": labels, "label_names": names}, indent=0)
    archive.writestr(zipfile.ZipInfo("dataset.json", _DATE), table)
  temporary.replace(path)
  return len(labels)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--font", type=pathlib.Path, default=FONT, help="NotoColorEmoji.ttf, or the package with it")
  parser.add_argument("--emoji_test", type=pathlib.Path, default=EMOJI_TEST, help="emoji-test.txt of Unicode")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("data/emoji64.zip"), help="what to write")
  arguments = parser.parse_args()
  groups = read_groups(read(arguments.emoji_test, "emoji-test.txt").decode())
  if not groups:
    sys.exit(f"{arguments.emoji_test} has no groups: it is not Unicode's emoji-test.txt.")
  number = write(Pictures(read(arguments.font, "NotoColorEmoji.ttf")), groups, arguments.out)
  print(f"Written: {arguments.out}, {number} pictures. Train on it with --preset=emoji32")


if __name__ == "__main__":
  main()
