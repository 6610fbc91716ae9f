"""README.md and WORKSPACE.md against the code: what they name exists, and what exists they name.

Fails until the measured numbers and the pictures are in: no `TODO(` and no missing picture may stay.
"""

import ast
import fnmatch
import functools
import pathlib
import re
import shlex
import subprocess

import jax
import pytest
from absl import flags as absl_flags

from ddpm_jax import config as config_lib
from ddpm_jax import flags
from ddpm_jax.config import Config
from ddpm_jax.models.build import build_model, init_params, num_params

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "ddpm_jax"
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "WORKSPACE.md")}
README, WORKSPACE = DOCUMENTS.values()
OTHERS = (
  "SECURITY.md",
  *(
    f"docs/{name}.md"
    for name in ("derivatives", "learning_rate", "measuring", "own_images", "precision", "reliability")
  ),
  *(f"docs/{name}.md" for name in ("several_runs", "time_grids")),
)
PAGES = DOCUMENTS | {name: (ROOT / name).read_text(encoding="utf-8") for name in OTHERS}
KNOBS = {field.name: field for _, field, _ in config_lib.options(Config())}

# Flags of other programs that the documents may mention.
OTHER_FLAGS = {
  *("flagfile", "help"),  # absl
  *("out",),  # ddpm_jax.compare
  *("require-hashes",),  # pip
  *("universal", "generate-hashes", "no-annotate", "extra", "output-file", "upgrade"),  # uv
  *("xla_force_host_platform_device_count", "xla_gpu_deterministic_ops", "xla_cpu_use_onednn"),  # XLA
  *("dist",),  # pytest-xdist
  *("b", "models", "samplers", "images", "kinds", "model"),  # benchmarks
  *("seeds",),  # experiments/launch/sweep.py
  *("port",),  # xprof
}

# Height and channels of the images of the presets that do not resize them; those that do are in colour.
IMAGES = {"digits": (8, 1), "fashion_mnist": (28, 1), "cifar10": (32, 3)}


def section(document: str, heading: str) -> str:
  """The text between a heading and the next of its level."""
  found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", document, re.MULTILINE | re.DOTALL)
  assert found, f"no section {heading}"
  return found[1]


def fenced(text: str) -> list[str]:
  """The contents of the fenced blocks."""
  return re.findall(r"^ *```\w*\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)


def marked(document: str, mark: str) -> str:
  """What follows the line <!-- mark -->, to the next empty line outside of a fence or the end of the block."""
  found = re.findall(rf"^<!-- {mark} -->\n(```.*?^```$|.*?)(?=\n\n|\n?\Z)", document, re.MULTILINE | re.DOTALL)
  assert len(found) == 1, mark
  return found[0]


def named_flags(text: str) -> set[str]:
  return set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))


def programs(text: str) -> list[list[str]]:
  """The arguments of every `python -m ddpm_jax.main` in the fenced blocks and code spans of a text."""
  pieces = [line for block in fenced(text) for line in block.replace("\\\n", " ").splitlines()]
  pieces += re.findall(r"`([^`\n]+)`", text)
  found = []
  for piece in pieces:
    _, start, rest = piece.partition("python -m ddpm_jax.main")
    if start and rest.strip() != "--help":
      found.append(shlex.split(re.split(r" [&|;]", rest)[0], comments=True))
  return found


@functools.cache
def parse(*arguments: str) -> tuple[str, dict]:
  """(mode, options) of a command line, by a registry of its own."""
  registry = absl_flags.FlagValues()
  flags.define(registry)
  arguments = tuple(argument.replace("=experiments/", f"={ROOT}/experiments/") for argument in arguments)
  assert registry(["ddpm_jax.main", *arguments]) == ["ddpm_jax.main"]
  assert registry["workdir"].value or registry["mode"].value in ("plan", "export") or registry["write_reference"].value
  return registry["mode"].value, flags.given(registry)


def preset(path: pathlib.Path) -> Config:
  return config_lib.override(Config(), parse("--workdir=runs/x", f"--flagfile={path}")[1])


@functools.cache
def parameters(model, height: int, channels: int) -> int:
  shape = (height, height, channels)
  return num_params(jax.eval_shape(lambda key: init_params(build_model(model, shape), key, shape), jax.random.key(0)))


