"""How a step runs on many devices, of one process or of several: the only module that knows devices.

Between steps the state is a tree of global arrays over a one-dimensional mesh ("data"): replicated for pmap, sharded
for fsdp. Both run the same pure `train_step` and give the same numbers to float32 rounding.
"""

from __future__ import annotations

import functools
import os
import time
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddpm_jax.devices.packed import unpack
from ddpm_jax.devices.updates import make_updates
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import compilation, numerics
from ddpm_jax.runtime.progress import compiling

AXIS = "data"
Tree = Any
_STRETCH_S = 0.5  # of a stretch: a person sees it move, and starting it costs nothing beside it


class Parallel:
  """A mesh over all devices of all processes, and the placements that follow from `--parallel`."""

  def __init__(self, mode: str, devices: Sequence[Any] | None = None, *, matmul_precision: str = "default"):
    """Args:
      mode: 'pmap' or 'fsdp'.
      matmul_precision: of products and convolutions in all that is compiled here, see `numerics.pinned`.
      devices: JAX's, for the mesh; None: all that JAX has. For others, such as those of a topology that is not here, a
        step can be compiled, but they hold no arrays.

    Raises:
      UserError: if JAX has no device.
    """
    self.mode, self.matmul_precision = mode, matmul_precision
    self._elsewhere = devices is not None
    if devices is None:
      try:
        devices = jax.devices()
      except (RuntimeError, AssertionError) as error:  # the latter, without a word, for `cuda` where no plugin is
        reason = next(
          iter(str(error).splitlines()), f"no installed plugin provides JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
        )
        raise UserError(f"JAX finds no device ({reason}); correct JAX_PLATFORMS or the installation of JAX") from error
    self.num_devices = len(devices)
    # In the order of pmap. jax.make_mesh may choose another one on a TPU, and the state would move at every update.
    self.mesh = Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))
    self.replicated = NamedSharding(self.mesh, PartitionSpec())
    self.split = NamedSharding(self.mesh, PartitionSpec(AXIS))
    self._orders: dict[tuple[int, bool, bool], jax.Array] = {}

  def check_batch(self, batch_size: int, grad_accum_steps: int = 1) -> None:
    """Raises UserError if the devices do not divide the global batch, or a part of it."""
    rows = self.num_devices * grad_accum_steps
    if batch_size % rows:
      below, above = batch_size // rows * rows, (batch_size // rows + 1) * rows
      parts = f" times grad_accum_steps={grad_accum_steps}" if grad_accum_steps > 1 else ""
      raise UserError(
        f"batch_size: {batch_size} cannot be divided among {self.num_devices} devices{parts}; use "
        f"--batch_size={f'{below} or {above}' if below else above}"
      )

  def state_shardings(self, abstract_state: Tree) -> Tree:
    """The placement of each leaf of the state: everywhere for pmap; for fsdp, cut along its longest divisible axis."""
    return jax.tree.map(self._leaf_sharding, abstract_state)

  def _leaf_sharding(self, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    if self.mode == "fsdp":
      for axis in sorted(range(len(leaf.shape)), key=lambda axis: -leaf.shape[axis]):
        if leaf.shape[axis] % self.num_devices == 0:
          return NamedSharding(self.mesh, PartitionSpec(*(None,) * axis, AXIS))
    return self.replicated

  def spread(self, loss_fn: Callable[..., tuple[Tree, Tree]]) -> Callable[..., tuple[Tree, Tree]]:
    """An objective's loss, (params, extra, frozen, batch, keys) -> (terms, per_example), for a compiled step.

    For pmap the parameters may be packed, and their gradient is then. For fsdp each device takes its rows, with
    parameters that are whole. Left alone, XLA would cut the activations of fsdp where the parameters are cut, and send
    them around; and it would sum gradients over the devices in the type of the product that each is made of. Here they
    are summed in that of the parameters, float32.
    """
    if self.mode != "fsdp":
      return lambda params, *arguments: loss_fn(unpack(params), *arguments)

    def of_a_device(params: Tree, *arguments: Tree) -> tuple[Tree, Tree]:
      params = jax.lax.pcast(params, AXIS, to="varying")  # whose transpose is the sum over the devices
      terms, per_example = loss_fn(params, *arguments)
      return jax.lax.pmean(terms, AXIS), per_example

    rows, whole = PartitionSpec(AXIS), PartitionSpec()
    specs = (whole, whole, whole, rows, rows)
    return jax.shard_map(of_a_device, mesh=self.mesh, in_specs=specs, out_specs=(whole, rows))

  def _whole(self, tree: Tree) -> Tree:
    """Within a compiled function: the arrays on every device. For fsdp they are gathered."""
    return jax.lax.with_sharding_constraint(tree, self.replicated) if self.mode == "fsdp" else tree

  def compile(
    self,
    train_step: Callable,
    abstract_state: Tree,
    *,
    updates: int = 1,
    scalars: Mapping[str, np.generic] = types.MappingProxyType({}),
  ) -> PinnedStep:
    """`train_step(state, batch, axis_name=...)` as a function of placed arrays; it consumes (donates) its state.

    Args:
      train_step: one update of a TrainState, whose parameters may be packed (`packed.pack`).
      abstract_state: shapes and types of the state.
      updates: how many can be made in one call. If more than one, the metrics have a leading axis [updates].
      scalars: further keyword arguments of `train_step`, which are data of the program and no constants in it: with
        other values it is the same program.

    Returns:
      (state, batches, order) -> (state, metrics, votes). The batches are those of `put_batches`, the order that of
      `put_order`: it says how many updates to make, so that one program is enough, and carries the votes by which the
      processes agree. The votes are int32 [2], 1 where any process wants to stop, and where any wants a sample grid.
    """

    match self.mode:
      case "pmap":
        # jax.pmap is in maintenance mode upstream, where it is now a thin layer over jit(shard_map); it is asked for
        # here. With in_axes None the state has no device axis: it is replicated, as for fsdp it is sharded.
        def mapped(state: Tree, batches: Tree, order: jax.Array, scalars: Tree):
          order = jax.lax.pmax(order, AXIS)
          step = functools.partial(train_step, axis_name=AXIS, **scalars)
          return *make_updates(step, state, batches, order[0], most=updates, packed=self._packs), order[1:]

        step = jax.pmap(
          mapped,
          axis_name=AXIS,
          in_axes=(None, 0, 0, None),
          out_axes=None,
          donate_argnums=0,
          devices=list(self.mesh.devices.flat) if self._elsewhere else None,
        )
      case "fsdp":

        def sharded(state: Tree, batches: Tree, orders: jax.Array, scalars: Tree):
          order = jnp.max(orders, axis=0)
          step = functools.partial(train_step, axis_name=None, **scalars)
          return *make_updates(step, state, batches, order[0], most=updates), order[1:]

        shardings = self.state_shardings(abstract_state)
        step = jax.jit(
          sharded,
          in_shardings=(shardings, self._batches_sharding(updates), self.split, self.replicated),
          out_shardings=(shardings, self.replicated, self.replicated),
          donate_argnums=0,
        )
      case _:
        raise ValueError(f"unknown parallelism {self.mode!r}")
    placed = {
      name: jax.make_array_from_callback((), self.replicated, lambda _, value=value: np.asarray(value))
      for name, value in scalars.items()
    }
    return PinnedStep(step, self.matmul_precision, placed)

  @property
  def _packs(self) -> bool:
    """Whether the state is packed while the updates of a call follow each other.

    Elsewhere than on CPUs a kernel's shape has a layout in memory, and fsdp cuts the arrays as they are.
    """
    return self.mode == "pmap" and self.mesh.devices.flat[0].platform == "cpu"

  @property
  def lowers_shapes(self) -> bool:
    """Whether the compiled step can be lowered without arrays: `jax.pmap` over several processes cannot."""
    return self.mode != "pmap" or jax.process_count() == 1

  @property
  def compiles_beside_updates(self) -> bool:
    """Whether XLA may compile while the devices compute. For a GPU it tries algorithms out there, and takes memory."""
    return self.mesh.devices.flat[0].platform != "gpu"

  def put_batches(self, batches: Sequence[dict[str, np.ndarray]], *, updates: int = 1) -> dict[str, jax.Array]:
    """This process's rows [B / processes, ...] of the next global batches, as the compiled step takes them.

    If they are fewer than the `updates` that can be made in one call, the last one stands for what is missing.
    """
    sharding = self._batches_sharding(updates)

    def put(*rows: np.ndarray) -> jax.Array:
      placed = [part.reshape(self._rows_shape(part.shape, jax.local_device_count())) for part in rows]
      together = placed[0] if updates == 1 else np.stack(placed, axis=1 if self.mode == "pmap" else 0)
      return jax.make_array_from_process_local_data(sharding, together)

    return jax.tree.map(put, *batches, *[batches[-1]] * (updates - len(batches)))

  def _batches_sharding(self, updates: int) -> NamedSharding:
    if updates == 1 or self.mode == "pmap":
      return self.split
    return NamedSharding(self.mesh, PartitionSpec(None, AXIS))

  def _rows_shape(self, shape: tuple[int, ...], devices: int) -> tuple[int, ...]:
    """[B, ...] as the compiled step takes it: pmap wants a leading axis of devices."""
    return (devices, shape[0] // devices, *shape[1:]) if self.mode == "pmap" else shape

  def abstract_inputs(
    self, batch: dict[str, jax.ShapeDtypeStruct], *, updates: int = 1
  ) -> tuple[dict[str, Any], jax.ShapeDtypeStruct]:
    """So many global batches [B, ...] and the order as the compiled step takes them: to lower it without arrays."""
    sharding = self._batches_sharding(updates)

    def place(rows: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      shape = self._rows_shape(rows.shape, self.num_devices)
      if updates > 1:
        shape = (shape[0], updates, *shape[1:]) if self.mode == "pmap" else (updates, *shape)
      return jax.ShapeDtypeStruct(shape, rows.dtype, sharding=sharding)

    order = jax.ShapeDtypeStruct((self.num_devices, 3), jnp.int32, sharding=self.split)
    return jax.tree.map(place, batch), order

  def put_order(self, updates: int = 1, *, stop: bool = False, grid: bool = False) -> jax.Array:
    """How many updates to make, and whether this process wants to stop, or a grid, as the compiled step takes it."""
    order = updates, stop, grid
    if order not in self._orders:
      rows = np.tile(np.asarray(order, np.int32), (jax.local_device_count(), 1))
      self._orders[order] = jax.make_array_from_process_local_data(self.split, rows)
    return self._orders[order]

  def by_rows(
    self, function: Callable[..., Tree], *, keep: bool = False, matmul_precision: str | None = None
  ) -> ByRows:
    """Compiles a function of many examples so that all devices share them: for drawing and measuring.

    Args:
      function: (constants, *columns [B, ...]) -> tree of [B, ...]; row i of the result depends on row i alone.
      keep: it computes little: that the next process need not compile it again matters more than how fast it is.
      matmul_precision: of its products and convolutions; None: that of this object.
    """
    return ByRows(function, self, keep=keep, matmul_precision=matmul_precision or self.matmul_precision)

  def padded(self, columns: Sequence[np.ndarray], number: int) -> list[np.ndarray]:
    """At least so many rows, and as many as the devices can share: the first ones again."""
    rows = -(-number // self.num_devices) * self.num_devices
    return [np.take(column, np.arange(rows) % len(column), axis=0) for column in columns]

  def put_rows(self, columns: Sequence[np.ndarray]) -> list[jax.Array]:
    """Columns [B, ...], whole on every process, with B a multiple of the devices: placed, each device its rows."""
    return [
      jax.make_array_from_callback(column.shape, self.split, lambda piece, column=column: column[piece])
      for column in columns
    ]

  def put_whole(self, array: np.ndarray) -> jax.Array:
    """An array that is the same on every process, placed whole on each device."""
    return jax.make_array_from_callback(array.shape, self.replicated, lambda piece: array[piece])

  def abstract_rows(self, columns: Sequence[np.ndarray]) -> list[jax.ShapeDtypeStruct]:
    """What `put_rows` gives, for lowering."""
    return [jax.ShapeDtypeStruct(column.shape, column.dtype, sharding=self.split) for column in columns]

  def by_stretches(self, loop: Loop) -> ByStretches:
    """As `by_rows` compiles a function, this does a loop on many examples that takes long: it can be watched."""
    return ByStretches(loop, self)

  def globalize(self, state: Tree) -> Tree:
    """The state as global arrays. After a pmap over several processes each holds its own copy; this joins them."""
    if self.mode != "pmap" or jax.process_count() == 1:
      return state

    def join(leaf: jax.Array) -> jax.Array:
      copies = [shard.data for shard in leaf.addressable_shards]
      return jax.make_array_from_single_device_arrays(leaf.shape, self.replicated, copies)

    return jax.tree.map(join, state)


class PinnedStep:
  """A jitted or pmapped training step that is traced, lowered and called under `numerics.pinned`, with its scalars."""

  def __init__(self, step: Any, matmul_precision: str, scalars: Mapping[str, jax.Array]):
    self._step, self._matmul_precision, self._scalars = step, matmul_precision, scalars

  def __call__(self, *arguments: Any) -> Any:
    """Runs the step; compiles it first if it has to."""
    with numerics.pinned(self._matmul_precision):
      return self._step(*arguments, self._scalars)

  def lower(self, *arguments: Any) -> Any:
    """A `jax.stages.Lowered`, as what `jax.jit` returns has it."""
    with numerics.pinned(self._matmul_precision):
      return self._step.lower(*arguments, self._scalars)


class ByRows:
  """A function of rows, compiled once for each number of rows, that all devices share; see `Parallel.by_rows`."""

  def __init__(self, function: Callable[..., Tree], parallel: Parallel, *, keep: bool, matmul_precision: str):
    """As `Parallel.by_rows` says."""
    self._matmul_precision = matmul_precision
    options = compilation.options_to_be_kept(parallel.mesh.devices.flat[0].platform) if keep else {}

    def compiled(constants: Tree, *columns: jax.Array) -> Tree:
      return function(parallel._whole(constants), *columns)

    self._jitted = jax.jit(compiled, out_shardings=parallel.replicated, compiler_options=options)
    self._parallel = parallel
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
    padded = self._parallel.padded(columns, max(number, size))
    placed = self._parallel.put_rows(padded)

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
    rows = self._parallel.padded(columns, len(columns[0]))
    self._ahead[_shapes(rows)] = submit(self._lower(constants, rows))

  def is_ready(self, *columns: np.ndarray) -> bool:
    """Whether a call with such columns begins at once; where it does not, it waits for a compilation."""
    return self._is_ready(_shapes(self._parallel.padded(columns, len(columns[0]))))

  def bytes_needed(self, constants: Tree, *columns: np.ndarray, size: int) -> int:
    """Memory that XLA plans for each device beside the constants, for `size` rows like these. Compiles."""
    return _planned(self._executable(constants, self._parallel.padded(columns, size)))

  def _lower(self, constants: Tree, columns: list[np.ndarray]) -> jax.stages.Lowered:
    with numerics.pinned(self._matmul_precision):
      return self._jitted.lower(constants, *self._parallel.abstract_rows(columns))

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


class ByStretches:
  """A loop on rows that all devices share, in as many calls as it takes to be watched; see `Parallel.by_stretches`.

  How many iterations a call makes is an argument of the one program that makes them, and so no matter to the bits.
  """

  def __init__(self, loop: Loop, parallel: Parallel):
    """As `Parallel.by_stretches` says."""
    self._parallel, self._number = parallel, loop.number
    self._at_once = 1  # iterations in the next call

    def begin(constants: Tree, *columns: jax.Array) -> Tree:
      return loop.begin(parallel._whole(constants), *columns)

    def advance(constants: Tree, state: Tree, bounds: jax.Array, *columns: jax.Array) -> Tree:
      return loop.advance(parallel._whole(constants), state, bounds[0], bounds[1], *columns)

    def end(constants: Tree, state: Tree, *columns: jax.Array) -> Tree:
      return loop.end(parallel._whole(constants), state, *columns)

    self._begin = jax.jit(begin, out_shardings=parallel.split)
    self._advance = jax.jit(advance, out_shardings=parallel.split, donate_argnums=1)
    self._end = jax.jit(end, out_shardings=parallel.replicated)
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
    parallel, number = self._parallel, len(columns[0])
    padded = parallel.padded(columns, max(number, size))
    placed = parallel.put_rows(padded)
    begin, advance, end = self._executables(constants, padded)
    state, first = begin(constants, *placed), 0
    while first < self._number:
      began, last = time.perf_counter(), min(first + self._at_once, self._number)
      bounds = parallel.put_whole(np.asarray((first, last), np.int32))
      state = jax.block_until_ready(advance(constants, state, bounds, *placed))
      self._adapt(last - first, time.perf_counter() - began)
      first = last
      done(first)
    return jax.tree.map(lambda leaf: to_host(leaf)[:number], end(constants, state, *placed))

  def _adapt(self, made: int, seconds: float) -> None:
    """Sets how many iterations the next call makes, from how long some took; for all processes, the first one does."""
    if made == self._at_once:  # the last call of a loop may have made fewer
      wanted = min(int(made * _STRETCH_S / max(seconds, 1e-6)), 4 * made)
      self._at_once = max(1, int(from_all_processes(np.asarray(wanted))[0]))

  def bytes_needed(self, constants: Tree, *columns: np.ndarray, size: int) -> int:
    """Memory that XLA plans for each device beside the constants, for `size` rows like these. Compiles."""
    return max(map(_planned, self._executables(constants, self._parallel.padded(columns, size))))

  def _executables(self, constants: Tree, columns: list[np.ndarray]) -> list[Any]:
    """`begin`, `advance` and `end`, compiled for columns of these shapes."""
    shapes, parallel = _shapes(columns), self._parallel
    if shapes not in self._compiled:
      rows = parallel.abstract_rows(columns)
      bounds = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=parallel.replicated)
      with compiling(), numerics.pinned(parallel.matmul_precision):
        state = jax.tree.map(
          lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=parallel.split),
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


def _shapes(columns: list[np.ndarray]) -> tuple:
  return tuple((column.shape, str(column.dtype)) for column in columns)


def free_memory() -> int:
  """Bytes that a device of this process may still use; on CPU devices, its share of half the machine's free memory."""
  device = jax.local_devices()[0]
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 * jax.local_device_count())


def gather(array: jax.Array) -> np.ndarray:
  """A global array of any placement as NumPy, whole, on every process; all must call it, in the same order."""
  if array.is_fully_replicated:
    return to_host(array)
  if array.is_fully_addressable:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def from_all_processes(value: np.ndarray) -> np.ndarray:
  """[processes, ...]: an array of the same shape and type from every process, on every process; all must call it."""
  if jax.process_count() == 1:
    return value[None]
  # As bytes: JAX would make 32-bit numbers of 64-bit ones.
  raw = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
  gathered = np.asarray(multihost_utils.process_allgather(raw))
  return np.frombuffer(gathered.tobytes(), value.dtype).reshape(-1, *value.shape)


def on_any_process(fact: bool) -> bool:
  """Whether it is true on any process; all must call it."""
  return bool(np.any(from_all_processes(np.asarray(fact))))


def to_host(array: jax.Array) -> np.ndarray:
  """A replicated array as NumPy, on every process. Waits for it to be computed."""
  return jax.device_get(array.addressable_shards[0].data)
