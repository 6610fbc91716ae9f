"""A plan from its flags to its last line."""

import importlib.util
import re
import time
import types

import jax
import numpy as np
import pytest

from ddpm_jax.config import AutoencoderConfig, ModelConfig
from ddpm_jax.data import sources
from ddpm_jax.errors import UserError
from ddpm_jax.models.build import build_autoencoder, num_params
from ddpm_jax.plan.compiling import CompiledStep, Memory
from ddpm_jax.plan.hardware import Peaks
from ddpm_jax.plan.topology import OutOfMemory, Topology
from ddpm_jax.runs import plan as plan_run
from ddpm_jax.weights import stage_folder
from ddpm_jax.workdir import layout
from tests.training.tiny import tiny_config


@pytest.fixture
def here(tmp_path, monkeypatch):
  """An empty folder, the current one and that of the data."""
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture
def compiled(monkeypatch):
  """Takes the place of compiler and hardware: 1000 bytes beside 10 for each image; the sizes it was given."""
  sizes = []

  def compile_step(_, size):
    sizes.append(size)
    needed = 1000 + 10 * size
    if needed > 20_000:
      return OutOfMemory(needed if size % 3 else None, 20_000)
    return CompiledStep(size, Memory(1000, 0, 0, 0, 2 * size, 0, 8 * size, 0, 0), 1e9, 10**6, [])

  monkeypatch.setattr(plan_run, "compile_step", compile_step)
  monkeypatch.setattr(plan_run, "peaks", lambda _: Peaks(1e12, 1e9, None, "by hand"))
  target = Topology("cpu", jax.devices(), 8, 20_000)
  monkeypatch.setattr(plan_run.topology, "find", lambda _: target)
  return types.SimpleNamespace(sizes=sizes, target=target)


@pytest.mark.slow
def test_a_plan_for_this_machine(here, capsys, monkeypatch):
  """All is real but the size of the memory: the images' shape without the images, the compiler, the measured peaks."""
  find = plan_run.topology.find
  monkeypatch.setattr(plan_run.topology, "find", lambda name: find(name)._replace(memory=2 * 2**20))
  plan_run.plan(tiny_config(topology="cpu", data_dir=str(here / "data")))
  out, err = capsys.readouterr()
  for part in (
    "44,969 parameters",
    "8x8x1 (digits), 16 in a training step",
    "cpu: 8 x cpu, --parallel=pmap",
    "measured here",
    "3 of 179.2 kB in all; each device sends 313.6 kB",
    "bound: roofline",
    "8 steps",
  ):
    assert part in out
  assert re.search(r"^fits: [\d.]+ \w+ of 2.00 MiB$", out, re.MULTILINE)
  assert re.search(r"^largest batch.*: --batch_size=\d+, \d+ on each device, [\d.]+ MiB;$", out, re.MULTILINE)
  assert all(len(line) <= 100 for line in out.splitlines())
  assert re.match(r"compiling the step for a batch of 16 \.\.\. (\d+ s \.\.\. )*\d+ s\n", err)
  assert list(here.iterdir()) == []


def test_the_largest_batch_is_found_and_told(here, compiled, capsys):
  plan_run.plan(tiny_config())
  out, err = capsys.readouterr()
  assert compiled.sizes == [16, 1024]
  assert "fits: 1.13 KiB of 19.53 KiB" in out
  assert "largest batch: --batch_size=1024, 128 on each device, 10.98 KiB;\n  2048 would need about 20.98 KiB" in out
  assert err.count("compiling the step") == 2


@pytest.mark.parametrize(
  ("changes", "rows"),
  [
    ({}, 10),
    ({"label_dropout": 0.1, "only": "3,7,8"}, 4),
    ({"dataset": "cifar10"}, 10),
    ({"dataset": "cifar10", "only": "cat,dog"}, 2),
    ({"dataset": "folder:nowhere", "image_size": 8, "num_classes": 1000}, 1000),
  ],
)
def test_the_labels_of_a_conditional_run(here, compiled, monkeypatch, changes, rows):
  """Of images that need not be here."""
  planned = []
  monkeypatch.setattr(plan_run.report, "headline", lambda run, *_: planned.append(run) or "")
  plan_run.plan(tiny_config(data_dir=str(here / "data"), conditioning="class", attention_resolutions=(), **changes))
  assert planned[0].abstract_state.params["label_embedding"]["embedding"].shape == (rows, 32)
  assert list(here.iterdir()) == []


