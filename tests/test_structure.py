"""The direction of the imports, and what the package never does, read from its source."""

import ast
import graphlib
import pathlib
import re
import sys

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


def importers(*names: str) -> set[str]:
  """The files that import one of these, or something inside it."""
  return {
    file
    for file, tree in TREES.items()
    if any(found == name or found.startswith(name + ".") for found in imports(tree) for name in names)
  }


# Each room imports from rooms further down alone; those of one line do not import each other.
ROOMS = (
  ("command",),
  ("main", "api", "compare"),
  ("resolve",),
  ("runs",),
  ("report", "export", "plan"),
  ("evaluation",),
  ("sampling",),
  ("weights",),
  ("checkpoint",),
  ("training",),
  ("first_stage",),
  ("models", "data", "devices"),
  ("workdir",),
  ("flags",),
  ("runtime",),
  ("config", "presets"),
  ("keys",),
  ("errors",),
)
HEIGHT = {room: -row for row, rooms in enumerate(ROOMS) for room in rooms}


def room(name: str) -> str:
  """Of 'models/unet.py' or 'ddpm_jax.models.unet' it is 'models'."""
  return name.removeprefix("ddpm_jax.").replace("/", ".").removesuffix(".py").split(".")[0]


def test_imports_point_down():
  upward = [
    f"{file} -> {name}"
    for file in FILES
    if file != "__init__.py"
    for name in ours(file)
    if room(name) != room(file) and room(file) != "diffusion" and room(name) != "diffusion"
    if HEIGHT[room(file)] <= HEIGHT[room(name)]
  ]
  assert len(FILES) > 25 and not upward, upward


def test_some_rooms_know_little_else():
  """The mathematics knows arrays, networks know arrays and their own settings, the config the standard library."""
  bounds = {
    "diffusion": ({"diffusion"}, {"numpy", "jax", "chex"}),
    "models": ({"models", "diffusion", "config", "errors", "runtime"}, None),
    "config": ({"config", "errors"}, set()),
    "errors": (set(), set()),
    "report": ({"report", "evaluation", "config", "errors", "workdir"}, None),
  }
  found = []
  for file, tree in TREES.items():
    if room(file) in bounds:
      rooms, libraries = bounds[room(file)]
      third_party = {top(name) for name in imports(tree)} - set(sys.stdlib_module_names) - {"ddpm_jax"}
      strangers = third_party - libraries if libraries is not None else set()
      found += [f"{file} -> {name}" for name in {room(name) for name in ours(file)} - rooms | strangers]
  assert not found, found
  for below in ("ddpm_jax.config", "ddpm_jax.diffusion.denoiser", "ddpm_jax.runtime.cpu"):
    assert {file for file in FILES if room(file) == "models" and below in ours(file)} == {"models/build.py"}


def test_tuning_for_cpus_wraps_from_outside():
  """Behind one door, and its words stand nowhere but there and where it is opened."""
  inside = {file for file in FILES if file.startswith("runtime/cpu/")}
  users = {"models/build.py", "devices/mesh.py", "devices/pmap.py", "training/optimizer.py"}
  assert importers("ddpm_jax.runtime.cpu") - inside == users
  assert (
    len(inside) > 1 and not importers(*(module_name(file) for file in inside - {"runtime/cpu/__init__.py"})) - inside
  )
  words = re.compile(r"\bcpus?\b|packed|optimization_barrier|platform_dependent", re.IGNORECASE)
  read = [file for file in FILES if room(file) == "diffusion" or file in ("models/unet.py", "training/step.py")]
  assert not [file for file in read if words.search(FILES[file].read_text(encoding="utf-8"))]


def test_one_place_knows_the_strategies():
  """A strategy is chosen by its name in `devices.make_mesh`; what runs is asked by methods."""
  tests = {
    f"{file}:{node.lineno}"
    for file, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.Compare | ast.MatchValue)
    and {"pmap", "fsdp"} & {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
  }
  assert not tests, tests


def test_one_module_for_each_library_behind_a_wall():
  walls = {
    ("absl.flags", "absl.app"): {"main.py", "flags.py"},
    ("orbax",): {"checkpoint/checkpoint.py"},
    ("tensorboardX",): {"workdir/writers.py"},
    ("wandb",): {"workdir/loggers.py"},
    ("safetensors",): {"workdir/arrays.py", "weights/converted.py", "weights/tensors.py"},
    ("ddpm_jax.main",): {"command.py"},
  }
  found = {names: importers(*names) for names in walls}
  assert found == walls
  assert {room(file) for file in importers("flax.linen")} == {"models"}
  assert {room(file) for file in importers("grain", "tensorflow_datasets")} == {"data"}
  assert importers("ddpm_jax.runs") == {"main.py", "api.py"} | {
    file for file in importers("ddpm_jax.runs") if room(file) == "runs"
  }


def test_one_module_says_what_a_path_is():
  """There, `~nobody` becomes an error of one line."""
  texts = {file: ast.unparse(tree) for file, tree in TREES.items()}
  assert {file for file, text in texts.items() if "expanduser" in text} == {"runtime/paths.py"}


