"""Random streams: independent roots for each use of randomness, all functions of one seed."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

STREAMS = ("init", "train", "preview", "sample", "classifier", "bound", "ode")
# Named, as JAX_DEFAULT_PRNG_IMPL may say another one: of rbg, draws under vmap depend on how many there are.
IMPLEMENTATION = "threefry2x32"


# Draws of a training example beside the four of release 0.1, which split its key in four: each has a key of its own.
EXAMPLE_DRAWS = ("label_dropout", "posterior")


def example_key(key: jax.Array, draw: str) -> jax.Array:
  """The key of one of `EXAMPLE_DRAWS`, from that of a training example; meets none of the four that it is split in."""
  if draw not in EXAMPLE_DRAWS:
    raise ValueError(f"unknown draw {draw!r}")
  return jax.random.fold_in(key, zlib.crc32(draw.encode()))


class Seeded(NamedTuple):
  """Weights and a seed as one argument of a compiled function, and what guides a draw.

  The numbers are data of the program and no constants in it: another seed or scale needs no other program.
  """

  params: Any
  seed: Any  # uint32 scalar
  guidance_scale: Any = None  # float32 scalar; None: no guidance
  guide: Any = None  # the weights of a guide of its own
  classifier_scale: Any = None  # float32 scalar; None: no classifier
  classifier: Any = None  # its weights
  first_stage: Any = None  # the parameters of the first stage; None: pixels


def seeded(
  params: Any,
  seed: int,
  guidance_scale: float = 1.0,
  guide: Any = None,
  classifier_scale: float = 1.0,
  classifier: Any = None,
  first_stage: Any = None,
) -> Seeded:
  """Binds a seed in 0..2^32 - 1 to weights, and to the parameters of their first stage, if that has any.

  So are, unless it is 1, a guidance scale with the weights of the guide, and the weights of a classifier, if there is
  one, with its scale.
  """
  scale = None if guidance_scale == 1.0 else np.float32(guidance_scale)
  its_scale = None if classifier is None else np.float32(classifier_scale)
  return Seeded(params, np.uint32(seed), scale, None if scale is None else guide, its_scale, classifier, first_stage)


def stream_key(seed: int | jax.Array, stream: str) -> jax.Array:
  """The root key of one of `STREAMS`, a function of the seed and the stream's name."""
  if stream not in STREAMS:
    raise ValueError(f"unknown random stream {stream!r}")
  return jax.random.fold_in(jax.random.key(seed, impl=IMPLEMENTATION), zlib.crc32(stream.encode()))


def indexed_keys(key: jax.Array, index: jax.Array) -> jax.Array:
  """One key for each entry of index int32 [B]: keys [B], each a function of (key, its index) alone."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
