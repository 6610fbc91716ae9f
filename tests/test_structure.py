"""The direction of the imports, and what the package never does, read from its source."""

import ast
import graphlib
import pathlib
import sys

import pytest

import ddpm_jax

ROOT = pathlib.Path(ddpm_jax.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def module_name(file: str) -> str:
  return ".".join(("ddpm_jax", *file.removesuffix(".py").removesuffix("__init__").rstrip("/").split("/"))).rstrip(".")


MODULES = {module_name(file): file for file in FILES}
BENCHMARKS = {f"benchmarks/{path.name}": path for path in sorted((ROOT.parent / "benchmarks").glob("*.py"))}
ALL_FILES = FILES | BENCHMARKS
ALL_TREES = TREES | {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in BENCHMARKS.items()}


def imports(node: ast.AST) -> set[str]:
  """Dotted names that a piece of code imports; of `from a import b` it is a.b, whatever b is."""
  found = set()
  for part in ast.walk(node):
    if isinstance(part, ast.Import):
      found |= {alias.name for alias in part.names}
    elif isinstance(part, ast.ImportFrom):
      assert part.level == 0, "imports are absolute"
      found |= {f"{part.module}.{alias.name}" for alias in part.names}
  return found


def top(name: str) -> str:
  return name.split(".")[0]


def ours(file: str) -> set[str]:
  """The modules of this package that a file imports."""
  found = {name for name in imports(TREES[file]) if top(name) == "ddpm_jax"}
  return {name if name in MODULES else name.rpartition(".")[0] for name in found} - {"ddpm_jax"}


def below(folder: str) -> list[str]:
  return [file for file in FILES if file.startswith(folder + "/")]


def importers(*names: str) -> set[str]:
  """The files that import one of these, or something inside it."""
  return {
    file
    for file, tree in TREES.items()
    if any(found == name or found.startswith(name + ".") for found in imports(tree) for name in names)
  }


def test_there_is_something_to_look_at():
  assert len(FILES) > 25
  assert ours("models/build.py") == {
    "ddpm_jax.config",
    "ddpm_jax.errors",
    "ddpm_jax.models.layers",
    "ddpm_jax.models.unet",
  }


@pytest.mark.parametrize("file", below("diffusion"))
def test_the_mathematics_knows_only_arrays(file):
  third_party = {top(name) for name in imports(TREES[file])} - set(sys.stdlib_module_names)
  assert third_party <= {"numpy", "jax", "chex", "ddpm_jax"}
  assert all(name.startswith("ddpm_jax.diffusion") for name in ours(file))


@pytest.mark.parametrize("file", below("models"))
def test_the_networks_know_only_arrays(file):
  others = {name for name in ours(file) if not name.startswith("ddpm_jax.models")}
  assert others <= ({"ddpm_jax.config", "ddpm_jax.errors"} if file == "models/build.py" else set())


def test_config_is_standard_library_only():
  for file in ("config.py", "sections.py", "knob.py", "errors.py"):
    assert {top(name) for name in imports(TREES[file]) if top(name) != "ddpm_jax"} <= set(sys.stdlib_module_names)
  assert ours("config.py") == {"ddpm_jax.sections", "ddpm_jax.knob", "ddpm_jax.errors"}
  assert importers("ddpm_jax.sections") == {"config.py"}


SERVICES = [
  "compilation",
  "console",
  "distributed",
  "flags",
  "grids",
  "keys",
  "lock",
  "metrics",
  "numerics",
  "paths",
  "plots",
  "progress",
  "stop",
  "terminal",
  "watchdog",
  "watcher",
]
FILING = ["loggers", "storage", "workdir", "writers"]


@pytest.mark.parametrize("name", [*SERVICES, *FILING])
def test_services_know_at_most_the_config_and_how_files_are_written(name):
  allowed = {"ddpm_jax.config", "ddpm_jax.console", "ddpm_jax.errors", "ddpm_jax.paths", "ddpm_jax.storage"}
  own = {
    "workdir": {"ddpm_jax.lock"},
    "distributed": {"ddpm_jax.watchdog"},
    "watchdog": {"ddpm_jax.watcher"},
    "writers": {"ddpm_jax.metrics"},
    "flags": {"ddpm_jax.presets"},
    "watcher": set(),
  }
  assert ours(f"{name}.py") <= allowed | own.get(name, set())


@pytest.mark.parametrize("file", below("data"))
def test_the_data_know_no_model(file):
  services = {"ddpm_jax.config", "ddpm_jax.console", "ddpm_jax.errors", "ddpm_jax.paths"}
  assert {name for name in ours(file) if not name.startswith("ddpm_jax.data")} <= services


def test_nothing_imports_main_and_only_main_starts_a_run():
  assert importers("ddpm_jax.main") == set()
  runs = (
    "ddpm_jax.sampling.run",
    "ddpm_jax.evaluation.run",
    "ddpm_jax.plan.run",
    "ddpm_jax.exchange.run",
    "ddpm_jax.training.loop.train",
  )
  assert importers(*runs) == {"main.py"}
  assert importers("ddpm_jax.training.loop") == {"main.py"}


@pytest.mark.parametrize("file", below("report"))
def test_the_report_is_made_of_files_alone(file):
  allowed = tuple(f"ddpm_jax.{name}" for name in ("report", "config", "errors", "grids", "metrics", "storage"))
  assert all(name.startswith(allowed) for name in ours(file))


@pytest.mark.parametrize("name", ["measures", "moments", "neighbours"])
def test_the_measures_know_only_numbers(name):
  assert ours(f"evaluation/{name}.py") <= {"ddpm_jax.grids"}


def test_one_module_for_each_library_behind_a_wall():
  assert importers("absl.flags", "absl.app") <= {"main.py", "flags.py"}
  assert importers("orbax") == {"training/checkpoint.py"}
  assert importers("tensorboardX") == {"writers.py"}
  assert importers("wandb") == {"loggers.py"}
  assert importers("flax.linen") <= set(below("models"))
  assert importers("grain", "tensorflow_datasets") <= set(below("data"))
  assert importers("safetensors") == {"evaluation/arrays.py", "evaluation/inception.py", "exchange/tensors.py"}


def test_one_module_says_what_a_path_is():
  """Where `~nobody` is told in one line."""
  texts = {file: ast.unparse(tree) for file, tree in TREES.items()}
  assert {file for file, text in texts.items() if "expanduser" in text} == {"paths.py"}


def test_what_nothing_imports():
  names = ("tensorflow", "torch", "benchmarks", "experiments", "tests", "utils")
  unpickle = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
  unpack = ("tarfile", "zipfile")
  assert importers(*names, *unpickle, *unpack) == {"evaluation/statistics.py"}
  found = {name for name in imports(TREES["evaluation/statistics.py"]) if top(name) in unpack}
  assert found == {"zipfile.BadZipFile"}, "an error of NumPy's, which reads npz files"


def test_the_benchmarks_stand_above_the_package():
  assert len(BENCHMARKS) > 10
  found = {file: imports(ALL_TREES[file]) for file in BENCHMARKS}
  assert all("ddpm_jax" in set(map(top, names)) for file, names in found.items() if file.endswith("_work.py"))
  assert not {name for names in found.values() for name in names if top(name) in ("tests", "experiments", "torch")}


def test_a_worker_with_pytorch_needs_nothing_else():
  """It runs with another Python, which has no JAX."""
  todo, seen = ["benchmarks.torch_loop", "benchmarks.worker"], set()
  while todo:
    file = todo.pop().replace(".", "/").removeprefix("ddpm_jax/") + ".py"
    if file in ALL_TREES and file not in seen:
      seen.add(file)
      outside = [node for node in ast.walk(ALL_TREES[file]) if isinstance(node, ast.FunctionDef)]
      lazy = {id(part) for function in outside for part in ast.walk(function)}
      found = set()
      for part in ast.walk(ALL_TREES[file]):
        if isinstance(part, ast.Import | ast.ImportFrom) and id(part) not in lazy:
          found |= imports(part)
      assert {top(name) for name in found} <= set(sys.stdlib_module_names) | {"ddpm_jax", "benchmarks"}, file
      todo += sorted({name for each in found for name in (each, each.rpartition(".")[0])})
  assert seen == {
    *("benchmarks/torch_loop.py", "benchmarks/worker.py", "benchmarks/hardware.py"),
    *("config.py", "sections.py", "knob.py", "errors.py", "paths.py", "compilation.py", "hugepages.py"),
  }


def test_only_the_console_prints():
  """And `watcher.py`, which is a program of its own: what is printed anywhere else may end a run, or hold it up."""
  streams = {"stdout", "stderr", "__stdout__", "__stderr__"}
  found = []
  for file, tree in TREES.items():
    for node in ast.walk(tree):
      is_stream = isinstance(node, ast.Attribute) and node.attr in streams and ast.unparse(node.value) == "sys"
      name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
      first = ast.unparse(node.args[0]) if isinstance(node, ast.Call) and node.args else ""
      writes = name in ("print", "tqdm.write") or (name == "os.write" and first in ("1", "2")) or "tqdm" in name
      if file not in ("console.py", "watcher.py") and (is_stream or writes):
        found.append(f"{file}:{node.lineno}")
  assert not found, f"call console.say, console.warn or console.note: {', '.join(found)}"


def test_no_cycle_at_import_time():
  graph = {}
  for module, file in MODULES.items():
    outside = [node for node in ast.walk(TREES[file]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lazy = {id(part) for function in outside for part in ast.walk(function)}
    found = set()
    for part in ast.walk(TREES[file]):
      if isinstance(part, ast.Import | ast.ImportFrom) and id(part) not in lazy:
        found |= imports(part)
    graph[module] = {name if name in MODULES else name.rpartition(".")[0] for name in found} & set(MODULES)
  assert graph["ddpm_jax.training.loop"] >= {"ddpm_jax.progress", "ddpm_jax.data.sources"}
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


def test_main_imports_a_run_only_when_it_starts():
  at_the_top = [node for node in TREES["main.py"].body if isinstance(node, ast.Import | ast.ImportFrom)]
  names = {name for node in at_the_top for name in imports(node)}
  heavy = (
    "ddpm_jax.training",
    "ddpm_jax.sampling",
    "ddpm_jax.evaluation",
    "ddpm_jax.plan",
    "ddpm_jax.exchange",
    "ddpm_jax.data",
    "ddpm_jax.models",
    "ddpm_jax.run",
  )
  assert not {name for name in names if name.startswith(heavy)}
  assert {top(name) for name in names} - set(sys.stdlib_module_names) <= {"absl", "ddpm_jax"}


@pytest.mark.parametrize("file", ALL_FILES)
def test_nothing_runs_text_unpickles_or_unpacks(file):
  for node in ast.walk(ALL_TREES[file]):
    assert not (isinstance(node, ast.Attribute) and node.attr in ("extractall", "unpack_archive")), node.lineno
    if isinstance(node, ast.Call):
      assert not (isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__")), node.lineno
      for keyword in node.keywords:
        on = not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
        assert not (keyword.arg in ("allow_pickle", "shell") and on), node.lineno


def test_only_named_errors_are_caught():
  """But for the boundaries to others, who raise what they like: Pillow's decoders, and a person's own logger."""
  found = []
  for file, tree in ALL_TREES.items():
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)):
      caught = {"everything"} if node.type is None else {part.id for part in ast.walk(node.type) if hasattr(part, "id")}
      if caught & {"everything", "Exception", "BaseException"}:
        found.append((file, [function.name for function in functions if node in ast.walk(function)], node.lineno))
  boundaries = [("data/images.py", ["_pillow"]), ("loggers.py", ["_imported"]), ("loggers.py", ["_tried"])]
  assert [entry[:2] for entry in found] == boundaries, found


@pytest.mark.parametrize("file", ALL_FILES)
def test_every_module_says_what_it_is(file):
  assert ast.get_docstring(ALL_TREES[file])
  assert pathlib.PurePath(file).stem not in ("utils", "util", "helpers", "misc", "common")
