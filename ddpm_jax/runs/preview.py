"""Sample grids while a run trains: what draws them, and when they are drawn beyond those of `--sample_every`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ddpm_jax.data.sources import Source
from ddpm_jax.devices.batched import BatchedFn
from ddpm_jax.diffusion.samplers import make_sampler
from ddpm_jax.first_stage.latents import Latents
from ddpm_jax.keys import seeded
from ddpm_jax.models.build import Params
from ddpm_jax.runs.programs import Compiler
from ddpm_jax.sampling.draw import bind_for_sampling, make_draw
from ddpm_jax.training.setup import Run
from ddpm_jax.training.state import TrainState
from ddpm_jax.workdir import grids

_FIRST_S = 60.0  # of training, until the first early grid
_PATIENCE_S = 40.0  # longer, while what draws it compiles beside the training steps


class Preview:
  """Draws sample grids: the EMA weights beside the raw ones, from the same noise each time.

  Attributes:
    settings: how they are drawn, JSON values.
  """

  def __init__(self, run: Run, compiler: Compiler | None, class_names: Sequence[str] = ()):
    """Args:
    run: the run.
    compiler: if there will be grids, compiles what draws them after the step, beside the first training steps. None:
      the first grid waits for that.
    class_names: of the classes that a conditional model draws in turn.
    """
    options, schedule = run.config.train, run.schedule
    self.settings: dict[str, Any] = {  # named as those of a draw
      "sample_weights": "ema, raw",
      "sampler": "dpmpp",
      "sampling_steps": options.preview_steps,
      "sample_seed": options.seed,
    }
    self._draw = make_draw(
      bind_for_sampling(run),
      make_sampler(schedule, "dpmpp", num_steps=options.preview_steps),
      first_stage=run.first_stage,
      mesh=run.mesh,
      stream="preview",
      keep=True,
    )
    self._seed, self._first_stage = options.seed, run.stage_params
    index = np.arange(options.preview_images, dtype=np.int32)
    label = index % max(1, len(class_names))
    self._columns = (index, label) if run.conditional else (index,)
    self._captions = [class_names[i] for i in label.tolist()] if run.conditional else None
    self._ahead = bool(compiler and options.sample_every and run.mesh.compiles_beside_steps)
    if compiler and self._ahead:
      self._draw.compile_ahead(
        compiler.submit, seeded(run.abstract_state.params, self._seed, first_stage=run.stage_params), *self._columns
      )

  @property
  def compiling(self) -> bool:
    """Whether a grid would have to wait for what is being compiled beside the training steps."""
    return self._ahead and not self._draw.is_ready(*self._columns)

  def __call__(self, state: TrainState) -> Callable[[], np.ndarray]:
    """Begins a grid. Returns what waits for the picture, uint8 [height, width, 3], and gives it."""
    weights = {"EMA weights": state.ema["ema"], "raw weights": state.params}
    drawn = {
      name: self._draw.start(seeded(params, self._seed, first_stage=self._first_stage), *self._columns)
      for name, params in weights.items()
    }
    columns = min(8, len(self._columns[0]))
    return lambda: grids.captioned(
      {name: grids.image_grid(images(), columns, self._captions) for name, images in drawn.items()}
    )


class Reconstructions:
  """Sets images above what an autoencoder makes of them, with the EMA weights and without sampling.

  Attributes:
    settings: as those of `Preview`.
  """

  def __init__(self, run: Run, compiler: Compiler | None, source: Source):
    """Args:
    run: the run.
    compiler: see `Preview`.
    source: the images of the training, of which some are chosen, spread evenly.
    """
    assert run.pair
    stage = Latents(run.pair.autoencoder, run.image_shape)

    def reconstruct(params: Params, images: jax.Array) -> jax.Array:
      return stage.reconstruct(params["autoencoder"], images)

    self.settings: dict[str, Any] = {"sample_weights": "ema", "reconstructions": True}
    self._reconstruct = BatchedFn(reconstruct, run.mesh, keep=True)
    number = min(run.config.train.preview_images, len(source))
    self._images = source.read(np.arange(number) * len(source) // number).images
    self._ahead = bool(compiler and run.config.train.sample_every and run.mesh.compiles_beside_steps)
    if compiler and self._ahead:
      self._reconstruct.compile_ahead(compiler.submit, run.abstract_state.params, self._images)

  @property
  def compiling(self) -> bool:
    """See `Preview.compiling`."""
    return self._ahead and not self._reconstruct.is_ready(self._images)

  def __call__(self, state: TrainState) -> Callable[[], np.ndarray]:
    """See `Preview`: the picture has rows of images, each above the row of its reconstructions."""
    begun = self._reconstruct.start(state.ema["ema"], self._images)
    columns = min(8, len(self._images))

    return lambda: grids.captioned(
      {"images above their reconstructions": grids.image_pairs(self._images, begun(), columns)}
    )


class EarlyGrids:
  """When a grid is drawn although `--sample_every` is far: after 1, 2, 4, 8, ... minutes of training.

  More exactly, after a minute, and then when the newest grid, whyever it was drawn, is of the first half of the
  training time so far. The clock decides at which step that is, but neither where the calls of the step end nor what
  they compute. Of several processes that of the first one counts, and they hear of it with the votes of the step.
  """

  def __init__(self, seconds: Callable[[], float], *, wanted: bool):
    """Args:
    seconds: of training so far, those before a stop among them.
    wanted: whether there are to be grids at all.
    """
    self._seconds = seconds
    self._due = max(_FIRST_S, 2 * seconds()) if wanted else math.inf
    self._asked = False

  def due(self, *, compiling: bool = False) -> bool:
    """Whether a grid is to be drawn. compiling: see `Preview`; where that takes long, it is waited for."""
    return self._seconds() >= self._due + (_PATIENCE_S if compiling else 0.0)

  def ask(self) -> bool:
    """Whether to ask all processes for a grid: once, until it is drawn. Of the first process."""
    ask = jax.process_index() == 0 and not self._asked and self.due()
    self._asked |= ask
    return ask

  def drawn(self) -> None:
    """A grid was drawn."""
    self._due, self._asked = max(self._due, 2 * self._seconds()), False
