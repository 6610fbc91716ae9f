"""The device never waits for the host: the next batch is there before a training step ends."""

import threading

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.devices import STRATEGIES
from ddpm_jax.runs import train as train_lib
from tests.runs.test_train import LITTLE, noise, train

STEPS, EVERY = 6, ("num_steps", "checkpoint_every", "log_every")


@pytest.mark.parametrize(("parallel", "size"), [("pmap", 1), ("fsdp", 1), ("pmap", 2)])
def test_the_next_batch_is_on_the_devices_before_an_update_ends(tmp_path, monkeypatch, parallel, size):
  """Each step waits, on the devices, for the batch after its own: a loop that waited for the step would be late.

  size: training steps in a call, whose batches come together.
  """
  monkeypatch.setattr(train_lib, "open_source", lambda *_: noise())
  news, placed, waited, late = threading.Condition(), [], set(), set()
  put, make = STRATEGIES[parallel].put_batches, train_lib.make_train_step

  def put_and_note(self, batches, **options):
    batch = jax.block_until_ready(put(self, batches, **options))
    with news:
      placed.append(batch)
      news.notify_all()
    return batch

  def wait(step):
    update = int(step)
    if size <= update < STEPS - size:  # the loop waits for the first call itself, and the last has no next one
      waited.add(update)
      with news:
        if not news.wait_for(lambda: len(placed) > update // size + 1, timeout=10):
          late.add(update)
    return step

  def make_waiting(run):
    update = make(run)

    def waiting(state, batch, **options):
      step = jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.int32), state.step)
      return update(state.replace(step=step), batch, **options)

    return waiting

  monkeypatch.setattr(STRATEGIES[parallel], "put_batches", put_and_note)
  monkeypatch.setattr(train_lib, "make_train_step", make_waiting)
  train(tmp_path / "run", **LITTLE, parallel=parallel, steps_per_dispatch=size, **dict.fromkeys(EVERY, STEPS))
  assert waited == set(range(size, STEPS - size))
  assert not late
