"""Worker processes: the batches of threads, whatever happens. They start in seconds, so each test starts few."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import chex
import numpy as np
import pytest
from absl import flags
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data import pipeline, sources, workers
from ddpm_jax.data.images import BadRecord
from ddpm_jax.errors import RunError

ROOT = pathlib.Path(__file__).parents[2]
N, B = 21, 4


@pytest.fixture(autouse=True)
def parsed_flags():
  """As in the command; and every test ends its workers."""
  flags.FLAGS.mark_as_parsed()
  yield
  flags.FLAGS.unparse_flags()
  assert not workers_alive()


@pytest.fixture
def folder(tmp_path):
  """Image i has the pixels 10 i."""
  for index in range(N):
    Image.new("L", (3, 3), 10 * index).save(tmp_path / f"{index:02d}.png")
  return tmp_path


def workers_alive():
  return [child for child in multiprocessing.active_children() if child.name.startswith("grain-process-prefetch")]


def open_folder(folder, **options):
  return sources.open_source(DataConfig(dataset=f"folder:{folder}", cache_gib=0.0, **options))


def stream(source, **options):
  return contextlib.closing(pipeline.batches(source, **{"batch_size": B, "seed": 3, "start_step": 0, **options}))


def take(source, count, **options):
  with stream(source, **options) as batches:
    return list(itertools.islice(batches, count))


def test_the_batches_are_those_of_threads(folder):
  for index in range(N):  # also where each step takes other parts of the images
    pixels = np.arange(9, dtype=np.uint8)[None].repeat(3, 0) + 10 * index
    Image.fromarray(pixels.T if index % 2 else pixels).save(folder / f"{index:02d}.png")
  source = open_folder(folder, image_size=3, crop="random")
  expected = take(source, 14)
  for count, start, share in ((1, 0, {}), (2, 7, {}), (3, 5, {"process_index": 1, "process_count": 2})):
    found = take(source, 14 - start, start_step=start, workers=count, **share)
    for step, batch in enumerate(found, start):
      rows = slice(2, 4) if share else slice(None)
      chex.assert_trees_all_equal(batch, {name: value[rows] for name, value in expected[step].items()})
      assert all(type(value) is np.ndarray for value in batch.values())


def test_a_data_set_of_tfds(tmp_path_factory):
  source = sources.open_source(DataConfig(data_dir=str(tmp_path_factory.mktemp("tfds")), cache_gib=0.0))
  chex.assert_trees_all_equal(take(source, 3, workers=2), take(source, 3))


def test_images_in_memory_need_no_workers(folder):
  cached = sources.open_source(DataConfig(dataset=f"folder:{folder}"))
  with stream(cached, workers=2) as batches:
    next(batches)
    assert not workers_alive()


def with_read(source, read):
  """The source, but as images its workers give what `read` makes of the indices. It is sent there, by value."""

  def rows(indices, usual=source.remote.read):
    return usual(indices)._replace(images=read(indices))

  return dataclasses.replace(source, remote=source.remote._replace(read=rows))


def test_a_worker_is_a_child_that_hears_no_signal_and_starts_no_device(folder):
  me = os.getpid()

  def look(_):
    from jax._src import xla_bridge

    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    blocked = {number for number in (signal.SIGINT, signal.SIGTERM) if int(status["SigBlk"], 16) >> (number - 1) & 1}
    return np.array(
      [os.getppid() == me, len(blocked), xla_bridge.backends_are_initialized(), "tensorflow" in sys.modules], int
    )

  with stream(with_read(open_folder(folder), look), workers=1) as batches:
    assert next(batches)["image"].tolist() == [1, 2, 0, 0]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}  # here they are heard


def test_a_bad_image_ends_the_batches_in_its_place(folder):
  source = open_folder(folder)
  (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:50])
  first = next(step for step in range(9) if 5 in pipeline.images_of(source, step, batch_size=B, seed=3))
  with stream(source, workers=2) as batches:
    assert len(list(itertools.islice(batches, first))) == first
    with pytest.raises(BadRecord) as caught:
      next(batches)
  name = folder / "05.png"
  assert str(caught.value).startswith(f"dataset: {name} (image 5) is broken (")
  assert str(caught.value).endswith("; repair or remove it, or use --on_bad_record=skip")


def test_bad_images_that_are_skipped_are_told_of_here_and_once(folder, capfd):
  source = open_folder(folder, on_bad_record="skip")
  for index in (5, 17):
    (folder / f"{index:02d}.png").write_bytes(b"no image")
  found = take(source, 14, workers=2)  # more than two epochs
  told = sorted(capfd.readouterr().err.splitlines())
  assert [line.partition(" (")[0] for line in told] == [f"skipped: {folder / name}" for name in ("05.png", "17.png")]
  chex.assert_trees_all_equal(found, take(source, 14))
  assert sum(batch["replaced"].sum() for batch in found) >= 4
  assert capfd.readouterr().err == "", "the threads of the same source tell it again"


@pytest.mark.parametrize("error", [StopIteration(), KeyError("label"), MemoryError()], ids=lambda e: type(e).__name__)
def test_whatever_is_raised_in_a_worker_is_raised_here(folder, error):
  first = pipeline.order(N, batch_size=B, seed=3)[0]

  def read(indices, first=tuple(first)):
    if tuple(indices) == first:
      raise error
    return np.zeros(3)

  expected = RuntimeError if isinstance(error, StopIteration) else type(error)  # as it is, it would end the batches
  workers = 2 if expected is RuntimeError else 1  # a StopIteration would end the part of one worker alone
  with stream(with_read(open_folder(folder), read), workers=workers) as batches, pytest.raises(expected):
    next(batches)


def test_a_worker_that_is_killed_is_an_error_and_no_hang(folder):
  with stream(open_folder(folder), workers=2) as batches:
    next(batches)
    victim = workers_alive()[0]
    os.kill(victim.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RunError, match=r"^data_workers: .* died \(.*exit code -9\), .*--data_workers=0$"):
      list(itertools.islice(batches, 100))
    assert time.monotonic() - began < 10


def test_close_ends_workers_in_a_read_that_hangs(folder, monkeypatch):
  monkeypatch.setattr(workers, "_GRACE_S", 0.5)
  first = pipeline.order(N, batch_size=B, seed=3)[0]

  def read(indices, first=tuple(first)):
    if tuple(indices) != first:
      time.sleep(60)
    return np.zeros(3)

  batches = pipeline.batches(with_read(open_folder(folder), read), batch_size=B, seed=3, start_step=0, workers=2)
  next(batches)
  began = time.monotonic()
  batches.close()
  assert time.monotonic() - began < 8
  assert not workers_alive()


def test_workers_end_with_a_parent_that_is_killed(folder, tmp_path_factory):
  """And nothing is said about the memory that it shared with them."""
  script = f"""
    import multiprocessing, os, signal
    from absl import flags
    from ddpm_jax.config import DataConfig
    from ddpm_jax.data import pipeline, sources

    if __name__ == "__main__":
      flags.FLAGS.mark_as_parsed()
      source = sources.open_source(DataConfig(dataset={f"folder:{folder}"!r}, cache_gib=0.0))
      batches = pipeline.batches(source, batch_size={B}, seed=3, start_step=0, workers=2)
      next(batches), next(batches), next(batches)
      print(len(multiprocessing.active_children()), "workers", flush=True)
      os.kill(os.getpid(), signal.SIGKILL)
  """
  program = tmp_path_factory.mktemp("program") / "killed.py"  # it would be counted among the images
  program.write_text(textwrap.dedent(script))
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  # It comes back when the last process has ended that holds the pipes.
  ended = subprocess.run(
    [sys.executable, program], env=environment, capture_output=True, text=True, timeout=30, check=False
  )
  assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGKILL, "2 workers\n", "")
