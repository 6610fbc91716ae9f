"""Paths that a command names: made absolute, and looked at without a traceback where that cannot be done."""

from __future__ import annotations

import os
import pathlib
import pwd
import shlex
import sys

from ddpm_jax.errors import UserError


def absolute(flag: str, text: str, remedy: str) -> pathlib.Path:
  """The absolute path that the value of a flag means, `~` and all.

  Raises:
    UserError: if it is the address of something else, with that remedy, or as `expanded` and `from_here`.
  """
  if "://" in text:
    raise UserError(f"{flag}: {text!r} is no path in a file system; {remedy}")
  return pathlib.Path(from_here(flag, expanded(flag, text)))


def from_here(flag: str, path: str) -> str:
  """The path, absolute: as it is, or from the working directory on.

  Raises:
    UserError: if it is relative and the working directory no longer exists.
  """
  if os.path.isabs(path):
    return path
  try:
    return os.path.join(os.getcwd(), path)
  except FileNotFoundError:
    raise UserError(
      f"{flag}: {path!r} is relative, and the working directory no longer exists; cd to another"
    ) from None


def expanded(flag: str, text: str) -> str:
  """The value of a flag with the home that `~` or `~name` stands for: no shell does that after `--flag=`.

  Raises:
    UserError: if it begins with the home of nobody.
  """
  if text == "~" or text.startswith("~/"):
    folder = home()
    path = os.path.join(folder, text[2:]) if folder else text
  else:
    path = os.path.expanduser(text)
  if text.startswith("~") and not os.path.isabs(path):
    raise UserError(f"{flag}: {text!r} begins with the home of nobody here; write the whole path")
  return path


def home() -> pathlib.Path | None:
  """The home folder of this user; None if neither HOME nor the system's list of users names one."""
  text = os.environ.get("HOME", "")
  if not os.path.isabs(text):
    try:
      text = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # a user id without an entry, as under `docker run -u 12345`
      return None
  return pathlib.Path(text) if os.path.isabs(text) else None


def cache_folder() -> pathlib.Path | None:
  """The folder of what the program could make again: `ddpm_jax` in XDG_CACHE_HOME or ~/.cache; None without a home."""
  base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
  if not base.is_absolute():  # is to be ignored, says its specification
    folder = home()
    if folder is None:
      return None
    base = folder / ".cache"
  return base / "ddpm_jax"


def command(*flags: str, module: str = "ddpm_jax.main") -> str:
  """A command to be printed, which can be pasted into a shell whatever is in its paths.

  It is a `ddpm` where this program was started so, and else a `python -m MODULE`.
  """
  if os.path.basename(sys.argv[0]) != "ddpm":
    return shlex.join(["python", "-m", module, *flags])
  if module != "ddpm_jax.main":
    return shlex.join(["ddpm", module.rpartition(".")[2], *flags])
  mode = "--mode="
  return shlex.join(["ddpm", *(flag.removeprefix(mode) for flag in flags[:1]), *flags[1:]])


def check_name(flag: str, path: pathlib.Path, also: str = "") -> None:
  """Raises UserError if a path cannot be written into files or printed, or has one of the characters `also`."""
  text, option = str(path), flag if flag.isupper() else f"--{flag}"
  try:
    text.encode()
  except UnicodeEncodeError:
    if sys.getfilesystemencoding() != "utf-8" and _is_utf8(os.fsencode(text)):
      raise UserError(
        f"{flag}: this locale cannot spell the name {text!a}; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
      ) from None
    raise UserError(f"{flag}: the name {text!a} is not UTF-8; use another {option}") from None
  for letter in text:
    if letter in also or ord(letter) < 32 or ord(letter) == 127:
      raise UserError(
        f"{flag}: the name {text!a} has the character {letter!a}, with which files cannot be written safely; use "
        f"another {option}"
      )


def _is_utf8(name: bytes) -> bool:
  try:
    name.decode()
  except UnicodeDecodeError:
    return False
  return True


def exists(flag: str, path: pathlib.Path) -> bool:
  """Whether something is there. Raises UserError if that cannot be seen."""
  try:
    return path.exists()
  except OSError as error:
    raise UserError(f"{flag}: cannot look into {path} ({error.strerror}); use another --{flag}") from error
