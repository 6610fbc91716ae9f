"""The parameters of our networks under the names of diffusers: one table for each, read in both directions.

Three things differ beside the names. Kernels of convolutions are HWIO here and OIHW there; those of dense layers
[in, out] and [out, in], where the shortcut of a residual block is a 1x1 convolution [out, in, 1, 1] there; and queries,
keys and values are one layer here and three there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax.config import ModelConfig
from ddpm_jax.errors import UserError
from ddpm_jax.keys import stream_key
from ddpm_jax.models.build import AutoencoderNetwork, Params, build_model, init_params

# Blocks: ours -> theirs. `level` counts from the full resolution, `up` the same levels from the smallest.
_BLOCKS = (
  (r"down(?P<level>\d+)_block(?P<i>\d+)", "down_blocks.{level}.resnets.{i}"),
  (r"down(?P<level>\d+)_block(?P<i>\d+)_attention", "down_blocks.{level}.attentions.{i}"),
  (r"down(?P<level>\d+)_downsample", "down_blocks.{level}.downsamplers.0"),
  (r"mid_block(?P<i>\d+)", "mid_block.resnets.{i}"),
  (r"mid_attention", "mid_block.attentions.0"),
  (r"up(?P<level>\d+)_block(?P<i>\d+)", "up_blocks.{up}.resnets.{i}"),
  (r"up(?P<level>\d+)_block(?P<i>\d+)_attention", "up_blocks.{up}.attentions.{i}"),
  (r"up(?P<level>\d+)_upsample", "up_blocks.{up}.upsamplers.0"),
)
# Layers of these blocks, and those outside of any: ours -> theirs, and what a kernel's layout is.
_LAYERS = {
  "temb_dense1": (("time_embedding.linear_1",), "dense"),
  "temb_dense2": (("time_embedding.linear_2",), "dense"),
  "label_embedding": (("class_embedding",), "vector"),
  "conv_in": (("conv_in",), "conv"),
  "norm_out": (("conv_norm_out",), "vector"),
  "conv_out": (("conv_out",), "conv"),
  "norm1": (("norm1",), "vector"),
  "conv1": (("conv1",), "conv"),
  "temb_proj": (("time_emb_proj",), "dense"),
  "norm2": (("norm2",), "vector"),
  "conv2": (("conv2",), "conv"),
  "shortcut": (("conv_shortcut",), "pixelwise"),
  "norm": (("group_norm",), "vector"),
  "qkv": (("to_q", "to_k", "to_v"), "dense"),
  "proj": (("to_out.0",), "dense"),
  "conv": (("conv",), "conv"),
  "quant_conv": (("quant_conv",), "pixelwise"),
  "post_quant_conv": (("post_quant_conv",), "pixelwise"),
  "codebook": (("quantize.embedding",), "vector"),
}
# Layouts: an array of ours in PyTorch's, and one of PyTorch's in ours.
_LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
  "conv": (lambda ours: ours.transpose(3, 2, 0, 1), lambda theirs: theirs.transpose(2, 3, 1, 0)),
  "dense": (lambda ours: ours.T, lambda theirs: theirs.T),
  "pixelwise": (lambda ours: ours.T[:, :, None, None], lambda theirs: theirs[:, :, 0, 0].T),
  "vector": (lambda ours: ours, lambda theirs: theirs),
}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# What attention was called until diffusers 0.12, as in the published DDPM models.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Row(NamedTuple):
  """One parameter of ours, and what it is over there."""

  path: tuple[str, ...]  # in our tree
  shape: tuple[int, ...]
  names: tuple[str, ...]  # of diffusers: parts of the last axis, in order
  layout: str  # a key of _LAYOUTS

  def part_shape(self) -> tuple[int, ...]:
    """The shape of each of `names`."""
    *rest, last = self.shape
    outwards, _ = _LAYOUTS[self.layout]
    return outwards(np.empty((*rest, last // len(self.names)), np.bool_)).shape


@functools.cache
def param_shapes(model: ModelConfig, image_shape: tuple[int, int, int]) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Path -> shape of every parameter. Raises UserError if that network cannot draw such images [H, W, C]."""
  module = build_model(model, image_shape)
  params = jax.eval_shape(lambda: init_params(module, stream_key(0, "init"), image_shape))
  return {path: leaf.shape for path, leaf in leaves_of(params).items()}


@functools.cache
def table(model: ModelConfig, image_shape: tuple[int, int, int]) -> tuple[Row, ...]:
  """A row for every parameter of the network. Raises UserError as `param_shapes`."""
  levels = len(model.channel_multipliers)
  return tuple(_row(path, shape, levels) for path, shape in param_shapes(model, image_shape).items())


@functools.cache
def autoencoder_table(network: AutoencoderNetwork, image_shape: tuple[int, int, int]) -> tuple[Row, ...]:
  """A row for every parameter of the autoencoder of such images [H, W, C], as AutoencoderKL and VQModel name them."""
  levels = len(network.model.channel_multipliers)
  shapes = jax.eval_shape(lambda: network.init(stream_key(0, "init"), image_shape))
  return tuple(_autoencoder_row(path, leaf.shape, levels) for path, leaf in leaves_of(shapes).items())


