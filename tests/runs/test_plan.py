"""A plan from its flags to its last line."""

import importlib.util
import re
import types

import jax
import pytest

from ddpm_jax.data import sources
from ddpm_jax.errors import UserError
from ddpm_jax.plan.compiling import CompiledStep, Memory
from ddpm_jax.plan.hardware import Peaks
from ddpm_jax.plan.topology import OutOfMemory, Topology
from ddpm_jax.runs import plan as plan_run
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
  assert re.match(r"compiling the step for a batch of 16 \.\.\. \d+ s\n", err)
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
