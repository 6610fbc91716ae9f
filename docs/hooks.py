"""The generated part of the manual: reference pages from the code, files of the root, links from flags to theirs."""

from __future__ import annotations

import pathlib
import posixpath
import re
from typing import Any

from absl import flags as absl_flags
from mkdocs.structure.files import File

from ddpm_jax import config as config_lib
from ddpm_jax import flags, presets
from ddpm_jax.config import Config

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = "reference/flags.md"

# Flags of the command itself; the last two are absl's own.
COMMAND = ("workdir", "mode", "preset", "version", "flagfile", "help")

# Pages that are files of the root or of the benchmarks.
INCLUDED = {
  "reference/security.md": "SECURITY.md",
  "develop/contributing.md": "CONTRIBUTING.md",
  "develop/changelog.md": "CHANGELOG.md",
  "guides/benchmarks.md": "benchmarks/README.md",
}

# Room -> page of the API with all its modules.
ROOMS = ("diffusion", "models", "first_stage", "training")


def on_files(files: Any, config: Any) -> Any:
  """Adds the generated pages."""
  pages = {FLAGS: flags_page(), "reference/may_change.md": may_change_page(), "reference/presets.md": presets_page()}
  pages |= {f"reference/api/{room}.md": api_page(room) for room in ROOMS}
  pages |= {page: included(page, ROOT / name) for page, name in INCLUDED.items()}
  for name, text in pages.items():
    files.append(File.generated(config, name, content=text))
  return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
  """Links each code span that is one flag of the program to its entry in the reference."""
  names = {*config_lib.values(Config()), *COMMAND}
  here = page.file.src_uri
  target = posixpath.relpath(FLAGS, posixpath.dirname(here)) if here != FLAGS else ""

  def link(match: re.Match) -> str:
    name = match[2] if match[2] in names else match[2].removeprefix("no")
    return f"[`{match[1]}`]({target}#{name})" if name in names else match[0]

  blocks = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.MULTILINE | re.DOTALL)
  for number, block in enumerate(blocks):
    if not block.lstrip().startswith("```"):
      lines = block.split("\n")
      span = r"(?<![\[`])`(--(\w+)(?:=[^`\s]*)?)`(?!`)"
      blocks[number] = "\n".join(line if line.startswith("#") else re.sub(span, link, line) for line in lines)
  return "".join(blocks)


def flags_page() -> str:
  """Every flag with its type, default, range, and when it may change."""
  registry = absl_flags.FlagValues()
  flags.define(registry)
  groups: dict[str, list[str]] = {"command": [*COMMAND]}
  text: dict[str, list[str]] = {"command": ["Which run, and what to do with it."]}
  for name in COMMAND[:4]:
    default = registry[name].default
    text["command"] += entry(name, f"default `{default}`" if default else "default empty", spans(registry[name].help))
  text["command"] += entry(
    "flagfile",
    "default empty",
    (
      "A text file of flags, one a line. Flags on the command line take precedence over it, wherever they stand; of "
      "two files the later one."
    ),
  ) + entry("help", "default `false`", "Lists all flags.")
  for section, field, default in config_lib.options(Config()):
    part = getattr(Config(), section)
    groups.setdefault(section, []).append(field.name)
    text.setdefault(section, [type(part).__doc__ or ""])
    text[section] += entry(field.name, facts(field, default), spans(field.metadata["help"]))
  head = [
    boost(4),
    "# Flags",
    "Flags are written `--name=value`; of a boolean, `--name` is true and `--noname` false. Each is also a key of "
    "`config.json` in the [workdir](workdir.md). `python -m ddpm_jax.main --help` prints this list.",
    "| group | flags |\n|---|---|",
  ]
  head[3] += "".join(
    f"\n| [{group}](#{group}) | {' '.join(f'[`{name}`](#{name})' for name in names)} |"
    for group, names in groups.items()
  )
  body = [line for group in groups for line in (f"## {group} {{#{group}}}", *text[group])]
  return "\n\n".join([*head, *body]) + "\n"


def boost(factor: float) -> str:
  """Metadata of a page by which the search ranks it."""
  return f"---\nsearch: {{boost: {factor}}}\n---"


def entry(name: str, facts: str, help: str) -> list[str]:
  return [f"### `--{name}` {{#{name}}}", f"{facts}\n{{.meta}}", help]


