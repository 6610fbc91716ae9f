"""A small network that is trained once for what its inner layers say of images, and kept in the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from ddpm_jax.data import pipeline
from ddpm_jax.data.sources import Source
from ddpm_jax.devices.batched import BatchedFn
from ddpm_jax.devices.hosts import all_gather_host
from ddpm_jax.devices.mesh import DeviceMesh
from ddpm_jax.evaluation.features import Extracted
from ddpm_jax.keys import stream_key
from ddpm_jax.training.step import inputs_of
from ddpm_jax.workdir.arrays import UnusableError, load_arrays, save_arrays

Weights = dict[str, np.ndarray]  # path in the network -> float32 array
Extract = Callable[[np.ndarray], Extracted]
# (params, {"image": uint8 [B, H, W, C], "replaced": bool [B], ...}, key) -> the mean loss, a scalar
Loss = Callable[[Any, dict[str, jax.Array], jax.Array], jax.Array]
Init = Callable[[jax.Array], Any]  # key -> fresh parameters, a nested dict
# (of what, how many) -> a context with a function that is told how many are done. What that raises ends the training.
Counted = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]
# (params, uint8 [B, H, W, C]) -> features float32 [B, D], probabilities float32 [B, K]
Forward = Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]

BATCH = 128
_RATE, _WARMUP = 3e-3, 50
TRAINING = [BATCH, _RATE, _WARMUP]  # Adam, with a cosine after the warm-up
HOLD_OUT = 10  # one image of that many
_TELL_EVERY = 10  # updates


class Trained(NamedTuple):
  """A trained network, and how well it does: numbers of float32's precision, of the same names for all networks."""

  weights: Weights
  marks: dict[str, float]


