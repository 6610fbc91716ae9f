"""Names of topologies; libtpu, which the tests do not have, is a fake here."""

import importlib.util
import os
import types

import jax
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.plan import topology
from ddpm_jax.plan.topology import OutOfMemory, out_of_memory

V5E = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (4.00T) exceeds "


@pytest.fixture
def libtpu(monkeypatch):
  """A libtpu that has v5e, v4 and nothing else, and keeps what it was asked for."""
  record = types.SimpleNamespace(asked=[], environment={}, refusal=V5E + "available HBM (15.75G).")
  record.kinds = ("v5e:", "v4:")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)
  for name in topology._QUIET:
    monkeypatch.delenv(name, raising=False)

  def get_topology_desc(*, platform, topology_name, **options):
    record.asked.append((platform, topology_name, options))
    record.environment = {name: os.environ.get(name) for name in topology._QUIET}
    if topology_name.startswith("v8"):
      raise jax.errors.JaxRuntimeError("ABORTED: Internal error when accessing libtpu multi-process lockfile.")
    if not topology_name.startswith(record.kinds):
      raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Invalid TPU external name: TPU v9\nmore")
    kind = "TPU v5 lite" if topology_name.startswith("v5e") else "TPU v4"
    return types.SimpleNamespace(devices=[types.SimpleNamespace(device_kind=kind)] * 4)

  class Huge:
    def lower(self, _):
      return self

    def compile(self):
      if record.refusal:
        raise jax.errors.JaxRuntimeError(record.refusal)

  monkeypatch.setattr(topology.topologies, "get_topology_desc", get_topology_desc)
  monkeypatch.setattr(topology, "SingleDeviceSharding", lambda _: None)
  monkeypatch.setattr(topology.jax, "jit", lambda *_, **__: Huge())
  yield record
  for name in topology._QUIET:
    os.environ.pop(name, None)


def test_cpu_is_this_machine():
  found = topology.find("cpu")
  assert list(found.devices) == jax.devices() and (found.chips, found.kind) == (8, "cpu")
  assert found.memory == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8


def test_a_tpu_that_is_not_here(libtpu):
  found = topology.find("v5e:2x2")
  assert (found.name, len(found.devices), found.chips, found.kind) == ("v5e:2x2", 4, 4, "TPU v5 lite")
  assert found.memory == int(15.75 * 2**30)
  assert libtpu.asked == [("tpu", "v5e:2x2", {})]
  assert libtpu.environment == topology._QUIET  # before the library is loaded
  assert (libtpu.environment["TPU_SKIP_MDS_QUERY"], libtpu.environment["TPU_LOG_DIR"]) == ("1", "disabled")
  assert libtpu.environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"  # two plans at a time


def test_what_the_user_has_set_stays(libtpu, monkeypatch):
  monkeypatch.setenv("TPU_MIN_LOG_LEVEL", "0")
  topology.find("v5e:2x2")
  assert libtpu.environment == topology._QUIET | {"TPU_MIN_LOG_LEVEL": "0"}


def test_a_chip_alone_and_a_chip_of_two_cores(libtpu):
  topology.find("v5e:1x1")
  topology.find("v4:2x2x1")
  options = [asked[2] for asked in libtpu.asked]
  assert options == [{"chips_per_host_bounds": (1, 1, 1)}, {"chip_config_name": "megacore"}]


def test_memory_that_nobody_says(libtpu):
  libtpu.refusal = ""
  assert topology.find("v5e:2x2").memory is None
  libtpu.refusal = "RESOURCE_EXHAUSTED: no"
  assert topology.find("v5e:2x2").memory is None
  libtpu.refusal = "INTERNAL: broken"
  with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
    topology.find("v5e:2x2")


# Numbers of chips, by multiplying, and what of them the name counts, from Cloud TPU's documentation.
SLICES = {
  "v2-8": "v2:2x2",
  "v3-8": "v3:2x2",
  "v3-128": "v3:8x8",
  "v4-8": "v4:2x2x1",
  "v4-32": "v4:2x2x4",
  "v4-64": "v4:2x4x4",
  "v4-1536": "v4:8x8x12",
  "v5e-1": "v5e:1x1",
  "v5e-16": "v5e:4x4",
  "v5litepod-16": "v5e:4x4",
  "v5litepod-256": "v5e:16x16",
  "v5p-8": "v5p:2x2x1",
  "v5p-128": "v5p:4x4x4",
  "v5p-12288": "v5p:16x16x24",
  "v6e-8": "v6e:2x4",
}


