"""The real step of the tiny run, with one level, compiled for the 8 simulated devices."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import AutoencoderConfig, ModelConfig
from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.pipeline import batches
from ddpm_jax.data.sources import Source
from ddpm_jax.devices import make_mesh
from ddpm_jax.first_stage.latents import FixedStage, Latents
from ddpm_jax.models.build import build_autoencoder, num_params
from ddpm_jax.plan import compiling
from ddpm_jax.plan.collectives import Collective
from ddpm_jax.plan.compiling import CompiledStep, Memory, compile_step
from ddpm_jax.plan.topology import OutOfMemory
from ddpm_jax.training.autoencoder import Perceptual
from ddpm_jax.training.setup import build_run, make_train_step
from ddpm_jax.training.step import abstract_batch, inputs_of
from ddpm_jax.weights.stage_folder import abstract_params
from tests.training.tiny import IMAGE_SHAPE, random_batch, tiny_config, tiny_run

ONE_LEVEL = dict(channel_multipliers=(1,), attention_resolutions=(), dropout=0.0)


@functools.cache
def planned(mode, batch_size=16, **changes) -> tuple[CompiledStep, object]:
  run = tiny_run(tiny_config(parallel=mode, batch_size=batch_size, **ONE_LEVEL, **changes))
  step = compile_step(run, batch_size)
  assert isinstance(step, CompiledStep)
  return step, run


def test_the_batch_is_what_the_pipeline_yields():
  rows = random_batch(24)
  source = Source("x", IMAGE_SHAPE, 24, DecodedRows(rows["image"], np.zeros(24, bool)).take)
  options = dict(batch_size=16, seed=0, start_step=0, process_index=0, process_count=1, threads=1)
  real = next(iter(batches(source, **options)))
  planned = abstract_batch(IMAGE_SHAPE, 16)
  assert {name: (rows.shape, rows.dtype) for name, rows in inputs_of(real).items()} == {
    name: (rows.shape, rows.dtype) for name, rows in planned.items()
  }


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
def test_the_step_is_the_one_that_training_compiles(mode):
  """Lowered from the shapes, and from the arrays that training puts on the devices: the same program."""
  run = tiny_run(tiny_config(parallel=mode))
  step = run.mesh.compile(make_train_step(run), run.abstract_state)
  batch, order = run.mesh.abstract_inputs(abstract_batch(IMAGE_SHAPE, 16))
  real = run.mesh.put_batches([random_batch()]), run.mesh.put_step_command()
  shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), ((batch, order), real))
  assert shapes[0] == shapes[1]
  texts = [step.lower(run.abstract_state, *inputs).as_text() for inputs in ((batch, order), real)]
  assert texts[0] == texts[1] and len(texts[0]) > 10_000


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
def test_memory_by_kind_is_that_of_the_arrays(mode):
  """On a CPU nothing is padded: each kind is the bytes of the arrays that training puts on one device."""
  step, run = planned(mode)
  state = run.initial_state()

  memory = step.memory
  assert memory.parameters == on_one(state.params) > 0
  assert memory.average == memory.parameters
  assert memory.optimizer == on_one(state.opt_state) >= 2 * memory.parameters
  assert memory.counters == 16
  assert memory.batch == 2 * (64 + 4 + 1) + 12  # two images, their indices, whether replaced; the order
  assert memory.padding == 0
  whole = 4 * num_params(run.abstract_state.params)
  assert memory.parameters == whole if mode == "pmap" else memory.parameters < whole / 7
  assert memory.total == sum(memory) and memory.fixed == memory.total - memory.temporaries - memory.batch
  assert memory.temporaries > whole and 0 < memory.outputs < 10_000  # gradients; metrics


def on_one(tree) -> int:
  """Bytes of placed arrays on one device."""
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("mode", "regularizer"), [("pmap", "vq"), ("fsdp", "kl")])
def test_the_second_stage_has_the_first_in_memory_and_operations(mode, regularizer):
  """Whole, also the decoder, which no step reads; and no optimiser and no average of it."""
  model = ModelConfig(channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=())
  options = AutoencoderConfig(regularizer=regularizer, latent_channels=2, codebook_size=8 * (regularizer == "vq"))
  latents = Latents(build_autoencoder(model, options, IMAGE_SHAPE), IMAGE_SHAPE)
  config, mesh = tiny_config(parallel=mode, **ONE_LEVEL), make_mesh(mode)
  run = build_run(
    config, IMAGE_SHAPE, mesh, stage=FixedStage(latents, abstract_params(latents.network, IMAGE_SHAPE), "")
  )
  step = compile_step(run, 16)
  assert isinstance(step, CompiledStep)

  params = latents.network.init(jax.random.key(0), IMAGE_SHAPE)
  placed = mesh.place(jax.tree.map(np.asarray, {"autoencoder": params, "mean": np.zeros(2, np.float32)}))
  memory, state = step.memory, run.initial_state()
  assert memory.frozen == on_one(placed) + 8  # the deviations
  assert mode == "fsdp" or memory.frozen == 4 * (num_params(params) + 4)
  assert memory.parameters == memory.average == on_one(state.params)
  assert memory.optimizer == on_one(state.opt_state) < 2.1 * memory.parameters + 100
  assert (memory.padding, memory.counters) == (0, 16)
  assert memory.batch == 2 * (64 + 4 + 1) + 12  # images, no latents

  of_latents = build_run(config, latents.latent_shape, mesh)  # the same network, of images like these
  alone = compiling._operations(of_latents, 16, parts=1) / 8
  images = jax.ShapeDtypeStruct((2, *IMAGE_SHAPE), jnp.uint8)
  cost = jax.jit(latents.moments).trace({"autoencoder": params}, images).lower(lowering_platforms=("tpu",))
  encoding = cost.cost_analysis()["flops"]
  assert encoding > 0.2 * alone
  assert step.flops == pytest.approx(alone + encoding, rel=0.03)


def test_a_first_stage_in_training_has_two_networks_and_what_its_loss_keeps_and_reads():
  options = dict(regularizer="vq", codebook_size=8, latent_channels=2, discriminator_weight=0.5, discriminator_layers=1)
  run = tiny_run(tiny_config(stage="autoencoder", channels=4, num_res_blocks=1, attention_resolutions=(), **options))
  shapes = {name: jax.ShapeDtypeStruct((size,), jnp.float32) for name, size in (("read", 1), ("not", 5))}
  distance = lambda params, x_hat, x: params["read"][0] * jnp.mean((x_hat - x) ** 2, axis=(1, 2, 3))  # noqa: E731
  step = compile_step(run.with_perceptual(Perceptual(distance, shapes, "")), 16)
  assert isinstance(step, CompiledStep)
  memory, state = step.memory, run.initial_state()
  networks = [num_params(state.params[name]) for name in ("autoencoder", "discriminator")]
  assert memory.parameters == memory.average == 4 * sum(networks) and min(networks) > 500
  assert memory.optimizer == on_one(state.opt_state) and 0 <= memory.optimizer - 8 * sum(networks) < 50
  assert memory.counters == 16 + 4 + 4 * 8  # steps of the discriminator, use of the codes
  assert (memory.frozen, memory.padding) == (4 * 6, 0)


def test_all_memory_is_that_of_the_compiler():
  run = tiny_run(tiny_config())
  stats = types.SimpleNamespace(
    argument_size_in_bytes=10**6,
    output_size_in_bytes=900_100,
    alias_size_in_bytes=900_000,
    temp_size_in_bytes=5 * 10**6,
    generated_code_size_in_bytes=7 * 10**5,
  )
  inputs = run.mesh.abstract_inputs(abstract_batch(IMAGE_SHAPE, 16))
  memory = compiling._memory(run, inputs, stats)
  assert memory.total == 10**6 + 100 + 5 * 10**6 + 7 * 10**5
  assert memory.padding == 10**6 - sum(memory[:5]) > 0
  assert (memory.temporaries, memory.outputs, memory.program) == (5 * 10**6, 100, 7 * 10**5)


def twins(params) -> int:
  """Numbers in gradients that equal another one: two biases that are added up, of which XLA sends one."""
  found = 0
  for name, block in params.items():
    found += block["temb_proj"]["bias"].size if "temb_proj" in block else 0
    found += block["shortcut"]["bias"].size if "shortcut" in block else 0
    assert name
  return found


def test_pmap_sends_the_gradients_in_one_all_reduce():
  """Parameters times 4 bytes, and the loss; beside it the images replaced, and the order, which has three numbers."""
  step, run = planned("pmap")
  params = run.abstract_state.params
  sizes = sorted(c.bytes for c in step.collectives)
  assert {(c.kind, c.group, c.times) for c in step.collectives} == {("all-reduce", 8, 1)}
  assert sizes == [4, 12, 4 * (num_params(params) - twins(params)) + 4]
  assert step.sent == pytest.approx(2 * 7 / 8 * sum(sizes))
  parts, _ = planned("pmap", grad_accum_steps=2)  # summed over the parts before they are sent: nothing is merged
  assert sorted(c.bytes for c in parts.collectives) == [4, 12, 4 * num_params(params) + 4]


def test_fsdp_gathers_the_parameters_once_and_reduces_the_gradients():
  """What is cut is gathered, all gradients are summed, and no activation is sent."""
  step, run = planned("fsdp")
  params = jax.tree.leaves(run.abstract_state.params)
  cut = [4 * leaf.size for leaf in params if leaf.sharding.spec]
  gathered = sorted(c.bytes for c in step.collectives if c.kind == "all-gather")
  assert gathered == sorted(cut)
  reduced = sum(c.bytes for c in step.collectives if c.kind == "all-reduce")
  assert reduced == pytest.approx(sum(4 * leaf.size for leaf in params), rel=0.1)
  assert {(c.kind, c.group, c.times) for c in step.collectives} == {("all-gather", 8, 1), ("all-reduce", 8, 1)}


def test_in_parts_the_gradients_of_each_part_are_reduced():
  step, _ = planned("fsdp", grad_accum_steps=2)
  assert {(c.kind, c.times) for c in step.collectives} == {("all-gather", 1), ("all-reduce", 1), ("all-reduce", 2)}


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
def test_operations_do_not_depend_on_the_parts(mode):
  """XLA counts a loop once; a batch in two parts is as much work as in one."""
  whole = planned(mode)[0].flops
  assert whole > 5e5
  assert whole == pytest.approx(planned("pmap")[0].flops, rel=0.01)  # and not on who has which part of the state
  assert planned(mode, grad_accum_steps=2)[0].flops == pytest.approx(whole, rel=0.2)


def test_operations_grow_with_the_batch():
  small, large = (planned("pmap", size)[0].flops for size in (16, 32))
  assert 1.6 < large / small < 2.1


def test_a_cpu_counts_what_goes_in_and_out():
  step, run = planned("pmap")
  state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.abstract_state))
  assert step.bytes == pytest.approx(2 * state, rel=0.02)


class Elsewhere:
  """Takes the place of what `DeviceMesh.compile` returns, on a machine without that hardware."""

  def __init__(self, outcome):
    self.outcome = outcome

  def lower(self, *_):
    return self

  def compile(self):
    if isinstance(self.outcome, Exception):
      raise self.outcome
    return self.outcome


def run_elsewhere(outcome, platform):
  """The tiny run, as if its devices were of another platform."""
  run = tiny_run(tiny_config())
  mesh = types.SimpleNamespace(
    abstract_inputs=run.mesh.abstract_inputs,
    wrap_loss=run.mesh.wrap_loss,
    compile=lambda *_, **__: Elsewhere(outcome),
    num_devices=8,
    jax_mesh=run.mesh.jax_mesh,
    platform=platform,
  )
  return run._replace(mesh=mesh)


def test_a_refusal_for_memory_is_an_outcome_and_any_other_an_error():
  refused = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm. Exceeded")
  assert compile_step(run_elsewhere(refused, "tpu"), 16) == OutOfMemory(int(20.5 * 2**30), int(15.75 * 2**30))
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    compile_step(run_elsewhere(jax.errors.JaxRuntimeError("INTERNAL: bug"), "tpu"), 16)


def test_the_bytes_of_a_tpu_are_those_of_its_program():
  text = "ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n  ROOT %y = f32[8]{0} sine(%x)\n}\n"
  stats = types.SimpleNamespace(
    argument_size_in_bytes=10**6,
    output_size_in_bytes=10,
    alias_size_in_bytes=0,
    temp_size_in_bytes=0,
    generated_code_size_in_bytes=0,
  )
  program = types.SimpleNamespace(
    as_text=lambda: text,
    memory_analysis=lambda: stats,
    cost_analysis=lambda: {"flops": 8.0},
    input_shardings=(({}, {}, {}, {"frozen": {}}), {}),
  )
  step = compile_step(run_elsewhere(program, "tpu"), 16)
  assert isinstance(step, CompiledStep) and (step.bytes, step.flops, step.batch_size) == (64, 8.0, 16)
  on_cpu = compile_step(run_elsewhere(program, "cpu"), 16)
  assert isinstance(on_cpu, CompiledStep) and on_cpu.bytes == 10**6 + 10


def test_a_collective_in_a_loop_of_unknown_length_counts_once():
  step = CompiledStep(8, Memory(*[0] * 9), 1.0, 1, [Collective("all-gather", 80, 8, t) for t in (None, 1, 3)])
  assert step.sent == 70 * 5
