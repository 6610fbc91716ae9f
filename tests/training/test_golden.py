"""Training steps of a tiny run have the numbers that they had when golden_step.json was written."""

import json
import pathlib

import jax

from ddpm_jax.training.setup import make_train_step
from tests.training.tiny import random_batch, tiny_config, tiny_run

GOLDEN = pathlib.Path(__file__).with_name("golden_step.json")
ADVICE = """
The numbers of a training step have changed. The same seed no longer gives the same model, and runs that were begun
before this change go on from their checkpoints as another run would.

- If you did not mean that: what draws timesteps, noise, flips or dropout, the network, the loss, the optimiser and the
  moving average is where to look.
- If you meant it: write the new numbers with `python -m tests.training.test_golden`, say why in the commit, and in
  CHANGELOG.md that runs cannot be repeated across this release.
"""


# Of the first step, and of later ones: Adam divides gradients that are almost 0 by themselves, and their rounding too.
TOLERANCES = {"first": 1e-5, "second": 1e-4, "average": 1e-4}


def measured() -> dict[str, dict[str, float]]:
  """Loss and gradient norm of two training steps, and of a third one that begins with the average of the weights."""
  run = tiny_run(tiny_config(prediction="v", loss_weighting="min_snr", learning_rate=0.01, warmup_steps=0))
  step, state, found = jax.jit(make_train_step(run)), run.initial_state(), {}
  for number, name in enumerate(TOLERANCES):
    if name == "average":
      state = state.replace(params=state.ema["ema"])
    batch = jax.device_put(random_batch(seed=number), run.mesh.replicated)
    state, metrics = step(state, batch)
    found[name] = {key: float(metrics[key]) for key in ("loss", "grad_norm")}
  return found


def test_a_training_step_has_the_numbers_that_it_had():
  golden, found = json.loads(GOLDEN.read_text()), measured()
  for name, tolerance in TOLERANCES.items():
    for key, was in golden[name].items():
      value = found[name][key]
      assert abs(value - was) <= tolerance * abs(was), f"{ADVICE}\n{name} {key}: was {was!r}, is {value!r}"


if __name__ == "__main__":
  GOLDEN.write_text(json.dumps(measured(), indent=2) + "\n")
