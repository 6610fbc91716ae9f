import json

import pytest

from benchmarks import command, draw_work, sample
from ddpm_jax import config as config_lib
from ddpm_jax.errors import UserError
from tests.benchmarks import fake
from tests.training.tiny import IMAGE_SHAPE, tiny_config


def test_each_sampler_is_compiled_once_and_draws(monkeypatch):
  monkeypatch.setattr(draw_work, "device_facts", lambda config: {"devices": "8 x cpu"})
  config = tiny_config(channel_multipliers=(1,), attention_resolutions=())
  job = {"config": config_lib.to_json(config), "image_shape": list(IMAGE_SHAPE), "batch_size": 8}
  facts, block = draw_work.prepare(job | {"cases": ["ddim:4", "heun:4"]})
  assert {case: about["evaluations"] for case, about in facts["samplers"].items()} == {"ddim:4": 4, "heun:4": 3}
  assert all(about["compile_seconds"] > 0 and about["plan_bytes"] > 0 for about in facts["samplers"].values())
  measured = block("heun:4", 2)
  assert measured["images"] == 16
  assert measured["seconds"] > 0


@pytest.mark.parametrize(
  ("samplers", "message"),
  [
    ("ddpm", "samplers: 'ddpm' is no SAMPLER:EVALUATIONS"),
    ("ddpm:x", "samplers: 'ddpm:x' is no SAMPLER:EVALUATIONS"),
    ("euler:10", "sampler"),
    ("ddpm:1001", "sampling_steps: 1001 must not exceed num_timesteps=1000"),
  ],
)
def test_wrong_samplers(samplers, message):
  _, settings = command.parse(sample.make_parser(), [])
  with pytest.raises(UserError, match=message):
    sample.parse_samplers(samplers, settings)


def test_settings_take_turns_with_each_sampler(monkeypatch, capsys, tmp_path):
  def facts(seconds):
    about = {"compile_seconds": seconds, "evaluations": 9, "plan_bytes": 1}
    return {"batch_size": 4, "devices": "1 x x", "samplers": {"ddpm:10": about, "heun:10": about}}

  machine = fake.Machine()
  made = {"A": fake.Worker(facts(1.0), machine.run("A", 50, 4)), "B": fake.Worker(facts(2.0), machine.run("B", 75, 4))}
  monkeypatch.setattr(command, "workers", fake.workers(made))
  words = ["--samplers=ddpm:10,heun:10", "--rounds=2", "--b=--dtype=bfloat16", "--sample_batch_size=4"]
  sample.main([*words, f"--json={tmp_path / 'out.json'}"])
  assert made["A"].jobs[0]["cases"] == ["ddpm:10", "heun:10"]
  assert made["A"].jobs[0]["batch_size"] == 4
  assert "".join(name for name, _ in machine.turns[-8:]) == "ABABBABA"
  lines = capsys.readouterr().out.splitlines()
  rows = [" ".join(line.split()) for line in lines[-5:-1]]
  assert rows[0] == "A: ddpm 9 1.00 50.0 (50.0 to 50.0)"
  assert rows[3] == "B: heun 9 2.00 75.0 (75.0 to 75.0) 1.50 (1.50 to 1.50)"
  assert max(map(len, lines)) <= 110
  content = json.loads((tmp_path / "out.json").read_text())
  assert len(content["measurements"]) == 8
  assert content["results"]["heun:10"]["speed of B over A"] == [1.5, 1.5, 1.5]
