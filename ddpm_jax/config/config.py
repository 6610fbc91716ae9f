"""`Config`: a whole run as one value, and what its options mean together.

Field names are unique over all sections, so each field is also one command-line flag (`flags.py`), one key of
`workdir/config.json` and one line of `workdir/flags.txt`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator
from typing import Any

from ddpm_jax.config.option import check_range, flag_text, image_size
from ddpm_jax.config.sections import (
  AUTOENCODER_MEASURES,
  WITHOUT_ENDS,
  AutoencoderConfig,
  DataConfig,
  DiffusionConfig,
  EvaluateConfig,
  ExchangeConfig,
  ModelConfig,
  OptimizerConfig,
  PlanConfig,
  SampleConfig,
  TrainConfig,
)
from ddpm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run. `Config()` is the default one."""

  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  autoencoder: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
  evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
  plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)
  exchange: ExchangeConfig = dataclasses.field(default_factory=ExchangeConfig)

  def __post_init__(self):
    for _, field, value in options(self):
      check_range(field, value)
    _check_together(self)


def options(config: Config) -> Iterator[tuple[str, dataclasses.Field, Any]]:
  """Yields (section name, field, value) for every option, in the order of definition."""
  for section in dataclasses.fields(Config):
    part = getattr(config, section.name)
    for field in dataclasses.fields(part):
      yield section.name, field, getattr(part, field.name)


def values(config: Config) -> dict[str, Any]:
  """The options as one flat dict, name to value."""
  return {field.name: value for _, field, value in options(config)}


def override(config: Config, changes: dict[str, Any]) -> Config:
  """A copy of `config` with the named options changed. Raises UserError for a value out of range."""
  unknown = changes.keys() - values(config).keys()
  if unknown:
    raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
  sections = {}
  for section in dataclasses.fields(Config):
    part = getattr(config, section.name)
    own = {name: value for name, value in changes.items() if name in {f.name for f in dataclasses.fields(part)}}
    sections[section.name] = dataclasses.replace(part, **own)
  return Config(**sections)


# The value of `attention_resolutions` that leaves it to the size of the images: `models.build.fitted`. A workdir holds
# what it came to.
AUTO_ATTENTION = (0,)

# Values of options that leave them to the images: a workdir holds what they came to.
LEFT_TO_IMAGES = {"attention_resolutions": AUTO_ATTENTION, "num_classes": 0}

# Kinds of collections of image files: `dataset` is KIND:PATH.
OWN_IMAGES = ("folder", "zip", "webdataset", "parquet")


def own_images(dataset: str) -> tuple[str, str] | None:
  """Kind and path of a collection of image files; None for a data set of another kind."""
  kind, colon, path = dataset.partition(":")
  return (kind, path) if colon and kind in OWN_IMAGES else None


def threshold_of(sample: SampleConfig, *, latent: bool) -> str:
  """What keeps x0_hat in range, where 'auto' leaves it to what is diffused: 'static', 'dynamic' or 'none'."""
  if sample.threshold != "auto":
    return sample.threshold
  return "none" if latent else "static"


