"""A trained model in Python: `ddpm_jax.load(path)`, for notebooks and scripts.

  import ddpm_jax

  model = ddpm_jax.load("runs/digits")
  images = model.sample(64, seed=1)               # uint8 [64, H, W, C], as --mode=sample --sample_seed=1 draws them
  x0_hat = model.denoise(x, t=500)                # the estimate of the image in x_t
  latents = model.encode(images)                  # what is diffused: of a latent model its latents; model.decode
  model.config, model.schedule, model.params      # the settings, alpha_bar and its kin, the weights

`experiments/notebook.py` shows all of it. What is wrong is said by a `ddpm_jax.errors.UserError` of one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import numbers
import operator
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
from numpy.typing import ArrayLike

from ddpm_jax import config as config_lib
from ddpm_jax import flags, resolve
from ddpm_jax.config import Config
from ddpm_jax.data.sources import Source, from_array
from ddpm_jax.devices.batched import BatchedFn
from ddpm_jax.diffusion.schedules import NoiseSchedule
from ddpm_jax.errors import UserError
from ddpm_jax.keys import seeded
from ddpm_jax.models.build import Params, TrainableNetwork, num_params
from ddpm_jax.runtime import numerics, paths, terminal
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.sampling.classes import one_scale, wanted
from ddpm_jax.sampling.draw import bind_for_sampling, bind_weights, constants_of, fit_batch, make_draw, table_of
from ddpm_jax.training.objective import Objective
from ddpm_jax.training.setup import Run
from ddpm_jax.weights import first_stage, initial
from ddpm_jax.weights.autoencoders import is_autoencoder
from ddpm_jax.weights.load import Weights
from ddpm_jax.workdir import layout

# Parameters of `Model.sample` that are shorter than the options that they are; the others have the same names.
SHORT_NAMES = {
  "num": "num_samples",
  "seed": "sample_seed",
  "steps": "sampling_steps",
  "batch_size": "sample_batch_size",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A trained model: what it was trained with, its weights, and what it says.

  Images are uint8 in 0..255; what the network sees, x_t, is float32 with images in [-1, 1], or their latents: `encode`
  and `decode` go from one to the other. Timesteps t are in 1..T; t = 0 is the image itself.

  An autoencoder, a first stage alone, encodes and decodes, and neither draws nor denoises; its `schedule` means
  nothing.

  Attributes:
    config: the settings of the run.
    weights: the parameters, how far they were trained, and the network.
  """

  config: Config
  weights: Weights
  _draws: dict[tuple, BatchedFn] = dataclasses.field(default_factory=dict, init=False, repr=False)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """H, W, C of an image."""
    return self.weights.run.image_shape

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """Of what the network sees: of a latent model h, w, z; else that of the images."""
    return self.weights.run.first_stage.latent_shape

  @property
  def params(self) -> Params:
    """The network's parameters, a nested dict of float32 arrays."""
    return self.weights.params

  @property
  def class_names(self) -> tuple[str, ...]:
    """Of the classes of a conditional model, in the order of their numbers; empty for an unconditional one."""
    return self.weights.class_names

  @property
  def schedule(self) -> NoiseSchedule:
    """float64 tables over t = 0..T: `betas`, `alpha_bar`, `snr`, ..."""
    return self.weights.run.schedule

  def __repr__(self) -> str:
    """What it is, in a line: the parameters themselves would be pages."""
    shape = "x".join(map(str, self.image_shape))
    what = "Autoencoder" if self._is_autoencoder else "Model"
    return f"<{what} of {shape} images, {num_params(self.params):,} parameters: {self.weights.text}>"

  def sample(
    self,
    num: int = 16,
    *,
    seed: int = 0,
    sampler: str | None = None,
    steps: int | None = None,
    time_grid: str | None = None,
    eta: float | None = None,
    variance: str | None = None,
    threshold: str | None = None,
    threshold_quantile: float | None = None,
    batch_size: int | None = None,
    classes: str | int | Sequence[str | int] | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    guide_with: Model | None = None,
    classifier_scale: float | None = None,
  ) -> np.ndarray:
    """Draws images: those of `--mode=sample --sample_seed=SEED`, to float32 rounding, which depends on the batch.

    Each sampler is compiled when it is first used, for each number of images; another seed compiles nothing. Which
    checkpoint and which weights is said to `load`.

    Args:
      num: of images, at least 1.
      seed: in 0..2^32 - 1. Image i depends on the weights, the seed and i alone.
      sampler: 'ddpm', ancestral sampling (Ho et al. 2020, Algorithm 2); 'ddim' (Song et al. 2021); 'dpmpp',
        DPM-Solver++(2M) (Lu et al. 2022); 'heun' on the probability-flow ODE (Karras et al. 2022).
      steps: network evaluations for each image, in 0..T; 0 for all T.
      time_grid: where they are: 'trailing', 'uniform', 'quadratic', 'logsnr', 'logistic', or 'auto' for the one that
        suits the sampler.
      eta: noise of 'ddim' and 'dpmpp', in [0, 1]; 0: deterministic.
      variance: of 'ddpm': 'fixed_large' or 'fixed_small'.
      threshold: what keeps x0_hat in range: 'static' clips to [-1, 1], 'dynamic' at a quantile of its absolute values
        (Saharia et al. 2022), 'none'.
      threshold_quantile: of 'dynamic', in (0, 1].
      batch_size: images at once, over all devices; 0: as many as fit. Changes images by rounding alone.
      classes: names or numbers of the classes that a conditional model draws in turn; empty: all of `class_names`.
      guidance_scale: g in D = D_guide + g (D_cond - D_guide); 1: no guidance.
      guidance_interval: (lo, hi), where to guide: lo < sqrt((1 - alpha_bar) / alpha_bar) <= hi; empty: everywhere.
      guide_with: a worse model of the same images, noise and classes, away from which this one is guided (Karras et al.
        2024), such as an earlier checkpoint; None: that of `config`, or else this one without the class.
      classifier_scale: s of s grad log p(class | x_t), by which the classifier that `load` was given guides.
        What else is None is as in `config`.

    Returns:
      uint8 [num, H, W, C].

    Raises:
      UserError: for a value out of range, or one that has no effect.
    """
    self._check_draws()
    asked = {
      "num": num,
      "seed": seed,
      "sampler": sampler,
      "steps": steps,
      "time_grid": time_grid,
      "eta": eta,
      "variance": variance,
      "threshold": threshold,
      "threshold_quantile": threshold_quantile,
      "batch_size": batch_size,
      "classes": (classes,) if isinstance(classes, str | numbers.Integral) else classes,
      "guidance_scale": guidance_scale if guidance_scale is None else (guidance_scale,),
      "guidance_interval": guidance_interval,
      "classifier_scale": classifier_scale,
    }
    if guidance_scale == 1.0 and guide_with is None:  # also where `config` says how to guide
      asked |= {"guidance_interval": guidance_interval or (), "guide_with": ""}
    options = config_lib.values(Config())
    given = {SHORT_NAMES.get(name, name): value for name, value in asked.items() if value is not None}
    with _parameters_named():
      given = {name: _as_option(name, value, type(options[name])) for name, value in given.items()}
      config = config_lib.override(self.config, given)
      config_lib.check_variance(given, config)
      scale, weights = one_scale(config.sample), self.weights
      if guide_with is not None:
        weights = _guided_by(weights, guide_with, scale)
      chosen = wanted(config.sample, weights)
    num, asked_size = config.sample.num_samples, config.sample.sample_batch_size
    draw, constants = self._draw(config, weights), constants_of(weights, config.sample)
    index = np.arange(num, dtype=np.int32)
    columns = (index,) if chosen is None else (index, chosen.of(index))
    size = min(asked_size, num) if asked_size else fit_batch(draw, constants, *columns, number=num)
    rows = [[column[first : first + size] for column in columns] for first in range(0, num, size)]
    return np.concatenate([draw(constants, *row, size=size) for row in rows])

  def encode(self, images: ArrayLike) -> np.ndarray:
    """x_0 of images: of a latent model the mean of their latents, standardised; else pixels in [-1, 1].

    Of an autoencoder alone the mean of their latents as it is: what standardises them, the mean and deviation over a
    data set, is measured when a latent model begins.

    Args:
      images: uint8 [B, H, W, C].

    Returns:
      float32 [B, *latent_shape].

    Raises:
      UserError: if they are not of this shape and type.
    """
    images = _array("images", images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self.image_shape or not len(images):
      are_latents = images.shape[1:] == self.latent_shape != self.image_shape
      remedy = "make images of latents first: model.decode(x0)" if are_latents else "make it so"
      raise UserError(
        f"images: {images.dtype} {list(images.shape)} is not uint8 [B, {', '.join(map(str, self.image_shape))}]; "
        f"{remedy}"
      )
    return self._encode(self.weights.run.stage_params, images)

  def decode(self, x0: ArrayLike) -> np.ndarray:
    """The inverse of `encode`, as far as there is one: the images of x_0.

    Args:
      x0: float [B, *latent_shape].

    Returns:
      uint8 [B, H, W, C].

    Raises:
      UserError: if x0 is not of this shape and type.
    """
    return self._decode(self.weights.run.stage_params, self._checked_x("x0", x0))

  def denoise(self, x: ArrayLike, t: ArrayLike, label: ArrayLike | None = None) -> np.ndarray:
    """x0_hat: the image that the network sees in x_t, kept in range as `config.sample.threshold` says.

    Args:
      x: x_t, float [B, *latent_shape].
      t: the timestep of each, int [B], or of all, in 1..T.
      label: of a conditional model the class of each, int [B], or of all: its number in `class_names`. None: any class,
        for a model of `label_dropout`.

    Returns:
      float32 [B, *latent_shape].

    Raises:
      UserError: if x, t or label is not of this shape, type or range.
    """
    return self._x0_hat(self.params, *self._checked(x, t, label))

  def eps(self, x: ArrayLike, t: ArrayLike, label: ArrayLike | None = None) -> np.ndarray:
    """eps_hat: the noise that the network sees in x_t, whatever it was trained to predict. As `denoise`, no range."""
    return self._eps_hat(self.params, *self._checked(x, t, label))

  @property
  def _is_autoencoder(self) -> bool:
    return self.config.model.stage == "autoencoder"

  def _check_draws(self) -> None:
    """Raises UserError for an autoencoder."""
    if self._is_autoencoder:
      raise UserError(
        "an autoencoder draws and denoises nothing, it has encode and decode; train a latent model on it, with it as "
        "first_stage, and load that"
      )

  def _draw(self, config: Config, weights: Weights) -> BatchedFn:
    """(`Seeded`, index) -> images; made once for all that is part of the program."""
    # Neither is how many, which seed, how many at once, of which class.
    options = dataclasses.replace(config.sample, num_samples=1, sample_seed=0, sample_batch_size=0, classes=())
    if options.classifier:  # nor by how much a classifier guides them
      options = dataclasses.replace(options, classifier_scale=2.0)
    if config_lib.guided(options):  # nor by how much another model does
      options = dataclasses.replace(options, guidance_scale=(2.0,))
    guide, variance = weights.guide, config.diffusion.variance
    pair = guide and (guide.run.denoiser, guide.run.conditional)
    if (options, variance, pair) not in self._draws:
      run = self.weights.run
      self._draws[options, variance, pair] = make_draw(
        bind_weights(weights, options),
        table_of(options, run.schedule, variance),
        first_stage=run.first_stage,
        mesh=run.mesh,
        stream="sample",
      )
    return self._draws[options, variance, pair]

  @functools.cached_property
  def _encode(self) -> BatchedFn:
    stage = self.weights.run.first_stage
    return BatchedFn(lambda params, images: stage.x0(params, stage.moments(params, images)), self.weights.run.mesh)

  @functools.cached_property
  def _decode(self) -> BatchedFn:
    return BatchedFn(self.weights.run.first_stage.decode, self.weights.run.mesh)

  @functools.cached_property
  def _x0_hat(self) -> BatchedFn:
    run = self.weights.run
    bind = bind_for_sampling(run, self.config.sample)
    return BatchedFn(
      lambda params, xt, t, label=None: bind(seeded(params, 0), label)(xt, run.schedule.level(t)).x0, run.mesh
    )

  @functools.cached_property
  def _eps_hat(self) -> BatchedFn:
    run = self.weights.run
    return BatchedFn(
      lambda params, xt, t, label=None: run.denoiser.bind(params, label)(xt, run.schedule.level(t)).eps, run.mesh
    )

  def _checked(self, x: ArrayLike, t: ArrayLike, label: ArrayLike | None) -> tuple[np.ndarray, ...]:
    """float32 [B, H, W, C], int32 [B] and, of a conditional model, the labels int32 [B]. Raises UserError."""
    self._check_draws()
    x, t = self._checked_x("x", x), _array("t", t)
    if not np.issubdtype(t.dtype, np.integer) or t.shape not in ((), x.shape[:1]):
      raise UserError(f"t: {t.dtype} {list(t.shape)} is neither a whole number nor [{len(x)}] of them")
    last = self.schedule.num_timesteps
    if t.min() < 1 or t.max() > last:
      raise UserError(f"t: {t.min()} to {t.max()} is not in 1..{last}")
    checked = x, np.broadcast_to(t.astype(np.int32), x.shape[:1])
    labels = self._checked_labels(label, len(x))
    return checked if labels is None else (*checked, labels)

  def _checked_x(self, name: str, x: ArrayLike) -> np.ndarray:
    """float32 [B, *latent_shape]. Raises UserError."""
    x = _array(name, x)
    if x.ndim != 4 or x.shape[1:] != self.latent_shape or not len(x):
      are_images = x.shape[1:] == self.image_shape != self.latent_shape
      remedy = "encode images first: model.encode(images)" if are_images else "make it so"
      raise UserError(f"{name}: {list(x.shape)} is not [B, {', '.join(map(str, self.latent_shape))}]; {remedy}")
    if not np.issubdtype(x.dtype, np.floating):
      more = "" if name == "x0" else ", and add noise"
      raise UserError(f"{name}: {x.dtype} is not what the network sees, which is float; `encode` images{more}")
    return x.astype(np.float32)

  def _checked_labels(self, label: ArrayLike | None, number: int) -> np.ndarray | None:
    """int32 [number]; None for an unconditional model. Raises UserError."""
    run, names = self.weights.run, self.class_names
    if not run.conditional:
      if label is not None:
        raise UserError("label: has no effect, as the model is unconditional; leave it out")
      return None
    if label is None and run.null_label is None:
      raise UserError(f"label: missing; give a number in 0..{len(names) - 1}, see class_names")
    labels = _array("label", cast(int, run.null_label) if label is None else label)
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape not in ((), (number,)):
      raise UserError(f"label: {labels.dtype} {list(labels.shape)} is neither a whole number nor [{number}] of them")
    if label is not None and (labels.min() < 0 or labels.max() >= len(names)):
      raise UserError(f"label: {labels.min()} to {labels.max()} is not in 0..{len(names) - 1}, see class_names")
    return np.broadcast_to(labels.astype(np.int32), (number,))


def _guided_by(weights: Weights, guide: Model, scale: float) -> Weights:
  """The weights with those of a guide. Raises UserError if it cannot guide them, or there is nothing to guide."""
  if not isinstance(guide, Model):
    raise UserError(f"guide_with: {guide!r} is no model; give what ddpm_jax.load returns")
  if scale == 1.0:
    raise UserError("guide_with: has no effect with guidance_scale=1; use another scale, such as 2")
  try:
    guide._check_draws()
    initial.check_guide(weights, guide.weights)
  except UserError as error:
    raise UserError(f"guide_with: {error}") from None
  return weights._replace(guide=guide.weights)


def _array(name: str, values: ArrayLike) -> np.ndarray:
  try:
    return np.asarray(values)
  except ValueError as error:
    raise UserError(f"{name}: its rows are not of one length, so it is no array; make it one") from error


@contextlib.contextmanager
def _parameters_named() -> Iterator[None]:
  """A UserError about a flag names the parameter of `Model.sample` instead."""
  try:
    yield
  except UserError as error:
    text = str(error)
    for parameter, flag in SHORT_NAMES.items():
      text = re.sub(rf"(--)?\b{flag}\b", parameter, text)
    raise UserError(re.sub(r"--(?=[a-z])", "", text)) from None


def _as_option(name: str, value: object, kind: type) -> object:
  """A value as an option of this type is: Python's own numbers in the place of NumPy's. Ranges are for the option."""
  if kind is tuple and isinstance(value, Sequence | np.ndarray):
    of_texts = name == "classes"
    return tuple(str(part) if of_texts else _as_option(name, part, float) for part in value)
  if kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
    return float(value)
  if kind is not int:
    return value
  try:
    return operator.index(value)  # pyright: ignore[reportArgumentType]
  except TypeError:
    raise UserError(f"{name}: a {type(value).__name__} is no whole number; write one such as 16") from None


def load(
  path: str | os.PathLike[str],
  *,
  checkpoint: str | int = "newest",
  weights: str = "ema",
  dtype: str | None = None,
  matmul_precision: str | None = None,
  network: TrainableNetwork | None = None,
  classifier: str | os.PathLike[str] = "",
) -> Model:
  """Reads a trained model.

  Args:
    path: a workdir, a folder of diffusers, or a safetensors file of `--mode=export`; also those of a first stage alone:
      the workdir of `--stage=autoencoder`, a folder of diffusers' AutoencoderKL or VQModel, its file.
    checkpoint: of a workdir: 'newest', 'best' or a number of training steps.
    weights: of a workdir: 'ema', the moving average of the parameters, or 'raw', the parameters themselves.
    dtype: of the activations, 'float32' or 'bfloat16'.
    matmul_precision: of float32 products, 'default', 'high' or 'highest'.
      What is None is as the model was trained.
    network: that of a workdir which was trained with one of your own.
    classifier: the workdir of a classifier of noisy images that guides the draws towards their classes.

  Returns:
    The model, on all devices of this process. It computes as the command does, whatever JAX's options are in this
    process: the precision of products, 64-bit types and the implementation of random keys are its own. A first stage
    alone has `encode` and `decode`, in float32; its `sample` and `denoise` raise a UserError. Its latents are those of
    the network, scaled where its folder or file says so, as by diffusers' scaling_factor.

  Raises:
    UserError: if there is no such model, or it cannot be read.
  """
  place = initial.absolute(os.fspath(path))
  how = {"dtype": dtype, "matmul_precision": matmul_precision}
  asked = {"checkpoint": str(checkpoint), "sample_weights": weights} | {k: v for k, v in how.items() if v is not None}
  asked |= {"classifier": os.fspath(classifier)} if classifier else {}
  alone = is_autoencoder(pathlib.Path(place))
  if not alone and initial.inspect_source(place, autoencoders=True).kind == "workdir":
    config = config_lib.override(layout.load_config(pathlib.Path(place)), asked)
    own = {} if network is None else {"network": layout.describe_own(network)}
    layout.check_own(pathlib.Path(place), own, ["network"])
    with terminal.errors_alone():
      if config.model.stage == "autoencoder":
        _check_alone(place, dtype=dtype, classifier=classifier)
        return Model(config, first_stage.load_alone(config, pathlib.Path(place)))
      return Model(config, initial.find_weights(config, pathlib.Path(place), network))
  for name, value, other in (
    ("network", network, None),
    ("weights", weights, "ema"),
    ("checkpoint", checkpoint, "newest"),
  ):
    if value != other:
      what = "it" if name == "network" else repr(value)
      raise UserError(f"{name}: {place} is no workdir, so {what} has no effect; leave it out")
  if alone:
    _check_alone(place, dtype=dtype, classifier=classifier)
    found = first_stage.load_other_alone(pathlib.Path(place), config_lib.override(Config(), asked))
    return Model(found.run.config, found)
  config = config_lib.override(initial.base_config(place), asked | {"init_from": place})
  return Model(config, initial.find_weights(config, None))


def _check_alone(place: str, **options: object) -> None:
  """Raises UserError if one of the options is named, none of which a first stage alone has."""
  for name, value in options.items():
    if value:
      raise UserError(f"{name}: {place} holds an autoencoder, on which it has no effect; leave it out")


def train(
  config: Config,
  workdir: str | os.PathLike[str],
  *,
  network: TrainableNetwork | None = None,
  objective: Callable[[Run], Objective] | None = None,
  source: Source | np.ndarray | None = None,
) -> Model:
  """Trains a model as the command does, and goes on where it was stopped: give the same arguments again.

  A workdir that was trained with an own network or objective says so in its config.json and in its checkpoints. The
  command refuses to train there, and with an own network to do anything; `load` takes the network. Call it in the main
  thread: Ctrl-C stops after the training steps under way and saves. It then returns the model saved so far.

  Args:
    config: the settings, such as `config.override(Config(), {"num_steps": 500})`.
    workdir: the folder of the run, on disk; may not exist yet.
    network: is trained, in the place of the U-Net of the settings: a frozen dataclass, equal by value.
    objective: makes the loss from the parts of the run, in the place of the denoiser's: a frozen dataclass, too.
    source: the images, in the place of `config.data.dataset`: uint8 [N, H, W, C], or a `data.sources.Source`, whose
      fingerprint must change with them.

  Returns:
    The model as it was saved last, with the average of its weights; of `stage="autoencoder"` a first stage alone, whose
    workdir is the `first_stage` of another run.

  Raises:
    UserError: before anything is compiled, if these do not fit together, or the workdir is of another run.
    RunError: if what must be kept cannot be written.
    NonFiniteError: if the loss or the gradient is not finite.
  """
  from ddpm_jax.runs import train as train_lib  # with all of a run, of which `load` needs nothing

  folder = paths.absolute("workdir", os.fspath(workdir), "mount the storage and name the folder")
  if config.model.stage == "classifier":
    raise UserError("stage: this returns a model that draws, or a first stage; train a classifier by the command")
  defaults = config_lib.values(Config())
  named = {name: value for name, value in config_lib.values(config).items() if value != defaults[name]}
  kept = resolve.with_absolute_models(flags.placed(named))  # paths as the command keeps them in a workdir
  config = config_lib.override(config, {name: value for name, value in kept.items() if value != named[name]})
  if network is not None and (config.exchange.init_from or config.train.evaluate_every):
    raise UserError(
      "network: your own begins with random weights and is not measured; leave init_from and evaluate_every out"
    )
  if source is not None and not isinstance(source, Source):
    source = from_array(source)
  if source is not None and not source.fingerprint:
    raise UserError("source: it has no fingerprint, so other images would not be noticed on resume; give it one")
  if source is not None:  # nobody else can open it by its name
    config = config_lib.override(config, {"dataset": f"own:{source.name}"})
  given = frozenset({"first_stage"} if config.diffusion.first_stage else ())
  stored = layout.read_run(folder)
  if stored:  # what is settled there
    now, settled = config_lib.values(config), config_lib.values(stored.config)
    open_values = config_lib.LEFT_TO_IMAGES | {"first_stage": ""}
    left_open = [name for name, value in open_values.items() if now[name] == value]
    config = config_lib.override(config, {name: settled[name] for name in left_open})
  numerics.check_options(config.model.matmul_precision)
  with StopRequest() as stop:
    own = train_lib.Own(network, objective, source)
    train_lib.train(config, folder, train_lib.Invocation(stop, given=given, own=own))
  return load(folder, network=network)
