import json
import sys

import pytest

from benchmarks import command, pytorch, torch_loop
from benchmarks.worker import ROOT
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.runtime import hugepages
from tests.benchmarks import fake

LIKE_OURS = {
  "attention_head_dim": None, "norm_eps": 1e-6, "dropout": 0.0, "downsample_padding": 0, "flip_sin_to_cos": False,
  "freq_shift": 1, "act_fn": "silu", "add_attention": True, "center_input_sample": False, "class_embed_type": None,
  "num_class_embeds": None, "downsample_type": "conv", "upsample_type": "conv", "mid_block_type": "UNetMidBlock2D",
  "mid_block_scale_factor": 1, "resnet_time_scale_shift": "default", "time_embedding_type": "positional",
}  # fmt: skip
# In the order of the levels, A where a block has attention. cifar10 and the 256x256 models as published on the Hugging
# Face hub (google/ddpm-cifar10-32, google/ddpm-celebahq-256); the others give the same number of parameters as ours.
PRESETS = {
  "digits": ((8, 8, 1), 1, [32, 64], " A", 8, {}),
  "fashion_mnist": ((28, 28, 1), 1, [32, 64, 64], "  A", 8, {}),
  "cifar10": ((32, 32, 3), 2, [128, 256, 256, 256], " A  ", 32, {"dropout": 0.1}),
  "celebahq256": ((256, 256, 3), 2, [128, 128, 256, 256, 512, 512], "    A ", 32, {}),
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_unet_of_diffusers(name):
  shape, blocks, channels, attention, groups, more = PRESETS[name]
  _, (setting,) = command.parse(pytorch.make_parser(), [f"--flagfile={ROOT}/experiments/{name}.flags"])
  assert command.image_shape(setting.config, None) == shape
  assert pytorch.unet_options(setting.config.model, shape) == LIKE_OURS | more | {
    "sample_size": shape[0],
    "in_channels": shape[2],
    "out_channels": shape[2],
    "layers_per_block": blocks,
    "block_out_channels": channels,
    "down_block_types": ["AttnDownBlock2D" if level == "A" else "DownBlock2D" for level in attention],
    "up_block_types": ["AttnUpBlock2D" if level == "A" else "UpBlock2D" for level in reversed(attention)],
    "norm_num_groups": groups,
  }


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--remat=blocks"], "remat: the PyTorch loop has none only; leave --remat out"),
    (["--prediction=v"], "prediction: the PyTorch loop has eps only"),
    (["--loss=l1"], "loss: the PyTorch loop has l2 only"),
    (["--variants=eager,fast"], "variants: 'fast' is none of eager,channels_last"),
  ],
)
def test_what_the_other_loop_cannot_do(words, message):
  with pytest.raises(UserError, match=message):
    pytorch.main(words)


def test_without_pytorch_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(UserError, match=r"this Python has no torch; pip install -e '.\[benchmark\]'"):
    torch_loop.prepare({})


def compare(monkeypatch, *words, parameters=10, devices="1 x cpu", failed=False):
  machine = fake.Machine()
  tried = {"eager": {"images_per_second": 40.0}, "compiled": {"failed": "BackendCompilerFailed: no compiler"}}
  theirs = {
    "parameters": parameters, "variant": "eager", "tried": tried, "versions": {"torch": "9.9"}, "device": "cpu"
  }  # fmt: skip
  ours = {"parameters": 10, "devices": devices, "versions": {"jax": "8.8"}}
  made = {
    "PyTorch, default malloc": fake.Worker(theirs, machine.run("D", 50)),
    "PyTorch, tuned malloc": fake.Worker(theirs | {"variant": "compiled"}, machine.run("T", 100)),
    "ddpm_jax": fake.Worker(ours, machine.run("J", 75)),
  }
  monkeypatch.setattr(command, "workers", fake.workers(made))
  pytorch.main(["--rounds=4", *words])
  return machine, made


def test_all_take_turns_and_the_claim_is_against_the_faster_opponent(monkeypatch, capsys, tmp_path):
  machine, made = compare(monkeypatch, f"--json={tmp_path / 'out.json'}", "--variants=eager,compiled")
  assert "".join(name for name, _ in machine.turns[-12:]) == "DTJJTDDTJJTD"
  for name in pytorch.MALLOCS:
    assert made[name].jobs[0]["unet"] == pytorch.unet_options(Config().model, (8, 8, 1))
    assert made[name].jobs[0]["variants"] == ["eager", "compiled"]
  lines = capsys.readouterr().out.splitlines()
  assert lines[-3:-1] == [
    "speed of ddpm_jax over PyTorch, default malloc, eager: 1.50 (1.50 to 1.50)",
    "speed of ddpm_jax over PyTorch, tuned malloc, compiled, the faster opponent: 0.750 (0.750 to 0.750)",
  ]
  assert any("BackendCompilerFailed" in line for line in lines)
  assert "PyTorch 9.9 on cpu, JAX 8.8 on 1 x cpu" in lines[1]
  results = json.loads((tmp_path / "out.json").read_text())["results"]
  assert results["same number of parameters"] is True
  assert results["the faster opponent"] == "PyTorch, tuned malloc"
  assert results["speed of ddpm_jax over"]["PyTorch, tuned malloc"] == [0.75, 0.75, 0.75]


def test_the_tuned_opponent_has_every_tunable_that_the_program_gives_itself(monkeypatch):
  started = {}

  def workers(works, python=None):
    started.update(works)
    raise UserError("that is enough")

  monkeypatch.setattr(command, "workers", workers)
  with pytest.raises(UserError, match="that is enough"):
    pytorch.main([])
  monkeypatch.setattr(hugepages.importlib.metadata, "version", lambda name: "0.12.0")
  ours = {hugepages.HUGE_PAGES: 1, **hugepages._kept()}
  assert len(ours) == 4
  environments = {name: environment for name, (_, environment) in started.items()}
  assert environments == {
    "PyTorch, default malloc": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
    "PyTorch, tuned malloc": {"GLIBC_TUNABLES": ":".join(f"{name}={value}" for name, value in ours.items())},
    "ddpm_jax": {},
  }


def test_networks_that_differ_are_said_to(monkeypatch, capsys):
  compare(monkeypatch, parameters=11)
  assert capsys.readouterr().out.splitlines()[-2].endswith("not the same number of parameters.")


def test_one_device_against_one(monkeypatch):
  with pytest.raises(UserError, match="PyTorch runs on one device, JAX on 8 x cpu"):
    compare(monkeypatch, devices="8 x cpu")
