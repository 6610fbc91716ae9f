"""The examples in docstrings are true, and the mathematics, the first stage and the reference have some."""

import doctest
import importlib
import pkgutil

import ddpm_jax.diffusion
import ddpm_jax.first_stage


def test_examples_in_docstrings():
  failed, tried = [], {}
  for room in (ddpm_jax.diffusion, ddpm_jax.first_stage):
    for info in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
      report = []
      runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
      for example in doctest.DocTestFinder().find(importlib.import_module(info.name)):
        runner.run(example, out=report.append)
      tried[info.name] = runner.tries
      failed += report
  assert not failed, "".join(failed)
  assert all(tried.values()), f"without an example: {[name for name, number in tried.items() if not number]}"
