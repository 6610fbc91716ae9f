"""The sampler as a program that needs neither this package nor Flax: StableHLO, its weights, a script that runs it.

`jax.export` serialises the network and the one scan around it, for kinds of devices that need not be here. The weights
are an argument of the program and lie beside it, so that several programs share them and a program can be read; as
constants in it, the 143 MB of the CIFAR-10 network took twice the memory to export and run.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
from jax import export

from ddpm_jax.config import Config
from ddpm_jax.devices.hosts import gather
from ddpm_jax.diffusion.samplers import grid_name
from ddpm_jax.errors import UserError
from ddpm_jax.keys import Seeded
from ddpm_jax.models.build import portable
from ddpm_jax.runtime import numerics
from ddpm_jax.sampling.classes import check_guidance, one_scale
from ddpm_jax.sampling.draw import bind_for_sampling, draw_of, table_of
from ddpm_jax.training.setup import Run
from ddpm_jax.weights.load import Weights
from ddpm_jax.weights.names import from_flat, from_flat_as, to_flat
from ddpm_jax.workdir.storage import sync_file, write_whole

_SCRIPT = '''\
"""Draws images with the sampler that lies beside this file: python run.py [{arguments}]."""

import pathlib
import sys

import jax.export
import numpy as np
from PIL import Image

here = pathlib.Path(__file__).parent
seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
number = int(sys.argv[2]) if len(sys.argv) > 2 else {number}
sampler = jax.export.deserialize(bytearray((here / {program}).read_bytes()))
weights = dict(np.load(here / "weights.npz"))
index = np.arange(number, dtype=np.int32)
{condition}images = np.asarray(sampler.call(weights, np.uint32(seed), index{more}))
np.savez("samples.npz", images=images{saved})
Image.fromarray(np.concatenate(images, axis=1).squeeze()).save("samples.png")  # side by side
'''
_LABELS = """\
classes = [int(number) for number in sys.argv[3].split(",")] if len(sys.argv) > 3 else range({classes})
labels = np.resize(np.array(classes, np.int32), number)  # in turn
"""
_SCALE = """\
scale = np.float32(sys.argv[4] if len(sys.argv) > 4 else {scale})
"""

_README = """\
# Sampler

`python run.py [{arguments}]` draws images into `samples.npz` and `samples.png`. It needs four packages and nothing
else: `pip install jax flatbuffers numpy pillow`.

| file | what |
|---|---|
| {programs} | `jax.export.Exported`, serialised: StableHLO and how to call it |
| `weights.npz` | float32 arrays by name, the first argument of the call |
| `run.py` | the few lines that call it |

`call(weights, seed, index{more})`, all for one device:

| | what |
|---|---|
| `weights` | dict of `weights.npz`, name to array |
| `seed` | uint32 scalar |
| `index` | int32 [N], which images of that seed; N is {numbers} |
{condition}| result | uint8 [N, {height}, {width}, {channels}]; image i depends on weights, seed and i{of} alone |

Image i of seed s is the one that `ddpm_jax --mode=sample --sample_seed=s` draws with these settings, up to the rounding
of float32, which another kind of device, number of images or version of JAX changes.

| setting | value |
|---|---|
{settings}

