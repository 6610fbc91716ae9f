"""Functions of many rows, compiled once for each number of rows, that all devices share: for drawing and measuring."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.devices.hosts import all_gather_host, to_host
from ddpm_jax.devices.mesh import DeviceMesh, Tree
from ddpm_jax.runtime import compilation, numerics
from ddpm_jax.runtime.progress import compiling

_CALL_S = 0.5  # of a loop: progress is seen to move, and the start of a call costs nothing beside it


class BatchedFn:
  """A function of many rows, which the devices share; compiled once for each number of rows."""

  def __init__(
    self, function: Callable[..., Tree], mesh: DeviceMesh, *, keep: bool = False, matmul_precision: str | None = None
  ):
    """Args:
    function: (constants, *columns [B, ...]) -> tree of [B, ...]; row i of the result depends on row i alone.
    mesh: the devices.
    keep: it computes little: that the next process need not compile it again matters more than how fast it is.
    matmul_precision: of its products and convolutions; None: that of the mesh.
    """
    self._matmul_precision = matmul_precision or mesh.matmul_precision
    options = compilation.options_to_be_kept(mesh.platform) if keep else {}

    def compiled(constants: Tree, *columns: jax.Array) -> Tree:
      return function(mesh.gathered(constants), *columns)

    self._jitted = jax.jit(compiled, out_shardings=mesh.replicated, compiler_options=options)
    self._mesh = mesh
    self._ahead: dict[tuple, Future[Any]] = {}
    self._compiled: dict[tuple, Any] = {}

  def __call__(self, constants: Tree, *columns: np.ndarray, size: int = 0) -> Tree:
    """The function's result as NumPy, whole on every process. Arguments: as of `start`."""
    return self.start(constants, *columns, size=size)()

  def start(self, constants: Tree, *columns: np.ndarray, size: int = 0) -> Callable[[], Tree]:
    """Lets the devices begin, unless that has to wait for a compilation. Returns what waits and gives the result.

    Args:
      constants: what is the same for all rows: a tree of placed arrays.
      *columns: NumPy arrays [B, ...], the same on every process.
      size: pad them to that many rows, so that a last, smaller batch compiles nothing new.
    """
    number = len(columns[0])
    padded = _padded(self._mesh, columns, max(number, size))
    placed = self._mesh.put_rows(padded)

    def begin() -> Tree:
      return self._executable(constants, padded)(constants, *placed)

    begun = begin() if self._is_ready(_shapes(padded)) else None
    return lambda: jax.tree.map(lambda leaf: to_host(leaf)[:number], begin() if begun is None else begun)

  def compile_ahead(
    self, submit: Callable[[jax.stages.Lowered], Future[Any]], constants: Tree, *columns: np.ndarray
  ) -> None:
    """Lets `submit` compile it for columns like these; a call with such ones waits for that.

    constants: or their ShapeDtypeStructs, with shardings.
    """
    rows = _padded(self._mesh, columns, len(columns[0]))
    self._ahead[_shapes(rows)] = submit(self._lower(constants, rows))

  def is_ready(self, *columns: np.ndarray) -> bool:
    """Whether a call with such columns begins at once; where it does not, it waits for a compilation."""
    return self._is_ready(_shapes(_padded(self._mesh, columns, len(columns[0]))))

  def bytes_needed(self, constants: Tree, *columns: np.ndarray, size: int) -> int:
    """Memory that XLA plans for each device beside the constants, for `size` rows like these. Compiles."""
    return _planned(self._executable(constants, _padded(self._mesh, columns, size)))

  def _lower(self, constants: Tree, columns: list[np.ndarray]) -> jax.stages.Lowered:
    with numerics.pinned(self._matmul_precision):
      return self._jitted.lower(constants, *_abstract_rows(self._mesh, columns))

  def _executable(self, constants: Tree, columns: list[np.ndarray]) -> Any:
    shapes = _shapes(columns)
    if shapes not in self._compiled:
      ahead = self._ahead.get(shapes)
      with compiling():
        self._compiled[shapes] = ahead.result() if ahead else self._lower(constants, columns).compile()
    return self._compiled[shapes]

  def _is_ready(self, shapes: tuple) -> bool:
    """Whether nothing has to be waited for. All processes say the same, so that all begin at the same place."""
    ahead = self._ahead.get(shapes)
    return shapes in self._compiled or (jax.process_count() == 1 and ahead is not None and ahead.done())


class Loop(NamedTuple):
  """A loop on many examples, in pure functions; row i of state and result depends on row i of the columns alone.

  Attributes:
    begin: (constants, *columns [B, ...]) -> the state before the first iteration, a tree of [B, ...].
    advance: (constants, state, first, last, *columns) -> the state after the iterations `first` to `last` - 1.
    end: (constants, state, *columns) -> the result, a tree of [B, ...].
    number: of iterations.
  """

  begin: Callable[..., Tree]
  advance: Callable[..., Tree]
  end: Callable[..., Tree]
  number: int