def uncounted(what: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
  """A `Counted` that nobody hears."""
  del what, total
  return contextlib.nullcontext(lambda number: None)


def divide(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The images to train on and those to hold out, every tenth in some order; of ten or fewer the first, of one none.

  order: int [N], a permutation of 0..N-1. Returns int [..] each, in rising order.
  """
  is_held_out = np.zeros(len(order), bool)
  is_held_out[order[HOLD_OUT // 2 :: HOLD_OUT] if len(order) > HOLD_OUT else order[: min(1, len(order) - 1)]] = True
  return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def fresh(init: Init, seed: int) -> Any:
  """The parameters that training begins with, a nested dict."""
  return init(jax.random.fold_in(stream_key(seed, "classifier"), 0))


def shapes_of(init: Init) -> dict[str, Any]:
  """Path in the network -> shape and type of the weights."""
  return flat(jax.eval_shape(lambda: fresh(init, 0)))


def flat(params: Any) -> dict[str, Any]:
  """Path in the network -> leaf, of a nested dict."""
  return traverse_util.flatten_dict(params, sep="/")


def nested(weights: Weights) -> Any:
  """The reverse of `flat`."""
  return traverse_util.unflatten_dict(weights, sep="/")


def train(
  init: Init,
  source: Source,
  training: np.ndarray,
  loss_of: Loss,
  *,
  updates: int,
  seed: int,
  counted: Counted,
  columns: Callable[[np.ndarray], dict[str, np.ndarray]] = lambda indices: {},
) -> Weights:
  """The weights after training on the images `training` int [N] of the source, on the first device of this process.

  Args:
    init: of the network.
    source: the images.
    training: which of them.
    loss_of: what is minimised.
    updates: how many.
    seed: of the first weights, the order of the images, and the keys.
    counted: is told of the updates, on every process alike.
    columns: what else is known of the images at int [B] of the source, for the loss.
  """
  optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, _RATE, min(_WARMUP, updates // 2), updates))

  @jax.jit
  def update(params: Any, state: Any, batch: dict[str, jax.Array], step: jax.Array) -> tuple[Any, Any, jax.Array]:
    key = jax.random.fold_in(jax.random.fold_in(stream_key(seed, "classifier"), 2), step)
    loss, gradient = jax.value_and_grad(loss_of)(params, batch, key)
    changes, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, changes), state, loss

  part = dataclasses.replace(source, length=len(training), read=lambda indices: source.read(training[indices]))
  shuffle = int(jax.random.bits(jax.random.fold_in(stream_key(seed, "classifier"), 1)))
  order = pipeline.order(len(part), batch_size=BATCH, seed=shuffle)
  with jax.default_device(jax.local_devices()[0]):
    params = jax.jit(lambda: fresh(init, seed))()
    state, loss = optimizer.init(params), jnp.zeros(())
    batches = pipeline.batches(part, batch_size=BATCH, seed=shuffle, start_step=0)
    with contextlib.closing(batches), counted("update", updates) as done:
      for step, batch in zip(range(updates), batches, strict=False):
        batch = inputs_of(batch) | columns(training[order[step]])
        before = loss
        params, state, loss = update(params, state, batch, np.int32(step))
        before.block_until_ready()  # one update runs ahead, and no more batches wait on the device
        if step % _TELL_EVERY == 0:
          done(step)  # not `step` + 1: the first call begins the clock, after the compilation
      loss.block_until_ready()
      done(updates)
  return {name: np.asarray(leaf) for name, leaf in flat(params).items()}


def extractor(
  forward: Forward, widths: tuple[int, int], mesh: DeviceMesh, batch_size: int
) -> Callable[[Weights], Extract]:
  """Weights -> `Features.extract`; compiled once for all weights. widths: (D, K) of what `forward` returns."""
  # "highest": GPUs and TPUs multiply with fewer bits else, and the features would depend on the machine.
  compiled = BatchedFn(forward, mesh, matmul_precision="highest")

  def with_weights(weights: Weights) -> Extract:
    params = jax.device_put(nested(weights), mesh.replicated)

    def extract(batch: np.ndarray) -> Extracted:
      features, probabilities = (np.empty((len(batch), width), np.float32) for width in widths)
      for start in range(0, len(batch), batch_size):
        rows = slice(start, start + batch_size)
        features[rows], probabilities[rows] = compiled(params, batch[rows], size=batch_size)
      return Extracted(features, probabilities)

    return extract

  return with_weights


def kept_or(
  path: pathlib.Path, shapes: dict[str, Any], marks: tuple[str, ...], make: Callable[[], Trained], say: Callable
) -> Trained:
  """The network that process 0 has in the cache, or a new one, which it keeps. All processes must call it.

  Args:
    path: of the file.
    shapes: names of the weights -> what has their shapes and types.
    marks: names of the marks.
    make: trains one, the same on all processes.
    say: takes a line about what could not be read or written.
  """
  first = jax.process_index() == 0
  kept = load(path, shapes, marks, say) if first else None
  if all_gather_host(np.asarray(kept is not None))[0]:
    zeros = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    return of_first_process(kept or Trained(zeros, dict.fromkeys(marks, 0.0)))
  trained = make()
  if first:
    try:
      save_arrays(path, {name: np.ascontiguousarray(leaf) for name, leaf in trained.weights.items()}, trained.marks)
    except OSError as error:
      say(f"{path} cannot be written ({error.strerror}); the network will be trained anew next time")
  return trained


def of_first_process(trained: Trained) -> Trained:
  """What process 0 has, on every process; all must call it, with arrays of the same shapes."""
  marks = all_gather_host(np.asarray(list(trained.marks.values()), np.float32))[0]
  weights = {name: all_gather_host(leaf)[0] for name, leaf in sorted(trained.weights.items())}
  return Trained(weights, dict(zip(trained.marks, map(float, marks), strict=True)))


def load(path: pathlib.Path, shapes: dict[str, Any], marks: tuple[str, ...], say: Callable) -> Trained | None:
  """The network in the cache; None if there is none, or it is not what was saved, which is said."""
  try:
    weights, facts = load_arrays(path)
  except FileNotFoundError:
    return None
  except UnusableError as error:
    reason = str(error)
  else:
    if {n: (w.shape, w.dtype) for n, w in weights.items()} == {n: (s.shape, s.dtype) for n, s in shapes.items()}:
      return Trained(weights, {name: facts[name] for name in marks})
    reason = "it is of another network"
  say(f"{path} cannot be used ({reason}); training it anew")
  return None
