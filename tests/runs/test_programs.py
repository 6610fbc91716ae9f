"""The step and the sample grid are compiled once, before they are called."""

import contextlib
import threading
from concurrent.futures import Future

import chex
import jax
import numpy as np
import pytest

from ddpm_jax.config import SampleConfig
from ddpm_jax.devices.mesh import DeviceMesh
from ddpm_jax.runs import preview as preview_lib
from ddpm_jax.runs.preview import Preview
from ddpm_jax.runs.programs import Compiler, StepProgram
from ddpm_jax.sampling.draw import table_of
from ddpm_jax.training.setup import make_train_step
from tests.training.tiny import host, random_batch, tiny_config, tiny_run

_seen: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: _seen.append(event))


def lowered() -> int:
  return sum(event.endswith("jaxpr_to_mlir_module_duration") for event in _seen)


@pytest.mark.parametrize(("mode", "updates"), [("pmap", 1), ("pmap", 3), ("fsdp", 1), ("fsdp", 3)])
def test_the_first_call_finds_what_was_compiled(mode, updates):
  run = tiny_run(tiny_config(parallel=mode, steps_per_dispatch=updates))
  before, compiler = lowered(), Compiler()
  run_steps = StepProgram(run, make_train_step(run), compiler, ahead=True)
  assert lowered() > before  # the listener hears
  state = run.initial_state()
  before = lowered()
  for number in (updates, 1):
    batches = run.mesh.put_batches([random_batch(seed=i) for i in range(number)], max_steps=updates)
    state, *_ = run_steps(state, batches, run.mesh.put_step_command(number))
  assert lowered() == before and state.step == updates + 1
  compiler.close()


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
def test_another_seed_is_the_same_program(mode):
  """It is data, and the bits are those of a step in which it is a constant."""
  texts = []

  class Heard:
    def submit(self, lowered):
      texts.append(lowered.as_text())
      return Future()

  for seed in (0, 2**32 - 1):
    little = dict(channels=4, channel_multipliers=(1,), attention_resolutions=(), dropout=0.0)
    run = tiny_run(tiny_config(parallel=mode, seed=seed, steps_per_dispatch=1, **little))
    given = StepProgram(run, make_train_step(run), Heard(), ahead=True)._step
  assert texts[0] == texts[1]
  bound = run.mesh.compile(make_train_step(run), run.abstract_state)
  inputs = run.mesh.put_batches([random_batch()]), run.mesh.put_step_command()
  (state, metrics, _), expected = (step(run.initial_state(), *inputs) for step in (given, bound))
  chex.assert_trees_all_equal(host((state, metrics)), host(expected[:2]))


def test_nothing_is_compiled_where_nothing_is_left_to_train():
  run = tiny_run(tiny_config())
  before = lowered()
  StepProgram(run, make_train_step(run), Compiler(), ahead=False)
  Preview(run, None)
  assert lowered() == before


@pytest.mark.parametrize("mode", ["pmap", "fsdp"])
def test_the_first_grid_finds_what_was_compiled(mode):
  run = tiny_run(tiny_config(parallel=mode, preview_images=3, sample_every=1))
  state = run.initial_state()
  before = lowered()
  with contextlib.closing(Compiler()) as compiler:
    preview = Preview(run, compiler)
    assert lowered() == before + 1
    before = lowered()
    picture = preview(state)()
    assert lowered() == before and not preview.compiling
  assert (picture == Preview(run, None)(state)()).all()


def test_a_grid_whose_program_compiles_beside_the_steps_can_wait():
  run, ahead = tiny_run(tiny_config(sample_every=1)), Future()

  class Slow:
    submit = staticmethod(lambda lowered: ahead)

  preview = Preview(run, Slow())  # type: ignore[arg-type]
  assert preview.compiling
  ahead.set_result(None)
  assert not preview.compiling
  assert not Preview(run, None).compiling, "nothing is under way: it is compiled when it is asked for"


def test_no_grid_is_compiled_where_none_will_be_drawn_or_the_device_is_needed_for_it(monkeypatch):
  run, before = tiny_run(tiny_config(sample_every=0)), lowered()
  Preview(run, Compiler())
  assert lowered() == before
  monkeypatch.setattr(DeviceMesh, "compiles_beside_steps", False)
  Preview(tiny_run(tiny_config(sample_every=1)), Compiler())
  assert lowered() == before


def test_a_compiler_that_is_closed_forgets_what_it_has_not_begun():
  began, go = threading.Event(), threading.Event()

  class Slow:
    def compile(self):
      began.set()
      assert go.wait(10)
      return "compiled"

  compiler = Compiler()
  first, second = compiler.submit(Slow()), compiler.submit(Slow())
  assert began.wait(10)
  compiler.close()
  go.set()
  assert first.result(10) == "compiled" and second.cancelled()


def test_previews_are_drawn_with_the_grid_that_auto_means(monkeypatch):
  """The table is that of --mode=sample --sampler=dpmpp: there is no second choice of timesteps."""
  tables = []
  real = preview_lib.make_draw

  def make_draw(predictor, table, **how):
    tables.append(table)
    return real(predictor, table, **how)

  monkeypatch.setattr(preview_lib, "make_draw", make_draw)
  for schedule in ("linear", "cosine"):
    run = tiny_run(tiny_config(beta_schedule=schedule, num_timesteps=40, preview_steps=7))
    Preview(run, None)
    wanted = table_of(SampleConfig(sampler="dpmpp", sampling_steps=7), run.schedule, "fixed_large")
    for mine, theirs in zip(tables.pop(), wanted, strict=True):
      np.testing.assert_array_equal(mine, theirs)
