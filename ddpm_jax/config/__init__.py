"""Every option of a run, once: the sections of options, what they mean together, and their text.

A `Config` is a tree of frozen dataclasses, one for each concern. The defaults train a small U-Net on the embedded
`digits`; the paper's settings are presets. Standard library only: anything may import this package.
"""

from ddpm_jax.config.config import (
  AUTO_ATTENTION,
  LEFT_TO_IMAGES,
  NAMES_WEIGHTS,
  OWN_IMAGES,
  Config,
  changed,
  check_variance,
  guided,
  options,
  override,
  own_images,
  profiled,
  reads_classes,
  reset_weight_selectors,
  values,
  without_one_time_options,
  writer_names,
)
from ddpm_jax.config.option import flag_text, height_and_width, image_size
from ddpm_jax.config.sections import (
  BETA_SCHEDULES,
  WITHOUT_ENDS,
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
from ddpm_jax.config.text import from_json, own_parts, to_flagfile, to_json, to_tree

__all__ = [
  "AUTO_ATTENTION",
  "BETA_SCHEDULES",
  "LEFT_TO_IMAGES",
  "NAMES_WEIGHTS",
  "OWN_IMAGES",
  "WITHOUT_ENDS",
  "Config",
  "DataConfig",
  "DiffusionConfig",
  "EvaluateConfig",
  "ExchangeConfig",
  "ModelConfig",
  "OptimizerConfig",
  "PlanConfig",
  "SampleConfig",
  "TrainConfig",
  "changed",
  "check_variance",
  "flag_text",
  "from_json",
  "guided",
  "height_and_width",
  "image_size",
  "options",
  "override",
  "own_images",
  "own_parts",
  "profiled",
  "reads_classes",
  "reset_weight_selectors",
  "to_flagfile",
  "to_json",
  "to_tree",
  "values",
  "without_one_time_options",
  "writer_names",
]
