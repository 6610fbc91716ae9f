"""One device, eight with pmap and eight with fsdp are one computation."""

import collections
import os
import pathlib
import re
import subprocess
import sys
from concurrent.futures import Future

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.devices import make_mesh
from ddpm_jax.devices.batched import BatchedFn, BatchedLoop, Loop, free_memory
from ddpm_jax.devices.hosts import to_host
from ddpm_jax.errors import UserError
from ddpm_jax.training.setup import make_train_step
from ddpm_jax.training.step import abstract_batch
from tests.training.tiny import IMAGE_SHAPE, host, random_batch, tiny_config, tiny_run

STEPS = 10
ROOT = pathlib.Path(__file__).parents[2]


def train(mode, **changes):
  """Ten updates with dropout and flips: (final state, losses, gradient norms, run, step)."""
  run = tiny_run(tiny_config(parallel=mode, **changes))
  state, rows = run.initial_state(), []
  step = run.mesh.compile(make_train_step(run), run.abstract_state)
  for i in range(STEPS):
    batch = run.mesh.put_batches([random_batch(seed=i)])
    # As if one process, of this device, had asked to stop before the last update.
    stop = [0, 0, 0, i == STEPS - 1, 0, 0, 0, 0]
    order = jax.device_put(np.asarray([[1, vote] for vote in stop], np.int32), run.mesh.split)
    with jax.transfer_guard("disallow"):
      state, metrics, agreed = step(state, batch, order)
    assert bool(to_host(agreed)) == (i == STEPS - 1)
    rows.append([float(to_host(metrics[name])) for name in ("loss", "grad_norm")])
  return state, np.asarray(rows), run


@pytest.fixture(scope="module")
def one_device():
  run = tiny_run(tiny_config())
  device = jax.devices()[0]
  state, step, rows = jax.device_put(host(run.initial_state()), device), jax.jit(make_train_step(run)), []
  for i in range(STEPS):
    state, metrics = step(state, jax.device_put(random_batch(seed=i), device))
    rows.append([float(metrics[name]) for name in ("loss", "grad_norm")])
  assert state.step.devices() == {device}
  return host(state), np.asarray(rows)


@pytest.mark.parametrize(
  ("mode", "changes"),
  [("pmap", {}), ("fsdp", {}), ("pmap", {"grad_accum_steps": 2}), ("fsdp", {"grad_accum_steps": 2})],
)
def test_eight_devices_are_one(one_device, mode, changes):
  state, rows, run = train(mode, **changes)
  assert run.mesh.num_devices == 8
  np.testing.assert_allclose(rows, one_device[1], rtol=2e-5)
  # Where a gradient is 0 but for rounding, Adam's normalised update is rounding too: compare the rest.
  for mine, theirs in zip(jax.tree.leaves(host(state.params)), jax.tree.leaves(one_device[0].params), strict=True):
    assert np.mean(np.abs(mine - theirs) > 1e-4) < 0.02
    np.testing.assert_allclose(mine, theirs, atol=STEPS * 2e-3)
  assert int(state.step) == STEPS


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
def test_gradients_of_bfloat16_activations_are_summed_over_the_devices_in_float32(mode):
  """The gradient of each device's row is that row, which bfloat16 holds; their mean has up to eleven bits."""
  mesh, rows = make_mesh(mode), np.random.default_rng(0).integers(128, 256, (8, 16)).astype(np.float32)

  def loss_fn(params, extra, frozen, batch, keys):
    product = batch.astype(jnp.bfloat16) @ params.astype(jnp.bfloat16)
    return {"mean": jnp.mean(product.astype(jnp.float32))}, {}

  def step(state, batch, axis_name):
    wrapped = mesh.wrap_loss(loss_fn)
    gradient = jax.grad(lambda params: wrapped(params, {}, {}, batch["rows"], batch["rows"])[0]["mean"])(state)
    return (gradient if axis_name is None else jax.lax.pmean(gradient, axis_name)), {}

  params = np.zeros((16, 1), np.float32)
  state = jax.device_put(params, mesh.state_shardings(jax.ShapeDtypeStruct(params.shape, params.dtype)))
  gradient, *_ = mesh.compile(step, state)(state, mesh.put_batches([{"rows": rows}]), mesh.put_step_command())
  np.testing.assert_array_equal(np.asarray(gradient)[:, 0], rows.mean(axis=0))


