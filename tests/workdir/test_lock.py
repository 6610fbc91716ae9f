"""The lock of a workdir, against real processes."""

import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from ddpm_jax.errors import RunError, UserError
from ddpm_jax.workdir import lock

HOLD = "import sys, pathlib; from ddpm_jax.workdir.lock import Lock; lock = Lock(pathlib.Path(sys.argv[1])); "


def start(folder: pathlib.Path, then: str = "print('locked', flush=True); sys.stdin.read()") -> subprocess.Popen:
  """Another process, which locks `folder` and waits."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD + then, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "locked\n"
  return process


def end(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
  process.send_signal(number)
  process.communicate()


def refusal(folder: pathlib.Path) -> str:
  with pytest.raises(UserError) as caught:
    lock.Lock(folder)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_the_second_is_refused_and_told_who_is_first(tmp_path):
  other = start(tmp_path)
  text = refusal(tmp_path)
  assert re.fullmatch(
    f"workdir: {tmp_path} is being trained by process {other.pid} on host {re.escape(socket.gethostname())} since "
    r"20\d\d-\d\d-\d\dT[\d:]+[+-]\d\d:\d\d; wait for it or stop it, or use another --workdir",
    text,
  )
  assert json.loads((tmp_path / "lock").read_text())["pid"] == other.pid, "the second has written its own name"
  open_files = [os.path.realpath(link) for link in pathlib.Path("/proc/self/fd").iterdir()]
  assert str(tmp_path / "lock") not in open_files
  end(other)


def test_a_process_that_was_killed_leaves_no_lock(tmp_path, capfd):
  (tmp_path / "lock").write_text(json.dumps({"host": "h" * 500, "pid": 1, "started": "long ago"}))
  end(start(tmp_path))
  assert len((tmp_path / "lock").read_text()) < 500
  mine = lock.Lock(tmp_path)
  assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
  mine.check()
  mine.close()
  assert capfd.readouterr() == ("", "")


def test_one_that_is_about_to_end_is_waited_for(tmp_path):
  other = start(tmp_path, "print('locked', flush=True); import time; time.sleep(0.4)")
  lock.Lock(tmp_path).close()
  other.communicate()


def test_a_clean_end_frees_the_workdir(tmp_path):
  for _ in range(2):
    lock.Lock(tmp_path).close()
  other = start(tmp_path)
  end(other)


def test_the_folder_is_made(tmp_path):
  mine = lock.Lock(tmp_path / "a" / "b")
  assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["lock"]
  mine.check()
  mine.close()


CHILD = "import time; print('locked', flush=True); time.sleep(60)"


def test_a_program_that_outlives_the_trainer_does_not_hold_the_lock(tmp_path):
  then = (
    f"import subprocess; child = subprocess.Popen([sys.executable, '-c', {CHILD!r}], close_fds=False); child.wait()"
  )
  other = start(tmp_path, then)
  children = pathlib.Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
  other.kill()
  other.wait()
  lock.Lock(tmp_path).close()
  os.kill(int(children[0]), signal.SIGKILL)  # fails if the child is not alive any more
  other.communicate()


def test_a_fork_that_outlives_the_trainer_does_not_hold_the_lock(tmp_path):
  then = "import os, time; child = os.fork(); child and print('locked', flush=True); time.sleep(60)"
  other = start(tmp_path, then)
  time.sleep(0.1)
  children = pathlib.Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
  other.kill()
  other.wait()
  lock.Lock(tmp_path).close()
  os.kill(int(children[0]), signal.SIGKILL)
  other.communicate()


def test_a_fork_does_not_free_the_lock(tmp_path):
  then = "import os; child = os.fork() or os._exit(0); os.waitpid(child, 0); print('locked', flush=True); "
  other = start(tmp_path, then + "sys.stdin.read()")
  assert f"process {other.pid} " in refusal(tmp_path)
  end(other)


def deleted(folder: pathlib.Path) -> None:
  shutil.rmtree(folder)


def made_anew(folder: pathlib.Path) -> None:
  shutil.rmtree(folder)
  lock.Lock(folder).close()


def moved(folder: pathlib.Path) -> None:
  folder.rename(folder.with_name("elsewhere"))


def copied(folder: pathlib.Path) -> None:
  folder.rename(folder.with_name("elsewhere"))
  shutil.copytree(folder.with_name("elsewhere"), folder)


def made_a_file(folder: pathlib.Path) -> None:
  shutil.rmtree(folder)
  folder.write_text("")


@pytest.mark.parametrize("change", [deleted, made_anew, moved, copied, made_a_file])
def test_a_workdir_that_was_replaced(tmp_path, change):
  folder = tmp_path / "run"
  mine = lock.Lock(folder)
  mine.check()
  change(folder)
  with pytest.raises(RunError) as caught:
    mine.check()
  assert str(caught.value) == (
    f"workdir: {folder} has vanished, or was replaced, while this run was training; nothing more is written"
  )
  mine.close()


def test_storage_that_does_not_answer_is_no_vanished_workdir(tmp_path, monkeypatch):
  mine = lock.Lock(tmp_path)

  def lstat(path):
    raise OSError(errno.EIO, "Input/output error")

  with monkeypatch.context() as patch:
    patch.setattr(os, "lstat", lstat)
    mine.check()
  mine.close()


def test_a_lock_that_is_deleted_between_opening_and_locking_is_made_anew(tmp_path, monkeypatch):
  flock, done = fcntl.flock, []

  def late(file, how):
    if not done:
      done.append((tmp_path / "lock").unlink())
      (tmp_path / "lock").write_text("")
    flock(file, how)

  monkeypatch.setattr(fcntl, "flock", late)
  mine = lock.Lock(tmp_path)
  mine.check()
  other = refusal(tmp_path)
  assert f"process {os.getpid()} " in other
  mine.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capfd, number):
  def flock(file, how):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, "flock", flock)
  mine = lock.Lock(tmp_path)
  out, err = capfd.readouterr()
  assert (out, err.count("\n")) == ("", 1)
  assert err.startswith(f"warning: {tmp_path / 'lock'}: this file system has no locks")
  mine.check()
  mine.close()


@pytest.mark.parametrize("text", ["", "{", "3", "{}", "null"])
def test_a_holder_without_a_name(tmp_path, text):
  other = start(tmp_path)
  (tmp_path / "lock").write_text(text)
  assert "is being trained by another process;" in refusal(tmp_path)
  end(other)


def test_a_full_disk(tmp_path, monkeypatch):
  def pwrite(file, data, offset):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(os, "pwrite", pwrite)
    assert refusal(tmp_path) == (
      f"workdir: cannot write {tmp_path / 'lock'} (No space left on device); use another --workdir"
    )
  lock.Lock(tmp_path).close()


def test_something_else_in_its_place(tmp_path):
  (tmp_path / "lock").mkdir()
  assert "cannot write" in refusal(tmp_path)
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "mine").write_text("mine")
  (tmp_path / "run" / "lock").symlink_to("mine")
  assert "cannot write" in refusal(tmp_path / "run")
  assert (tmp_path / "run" / "mine").read_text() == "mine"
