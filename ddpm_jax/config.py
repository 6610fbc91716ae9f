"""Every knob of a run, once: its name, default, help text, legal values, and whether it may change on resume.

A `Config` is a tree of frozen dataclasses, one for each concern. Field names are unique over the whole tree, so each
field is also one command-line flag (`flags.py`), one key of `workdir/config.json` and one line of `workdir/flags.txt`.
The defaults train a small U-Net on the embedded `digits`; the paper's settings are flagfiles in `experiments/`.

Standard library only, with `knob.py` and `errors.py`: anything may import this module.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from ddpm_jax.errors import UserError
from ddpm_jax.knob import check_range, knob


# A table: each knob takes as few lines as it can.
# fmt: off
@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which images, in which order, and how many in a batch."""

  dataset: str = knob("digits", "'digits' (embedded), any TensorFlow Datasets name such as 'cifar10' or "
                      "'lsun/bedroom', or 'folder:PATH' for a folder of PNG, JPEG or WebP images.")
  split: str = knob("train", "Split of a TFDS data set, in TFDS's notation ('train', 'train+test', 'train[:90%]').")
  data_dir: str = knob("", "Where prepared TFDS data sets live (empty: TFDS's own default, "
                       "~/tensorflow_datasets).", may_change=True)
  manual_dir: str = knob("", "A folder that already holds the data set's original files; TFDS verifies their "
                         "checksums and downloads nothing that is there.", may_change=True)
  image_size: int = knob(0, "Resize the short side to this many pixels and crop the centre (0: images as they are).",
                         minimum=0)
  batch_size: int = knob(64, "Images in one update, over all devices and processes.", minimum=1)
  random_flip: bool = knob(False, "Mirror each image left-right with probability 1/2.")
  cache_gib: float = knob(4.0, "Data sets whose uint8 images take at most this many GiB are decoded once and kept in "
                          "memory; larger ones are read from disk.", minimum=0, may_change=True)
  data_threads: int = knob(2, "Threads that read and decode batches ahead of the step.", minimum=1, may_change=True)
  on_bad_record: str = knob("fail", "An image that cannot be read: 'fail' ends the run, 'skip' takes the next image of "
                            "the data set in its place and counts it.", choices=("fail", "skip"), may_change=True)
  allow_data_change: bool = knob(False, "Go on with images that differ from those that the run was trained on so far.",
                                 may_change=True)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
  """The forward process, what the network predicts, and what it is penalised for."""

  num_timesteps: int = knob(1000, "T, the number of diffusion steps.", minimum=1)
  beta_schedule: str = knob("linear", "Noise schedule. 'quadratic' and 'scaled_linear' are the names that Ho et al. "
                            "and Latent Diffusion gave to the same formula, linear in sqrt(beta).",
                            choices=("linear", "quadratic", "scaled_linear", "cosine", "sigmoid"))
  beta_start: float = knob(1e-4, "beta_1.", above=0, below=1)
  beta_end: float = knob(0.02, "beta_T.", above=0, below=1)
  prediction: str = knob("eps", "What the network predicts: the noise, the image, or the velocity "
                         "v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0.", choices=("eps", "x0", "v"))
  loss: str = knob("l2", "Distance between the prediction and its target.", choices=("l2", "l1", "huber"))
  loss_weighting: str = knob("constant", "Weight of timestep t: 'constant' is the paper's L_simple for eps; "
                             "'min_snr' (Hang et al. 2023, gamma 5) and 'truncated_snr' (Salimans and Ho 2022) weigh "
                             "the error of x0 by min(SNR, 5) and max(SNR, 1), whatever the prediction.",
                             choices=("constant", "min_snr", "truncated_snr"))
  variance: str = knob("fixed_large", "Variance of the ancestral sampler's steps: beta_t (fixed_large, CIFAR-10 in "
                       "the released code) or the posterior variance (fixed_small, its 256x256 models).",
                       choices=("fixed_small", "fixed_large"), may_change=True)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The U-Net."""

  channels: int = knob(32, "Channels at the full resolution.", minimum=2)
  channel_multipliers: tuple[int, ...] = knob((1, 2), "Channels of each level as multiples of --channels; each "
                                              "level after the first halves the resolution.", minimum=1)
  num_res_blocks: int = knob(1, "Residual blocks of each level on the way down; one more on the way up.", minimum=1)
  attention_resolutions: tuple[int, ...] = knob((4,), "Heights, in pixels, of the levels whose residual blocks are "
                                                "followed by self-attention (empty: only the middle).", minimum=1)
  norm_groups: int = knob(0, "Groups of GroupNorm (0: the paper's 32, fewer where a group would have less than four "
                          "channels).", minimum=0)
  dropout: float = knob(0.0, "Dropout rate inside the residual blocks.", minimum=0, below=1)
  dtype: str = knob("float32", "Type of the activations; parameters, loss and optimiser are float32 always.",
                    choices=("float32", "bfloat16"))
  remat: str = knob("none", "'blocks' recomputes each residual block in the backward pass: less memory, a third more "
                    "arithmetic.", choices=("none", "blocks"), may_change=True)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Adam (beta1 0.9, beta2 0.999, epsilon 1e-8, as in the paper) and the moving average of the weights."""

  learning_rate: float = knob(2e-3, "Learning rate after the warm-up.", above=0)
  lr_schedule: str = knob("cosine", "After the warm-up: constant as in the paper, or a cosine down to zero at "
                          "--num_steps.", choices=("constant", "cosine"))
  warmup_steps: int = knob(100, "Updates over which the learning rate rises linearly from zero.", minimum=0)
  grad_clip: float = knob(1.0, "Largest global norm of the mean gradient (0: no clipping).", minimum=0)
  ema_decay: float = knob(0.995, "Decay of the exponential moving average of the weights; reached gradually as "
                          "min(decay, (1 + n) / (10 + n)) after n updates.", minimum=0, below=1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How long, on what, and what is written how often."""

  seed: int = knob(0, "Seed of everything random in training: initial weights, data order, timesteps, noise, flips, "
                   "dropout.", minimum=0, below=2**32)
  num_steps: int = knob(2000, "Updates in all.", minimum=1, may_change=True)
  parallel: str = knob("pmap", "How a step runs on several devices: 'pmap' replicates the state, 'fsdp' shards "
                       "parameters, optimiser state and EMA.", choices=("pmap", "fsdp"), may_change=True)
  grad_accum_steps: int = knob(1, "Split each batch into this many parts, one after the other: less memory, the same "
                               "update.", minimum=1, may_change=True)
  log_every: int = knob(25, "Updates between two lines of metrics.", minimum=1, may_change=True)
  checkpoint_every: int = knob(500, "Updates between two checkpoints.", minimum=1, may_change=True)
  sample_every: int = knob(500, "Updates between two sample grids (0: none).", minimum=0, may_change=True)
  keep_checkpoints: int = knob(3, "Newest checkpoints that are kept.", minimum=1, may_change=True)
  max_unsaved_steps: int = knob(0, "After a checkpoint that could not be written, updates that may be at risk before "
                                "the run ends with an error (0: twice --checkpoint_every).", minimum=0, may_change=True)
  on_corrupt: str = knob("fallback", "A checkpoint that is damaged: 'fallback' goes back to the newest intact one, "
                         "'fail' ends the run.", choices=("fallback", "fail"), may_change=True)
  on_nonfinite: str = knob("halt", "An update whose loss or gradient is infinite or not a number: 'halt' ends the run, "
                           "'skip' leaves the weights as they are and goes on.", choices=("halt", "skip"),
                           may_change=True)
  max_nonfinite: int = knob(10, "Non-finite updates in a row at which the run ends, with --on_nonfinite=skip.",
                            minimum=1, may_change=True)
  step_timeout: int = knob(1800, "Seconds that an update, a checkpoint or a sample grid may take before the process "
                           "counts as stuck: every thread's stack is printed and the process ends (0: never).",
                           minimum=0, may_change=True)
  heartbeat_timeout: int = knob(100, "Seconds after which a process of a job that is silent counts as lost.", minimum=5,
                                may_change=True)
  preview_images: int = knob(32, "Images in a sample grid during training, drawn with the EMA weights and with the "
                             "raw ones.", minimum=1, may_change=True)
  preview_steps: int = knob(50, "DDIM steps for the sample grids during training.", minimum=1, may_change=True)
  distributed: str = knob("auto", "'auto' joins the other processes of a Cloud TPU, Slurm, Open MPI or Kubernetes "
                          "job, or those that JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe; "
                          "'off' trains alone.", choices=("auto", "off"), may_change=True)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """What --mode=sample draws."""

  num_samples: int = knob(64, "Images to draw.", minimum=1, may_change=True)
  sampler: str = knob("ddpm", "'ddpm': ancestral, Algorithm 2 of Ho et al.; 'ddim': Song et al. 2021.",
                      choices=("ddpm", "ddim"), may_change=True)
  sampling_steps: int = knob(0, "Network evaluations for each image (0: all T).", minimum=0, may_change=True)
  eta: float = knob(0.0, "Noise of the DDIM sampler: 0 deterministic, 1 the ancestral posterior.", minimum=0,
                    maximum=1, may_change=True)
  sample_batch_size: int = knob(64, "Images drawn at once, over all devices. Does not change the images.", minimum=1,
                                may_change=True)
  sample_seed: int = knob(0, "Seed of the draw; image i depends on it and on i alone.", minimum=0, below=2**32,
                          may_change=True)
  sample_weights: str = knob("ema", "Draw with the moving average of the weights or with the raw ones.",
                             choices=("ema", "raw"), may_change=True)
# fmt: on


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run. `Config()` is the default one."""

  data: DataConfig = DataConfig()
  diffusion: DiffusionConfig = DiffusionConfig()
  model: ModelConfig = ModelConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  sample: SampleConfig = SampleConfig()

  def __post_init__(self):
    for _, field, value in knobs(self):
      check_range(field, value)
    _check_together(self)


def knobs(config: Config) -> Iterator[tuple[str, dataclasses.Field, Any]]:
  """Yields (section name, field, value) for every knob, in the order of definition."""
  for section in dataclasses.fields(Config):
    part = getattr(config, section.name)
    for field in dataclasses.fields(part):
      yield section.name, field, getattr(part, field.name)


def values(config: Config) -> dict[str, Any]:
  """The knobs as one flat dict, name to value."""
  return {field.name: value for _, field, value in knobs(config)}


def override(config: Config, changes: dict[str, Any]) -> Config:
  """A copy of `config` with the named knobs changed. Raises UserError for a value out of range."""
  unknown = changes.keys() - values(config).keys()
  if unknown:
    raise TypeError(f"no such knob: {', '.join(sorted(unknown))}")
  sections = {}
  for section in dataclasses.fields(Config):
    part = getattr(config, section.name)
    own = {name: value for name, value in changes.items() if name in {f.name for f in dataclasses.fields(part)}}
    sections[section.name] = dataclasses.replace(part, **own)
  return Config(**sections)


def changed(before: Config, after: Config, *, on_resume: bool = False) -> list[tuple[str, Any, Any]]:
  """The knobs in which two configs differ, as (name, before, after).

  Args:
    before: the config of the workdir.
    after: the config of this command.
    on_resume: leave out what a resumed run may change. `num_steps` may not change under a cosine schedule, whose
      learning rate depends on it.
  """
  differences = []
  for (_, field, old), (_, _, new) in zip(knobs(before), knobs(after), strict=True):
    free = field.metadata["may_change"] and not (field.name == "num_steps" and after.optimizer.lr_schedule == "cosine")
    if old != new and not (on_resume and free):
      differences.append((field.name, old, new))
  return differences


def to_json(config: Config) -> str:
  """The text of `workdir/config.json`."""
  return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
  """The inverse of `to_json`. A knob younger than the file takes its default; an unknown one is a UserError."""
  try:
    tree = json.loads(text)
  except json.JSONDecodeError as error:
    raise UserError(f"config.json is not JSON ({error}); restore it, or use another --workdir") from None
  if not isinstance(tree, dict) or not all(isinstance(part, dict) for part in tree.values()):
    raise UserError("config.json is not a JSON object of sections; restore it, or use another --workdir")
  known = {(section, field.name) for section, field, _ in knobs(Config())}
  flat = {}
  for section, part in tree.items():
    for name, value in part.items():
      if (section, name) not in known:
        raise UserError(
          f"config.json has {section}.{name}, which this version of ddpm_jax does not know; "
          "use the version that wrote it"
        )
      flat[name] = tuple(value) if isinstance(value, list) else value
  return override(Config(), flat)


def flag_text(value: Any) -> str:
  """A knob's value as it is written on the command line."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, tuple):
    return ",".join(map(str, value))
  return str(value)


def to_flagfile(config: Config) -> str:
  """The text of `workdir/flags.txt`: the same run as a flagfile."""
  lines, previous = [], None
  for section, field, value in knobs(config):
    if section != previous:
      lines.append(f"# {section}")
      previous = section
    lines.append(f"--{field.name}={flag_text(value)}")
  return "\n".join(lines) + "\n"


def _check_together(config: Config) -> None:
  """Raises UserError where two knobs contradict each other, or where one would silently do nothing."""
  diffusion, sample, defaults = config.diffusion, config.sample, DiffusionConfig()
  if diffusion.beta_schedule == "cosine":
    for name in ("beta_start", "beta_end"):
      if getattr(diffusion, name) != getattr(defaults, name):
        raise UserError(f"{name}: {getattr(diffusion, name)} has no effect with beta_schedule=cosine; leave it out")
  elif diffusion.beta_start > diffusion.beta_end:
    raise UserError(f"beta_start: {diffusion.beta_start} must not exceed beta_end={diffusion.beta_end}; lower it")
  if diffusion.loss_weighting != "constant" and diffusion.loss != "l2":
    raise UserError(f"loss_weighting: {diffusion.loss_weighting} is defined on squared errors; use --loss=l2")
  if diffusion.loss_weighting == "truncated_snr" and diffusion.prediction == "eps":
    raise UserError("loss_weighting: truncated_snr explodes at large t for prediction=eps; use --prediction=v or x0")
  for name, steps in (("sampling_steps", sample.sampling_steps), ("preview_steps", config.train.preview_steps)):
    if steps > diffusion.num_timesteps:
      raise UserError(f"{name}: {steps} must not exceed num_timesteps={diffusion.num_timesteps}; lower --{name}")
  if sample.eta and sample.sampler != "ddim":
    raise UserError(f"eta: {sample.eta} has no effect with sampler={sample.sampler}; use --sampler=ddim, or --eta=0")
  if config.train.max_nonfinite != TrainConfig().max_nonfinite and config.train.on_nonfinite == "halt":
    raise UserError(
      f"max_nonfinite: {config.train.max_nonfinite} has no effect with on_nonfinite=halt; use --on_nonfinite=skip"
    )
  if not config.model.channel_multipliers:
    raise UserError("channel_multipliers: empty; name one multiple for each level, such as 1,2,2,2")
  if config.model.channels % 2:
    raise UserError(
      f"channels: {config.model.channels} must be even, for the sines and cosines of the timestep; "
      f"use --channels={config.model.channels + 1}"
    )
  groups = config.model.norm_groups
  if groups and config.model.channels % groups:
    raise UserError(
      f"norm_groups: {groups} does not divide channels={config.model.channels}; use a divisor, or 0 to choose one"
    )
  if groups and groups == config.model.channels:
    raise UserError(
      f"norm_groups: {groups} leaves one channel in a group, whose norm would remove the timestep; use --norm_groups=0"
    )
  if config.data.batch_size % config.train.grad_accum_steps:
    raise UserError(
      f"grad_accum_steps: {config.train.grad_accum_steps} does not divide batch_size={config.data.batch_size}; use 1"
    )
  if config.optimizer.lr_schedule == "cosine" and config.optimizer.warmup_steps >= config.train.num_steps:
    raise UserError(
      f"warmup_steps: {config.optimizer.warmup_steps} must be less than num_steps={config.train.num_steps} with "
      "lr_schedule=cosine; lower --warmup_steps or raise --num_steps"
    )