Exported with JAX {version} for {platforms}; calling convention {convention}. JAX promises that a JAX up to six months
newer than that runs it, and one up to three weeks older; later ones may
(https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).
"""

# What of the section `sample` is part of the program.
_SETTINGS = ("sampler", "time_grid", "eta", "threshold", "threshold_quantile")
_STAGE = "first_stage/"  # before the names of its arrays
_NUMBER = 16  # of images that run.py draws, where the program can draw any number


def write_program(config: Config, weights: Weights, folder: pathlib.Path) -> None:
  """Writes the sampler that `config` names into a folder: programs, `weights.npz`, `run.py`, `README.md`.

  A program is (weights {name: float32 [...]}, seed uint32 [], index int32 [N]) -> uint8 [N, H, W, C]; that of a
  conditional model also takes label int32 [N] and, where it has a null label, guidance_scale float32 []. Image i of
  seed s is that of `--mode=sample --sample_seed=s`, to float32 rounding. `sampler.stablehlo` draws any number N; where
  `--export_batch_sizes` names some, there is `sampler_N.stablehlo` for each instead.

  Args:
    config: what is drawn and how, for which platforms and numbers of images.
    weights: of the network, and the network.
    folder: exists.

  Raises:
    UserError: if `--sample_task` names anything but images.
    OSError: if a file cannot be written.
  """
  if config.sample.sample_task != "images":
    raise UserError(f"sample_task: {config.sample.sample_task} cannot be exported; leave it out")
  if weights.guide:
    raise UserError("guide_with: a sampler with a guide of its own cannot be exported; leave it out")
  if weights.classifier:
    raise UserError("classifier: a sampler with a classifier cannot be exported; leave it out")
  check_guidance(config.sample, weights)
  sizes = config.exchange.export_batch_sizes
  names = {f"sampler_{size}.stablehlo": size for size in sizes} or {"sampler.stablehlo": None}
  exported = {name: export_sampler(config, weights, size) for name, size in names.items()}
  for name, program in exported.items():
    write_whole(folder / name, bytes(program.serialize()))
  arrays: Any = {name: gather(leaf) for name, leaf in _arrays(weights).items()}
  np.savez(folder / "weights.npz", **arrays)
  sync_file(folder / "weights.npz")
  run = weights.run
  script = _SCRIPT.format(
    number=sizes[0] if sizes else _NUMBER,
    program='f"sampler_{number}.stablehlo"' if sizes else '"sampler.stablehlo"',
    arguments=_arguments(weights.run),
    condition="".join(
      [_LABELS.format(classes=run.config.model.num_classes)] * run.conditional
      + [_SCALE.format(scale=one_scale(config.sample))] * (run.null_label is not None)
    ),
    more=", labels" * run.conditional + ", scale" * (run.null_label is not None),
    saved=", labels=labels" * run.conditional,
  )
  write_whole(folder / "run.py", script.encode())
  write_whole(folder / "README.md", _readme(config, weights, exported).encode())


def export_sampler(config: Config, weights: Weights, number: int | None) -> export.Exported:
  """The program that draws `number` images, or any number if that is None; see `write_program`. Compiles nothing.

  Raises:
    ValueError: of jax.export, if a custom call is left in the program for which JAX promises no compatibility.
  """
  run = weights.run._replace(denoiser=portable(weights.run.denoiser))
  draw = draw_of(
    bind_for_sampling(run, config.sample),
    table_of(config.sample, run.schedule, config.diffusion.variance),
    first_stage=run.first_stage,
    stream="sample",
  )

  def sampler(
    weights: dict[str, Any],
    seed: jax.Array,
    index: jax.Array,
    label: jax.Array | None = None,
    guidance_scale: jax.Array | None = None,
  ) -> jax.Array:
    of_stage = {name.removeprefix(_STAGE): leaf for name, leaf in weights.items() if name.startswith(_STAGE)}
    own = {name: leaf for name, leaf in weights.items() if not name.startswith(_STAGE)}
    stage = from_flat_as(of_stage, run.frozen) if of_stage else None
    params = from_flat(own, config.model, run.first_stage.latent_shape)
    return draw(Seeded(params, seed, guidance_scale, first_stage=stage), index, label)

  (rows,) = (number,) if number else export.symbolic_shape("n")
  condition = [jax.ShapeDtypeStruct((rows,), np.int32)] * run.conditional
  condition += [jax.ShapeDtypeStruct((), np.float32)] * (run.null_label is not None)
  with numerics.pinned(config.model.matmul_precision):
    return export.export(jax.jit(sampler), platforms=config.exchange.export_platforms)(
      {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _arrays(weights).items()},
      jax.ShapeDtypeStruct((), np.uint32),
      jax.ShapeDtypeStruct((rows,), np.int32),
      *condition,
    )


def _arrays(weights: Weights) -> dict[str, Any]:
  """The first argument of the program: the network's parameters by name, and those of the first stage of latents."""
  of_stage = to_flat(weights.run.frozen)
  return to_flat(weights.params) | {_STAGE + name: leaf for name, leaf in of_stage.items()}


def _arguments(run: Run) -> str:
  """Of run.py, as a person types them."""
  if not run.conditional:
    return "SEED [NUMBER]"
  return "SEED [NUMBER [CLASSES [SCALE]]]" if run.null_label is not None else "SEED [NUMBER [CLASSES]]"


def _readme(config: Config, weights: Weights, exported: dict[str, export.Exported]) -> str:
  height, width, channels = weights.run.image_shape
  sizes = config.exchange.export_batch_sizes
  table = table_of(config.sample, weights.run.schedule, config.diffusion.variance)
  settings = {name: getattr(config.sample, name) for name in _SETTINGS} | {
    "time_grid": grid_name(config.sample.sampler, config.sample.time_grid),
    "network evaluations for each image": len(table.t),
    "timesteps": config.diffusion.num_timesteps,
    "dtype": config.model.dtype,
    "matmul_precision": config.model.matmul_precision,
    **({"variance": config.diffusion.variance} if config.sample.sampler == "ddpm" else {}),
    "weights": weights.text,
    "digest of the weights": weights.identity,
  }
  program, run = next(iter(exported.values())), weights.run
  condition, more = "", ""
  if run.conditional:
    names = ", ".join(f"{i} {name}" for i, name in enumerate(weights.class_names))
    condition, more = f"| `label` | int32 [N], the class of each image: {names} |\n", ", label"
  if run.null_label is not None:
    condition += "| `guidance_scale` | float32 scalar, g in D = D_uncond + g (D_cond - D_uncond); 1 is off |\n"
    more += ", guidance_scale"
    settings["guidance_interval"] = config.sample.guidance_interval or "everywhere"
  return _README.format(
    arguments=_arguments(run),
    condition=condition,
    more=more,
    of=" and its label" if run.conditional else "",
    programs=", ".join(f"`{name}`" for name in exported),
    numbers=f"{' or '.join(map(str, sizes))}, as the file says" if sizes else "any number",
    height=height,
    width=width,
    channels=channels,
    settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
    version=jax.__version__,
    platforms=", ".join(program.platforms),
    convention=program.calling_convention_version,
  )
