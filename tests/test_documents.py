"""The documents against the code: what they name exists, and what exists they name.

Links, anchors and names of functions in the manual are checked by its build, a stage of .ci/run.
"""

import ast
import functools
import pathlib
import re
import shlex
import subprocess

import jax
import pytest
from absl import flags as absl_flags

from ddpm_jax import api, errors, flags
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.models.build import build_model, init_params, num_params
from ddpm_jax.workdir import layout
from tests import test_structure

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "ddpm_jax"
PAGES = {
  path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
  for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
}
README, WORKSPACE = PAGES["README.md"], PAGES["WORKSPACE.md"]
OPTIONS = {field.name: field for _, field, _ in config_lib.options(Config())}

# Flags of other programs that the documents may mention.
OTHER_FLAGS = {
  *("output", "shard_size"),  # of ddpm_jax.data.inspect and ddpm_jax.data.pack
  *("flagfile", "help"),  # absl
  *("out",),  # ddpm_jax.compare
  *("require-hashes",),  # pip
  *("universal", "generate-hashes", "no-annotate", "extra", "output-file", "upgrade"),  # uv
  *("xla_force_host_platform_device_count", "xla_gpu_deterministic_ops", "xla_cpu_use_onednn"),  # XLA
  *("xla_backend_optimization_level",),
  *("dist",),  # pytest-xdist
  *("b", "models", "samplers", "images", "kinds", "model"),  # benchmarks
  *("rounds", "block_seconds", "own_data", "packed", "torch_python", "image_shape", "variants"),
  *("seeds",),  # experiments/launch/sweep.py
  *("font", "emoji_test"),  # experiments/make_emoji.py
  "qkv_order",  # experiments/convert_openai.py
  "rescale_timesteps",  # the same
  *("port", "logdir"),  # xprof, TensorBoard
  *("nodes", "ntasks-per-node", "gres", "time", "gpus-per-task", "signal"),  # Slurm
  *("tag", "build-arg", "rm", "user", "volume", "gpus", "shm-size"),  # Docker
}

# Height and channels of the images of the presets that do not resize them; those that do are in colour.
IMAGES = {"digits": (8, 1), "fashion_mnist": (28, 1), "cifar10": (32, 3), "imagenet64": (64, 3)}
IMAGES |= {"fashion_mnist_cond": (28, 1), "cifar10_cond": (32, 3)}
CLASSES = {"fashion_mnist_cond": 10, "emoji32_cond": 9}


