"""The model card of an exported folder: README.md as the Hub shows it, from what the files of a workdir say."""

from __future__ import annotations

import pathlib
from typing import Any

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.evaluation.results import read_result, scalars
from ddpm_jax.evaluation.summary import YARDSTICKS, yardsticks
from ddpm_jax.first_stage.latents import Latents
from ddpm_jax.first_stage.pixels import FirstStage
from ddpm_jax.models.build import num_params
from ddpm_jax.sampling.draw import QUICK
from ddpm_jax.weights.file import without_paths
from ddpm_jax.weights.load import Weights
from ddpm_jax.workdir import grids
from ddpm_jax.workdir.stage_facts import StageFacts

PICTURE = "samples.png"
_SECTIONS = ("data", "diffusion", "model", "autoencoder", "optimizer", "train")
_MAY_CHANGE_BUT_TELL = ("variance", "num_steps")

_FRONT = """---
# The licence is the author's to choose: write its name here, such as apache-2.0, before you publish this folder.
license:
library_name: diffusers
{pipeline_tag}tags:
- diffusers
{tags}- jax
---
"""
_DRAWS = "unconditional-image-generation"
_USE = """## Use

```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("PATH")  # this folder
pipeline(num_inference_steps={number}).images[0].save("sample.png")
```

Fewer steps take less time. Their number should divide {steps}: with others diffusers begins at a lower noise level.

In ddpm_jax: `python -m ddpm_jax.main --mode=sample --init_from=PATH --workdir=DIR`.
"""
# No pipeline of diffusers gives classes to the network.
_USE_BY_CLASS = """## Use

`{pipeline}` loads this folder, but gives no classes to the network, nor does any other pipeline of diffusers. This
draws by class:

```python
import torch
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("PATH")  # this folder
unet, scheduler = pipeline.unet, pipeline.scheduler
{set_steps}labels = torch.arange({classes})  # an image of each class; their names are below
x = torch.randn(len(labels), {channels}, {height}, {width})
with torch.no_grad():
  for t in scheduler.timesteps:
    {output}
    x = scheduler.step(output, t, x).prev_sample
{decode}images = pipeline.numpy_to_pil((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
images[0].save("sample.png")
```

The classes are {names}.

In ddpm_jax: `python -m ddpm_jax.main --mode=sample --init_from=PATH --workdir=DIR --classes=0`.
"""
# Their pipeline of latents draws squares alone.
_USE_OF_OTHER_SHAPES = """## Use

`LDMPipeline` loads this folder, but draws squares alone. This draws:

```python
import torch
from diffusers import LDMPipeline

pipeline = LDMPipeline.from_pretrained("PATH")  # this folder
unet, scheduler = pipeline.unet, pipeline.scheduler
scheduler.set_timesteps({number})
x = torch.randn(4, {channels}, {height}, {width})
with torch.no_grad():
  for t in scheduler.timesteps:
    x = scheduler.step(unet(x, t).sample, t, x).prev_sample
  x = pipeline.vqvae.decode(x).sample
images = pipeline.numpy_to_pil((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
images[0].save("sample.png")
```

In ddpm_jax: `python -m ddpm_jax.main --mode=sample --init_from=PATH --workdir=DIR`.
"""
_USE_OF_AUTOENCODER = """## Use

```python
from diffusers import {kind}

autoencoder = {kind}.from_pretrained("PATH")  # this folder
latents = autoencoder.encode(images).{latents}  # of images [B, {channels}, H, W] in [-1, 1]
images = autoencoder.decode(latents).sample
```

Latents are not scaled (`scaling_factor` is 1): a model of them needs their mean and deviation, or `scaling_factor`,
of its own images.

In ddpm_jax: `python -m ddpm_jax.main --first_stage=PATH --dataset=DATASET --workdir=DIR` trains a model of its latents.
"""
_OUTPUT = "output = unet(x, t, labels).sample"
_GUIDED_OUTPUT = """by_class, by_none = unet(x, t, labels).sample, unet(x, t, torch.full_like(labels, {null})).sample
    output = by_none + 2.0 * (by_class - by_none)  # the guidance scale; 1 is off"""


def find_samples(workdir: pathlib.Path, weights: Weights) -> tuple[pathlib.Path, str] | None:
  """A picture of samples of these very weights in their workdir, and what it shows; None if there is none.

  What --mode=sample drew last, or the grid of the training after that step.
  """
  drawn, grid = workdir / "samples" / PICTURE, workdir / "samples" / f"step_{weights.step:08d}.png"
  facts = grids.facts_of(drawn)
  if weights.run.config.model.stage == "autoencoder" and grid.is_file():
    return grid, f"Images above their reconstructions after step {weights.step:,} of the training."
  if facts.get("weights_sha256") == weights.identity:
    return drawn, f"Drawn with these weights by the sampler {_code(facts.get('sampler'))}."
  if grid.is_file():
    return grid, f"Drawn after step {weights.step:,} of the training: the EMA weights beside the raw ones."
  return None