LATENT = dict(dataset="folder:nowhere", image_size=64, attention_resolutions=())


def test_a_first_stage_that_is_not_trained_yet_is_that_of_the_preset_which_its_path_ends_in(here, compiled, capsys):
  """With its parameters, as the preset's header counts them; another path is refused with the names that can be."""
  plan_run.plan(tiny_config(first_stage="runs/emoji64_ae", **LATENT))
  out, err = capsys.readouterr()
  assert "there is no runs/emoji64_ae yet: planned with the first stage of --preset=emoji64_ae\n" in err
  assert "first stage  autoencoder of 681,911 parameters, latents 16x16x4, encoded in\n" in out
  for path in ("runs/mine", "runs/cifar10"):
    with pytest.raises(UserError, match=f"nothing at {path}; .*: emoji64_ae, ldm_kl_f8, ldm_vq_f4$") as caught:
      plan_run.plan(tiny_config(first_stage=path, **LATENT))
    assert "\n" not in str(caught.value)
  with pytest.raises(UserError, match="is not divisible by 4"):
    plan_run.plan(tiny_config(first_stage="emoji64_ae", **LATENT | {"image_size": 66}))
  assert list(here.iterdir()) == []


def test_a_workdir_is_planned_with_the_first_stage_that_it_keeps(here, compiled, capsys):
  """Whose own workdir may be gone, or hold another one by now; unless the command names another."""
  network = build_autoencoder(
    ModelConfig(channels=4, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(), norm_groups=2),
    AutoencoderConfig(latent_channels=2),
    (64, 64, 3),
  )
  params = jax.tree.map(np.asarray, network.init(jax.random.key(0), (64, 64, 3)))
  kept = stage_folder.Autoencoder(network, params, (64, 64, 3), np.zeros(2, np.float32), np.ones(2, np.float32))
  config = tiny_config(first_stage=str(here / "gone"), **LATENT)
  layout.create(here / "run", config)
  stage_folder.keep(here / "run", kept.fixed((64, 64, 3)), {})
  before = sorted(here.rglob("*"))
  plan_run.plan(config, here / "run")
  assert f"autoencoder of {num_params(params):,} parameters, latents 32x32x2" in capsys.readouterr().out
  plan_run.plan(tiny_config(first_stage="emoji64_ae", **LATENT), here / "run")
  assert "autoencoder of 681,911 parameters" in capsys.readouterr().out
  assert sorted(here.rglob("*")) == before


def test_an_autoencoder_is_planned_with_its_discriminator_and_what_judges_it(here, compiled, capsys):
  """Of the discriminator of Rombach et al. 2022 the number of parameters; the network of LPIPS needs no file."""
  options = dict(stage="autoencoder", perceptual="lpips", lpips_weights=str(here / "no"), discriminator_weight=0.5)
  plan_run.plan(tiny_config(**LATENT, **options))
  assert re.search(r"autoencoder of [\d,]+ parameters, discriminator of 2,765,633,", capsys.readouterr().out)
  plan_run.plan(tiny_config(**LATENT, **options | {"perceptual": "features", "lpips_weights": ""}))
  out, err = capsys.readouterr()
  assert "--perceptual=features is left out" in err and "first stage " not in out


def test_a_long_compilation_shows_that_it_lives(here, compiled, capsys, monkeypatch):
  monkeypatch.setattr(plan_run, "_TICK_S", 0.01)
  real = plan_run.compile_step
  monkeypatch.setattr(plan_run, "compile_step", lambda *of: time.sleep(0.3) or real(*of))
  plan_run.plan(tiny_config())
  assert re.search(r"batch of 16 \.\.\. (0 s \.\.\. ){2,}0 s\n", capsys.readouterr().err)


