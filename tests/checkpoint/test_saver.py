"""A save that fails in the background, between two points where saving is due."""

import pytest

from ddpm_jax.checkpoint.saver import Saver
from ddpm_jax.errors import RunError
from tests.training.tiny import tiny_config


class Failing:
  """Checkpoints of which every one fails, in the background or when it is waited for."""

  def save(self, state, step, facts):
    pass

  def finished(self):
    return True

  def wait(self):
    raise RunError("the disk is full")


def test_beyond_the_limit_there_is_one_last_chance(monkeypatch, capsys):
  checkpoints = Failing()
  options = tiny_config(checkpoint_every=4, max_unsaved_steps=6).train
  saver = Saver(checkpoints, options, {}, start_step=0, lock=None, flush=lambda: None)  # type: ignore[arg-type]
  saver.save(None, 4)  # type: ignore[arg-type]
  monkeypatch.setattr(checkpoints, "finished", checkpoints.wait)
  saver.poll(7)  # a call of several training steps ended behind the limit
  assert "the disk is full; the run goes on and tries again" in capsys.readouterr().err
  assert saver.due(7)
  with pytest.raises(RunError, match="the disk is full; nothing could be saved since step 0"):
    saver.save(None, 7)  # type: ignore[arg-type]
