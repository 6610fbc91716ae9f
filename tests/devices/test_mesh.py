"""One device, eight with pmap and eight with fsdp are one computation."""

import collections
import functools
import os
import pathlib
import re
import subprocess
import sys
import types
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.data.sources import from_array
from ddpm_jax.devices import make_mesh
from ddpm_jax.devices.hosts import to_host
from ddpm_jax.errors import UserError
from ddpm_jax.first_stage.statistics import as_source, encoded
from ddpm_jax.training.setup import build_run, make_train_step
from ddpm_jax.training.state import create_state
from ddpm_jax.training.step import abstract_batch, train_step
from tests.training.tiny import CONDITIONAL, IMAGE_SHAPE, host, random_batch, tiny_config, tiny_run, tiny_stage

STEPS = 10
CLASSIFIER = dict(stage="classifier", num_classes=3, weight_decay=0.05, lr_schedule="linear", num_steps=20)
OF_KIND = {"plain": {}, "conditional": CONDITIONAL, "classifier": CLASSIFIER}
LITTLE = dict(channels=4, channel_multipliers=(1,), attention_resolutions=())  # where it does not matter which
OF_KIND |= dict.fromkeys(("latents", "cached latents"), CONDITIONAL | LITTLE)
ROOT = pathlib.Path(__file__).parents[2]


def train(mode, kind, **changes):
  """Ten training steps with dropout and flips: (final state, losses and gradient norms, run)."""
  run = tiny_run(tiny_config(parallel=mode, **OF_KIND[kind] | changes), _stage(kind))
  batches = [random_batch(seed=i, classes=run.config.model.num_classes) for i in range(STEPS)]
  if kind == "cached latents":
    batches = _with_moments(run, batches)
  state, rows = run.initial_state(), []
  step = run.mesh.compile(make_train_step(run), run.abstract_state, arguments={"frozen": run.frozen})
  for i in range(STEPS):
    batch = run.mesh.put_batches([batches[i]])
    # As if one process, of this device, had asked to stop before the last training step.
    stop = [0, 0, 0, i == STEPS - 1, 0, 0, 0, 0]
    command = jax.device_put(np.asarray([[1, vote] for vote in stop], np.int32), run.mesh.split)
    with jax.transfer_guard("disallow"):
      state, metrics, agreed = step(state, batch, command)
    assert bool(to_host(agreed)) == (i == STEPS - 1)
    rows.append([float(to_host(metrics[name])) for name in _told(run)])
  return state, np.asarray(rows), run


def _stage(kind):
  return tiny_stage() if kind.endswith("latents") else None


def _with_moments(run, batches):
  """The batches as a run has them that encodes all its images before it begins, a part at a time."""
  source, rows = from_array(np.concatenate([batch["image"] for batch in batches])), np.arange(16)
  (everything,) = encoded(run.first_stage, run.frozen, source, run.mesh, flips=True)
  cached = as_source(source, everything)
  without = [{name: column for name, column in batch.items() if name != "image"} for batch in batches]
  return [batch | {"moments": cached.read(16 * i + rows).images} for i, batch in enumerate(without)]


def _told(run):
  return ("loss", "grad_norm", *(("mean/accuracy",) if run.config.model.stage == "classifier" else ()))


@functools.cache
def one_device(kind):
  """Where there are latents, the images are encoded in each step."""
  run, device = tiny_run(tiny_config(**OF_KIND[kind]), _stage(kind)), jax.devices()[0]
  state, frozen = jax.device_put((host(run.initial_state()), host(run.frozen)), device)
  step, rows = jax.jit(functools.partial(make_train_step(run), frozen=frozen)), []
  for i in range(STEPS):
    batch = random_batch(seed=i, classes=run.config.model.num_classes)
    state, metrics = step(state, jax.device_put(batch, device))
    rows.append([float(metrics[name]) for name in _told(run)])
  assert state.step.devices() == {device}
  return host(state), np.asarray(rows)


@pytest.mark.parametrize(
  ("platform", "capability", "expected"),
  [
    *(("gpu", "8.0", "cudnn"), ("gpu", "10.3", "cudnn"), ("gpu", "7.5", "xla"), ("gpu", "gfx90a", "xla")),
    *(("tpu", None, "xla"), ("cpu", None, "xla")),
  ],
)
def test_what_computes_attention_follows_from_the_devices(platform, capability, expected):
  mesh = make_mesh("pmap")
  mesh.platform, device = platform, types.SimpleNamespace(compute_capability=capability)
  mesh.jax_mesh = cast(Any, types.SimpleNamespace(devices=np.array([device])))
  assert cast(Any, build_run(tiny_config(), IMAGE_SHAPE, mesh).denoiser.network).attention == expected