def how_to_draw(config: Config, weights: Weights) -> str:
  """The flags that draw a picture of weights."""
  checkpoint = "best" if config.sample.checkpoint == "best" else weights.step
  quick = f"--sampler=dpmpp --sampling_steps={min(QUICK, config.diffusion.num_timesteps)}"
  return f"--mode=sample --checkpoint={checkpoint} --sample_weights={weights.which} {quick}"


def card(config: Config, weights: Weights, workdir: pathlib.Path | None, samples: str) -> str:
  """The text of README.md.

  Args:
    config: of the run.
    weights: what is exported.
    workdir: where they were trained and measured; None if they come from elsewhere.
    samples: what the picture beside it shows; empty if there is none, which is then said with the remedy.
  """
  shown = without_paths(config)
  height, width, channels = weights.run.image_shape
  stage = weights.run.first_stage
  kind = "Latent diffusion model" if isinstance(stage, Latents) else "DDPM"
  title = f"{kind} of {_code(shown.data.dataset)}" if workdir is not None else kind
  by_class = config_lib.conditioning_text(weights.run.config)
  size = " ".join(filter(None, (f"{height}x{width}x{channels}", by_class)))
  unet = f"a U-Net of {num_params(weights.params):,} parameters, T = {config.diffusion.num_timesteps:,}"
  if isinstance(stage, Latents):
    facts, first = _facts(weights, stage), f"{num_params(weights.run.frozen['autoencoder']):,}"
    what = (
      "A latent diffusion model ([Rombach et al. 2022](https://arxiv.org/abs/2112.10752)) that draws images of "
      f"{size}: {unet}, draws latents of {facts.shape}, and a {facts.kind}, of {first} parameters, decodes them. Mean "
      "and deviation of the latents are folded into the autoencoder, so that its latents are standard ones."
    )
  else:
    what = (
      "A denoising diffusion probabilistic model ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)) that draws "
      f"images of {size}: {unet}."
    )
  tag = "latent-diffusion" if isinstance(stage, Latents) else "ddpm"
  front = _FRONT.format(pipeline_tag=f"pipeline_tag: {_DRAWS}\n", tags=f"- {_DRAWS}\n- {tag}\n")
  parts = [f"{front}\n# {title}\n", f"{what}\n"]
  if samples:
    parts.append(f"![Samples]({PICTURE})\n\n{samples}\n")
  elif workdir is not None:
    parts.append(
      "There is no picture here, as no samples of these weights were at hand. "
      f"`python -m ddpm_jax.main {how_to_draw(config, weights)} --workdir=DIR` draws some; then export again.\n"
    )
  parts.append(_use_by_class(weights) if weights.run.conditional else _use(config, stage))
  if workdir is not None:
    parts += [_training(shown, config.exchange.init_from, weights), _measures(workdir, weights)]
    parts += [_first_stage(_facts(weights, stage))] if isinstance(stage, Latents) else []
    parts.append(_settings(shown))
  parts.append(f"Written by ddpm_jax {ddpm_jax.__version__}.\n")
  return "\n".join(parts)


def autoencoder_card(config: Config, weights: Weights, workdir: pathlib.Path, samples: str) -> str:
  """The text of README.md of an exported first stage; the arguments are those of `card`."""
  shown, of = without_paths(config), config.autoencoder
  height, width, channels = weights.run.image_shape
  vq = of.regularizer == "vq"
  bound = f"a codebook of {of.codebook_size:,} vectors" if vq else "a KL divergence"
  params = num_params(weights.params["autoencoder"])
  what = (
    "An autoencoder ([Rombach et al. 2022](https://arxiv.org/abs/2112.10752)), the first stage of a latent diffusion "
    f"model, of images of {height}x{width}x{channels}: {params:,} parameters, latents of {of.latent_channels} channels "
    f"that {bound} bounds."
  )
  front = _FRONT.format(pipeline_tag="", tags="- latent-diffusion\n- autoencoder\n")
  parts = [f"{front}\n# Autoencoder of {_code(shown.data.dataset)}\n", f"{what}\n"]
  if samples:
    parts.append(f"![Reconstructions]({PICTURE})\n\n{samples}\n")
  use = _USE_OF_AUTOENCODER.format(
    kind="VQModel" if vq else "AutoencoderKL",
    latents="latents" if vq else "latent_dist.sample()",
    channels=channels,
  )
  parts += [use, _training(shown, "", weights), _measures(workdir, weights), _settings(shown)]
  parts.append(f"Written by ddpm_jax {ddpm_jax.__version__}.\n")
  return "\n".join(parts)


