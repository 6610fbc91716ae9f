"""The options of diffusers' UNet2DModel and schedulers <-> our settings.

Each is understood, at the values that our networks have, or refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_jax.config import BETA_SCHEDULES, WITHOUT_ENDS, Config, DiffusionConfig, ModelConfig, threshold_of
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.errors import UserError
from ddpm_jax.models.build import num_labels
from ddpm_jax.models.layers import BLOCKS, num_norm_groups
from ddpm_jax.weights.checks import (
  Options,
  check_class,
  check_known,
  check_value,
  image_shape_of,
  one_of,
  whole_number,
  whole_numbers,
)

# Options of UNet2DModel that our network has not: its default there, and the values that leave nothing of it.
_ONLY = {
  "center_input_sample": (False, (False,)),
  "time_embedding_type": ("positional", ("positional",)),
  "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
  "mid_block_scale_factor": (1, (1,)),
  "act_fn": ("silu", ("silu", "swish")),
  "add_attention": (True, (True,)),
  "class_embed_type": (None, (None,)),
}
# Those that follow from --block, and their defaults there.
_OF_BLOCK = {
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "norm_eps": 1e-5,
  "resnet_time_scale_shift": "default",
  "downsample_type": "conv",
  "upsample_type": "conv",
  "downsample_padding": 1,  # 0: one row below and right
}
_UNDERSTOOD = {
  *("sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "down_block_types"),
  *("up_block_types", "dropout", "norm_num_groups", "attention_head_dim", "attn_norm_num_groups", "num_class_embeds"),
  *("time_embedding_dim", "num_train_timesteps"),  # the last is read with learned embeddings only
  *_OF_BLOCK,
}
# Ours, which diffusers passes over: at which rate labels were dropped, so that the last row is for none; and, beside a
# DDIMScheduler, which has none, the variance of the ancestral sampler.
_LABEL_DROPOUT = "_label_dropout"
_VARIANCE = "_variance_type"

# Ours -> theirs; of two that are one formula the first is ours.
_SCHEDULES = {
  "linear": "linear",
  "scaled_linear": "scaled_linear",
  "quadratic": "scaled_linear",
  "cosine": "squaredcos_cap_v2",
  "sigmoid": "sigmoid",
}
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_VARIANCES = {"fixed_small": "fixed_small", "fixed_large": "fixed_large"}
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
_SCHEDULER_ONLY = {
  "rescale_betas_zero_snr": (False, (False,)),
  "predict_epsilon": (True, (True,)),  # until diffusers 0.10
  "timestep_values": (None, (None,)),  # until diffusers 0.1
}
_SCHEDULER_UNDERSTOOD = {
  *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "prediction_type"),
  *("variance_type", "clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio"),
  *("sample_max_value",),
  # How to draw, which is for --sampler and its flags to say, and what the scheduler's arrays were once.
  *("timestep_spacing", "steps_offset", "set_alpha_to_one", "tensor_format"),
}
_NO_LIMIT = 1e30  # of dynamic thresholding: ours has none, and theirs must be a number


# The network.


def unet_options(model: ModelConfig, image_shape: tuple[int, int, int]) -> dict[str, Any]:
  """What makes of UNet2DModel the U-Net of `model` for images (H, W, C).

  Raises:
    UserError: if it cannot be made of it.
  """
  height, width, channels = image_shape
  if model.channels == 2:
    raise UserError("channels: with 2, the timestep's embedding of diffusers is not a number; use --export_format=jax")
  if model.channel_multipliers[0] != 1:
    raise UserError(
      f"channel_multipliers: the first is {model.channel_multipliers[0]}, and 1 in every network of diffusers; use "
      "--export_format=safetensors"
    )
  attention = [height >> level in model.attention_resolutions for level in range(len(model.channel_multipliers))]
  widths = [model.channels * multiplier for multiplier in model.channel_multipliers]
  groups, labels = model.norm_groups or num_norm_groups(model.channels), num_labels(model)
  plain = _plain_types(model.block)
  return {
    "sample_size": height if height == width else [height, width],
    "in_channels": channels,
    "out_channels": channels,
    "layers_per_block": model.num_res_blocks,
    "block_out_channels": widths,
    "down_block_types": ["AttnDownBlock2D" if has else plain["Down"] for has in attention],
    "up_block_types": ["AttnUpBlock2D" if has else plain["Up"] for has in reversed(attention)],
    "attention_head_dim": _head_channels(model, _attended(widths, attention)),
    "norm_num_groups": groups,
    **({"attn_norm_num_groups": groups} if BLOCKS[model.block].scale_shift else {}),  # else the middle would have none
    "dropout": model.dropout,
    "num_class_embeds": labels or None,
    **({_LABEL_DROPOUT: model.label_dropout} if labels > model.num_classes else {}),
    **{name: values[0] for name, (_, values) in _ONLY.items()},
    **_OF_BLOCK,
    **_options_of_block(model.block),
  }


def model_settings(options: Options) -> tuple[dict[str, Any], tuple[int, int, int]]:
  """Settings of `ModelConfig`, with `conditioning` where there are classes, and the shape (H, W, C) of the images.

  Raises:
    UserError: names the option that is unknown, missing, or of a value that our networks do not have.
  """
  check_class(options, ("UNet2DModel",))
  check_known(options, _UNDERSTOOD, _ONLY)
  block = _block(options)
  widths = whole_numbers(options, "block_out_channels", (224, 448, 672, 896))
  channels = widths[0]
  if any(width % channels for width in widths):
    raise UserError(f"block_out_channels: {list(widths)} are not multiples of the first")
  groups = whole_number(options, "norm_num_groups", 32)
  check_value(options, "time_embedding_dim", None, (None, 4 * channels))
  # Without it, attention in the middle has no norm beside a scale and a shift.
  check_value(options, "attn_norm_num_groups", None, (groups,) if BLOCKS[block].scale_shift else (None, groups))
  attention = _attention(options, block, len(widths))
  image_shape = image_shape_of(options)
  return {
    "channels": channels,
    "channel_multipliers": tuple(width // channels for width in widths),
    "num_res_blocks": options.get("layers_per_block", 2),
    "attention_resolutions": tuple(image_shape[0] >> level for level, has in enumerate(attention) if has),
    "block": block,
    **_heads(options, _attended(widths, attention)),
    "norm_groups": groups,
    "dropout": options.get("dropout", 0.0),
    **_classes(options),
  }, image_shape


def _options_of_block(name: str) -> dict[str, Any]:
  """Those of `_OF_BLOCK` that are not what they are by default, or matter."""
  block = BLOCKS[name]
  resampling = "resnet" if block.residual_resampling else "conv"
  return {
    "flip_sin_to_cos": block.cosines_first,
    "freq_shift": 0 if block.cosines_first else 1,
    "norm_eps": block.epsilon,
    "resnet_time_scale_shift": "scale_shift" if block.scale_shift else "default",
    "downsample_type": resampling,
    "upsample_type": resampling,
    **({} if block.residual_resampling else {"downsample_padding": 0 if block.downsample == "down" else 1}),
  }


def _block(options: Options) -> str:
  """The block whose options these are. Raises UserError, which names one by which the most similar block differs."""

  def differs(name: str) -> dict[str, Any]:
    wanted = _options_of_block(name).items()
    return {option: value for option, value in wanted if options.get(option, _OF_BLOCK[option]) != value}

  name = min(BLOCKS, key=lambda name: len(differs(name)))
  for option, value in differs(name).items():
    check_value(options, option, _OF_BLOCK[option], (value,))
  return name


def _plain_types(block: str) -> dict[str, str]:
  """The types of levels without attention, on both ways."""
  if BLOCKS[block].residual_resampling:
    return {"Down": "ResnetDownsampleBlock2D", "Up": "ResnetUpsampleBlock2D"}
  return {"Down": "DownBlock2D", "Up": "UpBlock2D"}


def _attention(options: Options, block: str, levels: int) -> list[bool]:
  """Which levels have attention."""
  found = {}
  for way, default in (("Down", "down_block_types"), ("Up", "up_block_types")):
    kinds = options.get(default)
    plain, attentive = _plain_types(block)[way], f"Attn{way}Block2D"
    if not isinstance(kinds, list | tuple) or len(kinds) != levels:
      raise UserError(f"{default}: {kinds!r} is no list of {levels} blocks, as many as block_out_channels has")
    for i, kind in enumerate(kinds):
      last = (f"{way}Block2D",) if i == levels - 1 else ()  # the same there, where the resolution stays
      if kind not in (plain, attentive, *last):
        raise UserError(f"{default}: {kind!r} is not supported, only {plain} and {attentive} are")
    found[way] = [kind == attentive for kind in kinds]
  if found["Up"] != found["Down"][::-1]:
    raise UserError("up_block_types: attention is not at the levels of down_block_types, which is not supported")
  return found["Down"]


def _attended(widths: Sequence[int], attention: Sequence[bool]) -> list[int]:
  """The numbers of channels that have attention: of these levels, and in the middle."""
  return [width for width, has in zip(widths, attention, strict=True) if has] + [widths[-1]]


def _head_channels(model: ModelConfig, attended: Sequence[int]) -> int | None:
  """`attention_head_dim`, which is the number of channels of a head; None is one head."""
  if model.head_channels or model.num_heads == 1:
    return model.head_channels or None
  if len(set(attended)) > 1:
    raise UserError(
      f"num_heads: {model.num_heads} heads have {' or '.join(str(width // model.num_heads) for width in attended)} "
      "channels, and all as many in diffusers; use --export_format=safetensors"
    )
  return attended[0] // model.num_heads


def _heads(options: Options, attended: Sequence[int]) -> dict[str, int]:
  """The inverse of `_head_channels`."""
  if options.get("attention_head_dim", 8) in (None, *(attended if len(set(attended)) == 1 else ())):
    return {"num_heads": 1, "head_channels": 0}
  size = whole_number(options, "attention_head_dim", 8)
  for width in attended:
    if width % size:
      raise UserError(f"attention_head_dim: {size} does not divide {width} channels that have attention")
  return {"num_heads": 1, "head_channels": size}


def _classes(options: Options) -> dict[str, Any]:
  """Settings of a conditional network; none of another."""
  if options.get("num_class_embeds") is None:
    return {}
  labels, dropout = whole_number(options, "num_class_embeds", 0), options.get(_LABEL_DROPOUT, 0.0)
  if type(dropout) is not float or not 0 <= dropout < 1 or (dropout and labels == 1):
    raise UserError(f"{_LABEL_DROPOUT}: {dropout!r} is no rate at which labels of {labels} rows were dropped")
  return {"conditioning": "class", "num_classes": labels - (dropout > 0), "label_dropout": dropout}


# The scheduler.


def scheduler_options(config: Config, kind: str = "DDPMScheduler", *, latent: bool = False) -> dict[str, Any]:
  """A scheduler with the betas, the variance, the prediction and the clipping of a run.

  Its images are free of noise with any number of steps.

  Args:
    config: of the run.
    kind: DDPMScheduler, or DDIMScheduler, which has no variance.
    latent: whether latents are diffused.
  """
  diffusion, sample = config.diffusion, config.sample
  threshold = threshold_of(sample, latent=latent)
  theirs = _SCHEDULES.get(diffusion.beta_schedule)  # one that diffusers does not have is written as its betas
  if kind == "DDIMScheduler" and theirs == "sigmoid":
    theirs = None
  variance = _VARIANCES[diffusion.variance]
  own = {_VARIANCE: variance, "set_alpha_to_one": True} if kind == "DDIMScheduler" else {"variance_type": variance}
  return {
    **own,
    "num_train_timesteps": diffusion.num_timesteps,
    "beta_schedule": theirs or "linear",
    "beta_start": diffusion.beta_start,
    "beta_end": diffusion.beta_end,
    "trained_betas": None if theirs else _betas_of(diffusion),
    "prediction_type": _PREDICTIONS[diffusion.prediction],
    "clip_sample": threshold == "static",
    "clip_sample_range": 1.0,
    "thresholding": threshold == "dynamic",
    "dynamic_thresholding_ratio": sample.threshold_quantile,
    "sample_max_value": _NO_LIMIT,
    # Ends at their t = 0. DDPMScheduler adds no noise there, but does in a last step from any other timestep: with
    # "trailing" and "fixed_large" of variance 1 - alpha_bar_t, left in the image.
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
  }


def diffusion_settings(options: Options) -> dict[str, Any]:
  """Settings of `DiffusionConfig`, and `threshold` of `SampleConfig`. Raises UserError as `model_settings`."""
  check_class(options, _SCHEDULERS)
  check_known(options, _SCHEDULER_UNDERSTOOD, _SCHEDULER_ONLY)
  prediction = one_of(options, "prediction_type", "epsilon", _PREDICTIONS)
  settings = {"prediction": prediction, **_betas(options), **_threshold(options)}
  if options["_class_name"] == "DDPMScheduler":
    kinds = {**_VARIANCES, "fixed_small_log": "fixed_small_log"}  # the same variance, by way of its logarithm
    settings["variance"] = one_of(options, "variance_type", "fixed_small", kinds).removesuffix("_log")
  elif _VARIANCE in options:
    settings["variance"] = one_of(options, _VARIANCE, "fixed_small", _VARIANCES)
  return settings


def _betas(options: Options) -> dict[str, Any]:
  betas = options.get("trained_betas")
  if betas is not None:
    return _schedule_of(betas)
  steps = whole_number(options, "num_train_timesteps", 1000)
  schedule = one_of(options, "beta_schedule", "linear", _SCHEDULES)
  settings = {"num_timesteps": steps, "beta_schedule": schedule}
  if schedule not in WITHOUT_ENDS:
    settings |= {"beta_start": options.get("beta_start", 1e-4), "beta_end": options.get("beta_end", 0.02)}
  return settings


def _betas_of(diffusion: DiffusionConfig) -> list[float]:
  ends = {"beta_start": diffusion.beta_start, "beta_end": diffusion.beta_end}
  return make_schedule(diffusion.beta_schedule, diffusion.num_timesteps, **ends).betas[1:].tolist()


def _schedule_of(betas: Any) -> dict[str, Any]:
  """Which of our schedules has these beta_1..beta_T. Raises UserError if none has."""
  numbers = isinstance(betas, list) and betas and all(type(beta) in (int, float) and 0 < beta < 1 for beta in betas)
  if numbers:
    for name in dict.fromkeys([*_SCHEDULES, *BETA_SCHEDULES]):
      ends = _ends_of_sigmoid(betas) if name == "sigmoid" else {"beta_start": betas[0], "beta_end": betas[-1]}
      found = make_schedule(name, len(betas), **ends).betas[1:]
      if np.allclose(found, betas, rtol=1e-5, atol=0):  # they may have been float32
        return {"num_timesteps": len(betas), "beta_schedule": name, **(ends if name not in WITHOUT_ENDS else {})}
  raise UserError("trained_betas: they are those of no schedule of this package, which is not supported")


def _ends_of_sigmoid(betas: Sequence[float]) -> dict[str, float]:
  """Its beta_1 and beta_T are not the ends that it is given: it begins and ends at -6 and 6 on the logistic curve."""
  low = 1 / (1 + np.exp(6.0))
  rise = (betas[-1] - betas[0]) / (1 - 2 * low)
  start = float(betas[0] - rise * low)
  return {"beta_start": start, "beta_end": start + float(rise)}


def _threshold(options: Options) -> dict[str, Any]:
  if options.get("thresholding", False):
    limit = options.get("sample_max_value", 1.0)
    if limit == 1.0:
      return {"threshold": "static"}  # then the quantile is never used
    check_value(options, "sample_max_value", 1.0, (_NO_LIMIT,))
    return {"threshold": "dynamic", "threshold_quantile": options.get("dynamic_thresholding_ratio", 0.995)}
  if not options.get("clip_sample", True):
    return {"threshold": "none"}
  check_value(options, "clip_sample_range", 1.0, (1.0,))
  return {"threshold": "static"}
