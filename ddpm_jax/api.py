"""A trained model in Python: `ddpm_jax.load(path)`, for notebooks and scripts.

  import ddpm_jax

  model = ddpm_jax.load("runs/digits")
  images = model.sample(64, seed=1)               # uint8 [64, H, W, C], as --mode=sample --sample_seed=1 draws them
  x0_hat = model.denoise(x, t=500)                # the estimate of the image in x_t
  model.config, model.schedule, model.params      # the settings, alpha_bar and its kin, the weights

`experiments/notebook.py` shows all of it. What is wrong is said by a `ddpm_jax.errors.UserError` of one line.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import pathlib

import jax
import numpy as np
from numpy.typing import ArrayLike

from ddpm_jax import config as config_lib
from ddpm_jax import terminal, workdir
from ddpm_jax.config import Config, SampleConfig
from ddpm_jax.diffusion.prediction import to_eps
from ddpm_jax.diffusion.schedules import NoiseSchedule
from ddpm_jax.errors import UserError
from ddpm_jax.exchange import initial
from ddpm_jax.models.build import Params, num_params
from ddpm_jax.sampling.draw import Predictor, draw_of, fit_batch, make_predictor, table_of
from ddpm_jax.sampling.weights import Weights
from ddpm_jax.training.parallel import ByRows


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A trained model: what it was trained with, its weights, and what it says.

  Images are uint8 in 0..255; what the network sees, x_t, is float32 with images in [-1, 1], see
  `ddpm_jax.data.images.to_float` and `to_uint8`. Timesteps t are in 1..T; t = 0 is the image itself.

  Attributes:
    config: the settings of the run.
    weights: the parameters, how far they were trained, and the network.
  """

  config: Config
  weights: Weights
  _draws: dict[SampleConfig, ByRows] = dataclasses.field(default_factory=dict, init=False, repr=False)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """H, W, C of an image."""
    return self.weights.run.image_shape

  @property
  def params(self) -> Params:
    """The network's parameters, a nested dict of float32 arrays."""
    return self.weights.params

  @property
  def schedule(self) -> NoiseSchedule:
    """float64 tables over t = 0..T: `betas`, `alpha_bar`, `snr`, ..."""
    return self.weights.run.schedule

  def __repr__(self) -> str:
    """What it is, in a line: the parameters themselves would be pages."""
    shape = "x".join(map(str, self.image_shape))
    return f"<Model of {shape} images, {num_params(self.params):,} parameters: {self.weights.text}>"

  def sample(
    self,
    num: int = 16,
    *,
    seed: int = 0,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
  ) -> np.ndarray:
    """Draws images: those of `--mode=sample --sample_seed=SEED`, to float32 rounding, which depends on the batch.

    Each sampler is compiled when it is first used, for each number of images; another seed compiles nothing.

    Args:
      num: of images, at least 1.
      seed: in 0..2^32 - 1. Image i depends on the weights, the seed and i alone.
      sampler: 'ddpm', 'ddim', 'dpmpp' or 'heun'.
      steps: network evaluations for each image, 0 for all T.
      eta: noise of 'ddim' and 'dpmpp', in [0, 1].
        What is None is as in `config.sample`.

    Returns:
      uint8 [num, H, W, C].

    Raises:
      UserError: for a value out of range, or one that has no effect.
    """
    asked = {"sampler": sampler, "sampling_steps": steps, "eta": eta}
    given = {name: value for name, value in asked.items() if value is not None}
    whole = {"num_samples": num, "sample_seed": seed, **({} if steps is None else {"sampling_steps": steps})}
    given |= {name: _whole_number(name, value) for name, value in whole.items()}
    config, num, seed = config_lib.override(self.config, given), given["num_samples"], given["sample_seed"]
    options = dataclasses.replace(config.sample, num_samples=1, sample_seed=0)  # no part of the program
    draw, constants, asked_size = self._draw(options), (self.params, np.uint32(seed)), options.sample_batch_size
    size = min(asked_size, num) if asked_size else fit_batch(draw, constants, np.zeros(1, np.int32), number=num)
    index = np.arange(num, dtype=np.int32)
    return np.concatenate([draw(constants, index[first : first + size], size=size) for first in range(0, num, size)])

  def denoise(self, x: ArrayLike, t: ArrayLike) -> np.ndarray:
    """x0_hat: the image that the network sees in x_t, kept in range as `config.sample.threshold` says.

    Args:
      x: x_t, float [B, H, W, C].
      t: the timestep of each, int [B], or of all, in 1..T.

    Returns:
      float32 [B, H, W, C].

    Raises:
      UserError: if x or t is not of this shape, type or range.
    """
    return self._x0_hat(self.params, *self._checked(x, t))

  def eps(self, x: ArrayLike, t: ArrayLike) -> np.ndarray:
    """eps_hat: the noise that the network sees in x_t, whatever it was trained to predict. As `denoise`, no range."""
    return self._eps_hat(self.params, *self._checked(x, t))

  def _predictor(self, options: SampleConfig) -> Predictor:
    run = self.weights.run
    return make_predictor(run.network, run.schedule, self.config.diffusion.prediction, options)

  def _draw(self, options: SampleConfig) -> ByRows:
    """((params, seed), index) -> images; compiled once, as the seed is no part of the program."""
    if options not in self._draws:
      run = self.weights.run
      table = table_of(options, run.schedule, self.config.diffusion.variance)
      draw = draw_of(self._predictor(options), table, image_shape=run.image_shape, stream="sample")
      self._draws[options] = run.parallel.by_rows(lambda constants, index: draw(constants[0], constants[1], index))
    return self._draws[options]

  @functools.cached_property
  def _x0_hat(self) -> ByRows:
    predictor = self._predictor(self.config.sample)
    return self.weights.run.parallel.by_rows(lambda params, xt, t: predictor(params)(xt, t))

  @functools.cached_property
  def _eps_hat(self) -> ByRows:
    predictor = self._predictor(dataclasses.replace(self.config.sample, threshold="none"))
    to_eps_each = jax.vmap(functools.partial(to_eps, self.schedule))
    return self.weights.run.parallel.by_rows(lambda params, xt, t: to_eps_each(predictor(params)(xt, t), xt, t))

  def _checked(self, x: ArrayLike, t: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """float32 [B, H, W, C] and int32 [B]. Raises UserError."""
    x, t = _array("x", x), _array("t", t)
    if x.ndim != 4 or x.shape[1:] != self.image_shape or not len(x):
      raise UserError(f"x: {list(x.shape)} is not [B, {', '.join(map(str, self.image_shape))}]; make it so")
    if not np.issubdtype(x.dtype, np.floating):
      raise UserError(
        f"x: {x.dtype} is not x_t, which is float; turn pixels into it with images.to_float, and add noise"
      )
    if not np.issubdtype(t.dtype, np.integer) or t.shape not in ((), x.shape[:1]):
      raise UserError(f"t: {t.dtype} {list(t.shape)} is neither a whole number nor [{len(x)}] of them")
    last = self.schedule.num_timesteps
    if t.min() < 1 or t.max() > last:
      raise UserError(f"t: {t.min()} to {t.max()} is not in 1..{last}")
    return x.astype(np.float32), np.broadcast_to(t.astype(np.int32), x.shape[:1])


def _array(name: str, values: ArrayLike) -> np.ndarray:
  try:
    return np.asarray(values)
  except ValueError as error:
    raise UserError(f"{name}: its rows are not of one length, so it is no array; make it one") from error


def _whole_number(name: str, value: int) -> int:
  """A Python integer, as knobs are, of one of NumPy too."""
  try:
    return operator.index(value)
  except TypeError:
    raise UserError(f"{name}: a {type(value).__name__} is no whole number; write one such as 16") from None


def load(
  path: str | os.PathLike[str],
  *,
  checkpoint: str | int = "newest",
  weights: str = "ema",
  dtype: str | None = None,
  matmul_precision: str | None = None,
) -> Model:
  """Reads a trained model.

  Args:
    path: a workdir, a folder of diffusers, or a safetensors file of `--mode=export`.
    checkpoint: of a workdir: 'newest', 'best' or a number of updates.
    weights: of a workdir: 'ema', the moving average of the parameters, or 'raw', the parameters themselves.
    dtype: of the activations, 'float32' or 'bfloat16'.
    matmul_precision: of float32 products, 'default', 'high' or 'highest'.
      What is None is as the model was trained.

  Returns:
    The model, on all devices of this process. It computes as the command does, whatever JAX's options are in this
    process: the precision of products, 64-bit types and the implementation of random keys are its own.

  Raises:
    UserError: if there is no such model, or it cannot be read.
  """
  place = initial.absolute(os.fspath(path))
  how = {"dtype": dtype, "matmul_precision": matmul_precision}
  asked = {"checkpoint": str(checkpoint), "sample_weights": weights} | {k: v for k, v in how.items() if v is not None}
  if initial.look(place).kind == "workdir":
    config = config_lib.override(workdir.load_config(pathlib.Path(place)), asked)
    with terminal.errors_alone():
      return Model(config, initial.find_weights(config, pathlib.Path(place)))
  if weights != "ema":
    raise UserError(f"weights: {place} is no workdir, so {weights!r} has no effect; leave it out")
  config = config_lib.override(initial.beginning(place, None), asked | {"init_from": place})
  return Model(config, initial.find_weights(config, None))
