"""Trains one run after the other for several seeds, in one process: a sweep.

  python experiments/launch/sweep.py --seeds=0,1,2 --workdir=runs/sweep --flagfile=experiments/digits.flags

Run it from the root of the clone; every flag of ddpm_jax.main may be given. Each seed has a workdir of its own,
runs/sweep/seed_0 and so on, and is the run that `python -m ddpm_jax.main --workdir=runs/sweep/seed_0 --seed=0` makes.
The seed is no part of the compiled programs: what the first run compiles the others find in the compilation cache.
(With JAX 0.11 and newer a CPU's programs cannot be kept, unless XLA_FLAGS=--xla_cpu_use_onednn=false is set.)

To sweep something else, such as a learning rate, change `settings`. To stop: SIGTERM or Ctrl-C saves a checkpoint of
the run that trains, and the sweep ends with 75 (or another --stop_exit_code). To resume: the same command; runs that
are finished do nothing. At the end each run has a line.
"""

import json
import pathlib
import statistics
import sys
from collections.abc import Sequence

from absl import flags as absl_flags

from ddpm_jax import flags, main
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import compilation, console

STOPPED = 75  # the exit code of a run that was asked to stop, unless the command names another
LAST = 10  # lines of metrics over whose losses a summary takes the mean


def settings(seeds: Sequence[str]) -> dict[str, list[str]]:
  """Name of each workdir -> its flags, which win over those of the command."""
  return {f"seed_{seed}": [f"--seed={seed}"] for seed in seeds}


def sweep(argv: Sequence[str]) -> int:
  """Trains them all. Returns the exit code of the first run that fails or is stopped; 0 if none is."""
  values = absl_flags.FLAGS
  try:
    words = [argv[0], *flags.expand_flagfiles(argv[1:])]
    values(words)
    folder = flags.workdir()
    if not values.seeds:
      raise UserError("seeds: empty; name some, such as --seeds=0,1,2")
    runs = {
      name: [argv[0], f"--stop_exit_code={STOPPED}", *words[1:], f"--workdir={folder / name}", *own]
      for name, own in settings(values.seeds).items()
    }
    for own in runs.values():  # all of them are looked at before the first trains
      values.unparse_flags()
      values(own)
      if values.stop_exit_code == 0:
        raise UserError(
          "stop_exit_code: 0 is also the exit code of a finished run, after which the next one begins; leave it out "
          f"for {STOPPED}, or use one of 4 to 125"
        )
  except absl_flags.Error as error:
    console.error(flags.one_line(error))
    return 2
  except UserError as error:
    console.error(str(error))
    return 2
  for own in runs.values():
    values.unparse_flags()
    values(own)
    code = main.main(argv[:1])
    if code:
      return code
  for name in runs:
    console.say(f"{name}  {summary(folder / name)}")
  return 0


def summary(workdir: pathlib.Path) -> str:
  """The mean loss over the last lines of the metrics of a run."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()[-LAST:]
  return f"loss {statistics.fmean(json.loads(line)['loss'] for line in lines):.4g}, the mean of {len(lines)} lines"


if __name__ == "__main__":
  console.protect_streams()
  compilation.relax_gc()
  flags.define()
  absl_flags.DEFINE_list("seeds", None, "Seeds of the runs, separated by commas.")
  if {"--help", "-help", "--helpfull", "-h"} & set(sys.argv[1:]):
    console.say(f"{__doc__}\n  --seeds: {absl_flags.FLAGS['seeds'].help}\n\nAll others: python -m ddpm_jax.main --help")
    sys.exit(0)
  console.add_times()
  sys.exit(sweep(sys.argv))
