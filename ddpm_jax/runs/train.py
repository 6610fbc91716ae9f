"""The run `train`. The order of operations of training is written here, once.

Checkpoint N holds the state after N training steps; line N of the metrics describes step N; nothing is trained after
the last checkpoint. Between two points where something is written, the device never waits for the host.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Container, Generator, Iterator
from typing import NamedTuple

import jax

from ddpm_jax import config as config_lib
from ddpm_jax.checkpoint import resume
from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.checkpoint.resume import Start
from ddpm_jax.checkpoint.saver import Saver
from ddpm_jax.config import Config, TrainConfig, check_size
from ddpm_jax.data.pipeline import Batch, batches, images_of
from ddpm_jax.data.sources import Source, class_names, num_classes, open_source
from ddpm_jax.devices import make_mesh
from ddpm_jax.devices.hosts import to_host
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.evaluation import perceptual
from ddpm_jax.first_stage.latents import FixedStage
from ddpm_jax.first_stage.statistics import Encoded, as_source
from ddpm_jax.models.build import TrainableNetwork, fitted
from ddpm_jax.runs import earlier, evaluating, workdirs
from ddpm_jax.runs.alarms import Alarms
from ddpm_jax.runs.evaluating import Evaluations, evaluation_missing
from ddpm_jax.runs.preview import EarlyGrids, Preview, Reconstructions
from ddpm_jax.runs.profile import Profile
from ddpm_jax.runs.programs import Compiler, StepProgram
from ddpm_jax.runs.reports import Reports
from ddpm_jax.runtime import compilation
from ddpm_jax.runtime.distributed import Job
from ddpm_jax.runtime.progress import Progress
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.runtime.watchdog import Watchdog
from ddpm_jax.training.objective import Objective
from ddpm_jax.training.optimizer import decay_start
from ddpm_jax.training.setup import Run, build_run, make_train_step
from ddpm_jax.training.state import TrainState
from ddpm_jax.training.step import Metrics, inputs_of
from ddpm_jax.weights import first_stage, initial
from ddpm_jax.weights.file import settings_of_run
from ddpm_jax.workdir import layout, loggers
from ddpm_jax.workdir.lock import Lock


class Own(NamedTuple):
  """A person's own parts of a run; None: those of the settings.

  Attributes:
    network: is trained, in the place of the U-Net.
    objective: makes what is minimised from the parts of the run.
    source: the images.
  """

  network: TrainableNetwork | None = None
  objective: Callable[[Run], Objective] | None = None
  source: Source | None = None


class Invocation(NamedTuple):
  """How a run was started.

  Attributes:
    stop: receives the signals.
    job: the processes that take part.
    note: a line for the user on settings that were left open, printed once the images are found.
    given: names of the flags of the command, for evaluations: a number or a sampler that it names is not chosen anew.
    clock: seconds since any moment, by which the training is timed.
    own: what takes the place of parts of the settings, from Python.
  """

  stop: StopRequest
  job: Job = Job("single")
  note: str = ""
  given: frozenset[str] = frozenset()
  clock: Callable[[], float] = time.monotonic
  own: Own = Own()


def train(config: Config, workdir: pathlib.Path, invocation: Invocation) -> bool:
  """Trains until `config.train.num_steps` steps are made, or until a signal asks to stop; resumes if it can.

  Args:
    config: the run.
    workdir: its folder.
    invocation: how it was started.

  Returns:
    Whether the run is finished; if not, it was asked to stop.

  Raises:
    UserError: before anything is compiled, if the command does not fit the data, the devices, the workdir or its
      checkpoints.
    RunError: if what must be kept cannot be written.
    NonFiniteError: if the loss or the gradient is not finite, more often than `max_nonfinite` allows.
  """
  job, total = invocation.job, config.train.num_steps
  run, source, stage = prepare(config, workdir, invocation.own, given=invocation.given)
  config = run.config
  autoencoder = stage.latents.network if stage else None
  params, classes = None, class_names(source, config.model.num_classes) if run.conditional else ()
  trained = layout.has_checkpoints(workdir, ["checkpoints"])
  if config.exchange.init_from and not trained:
    params, _ = initial.read_params(config, run.image_shape, classes, autoencoder)

  with contextlib.ExitStack() as cleanup:
    # None in all processes but the first, which is the one that prints.
    lock = workdirs.take(run, workdir, job, cleanup, invocation.note)
    # Entered first, so that it watches while everything below is closed, which waits for what is being saved.
    watchdog = Watchdog(config.train.step_timeout, process=job.process, folder=workdir, leave=job.leave)
    cleanup.enter_context(watchdog)
    kept_step = decay_start(config.optimizer, total)
    options = config.train
    checkpoints = Checkpoints(
      workdir / "checkpoints", keep=options.keep_checkpoints, keep_step=kept_step, keep_every=options.keep_every
    )
    cleanup.enter_context(contextlib.closing(checkpoints))

    if not trained:  # what may be wrong with checkpoints is a line on its own; here it is the images that take long
      workdirs.say_what(run, source, workdir, job)
    all_encoded = functools.cache(functools.partial(_encode_all, run, stage, source, watchdog.beat))
    if stage:
      run = first_stage.settle(run, stage, workdir, source, all_encoded, beat=watchdog.beat)
    run = run.with_perceptual(perceptual.settle(config, workdir, source, run.mesh, watchdog.beat))
    start = resume.find_start(checkpoints, run, source, workdir)
    perceptual.check_kept(start.manifest, run.perceptual, workdir)
    workdirs.set_aside_damaged(checkpoints, start, quiet=not lock)
    if lock and start.step < total and (start.state or start.other_past):  # of a new run `take` has looked
      workdirs.check_space(run, workdir, start.step, leaving=len(start.other_past))
    moved = earlier.set_aside(workdir, checkpoints, start.other_past, start.step) if start.other_past else None
    if not start.state and params is None and config.exchange.init_from:
      if not start.other_past:
        raise RunError(f"workdir: the checkpoints of {workdir} are gone; the same command begins anew")
      params, _ = initial.read_params(config, run.image_shape, classes, autoencoder)
    restarts = resume.restarts(config, start.manifest)
    run = run._replace(lr_restart=restarts[-1] if restarts else 0)

    finished = start.step >= total and not evaluation_missing(config, workdir, start.step)
    if trained:
      workdirs.say_what(run, source, workdir, job)
    workdirs.say_start(run, workdir, start.step, job, finished=finished, moved=moved)
    if finished:
      return True
    if lock:
      workdirs.warn(run, source)
      # What may change has changed. Until there is a checkpoint, a restart must know which weights are the first.
      workdirs.renew(workdir, config_lib.reset_weight_selectors(config) if start.state else config)
      layout.keep_classes(workdir, source.known_classes().names)

    examples, cached = source, all_encoded()
    if cached:
      run, examples = run._replace(moments_shape=cached.moments.shape[1:]), as_source(source, cached)
    place = Place(workdir, checkpoints, lock)
    with open_services(run, source, place, start, watchdog, invocation) as services:
      with services.progress.compiling("the initial state"):
        state = start.state or run.initial_state(params)
      last, stopped = training_loop(run, examples, state, start.step, services)
  if lock:
    workdirs.finish(run, workdir, last)
  return not stopped


def _encode_all(run: Run, stage: FixedStage | None, source: Source, beat: Callable[[str], None]) -> Encoded | None:
  """The moments of all images, where they are latents and fit into memory."""
  return first_stage.encode_all(run, stage, source, beat=beat) if stage else None


def prepare(
  config: Config, workdir: pathlib.Path, own: Own, *, given: Container[str] = ()
) -> tuple[Run, Source, FixedStage | None]:
  """Everything that can be found wrong before a file is written: devices, settings, images, first stage, network.

  Args:
    config: of the run.
    workdir: its folder.
    own: a person's own parts.
    given: names of the flags of the command.

  Returns:
    The parts of the run, its images, and its first stage, whose statistics may be left to measure; None for pixels.

  Raises:
    UserError: see `train`.
  """
  mesh = make_mesh(config.train.parallel, matmul_precision=config.model.matmul_precision)
  fixed = layout.holds_run(workdir)
  mesh.check_batch(config.data.batch_size, config.train.grad_accum_steps, fixed=fixed)
  layout.check(workdir, config)
  loggers.find(config_lib.writer_names(config.train.writers))
  autoencoder = initial.find_first_stage(config, workdir, given="first_stage" in given)
  accept = functools.partial(check_size, config.model, shrinks=autoencoder.network.factor if autoencoder else 1)
  source = own.source or (open_source(config.data) if own.network else open_source(config.data, accept))
  resume.check_size(source, workdir)
  stage = first_stage.fixed_for(autoencoder, source.image_shape, source.name) if autoencoder else None
  if stage:
    accept(*source.image_shape[:2])  # own images were not opened here
  seen = stage.latents.latent_shape if stage else source.image_shape
  config = dataclasses.replace(config, model=fitted(config.model, seen))
  if own.network and config.model.stage == "autoencoder":
    raise UserError("network: your own is a denoiser, which stage=autoencoder does not train; leave one of them out")
  perceptual.check(config, workdir, source.image_shape, given="lpips_weights" in given)
  if config_lib.reads_classes(config):
    found = num_classes(source, config.model.num_classes, stage=config.model.stage, settled=fixed)
    config = config_lib.override(config, {"num_classes": found})
  if config.model.stage == "classifier":
    config = config_lib.override(config, {"sample_every": 0})  # there is nothing to draw
  run = build_run(config, source.image_shape, mesh, own.network, stage)
  run = run._replace(objective=own.objective(run) if own.objective else None)
  parts = {"network": own.network, "objective": run.objective}
  run = run._replace(own={name: layout.describe_own(part) for name, part in parts.items() if part is not None})
  layout.check_own(workdir, run.own or {})
  resume.check_hosts(run, source)
  if config.train.evaluate_every:
    evaluating.check(run, source, workdir)
  return run, source, stage


class TrainServices(NamedTuple):
  """Everything that happens beside the training steps."""

  run_steps: StepProgram
  reports: Reports
  saver: Saver
  evaluations: Evaluations
  preview: Preview | Reconstructions
  early: EarlyGrids
  profile: Profile
  progress: Progress
  stop: StopRequest
  watchdog: Watchdog


class Place(NamedTuple):
  """Where a run is kept. The lock is None in all processes but the first."""

  workdir: pathlib.Path
  checkpoints: Checkpoints
  lock: Lock | None


@contextlib.contextmanager
def open_services(
  run: Run, source: Source, place: Place, start: Start, watchdog: Watchdog, invocation: Invocation
) -> Iterator[TrainServices]:
  """Opens the files of the run and begins to compile its step; closes all of them at the end."""
  (workdir, checkpoints, lock), stop = place, invocation.stop
  options, batch_size, seed = run.config.train, run.config.data.batch_size, run.config.train.seed
  after_init = run._replace(config=config_lib.reset_weight_selectors(run.config))
  with contextlib.ExitStack() as cleanup:
    closed = lambda service: cleanup.enter_context(contextlib.closing(service))  # noqa: E731
    progress = closed(Progress("step", total=options.num_steps, done=start.step, quiet=not lock))
    reports = closed(
      Reports(
        workdir,
        progress,
        options,
        start_step=start.step,
        batch_size=batch_size,
        images=lambda step: images_of(source, step - 1, batch_size=batch_size, seed=seed),
        settings=settings_of_run(run.config),
        so_far=start.manifest.get("so_far", {}),
        clock=invocation.clock,
        alarms=Alarms(run.config.autoencoder.discriminator_start) if run.pair else None,
      )
    )
    saver = Saver(
      checkpoints,
      options,
      resume.facts(run, source, start.manifest),
      start_step=start.step,
      lock=lock,
      flush=reports.flush,
      extra_step=decay_start(run.config.optimizer, options.num_steps),
    )
    traced = config_lib.profiled(options.profile_steps, options.num_steps)
    profile = closed(
      Profile(traced, workdir / "profile", start_step=start.step, say=progress.say, paused=reports.paused)
    )
    compiler = closed(Compiler())
    trains_first = start.step < options.num_steps and not evaluation_missing(run.config, workdir, start.step)
    yield TrainServices(
      StepProgram(run, make_train_step(run), compiler, ahead=trains_first),
      reports,
      saver,
      Evaluations(after_init, source, workdir, reports, stop, watchdog.beat, given=invocation.given),
      _preview(run, source, compiler if trains_first else None),
      EarlyGrids(reports.seconds, wanted=options.sample_every > 0),
      profile,
      progress,
      stop,
      watchdog,
    )


def _preview(run: Run, source: Source, compiler: Compiler | None) -> Preview | Reconstructions:
  """What makes the pictures of `samples/` while the run trains."""
  if run.pair:
    return Reconstructions(run, compiler, source)
  shown = source.known_classes().names or class_names(source, run.config.model.num_classes)
  return Preview(run, compiler, shown)


def training_loop(run: Run, source: Source, state: TrainState, start: int, services: TrainServices) -> tuple[int, bool]:
  """Makes the training steps after `start`.

  source: the images or, as `Run.moments_shape` says, their moments.

  Returns:
    The number of steps in the last checkpoint, and whether a request to stop came before the run was finished.
  """
  mesh, options, step = run.mesh, run.config.train, start
  run_steps, reports, saver, evaluations, preview, early, profile, progress, stop, watchdog = services
  if evaluations.missing(start) and evaluations.make(state, start):
    return start, True
  alone = jax.process_count() == 1
  in_flight = InFlight(options, services)
  run_ahead = calls_ahead(options)
  stopping = False

  with contextlib.closing(_batches_after(start, run, source)) as host_batches:
    for steps in dispatches(options, start, decay_start(run.config.optimizer, options.num_steps)):
      step, first = steps[-1], steps[0] == start + 1
      batch = mesh.put_batches([inputs_of(next(host_batches)) for _ in steps], max_steps=options.steps_per_dispatch)
      command = mesh.put_step_command(len(steps), stop=stop.requested is not None, grid=not alone and early.ask())
      profile.before(steps, state)
      with progress.compiling("the training step") if first else contextlib.nullcontext():
        with (
          jax.profiler.StepTraceAnnotation("train", step_num=step),
          jax.transfer_guard("disallow"),  # nothing moves between host and device unasked
        ):
          state, *outputs = run_steps(state, batch, command)
        if first:
          stop.defer()  # from now on there is something to save
          jax.block_until_ready(outputs)
      profile.after(steps, outputs)
      in_flight.add(steps, *outputs)
      if first:
        reports.compiled(steps)
        compilation.look_for_garbage_as_usual()
      else:
        progress.advance(len(steps))
      # The device is never left without a next step, and a request to stop finds few under way.
      in_flight.drain(run_ahead)
      # Several processes hear of a request when all of them read the same vote; one alone need not wait for that.
      stopping = stop.requested is not None if alone else in_flight.stop_voted
      grid_wanted = early.due(compiling=preview.compiling) if alone else in_flight.grid_voted
      saver.poll(step)

      last = stopping or step == options.num_steps
      save_now = last or saver.due(step) or evaluations.due(step)
      grid_now = not stopping and (grid_wanted or _grid_due(options, step))
      if not (save_now or grid_now):
        continue
      in_flight.drain(0)
      with reports.paused():
        # Drawn beside what a save does before it returns: what it does afterwards is beside the next steps.
        picture = preview(mesh.to_global_array(state)) if grid_now else None
        if save_now:
          saver.save(mesh.to_global_array(state), step, last=last, so_far={"so_far": reports.so_far(step)})
          watchdog.beat(f"checkpoint {step}")
        if picture:
          reports.samples(step, picture(), preview.settings)
          early.drawn()
          in_flight.grid_voted = False
          watchdog.beat(f"the sample grid of step {step}")
        if evaluations.due(step) and not stopping and saver.wait(step):
          stopping = evaluations.make(mesh.to_global_array(state), step)  # stopped: it is made when the run goes on
          last |= stopping
      if last:
        break
    saver.finish(step)
  return step, stopping and (step < options.num_steps or evaluations.due(step))


class InFlight:
  """Calls of the training step that the device has not finished, as far as the host has looked.

  Attributes:
    stop_voted: whether a process has asked to stop; the same on all processes.
    grid_voted: whether a process has asked for a sample grid, likewise.
  """

  def __init__(self, options: TrainConfig, services: TrainServices):
    self._options, self._services = options, services
    self._calls: collections.deque[tuple[range, Metrics, jax.Array]] = collections.deque()
    self.stop_voted = self.grid_voted = False

  def add(self, steps: range, metrics: Metrics, votes: jax.Array) -> None:
    """A call that was dispatched just now."""
    self._calls.append((steps, metrics, votes))

  def drain(self, at_most: int) -> None:
    """Waits until at most that many calls are unfinished; reports the others and counts their votes."""
    services, options = self._services, self._options
    while len(self._calls) > at_most:
      steps, metrics, votes = self._calls.popleft()
      services.reports.check(steps, metrics)
      done = steps[-1]
      if done % options.log_every == 0 or done == options.num_steps or services.evaluations.due(done):
        services.reports.metrics(steps, metrics)
      if jax.process_count() > 1:
        stop, grid = to_host(votes).tolist()
        self.stop_voted |= bool(stop)
        self.grid_voted |= bool(grid)
      services.watchdog.beat(f"step {done}")


def _grid_due(options: TrainConfig, step: int) -> bool:
  """Whether `--sample_every` asks for a sample grid of the state after `step` training steps."""
  return options.sample_every > 0 and (step % options.sample_every == 0 or step == options.num_steps)


def calls_ahead(options: TrainConfig) -> int:
  """Calls that may be under way while the host prepares the next one; one of several steps takes long enough."""
  return 2 if options.steps_per_dispatch == 1 else 1


def dispatches(options: TrainConfig, start: int, extra_step: int | None = None) -> Iterator[range]:
  """The training steps after `start`, in the calls that the device gets them in: at most `steps_per_dispatch` in each.

  A call ends where something is written, and at `extra_step`.
  """
  saved = options.checkpoint_every, options.keep_every, options.evaluate_every
  points = (options.log_every, options.sample_every, *saved)
  step = start
  while step < options.num_steps:
    ends = [step + options.steps_per_dispatch, options.num_steps, *(step + n - step % n for n in points if n)]
    ends += [extra_step] if extra_step is not None and extra_step > step else []
    yield range(step + 1, min(ends) + 1)
    step = min(ends)


def _batches_after(start: int, run: Run, source: Source) -> Generator[Batch, None, None]:
  found = batches(
    source,
    batch_size=run.config.data.batch_size,
    seed=run.config.train.seed,
    start_step=start,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    threads=run.config.data.data_threads,
    workers=run.config.data.data_workers,
    labels=run.conditional,
  )
  return found if run.moments_shape is None else _with_moments(found)


def _with_moments(found: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
  """Batches of `as_source` under the name of what they hold."""
  with contextlib.closing(found):
    for batch in found:
      yield batch | {"moments": batch.pop("image")}