def facts(field: Any, default: Any) -> str:
  """Type, default, range and permanence of an option, in one line."""
  rules = field.metadata
  kind = {"str": "text", "int": "integer", "float": "number", "bool": "boolean", "tuple": "list"}[
    type(default).__name__
  ]
  parts = [kind, f"default `{config_lib.flag_text(default)}`" if default not in ("", ()) else "default empty"]
  if rules["choices"]:
    parts.append("one of " + ", ".join(f"`{choice}`" for choice in rules["choices"]))
  words = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
  parts += [f"{word} {rules[name]:,}" for name, word in words.items() if rules[name] is not None]
  parts.append(permanence(field))
  return "; ".join(parts)


def permanence(field: Any) -> str:
  if field.metadata["may_change"]:
    return "may change on resume"
  return "fixed while training, may change afterwards" if field.metadata["may_change_once_trained"] else "fixed"


def spans(help: str) -> str:
  """A help text with its flags and quoted values as code spans."""
  help = re.sub(r"^<[\w|]+>: ", "", help)  # what absl puts before the help of an enum
  help = re.sub(r"(?<![\w`])(--[a-z_]+(?:=[\w./{}-]*\w)?)", r"`\1`", help)
  help = re.sub(r"(?<!\w)'([^' ][^']*?)'(?!\w)", r"`\1`", help).replace("<", "&lt;")
  return re.sub(r"docs/([\w/]+\.md)", r"[docs/\1](../\1)", help)


def may_change_page() -> str:
  """Which flags a resumed run may change, by section."""
  rows: dict[str, dict[str, list[str]]] = {}
  for section, field, _ in config_lib.options(Config()):
    rows.setdefault(section, {}).setdefault(permanence(field), []).append(f"`--{field.name}`")
  kinds = ("may change on resume", "fixed while training, may change afterwards", "fixed")
  body = "".join(
    f"\n| {section} | {' | '.join(' '.join(found.get(kind, [])) for kind in kinds)} |"
    for section, found in rows.items()
  )
  return (
    "# What may change on resume\n\n"
    "A flag that is fixed keeps the value that the run began with. A command with another value is refused in one line "
    "with both values, and nothing is written: [Why a run was refused](../guides/refused.md). *Afterwards*: sampling, "
    "evaluating and exporting a sampler may use another value than training did.\n\n"
    f"| section | may change | afterwards only | fixed |\n|---|---|---|---|{body}\n\n"
    "`--allow_data_change`, `--profile_steps` and classes of your own in `--writers` hold for one command and are not "
    "taken up again. Own images may move, and be packed or unpacked (`--dataset=folder:PATH`, `zip:PATH`, "
    "`webdataset:GLOB`, `parquet:PATH`): whether they are the same is checked by their fingerprint. With "
    "`--mode=plan` everything may differ, as nothing is trained.\n"
  )


def presets_page() -> str:
  """Each preset as its file has it."""
  text = [
    "# Presets",
    "Each preset is a flagfile of the package: the header with data, hardware, time and published result, then every "
    "setting that it states. How to use them: [Choose a preset](../guides/presets.md).",
  ]
  for name in presets.names():
    contents = pathlib.Path(presets.path(name)).read_text(encoding="utf-8")
    text += [f"## {name}", f"```text\n{contents}```"]
  return "\n\n".join(text) + "\n"


def api_page(room: str) -> str:
  """The public names of all modules in a folder of the package."""
  folder = ROOT / "ddpm_jax" / room
  modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(folder.rglob("*.py"))]
  blocks = [f"::: {module}" for module in modules if not module.endswith("__init__")]
  return f"{boost(0.5)}\n\n# ddpm_jax.{room}\n\n" + "\n\n".join(blocks) + "\n"


def included(page: str, path: pathlib.Path) -> str:
  """A file outside of docs/, with its links into docs/ as they are from `page`."""
  up = posixpath.relpath(".", posixpath.dirname(page))

  def link(match: re.Match) -> str:
    place = posixpath.normpath(posixpath.join(path.parent.relative_to(ROOT).as_posix(), match[1]))
    return f"]({posixpath.join(up, place.removeprefix('docs/'))}" if place.startswith("docs/") else match[0]

  return re.sub(r"\]\(((?!https?:)[^)#]+)", link, path.read_text(encoding="utf-8"))