def test_what_nothing_imports():
  names = ("tensorflow", "torch", "benchmarks", "experiments", "tests", "utils")
  unpickle = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
  unpack = ("tarfile", "zipfile")
  assert not importers(*names, *unpickle)
  assert importers(*unpack) == {
    "evaluation/statistics.py",
    "data/originals.py",
    "data/shards.py",
    "data/targets.py",
    "data/zips.py",
  }
  found = {name for name in imports(TREES["evaluation/statistics.py"]) if top(name) in unpack}
  assert found == {"zipfile.BadZipFile"}, "an error of NumPy's, which reads npz files"


def test_the_benchmarks_stand_above_the_package():
  assert len(BENCHMARKS) > 10
  found = {file: imports(ALL_TREES[file]) for file in BENCHMARKS}
  assert all("ddpm_jax" in set(map(top, names)) for file, names in found.items() if file.endswith("_work.py"))
  assert not {name for names in found.values() for name in names if top(name) in ("tests", "experiments", "torch")}


def at_import(tree: ast.AST) -> set[str]:
  """What is imported with a module, and not only when one of its functions is called."""
  outside = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
  lazy = {id(part) for function in outside for part in ast.walk(function)}
  parts = [part for part in ast.walk(tree) if isinstance(part, ast.Import | ast.ImportFrom) and id(part) not in lazy]
  return {name for part in parts for name in imports(part)}


def test_a_worker_with_pytorch_needs_nothing_else():
  """It runs with another Python, which has no JAX."""
  todo, seen = ["benchmarks.torch_loop", "benchmarks.torch_read", "benchmarks.worker"], set()
  files = {
    name: file for name, file in MODULES.items() if name != "ddpm_jax"
  }  # its API is imported when it is asked for
  files |= {name.removesuffix(".py").replace("/", "."): name for name in BENCHMARKS}
  while todo:
    file = files.get(todo.pop(), "")
    if file and file not in seen:
      seen.add(file)
      found = at_import(ALL_TREES[file])
      assert {top(name) for name in found} <= set(sys.stdlib_module_names) | {"ddpm_jax", "benchmarks"}, file
      todo += sorted({name for each in found for name in (each, each.rpartition(".")[0])})
  assert {file for file in seen if not file.endswith("__init__.py")} == {
    *("benchmarks/torch_loop.py", "benchmarks/torch_read.py", "benchmarks/worker.py", "benchmarks/hardware.py"),
    *("config/config.py", "config/text.py", "config/sections.py", "config/option.py", "errors.py"),
    *("runtime/paths.py", "runtime/compilation.py", "runtime/hugepages.py"),
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
      if file not in ("runtime/console.py", "runtime/watcher.py") and (is_stream or writes):
        found.append(f"{file}:{node.lineno}")
  assert not found, f"call console.say, console.warn or console.note: {', '.join(found)}"


def test_no_cycle_at_import_time():
  graph = {}
  for module, file in MODULES.items():
    found = at_import(TREES[file])
    graph[module] = {name if name in MODULES else name.rpartition(".")[0] for name in found} & set(MODULES)
  assert graph["ddpm_jax.runs.train"] >= {"ddpm_jax.runtime.progress", "ddpm_jax.data.sources"}
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


def test_main_imports_a_run_only_when_it_starts():
  """So that a wrong flag is refused in a moment."""
  names = at_import(TREES["main.py"]) | at_import(TREES["resolve.py"])
  light = {"config", "flags", "resolve", "presets", "errors", "runtime", "workdir", "absl"}
  assert {room(name) for name in names if room(name) != "ddpm_jax"} <= light | set(sys.stdlib_module_names)
  assert "runs" in {room(name) for name in ours("main.py")}


def test_nothing_runs_text_unpickles_or_unpacks():
  found = []
  for file, tree in ALL_TREES.items():
    for node in ast.walk(tree):
      wrong = isinstance(node, ast.Attribute) and node.attr in ("extractall", "unpack_archive")
      if isinstance(node, ast.Call):
        wrong |= isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__")
        on = [word.arg for word in node.keywords if not (isinstance(word.value, ast.Constant) and not word.value.value)]
        wrong |= bool({"allow_pickle", "shell"} & set(on))
      if wrong:
        found.append(f"{file}:{node.lineno}")
  assert not found, found


def test_only_named_errors_are_caught():
  """But for the boundaries to others, who raise what they like: Pillow's decoders, and a person's own logger."""
  found = []
  for file, tree in ALL_TREES.items():
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)):
      caught = {"everything"} if node.type is None else {part.id for part in ast.walk(node.type) if hasattr(part, "id")}
      if caught & {"everything", "Exception", "BaseException"}:
        found.append((file, [function.name for function in functions if node in ast.walk(function)], node.lineno))
  boundaries = [
    ("data/images.py", ["_pillow"]),
    ("workdir/loggers.py", ["_imported"]),
    ("workdir/loggers.py", ["_try"]),
  ]
  assert [entry[:2] for entry in found] == boundaries, found


def test_every_module_says_what_it_is():
  assert not [file for file, tree in ALL_TREES.items() if not ast.get_docstring(tree)]
  vague = ("utils", "util", "helpers", "misc", "common")
  assert not [file for file in ALL_FILES if pathlib.PurePath(file).stem in vague]
