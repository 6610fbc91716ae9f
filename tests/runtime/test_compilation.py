"""Where compiled programs are kept, and the flags of XLA."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.runtime import compilation

OPTIONS = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def as_before(monkeypatch, tmp_path):
  """A home of its own, no folder chosen; JAX's settings and Python's warnings are put back."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
  before = {name: getattr(jax.config, name) for name in OPTIONS}
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update("jax_enable_compilation_cache", True)  # a test of another file may have had it off
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_auto_is_a_folder_of_this_machine(tmp_path, monkeypatch):
  compilation.enable_compilation_cache("auto")
  folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
  assert folder.is_dir()
  assert folder.parent == tmp_path / "home" / "ddpm_jax"
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
  # A program that was compiled for other cores is not taken.
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(77)), raising=False)
  assert compilation.default_folder() != folder
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert compilation.default_folder().parent == tmp_path / ".cache" / "ddpm_jax"


def test_auto_leaves_what_the_user_has_set(tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))  # which JAX has read when it was imported
  jax.config.update("jax_compilation_cache_dir", str(tmp_path))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
  compilation.enable_compilation_cache("auto")
  assert jax.config.jax_compilation_cache_dir == str(tmp_path)
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 7
  assert not (tmp_path / "home").exists()


def test_off_and_a_folder(tmp_path):
  compilation.enable_compilation_cache(str(tmp_path / "a" / "b"))
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a" / "b")
  assert (tmp_path / "a" / "b").is_dir()
  compilation.enable_compilation_cache("off")
  assert not jax.config.jax_enable_compilation_cache


def told(capsys) -> list[str]:
  """The lines about the cache; each is one."""
  out, err = capsys.readouterr()
  assert out == "" and all(line.startswith("compilation cache: ") for line in err.splitlines())
  return err.splitlines()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match=r"^compilation_cache: cannot write to .*/file/x \(Not a directory\); name "):
    compilation.enable_compilation_cache(str(tmp_path / "file" / "x"))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  compilation.enable_compilation_cache("auto")  # not worth failing for
  assert not jax.config.jax_enable_compilation_cache
  (line,) = told(capsys)
  assert f"none, as {tmp_path / 'file'}/ddpm_jax/" in line and "(Not a directory); --compilation_cache names" in line
  monkeypatch.setattr(compilation, "default_folder", lambda: None)
  compilation.enable_compilation_cache("auto")
  assert told(capsys) == [
    "compilation cache: none, as this user has no home folder; --compilation_cache names a folder"
  ]
  compilation.enable_compilation_cache("off")
  assert told(capsys) == []


def test_what_was_not_used_for_longest_goes_first(monkeypatch, capsys):
  folder = compilation.default_folder()
  (folder / "of XLA").mkdir(parents=True)  # on GPUs, XLA keeps what it has tried in a folder of its own there
  for age in range(10):
    (folder / f"{age}-cache").write_bytes(bytes(10))
    os.utime(folder / f"{age}-cache", (1000 - age, 500))
  monkeypatch.setattr(compilation, "MAX_CACHE_BYTES", 100)
  compilation.enable_compilation_cache("auto")
  assert len(list(folder.glob("*-cache"))) == 10 and told(capsys) == []
  monkeypatch.setattr(compilation, "MAX_CACHE_BYTES", 99)
  compilation.enable_compilation_cache("auto")
  assert sorted(path.name for path in folder.iterdir()) == ["0-cache", "1-cache", "2-cache", "3-cache", "of XLA"]
  assert told(capsys) == [f"compilation cache: 6 of 10 programs removed, as those in {folder} took 9.3e-08 GiB"]


def test_a_damaged_entry_is_compiled_again_and_all_are_removed(capsys):
  def entries():
    return [path for path in folder.iterdir() if path.name.startswith("jit_triple")]

  def triple(x):
    return x * 3 + 0.125

  compilation.enable_compilation_cache("auto")
  folder = compilation.default_folder()
  jax._src.compilation_cache.reset_cache()
  x = jnp.arange(5.0)
  want = jax.jit(triple)(x)
  (entry,) = entries()
  (folder / "of XLA").mkdir()
  entry.write_bytes(entry.read_bytes()[:-20])
  jax.clear_caches()
  with warnings.catch_warnings():
    warnings.simplefilter("default")
    compilation._hear_warnings(folder, ours=True)  # catch_warnings has put Python's own back
    assert jnp.all(jax.jit(triple)(x) == want)
  (line,) = told(capsys)
  assert f"a program in {folder} cannot be read and is compiled again (" in line and line.endswith("all are removed")
  jax.clear_caches()
  assert jnp.all(jax.jit(triple)(x) == want)  # warnings are errors here: it was read whole, or compiled
  assert len(entries()) == 1
  jax._src.compilation_cache.reset_cache()


