import json
import os
import types

import numpy as np
import pytest
from PIL import Image

from benchmarks import command, hardware, read_work, torch_read
from benchmarks import input as input_benchmark
from benchmarks.alternate import Block
from ddpm_jax import config as config_lib
from ddpm_jax.config import DataConfig
from ddpm_jax.data.sources import open_source
from ddpm_jax.errors import UserError
from tests.benchmarks import fake
from tests.training.tiny import tiny_config


def test_a_generated_folder_has_the_images_that_were_asked_for():
  with input_benchmark.generated(3, (8, 8, 1)) as grey, input_benchmark.generated(2, (4, 6, 3)) as colour:
    assert [path.name for path in sorted(grey.iterdir())] == ["000000.png", "000001.png", "000002.png"]
    for folder, mode, size in ((grey, "L", (8, 8)), (colour, "RGB", (6, 4))):
      for path in folder.iterdir():
        with Image.open(path) as image:
          assert (image.mode, image.size) == (mode, size)
          assert np.asarray(image).std() > 5
  assert not grey.exists()


def test_both_ways_read_all_images():
  with input_benchmark.generated(20, (8, 8, 1)) as folder:
    config = tiny_config(dataset=f"folder:{folder}", image_size=8)
    facts, block = read_work.prepare({"config": config_lib.to_json(config), "image_shape": [8, 8, 1]})
    assert (facts["images"], tuple(facts["image_shape"])) == (20, (8, 8, 1))
    for case, count, images in (
      ("memory", 3, 48),
      ("disk", 3, 48),
      ("memory, first pass", 2, 64),
      ("disk, first pass", 1, 32),
    ):
      assert block(case, count)["images"] == images


def test_the_two_ways_are_memory_and_disk(monkeypatch):
  opened, forgotten = [], []
  monkeypatch.setattr(read_work.hardware, "forget", forgotten.append)
  usual = read_work.open_source
  monkeypatch.setattr(read_work, "open_source", lambda data: opened.append(data.cache_gib) or usual(data))
  with input_benchmark.generated(4, (8, 8, 1)) as folder:
    config = tiny_config(dataset=f"folder:{folder}", image_size=8)
    _, block = read_work.prepare({"config": config_lib.to_json(config)})
    assert opened == [read_work.IN_MEMORY, 0]
    block("disk", 2)
    assert len(opened) == 2  # warm: it stays open
    assert not forgotten
    block("disk, first pass", 1)
    block("memory, first pass", 1)
    assert opened[2:] == [0, read_work.IN_MEMORY]
    assert forgotten == [f"folder:{folder}"] * 2


def test_files_are_forgotten_before_a_first_pass(tmp_path, monkeypatch):
  dropped = []
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, advice: dropped.append(advice), raising=False)
  with input_benchmark.generated(3, (8, 8, 1)) as folder:
    hardware.forget(f"folder:{folder}")
    assert dropped == [os.POSIX_FADV_DONTNEED] * 3
    hardware.forget("digits")
    assert len(dropped) == 3


def test_summary_compares_with_the_step():
  def block(number, name, rate):
    return Block(number, name, 1, {"seconds": 1.0, "images": rate})

  blocks = []
  for number in range(2):
    for name, factor in (("A", 1), ("B", 3)):
      blocks.append(block(number, f"{name}: the step", 100))
      blocks += [block(number, f"{name}: {case}", 200 * factor) for case in input_benchmark.CASES]
  results = input_benchmark.summary(["A", "B"], blocks)
  assert results["A"]["disk"]["times_the_step"] == 2
  assert results["B"]["disk, first pass"]["times_the_step"] == 6
  assert results["B"]["memory"]["speed of B over A"].median == 3
  assert "speed of B over A" not in results["A"]["memory"]
  lines = input_benchmark.text(results).splitlines()
  assert len(lines) == 2 + 5 + 9
  assert "speed of B over A" not in input_benchmark.summary(["A"], blocks)["A"]["memory"]


