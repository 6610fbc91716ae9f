"""Functions of many rows, which all devices share: in order, whole, and compiled once."""

import pathlib
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.devices import make_mesh
from ddpm_jax.devices.batched import BatchedFn, BatchedLoop, Loop, free_memory


def rowwise(constants, index, image):
  """Each row alone: [B, 2, 2] and [B]."""
  scaled = image * constants["factor"] + index[:, None, None].astype(jnp.float32)
  return {"scaled": scaled, "sum": scaled.sum((1, 2)) + 0.0}


def columns(number):
  return np.arange(number, dtype=np.int32), np.random.default_rng(0).normal(size=(number, 2, 2)).astype(np.float32)


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
@pytest.mark.parametrize(("number", "size"), [(1, 0), (7, 0), (8, 0), (9, 0), (5, 20), (20, 5), (16, 16)])
def test_rows_are_shared_and_come_back_in_order(mode, number, size):
  """NumPy's own arithmetic; any number of rows, also fewer than devices."""
  mesh = make_mesh(mode)
  constants = {"factor": jax.device_put(np.float32(3.0), mesh.replicated)}
  index, image = columns(number)
  with jax.numpy_rank_promotion("allow"):
    got = BatchedFn(rowwise, mesh)(constants, index, image, size=size)
  expected = image * 3 + index[:, None, None]
  assert type(got["scaled"]) is np.ndarray and got["scaled"].shape == (number, 2, 2) and got["sum"].shape == (number,)
  np.testing.assert_allclose(got["scaled"], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(got["sum"], expected.sum((1, 2)), rtol=1e-5, atol=1e-5)


def test_rows_compile_once_for_each_padded_number_and_lie_on_all_devices():
  mesh, traced = make_mesh("pmap"), []

  def function(constants, index):
    traced.append(index.shape)
    jax.debug.inspect_array_sharding(index, callback=lambda sharding: traced.append(len(sharding.device_set)))
    return index + constants

  by_rows = BatchedFn(function, mesh)
  one = jax.device_put(np.int32(1), mesh.replicated)
  assert by_rows.bytes_needed(one, np.zeros(1, np.int32), size=21) >= 24 * 4  # compiles for 24 rows
  for number, size in ((21, 0), (24, 0), (3, 21), (17, 20)):
    np.testing.assert_array_equal(by_rows(one, np.arange(number, dtype=np.int32), size=size), np.arange(number) + 1)
  assert traced.count((24,)) == 1 and 8 in traced and len(traced) == 2
  by_rows(one, np.arange(25, dtype=np.int32))
  assert traced.count((32,)) == 1


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
@pytest.mark.parametrize(("number", "size"), [(1, 0), (9, 0), (5, 20)])
def test_a_loop_in_stretches_is_the_loop(mode, number, size):
  """Against its closed form; every iteration once, in order."""
  mesh = make_mesh(mode)
  index, image = columns(number)

  def advance(factor, state, first, last, index, image):
    return jax.lax.fori_loop(first, last, lambda i, x: 2 * x + i * factor * image, state)

  loop = Loop(
    begin=lambda factor, index, image: image + 0.0,
    advance=advance,
    end=lambda factor, state, index, image: {"state": state, "index": index},
    number=6,
  )
  draw, told = BatchedLoop(loop, mesh), []
  got = draw(jax.device_put(np.float32(3.0), mesh.replicated), index, image, size=size, done=told.append)
  np.testing.assert_array_equal(got["index"], index)
  # x -> 2 x + 3 i y, six times from x = y: 2^6 y + 3 y sum of i 2^(5 - i)
  np.testing.assert_allclose(got["state"], image * (64 + 3 * sum(i * 2 ** (5 - i) for i in range(6))), rtol=1e-6)
  assert told == sorted(set(told)) and told[-1] == 6
  assert draw.bytes_needed(jax.device_put(np.float32(3.0), mesh.replicated), index, image, size=16) >= 2 * 16


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_begin_before_they_are_asked_for_unless_that_waits_for_a_compilation(processes, monkeypatch):
  """Several processes begin at one and the same place: when each is done with compiling ahead is its own business."""
  mesh, called = make_mesh("pmap"), []
  by_rows, one = BatchedFn(lambda constants, index: index + constants, mesh), jax.device_put(1, mesh.replicated)
  monkeypatch.setattr(by_rows, "_executable", lambda *a, own=by_rows._executable: called.append(1) or own(*a))
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  rows, ahead = np.arange(8, dtype=np.int32), Future()
  monkeypatch.setattr(ahead, "result", lambda own=ahead.result: own(timeout=0))  # an error, where it would wait
  by_rows.compile_ahead(lambda lowered: called.append(lowered) or ahead, one, rows)
  lowered = called.pop()
  results = [by_rows.start(one, rows)]
  assert called == []
  ahead.set_result(lowered.compile())
  results.append(by_rows.start(one, rows))
  assert len(called) == (1 if processes == 1 else 0)
  np.testing.assert_array_equal(results[0](), rows + 1)
  calls = len(called)
  results.append(by_rows.start(one, rows))
  assert len(called) == calls + 1
  for result in results:
    np.testing.assert_array_equal(result(), rows + 1)


def test_memory_that_is_planned_grows_with_the_rows():
  mesh = make_mesh("pmap")
  one = jax.device_put(np.float32(1), mesh.replicated)
  by_rows = BatchedFn(lambda constants, image: jnp.sin(image) + constants, mesh)
  few, many = (by_rows.bytes_needed(one, np.zeros((1, 32, 32), np.float32), size=size) for size in (8, 80))
  assert few >= 8 * 4096 and 8 < many / few < 12  # the output is whole on every device


def test_free_memory_of_a_machine():
  lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
  total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
  assert 0 < free_memory() <= total / 2 / 8