def test_a_very_long_compilation_says_once_how_it_takes_less_time(here, compiled, capsys, monkeypatch):
  """And with that the plan says how it was compiled."""
  monkeypatch.setattr(plan_run, "_TICK_S", 0.01)
  monkeypatch.setattr(plan_run, "_SLOW_S", 0.0)
  real = plan_run.compile_step
  monkeypatch.setattr(plan_run, "compile_step", lambda *of: time.sleep(0.3) or real(*of))
  plan_run.plan(tiny_config(batch_size=8))
  out, err = capsys.readouterr()
  hint = r"\(JAX_OPTIMIZATION_LEVEL=O1 before the command compiles in less time\) \.\.\. "
  assert re.search(rf"batch of 8 \.\.\. 0 s \.\.\. {hint}(0 s \.\.\. )+0 s\n", err) and "OPTIMIZATION" not in out
  monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O1")
  plan_run.plan(tiny_config(batch_size=8))
  out, err = capsys.readouterr()
  assert re.search(r"compiled +with JAX_OPTIMIZATION_LEVEL=O1\n", out) and "OPTIMIZATION" not in err
  monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "UNKNOWN")  # the default
  assert not plan_run.report.effort()
  monkeypatch.setenv("JAX_MEMORY_FITTING_EFFORT", "-1")
  assert plan_run.report.effort() == "JAX_MEMORY_FITTING_EFFORT=-1"


def test_sizes_are_those_that_the_devices_and_the_parts_divide(here, compiled):
  plan_run.plan(tiny_config(batch_size=96, grad_accum_steps=3))
  assert all(size % 24 == 0 for size in compiled.sizes) and len(compiled.sizes) > 1


@pytest.mark.parametrize("batch_size", [3008, 3072])
def test_a_batch_that_does_not_fit(here, compiled, capsys, batch_size):
  """Whether or not the compiler says by how much."""
  plan_run.plan(tiny_config(batch_size=batch_size))
  out, _ = capsys.readouterr()
  assert "does not fit: " in out and "bound" not in out and "one step" not in out
  assert "--batch_size=1024" in out if batch_size == 3008 else "largest batch" in out


def test_without_peaks_there_is_no_roofline(here, compiled, capsys, monkeypatch):
  monkeypatch.setattr(plan_run, "peaks", lambda _: None)
  plan_run.plan(tiny_config())
  out, _ = capsys.readouterr()
  assert "no roofline" in out and "bound" not in out and "1 GFLOP\n" in out and "largest batch" in out


def test_without_a_known_memory_there_is_no_search(here, compiled, capsys, monkeypatch):
  monkeypatch.setattr(plan_run.topology, "find", lambda _: compiled.target._replace(memory=None))
  plan_run.plan(tiny_config())
  assert compiled.sizes == [16] and "largest batch" not in capsys.readouterr().out


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"topology": "v5e"}, "topology: 'v5e' is no name"),
    ({"topology": "v5e:2x2"}, r"topology: v5e:2x2 needs libtpu, .* pip install -e '\.\[tpu\]'"),
    ({"batch_size": 12}, "batch_size: 12 cannot be divided among 8 devices"),
    ({"dataset": "cifar11"}, "dataset: 'cifar11' is unknown"),
    ({"dataset": "folder:nowhere"}, "dataset: 'folder:nowhere' is not a folder"),
    ({"channel_multipliers": (1, 1, 1, 1, 1)}, "image_size: 8 is not divisible by 16"),
    (
      {"dataset": "folder:nowhere", "image_size": 8, "conditioning": "class"},
      "num_classes: of folder:nowhere no classes are known here; say how many",
    ),
    ({"dataset": "lsun/bedroom", "image_size": 8, "conditioning": "class"}, "num_classes: of lsun/bedroom no classes"),
    ({"image_size": "7x8"}, "image_size: 7x8 is not divisible by 2.* use --image_size=6x8 or 8, or"),
  ],
)
def test_what_cannot_be_planned_is_refused_before_anything_is_compiled(here, capsys, monkeypatch, changes, message):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(UserError, match=message) as caught:
    plan_run.plan(tiny_config(data_dir=str(here), **changes))
  assert "\n" not in str(caught.value)
  assert capsys.readouterr() == ("", "") and list(here.iterdir()) == []


@pytest.mark.parametrize(
  ("changes", "shape"),
  [
    ({"dataset": "cifar10"}, (32, 32, 3)),
    ({"dataset": "mnist"}, (28, 28, 1)),
    ({"dataset": "lsun/bedroom", "image_size": 256}, (256, 256, 3)),
    ({"dataset": "folder:nowhere", "image_size": 64}, (64, 64, 3)),
    ({"dataset": "folder:nowhere", "image_size": "48x64"}, (48, 64, 3)),
  ],
)
def test_the_shape_of_images_that_are_not_here(here, changes, shape):
  data = tiny_config(data_dir=str(here / "data"), **changes).data
  assert sources.image_shape(data) == shape
  assert list(here.iterdir()) == []