def _use(config: Config, stage: FirstStage) -> str:
  (height, width, channels), steps = stage.latent_shape, config.diffusion.num_timesteps
  if not isinstance(stage, Latents):
    return _USE.format(pipeline="DDPMPipeline", number=steps, steps=steps)
  if height == width:
    return _USE.format(pipeline="LDMPipeline", number=_few(steps), steps=steps)
  return _USE_OF_OTHER_SHAPES.format(number=_few(steps), height=height, width=width, channels=channels)


def _few(steps: int) -> int:
  """Of DDIM, of which 50 do; the number divides that of the timesteps."""
  return next(number for number in range(min(50, steps), 0, -1) if steps % number == 0)


def _use_by_class(weights: Weights) -> str:
  stage, null = weights.run.first_stage, weights.run.null_label
  (height, width, channels), latent = stage.latent_shape, isinstance(stage, Latents)
  steps = _few(weights.run.config.diffusion.num_timesteps)
  return _USE_BY_CLASS.format(
    pipeline="LDMPipeline" if latent else "DDPMPipeline",
    set_steps=f"scheduler.set_timesteps({steps})\n" if latent else "",
    decode="  x = pipeline.vqvae.decode(x).sample\n" if latent else "",
    classes=weights.num_drawn,
    height=height,
    width=width,
    channels=channels,
    output=_OUTPUT if null is None else _GUIDED_OUTPUT.format(null=null),
    names=", ".join(f"{i} {_code(name)}" for i, name in enumerate(weights.class_names)),
  )


def _training(config: Config, init_from: str, weights: Weights) -> str:
  data, which = config.data, {"ema": "the moving average of the weights", "raw": "the weights themselves"}
  first = f"- begun with the weights of {_code(pathlib.PurePath(init_from).name)}\n" if init_from else ""
  return (
    f"## Training\n\n- data set: {_code(data.dataset)}, split {_code(data.split)}\n{first}"
    f"- training steps: {weights.step:,} of batches of {data.batch_size:,} images\n"
    f"- exported: {which[weights.which]} after the last of them\n"
  )


def _measures(workdir: pathlib.Path, weights: Weights) -> str:
  result = read_result(workdir / "eval" / f"{weights.step}.json")
  if result is None or result.get("weights") != weights.which:
    return "## Measures\n\nNot measured.\n"
  beside, rows = yardsticks(result), []
  kinds = [kind for kind in YARDSTICKS if any(kind in others for others in beside.values())]
  for name, value in scalars(result).items():
    name = name.removeprefix("evaluation/")
    others = beside.get(name, {})
    rows.append((name, f"{value:.5g}", *(f"{others[kind]:.3g}" if kind in others else "" for kind in kinds)))
  samples = result.get("samples", {})
  how = (
    f"Of {samples['number']:,} samples, {samples['sampler']} with {samples['evaluations']} steps." if samples else ""
  )
  head = ("measure", "value", *(YARDSTICKS[kind][1] for kind in kinds))
  return f"## Measures\n\n{_table(head, rows)}\n{how}\n"


def _facts(weights: Weights, stage: Latents) -> StageFacts:
  return stage.facts((weights.run.first_stage_facts or {}).get("sha256", ""))


def _first_stage(facts: StageFacts) -> str:
  digest = f"- SHA-256 of its parameters, before the folding: {_code(facts.digest)}...\n" if facts.digest else ""
  return f"## First stage\n\n- kind: {facts.kind}\n- latents: {facts.shape}\n{digest}"


def _settings(config: Config) -> str:
  """The options that have an effect on what was trained."""
  idle = config_lib.without_effect(config)
  rows = [
    (_code(field.name), _code(config_lib.flag_text(value)))
    for section, field, value in config_lib.options(config)
    if section in _SECTIONS
    and field.name not in idle
    and (not field.metadata["may_change"] or field.name in _MAY_CHANGE_BUT_TELL)
  ]
  return f"## Settings\n\n{_table(('flag', 'value'), rows)}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  lines = [head, ("---",) * len(head), *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: Any) -> str:
  """Text of users as code, so that nothing in it is markup or ends a table's cell."""
  plain = " ".join(str(text).replace("`", "'").replace("|", "/").split())
  return f"`{plain}`" if plain else "(empty)"