def test_where_the_state_lies():
  for mode, most in (("pmap", 1.0), ("fsdp", 0.25)):
    run = tiny_run(tiny_config(parallel=mode))
    state = run.initial_state()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    one = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert one <= most * total
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(state))


def test_initial_state_does_not_depend_on_the_placement():
  pmap, fsdp = (host(tiny_run(tiny_config(parallel=mode)).initial_state()) for mode in ("pmap", "fsdp"))
  chex.assert_trees_all_equal(pmap, fsdp)


@pytest.mark.parametrize(("mode", "updates"), [("pmap", 1), ("fsdp", 1), ("pmap", 2)])
def test_one_compilation_also_after_a_resume(mode, updates):
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
  )
  run = tiny_run(tiny_config(parallel=mode, batch_size=24))  # a shape that no other test has compiled
  step = run.mesh.compile(make_train_step(run), run.abstract_state, max_steps=updates)
  state = run.initial_state()
  batches = [run.mesh.put_batches([random_batch(24, seed=i)], max_steps=updates) for i in range(4)]
  restored = jax.device_put(host(state), run.mesh.state_shardings(run.abstract_state))
  order = run.mesh.put_step_command()
  jax.block_until_ready((state, batches, restored, order))
  del compiled[:]
  for batch in batches[:3]:
    state, _, _ = step(state, batch, order)
  assert len(compiled) == 1
  step(restored, batches[3], order)
  assert len(compiled) == 1


@pytest.mark.parametrize(("mode", "updates"), [("pmap", 1), ("fsdp", 1), ("pmap", 2)])
def test_the_state_is_donated(mode, updates):
  run = tiny_run(tiny_config(parallel=mode))
  step = run.mesh.compile(make_train_step(run), run.abstract_state, max_steps=updates)
  state = run.initial_state()
  step(state, run.mesh.put_batches([random_batch()], max_steps=updates), run.mesh.put_step_command(updates))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
  ("batch_size", "parts", "message"),
  [
    (100, 1, "batch_size: 100 cannot be divided among 8 devices; use --batch_size=96 or 104"),
    (4, 1, "batch_size: 4 .* use --batch_size=8"),
    (24, 2, "batch_size: 24 cannot be divided among 8 devices times grad_accum_steps=2; use --batch_size=16 or 32"),
  ],
)
def test_a_batch_that_the_devices_do_not_divide(batch_size, parts, message):
  with pytest.raises(UserError, match=message):
    make_mesh("pmap").check_batch(batch_size, parts)


def test_a_loop_over_updates_sends_what_one_update_does():
  """In the loop too the state of fsdp is cut: nothing is gathered beside the parameters, once in an update."""
  run = tiny_run(tiny_config(parallel="fsdp", channel_multipliers=(1,), attention_resolutions=()))

  def sent(updates: int) -> collections.Counter:
    step = run.mesh.compile(make_train_step(run), run.abstract_state, max_steps=updates)
    inputs = run.mesh.abstract_inputs(abstract_batch(IMAGE_SHAPE, 16), max_steps=updates)
    text = step.lower(run.abstract_state, *inputs).compile().as_text()
    return collections.Counter(re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(", text))

  one = sent(1)
  assert one["all-gather"] > 10 and sent(3) == one


# Functions of rows that all devices share.


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


def test_a_platform_that_is_not_installed_is_one_line_with_the_remedy():
  """JAX raises an AssertionError without a word for it."""
  code = """if True:
    from ddpm_jax.errors import UserError
    from ddpm_jax.devices import make_mesh
from ddpm_jax.devices.batched import BatchedFn, BatchedLoop
    try:
      make_mesh("pmap")
    except UserError as error:
      print(error)
  """
  environment = os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
  (line,) = done.stdout.splitlines()
  assert "JAX finds no device" in line and "cuda" in line and "correct JAX_PLATFORMS" in line, done.stderr