# Both documents.


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_left_to_be_measured(name):
  left = re.findall(r"TODO.*", PAGES[name])
  assert not left, "\n".join(left)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_pictures_lead_somewhere(name):
  targets = re.findall(r"\]\(([^)]+)\)", DOCUMENTS[name])
  local = [target for target in targets if not target.startswith("https://")]
  assert local
  missing = [target for target in local if not (ROOT / target).is_file()]
  assert not missing


@pytest.mark.parametrize("name", PAGES)
def test_flags_exist(name):
  switches = {f"no{option}" for option, field in KNOBS.items() if isinstance(field.default, bool)}
  names = {"workdir", "mode", "preset", "version"}
  unknown = named_flags(PAGES[name]) - set(KNOBS) - names - switches - OTHER_FLAGS
  assert not unknown


@pytest.mark.parametrize("name", PAGES)
def test_tests_and_files_exist(name):
  text = PAGES[name]
  for file, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"
  files = set(re.findall(r"`((?:ddpm_jax|tests|experiments)/[\w/.]+)`", text))
  files = {file for file in files if not re.search(r"\b(NAME|KIND)\b|_(NAME|KIND)\b", file)}
  assert not {file for file in files if not (ROOT / file).exists()}


@pytest.mark.parametrize("name", PAGES)
def test_lines_are_short(name):
  long = [line for line in PAGES[name].splitlines() if len(line) > 120 and not line.startswith("|")]
  assert not long  # a row of a table cannot be broken


@pytest.mark.parametrize("name", PAGES)
def test_no_path_of_one_machine(name):
  assert not re.findall(r"(?<![\w.])/(?:work|tmp|home|root|Users)\b", PAGES[name])


# README.md.


@pytest.mark.parametrize(
  ("mark", "ends"),
  [("train-command", "-m ddpm_jax.main --workdir=runs/digits"), ("test-command", "-m pytest -n 2 --dist loadfile")],
)
def test_marked_commands(mark, ends):
  (command,) = fenced(marked(README, mark))
  assert command.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install -e ")
  assert command.rstrip().endswith(ends)
  assert f"<!-- {mark} -->\n```bash\n{command}```\n" in README  # as .ci/run reads it
  subprocess.run(["bash", "-n", "-c", command], check=True)


def test_the_gate_reads_the_test_command():
  (command,) = fenced(marked(README, "test-command"))
  script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
  function = re.search(r"^test_command\(\) \{\n.*?^\}$", script, re.MULTILINE | re.DOTALL)
  assert function
  read = subprocess.run(
    ["bash", "-c", f"{function[0]}\ntest_command"], cwd=ROOT, check=True, capture_output=True, text=True
  )
  assert read.stdout == command


def test_commands_parse():
  commands = programs(README)
  assert len(commands) >= 8
  for words in commands:
    mode, given = parse(*words)
    if mode in ("train", "plan") or given.keys() & {"init_from", "write_reference"}:  # there may be no run yet
      config_lib.override(Config(), given)
    else:
      assert all(KNOBS[name].metadata["may_change"] for name in given), words


def test_what_the_sampling_section_names_may_be_given():
  named = named_flags(section(README, "Drawing samples")) - {"workdir", "mode"}
  sampling = {field.name for part, field, _ in config_lib.options(Config()) if part == "sample"}
  only_while_training = {"may_change": False, "may_change_once_trained": True}
  arithmetic = {name for name, field in KNOBS.items() if field.metadata | only_while_training == field.metadata}
  assert named == sampling | {"variance"} | arithmetic


def test_every_flag_is_in_a_group():
  rows = re.findall(r"^\| (\w+) \| `(.*)` \|$", marked(README, "flags"), re.MULTILINE)
  groups = {}
  for group, names in rows:
    groups.setdefault(group, []).extend(names.removeprefix("--").split(" --"))
  wanted = {"run": ["workdir", "mode", "preset", "flagfile", "version"]}
  for group, field, _ in config_lib.options(Config()):
    wanted.setdefault(group, []).append(field.name)
  assert groups == wanted