@pytest.mark.parametrize("own", [False, True])
def test_what_is_read(monkeypatch, capsys, tmp_path, own):
  machine = fake.Machine()
  reader = fake.Worker({"images": 4, "image_shape": [8, 8, 1]}, machine.run("read", 300))
  made = {"A": reader, "step A": fake.Worker({}, machine.run("step", 100))}
  monkeypatch.setattr(command, "workers", fake.workers(made))
  words = ["--images=4", "--rounds=1", f"--json={tmp_path / 'out.json'}", *(["--own_data"] if own else [])]
  input_benchmark.main([*words, "--dataset=digits"])
  config = config_lib.from_json(reader.jobs[0]["config"])
  assert config.data.dataset.startswith("digits" if own else "folder:")
  assert ("generated" in capsys.readouterr().out) != own
  content = json.loads((tmp_path / "out.json").read_text())
  assert content["results"]["A"]["disk"]["times_the_step"] == pytest.approx(3)


def test_the_same_images_packed(monkeypatch, capsys, tmp_path):
  """Each kind in a process of its own, beside PyTorch on the folder; the four are one data set."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  with input_benchmark.generated(5, (8, 8, 1)) as folder:
    kinds = input_benchmark.pack(folder, tmp_path)
    prints = [open_source(DataConfig(dataset=dataset)).fingerprint for dataset in kinds.values()]
    assert len(kinds) == 4 and all(found == prints[0] for found in prints)
  machine, rates = fake.Machine(), {"folder": 100, "zip": 200, "webdataset": 300, "parquet": 400, "PyTorch": 50}
  made = {name: fake.Worker({"images": 5}, machine.run(name, rate)) for name, rate in rates.items()}
  monkeypatch.setattr(command, "workers", fake.workers(made))
  words = ["--images=4", "--rounds=1", "--packed", "--torch_python=python", f"--json={tmp_path / 'out.json'}"]
  input_benchmark.main([*words, "--image_size=8"])
  results = json.loads((tmp_path / "out.json").read_text())["results"]
  assert results["zip: disk"]["over"]["folder"][1] == pytest.approx(2)
  assert results["zip: disk, first pass"]["over"]["PyTorch"][1] == pytest.approx(4)
  assert "over" in results["PyTorch: disk"] and len(results) == 10
  read = {name: config_lib.from_json(worker.jobs[0]["config"]).data.dataset for name, worker in made.items()}
  assert [read[name].partition(":")[0] for name in rates] == ["folder", "zip", "webdataset", "parquet", "folder"]
  assert "PyTorch, cold" in capsys.readouterr().out
  for words in (["--packed", "--b="], ["--packed", "--own_data"], ["--torch_python=python"]):
    with pytest.raises(UserError):
      input_benchmark.main(words)


def test_what_pytorch_reads(monkeypatch, tmp_path):
  class Loader:
    def __init__(self, dataset, *, batch_size, **options):
      assert options == {"shuffle": True, "num_workers": 2, "persistent_workers": True}
      self.batches = [[dataset[i] for i in range(len(dataset))][s : s + batch_size] for s in range(0, 20, batch_size)]

    def __iter__(self):
      return iter(self.batches)

  with input_benchmark.generated(20, (8, 8, 1)) as folder:
    job = {"config": config_lib.to_json(tiny_config(dataset=f"folder:{folder}", image_size=8)), "workers": 2}
    with pytest.raises(UserError, match="torch_python: this Python has no torch"):
      torch_read.prepare(job)
    monkeypatch.setattr(torch_read.importlib, "import_module", lambda name: types.SimpleNamespace(DataLoader=Loader))
    facts, block = torch_read.prepare(job)
    assert facts["images"] == 20
    assert block("disk", 3)["images"] == 24  # of 16, the rest of the epoch, 16 and again the rest
    assert block("disk, first pass", 2)["images"] == 40


def test_no_images_at_all_are_refused():
  with pytest.raises(UserError, match="argument --images: invalid positive whole number value: '0'"):
    input_benchmark.main(["--images=0"])
