import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import step_work, train_step
from benchmarks.alternate import Block
from benchmarks.worker import ROOT
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from tests.training.tiny import IMAGE_SHAPE, tiny_config

TINY = ["--channels=8", "--channel_multipliers=1", "--attention_resolutions=", "--batch_size=8"]


def job(config, **more):
  return {"config": config_lib.to_json(config), "image_shape": list(IMAGE_SHAPE), **more}


@pytest.fixture
def no_peak(monkeypatch):
  monkeypatch.setattr(step_work.hardware, "measured_peak", lambda dtype: (1e9, f"measured {dtype}"))


def test_the_step_is_made_as_often_as_asked(no_peak):
  facts, block = step_work.prepare(job(tiny_config(channel_multipliers=(1,), attention_resolutions=())))
  assert facts["parameters"] > 5_000
  assert facts["devices"] == "8 x cpu"
  assert facts["peak_flops"] == 1e9  # eight simulated devices have the cores of one
  assert facts["peak_source"] == "measured float32"
  assert min(facts["lower_seconds"], facts["compile_seconds"]) > 0
  assert facts["plan_bytes"] > 4 * 4 * facts["parameters"]  # weights, their average, and Adam's two moments
  measured = block("", 3)
  assert measured["images"] == 3 * 16
  assert len(measured["steps"]) == 3
  assert measured["cpu_seconds"] > 0
  assert sum(measured["steps"]) == pytest.approx(measured["seconds"])
  assert measured["process_bytes"] > 100 << 20


def test_several_updates_in_a_call_are_counted_one_by_one(no_peak):
  config = tiny_config(channels=4, channel_multipliers=(1,), attention_resolutions=(), steps_per_dispatch=3)
  _, block = step_work.prepare(job(config))
  measured = block("", 4)  # two calls
  assert measured["images"] == 4 * 16
  assert len(measured["steps"]) == 4
  assert sum(measured["steps"]) == pytest.approx(measured["seconds"])


def test_batches_may_be_those_of_the_run(monkeypatch, no_peak):
  from ddpm_jax.data.encoded import DecodedRows
  from ddpm_jax.data.sources import Source

  seen = []

  def read(indices):
    seen.extend(indices)
    return DecodedRows(np.zeros((len(indices), *IMAGE_SHAPE), np.uint8), np.zeros(len(indices), bool))

  monkeypatch.setattr(step_work, "open_source", lambda *_: Source("x", IMAGE_SHAPE, 40, read))
  first = step_work._first_batches(tiny_config())
  assert len(first) == 8
  assert set(seen) == set(range(40))
  assert first[0]["image"].shape == (16, *IMAGE_SHAPE)


def test_flops_are_those_of_the_model_and_not_of_how_it_is_run():
  batch = step_work._random_batches(tiny_config(batch_size=16), IMAGE_SHAPE)[0]
  plain = step_work.model_flops(tiny_config(), IMAGE_SHAPE, batch)
  for changes in ({"remat": "blocks"}, {"grad_accum_steps": 2}, {"parallel": "fsdp"}):
    assert step_work.model_flops(tiny_config(**changes), IMAGE_SHAPE, batch) == plain
  twice = step_work._random_batches(tiny_config(batch_size=32), IMAGE_SHAPE)[0]
  assert step_work.model_flops(tiny_config(batch_size=32), IMAGE_SHAPE, twice) == pytest.approx(2 * plain, rel=0.05)


def test_flops_of_convolutions_by_hand():
  """Without levels nearly all is 3x3 convolutions: 2 * 9 * c_in * c_out for a pixel, once forwards and twice back."""
  config = tiny_config(channels=64, channel_multipliers=(1,), attention_resolutions=(), dropout=0.0, batch_size=4)
  flops = step_work.model_flops(
    config, IMAGE_SHAPE, step_work._random_batches(tiny_config(batch_size=4), IMAGE_SHAPE)[0]
  )
  c, first_and_last = 64, 2 * 64
  blocks = 2 * c * c  # two convolutions in the block down and in two in the middle, and of the two up the second
  convolutions = 3 * blocks + 2 * (2 * c * c + c * c) + first_and_last
  of_edges = (3 * 8 - 2) ** 2 / (3 * 8) ** 2  # XLA leaves out what falls on the padding
  expected = 4 * 64 * 3 * 2 * 9 * convolutions * of_edges
  assert expected < flops < 1.25 * expected


