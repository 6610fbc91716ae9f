"""The step is compiled once, before it is called."""

import jax
import pytest

from ddpm_jax.run import make_train_step
from ddpm_jax.training.programs import StepPrograms
from tests.training.tiny import random_batch, tiny_config, tiny_run

_seen: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: _seen.append(event))


def lowered() -> int:
  return sum(event.endswith("jaxpr_to_mlir_module_duration") for event in _seen)


@pytest.mark.parametrize(("mode", "updates"), [("pmap", 1), ("fsdp", 2)])
def test_the_first_call_finds_what_was_compiled(mode, updates):
  run = tiny_run(tiny_config(parallel=mode, steps_per_dispatch=updates))
  before = lowered()
  programs = StepPrograms(run, make_train_step(run), first=updates)
  batch = run.parallel.put_batches([random_batch(seed=i) for i in range(updates)])
  step, state, vote = programs[updates], run.initial_state(), run.parallel.put_vote(False)
  assert lowered() > before  # the listener hears
  before = lowered()
  state, *_ = step(state, batch, vote)
  step(state, batch, vote)
  assert lowered() == before
  programs.close()


def test_nothing_is_compiled_where_nothing_is_left_to_train():
  run = tiny_run(tiny_config())
  before = lowered()
  StepPrograms(run, make_train_step(run), first=0).close()
  assert lowered() == before