def test_slices_by_their_names_at_cloud_tpu(libtpu):
  libtpu.kinds = ("v2:", "v3:", "v4:", "v5e:", "v5p:", "v6e:")
  for name, want in SLICES.items():
    found = topology.find(name)
    assert found.name == f"{want} ({name})" and libtpu.asked[-1][1] == want
    per_chip = 1 if name.startswith(("v5e", "v5litepod", "v6e")) else 2
    assert found.chips * per_chip == int(name.split("-")[1])


def test_a_slice_that_cloud_tpu_has_not_is_refused_with_those_that_it_has():
  for name, those in (
    ("v5e-12", "counts chips; use one of v5e-1, v5e-4, v5e-8, v5e-16, v5e-32, v5e-64, v5e-128, v5e-256"),
    ("v5litepod-2", "counts chips; use one of v5litepod-1, v5litepod-4, "),
    ("v3-4", "counts TensorCores; use one of v3-8, v3-32, v3-128, v3-256, v3-512, v3-1024, v3-2048"),
    ("v4-4", "counts TensorCores; use one of v4-8, v4-16, v4-32, "),
    ("v5p-12", "counts TensorCores; use one of v5p-8, v5p-16, v5p-32, "),
  ):
    with pytest.raises(UserError) as caught:
      topology.find(name)
    assert str(caught.value).startswith(f"topology: {name} is no slice of Cloud TPU") and those in str(caught.value)


GPUS = [
  *(
    "gpu",
    "GPU",
    "cuda",
    "a100",
    "A100",
    "h100",
    "8xh100",
    "h100:8",
    "a100-80gb",
    "h200",
    "b200",
    "gb200",
    "gb300",
    "gh200",
  ),
  *(
    "nvidia-h100-80gb",
    "nvidia-tesla-t4",
    "NVIDIA L4",
    "l4",
    "l40s",
    "a10g",
    "t4",
    "v100",
    "p100",
    "rtx4090",
    "mi300x",
  ),
  *("a2-highgpu-1g", "a2-ultragpu-8g", "a3-highgpu-8g", "a3-megagpu-8g", "a4x-highgpu-4g", "g2-standard-4", "a100:2x2"),
  *("p3.2xlarge", "p4d.24xlarge", "p5en.48xlarge", "g4dn.xlarge", "g5.12xlarge", "g6e.xlarge", "gpu_8x_h100_sxm5"),
  *("Standard_ND96isr_H100_v5", "Standard_NC24ads_A100_v4", "NC6s_v3"),
]


def test_gpus_cannot_be_planned_and_what_can_be_run_is_named():
  for name in GPUS:
    with pytest.raises(UserError) as caught:
      topology.find(name)
    assert str(caught.value).startswith(f"topology: {name!r} has GPUs, "), name
    assert str(caught.value).endswith("in the root of a clone: python -m benchmarks.train_step")


@pytest.mark.parametrize("name", ["", "v5e", "v5e:", "v5e:4", "v5e:axb", "v9-8", "n2-standard-4", "v5e:2x2x2x2", "CPU"])
def test_what_is_no_name_is_refused_without_libtpu(name):
  with pytest.raises(
    UserError, match=r"^topology: .* is no name of a topology; use one such as v5e:4x4, v5e-16, .*cpu$"
  ):
    topology.find(name)


def test_libtpu_is_missing(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(UserError, match=r"^topology: v5e:4x4 needs libtpu, .*; run: pip install -e '\.\[tpu\]'$"):
    topology.find("v5e:4x4")


def test_a_topology_that_libtpu_does_not_know(libtpu):
  with pytest.raises(UserError) as caught:
    topology.find("v9:2x2")
  assert "\n" not in str(caught.value)
  assert "v9:2x2 is unknown to libtpu (Invalid TPU external name: TPU v9); use one such as" in str(caught.value)


def test_a_libtpu_that_does_not_start(libtpu):
  with pytest.raises(UserError, match=r"^topology: libtpu cannot be used \(ABORTED: .* lockfile\.\); install it again"):
    topology.find("v8:2x2")


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    (V5E + "available HBM (15.75G).", OutOfMemory(4 * 2**40, int(15.75 * 2**30))),
    (
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 512.5M of "
      "256K hbm. Exceeded hbm capacity by",
      OutOfMemory(int(512.5 * 2**20), 256 * 2**10),
    ),
    ("RESOURCE_EXHAUSTED: something", OutOfMemory(None, None)),
    ("INTERNAL: Used 1G of 2G hbm", None),
  ],
)
def test_words_of_the_compiler(text, expected):
  assert out_of_memory(jax.errors.JaxRuntimeError(text)) == expected