def test_a_batch_that_the_devices_cannot_share_is_refused():
  with pytest.raises(UserError, match="batch_size: 12 cannot be divided among 8 devices"):
    step_work.prepare(job(tiny_config(batch_size=12)))


def test_peak_memory_of_a_device_that_tells(monkeypatch):
  class Device:
    def memory_stats(self):
      return {"peak_bytes_in_use": 5, "bytes_in_use": 3}

  monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
  assert step_work.memory_used()["device_bytes"] == 5


def fact(flops, peak, source="measured"):
  return {
    "flops": flops,
    "peak_flops": peak,
    "peak_source": source,
    "devices": "1 x x",
    "lower_seconds": 1.0,
    "compile_seconds": 2.5,
    "plan_bytes": 3 << 20,
    "parameters": 1234,
  }


def measured(seconds, **more):
  return {
    "seconds": seconds,
    "cpu_seconds": 0.5,
    "images": 20,
    "steps": [seconds / 2] * 2,
    "process_bytes": 7 << 20,
    **more,
  }


def test_summary():
  facts = {"A": fact(100.0, 1000.0), "B": fact(100.0, 2000.0)}
  blocks = [
    *(Block(0, "A", 2, measured(2.0)), Block(0, "B", 2, measured(1.0, device_bytes=9))),
    *(Block(1, "B", 2, measured(2.0, device_bytes=9)), Block(1, "A", 2, measured(4.0))),
  ]
  results = train_step.summary(facts, blocks)
  assert results["A"]["images_per_second"].median == 7.5  # 10 and 5
  assert results["A"]["cpu_seconds_of_an_image"].median == 0.025
  assert results["A"]["step_seconds"].median == 1.5  # 1, 1, 2, 2
  assert results["A"]["achieved_flops"] == 75.0  # 10 images are 100 FLOPs
  assert results["A"]["utilisation"] == 75.0 / 2000  # the peak is at least what was measured once
  assert (results["A"]["device_bytes"], results["B"]["device_bytes"]) == (None, 9)
  assert results["speed of B over A"].median == 2
  facts["B"]["peak_source"] = "published"
  assert train_step.summary(facts, blocks)["A"]["peak_flops"] == 1000


def test_one_setting_has_no_ratio():
  blocks = [Block(0, "A", 2, measured(2.0))]
  assert list(train_step.summary({"A": fact(1.0, 1.0)}, blocks)) == ["A"]


def test_a_person_compares_two_settings(tmp_path):
  words = [sys.executable, "-m", "benchmarks.train_step", *TINY, "--rounds=2", "--block_seconds=0.1"]
  words += ["--a_env=XLA_FLAGS=--xla_force_host_platform_device_count=2", f"--json={tmp_path / 'out.json'}"]
  words += ["--b=--random_flip", "--b_env=XLA_FLAGS=--xla_force_host_platform_device_count=1"]
  variables = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true"}  # as the other tests, not as a measurement
  done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300, env=variables)
  assert done.returncode == 0, done.stderr
  content = json.loads((tmp_path / "out.json").read_text())
  assert content["benchmark"] == "train_step"
  assert [turn["setting"] for turn in content["measurements"]] == ["A", "B", "B", "A"]
  assert {name: fact["devices"] for name, fact in content["facts"].items()} == {"A": "2 x cpu", "B": "1 x cpu"}
  assert content["facts"]["A"]["versions"]["jax"] == jax.__version__
  assert content["settings"]["B"]["flags"][-1] == "--random_flip"
  assert content["settings"]["B"]["image_shape"] == [8, 8, 1]
  assert content["results"]["A"]["images_per_second"][1] > 0
  lines = done.stdout.splitlines()
  assert max(map(len, lines)) <= 110
  assert lines[0].startswith("A: XLA_FLAGS=")
  assert lines[-2].startswith("speed of B over A: ")
  for label in ("images/s", "step, ms", "lower + compile, s", "utilisation, %"):
    assert any(line.startswith(label) for line in lines)


def test_the_default_run_is_what_is_measured_without_flags():
  assert train_step.command.parse(train_step.make_parser(), [])[1][0].config == Config()
