"""Metrics elsewhere: what a person's class gets, and that nothing it does ends a run."""

import json
import pathlib
import re

import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.workdir import loggers
from ddpm_jax.workdir.loggers import Loggers, find

ROOT = pathlib.Path(__file__).parents[2]
PICTURE = np.zeros((4, 5, 3), np.uint8)


class Recorder:
  """Keeps what it gets."""

  made: list = []  # noqa: RUF012  of this class, on purpose

  def __init__(self, workdir, settings, resume_step):
    self.calls = [("init", workdir, settings, resume_step)]
    self.made.append(self)

  def scalars(self, step, values):
    self.calls.append(("scalars", step, values))

  def image(self, step, name, picture):
    self.calls.append(("image", step, name, picture.shape))

  def close(self):
    self.calls.append(("close",))


class Broken(Recorder):
  """Fails in every way, and changes what it is given."""

  def scalars(self, step, values):
    values.clear()
    raise ConnectionError("no route\nto host")

  def image(self, step, name, picture):
    raise SystemExit(3)

  def close(self):
    raise ZeroDivisionError


class NoStart:
  def __init__(self, *_):
    raise OSError(28, "No space left on device")


NO_CLASS = 3


def everything(names, capsys):
  """The lines about a run of two steps."""
  Recorder.made.clear()
  told = Loggers(find(names), pathlib.Path("run"), {"train": {"seed": 1}}, 7)
  for step in (10, 20):
    told.scalars(step, {"loss": 0.5})
    told.image(step, "samples", PICTURE)
  told.close()
  return capsys.readouterr().err.splitlines()


def test_a_class_of_ones_own(capsys):
  assert everything(["tensorboard", "tests.workdir.test_loggers:Recorder"], capsys) == []
  (recorder,) = _here().Recorder.made
  scalars, images = ([("scalars", s, {"loss": 0.5}), ("image", s, "samples", (4, 5, 3))] for s in (10, 20))
  assert recorder.calls == [("init", pathlib.Path("run"), {"train": {"seed": 1}}, 7), *scalars, *images, ("close",)]


def _here():
  """This module under the name by which it is imported."""
  import tests.workdir.test_loggers

  return tests.workdir.test_loggers


def test_whatever_fails_is_told_once_and_the_others_go_on(capsys):
  names = [f"tests.workdir.test_loggers:{name}" for name in ("Broken", "NoStart", "Recorder")]
  lines = everything(names, capsys)
  goes_on = "; the run goes on, and metrics.jsonl has everything"
  assert lines == [
    f"warning: writers: {__name__}:NoStart fails (OSError: [Errno 28] No space left on device){goes_on}",
    f"warning: writers: tests.workdir.test_loggers:Broken fails (ConnectionError: no route to host){goes_on}",
  ]
  assert len(_here().Recorder.made[-1].calls) == 6 and _here().Recorder.made[-1].calls[1][2] == {"loss": 0.5}


def test_names_of_nothing_are_one_line(tmp_path, monkeypatch):
  (tmp_path / "wrong_module.py").write_text("def f(:\n")
  (tmp_path / "failing_module.py").write_text("raise RuntimeError('at import')\n")
  (tmp_path / "script_module.py").write_text("import sys\nsys.exit(0)\n")
  (tmp_path / "wandb").mkdir()
  monkeypatch.syspath_prepend(tmp_path)
  for name, reason in (
    ("no_such_module:Class", "ModuleNotFoundError: No module named 'no_such_module'"),
    (
      "tests.workdir.test_loggers:Nothing",
      "AttributeError: module 'tests.workdir.test_loggers' has no attribute 'Nothing'",
    ),
    ("tests.workdir.test_loggers:NO_CLASS", "is a int and no class"),
    ("wrong_module:Class", "SyntaxError: "),
    ("failing_module:Class", "RuntimeError: at import"),
    ("script_module:Class", "SystemExit: 0"),
  ):
    with pytest.raises(UserError) as caught:
      find([name])
    text = str(caught.value)
    assert text.startswith("writers: ") and reason in text and "\n" not in text, text
  spec = loggers.importlib.util.find_spec("wandb")
  if spec is None or spec.origin is None:
    with pytest.raises(UserError, match=r"writers: wandb is not installed; pip install -e '\.\[wandb\]'"):
      find(["wandb"])


def test_a_run_keeps_its_identity_there(tmp_path):
  first = loggers._run_id(tmp_path / "wandb_id.txt")
  assert re.fullmatch(r"[0-9a-f]{32}", first) and loggers._run_id(tmp_path / "wandb_id.txt") == first


def test_the_class_in_the_documents(tmp_path, monkeypatch, capsys):
  text = (ROOT / "docs" / "guides" / "compare.md").read_text(encoding="utf-8")
  (code,) = re.findall(r"<!-- own-writer -->\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
  (tmp_path / "my_lines.py").write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  told = Loggers(find(["my_lines:Lines"]), tmp_path, {}, 0)
  told.scalars(5, {"loss": 0.25})
  told.scalars(5, {"evaluation/fid": 3.0})
  told.image(5, "samples", PICTURE)
  told.close()
  assert (tmp_path / "my_losses.txt").read_text() == "5 0.25\n" and capsys.readouterr().err == ""


def test_the_protocol_is_what_the_documents_have():
  assert json.dumps(sorted(n for n in vars(loggers.Logger) if not n.startswith("_"))) == '["close", "image", "scalars"]'