def check_size(model: ModelConfig, height: int, width: int, *, shrinks: int = 1) -> None:
  """Raises UserError if the levels cannot halve images of that size, which names the nearest sizes that they can.

  shrinks: how many pixels in a row a first stage makes one number of.
  """
  levels = len(model.channel_multipliers)
  factor = 2 ** (levels - 1) * shrinks
  if height % factor or width % factor:
    heights, widths = ([n * factor for n in (size // factor, -(-size // factor))] for size in (height, width))
    nearest = [image_size(*sides) for sides in zip(heights, widths, strict=True) if all(sides)]
    first = f"the first stage, which makes them {shrinks} times smaller, and " if shrinks > 1 else ""
    raise UserError(
      f"image_size: {image_size(height, width)} is not divisible by {factor}, as {first}the {levels} levels of "
      f"channel_multipliers need; use --image_size={' or '.join(map(str, nearest))}, or fewer levels"
    )


def changed(
  before: Config, after: Config, *, on_resume: bool = False, once_trained: bool = False
) -> list[tuple[str, Any, Any]]:
  """The options in which two configs differ, as (name, before, after).

  Args:
    before: the config of the workdir.
    after: the config of this command.
    on_resume: leave out what a resumed run may change. Where own images lie may, and whether as a folder or packed,
      and where a first stage does: whether they are the same is for their fingerprint, or digest, to say.
    once_trained: leave out, with `on_resume`, also what may change where trained weights are only used.
  """
  differences, rule = [], "may_change_once_trained" if once_trained else "may_change"
  for (_, field, old), (_, _, new) in zip(options(before), options(after), strict=True):
    moved = field.name == "dataset" and own_images(old) is not None and own_images(new) is not None
    moved |= field.name == "first_stage" and bool(old) and bool(new)
    if old != new and not (on_resume and (field.metadata[rule] or moved)):
      differences.append((field.name, old, new))
  return differences


# Options for the command that gives them and for no later one: a consent, a look at some steps.
_FOR_ONE_COMMAND = ("allow_data_change", "profile_steps")


def without_one_time_options(config: Config) -> Config:
  """The settings of a workdir as a later command takes them up.

  Nor are classes among --writers: a workdir may be somebody else's, and nothing that it names is imported.
  """
  changes = {name: value for name, value in values(Config()).items() if name in _FOR_ONE_COMMAND}
  ours = [name for name in writer_names(config.train.writers) if ":" not in name]
  return override(config, changes | {"writers": ",".join(ours)})


def check_variance(given: Container[str], config: Config) -> None:
  """Raises UserError if the options that are `given` for a draw name a variance, which only ancestral sampling has."""
  if "variance" in given and config.sample.sampler != "ddpm":
    raise UserError(
      f"variance: {config.diffusion.variance} has no effect with sampler={config.sample.sampler}; leave "
      "--variance out, or use --sampler=ddpm"
    )


def profiled(profile_steps: str, num_steps: int) -> range:
  """The training steps that --profile_steps=A:B names, A to B; empty if none.

  Raises:
    UserError: unless they are 1 <= A <= B <= num_steps.
  """
  if not profile_steps:
    return range(0)
  first, colon, last = profile_steps.partition(":")
  if not (colon and all(part.isascii() and part.isdigit() for part in (first, last))):
    raise UserError(f"profile_steps: {profile_steps!r} is not A:B; name training steps, such as 100:110")
  if int(first) > int(last):
    raise UserError(f"profile_steps: {profile_steps} runs backwards; use {last}:{first}")
  if not (int(first) >= 1 and int(last) <= num_steps):
    raise UserError(
      f"profile_steps: {profile_steps} does not lie in 1:{num_steps}, the steps of --num_steps; use others"
    )
  return range(int(first), int(last) + 1)


# Options of drawing that choose among the weights of a workdir.
NAMES_WEIGHTS = ("checkpoint", "sample_weights")


def reset_weight_selectors(config: Config) -> Config:
  """The settings once a run has weights of its own: with --init_from, what named weights named those of elsewhere."""
  if not config.exchange.init_from:
    return config
  return override(config, {name: getattr(SampleConfig(), name) for name in NAMES_WEIGHTS})


def writer_names(text: str) -> tuple[str, ...]:
  """The names in --writers. Raises UserError for one that is none, or stands there twice."""
  names = tuple(name for part in text.split(",") if (name := part.strip()))
  for name in names:
    module, colon, attribute = name.partition(":")
    is_class = colon and all(part.isidentifier() for part in (*module.split("."), attribute))
    if name not in ("tensorboard", "wandb") and not is_class:
      raise UserError(f"writers: {name!r} is unknown; use tensorboard, wandb, or package.module:Class")
  if len(set(names)) < len(names):
    raise UserError(f"writers: {text} names one twice; name each once")
  return names


def _check_together(config: Config) -> None:
  """Raises UserError where two options contradict each other, or where one would silently do nothing."""
  diffusion, sample, defaults, idle = config.diffusion, config.sample, DiffusionConfig(), without_effect(config)
  _check_data(config.data)
  if diffusion.beta_schedule in WITHOUT_ENDS:
    for name in _ENDS:
      if getattr(diffusion, name) != getattr(defaults, name):
        raise UserError(
          f"{name}: {getattr(diffusion, name)} has no effect with beta_schedule={diffusion.beta_schedule}; leave it out"
        )
  elif diffusion.beta_start > diffusion.beta_end:
    raise UserError(f"beta_start: {diffusion.beta_start} must not exceed beta_end={diffusion.beta_end}; lower it")
  if diffusion.loss_weighting != "constant" and diffusion.loss != "l2":
    raise UserError(f"loss_weighting: {diffusion.loss_weighting} is defined on squared errors; use --loss=l2")
  if diffusion.loss_weighting == "truncated_snr" and diffusion.prediction == "eps":
    raise UserError("loss_weighting: truncated_snr explodes at large t for prediction=eps; use --prediction=v or x0")
  for name, steps in (("sampling_steps", sample.sampling_steps), ("preview_steps", config.train.preview_steps)):
    if steps > diffusion.num_timesteps:
      raise UserError(f"{name}: {steps} must not exceed num_timesteps={diffusion.num_timesteps}; lower --{name}")
  _check_data(config.data)
  if diffusion.first_stage and sample.threshold in ("static", "dynamic"):
    raise UserError(f"threshold: {sample.threshold} is of pixels, and latents have no range; leave --threshold out")
  _check_sample(sample, diffusion.num_timesteps)
  _check_evaluate(config)
  _check_exchange(config.exchange)
  writer_names(config.train.writers)
  if config.train.max_nonfinite != TrainConfig().max_nonfinite and config.train.on_nonfinite == "halt":
    raise UserError(
      f"max_nonfinite: {config.train.max_nonfinite} has no effect with on_nonfinite=halt; use --on_nonfinite=skip"
    )
  profiled(config.train.profile_steps, config.train.num_steps)
  if 1 <= config.train.stop_exit_code <= 3:
    raise UserError(
      f"stop_exit_code: {config.train.stop_exit_code} says how a run failed; use 0, or one of 4 to 125, such as 75"
    )
  if not config.model.channel_multipliers:
    raise UserError("channel_multipliers: empty; name one multiple for each level, such as 1,2,2,2")
  if config.model.channels % 2 and config.model.stage != "autoencoder":  # which is told no timestep
    raise UserError(
      f"channels: {config.model.channels} must be even, for the sines and cosines of the timestep; "
      f"use --channels={config.model.channels + 1}"
    )
  _check_conditioning(config)
  _check_autoencoder(config)
  _check_guidance(config.sample)
  if "num_heads" in idle and config.model.num_heads != ModelConfig().num_heads:
    raise UserError(
      f"num_heads: {config.model.num_heads} has no effect with head_channels={config.model.head_channels}; leave one "
      "of them out"
    )
  groups = config.model.norm_groups
  if groups and config.model.channels % groups:
    raise UserError(
      f"norm_groups: {groups} does not divide channels={config.model.channels}; use a divisor, or 0 to choose one"
    )
  if groups and groups == config.model.channels and config.model.stage != "autoencoder":
    raise UserError(
      f"norm_groups: {groups} leaves one channel in a group, whose norm would remove the timestep; use --norm_groups=0"
    )
  if config.data.batch_size % config.train.grad_accum_steps:
    raise UserError(
      f"grad_accum_steps: {config.train.grad_accum_steps} does not divide batch_size={config.data.batch_size}; use 1"
    )
  optimizer = config.optimizer
  if "decay_fraction" in idle and optimizer.decay_fraction != OptimizerConfig().decay_fraction:
    raise UserError(
      f"decay_fraction: {optimizer.decay_fraction} has no effect with lr_schedule={optimizer.lr_schedule}; use "
      "--lr_schedule=constant_then_decay, or leave it out"
    )


def guided(sample: SampleConfig) -> bool:
  """Whether images are drawn with guidance."""
  return any(scale != 1.0 for scale in sample.guidance_scale)


def _check_guidance(sample: SampleConfig) -> None:
  if sample.classifier_scale != SampleConfig().classifier_scale and not sample.classifier:
    raise UserError(f"classifier_scale: {sample.classifier_scale} has no effect without --classifier; set that too")
  if not sample.guidance_scale:
    raise UserError("guidance_scale: empty; use 1 for no guidance")
  if len(set(sample.guidance_scale)) < len(sample.guidance_scale):
    raise UserError(f"guidance_scale: {flag_text(sample.guidance_scale)} names one twice; name each once")
  for name in ("guidance_interval", "guide_with"):
    if (value := getattr(sample, name)) and not guided(sample):
      raise UserError(
        f"{name}: {flag_text(value)} has no effect with guidance_scale=1; use --guidance_scale=2, or --{name}="
      )
  if interval := sample.guidance_interval:
    text = flag_text(interval)
    if len(interval) != 2:
      raise UserError(f"guidance_interval: {text} is not LO,HI; write two noise levels such as 0.2,1.6")
    if interval[0] >= interval[1]:
      raise UserError(f"guidance_interval: {text} holds no noise level; write the lower one first, such as 0.2,1.6")


def draws_by_class(config: Config) -> bool:
  """Whether images are drawn by class: the model is told it, or a classifier guides."""
  return config.data.conditioning == "class" or bool(config.sample.classifier)


def reads_classes(config: Config) -> bool:
  """Whether training reads the class of each image."""
  return config.data.conditioning == "class" or config.model.stage == "classifier"


def conditioning_text(config: Config) -> str:
  """What a denoiser is told beside the timestep, in words: 'by class (9 classes, label dropout 0.1)'; '' if nothing."""
  if config.model.stage != "denoiser" or config.data.conditioning != "class":
    return ""
  number = config.model.num_classes
  classes = f"{number:,} {'class' if number == 1 else 'classes'}, " if number else ""  # 0: not counted yet
  return f"by class ({classes}label dropout {config.model.label_dropout:g})"


# Options that a stage has no use for, and is refused with.
WITHOUT_USE = {
  "denoiser": (),
  "classifier": (
    *("conditioning", "label_dropout", "prediction", "loss", "loss_weighting", "evaluate_every", "init_from"),
  ),
  "autoencoder": (
    *("conditioning", "num_classes", "label_dropout", "prediction", "loss_weighting", "first_stage", "block"),
    *("num_heads", "head_channels", "init_from", "evaluate_samples", "reference_split", "reference_stats"),
  ),
}
# Options of the diffusion that an autoencoder reads; the others it leaves alone, also where a flagfile has them.
_OF_DIFFUSION_FOR_AUTOENCODERS = ("loss",)
_ENDS = ("beta_start", "beta_end")
_OF_CLASSES = ("num_classes", "label_dropout")


def without_effect(config: Config) -> frozenset[str]:
  """Names of the options that say nothing of a model of these settings: its stage, or another option, ignores them.

  >>> sorted(without_effect(Config()) - {field.name for field in dataclasses.fields(AutoencoderConfig)})
  ['label_dropout', 'num_classes']
  """
  stage, names = config.model.stage, set(WITHOUT_USE[config.model.stage])
  if stage == "autoencoder":
    names |= {field.name for field in dataclasses.fields(DiffusionConfig)} - {*_OF_DIFFUSION_FOR_AUTOENCODERS}
    names |= {name for name, (*_, has_effect) in _needs(config.autoencoder).items() if not has_effect}
  else:
    names |= {field.name for field in dataclasses.fields(AutoencoderConfig)}
  if stage == "denoiser" and config.data.conditioning == "none":
    names.update(_OF_CLASSES)
  if config.diffusion.beta_schedule in WITHOUT_ENDS:
    names.update(_ENDS)
  if config.model.head_channels:
    names.add("num_heads")
  if config.optimizer.lr_schedule != "constant_then_decay":
    names.add("decay_fraction")
  return frozenset(names)


def _check_conditioning(config: Config) -> None:
  stage = config.model.stage
  for field, value in [(field, value) for _, field, value in options(config) if field.name in WITHOUT_USE[stage]]:
    if value != field.default:
      raise UserError(f"{field.name}: {flag_text(value)} has no effect with stage={stage}; leave it out")
  if stage == "denoiser" and config.data.conditioning == "none":
    for name in _OF_CLASSES:
      if value := getattr(config.model, name):
        raise UserError(f"{name}: {value} has no effect with conditioning=none; use --conditioning=class")


def _needs(of: AutoencoderConfig) -> dict[str, tuple[str, str, bool]]:
  """Options of an autoencoder that need another: its name, a value that gives them an effect, whether they have one."""
  return {
    "codebook_size": ("regularizer", "vq", of.regularizer == "vq"),
    "kl_weight": ("regularizer", "kl", of.regularizer == "kl"),
    "perceptual_weight": ("perceptual", "lpips", of.perceptual != "none"),
    **dict.fromkeys(
      ("discriminator_start", "discriminator_warmup", "discriminator_layers"),
      ("discriminator_weight", "0.5", of.discriminator_weight > 0),
    ),
  }


def _check_autoencoder(config: Config) -> None:
  now, defaults, stage = config.autoencoder, AutoencoderConfig(), config.model.stage
  named = [field.name for field in dataclasses.fields(now) if getattr(now, field.name) != getattr(defaults, field.name)]
  if named and stage != "autoencoder":
    value = flag_text(getattr(now, named[0]))
    raise UserError(f"{named[0]}: {value} has no effect with stage={stage}; use --stage=autoencoder, or leave it out")
  needs = _needs(now)
  for name in named:
    option, value, has_effect = needs.get(name, ("", "", True))
    if not has_effect:
      raise UserError(
        f"{name}: {flag_text(getattr(now, name))} has no effect with {option}={flag_text(getattr(now, option))}; use "
        f"--{option}={value}, or --{name}={flag_text(getattr(defaults, name))} as by default"
      )
  if now.perceptual == "lpips" and not now.lpips_weights:
    raise UserError(
      "lpips_weights: missing; name the safetensors file that experiments/convert_lpips.py made, or use "
      "--perceptual=features"
    )
  if now.discriminator_warmup > now.discriminator_start:
    raise UserError(
      f"discriminator_warmup: {now.discriminator_warmup} must not exceed discriminator_start="
      f"{now.discriminator_start}, before which it lies; lower it"
    )


# Kinds of data sets whose records have no such fields.
_WITHOUT_FIELD = {"label_field": ("digits", "folder", "zip"), "image_field": ("digits", "folder", "zip", "webdataset")}


def _check_data(data: DataConfig) -> None:
  kind = data.dataset.partition(":")[0]
  for name, kinds in _WITHOUT_FIELD.items():
    if kind in kinds and getattr(data, name):
      raise UserError(f"{name}: {getattr(data, name)} has no effect with dataset={kind}; leave it out")
  defaults = DataConfig()
  for name in ("resize", "crop", "resample"):
    if getattr(data, name) != getattr(defaults, name) and not data.image_size:
      raise UserError(f"{name}: {getattr(data, name)} has no effect with image_size=0; set --image_size, such as 64")
  if data.crop == "random" and data.resize != "crop":
    raise UserError(f"crop: random has no effect with resize={data.resize}; use --resize=crop")


# Options of drawing that only some tasks read.
_OF_TASKS = {
  "input_images": ("interpolate", "inpaint", "reconstruct"),
  "mask": ("inpaint",),
  "repaint_jump": ("inpaint",),
  "repaint_resamples": ("inpaint",),
  "interpolation_timestep": ("interpolate",),
  "sample_png_dir": ("images",),
}


def _check_sample(sample: SampleConfig, num_timesteps: int) -> None:
  task, defaults = sample.sample_task, SampleConfig()
  for name, tasks in _OF_TASKS.items():
    value = getattr(sample, name)
    if value != getattr(defaults, name) and task not in tasks:
      raise UserError(
        f"{name}: {value!r} has no effect with sample_task={task}; use --sample_task={' or '.join(tasks)}, or leave "
        "it out"
      )
  if task == "inpaint" and sample.sampler not in ("ddpm", "ddim"):
    raise UserError(f"sampler: {sample.sampler} cannot inpaint, as its steps look back; use --sampler=ddpm or ddim")
  if task == "reconstruct" and (sample.sampler != "ddim" or sample.eta or sample.threshold == "dynamic"):
    raise UserError(
      "sample_task: reconstruct needs a sampler that can be run backwards; use --sampler=ddim with --eta=0 and without "
      "--threshold"
    )
  if sample.interpolation_timestep > num_timesteps:
    raise UserError(
      f"interpolation_timestep: {sample.interpolation_timestep} must not exceed num_timesteps={num_timesteps}; lower it"
    )
  if sample.eta and sample.sampler not in ("ddim", "dpmpp"):
    raise UserError(
      f"eta: {sample.eta} has no effect with sampler={sample.sampler}; use --sampler=ddim or dpmpp, or --eta=0"
    )
  if sample.threshold_quantile != defaults.threshold_quantile and sample.threshold != "dynamic":
    raise UserError(
      f"threshold_quantile: {sample.threshold_quantile} has no effect with threshold={sample.threshold}; use "
      "--threshold=dynamic"
    )
  if sample.checkpoint not in ("newest", "best") and not (sample.checkpoint.isascii() and sample.checkpoint.isdigit()):
    raise UserError(f"checkpoint: {sample.checkpoint!r} is unknown; use newest, best, or a number of training steps")


def measures(config: Config) -> tuple[str, ...]:
  """The names in --measures; where nothing is named, the defaults of the stage."""
  named = config.evaluate.measures
  by_default = config.model.stage == "autoencoder" and named == EvaluateConfig().measures
  return AUTOENCODER_MEASURES if by_default else named


def _check_measures(config: Config) -> None:
  """Raises UserError unless what --measures names is of the stage."""
  named, is_autoencoder = measures(config), config.model.stage == "autoencoder"
  if not named:
    known = AUTOENCODER_MEASURES if is_autoencoder else (*EvaluateConfig().measures, "classes", "ode")
    raise UserError(f"measures: empty; name some of {', '.join(known)}")
  for name in named:
    if is_autoencoder and name not in AUTOENCODER_MEASURES:
      raise UserError(
        f"measures: {name} has no effect with stage=autoencoder; name some of {', '.join(AUTOENCODER_MEASURES)}"
      )
    if not is_autoencoder and name in AUTOENCODER_MEASURES and name != "frechet":
      raise UserError(f"measures: {name} has no effect with stage={config.model.stage}; it is of --stage=autoencoder")


def _check_evaluate(config: Config) -> None:
  evaluate, defaults, train = config.evaluate, EvaluateConfig(), config.train
  _check_measures(config)
  for name in ("bound_timesteps", "ode_steps"):
    if getattr(evaluate, name) > config.diffusion.num_timesteps and getattr(evaluate, name) != getattr(defaults, name):
      raise UserError(
        f"{name}: {getattr(evaluate, name)} must not exceed num_timesteps={config.diffusion.num_timesteps}; lower it"
      )
  if not draws_by_class(config):
    if "classes" in evaluate.measures:
      raise UserError("measures: classes needs a model of --conditioning=class, or --classifier; leave it out")
    if evaluate.evaluate_labels != defaults.evaluate_labels:
      raise UserError(
        f"evaluate_labels: {evaluate.evaluate_labels} has no effect with conditioning=none and without --classifier; "
        "leave it out"
      )
  if evaluate.evaluate_samples == 1:
    raise UserError("evaluate_samples: 1 must be at least 2; use 0 for as many as fit")
  if evaluate.features == "inception" and not evaluate.inception_weights:
    raise UserError(
      "inception_weights: missing; name the safetensors file that experiments/convert_inception.py made, or use "
      "--features=auto"
    )
  for name in ("inception_weights", "inception_resize"):
    if evaluate.features != "inception" and getattr(evaluate, name) != getattr(defaults, name):
      raise UserError(f"{name}: has no effect with features={evaluate.features}; use --features=inception")
  if evaluate.reference_stats:
    if evaluate.write_reference:
      raise UserError("write_reference: nothing is compared where statistics are written; leave --reference_stats out")
    if evaluate.reference_split:
      raise UserError(
        f"reference_split: {evaluate.reference_split} has no effect with --reference_stats; leave one of them out"
      )
  if evaluate.write_reference and not evaluate.write_reference.endswith(".npz"):
    raise UserError(
      f"write_reference: {evaluate.write_reference} does not end in .npz, by which others know such files"
    )
  if train.evaluate_every and train.best_measure not in measures(config):
    raise UserError(f"best_measure: {train.best_measure} is none of --measures={','.join(measures(config))}; add it")
  if train.best_measure != TrainConfig().best_measure and not train.evaluate_every:
    raise UserError(f"best_measure: {train.best_measure} has no effect without --evaluate_every; set that too")


def _check_exchange(exchange: ExchangeConfig) -> None:
  defaults = ExchangeConfig()
  if not exchange.export_platforms:
    raise UserError(f"export_platforms: empty; name some of {', '.join(defaults.export_platforms)}")
  for name in ("export_platforms", "export_batch_sizes"):
    value = getattr(exchange, name)
    if len(set(value)) < len(value):
      raise UserError(f"{name}: {flag_text(value)} names one twice; name each once")
    if value != getattr(defaults, name) and exchange.export_format != "jax":
      raise UserError(f"{name}: has no effect with export_format={exchange.export_format}; use --export_format=jax")