@pytest.mark.parametrize(
  ("mode", "kind", "changes"),
  [
    ("pmap", "plain", {}),
    ("fsdp", "conditional", {}),
    ("pmap", "conditional", {"grad_accum_steps": 2}),
    ("fsdp", "plain", {"grad_accum_steps": 2}),
    ("pmap", "classifier", {"grad_accum_steps": 2}),
    ("fsdp", "classifier", {}),
    ("pmap", "latents", {}),
    ("fsdp", "latents", {"grad_accum_steps": 2}),
    ("pmap", "cached latents", {"grad_accum_steps": 2}),
    ("fsdp", "cached latents", {}),
  ],
)
def test_eight_devices_are_one(mode, kind, changes):
  state, rows, run = train(mode, kind, **changes)
  one_state, one_rows = one_device(kind.removeprefix("cached "))
  assert run.mesh.num_devices == 8
  np.testing.assert_allclose(rows, one_rows, rtol=2e-5)
  # Where a gradient is 0 but for rounding, Adam's normalised update is rounding too: compare the rest.
  for (path, mine), theirs in zip(
    jax.tree.leaves_with_path(host(state.params)), jax.tree.leaves(one_state.params), strict=True
  ):
    differs = np.abs(mine - theirs) > 1e-4
    if jax.tree_util.keystr(path).endswith("['qkv']['bias']"):  # softmax does not see a bias of the keys
      differs = np.delete(np.split(differs, 3), 1, axis=0)
    assert np.mean(differs) < 0.02, path
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


@pytest.mark.parametrize(("mode", "updates"), [("pmap", 1), ("fsdp", 1), ("pmap", 3)])
def test_what_is_frozen_is_an_argument_of_the_step(mode, updates):
  """SGD on |params - mean row * teacher|^2, by hand; another teacher needs no other program."""

  class Regression:
    def loss(self, params, extra, frozen, batch, keys):
      rows = jnp.mean(batch["image"].astype(jnp.float32), axis=(1, 2, 3))[:, None]
      return {"square": jnp.mean((params["w"][None] - rows * frozen["teacher"]["v"][None]) ** 2) * 8}, {}

    def update_extra(self, extra, per_example):
      return extra

  mesh, optimizer = make_mesh(mode), optax.with_extra_args_support(optax.sgd(0.25))
  teachers = [{"teacher": {"v": np.random.default_rng(seed).normal(size=8).astype(np.float32)}} for seed in (0, 1)]

  def step(state, batch, *, axis_name, frozen):
    wanted = dict(objective=Regression(), optimizer=optimizer, learning_rate=lambda n: 0.25, ema_decay=0.9)
    return train_step(state, frozen, batch, seed=0, axis_name=axis_name, wrap_loss=mesh.wrap_loss, **wanted)

  batches, programs = [random_batch(seed=i) for i in range(updates)], set()
  for teacher in teachers:
    shapes = jax.eval_shape(lambda: create_state({"w": jnp.zeros(8)}, optimizer))
    compiled = mesh.compile(step, shapes, max_steps=updates, arguments={"frozen": mesh.place(teacher)})
    state = mesh.place(host(create_state({"w": jnp.zeros(8)}, optimizer)))
    inputs = mesh.put_batches(batches, max_steps=updates), mesh.put_step_command(updates)
    programs.add(compiled.lower(state, *inputs).as_text())
    with jax.transfer_guard("disallow"):
      state, *_ = compiled(state, *inputs)
    w = np.zeros(8)
    for batch in batches:
      w -= 0.25 * 2 * (w - batch["image"].mean() * teacher["teacher"]["v"])
    np.testing.assert_allclose(host(state.params)["w"], w, rtol=1e-5)
  assert len(programs) == 1


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
  run = tiny_run(tiny_config(parallel=mode, batch_size=24, **LITTLE))  # a shape that no other test has compiled
  step = run.mesh.compile(make_train_step(run), run.abstract_state, max_steps=updates)
  state = run.initial_state()
  batches = [run.mesh.put_batches([random_batch(24, seed=i)], max_steps=updates) for i in range(4)]
  restored = jax.device_put(host(state), run.mesh.state_shardings(run.abstract_state))
  command = run.mesh.put_step_command()
  jax.block_until_ready((state, batches, restored, command))
  del compiled[:]
  for batch in batches[:3]:
    state, _, _ = step(state, batch, command)
  assert len(compiled) == 1
  step(restored, batches[3], command)
  assert len(compiled) == 1


@pytest.mark.parametrize(("mode", "updates"), [("pmap", 1), ("fsdp", 1), ("pmap", 2)])
def test_the_state_is_donated(mode, updates):
  run = tiny_run(tiny_config(parallel=mode, **LITTLE))
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
  """In the loop too the state of fsdp is cut: nothing is gathered beside the parameters, once in a training step."""
  run = tiny_run(tiny_config(parallel="fsdp", channel_multipliers=(1,), attention_resolutions=()))

  def sent(updates: int) -> collections.Counter:
    step = run.mesh.compile(make_train_step(run), run.abstract_state, max_steps=updates)
    inputs = run.mesh.abstract_inputs(abstract_batch(IMAGE_SHAPE, 16), max_steps=updates)
    text = step.lower(run.abstract_state, *inputs).compile().as_text()
    return collections.Counter(re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(", text))

  one = sent(1)
  assert one["all-gather"] > 10 and sent(3) == one


def test_an_unknown_strategy_is_refused_where_the_mesh_is_made():
  with pytest.raises(ValueError, match="unknown strategy 'ddp', not one of pmap, fsdp"):
    make_mesh("ddp")


def test_a_platform_that_is_not_installed_is_one_line_with_the_remedy():
  """JAX raises an AssertionError without a word for it."""
  code = """if True:
    from ddpm_jax.errors import UserError
    from ddpm_jax.devices import make_mesh
    try:
      make_mesh("pmap")
    except UserError as error:
      print(error)
  """
  environment = os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
  (line,) = done.stdout.splitlines()
  assert "JAX finds no device" in line and "cuda" in line and "correct JAX_PLATFORMS" in line, done.stderr