def test_every_preset_has_a_row_with_its_numbers():
  text = section(README, "Presets")
  rows = dict(re.findall(r"^\| \[`\w+`\]\(experiments/(\w+)\.flags\) (\|.*)$", text, re.MULTILINE))
  paths = {path.stem: path for path in (ROOT / "experiments").glob("*.flags")}
  assert set(rows) == set(paths)
  for name, path in paths.items():
    config, header = preset(path), path.read_text(encoding="utf-8")
    height, channels = IMAGES.get(name, (config.data.image_size, 3))
    cells = [cell.strip() for cell in rows[name].strip("|").split("|")]
    assert f"{height}x{height}" in cells[0]
    stated = re.search(r"([\d,]+) parameters", header)  # held by tests/models/test_unet.py
    assert cells[1] == (stated[1] if stated else f"{parameters(config.model, height, channels):,}")
    assert cells[2] == f"{config.train.num_steps:,} x {config.data.batch_size}"
    published = re.search(r"Published result: (?:samples, )?((?:no )?FID(?: [\d.]*\d)?|none)", header)
    assert published
    assert cells[3] == published[1]
    hours = re.search(r"([\d.]+) hours\s(?:#\s*)*for", header)
    assert not hours or cells[4] == f"TPU v3-8: {hours[1]} hours"


def test_promises_name_their_tests():
  rows = marked(README, "promises").splitlines()[2:]
  assert len(rows) >= 20
  for row in rows:
    assert re.fullmatch(r"\| \S.*\. \| `tests/[\w/]+\.py::test_\w+`(, `tests/[\w/]+\.py::test_\w+`)* \|", row), row


def test_exit_codes_are_all_named():
  codes = re.findall(r"^\| (\d|128 \+ n) \|", section(README, "All flags"), re.MULTILINE)
  assert codes == ["0", "1", "2", "3", "128 + n"]


def test_every_promise_under_faults_has_a_test_or_an_attack_and_a_value():
  rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", PAGES["docs/reliability.md"].partition("\n## ")[0], re.MULTILINE)[
    2:
  ]
  assert len(rows) >= 20
  for promise, test, value in rows:
    assert promise.endswith("."), promise
    assert re.search(r"`tests/[\w/]+\.py::test_\w+`", test), test
    assert re.search(r"\d|none|equal|refused", value), f"{promise}: {value}"


# WORKSPACE.md.


def test_the_tree_names_what_exists_and_every_module():
  named, folders = set(), []
  for line in fenced(section(WORKSPACE, "Tree"))[0].splitlines():
    row = re.fullmatch(r"( *)(\S+)(?: {2,}(\S.*))?", line)
    assert row, line
    depth, name = len(row[1]) // 2, row[2]
    assert row[3] or name == "ddpm_jax/", f"{name} says nothing"
    folders[depth:] = [name]
    path = "".join(folders)
    assert path not in named
    named.add(path)
  missing = {path for path in named if not list(ROOT.glob(path))}
  assert missing <= {"docs/"} and ("docs/" not in missing or not (ROOT / "docs").exists())
  modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
  folders = {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in PACKAGE.rglob("__init__.py")}
  assert {path for path in named if path.startswith("ddpm_jax/")} == modules | folders


def test_imports_point_down_the_list():
  lines = [line.split() for line in fenced(section(WORKSPACE, "Import direction"))[0].splitlines()]
  files = {
    path.relative_to(PACKAGE).as_posix().removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
  }
  packages = {name for name in files if (PACKAGE / name).is_dir()}  # data/digits is a package with code in it
  level = {}
  for name in files:
    levels = [i for i, patterns in enumerate(lines) if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    assert len(levels) == 1 or (name in packages and not levels), f"{name} stands in {len(levels)} lines"
    level[name] = levels[0] if levels else None
  for patterns in lines:
    for pattern in patterns:
      assert fnmatch.filter(files, pattern), f"{pattern} is no module"
  for name, path in files.items():
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "ddpm_jax":
        base = str(node.module).removeprefix("ddpm_jax").removeprefix(".")
        for alias in node.names:
          found = ".".join(filter(None, [base, alias.name]))
          found = found if found in files else base
          assert level[found] >= level[name], f"{name} imports {found}, which stands above it"


def test_what_may_change_is_what_the_code_says():
  may_change = {name for name, field in KNOBS.items() if field.metadata["may_change"]}
  table = marked(WORKSPACE, "may-change")
  assert set(re.findall(r"`(\w+)`", table)) == may_change
  groups = {field.name for part, field, _ in config_lib.options(Config()) if part in ("sample", "evaluate", "plan")}
  assert named_flags(marked(README, "may-change")) == may_change - groups
  assert groups <= may_change  # README.md says so of the three groups as a whole


def test_the_lock_was_made_with_the_command_of_this_page():
  (command,) = [block for block in fenced(WORKSPACE) if block.startswith("uv pip compile")]
  lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
  assert f"#    {' '.join(command.replace(chr(92), ' ').split())}\n" in lock