def to_diffusers(params: Params, rows: Iterable[Row]) -> dict[str, np.ndarray]:
  """Our tree of NumPy arrays under their names, in their layout."""
  leaves, tensors = leaves_of(params), {}
  for row in rows:
    outwards, _ = _LAYOUTS[row.layout]
    parts = np.split(leaves[row.path], len(row.names), axis=-1)
    tensors |= {name: outwards(part) for name, part in zip(row.names, parts, strict=True)}
  return tensors


def from_diffusers(tensors: Mapping[str, np.ndarray], rows: Iterable[Row]) -> Params:
  """Their tensors as our tree.

  Raises:
    UserError: lists every tensor that is missing, too much, or of another shape.
  """
  tensors, rows = _with_todays_names(tensors), tuple(rows)
  check_shapes(tensors, {name: row.part_shape() for row in rows for name in row.names})
  leaves = {}
  for row in rows:
    _, inwards = _LAYOUTS[row.layout]
    leaves[row.path] = np.concatenate([inwards(tensors[name]) for name in row.names], axis=-1)
  return tree_of(leaves)


def to_flat(params: Params) -> dict[str, np.ndarray]:
  """Our tree under names of our own, such as 'down0_block0.conv1.kernel'."""
  return {".".join(path): leaf for path, leaf in leaves_of(params).items()}


def from_flat(tensors: Mapping[str, np.ndarray], model: ModelConfig, image_shape: tuple[int, int, int]) -> Params:
  """The inverse of `to_flat`, for that network. Raises UserError as `from_diffusers`."""
  return _from_flat(tensors, param_shapes(model, image_shape))


def from_flat_as(tensors: Mapping[str, np.ndarray], abstract: Params) -> Params:
  """The inverse of `to_flat`, for a tree of these shapes. Raises UserError as `from_diffusers`."""
  return _from_flat(tensors, {path: leaf.shape for path, leaf in leaves_of(abstract).items()})


def _from_flat(tensors: Mapping[str, np.ndarray], shapes: Mapping[tuple[str, ...], tuple[int, ...]]) -> Params:
  check_shapes(tensors, {".".join(path): shape for path, shape in shapes.items()})
  return tree_of({path: tensors[".".join(path)] for path in shapes})


def check_shapes(found: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> None:
  """Raises UserError, which lists all that is wrong, unless the arrays have these names and shapes and no others."""
  problems = [f"{name} is missing" for name in wanted if name not in found]
  problems += [f"{name} is too much" for name in found if name not in wanted]
  for name in wanted:
    if name in found and tuple(found[name].shape) != tuple(wanted[name]):
      problems.append(f"{name} is {list(found[name].shape)}, not {list(wanted[name])}")
  if problems:
    raise UserError(f"the weights do not fit the network: {', '.join(problems)}")


def leaves_of(tree: Params) -> dict[tuple[str, ...], Any]:
  """Path -> leaf of a nested dict."""
  found = {}
  for name, part in tree.items():
    inner = leaves_of(part) if isinstance(part, dict) else {(): part}
    found |= {(name, *path): leaf for path, leaf in inner.items()}
  return found


def tree_of(leaves: Mapping[tuple[str, ...], np.ndarray]) -> Params:
  """The inverse of `leaves_of`."""
  tree: dict[str, Any] = {}
  for (*folders, name), leaf in leaves.items():
    place = tree
    for folder in folders:
      place = place.setdefault(folder, {})
    place[name] = leaf
  return tree


def _row(path: tuple[str, ...], shape: tuple[int, ...], levels: int) -> Row:
  *block, layer, leaf = path
  names, layout = _LAYERS[layer]
  prefix = "".join(f"{_block_name(name, levels)}." for name in block)
  return Row(
    path, shape, tuple(f"{prefix}{name}.{_LEAVES[leaf]}" for name in names), layout if leaf == "kernel" else "vector"
  )


def _autoencoder_row(path: tuple[str, ...], shape: tuple[int, ...], levels: int) -> Row:
  half, *inner = path
  if half == "codebook":
    return _row(path, shape, levels)
  row = _row(tuple(inner), shape, levels)
  prefix = "" if inner[0] in ("quant_conv", "post_quant_conv") else f"{half}."
  return row._replace(path=path, names=tuple(f"{prefix}{name}" for name in row.names))


def _block_name(ours: str, levels: int) -> str:
  for pattern, theirs in _BLOCKS:
    found = re.fullmatch(pattern, ours)
    if found:
      numbers = {name: int(number) for name, number in found.groupdict().items()}
      return theirs.format(**numbers, up=levels - 1 - numbers.get("level", 0))
  raise ValueError(f"no block of diffusers is {ours!r}")


def _with_todays_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  renamed = {}
  for name, tensor in tensors.items():
    *layers, leaf = name.split(".")
    if layers:
      layers[-1] = _OLDER.get(layers[-1], layers[-1])
    today = ".".join([*layers, leaf])
    renamed[name if today in tensors else today] = tensor
  return renamed
