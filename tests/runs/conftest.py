"""A workdir that looks trained, shared with the tests of sampling; and programs that runs of one process share."""

import pytest

from ddpm_jax.runs import train as train_lib
from tests.sampling.conftest import original

__all__ = ["original"]

_programs = {}


@pytest.fixture(scope="module")
def shared_programs():
  """Runs with the same step, or the same sample grid, trace and compile it once.

  What decides on a program is in its key: the settings, the length of the run, and the function that makes the step,
  which is another one where a test has poisoned it.
  """

  class Step(train_lib.StepProgram):
    def __init__(self, run, train_step, compiler, *, ahead):
      c = run.config
      decides = (
        c.train.num_steps,
        c.train.seed,
        c.train.parallel,
        c.train.grad_accum_steps,
        c.train.steps_per_dispatch,
      )
      # `train_step` itself is made anew for each run.
      self._key = (_of_model(run), c.data, c.optimizer, decides, run.lr_restart, train_lib.make_train_step)
      if self._key in _programs:
        self.__dict__.update(vars(_programs[self._key]))
      else:
        super().__init__(run, train_step, compiler, ahead=ahead)

    def __call__(self, *arguments):
      made = super().__call__(*arguments)
      _programs[self._key] = self  # not before: a run that ends early leaves it uncompiled
      return made

  class Grid(train_lib.Preview):
    def __init__(self, run, compiler, class_names=()):
      options = run.config.train
      self._key = (
        "grid",
        _of_model(run),
        options.parallel,
        options.seed,
        options.preview_steps,
        options.preview_images,
        class_names,
      )
      if self._key in _programs:
        self.__dict__.update(vars(_programs[self._key]) | {"_ahead": False})
      else:
        super().__init__(run, compiler, class_names)

    def __call__(self, state):
      drawn = super().__call__(state)
      _programs[self._key] = self
      return drawn

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_lib, "StepProgram", Step)
    patch.setattr(train_lib, "Preview", Grid)
    yield


def _of_model(run):
  return run.config.model, run.config.autoencoder, run.config.diffusion, run.image_shape
