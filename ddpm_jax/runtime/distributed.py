"""Joins the processes of a job, if there is a job, and says which process is lost when one is.

JAX's coordination service, in process 0, joins the processes and holds a small store of keys. When a process dies, JAX
aborts the others in C++, after a heartbeat timeout or at once, in words that name no host. So each process writes a new
number to the store every second, under its name; process 0 reads them all. Whoever is silent for too long is named, on
every process, and all end. JAX's own timeout is longer: it ends the processes where this fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import operator
import os
import pathlib
import re
import signal
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax

from ddpm_jax.errors import RunError, UserError
from ddpm_jax.runtime import console, watchdog

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # JAX reads them
_GKE_TPU = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_PROCESS_ADDRESSES_PATH")  # JAX reads them
# Where one of these is set there is a cluster, so that a job may have been meant, also where none is found.
_OF_CLUSTERS = ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE", "KUBERNETES_SERVICE_HOST", *_GKE_TPU)
_FOUND_BY = {
  "explicit": "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are set",
  "slurm": "a Slurm step of several tasks",
  "openmpi": "started by Open MPI's mpirun",
  "kubernetes": "a pod of an indexed Kubernetes job",
  "tpu": "a Cloud TPU VM, or a TPU pod of GKE, with libtpu",
}
_BEAT_S = 1.0  # from one sign of life to the next
_MUTE_S = 2.5  # process 0 does not answer: see whether it is there at all
_LINGER_S = 2.0  # how long process 0 stays for the others to read what it has found
_GRACE_S = 3.0  # processes that fail at the same time, for the same reason, end with their own exit codes
_PREFIX = "ddpm_jax/"
# Of an error of JAX: it may come from a lost process, rather than from this one. Gloo's is a ValueError, others are
# jax.errors.JaxRuntimeError.
_SIGNS_OF_LOSS = re.compile(
  "gloo|nccl|collective|all-?reduce|connection|socket|coordination|barrier|heartbeat|unavailable|deadline", re.I
)


def detect(environment: Mapping[str, str]) -> str:
  """Which kind of job the environment describes: 'explicit', 'slurm', 'openmpi', 'kubernetes', 'tpu' or 'single'.

  Only marks that every process of a job has, and a shell inside an allocation has not, count: `SLURM_NTASKS` alone, for
  example, is also set where nobody started the other tasks.

  Raises:
    UserError: if the variables of a job are set in part.
  """
  present = [name for name in _EXPLICIT if environment.get(name)]
  if present and len(present) < len(_EXPLICIT):
    missing = ", ".join(name for name in _EXPLICIT if name not in present)
    raise UserError(f"distributed: {', '.join(present)} set without {missing}; set all three, or --distributed=off")
  if present:
    return "explicit"
  if _count(environment, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environment:
    missing = ", ".join(name for name in _SLURM if not environment.get(name))
    if missing:
      raise UserError(
        f"distributed: a Slurm step of {environment['SLURM_STEP_NUM_TASKS']} tasks, but {missing} not set; start the "
        "tasks with srun and its environment, or train alone with --distributed=off"
      )
    return "slurm"
  if _count(environment, "OMPI_COMM_WORLD_SIZE") > 1:
    return "openmpi"
  on_tpu = _has_tpu()
  if on_tpu and any(environment.get(name) for name in _GKE_TPU):
    return "tpu"  # also in a pod of an indexed job: the environment names the hosts, so JAX need not ask Kubernetes
  if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
    return "kubernetes"
  return "tpu" if on_tpu else "single"


def _has_tpu() -> bool:
  devices = pathlib.Path("/dev")
  chips = any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))
  return chips and importlib.util.find_spec("libtpu") is not None


def _count(environment: Mapping[str, str], name: str) -> int:
  text = environment.get(name) or "1"
  if not text.isdecimal():
    raise UserError(f"distributed: {name} is {text!r}, not a number of processes; mend it, or --distributed=off")
  return int(text)


@dataclasses.dataclass(frozen=True)
class Job:
  """The processes that train together; one process alone is a job too."""

  kind: str  # what `detect` found, or 'off'
  processes: int = 1
  process: int = 0  # the number of this one
  text: str = "1 process"  # what was found and how to override it, for the line that a run starts with
  _peers: _Peers | None = None

  def wait_for_verdict(self, error: BaseException) -> None:
    """Call it with what a collective raised. Ends this process, with a line, if that was since a process is lost.

    Returns at once if the error is not of that sort, else when nobody was found missing for the heartbeat timeout.
    """
    if self._peers and isinstance(error, (ValueError, RuntimeError)) and _SIGNS_OF_LOSS.search(str(error)):
      self._peers.wait_for_verdict(error)

  def leave(self, code: int) -> None:
    """The last thing that a process of a job does. Does nothing in a job of one process.

    With code 0 it waits for the others to come here too, then returns, and the interpreter may end. With any other it
    does not return: the others are informed, and the process ends without JAX's own farewell, which would hang.
    """
    if self._peers:
      self._peers.leave(code)


def initialize(mode: str, heartbeat_timeout: int = 100, *, join_timeout: int = 300) -> Job:
  """Joins the job, before any device is touched.

  Args:
    mode: 'auto' or 'off'.
    heartbeat_timeout: seconds after which a silent process counts as lost.
    join_timeout: seconds within which all processes must have come.

  Raises:
    UserError: if there is a job but it cannot be joined.
    RunError: if this version of JAX hides the store of keys.
  """
  if mode == "off":
    return Job("off", text="1 process (--distributed=off)")
  found = detect(os.environ)
  if found == "single":
    return Job(found, text=_alone(os.environ))
  too_late = threading.Timer(join_timeout, _not_joined, [found, join_timeout])
  too_late.daemon = True
  try:
    if found == "kubernetes" and not importlib.util.find_spec("kubernetes"):
      raise ValueError("JAX asks the cluster with the package kubernetes, which is not installed")
    explicit = _explicit_job(os.environ) if found == "explicit" else {}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is for stop.py
    too_late.start()  # JAX's own limit aborts the process without a word of ours
    jax.distributed.initialize(
      **explicit,
      initialization_timeout=join_timeout + 30,
      heartbeat_timeout_seconds=2 * heartbeat_timeout + 10,  # JAX sends every half of it
    )
  except (ValueError, RuntimeError, KeyError, OSError) as error:
    raise UserError(
      f"distributed: could not join the {found} job that was found ({_first_line(error)}); mend it, or train alone "
      "with --distributed=off"
    ) from error
  finally:
    too_late.cancel()
  state = _jax_state()
  number = f"{state.num_processes} process{'es' * (state.num_processes > 1)}, this is {state.process_id}"
  text = f"{number} ({found}: {_FOUND_BY[found]}); --distributed=off trains alone"
  peers = _Peers(state, heartbeat_timeout) if state.num_processes > 1 else None
  return Job(found, state.num_processes, state.process_id, text, peers)


def _alone(environment: Mapping[str, str]) -> str:
  """The line of a process that found no job: on a cluster with how to describe one."""
  marks = [name for name in _OF_CLUSTERS if environment.get(name)]
  if not marks:
    return "1 process, on this machine alone"
  described = f"{', '.join(_EXPLICIT[:-1])} and {_EXPLICIT[-1]}"
  return f"1 process: no job of several was found, although {', '.join(marks)} is set; {described} would describe one"


def _jax_state() -> Any:
  # The one private thing of JAX: there is no public way to the store of keys.
  try:
    from jax._src.distributed import global_state

    for name in ("client.key_value_set", "client.key_value_dir_get", "client.wait_at_barrier", "coordinator_address"):
      operator.attrgetter(name)(global_state)
  except (ImportError, AttributeError) as error:
    raise RunError(
      f"distributed: JAX {jax.__version__} has moved what the processes find each other by ({error}); use a version "
      "of requirements.lock, or train alone with --distributed=off"
    ) from error
  return global_state


def _explicit_job(environment: Mapping[str, str]) -> dict[str, Any]:
  """The arguments of jax.distributed.initialize. In process 0 the port must be free.

  JAX would not notice: two coordinators may share a port, and the second job ends the first one.
  """
  address = environment["JAX_COORDINATOR_ADDRESS"]
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise ValueError(f"JAX_COORDINATOR_ADDRESS is {address!r}, not HOST:PORT")
  job: dict[str, Any] = {
    "coordinator_address": address,
    "num_processes": int(environment["JAX_NUM_PROCESSES"]),
    "process_id": int(environment["JAX_PROCESS_ID"]),
  }
  if job["process_id"] == 0:
    try:
      with socket.socket(socket.AF_INET6 if host.startswith("[") else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # only a listener counts
        probe.bind(("", int(port)))
    except OSError as error:
      raise ValueError(f"port {port} of process 0 is not free: {error.strerror}") from error
    # Whoever reaches the port may end the job: a job on one machine is closed to others. Elsewhere JAX listens on all
    # interfaces, or on JAX_COORDINATOR_BIND_ADDRESS: to itself, a host's name often is 127.0.0.1.
    if host in ("127.0.0.1", "localhost", "[::1]") and not environment.get("JAX_COORDINATOR_BIND_ADDRESS"):
      job["coordinator_bind_address"] = address
  return job


def _not_joined(found: str, seconds: float) -> None:
  console.error(
    f"distributed: not all processes of the {found} job have come within {seconds} s; start all of them, with "
    "the same address, or train alone with --distributed=off"
  )
  console.drain()
  os._exit(2)


class _Peers:
  """Tells the other processes that this one lives, and ends this one with a line when another is lost."""

  def __init__(self, state: Any, timeout: float):
    self._client, self._address = state.client, state.coordinator_address
    self._process, self._processes = state.process_id, state.num_processes
    self._timeout = timeout
    self._put("who", f"host {socket.gethostname()}, pid {os.getpid()}")
    self._client.wait_at_barrier(_PREFIX + "joined", 300_000)
    self._who = self._get("who")
    self._stamps: dict[int, str] = {}  # of each process, the newest one
    self._heard = time.monotonic()
    self._seen = dict.fromkeys(range(1, self._processes) if self._process == 0 else [0], self._heard)
    self._over, self._verdict = threading.Event(), threading.Lock()
    self._ended = ""  # how this process ends, if it fails
    # JAX aborts when it loses process 0: the thread that does so sleeps for 6 seconds (the number of SIGABRT), in C, as
    # it may be any thread, and in any state. _judge speaks and ends the process in the meantime.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    self._set_abort = lambda handler: libc.signal(int(signal.SIGABRT), handler)
    self._old_abort = self._set_abort(ctypes.cast(libc.sleep, ctypes.c_void_p))
    self._threads = [threading.Thread(target=f, name=f.__name__, daemon=True) for f in (self._talk, self._judge)]
    for thread in self._threads:
      thread.start()

  def _put(self, what: str, value: str) -> None:
    self._client.key_value_set(f"{_PREFIX}{what}/{self._process}", value, allow_overwrite=True)

  def _get(self, what: str) -> dict[int, str]:
    found = self._client.key_value_dir_get(f"{_PREFIX}{what}/")
    return {int(key.rpartition("/")[2]): value for key, value in found}

  def _talk(self) -> None:
    beat = 0
    while not self._over.wait(_BEAT_S):
      beat += 1
      try:
        self._put("alive", self._ended or str(beat))
        stamps = self._get("alive") if self._process == 0 else {0: str(beat)}
        lost = self._get("lost") if self._process else {}
      except jax.errors.JaxRuntimeError:
        continue  # no answer: _judge counts the seconds
      self._heard = time.monotonic()
      for process in self._seen:
        if process in stamps and stamps[process] != self._stamps.get(process):
          self._stamps[process], self._seen[process] = stamps[process], self._heard
      if 0 in lost:
        self._end(lost[0])

  def _judge(self) -> None:
    before = time.monotonic()
    while not self._over.wait(_BEAT_S / 2):
      now = time.monotonic()
      if now - before > 5 * _BEAT_S:  # it was this process that slept
        self._seen.update(dict.fromkeys(self._seen, now))
      before = now
      for process, seen in self._seen.items():
        # Process 0 may only judge what it has read.
        silent, stamp = (now if self._process else self._heard) - seen, self._stamps.get(process, "")
        if stamp.startswith("ended") and silent > _GRACE_S:
          self._end(self._line(process, stamp))
        elif process == 0 != self._process and silent > _MUTE_S and self._is_closed():
          self._end(self._line(0, "its port is closed"))
        elif silent > self._timeout:
          self._end(self._line(process, f"silent for {silent:.0f} s"))

  def _is_closed(self) -> bool:
    host, _, port = self._address.rpartition(":")
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except OSError as error:
      return isinstance(error, ConnectionError)  # others, such as a lost route, may pass
    return False

  def _line(self, process: int, what: str) -> str:
    return (
      f"process {process} of {self._processes} is lost ({self._who.get(process, 'unknown host')}): {what}; every "
      "process ends, and the same command on all of them goes on from the last checkpoint"
    )

  def _end(self, line: str) -> None:
    with self._verdict:  # never given back
      if not self._ended:
        watchdog.exit_within(_LINGER_S + 2, 1)  # whatever stderr or the store does
        console.error(line)
        self._publish(line)
      while self._ended:  # this process ends already, with a code of its own
        time.sleep(60)
      console.drain()
      os._exit(1)

  def _publish(self, line: str) -> None:
    if self._process == 0:  # if it went now, the others would say that process 0 is lost
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        self._put("lost", line)
        time.sleep(_LINGER_S)

  def wait_for_verdict(self, error: BaseException) -> None:
    limit = self._timeout + 3 * _BEAT_S
    reason = _first_line(error)
    console.note(f"process {self._process}: {reason}; waiting up to {limit:.0f} s to learn which process is lost")
    time.sleep(limit)
    with self._verdict:  # which whoever has found one never gives back
      return

  def leave(self, code: int) -> None:
    if code:
      self._fail(code)
    try:
      self._client.wait_at_barrier(_PREFIX + "done", 24 * 3600 * 1000)  # a day, in ms
    except jax.errors.JaxRuntimeError as error:
      self.wait_for_verdict(error)
      self._fail(1)
    self._over.set()
    for thread in self._threads:
      thread.join(timeout=5)
    self._set_abort(self._old_abort)

  def _fail(self, code: int) -> None:
    self._ended = f"ended with exit code {code}"
    watchdog.exit_within(_GRACE_S + _LINGER_S + 1, code)  # process 0 may answer no more
    console.drain()
    try:
      self._put("alive", self._ended)
      self._client.wait_at_barrier(_PREFIX + "failed", int(_GRACE_S * 1000))
    except jax.errors.JaxRuntimeError:
      self._publish(self._line(self._process, self._ended))
    os._exit(code)


def _first_line(error: BaseException) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]
