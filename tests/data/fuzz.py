"""Damaged images of every format that Pillow both writes and opens: each is decoded, or named by a BadRecord.

Usage: python -m tests.data.fuzz [COUNT]. Decodes COUNT files (5,000) in processes of their own, 250 in each, so that a
decoder that takes the process with it is seen too, and prints how they ended. Exit code 1 if one ended otherwise.
"""

import collections
import io
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

from ddpm_jax.data import images

MODES = ("RGB", "L", "P", "RGBA", "I;16", "1", "CMYK", "LA")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # those that are taken from a folder; the content may be of any format
NOT_FUZZED = {"PDF", "EPS"}  # written, and not read; a program for Ghostscript, which is not decoded
PIXELS = 200_000  # the limit while fuzzing: a changed size costs milliseconds and not gigabytes
SHARE = 250


def sound_files() -> dict[str, list[bytes]]:
  """Format -> a small image of each mode that it can hold, with and without metadata."""
  Image.init()
  noise = np.random.default_rng(0).integers(0, 256, (14, 21, 3), np.uint8)
  exif = Image.Exif()
  exif[0x0112], exif[0x013B] = 6, "somebody"
  text = PngImagePlugin.PngInfo()
  text.add_text("note", "words " * 40, zip=True)
  text.add_itxt("note", "words " * 40, zip=True)
  found = collections.defaultdict(list)
  for kind in sorted(Image.SAVE.keys() & Image.OPEN.keys() - NOT_FUZZED):
    for mode in MODES:
      image = (
        Image.fromarray(noise).convert("L").convert(mode) if mode == "I;16" else Image.fromarray(noise).convert(mode)
      )
      for options in ({}, {"exif": exif, "icc_profile": b"profile" * 9, "pnginfo": text, "save_all": True}):
        stream = io.BytesIO()
        try:
          image.save(stream, kind, **options)
          images.decode(stream.getvalue(), 3, "sound")
        except (OSError, ValueError, KeyError, TypeError, NotImplementedError, images.BadRecord):
          continue  # the format has no such mode, or Pillow does not read what it writes
        if stream.getvalue() not in found[kind]:
          found[kind].append(stream.getvalue())
  return {kind: files for kind, files in found.items() if files}


def damaged(sound: dict[str, list[bytes]], index: int) -> tuple[str, str, bytes]:
  """File `index`: its format, a suffix, and its bytes. The formats take turns."""
  draw = random.Random(index)
  kind = sorted(sound)[index % len(sound)]
  content = bytearray(draw.choice(sound[kind]))
  reach = draw.choice((32, 128, len(content)))  # headers are short, and most of what a decoder decides is in them
  for _ in range(draw.choice((1, 1, 2, 5, 20))):
    at = draw.randrange(min(reach, len(content)) or 1)
    match draw.randrange(7):
      case 0:
        content[at : at + 1] = bytes([draw.randrange(256)])
      case 1:
        content[at : at + 1] = bytes([content[at] ^ 1 << draw.randrange(8)]) if content else b""
      case 2:
        content[at : at + 4] = draw.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
      case 3:
        del content[at : at + draw.choice((1, 2, 16))]
      case 4:
        content[at:at] = draw.randbytes(draw.choice((1, 4, 64)))
      case 5:
        other = draw.choice(sound[draw.choice(sorted(sound))])
        start = draw.randrange(len(other))
        content[at : at + 40] = other[start : start + draw.choice((8, 40, 400))]
      case 6:
        if draw.random() < 0.3:
          del content[draw.randrange(len(content) or 1) :]
  if kind == "PNG" and draw.random() < 0.5:
    content = with_checksums(content)
  return kind, draw.choice(SUFFIXES), bytes(content)


def with_checksums(png: bytes) -> bytes:
  """The same with the CRC of each chunk made right, so that the damage is not all found by it."""
  mended, at = bytearray(png), 8
  while at + 12 <= len(png):
    end = at + 8 + int.from_bytes(png[at : at + 4])
    mended[end : end + 4] = zlib.crc32(png[at + 4 : end]).to_bytes(4)[: max(0, len(png) - end)]
    at = end + 4
  return bytes(mended)


def outcome(file: pathlib.Path) -> str:
  """How reading a file ends: decoded, named, or with a traceback. From a path and from memory it must be the same."""
  ends = []
  for source in (file, file.read_bytes()):
    try:
      if isinstance(source, pathlib.Path):
        images.read_header(source, "this")
      pixels = images.decode(source, 3, "this", size=(8, 8))
      ends.append("decoded" if pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8 else f"{pixels.shape}")
    except images.BadRecord as error:
      ends.append("named" if str(error).startswith("dataset: this ") and "\n" not in str(error) else str(error))
    except Exception:  # what must not be: it is listed, and the next file is tried
      ends.append(traceback.format_exc(limit=-3))
  return ends[0] if ends[0] in ("decoded", "named") and ends[1] in ("decoded", "named") else "\n".join(ends)


def run(first: int, stop: int) -> collections.Counter:
  """(format, outcome) -> how many, of the files in that range."""
  sound = sound_files()
  counts = collections.Counter()
  before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, PIXELS
  try:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
      warnings.simplefilter("error")
      for index in range(first, stop):
        kind, suffix, content = damaged(sound, index)
        file = pathlib.Path(folder, f"{index}{suffix}")
        file.write_bytes(content)
        counts[kind, outcome(file)] += 1
        file.unlink()
  finally:
    Image.MAX_IMAGE_PIXELS = before
  return counts


def _share(first: int, stop: int) -> None:
  """A process of its own: prints a line for each (format, outcome)."""
  for (kind, end), count in run(first, stop).items():
    print(kind, count, repr(end))
  print("memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, repr("KiB"))


def main(count: int) -> int:
  """Returns the exit code."""
  total, others, memory, began = collections.defaultdict(collections.Counter), [], 0, time.monotonic()
  for first in range(0, count, SHARE):
    stop = min(first + SHARE, count)
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.data.fuzz", str(first), str(stop)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode or done.stderr:
      others.append(f"files {first} to {stop - 1}: exit code {done.returncode}\n{done.stderr}")
    for line in done.stdout.splitlines():
      kind, number, end = line.split(" ", 2)
      if kind == "memory":
        memory = max(memory, int(number) // 1024)
      else:
        total[kind][end.strip("'")] += int(number)
  for kind, ends in sorted(total.items()):
    print(f"{kind}: {ends['decoded']} decoded, {ends['named']} named")
    others += [f"{kind}: {number} x {end}" for end, number in ends.items() if end not in ("decoded", "named")]
  done = sum(sum(ends.values()) for ends in total.values())
  print(
    f"{done} files of {len(total)} formats: {sum(e['decoded'] for e in total.values())} decoded, "
    f"{sum(e['named'] for e in total.values())} named, {len(others)} otherwise; {time.monotonic() - began:.0f} s, "
    f"at most {memory} MiB"
  )
  print(*others, sep="\n")
  return int(bool(others) or done != count)


if __name__ == "__main__":
  arguments = [int(word) for word in sys.argv[1:]]
  if len(arguments) == 2:
    _share(*arguments)
  else:
    sys.exit(main(*arguments or (5000,)))
