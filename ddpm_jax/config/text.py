"""A config as text: `config.json`, also of earlier releases, and `flags.txt`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ddpm_jax.config.config import Config, options, override, values
from ddpm_jax.config.option import flag_text
from ddpm_jax.errors import UserError

# Of config.json. Files of release 0.1.0 do not say theirs, which is 1.
FORMAT = 2

# What a release did that did not have the option yet, whatever today's default is.
WITHOUT_THE_OPTION = {
  "follow_links": False,
  "only": "",
  "conditioning": "none",
  "classes": (),
  "guidance_scale": (1.0,),
  "guidance_interval": (),
  "guide_with": "",
  "evaluate_labels": "proportional",
  "classifier": "",
  "classifier_scale": 1.0,
  "stage": "denoiser",
  "first_stage": "",
  "regularizer": "kl",
  "latent_channels": 4,
  "codebook_size": 1024,
  "kl_weight": 1e-6,
  "perceptual": "none",
  "perceptual_weight": 1.0,
  "lpips_weights": "",
  "discriminator_weight": 0.0,
  "discriminator_start": 0,
  "discriminator_warmup": 0,
  "discriminator_layers": 3,
  "adam_b1": 0.9,
  "adam_b2": 0.999,
  "weight_decay": 0.0,
  "num_classes": 0,
  "label_dropout": 0.0,
  "block": "ddpm",
  "num_heads": 1,
  "head_channels": 0,
  "label_field": "",
  "image_field": "",
  "formats": "basic",
  "resize": "crop",
  "crop": "center",
  "resample": "bicubic",
  "matmul_precision": "default",
  "decay_fraction": 0.4,  # has no effect with its learning rates, 'constant' and 'cosine'
  "keep_every": 0,
  "writers": "tensorboard",
  "stop_exit_code": 0,
  "profile_steps": "",
  "reference_stats": "",
  "write_reference": "",
}


def to_tree(config: Config) -> dict[str, dict[str, Any]]:
  """Section -> option -> value, as JSON has them."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def to_json(config: Config, own: dict[str, str] | None = None) -> str:
  """The text of `workdir/config.json`.

  Args:
    config: the settings.
    own: names of parts that a person has put in the place of those of the settings, by what they are.
  """
  beside = {"format": FORMAT, "own": own} if own else {"format": FORMAT}
  return json.dumps(beside | to_tree(config), indent=2) + "\n"


def own_parts(text: str) -> dict[str, str]:
  """The `own` of `to_json`, for a text that `from_json` has read."""
  return json.loads(text).get("own", {})


def from_json(text: str) -> Config:
  """The inverse of `to_json`, for files of this release and of earlier ones.

  An option is known by its name: sections may differ. One that the file lacks has the value of `WITHOUT_THE_OPTION`.

  Raises:
    UserError: if it is no such text, of a later format, or has an option that is unknown or out of range.
  """
  try:
    tree = json.loads(text)
  except json.JSONDecodeError as error:
    raise UserError(f"config.json is not JSON ({error}); restore it, or use another --workdir") from None
  form = tree.pop("format", 1) if isinstance(tree, dict) else None
  if type(form) is int and form > FORMAT:
    raise UserError(
      f"config.json is of format {form}, this version of ddpm_jax reads up to {FORMAT}; use the version that wrote it"
    )
  if not isinstance(tree, dict) or type(form) is not int or not all(isinstance(part, dict) for part in tree.values()):
    raise UserError("config.json is not a JSON object of sections; restore it, or use another --workdir")
  tree.pop("own", {})  # see `own_parts`
  known, flat = values(Config()), dict(WITHOUT_THE_OPTION)
  for section, part in tree.items():
    for name, value in part.items():
      if name not in known:
        raise UserError(
          f"config.json has {section}.{name}, which this version of ddpm_jax does not know; "
          "use the version that wrote it"
        )
      flat[name] = tuple(value) if isinstance(value, list) else value
  return override(Config(), flat)


def to_flagfile(config: Config) -> str:
  """The text of `workdir/flags.txt`: the same run as a flagfile."""
  lines, previous = [], None
  for section, field, value in options(config):
    if section != previous:
      lines.append(f"# {section}")
      previous = section
    lines.append(f"--{field.name}={flag_text(value)}")
  return "\n".join(lines) + "\n"
