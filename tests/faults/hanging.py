"""The command, but its process 1 never comes back from reading the eleventh batch: `python -m tests.faults.hanging`."""

import runpy
import time

import jax

from ddpm_jax.runs import train as train_lib

_batches = train_lib.batches


def hanging_batches(*args, **kwargs):
  for number, batch in enumerate(_batches(*args, **kwargs)):
    if number == 10 and jax.process_index() == 1:
      time.sleep(1e6)
    yield batch


if __name__ == "__main__":
  train_lib.batches = hanging_batches
  runpy.run_module("ddpm_jax.main", run_name="__main__")
