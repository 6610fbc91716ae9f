"""Damage to the files of a checkpoint, and what restoring makes of it. Used by the tests and by the storm."""

import collections
import pathlib
import random
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.checkpoint.manifest import describe
from ddpm_jax.config import Config
from ddpm_jax.devices import make_mesh
from ddpm_jax.errors import UserError
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import create_state, to_stored
from tests.training.tiny import newest_intact


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path for path in folder.rglob("*") if path.is_file())


def random_flip(generator: random.Random, folder: pathlib.Path) -> tuple[pathlib.Path, bytes]:
  """Turns one bit of one file, each byte of the folder as likely as any other. Returns the file and what it held."""
  paths = [path for path in files(folder) if path.stat().st_size]
  (path,) = generator.choices(paths, [path.stat().st_size for path in paths])
  before = path.read_bytes()
  after = bytearray(before)
  after[generator.randrange(len(after))] ^= 1 << generator.randrange(8)
  path.write_bytes(after)
  return path, before


def strikes(folder: pathlib.Path) -> Iterator[tuple[str, pathlib.Path, bytes]]:
  """Deletes, halves, empties and zeroes every file, one after the other; the caller puts it back."""
  for path in files(folder):
    before = path.read_bytes()
    for name, after in (("halved", before[: len(before) // 2]), ("emptied", b""), ("zeroed", bytes(len(before)))):
      if after != before:
        path.write_bytes(after)
        yield name, path, before
    path.unlink()
    yield "deleted", path, before


class Judge:
  """Restores from a folder with two checkpoints, of which the newer may be damaged, and says what came of it."""

  def __init__(self, directory: pathlib.Path, run):
    self.directory, self._run = directory, run
    self.older, self.newer = Checkpoints(directory).steps()
    self._digests = {}
    for step in (self.older, self.newer):
      manifest = self._restore(step).manifest
      self._digests[step] = {name: leaf["sha256"] for name, leaf in manifest["leaves"].items()}
    self.verdicts = collections.Counter()

  def _restore(self, step=None):
    checkpoints = Checkpoints(self.directory)
    if step is not None:
      checkpoints.steps = lambda: [step]
    restored = newest_intact(checkpoints, self._run.abstract_state)
    checkpoints.close()
    return restored

  def judge(self) -> str:
    """'unharmed', 'fell back', or 'SILENT'; counted in `verdicts`."""
    try:
      restored = self._restore()
    except UserError as error:
      verdict = f"refused: {error}"
    else:
      found = {name: leaf["sha256"] for name, leaf in describe(to_stored(restored.state)).items()}
      if found != self._digests[restored.step]:
        verdict = "SILENT"
      elif restored.step == self.newer:
        verdict = "unharmed"
      else:
        assert list(restored.damaged) == [self.newer] and restored.damaged[self.newer]
        verdict = "fell back"
    self.verdicts[verdict] += 1
    return verdict


def put_back(path: pathlib.Path, contents: bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(contents)


class SmallRun:
  """What `Judge` takes of a run, with two weights in place of a network: Orbax takes its time over each leaf."""

  image_shape = (8, 8, 1)

  def __init__(self):
    self.mesh, state = make_mesh("pmap"), self.initial_state()
    self.abstract_state = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      state,
      self.mesh.state_shardings(state),
    )

  def initial_state(self):
    params = {"dense": {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(64)}}
    return create_state(params, make_optimizer(Config().optimizer, 10))


def two_checkpoints(directory: pathlib.Path, run) -> None:
  """Checkpoints 1 and 2 with other numbers in each."""
  checkpoints = Checkpoints(directory, keep=2)
  state = run.initial_state()
  for step in (1, 2):
    state = jax.tree.map(lambda x: x + jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype), state)
    state = jax.device_put(state, run.mesh.state_shardings(run.abstract_state))
    checkpoints.save(state, step, {"image_shape": list(run.image_shape)})
  checkpoints.close()


def copied(directory: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  shutil.copytree(directory, target)
  return target
