"""The long form of the fault tests: `python -m tests.faults.storm`, about half an hour on two cores.

Kills and stops the real command at random moments, turns random bits of its checkpoints, fills its disk, and says what
came of it as a table. Exit code 1 if a promise was broken.

  python -m tests.faults.storm --kills=50 --stops=25 --flips=300 --soak=2000 --pairs=2
"""

import argparse
import contextlib
import datetime
import functools
import os
import pathlib
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from ddpm_jax.runtime import terminal
from tests import command
from tests.faults import damage

# Enough training steps that all kills meet a run, in a network that is built in a moment.
STEPS = 4000
FLAGS = [
  f"--num_steps={STEPS}",
  "--checkpoint_every=25",
  "--log_every=10",
  "--sample_every=250",
  "--keep_checkpoints=3",
]

HANGS = 1800  # seconds after which a run that nothing happens to is taken to hang
AUTOENCODER = [
  *("--stage=autoencoder", "--loss=l1", "--channel_multipliers=1,2", "--num_res_blocks=1", "--latent_channels=2")
]
FEWER = 1000  # training steps where fewer kills are meant to meet a run
# What runs in a folder of this name are given beside those.
OF_FOLDER = {
  "autoencoder": [
    *(*AUTOENCODER, f"--num_steps={FEWER}", f"--discriminator_start={FEWER // 2}"),
    *("--regularizer=vq", "--codebook_size=16", "--discriminator_weight=0.5", "--discriminator_layers=1"),
    f"--discriminator_warmup={FEWER // 4}",
  ],
  # Draws for labels, flips, posterior, timestep, noise and dropout.
  "latent": [*(f"--num_steps={FEWER}", "--first_stage={folder}/stage", "--conditioning=class", "--label_dropout=0.2")],
  "classifier": ["--stage=classifier", "--weight_decay=0.05", f"--num_steps={FEWER}"],
}


class Broken(AssertionError):
  """A promise is."""


def expect(fact: bool, *what: object) -> None:
  if not fact:
    raise Broken(" ".join(map(str, what)))


def start(folder: pathlib.Path, name: str, *flags: str, **options) -> subprocess.Popen:
  own = [flag.format(folder=folder) for flag in OF_FOLDER.get(folder.name, ())]
  # Compiled as users have it: these runs are long, and the quick compilation of the tests makes slow steps.
  options = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"} | options
  return command.start(folder, name, *FLAGS, *own, *flags, devices=1, **options)


@functools.cache
def uninterrupted(folder: pathlib.Path) -> tuple[pathlib.Path, float]:
  """The run that nothing happens to; and how long another one takes to its first checkpoint, in seconds."""
  command.finish(start(folder, "whole"), timeout=HANGS)
  began, process = time.monotonic(), start(folder, "again")
  command.wait_for(lambda: command.checkpoints(folder / "again"), process, seconds=HANGS)
  seconds = time.monotonic() - began
  process.kill()
  process.communicate()
  return folder / "whole", seconds


def expect_same(folder: pathlib.Path, workdir: pathlib.Path) -> None:
  """The same state, bit for bit, and the same metrics, each line once."""
  whole, _ = uninterrupted(folder)
  expect(command.digests(workdir) == command.digests(whole), "the final state differs from the uninterrupted run's")
  expect(command.metrics(workdir) == command.metrics(whole), "the metrics differ from the uninterrupted run's")