def fenced(text: str) -> list[str]:
  """The contents of the fenced blocks."""
  return re.findall(r"^ *```\w*\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)


def marked(document: str, mark: str) -> str:
  """The block after the line <!-- mark -->: up to the end of its fence, or to the next empty line."""
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
  runs = re.compile(r"=runs/\w+/flags\.txt$")  # of a run that is not there: like that of the default
  places = [runs.sub("=experiments/digits.flags", argument) for argument in arguments]
  words = flags.expand_flagfiles([place.replace("=experiments/", f"={ROOT}/experiments/") for place in places])
  assert registry(["ddpm_jax.main", *words]) == ["ddpm_jax.main"]
  assert (
    registry["workdir"].value
    or registry["mode"].value in ("plan", "export")
    or registry["write_reference"].value
    or registry["version"].value
  )
  return registry["mode"].value, flags.given(registry)


def preset(path: pathlib.Path) -> Config:
  return config_lib.override(Config(), parse("--workdir=runs/x", f"--flagfile={path}")[1])


@functools.cache
def parameters(model, height: int, channels: int) -> int:
  shape = (height, height, channels)
  return num_params(jax.eval_shape(lambda key: init_params(build_model(model, shape), key, shape), jax.random.key(0)))


# All pages.


def test_flags_exist():
  known = {*OPTIONS, "workdir", "mode", "preset", "version"} | OTHER_FLAGS
  known |= {f"no{name}" for name, field in OPTIONS.items() if isinstance(field.default, bool)}
  known |= {"name", "noname"}  # how flags are written
  unknown = {page: names for page, text in PAGES.items() if (names := named_flags(text) - known)}
  assert not unknown


def test_commands_parse():
  commands = [(page, words) for page, text in PAGES.items() for words in programs(text)]
  assert len(commands) >= 30
  for page, words in commands:
    mode, given = parse(*words)
    if mode in ("train", "plan") or given.keys() & {"init_from", "write_reference"}:  # there may be no run yet
      config_lib.override(Config(), given)
    else:
      assert all(OPTIONS[name].metadata["may_change_once_trained"] for name in given), (page, words)


def test_tests_and_files_exist():
  missing = []
  for page, text in PAGES.items():
    for file, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
      path = ROOT / file
      tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
      if test not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
        missing.append(f"{page}: {file}::{test}")
    files = set(re.findall(r"`((?:ddpm_jax|tests|experiments|benchmarks|docs)/[\w/.-]+)`", text))
    if page == "docs/develop/add.md":  # its paths are those of the package
      files |= {f"ddpm_jax/{file}" for file in re.findall(r"`([a-z_]+/[\w/]+\.\w+)`", text) if file not in files}
    templates = re.compile(r"\b(NAME|KIND)\b|_(NAME|KIND)\b")
    missing += [f"{page}: {file}" for file in files if not templates.search(file) and not (ROOT / file).exists()]
  assert not missing, "\n".join(missing)


def test_no_page_is_unfinished_or_of_one_machine_or_wide():
  found = []
  for page, text in PAGES.items():
    found += [f"{page}: {left}" for left in re.findall(r"TODO.*", text)]
    found += [f"{page}: {path}" for path in re.findall(r"(?<![\w.])/(?:work|tmp|home|root|Users)\b", text)]
    found += [f"{page}: {line}" for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
  assert not found, "\n".join(found)


def test_links_of_the_root_lead_somewhere():
  targets = [
    target.partition("#")[0]
    for page, text in PAGES.items()
    if "/" not in page
    for target in re.findall(r"\]\(([^)]+)\)", text)
  ]
  local = [target for target in targets if not target.startswith("https://")]
  missing = [target for target in local if not (ROOT / target).is_file()]
  assert len(local) > 30 and not missing, missing


# README.md.


def test_the_readme_is_read_in_three_minutes():
  assert (ROOT / "README.md").stat().st_size <= 8192


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


# The manual.


def test_what_the_sampling_guide_names_may_be_given():
  named = named_flags(marked(PAGES["docs/guides/sample.md"], "sampling-flags"))
  sampling = {field.name for part, field, _ in config_lib.options(Config()) if part == "sample"}
  only_while_training = {"may_change": False, "may_change_once_trained": True}
  arithmetic = {name for name, field in OPTIONS.items() if field.metadata | only_while_training == field.metadata}
  assert named == sampling | {"variance"} | arithmetic


def test_the_tutorials_and_guides_name_all_of_a_model():
  examples = "\n".join(
    block
    for page, text in PAGES.items()
    if page.startswith(("docs/tutorials", "docs/guides"))
    for block in fenced(text)
  )
  used = set(re.findall(r"\bmodel\.(\w+)", examples))
  assert not {name for name in vars(api.Model) if not name.startswith("_")} - used


def test_every_preset_has_a_row_with_its_numbers():
  text = marked(PAGES["docs/guides/presets.md"], "presets")
  rows = dict(re.findall(r"^\| \[`\w+`\]\(\.\./reference/presets\.md#(\w+)\) (\|.*)$", text, re.MULTILINE))
  paths = {path.stem: path for path in (ROOT / "experiments").glob("*.flags")}
  assert set(rows) == set(paths)
  for name, path in paths.items():
    config, header = preset(path), path.read_text(encoding="utf-8")
    config = config_lib.override(config, {"num_classes": CLASSES[name]}) if name in CLASSES else config
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


def test_the_choices_of_a_model_are_all_explained():
  text = PAGES["docs/guides/settings.md"]
  settings = {field for part, field, _ in config_lib.options(Config()) if part in ("diffusion", "model", "optimizer")}
  missing = {field.name for field in settings if f"`--{field.name}`" not in text} - {"remat"}  # changes no model
  missing |= {
    choice
    for field in settings
    for choice in field.metadata["choices"]
    if field.name in ("beta_schedule", "prediction", "loss", "loss_weighting", "variance") and f"`{choice}`" not in text
  }
  assert not missing


def test_every_guide_is_in_the_index():
  index = PAGES["docs/guides/index.md"]
  guides = {page.rpartition("/")[2] for page in PAGES if page.startswith("docs/guides/")} | {"benchmarks.md"}
  assert set(re.findall(r"\]\((\w+\.md)", index)) == guides - {"index.md"}


def test_where_a_new_thing_goes_names_what_exists():
  """Functions, tables and fields; files are for `test_tests_and_files_exist`."""
  sources = [path.read_text(encoding="utf-8") for folder in (PACKAGE, ROOT / "tests") for path in folder.rglob("*.py")]
  known = set(re.findall(r"\w+", " ".join(sources)))
  named = set(re.findall(r"`(\w+)`", PAGES["docs/develop/add.md"]))
  assert len(named) > 30 and not {name for name in named if "NAME" not in name} - known


def test_everything_that_a_run_writes_is_explained():
  page = PAGES["docs/reference/workdir.md"]
  rows = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", marked(page, "workdir"), re.MULTILINE)
  named = {name for row in rows for name in re.findall(r"`([^/`]+)/?[^`]*`", row)}
  written = {re.sub(r"\\d\+", "P", name).replace("\\", "") for name in layout.WRITTEN.pattern.split("|")}
  assert named - {"wandb"} == written  # that folder is made by its library


def test_exit_codes_are_all_named():
  codes = re.findall(r"^\| (\d+|128 \+ n) \|", PAGES["docs/reference/exit_codes.md"], re.MULTILINE)
  assert codes == ["0", "1", "2", "3", "128 + n", "137"]
  kinds = {kind.__name__: kind.__doc__ or "" for kind in (errors.UserError, errors.RunError, errors.NonFiniteError)}
  assert {re.findall(r"exit code (\d)", text)[0] for text in kinds.values()} == {"1", "2", "3"}


def test_promises_name_their_tests():
  rows = marked(PAGES["docs/develop/promises.md"], "promises").splitlines()[2:]
  assert len(rows) >= 20
  for row in rows:
    assert re.fullmatch(r"\| \S.*\. \| `tests/[\w/]+\.py::test_\w+`(, `tests/[\w/]+\.py::test_\w+`)* \|", row), row


def test_every_promise_under_faults_has_a_test_or_an_attack_and_a_value():
  text = PAGES["docs/results/reliability.md"].partition("\n## ")[0]
  rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", text, re.MULTILINE)[2:]
  assert len(rows) >= 20
  for promise, test, value in rows:
    assert promise.endswith("."), promise
    assert re.search(r"`tests/[\w/]+\.py::test_\w+`", test), test
    assert re.search(r"\d|none|equal|refused", value), f"{promise}: {value}"


def test_the_lock_was_made_with_the_command_of_the_manual():
  (command,) = [block for block in fenced(PAGES["docs/develop/tests.md"]) if block.startswith("uv pip compile")]
  lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
  assert f"#    {' '.join(command.replace(chr(92), ' ').split())}\n" in lock


# WORKSPACE.md.


def test_the_tree_names_what_exists_and_every_room():
  tree, _ = fenced(WORKSPACE)
  named, folders = set(), []
  for line in tree.splitlines():
    row = re.fullmatch(r"( *)(\S+)(?: {2,}(\S.*))?", line)
    assert row, line
    depth, name = len(row[1]) // 2, row[2]
    assert row[3] or name == "ddpm_jax/", f"{name} says nothing"
    folders[depth:] = [name]
    named.add("".join(folders))
  assert not {path for path in named if not (ROOT / path).exists()}
  rooms = {f"ddpm_jax/{path.name}" for path in PACKAGE.glob("*.py") if path.name != "__init__.py"}
  rooms |= {f"ddpm_jax/{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
  assert {path for path in named if path.startswith("ddpm_jax/")} - {"ddpm_jax/"} == rooms


def test_the_import_direction_is_that_of_the_test():
  _, direction = fenced(WORKSPACE)
  assert tuple(tuple(line.split()) for line in direction.splitlines()) == test_structure.ROOMS