@pytest.mark.parametrize(
  ("version", "machine", "before", "after"),
  [
    ("0.10.2", "x86_64", "", "YNNPACK"),
    ("0.11.0", "x86_64", "--xla_x=1", "--xla_x=1 ONEDNN"),
    ("0.12.0.1", "x86_64", "", "ONEDNN"),
    ("0.12.0.1", "aarch64", "--xla_x=1", "--xla_x=1"),
    ("0.13.0", "x86_64", "--xla_x=1", "--xla_x=1"),
    ("0.12.0.1", "x86_64", "--xla_cpu_experimental_ynn_fusion_type=dot", "--xla_cpu_experimental_ynn_fusion_type=dot"),
    ("0.12.0.1", "x86_64", "--xla_cpu_use_onednn=false", "--xla_cpu_use_onednn=false"),
    ("0.12.0.1", "x86_64", "--DEVICES=8", "--DEVICES=8 ORDER ONEDNN"),
    ("0.12.0.1", "aarch64", "--DEVICES=8", "--DEVICES=8 ORDER"),
    ("0.12.0.1", "aarch64", "--DEVICES=8 --xla_cpu_scheduler_type=X", "--DEVICES=8 --xla_cpu_scheduler_type=X"),
    ("0.11.0", "aarch64", "--DEVICES=8", "--DEVICES=8"),
  ],
)
def test_flags_of_xla(version, machine, before, after, monkeypatch):
  devices, order = "xla_force_host_platform_device_count", "xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
  ynnpack = "--xla_cpu_experimental_ynn_fusion_type=individual_convolution,individual_dot,dot,eltwise,reduce"
  onednn = (
    "--xla_cpu_use_onednn=true --xla_cpu_experimental_onednn_custom_call=true "
    "--xla_cpu_experimental_ynn_fusion_type=reduce"
  )
  monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "jaxlib" else "")
  monkeypatch.setattr(platform, "machine", lambda: machine)
  monkeypatch.setenv("XLA_FLAGS", before.replace("DEVICES", devices))
  compilation.set_xla_flags()
  words = {"YNNPACK": ynnpack, "ONEDNN": onednn, "DEVICES": devices, "ORDER": f"--{order}"}
  for word, flags in words.items():
    after = after.replace(word, flags)
  assert os.environ["XLA_FLAGS"] == after


def test_the_flags_reach_the_library():
  """The convolutions of the command are those of the library that the flags name, where this version has flags."""
  program = (
    "from ddpm_jax.runtime import compilation; compilation.set_xla_flags(); import jax, jax.numpy as jnp;"
    "from ddpm_jax.runtime.cpu import convolve;"
    "print(jax.jit(convolve).lower(jnp.ones((4, 8, 8, 8)), jnp.ones((3, 3, 8, 8))).compile().as_text())"
  )
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  text = subprocess.run([sys.executable, "-c", program], env=environment, check=True, text=True, capture_output=True)
  version = importlib.metadata.version("jaxlib").split(".")[:2]
  if platform.machine() == "x86_64" and version in (["0", "11"], ["0", "12"]):
    assert "__onednn$convolution" in text.stdout
  else:
    assert "convolution" in text.stdout


def test_options_with_which_a_program_is_kept(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_onednn=true --xla_cpu_experimental_onednn_custom_call=true --other=1")
  names = {"xla_cpu_use_onednn": False, "xla_cpu_experimental_onednn_custom_call": False}
  assert compilation.options_to_be_kept("cpu") == names
  assert compilation.options_to_be_kept("tpu") == {}  # which would not know them
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_onednn=false")
  assert compilation.options_to_be_kept("cpu") == {}


@pytest.mark.parametrize("where", ["auto", "named", "of the user"])
def test_a_program_that_cannot_be_kept_is_no_warning(tmp_path, monkeypatch, capsys, where):
  """XLA cannot write down one that uses oneDNN: JAX would warn at every start. A disk that is full is told, once."""
  folder = tmp_path / "cache"
  heard = []
  monkeypatch.setattr(warnings, "showwarning", lambda message, *where: heard.append(message))
  monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
  if where == "of the user":
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
  compilation.enable_compilation_cache(str(folder) if where == "named" else "auto")
  writing, reading = (f"Error {what} persistent compilation cache entry for 'f': " for what in ("writing", "reading"))
  full = f"{writing}OSError: [Errno 28] No space left on device: '/a'"
  for message in (f"{writing}MemoryError", full, full, "another warning"):
    warnings.showwarning(message, UserWarning, "file", 1)
  assert heard == ["another warning"]
  (line,) = told(capsys)
  assert "programs cannot be kept in " in line and line.endswith("(OSError: [Errno 28] No space left on device: '/a')")
  kept = pathlib.Path(jax.config.jax_compilation_cache_dir)
  kept.mkdir(parents=True, exist_ok=True)
  (kept / "jit_f-cache").touch()
  warnings.showwarning(f"{reading}ZstdError: cut", UserWarning, "file", 1)
  assert (kept / "jit_f-cache").exists() == (where != "auto"), "what the user has chosen is his own"
  assert f"a program in {kept} cannot be read and is compiled again (ZstdError: cut); " in told(capsys)[0]