def kills(folder: pathlib.Path, number: int, generator: random.Random) -> str:
  """SIGKILL at random moments of the real command, which is started again each time."""
  workdir, done, most_left, restarts = folder / "killed", 0, 0, 0
  _, first = uninterrupted(folder)
  longest = 1.5 * first
  while done < number:
    began, process = time.monotonic(), start(folder, "killed")
    wait = generator.uniform(0.05, longest)
    try:
      code = process.wait(timeout=wait)
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      done += 1
    else:
      _, err = process.communicate()
      expect(code == 0, "a start failed with", code, err)
      restarts += 1
      longest = min(longest, time.monotonic() - began)  # where the machine has less other work than it had before
      shutil.rmtree(workdir)  # finished before the kills were over: once more
      continue
    left = list((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")) if workdir.exists() else []
    most_left = max(most_left, len(left))
    print(f"  kill {done} after {wait:.1f} s: checkpoints {command.checkpoints(workdir)[-1:]}", flush=True)
  command.finish(start(folder, "killed"), timeout=HANGS)
  expect_same(folder, workdir)
  expect(most_left <= 1, "temporary folders left behind:", most_left)
  return f"{done} kills, {restarts} whole runs in between; final state and metrics equal; at most {most_left} leftover"


def stops(folder: pathlib.Path, number: int, generator: random.Random) -> str:
  """SIGTERM or SIGINT at random moments, whatever the command is doing."""
  workdir, seconds = folder / "stopped", []
  _, first = uninterrupted(folder)
  while len(seconds) < number:
    process = start(folder, "stopped")
    try:
      process.wait(timeout=generator.uniform(0.3, 1.8 * first))
      command.finish(process)
      shutil.rmtree(workdir)
      continue
    except subprocess.TimeoutExpired:
      began = time.monotonic()
    process.send_signal(generator.choice((signal.SIGTERM, signal.SIGINT)))
    out, err = process.communicate(timeout=60)
    seconds.append(time.monotonic() - began)
    expect(process.returncode == 0, "exit code", process.returncode, out, err)
    print(f"  stop {len(seconds)}: ended after {seconds[-1]:.1f} s, {out.strip().splitlines()[-1:]}", flush=True)
  command.finish(start(folder, "stopped"), timeout=HANGS)
  expect_same(folder, workdir)
  return f"{number} stops, all exit code 0; slowest {max(seconds):.1f} s; final state and metrics equal"


def tiny_judge(folder: pathlib.Path) -> damage.Judge:
  directory, run = folder / "damaged" / "checkpoints", damage.SmallRun()
  if not directory.exists():
    damage.two_checkpoints(directory, run)
  return damage.Judge(directory, run)


def flips(folder: pathlib.Path, number: int, generator: random.Random) -> str:
  """Single bits of a checkpoint's files turned, each byte as likely as any other."""
  judge = tiny_judge(folder)
  for _ in range(number):
    path, before = damage.random_flip(generator, judge.directory / str(judge.newer))
    verdict = judge.judge()
    damage.put_back(path, before)
    expect(verdict in ("fell back", "unharmed"), path, verdict)
  return f"{number} flips: {dict(judge.verdicts)}; none silent"


def autoencoder_kills(folder: pathlib.Path, number: int, generator: random.Random) -> str:
  """SIGKILL at random moments of a run that trains an autoencoder, the last half of it with its discriminator."""
  (folder / "autoencoder").mkdir()
  return kills(folder / "autoencoder", number, generator)


def latent_kills(folder: pathlib.Path, number: int, generator: random.Random) -> str:
  """SIGKILL at random moments of a run of latents, by class, also while its images are encoded at its first start."""
  folder = folder / "latent"
  folder.mkdir()
  command.run(folder, "stage", *AUTOENCODER, "--num_steps=20", devices=1)
  uninterrupted(folder)
  shutil.rmtree(pathlib.Path(os.environ["XDG_CACHE_HOME"], "ddpm_jax", "latents"))
  return kills(folder, number, generator)


def classifier_kills(folder: pathlib.Path, number: int, generator: random.Random) -> str:
  """SIGKILL at random moments of a run that trains a classifier of noisy images."""
  (folder / "classifier").mkdir()
  return kills(folder / "classifier", number, generator)


def strikes(folder: pathlib.Path, *_) -> str:
  """Every file of the newest checkpoint deleted, halved, emptied, zeroed."""
  judge = tiny_judge(folder)
  for name, path, before in damage.strikes(judge.directory / str(judge.newer)):
    verdict = judge.judge()
    damage.put_back(path, before)
    expect(verdict in ("fell back", "unharmed"), path, name, verdict)
  return f"{sum(judge.verdicts.values())} cases: {dict(judge.verdicts)}; none silent"


def full_disk(folder: pathlib.Path, *_) -> str:
  """A file system of 24 MB that fills up, where this machine lets us mount one; else files that may not grow."""
  small = folder / "small"
  small.mkdir()
  mounted = not subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", small], capture_output=True
  ).returncode
  process = start(small, "full", "--max_unsaved_steps=40")
  try:
    command.wait_for(lambda: command.checkpoints(small / "full")[-1:] >= [25], process)
    if mounted:
      with contextlib.suppress(OSError), (small / "ballast").open("wb", buffering=0) as ballast:
        while ballast.write(bytes(4096)) == 4096:
          pass
    else:
      resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    out, err = process.communicate(timeout=300)
    expect(process.returncode == 1 and "Traceback" not in err, process.returncode, out, err)
    expect(err.strip().splitlines()[-1].startswith("error: "), err)
    before = command.checkpoints(small / "full")
    (small / "ballast").unlink(missing_ok=True)
    command.finish(start(small, "full"), timeout=HANGS)
    expect_same(folder, small / "full")
  finally:
    process.kill()
    process.wait()
    if mounted:
      subprocess.run(["umount", small], check=True)
  return (
    f"{'tmpfs of 24 MB' if mounted else 'RLIMIT_FSIZE'}: exit 1, one line, {before} intact; resumed to the same state"
  )


def long_run(folder: pathlib.Path, number: int, *_) -> str:
  """Memory, threads and open files."""
  from tests.faults.soak import growth, soak

  more = growth(soak(folder, number))
  expect(more.megabytes < 30 and more.threads <= 2 and more.files <= 4, more)
  return f"{number} steps: {more.megabytes:+.1f} MB, {more.threads:+d} threads, {more.files:+d} files in the last third"


def pairs(folder: pathlib.Path, number: int, generator: random.Random) -> str:
  """Two processes over gloo: one is told to stop, killed, or stuck; then a pair goes on to the end."""
  from tests.faults.pair import lost, stopped, stuck

  times: dict[str, list[float]] = {}
  for i in range(number):
    for name, attack in (
      ("SIGTERM", lambda where: stopped(where, generator.randrange(2))),
      ("worker killed", lambda where: lost(where, 1)),
      ("coordinator killed", lambda where: lost(where, 0)),
      ("one stuck", stuck),
    ):
      where = folder / f"pair{i}{name.replace(' ', '')}"
      where.mkdir()
      times.setdefault(name, []).append(attack(where))
      print(f"  {name}: {times[name][-1]:.1f} s", flush=True)
  return "; ".join(f"{name}: all ended within {max(seconds):.1f} s" for name, seconds in times.items())


ATTACKS: dict[str, tuple[Callable, int]] = {
  "kills": (kills, 50),
  "autoencoder_kills": (autoencoder_kills, 20),
  "latent_kills": (latent_kills, 20),
  "classifier_kills": (classifier_kills, 5),
  "stops": (stops, 25),
  "flips": (flips, 300),
  "strikes": (strikes, 1),
  "full_disk": (full_disk, 1),
  "soak": (long_run, 2000),
  "pairs": (pairs, 2),
}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, (_, default) in ATTACKS.items():
    parser.add_argument(f"--{name}", type=int, default=default, help=f"how many (default {default}; 0: leave out)")
  parser.add_argument("--seed", type=int, default=0)
  options = vars(parser.parse_args())
  terminal.quiet()
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(command.ROOT / ".cache" / "xla"))
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
  rows, broken = [], 0
  with tempfile.TemporaryDirectory() as folder:
    os.environ["XDG_CACHE_HOME"] = str(pathlib.Path(folder, "home"))
    for name, (attack, _) in ATTACKS.items():
      if not options[name]:
        continue
      print(f"{name}: {attack.__doc__}", flush=True)
      began = time.monotonic()
      try:
        result = attack(pathlib.Path(folder), options[name], random.Random(options["seed"]))
      except AssertionError as error:
        result, broken = f"BROKEN: {error}", broken + 1
      rows.append(f"| {name} | {result} | {time.monotonic() - began:.0f} s |")
      print(f"  {result}", flush=True)
  print(
    f"\n{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n"
  )
  print("\n".join(["| attack | what came of it | time |", "|---|---|---|", *rows]))
  return 1 if broken else 0


if __name__ == "__main__":
  sys.exit(main())
