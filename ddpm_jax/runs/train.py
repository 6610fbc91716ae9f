"""The run `train`. The order of operations of training is written here, once.

Checkpoint N holds the state after N updates; the line N of the metrics describes update N; nothing is trained after the
last checkpoint. Between two points where something is written, the device never waits for the host.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.util
import pathlib
import shlex
import time
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils

from ddpm_jax import config as config_lib
from ddpm_jax.checkpoint import resume
from ddpm_jax.checkpoint.checkpoint import Checkpoints, NoneInCommonError, Restored
from ddpm_jax.checkpoint.saver import Saver
from ddpm_jax.config import Config, TrainConfig
from ddpm_jax.data.pipeline import Batch, batches, images_of
from ddpm_jax.data.sources import Source, open_source
from ddpm_jax.devices.parallel import Parallel, to_host
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.evaluation.evaluate import check as check_evaluation
from ddpm_jax.models.build import Params, fitted, num_params
from ddpm_jax.runs import earlier
from ddpm_jax.runs.evaluating import Evaluations, evaluation_missing
from ddpm_jax.runs.preview import EarlyGrids, Preview
from ddpm_jax.runs.profile import Profile
from ddpm_jax.runs.programs import Compiler, StepProgram
from ddpm_jax.runs.reports import Reports, write_pages
from ddpm_jax.runtime import compilation, console, numerics, paths
from ddpm_jax.runtime.distributed import Job
from ddpm_jax.runtime.progress import Progress
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.runtime.watchdog import Watchdog
from ddpm_jax.sampling.draw import QUICK
from ddpm_jax.training.optimizer import decay_start
from ddpm_jax.training.setup import Run, build_run, copies_warning, make_train_step, noise_warning
from ddpm_jax.training.state import TrainState
from ddpm_jax.training.step import Metrics
from ddpm_jax.weights import initial
from ddpm_jax.weights.file import settings_of_run
from ddpm_jax.workdir import layout, loggers
from ddpm_jax.workdir.lock import Lock


def train(
  config: Config,
  workdir: pathlib.Path,
  stop: StopRequest,
  job: Job | None = None,
  chosen: str = "",
  given: frozenset[str] = frozenset(),
  clock: Callable[[], float] = time.monotonic,
) -> bool:
  """Trains until `config.train.num_steps` updates are made, or until a signal asks to stop; resumes if it can.

  Args:
    config: the run.
    workdir: its folder.
    stop: hears the signals.
    job: the processes that take part; this one alone if None.
    chosen: a line for the user on settings that the command left open, printed once the images are found.
    given: names of the flags of this command, for evaluations: a number or a sampler that it names is not chosen anew.
    clock: seconds since any moment, by which the training is timed.

  Returns:
    Whether the run is finished; if not, it was asked to stop.

  Raises:
    UserError: before anything is compiled, if the command does not fit the data, the devices, the workdir or its
      checkpoints.
    RunError: if what must be kept cannot be written.
    NonFiniteError: if the loss or the gradient is not finite, as often as is not put up with.
  """
  parallel = Parallel(config.train.parallel, matmul_precision=config.model.matmul_precision)
  parallel.check_batch(config.data.batch_size, config.train.grad_accum_steps)
  exists = layout.check(workdir, config)
  loggers.find(config_lib.writer_names(config.train.writers))  # before anything is written
  source = open_source(config.data)
  config = dataclasses.replace(config, model=fitted(config.model, source.image_shape))
  run = build_run(config, source.image_shape, parallel)
  resume.check_hosts(run, source)
  if config.train.evaluate_every:
    check_evaluation(config, workdir, source)
  params = None
  if config.exchange.init_from and not layout.has_checkpoints(workdir, ["checkpoints"]):
    params, _ = initial.read_params(config, source.image_shape)
  with contextlib.ExitStack() as cleanup:
    lock, job = None, job or Job("single")
    if job.process == 0:
      if not exists:
        check_space(run, workdir, 0)
      lock = cleanup.enter_context(contextlib.closing(Lock(workdir)))
      exists = layout.check(workdir, config)  # again: another process may have been faster
      if not exists:
        layout.create(workdir, config)
      if chosen:
        console.say(chosen)
    multihost_utils.sync_global_devices("the workdir exists")
    try:
      resume.check_shared(workdir)
    except UserError:
      if lock and not exists:
        layout.discard(workdir)
      raise
    # Until everything is closed, as that waits for what is being saved.
    watchdog = Watchdog(config.train.step_timeout, process=job.process, folder=workdir, leave=job.leave)
    cleanup.enter_context(watchdog)
    start = decay_start(config.optimizer, config.train.num_steps)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints, keep_step=start)
    cleanup.enter_context(contextlib.closing(checkpoints))
    try:
      restored = checkpoints.restore(resume.same_run(run, source, workdir), on_corrupt=config.train.on_corrupt)
      damaged, passed = (restored.damaged, restored.passed) if restored else ({}, [])
    except NoneInCommonError as error:
      if error.since > 0:
        raise
      restored, damaged, passed = None, error.damaged, error.passed  # both begin with the same initial state
      if config.exchange.init_from:
        params, _ = initial.read_params(config, source.image_shape)
    for step, reason in damaged.items():
      moved = checkpoints.set_aside(step)
      if lock:
        console.warn(f"checkpoint {step} is damaged: {reason}; moved to {moved}")
    return _resume_or_start(
      run, source, workdir, checkpoints, restored, passed, params, lock, stop, job, watchdog, given, clock
    )


def _resume_or_start(
  run: Run,
  source: Source,
  workdir: pathlib.Path,
  checkpoints: Checkpoints,
  restored: Restored | None,
  passed: list[int],
  params: Params | None,
  lock: Lock | None,
  stop: StopRequest,
  job: Job,
  watchdog: Watchdog,
  given: frozenset[str],
  clock: Callable[[], float],
) -> bool:
  """Says what is going to happen, and lets it. Returns whether the run is finished.

  `passed` are checkpoints from which a run of this length does not go on; `lock` is that of the first process, which
  alone says anything.
  """
  start, total = restored.step if restored else 0, run.config.train.num_steps
  finished = start >= total and not evaluation_missing(run.config, workdir, start)
  if lock and start < total and (restored or passed):  # a new run has been looked at before its folder was made
    check_space(run, workdir, start, leaving=len(passed))
  end = earlier.set_aside(workdir, checkpoints, passed, start) if passed else None
  restarts = resume.restarts(run.config, restored.manifest if restored else None)
  run = run._replace(lr_restart=restarts[-1] if restarts else 0)
  if lock:
    console.say(_headline(run, source, workdir, start, job, finished, end))
  if finished:
    return True
  if lock:
    for warning in filter(None, (noise_warning(run), copies_warning(run.config, len(source)))):
      console.warn(warning)
    # What may change has changed. Until there is a checkpoint, the flags of a restart say which weights are the first.
    _renew(workdir, config_lib.beyond_init_from(run.config) if restored else run.config)
  facts = resume.facts(run, source, restored.manifest if restored else None)
  if not restored and params is None and run.config.exchange.init_from:
    raise RunError(f"workdir: the checkpoints of {workdir} are gone; the same command begins anew")
  with contextlib.closing(Progress("step", total=total, done=start, quiet=not lock)) as progress:
    size, seed = run.config.data.batch_size, run.config.train.seed
    reports = Reports(
      workdir,
      progress,
      run.config.train,
      start_step=start,
      batch_size=size,
      images=lambda step: images_of(source, step - 1, batch_size=size, seed=seed),
      settings=settings_of_run(run.config),
      so_far=(restored.manifest if restored else {}).get("so_far", {}),
      clock=clock,
    )
    saver = Saver(
      checkpoints,
      run.config.train,
      facts,
      start_step=start,
      lock=lock,
      flush=reports.flush,
      extra_step=decay_start(run.config.optimizer, total),
    )
    trains_first = start < total and not evaluation_missing(run.config, workdir, start)
    profile = Profile(
      config_lib.profiled(run.config.train.profile_steps, total),
      workdir / "profile",
      start_step=start,
      say=progress.say,
      paused=reports.paused,
    )
    with contextlib.closing(reports), contextlib.closing(profile), contextlib.closing(Compiler()) as compiler:
      make_updates = StepProgram(run, make_train_step(run), compiler, ahead=trains_first)
      with progress.compiling("the initial state"):
        state = restored.state if restored else run.initial_state(params)
      own = run._replace(config=config_lib.beyond_init_from(run.config))
      evaluations = Evaluations(own, source, workdir, reports, stop, watchdog.beat, given=given)
      preview = Preview(run, compiler if trains_first else None)
      early = EarlyGrids(reports.seconds, wanted=run.config.train.sample_every > 0)
      around = _Around(reports, saver, evaluations, preview, early, profile, progress, stop, watchdog)
      end, stopped = _train(run, source, state, start, make_updates, around)
  if lock:
    try:
      _renew(workdir, config_lib.beyond_init_from(run.config))
      write_pages(workdir)
    except OSError as error:  # all that matters is saved
      console.warn(f"cannot write loss.png and report.html into {workdir} ({error.strerror})")
    except UserError as error:
      console.warn(f"{error}")
    console.say(_farewell(workdir, end, total, run.schedule.num_timesteps))
  return not stopped


def _renew(workdir: pathlib.Path, config: Config) -> None:
  """Writes the settings anew if they are others."""
  if config != layout.load_config(workdir):
    layout.create(workdir, config)


class _Around(NamedTuple):
  """What happens around the updates."""

  reports: Reports
  saver: Saver
  evaluations: Evaluations
  preview: Preview
  early: EarlyGrids
  profile: Profile
  progress: Progress
  stop: StopRequest
  watchdog: Watchdog


def _train(
  run: Run, source: Source, state: TrainState, start: int, make_updates: StepProgram, around: _Around
) -> tuple[int, bool]:
  """Makes the updates after `start`.

  Returns:
    The number of updates in the last checkpoint, and whether a request to stop came before the run was finished.
  """
  parallel, options, step = run.parallel, run.config.train, start
  reports, saver, evaluations, preview, early, profile, progress, stop, watchdog = around
  if evaluations.missing(start) and evaluations.make(state, start):
    return start, True
  alone = jax.process_count() == 1
  host_batches = _batches_after(start, run, source)
  in_flight: collections.deque[tuple[range, Metrics, jax.Array]] = collections.deque()
  run_ahead = calls_ahead(options)
  stopping = early_grid = False

  with contextlib.closing(host_batches):

    def settle(at_most: int) -> None:
      """Waits until that many calls are in flight, reports the others, and counts the votes of the processes."""
      nonlocal stopping, early_grid
      while len(in_flight) > at_most:
        made, metrics, votes = in_flight.popleft()
        reports.check(made, metrics)
        done = made[-1]
        if done % options.log_every == 0 or done == options.num_steps or evaluations.due(done):
          reports.metrics(made, metrics)
        if not alone:
          stop_now, grid_now = to_host(votes).tolist()
          stopping, early_grid = stopping or bool(stop_now), early_grid or bool(grid_now)
        watchdog.beat(f"update {done}")

    for steps in dispatches(options, start, decay_start(run.config.optimizer, options.num_steps)):
      step = steps[-1]
      placed = parallel.put_batches([next(host_batches) for _ in steps], updates=options.steps_per_dispatch)
      order = parallel.put_order(len(steps), stop=stop.requested is not None, grid=not alone and early.ask())
      first = steps[0] == start + 1
      profile.before(steps, state)
      with progress.compiling("the training step") if first else contextlib.nullcontext():
        with (
          jax.profiler.StepTraceAnnotation("train", step_num=steps[-1]),
          jax.transfer_guard("disallow"),  # nothing moves between host and device unasked
        ):
          state, *outputs = make_updates(state, placed, order)
        if first:
          stop.defer()  # from now on there is something to save
          jax.block_until_ready(outputs)
      profile.after(steps, outputs)
      in_flight.append((steps, *outputs))
      if first:
        reports.compiled(steps)
        compilation.look_for_garbage_as_usual()
      else:
        progress.advance(len(steps))
      # The device is never left without a next update, and a request to stop finds few under way.
      # Several processes hear of it when all of them read the same vote; one alone need not wait for that.
      settle(run_ahead)
      if alone:
        stopping, early_grid = stop.requested is not None, early.due(compiling=preview.compiling)
      saver.poll(step)

      save_now = stopping or step == options.num_steps or saver.due(step) or evaluations.due(step)
      preview_now = early_grid or _grid_due(options, step)
      if not (save_now or (preview_now and not stopping)):
        continue
      settle(0)
      last = save_now and (stopping or step == options.num_steps)
      with reports.paused():
        # Drawn beside what a save does before it returns: what it does afterwards is beside the next updates.
        picture = preview(parallel.globalize(state)) if preview_now and not stopping else None
        if save_now:
          saver.save(parallel.globalize(state), step, last=last, so_far={"so_far": reports.so_far(step)})
          watchdog.beat(f"checkpoint {step}")
        if picture:
          reports.samples(step, picture(), preview.settings)
          early.drawn()
          early_grid = False
          watchdog.beat(f"the sample grid of update {step}")
        if evaluations.due(step) and not stopping and saver.wait(step):
          stopping = evaluations.make(parallel.globalize(state), step)  # stopped: it is made when the run goes on
          last |= stopping
      if last:
        break
    saver.finish(step)
  return step, stopping and (step < options.num_steps or evaluations.due(step))


def _grid_due(options: TrainConfig, step: int) -> bool:
  """Whether `--sample_every` asks for a sample grid of the state after `step` updates."""
  return options.sample_every > 0 and (step % options.sample_every == 0 or step == options.num_steps)


def calls_ahead(options: TrainConfig) -> int:
  """Calls that may be under way while the host prepares the next one. Of several updates, one takes long enough."""
  return 2 if options.steps_per_dispatch == 1 else 1


def dispatches(options: TrainConfig, start: int, extra_step: int | None = None) -> Iterator[range]:
  """The updates after `start`, in the calls that the device gets them in: at most `steps_per_dispatch` in each.

  A call ends where something is written, and at `extra_step`.
  """
  points = (options.log_every, options.checkpoint_every, options.sample_every, options.evaluate_every)
  step = start
  while step < options.num_steps:
    ends = [step + options.steps_per_dispatch, options.num_steps, *(step + n - step % n for n in points if n)]
    ends += [extra_step] if extra_step is not None and extra_step > step else []
    yield range(step + 1, min(ends) + 1)
    step = min(ends)


def _batches_after(start: int, run: Run, source: Source) -> Generator[Batch, None, None]:
  return batches(
    source,
    batch_size=run.config.data.batch_size,
    seed=run.config.train.seed,
    start_step=start,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    threads=run.config.data.data_threads,
    workers=run.config.data.data_workers,
  )


def check_space(run: Run, workdir: pathlib.Path, start: int, leaving: int = 0) -> None:
  """Raises UserError if the checkpoints after step `start` will not find room. Before compression, to be sure.

  leaving: the number of those in `checkpoints/` that are about to be moved elsewhere.
  """
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.abstract_state))
  options = run.config.train
  saves = sum(
    (options.num_steps - start) // every + 1 for every in (options.checkpoint_every, options.evaluate_every) if every
  )
  begin = decay_start(run.config.optimizer, options.num_steps)
  decay = begin is not None  # one more is kept, and written unless it exists
  saves += decay and begin > start
  layout.check_space(workdir, size, options.keep_checkpoints, saves, beside=decay + leaving)


def _headline(
  run: Run, source: Source, workdir: pathlib.Path, start: int, job: Job, finished: bool, passed: pathlib.Path | None
) -> str:
  """What is going to happen. `passed`: where the end of a shorter run is now, which this one does not go on from."""
  height, width, channels = run.image_shape
  total = run.config.train.num_steps
  what = (
    f"ddpm_jax: {len(source)} images {height}x{width}x{channels} of {source.name}, U-Net of "
    f"{num_params(run.abstract_state.params):,} parameters, {numerics.machine()} "
    f"({run.parallel.mode})\n{job.text}\n"
  )
  if finished:
    return what + f"{workdir} already holds all {total} updates: nothing to do; raise --num_steps to train longer"
  if passed:
    what += (
      f"going back to step {start}, after which the learning rate decayed toward another --num_steps; later "
      f"checkpoints are kept in {passed}, which is a workdir\n"
    )
  if start and run.lr_restart == start:
    what += f"the cosine learning rate restarts for the {total - start} training steps from here to {total}\n"
  if start:
    return what + f"resuming {workdir} after update {start} of {total}; compiling"
  first = f" from the weights of {run.config.exchange.init_from}" if run.config.exchange.init_from else ""
  return what + f"a new run: training {total} updates{first} in {workdir}; compiling"


def _farewell(workdir: pathlib.Path, step: int, total: int, num_timesteps: int) -> str:
  done, quick = step >= total, min(QUICK, num_timesteps)
  end = f"done: {step} updates" if done else f"stopped on request after update {step} of {total}, saved"
  again = "" if done else f"  to go on      {paths.command(f'--workdir={workdir}')}\n"
  metrics = f"{workdir / 'metrics.jsonl'}, loss.png and report.html beside it"
  if importlib.util.find_spec("tensorboard") and (workdir / "tensorboard").is_dir():
    metrics += f", and {shlex.join(['tensorboard', f'--logdir={workdir}'])}"
  draw = paths.command("--mode=sample", "--sampler=dpmpp", f"--sampling_steps={quick}", f"--workdir={workdir}")
  return f"""{end}
  checkpoint    {workdir / "checkpoints" / str(step)}
  samples       {workdir / "samples"}
  metrics       {metrics}
{again}  draw images   {draw}"""
