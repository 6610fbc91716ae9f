"""Output that fails in every way: nothing raises, nothing waits for long, and what can be written is, in order."""

import base64
import datetime
import errno
import io
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import pytest

from ddpm_jax.runtime import console

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import pathlib, sys, time
from ddpm_jax.runtime import console
console.protect_streams()
began = time.monotonic()
for i in range(3):
  console.say(f"{i} é")
  console.warn("something")
  print("a library")
  print("its warning", file=sys.stderr)
with open(sys.argv[1], "x") as file:
  assert file.fileno() > 2, "a file has the number of a standard stream"
  file.write(str(time.monotonic() - began))
raise SystemExit(7)
"""
SAID = "0 é\na library\n1 é\na library\n2 é\na library\n"
WARNED = "warning: something\nits warning\n" * 3


def fill(pipe):
  os.set_blocking(pipe, False)
  try:
    while True:
      os.write(pipe, b"x" * 4096)
  except BlockingIOError:
    os.set_blocking(pipe, True)


def streams(way):
  """What a program gets as standard output and standard error, and what must stay open meanwhile."""
  if way == "full disk":
    return os.open("/dev/full", os.O_WRONLY), ()
  if way == "terminal is gone":
    master, slave = os.openpty()
    os.close(master)
    return slave, ()
  reader, writer = os.pipe()
  if way == "nobody reads any more":
    os.close(reader)
    return writer, ()
  fill(writer)
  if way == "reader is paused, pipe does not block":
    os.set_blocking(writer, False)
  return writer, (reader,)


WAYS = [
  *("full disk", "terminal is gone", "nobody reads any more", "reader is paused"),
  "reader is paused, pipe does not block",
]


def run(*arguments, **options):
  return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, timeout=60, **options)


@pytest.mark.parametrize("way", WAYS)
def test_output_that_fails_changes_neither_the_run_nor_its_exit_code(tmp_path, way):
  number, others = streams(way)
  began = time.monotonic()
  assert run(tmp_path / "told", stdout=number, stderr=number).returncode == 7
  assert time.monotonic() - began < 20  # with two streams that get a second each for their last words
  for each in (number, *others):
    os.close(each)
  assert float((tmp_path / "told").read_text()) < 3


def test_streams_that_are_closed_are_no_place_for_a_file(tmp_path):
  code = (
    f"import os; os.closerange(0, 3); os.execv({sys.executable!r}, [{sys.executable!r}, '-c', {PROGRAM!r}, 'told'])"
  )
  done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
  assert done.returncode == 7 and (tmp_path / "told").exists()


def test_everything_arrives_and_what_an_encoding_lacks_is_escaped(tmp_path):
  for encoding, said in (("utf-8", SAID), ("ascii", SAID.replace("é", "\\xe9"))):
    done = run(tmp_path / encoding, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (7, said, WARNED)


@pytest.fixture
def outlet():
  """(descriptor) -> what writes there; ended with the test."""
  made = []

  def make(number):
    made.append(console._Outlet(number))
    return made[-1]

  yield make
  for each in made:
    each._over = True


@pytest.fixture
def pipe():
  reader, writer = os.pipe()
  yield reader, writer
  os.close(reader)
  os.close(writer)


def test_a_name_neither_ends_the_line_nor_commands_the_terminal(capsys):
  """Names of files and of classes hold whatever somebody else has put there."""
  console.note("skipped: a\nb\x1b[31m\x85.png é")
  console.error("dataset: c\r\u2028d", "stack\n")
  told = "skipped: a\\nb\\x1b[31m\\x85.png é\nerror: dataset: c\\r\\u2028d\nstack\n"
  assert capsys.readouterr() == ("", told)


def test_two_streams_to_one_place_keep_their_order(pipe, outlet):
  both = [outlet(pipe[1]), outlet(pipe[1])]
  for i in range(100):
    both[i % 2].write(f"{i}\n".encode())
  assert os.read(pipe[0], 2**16).decode().split() == [str(i) for i in range(100)]


# Pictures.


KITTY, ITERM = {"TERM": "xterm-kitty"}, {"TERM_PROGRAM": "WezTerm", "TERM": "xterm-256color"}


class Screen(io.StringIO):
  encoding = "utf-8"

  def isatty(self):
    return True


def shown(monkeypatch, path, stream, **environment):
  for name in ("TERM", "TERM_PROGRAM", "LC_TERMINAL", "KITTY_WINDOW_ID", "TMUX"):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(sys, "stdout", stream)
  console.show_png(path)
  return stream.getvalue()


def test_a_picture_on_a_terminal_that_shows_pictures(tmp_path, monkeypatch):
  """What was sent, put together again as the protocols say."""
  path, data = tmp_path / "a.png", bytes(range(256)) * 50
  path.write_bytes(data)
  sent = shown(monkeypatch, path, Screen(), **KITTY)
  parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", sent)
  assert "".join(f"\x1b_G{keys};{part}\x1b\\" for keys, part in parts) + "\n" == sent
  assert parts[0][0] == "a=T,f=100,q=2,m=1" and {keys for keys, _ in parts[1:-1]} == {"m=1"} and parts[-1][0] == "m=0"
  assert all(len(part) <= 4096 for _, part in parts) and base64.b64decode("".join(part for _, part in parts)) == data
  sent = shown(monkeypatch, path, Screen(), **ITERM)
  head, _, rest = sent.partition(":")
  assert head == f"\x1b]1337;File=inline=1;size={len(data)};preserveAspectRatio=1" and rest.endswith("\a\n")
  assert base64.b64decode(rest[:-2]) == data
  path.write_bytes(b"small")
  assert shown(monkeypatch, path, Screen(), **KITTY) == "\x1b_Ga=T,f=100,q=2,m=0;c21hbGw=\x1b\\\n"


def test_no_picture_where_it_would_be_a_page_of_letters(tmp_path, monkeypatch):
  path = tmp_path / "a.png"
  path.write_bytes(b"picture")
  for environment in ({}, {"TERM": "xterm-256color"}, KITTY | {"TMUX": "x"}, ITERM | {"TERM": "screen-256color"}):
    assert shown(monkeypatch, path, Screen(), **environment) == ""
  assert shown(monkeypatch, path, io.StringIO(), **KITTY) == ""  # a file, or a pipe
  path.write_bytes(bytes(600_000))
  assert shown(monkeypatch, path, Screen(), **KITTY) == "", "more than may wait to be written"


def test_lines_wait_for_a_reader_and_the_oldest_are_left_out_and_counted(pipe, outlet, monkeypatch):
  monkeypatch.setattr(console, "_MOST_BYTES", 300)
  fill(pipe[1])
  stream, began = outlet(pipe[1]), time.monotonic()
  for i in range(1000):
    stream.write(f"line {i:04}\n".encode())
  assert time.monotonic() - began < 5
  text = b""
  while b"line 0999\n" not in text:
    text += os.read(pipe[0], 2**16)
  # The first was under way; of the others the last 30 found room.
  waited = "".join(f"line {i:04}\n" for i in range(970, 1000))
  assert text.decode().lstrip("x") == (
    f"line 0000\nwarning: 969 lines could not be written here and are left out\n{waited}"
  )


def test_a_disk_that_was_full_gets_what_was_said_meanwhile(pipe, outlet, monkeypatch):
  full, write = threading.Event(), os.write

  def on_a_disk(file, data):
    if full.is_set():
      raise OSError(errno.ENOSPC, "No space left on device")
    return write(file, data[:4])  # in parts

  monkeypatch.setattr(console.os, "write", on_a_disk)
  monkeypatch.setattr(console, "_RETRY_S", 0.01)
  stream = outlet(pipe[1])
  stream.write(b"before\n")
  full.set()
  began = time.monotonic()
  for i in range(50):
    stream.write(f"while it was full {i}\n".encode())
  assert time.monotonic() - began < 5
  full.clear()
  stream.drain()
  expected = "before\n" + "".join(f"while it was full {i}\n" for i in range(50))
  assert os.read(pipe[0], 2**16).decode() == expected


class Written(io.StringIO):
  """A stream that is a terminal, or none."""

  def __init__(self, terminal):
    super().__init__()
    self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_of_a_log_begin_with_the_time(monkeypatch, terminal):
  """Each line that has something in it, but the one that says why a process ends, and none on a terminal."""
  out, err = Written(terminal), Written(terminal)
  monkeypatch.setattr(sys, "stdout", out)
  monkeypatch.setattr(sys, "stderr", err)
  monkeypatch.setattr(console, "_times", False)
  console.say("before")
  console.add_times()
  console.say("two\n\n  lines")
  console.warn("something")
  console.error("field: value; remedy", more="stack\n")
  lines = {"out": ["two", "", "  lines"], "err": ["warning: something"]}
  rest = {"out": out.getvalue().removeprefix("before\n"), "err": err.getvalue()}
  ended = "error: field: value; remedy\nstack\n"
  assert rest["err"].endswith(ended)
  rest["err"] = rest["err"].removesuffix(ended)
  for name, expected in lines.items():
    found = rest[name].splitlines()
    if not terminal:
      times = [datetime.datetime.fromisoformat(line.partition(" ")[0]) for line in found if line]
      now = datetime.datetime.now(datetime.UTC)
      assert len(times) > 0 and all(abs(now - time) < datetime.timedelta(minutes=1) for time in times)
      found = [line.partition(" ")[2] for line in found]
    assert found == expected


def test_without_protection_a_stream_that_fails_is_put_up_with(monkeypatch):
  """As in a notebook: the streams are somebody else's, or there are none."""

  class Broken(io.TextIOBase):
    encoding = "ascii"

    def write(self, text):
      assert text.isascii()
      raise BrokenPipeError

  for stream in (None, Broken()):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    console.say("é")
    console.warn("é")
    console.drain()
    assert console.columns() == 0
