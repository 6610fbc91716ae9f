"""Eight simulated devices, strict arithmetic, quick compilation and a shared cache of it, before JAX starts."""

import gc
import os
import pathlib

import pytest

from ddpm_jax.runtime import compilation
from tests import quick

CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "xla"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {quick.FLAGS}"
compilation.keep_simulated_devices_in_step()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))  # children of the tests inherit it
os.environ["XDG_CACHE_HOME"] = str(CACHE.parent / "home")  # tests leave the person's own cache alone
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

import jax

# Mixing ranks by accident is how a [B] and a [B, 1] become a [B, B]: an error in the tests.
jax.config.update("jax_numpy_rank_promotion", "raise")
assert jax.device_count() == 8


def pytest_configure(config):
  """`--dist loadfile` would begin with the files of many tests; the order below is by how long they take."""
  config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
  """Files with slow tests come first, so that no process begins one when the others have nothing left to do."""
  slow = {item.path for item in items if item.get_closest_marker("slow")}
  items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def few_programs():
  """JAX keeps what it has compiled, each program hundreds of mappings of memory; Linux allows a process 65,530."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > 16_000:
    jax.clear_caches()
    gc.collect()