class BatchedLoop:
  """A loop on rows that all devices share, in as many calls as it takes to be watched.

  How many iterations a call makes is an argument of the one program that makes them, and so no matter to the bits.
  """

  def __init__(self, loop: Loop, mesh: DeviceMesh):
    """For the devices of `mesh`, at its matmul precision."""
    self._mesh, self._number = mesh, loop.number
    self._at_once = 1  # iterations in the next call

    def begin(constants: Tree, *columns: jax.Array) -> Tree:
      return loop.begin(mesh.gathered(constants), *columns)

    def advance(constants: Tree, state: Tree, bounds: jax.Array, *columns: jax.Array) -> Tree:
      return loop.advance(mesh.gathered(constants), state, bounds[0], bounds[1], *columns)

    def end(constants: Tree, state: Tree, *columns: jax.Array) -> Tree:
      return loop.end(mesh.gathered(constants), state, *columns)

    self._begin = jax.jit(begin, out_shardings=mesh.split)
    self._advance = jax.jit(advance, out_shardings=mesh.split, donate_argnums=1)
    self._end = jax.jit(end, out_shardings=mesh.replicated)
    self._compiled: dict[tuple, list[Any]] = {}

  def __call__(
    self, constants: Tree, *columns: np.ndarray, size: int = 0, done: Callable[[int], None] = lambda number: None
  ) -> Tree:
    """The result as NumPy, whole on every process.

    Args:
      constants: what is the same for all rows: a tree of placed arrays.
      *columns: NumPy arrays [B, ...], the same on every process.
      size: pad them to that many rows, so that a last, smaller batch compiles nothing new.
      done: called about twice a second with the number of iterations that are made, on all processes at the same
        numbers. What it raises ends the loop.
    """
    mesh, number = self._mesh, len(columns[0])
    padded = _padded(mesh, columns, max(number, size))
    placed = mesh.put_rows(padded)
    begin, advance, end = self._executables(constants, padded)
    state, first = begin(constants, *placed), 0
    while first < self._number:
      began, last = time.perf_counter(), min(first + self._at_once, self._number)
      bounds = mesh.put_whole(np.asarray((first, last), np.int32))
      state = jax.block_until_ready(advance(constants, state, bounds, *placed))
      self._adapt(last - first, time.perf_counter() - began)
      first = last
      done(first)
    return jax.tree.map(lambda leaf: to_host(leaf)[:number], end(constants, state, *placed))

  def _adapt(self, made: int, seconds: float) -> None:
    """Sets how many iterations the next call makes, from how long some took; for all processes, the first one does."""
    if made == self._at_once:  # the last call of a loop may have made fewer
      wanted = min(int(made * _CALL_S / max(seconds, 1e-6)), 4 * made)
      self._at_once = max(1, int(all_gather_host(np.asarray(wanted))[0]))

  def bytes_needed(self, constants: Tree, *columns: np.ndarray, size: int) -> int:
    """Memory that XLA plans for each device beside the constants, for `size` rows like these. Compiles."""
    return max(map(_planned, self._executables(constants, _padded(self._mesh, columns, size))))

  def _executables(self, constants: Tree, columns: list[np.ndarray]) -> list[Any]:
    """`begin`, `advance` and `end`, compiled for columns of these shapes."""
    shapes, mesh = _shapes(columns), self._mesh
    if shapes not in self._compiled:
      rows = _abstract_rows(mesh, columns)
      bounds = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=mesh.replicated)
      with compiling(), numerics.pinned(mesh.matmul_precision):
        state = jax.tree.map(
          lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mesh.split),
          jax.eval_shape(self._begin, constants, *rows),
        )
        self._compiled[shapes] = [
          self._begin.lower(constants, *rows).compile(),
          self._advance.lower(constants, state, bounds, *rows).compile(),
          self._end.lower(constants, state, *rows).compile(),
        ]
    return self._compiled[shapes]


def _planned(executable: Any) -> int:
  """Bytes that XLA plans for each device beside the arguments; 0 if it does not say."""
  plan = executable.memory_analysis()
  return plan.temp_size_in_bytes + plan.output_size_in_bytes if plan else 0


def _padded(mesh: DeviceMesh, columns: Sequence[np.ndarray], number: int) -> list[np.ndarray]:
  """At least `number` rows, and as many as the devices can share: the first ones again."""
  rows = -(-number // mesh.num_devices) * mesh.num_devices
  return [np.take(column, np.arange(rows) % len(column), axis=0) for column in columns]


def _abstract_rows(mesh: DeviceMesh, columns: Sequence[np.ndarray]) -> list[jax.ShapeDtypeStruct]:
  """The shapes of what `DeviceMesh.put_rows` returns, for lowering."""
  return [jax.ShapeDtypeStruct(column.shape, column.dtype, sharding=mesh.split) for column in columns]


def _shapes(columns: list[np.ndarray]) -> tuple:
  return tuple((column.shape, str(column.dtype)) for column in columns)


def free_memory() -> int:
  """Bytes that a device of this process may still use; on CPU devices, its share of half the machine's free memory."""
  device = jax.local_devices()[0]
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 * jax.local_device_count())
