import json

import pytest

from benchmarks import worker
from benchmarks.worker import Worker, last_words, serve
from ddpm_jax.errors import RunError, UserError


def test_the_first_line_is_the_job_and_each_other_one_a_block():
  answers = []

  def prepare(job):
    return {"ready": job["config"]}, lambda case, count: {"seconds": count * 2, "case": case}

  lines = [{"config": "x"}, {"case": "a", "count": 1}, {"case": "b", "count": 3}]
  serve(prepare, iter(map(json.dumps, lines)), answers.append)
  assert answers[0] == {"ready": "x"}
  assert answers[1:] == [{"case": "a", "seconds": 2}, {"case": "b", "seconds": 6}]


def test_what_a_worker_refuses_is_the_users_error():
  def prepare(job):
    raise UserError("batch_size: no")

  answers = []
  serve(prepare, iter(["{}"]), answers.append)
  assert answers == [{"refused": "batch_size: no"}]


def test_a_worker_runs_in_a_process_of_its_own_and_tells_how_it_died(tmp_path, monkeypatch):
  monkeypatch.setenv("SET_FOR_IT", "what the parent has")
  lines = ["import os", "print('what libraries print is no answer')", "raise ValueError(os.environ['SET_FOR_IT'])"]
  (tmp_path / "torch.py").write_text("\n".join(lines))
  own = Worker("A", "torch_loop", env={"PYTHONPATH": str(tmp_path), "SET_FOR_IT": "why"})
  try:
    with pytest.raises(RunError, match="the worker of A ended with exit code 1: ValueError: why"):
      own.prepare({})
  finally:
    own.close()


def test_last_words():
  assert last_words("Traceback\n  x\nValueError: why\n-----\nFor simplicity, JAX ...\n") == "ValueError: why"
  assert last_words("a\nErrors are rare\n") == "Errors are rare"
  assert last_words("\n") == "it said nothing"


def test_an_interpreter_that_is_not_there():
  with pytest.raises(UserError, match="cannot start '/nowhere/python'"):
    Worker("A", "step_work", python="/nowhere/python")


def test_children_do_not_find_compiled_programs():
  assert worker.ENVIRONMENT["JAX_ENABLE_COMPILATION_CACHE"] == "false"


def test_what_a_worker_refuses_reaches_the_user(tmp_path):
  (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(name='torch')")
  own = Worker("PyTorch", "torch_loop", env={"PYTHONPATH": str(tmp_path)})
  try:
    with pytest.raises(UserError, match="torch_python: this Python has no torch"):
      own.prepare({})
  finally:
    own.close()
