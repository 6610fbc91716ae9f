"""The run `train`. The order of operations of training is written here, once.

Checkpoint N holds the state after N updates; the line N of the metrics describes update N; nothing is trained after the
last checkpoint. Between two points where something is written, the device never waits for the host.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from ddpm_jax import grids, plots
from ddpm_jax import workdir as workdir_lib
from ddpm_jax.config import Config
from ddpm_jax.data.pipeline import batches
from ddpm_jax.data.sources import Source, open_source
from ddpm_jax.diffusion.samplers import make_sampler
from ddpm_jax.models.build import num_params
from ddpm_jax.progress import Progress
from ddpm_jax.run import Run, build_run
from ddpm_jax.sampling.draw import make_draw
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.optimizer import learning_rate_schedule, make_optimizer
from ddpm_jax.training.parallel import Parallel
from ddpm_jax.training.reports import Reports
from ddpm_jax.training.state import TrainState
from ddpm_jax.training.step import Metrics, make_loss, train_step
from ddpm_jax.training.stop import StopRequest

_RUN_AHEAD = 2  # updates that may wait on the device while the host prepares the next batch


def train(config: Config, workdir: pathlib.Path) -> None:
  """Trains until `config.train.num_steps` updates are made, or until a signal asks to stop; resumes if it can.

  Raises:
    UserError: before anything is compiled or written, if the command does not fit the data, the devices or the workdir.
    NonFiniteError: if the loss is not finite at a point where it is read.
  """
  parallel = Parallel(config.train.parallel)
  parallel.check_batch(config.data.batch_size, config.train.grad_accum_steps)
  exists = workdir_lib.check(workdir, config)
  source = open_source(config.data)
  run = build_run(config, source.image_shape, parallel)
  multihost_utils.sync_global_devices("every process has checked the workdir")
  is_first = jax.process_index() == 0
  if is_first and not exists:
    workdir_lib.create(workdir, config)
  multihost_utils.sync_global_devices("the workdir exists")

  with contextlib.closing(Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints)) as checkpoints:
    start, total = checkpoints.latest_step() or 0, config.train.num_steps
    if is_first:
      print(_headline(run, source, workdir, start), flush=True)
    if start >= total:
      return
    if is_first and exists:
      workdir_lib.create(workdir, config)  # what may change may have changed
    with contextlib.closing(Progress("step", total=total, done=start, quiet=not is_first)) as progress:
      end = _train(run, source, workdir, checkpoints, start, progress)
    if is_first:
      if (workdir / "metrics.jsonl").stat().st_size:
        plots.loss_curve(workdir / "metrics.jsonl", workdir / "loss.png")
      print(_farewell(workdir, end, total), flush=True)


def _train(
  run: Run, source: Source, workdir: pathlib.Path, checkpoints: Checkpoints, start: int, progress: Progress
) -> int:
  """Makes the updates after `start`. Returns the number of updates in the last checkpoint."""
  config, parallel, options = run.config, run.parallel, run.config.train
  step_fn = parallel.compile(make_train_step(run), run.abstract_state)
  preview = make_preview(run)
  meta = {"image_shape": list(run.image_shape)}
  host_batches = batches(
    source,
    batch_size=config.data.batch_size,
    seed=options.seed,
    start_step=start,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    threads=config.data.data_threads,
  )
  reports = Reports(workdir, progress, start_step=start, batch_size=config.data.batch_size)
  in_flight: collections.deque[Metrics] = collections.deque()
  unread: tuple[int, Metrics] | None = None  # metrics are read one update late, so that the device never waits

  with contextlib.closing(reports), contextlib.closing(host_batches), StopRequest() as stop:
    state = checkpoints.restore(run.abstract_state, start) if start else run.initial_state()
    for step in range(start + 1, options.num_steps + 1):
      batch = parallel.put_batch(next(host_batches))
      with jax.transfer_guard("disallow"):  # nothing moves between host and device unasked
        state, metrics = step_fn(state, batch)
      progress.advance()
      # The device is never left without a next update, and a request to stop finds at most _RUN_AHEAD under way.
      in_flight.append(metrics)
      if len(in_flight) > _RUN_AHEAD:
        jax.block_until_ready(in_flight.popleft())
      if step == start + 1:
        jax.block_until_ready(metrics)
        reports.compiled(step)
      if unread:
        reports.metrics(*unread)
        unread = None

      stopping = step < options.num_steps and stop.due(step)
      last = stopping or step == options.num_steps
      save_now = last or step % options.checkpoint_every == 0
      preview_now = options.sample_every and not stopping and (last or step % options.sample_every == 0)
      if step == options.num_steps or step % options.log_every == 0:
        unread = (step, metrics)
      if not (save_now or preview_now):
        continue

      # Something is written at this step: read the metrics, then save, then draw. No state is saved whose loss was not
      # finite.
      if unread:
        reports.metrics(*unread)
        unread = None
      else:
        reports.check(step, metrics)
      with reports.paused():
        if save_now:
          checkpoints.save(parallel.globalize(state), step, meta)
        if preview_now:
          reports.samples(step, preview(parallel.globalize(state)))
      if stopping:
        break
    checkpoints.wait()
  return step


def make_train_step(run: Run) -> functools.partial:
  """`step.train_step` with everything bound but (state, batch) and axis_name."""
  config = run.config
  return functools.partial(
    train_step,
    seed=config.train.seed,
    loss_fn=make_loss(run.network, run.schedule, config.diffusion, random_flip=config.data.random_flip),
    optimizer=make_optimizer(config.optimizer, config.train.num_steps),
    learning_rate=learning_rate_schedule(config.optimizer, config.train.num_steps),
    ema_decay=config.optimizer.ema_decay,
    grad_accum_steps=config.train.grad_accum_steps,
  )


def make_preview(run: Run) -> Callable[[TrainState], np.ndarray]:
  """state -> the picture of a sample grid: the EMA weights beside the raw ones, from the same noise."""
  options, schedule = run.config.train, run.schedule
  draw = make_draw(
    run.network,
    schedule,
    make_sampler(schedule, "ddim", num_steps=options.preview_steps),
    prediction=run.config.diffusion.prediction,
    image_shape=run.image_shape,
    parallel=run.parallel,
    seed=options.seed,
    stream="preview",
  )
  index = np.arange(options.preview_images)

  def preview(state: TrainState) -> np.ndarray:
    weights = {"EMA weights": state.ema_params, "raw weights": state.params}
    return grids.captioned(
      {name: grids.image_grid(draw(params, index), columns=min(8, len(index))) for name, params in weights.items()}
    )

  return preview


def _headline(run: Run, source: Source, workdir: pathlib.Path, start: int) -> str:
  height, width, channels = run.image_shape
  devices, total = jax.devices(), run.config.train.num_steps
  what = (
    f"ddpm_jax: {len(source)} images {height}x{width}x{channels} of {source.name}, U-Net of "
    f"{num_params(run.abstract_state.params):,} parameters, {len(devices)} x {devices[0].device_kind} "
    f"({run.parallel.mode}), processes: {jax.process_count()}\n"
  )
  if start >= total:
    longer = "; raise --num_steps to train longer" if run.config.optimizer.lr_schedule == "constant" else ""
    return what + f"{workdir} already holds all {total} updates: nothing to do{longer}"
  if start:
    return what + f"resuming {workdir} after update {start} of {total}; compiling"
  return what + f"training {total} updates in {workdir}; compiling"


def _farewell(workdir: pathlib.Path, step: int, total: int) -> str:
  done = step == total
  end = f"done: {step} updates" if done else f"stopped on request after update {step} of {total}, saved"
  again = "" if done else "  to go on      the same command again\n"
  return f"""{end}
  checkpoint    {workdir / "checkpoints" / str(step)}
  samples       {workdir / "samples"}
  metrics       {workdir / "metrics.jsonl"}, loss.png beside it, and tensorboard --logdir={workdir}
{again}  draw images   python -m ddpm_jax.main --mode=sample --workdir={workdir}"""
