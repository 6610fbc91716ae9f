"""What JAX's options do to numbers: the precision of every product, options that are refused, keys that stay."""

import ast
import contextlib
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.checkpoint import resume
from ddpm_jax.data.encoded import DecodedRows
from ddpm_jax.data.sources import Source
from ddpm_jax.devices import make_mesh
from ddpm_jax.devices.batched import BatchedFn, BatchedLoop
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import evaluate as evaluate_lib
from ddpm_jax.evaluation.surroundings import Surroundings
from ddpm_jax.export.program import export_sampler
from ddpm_jax.keys import indexed_keys, stream_key
from ddpm_jax.runtime import numerics
from ddpm_jax.sampling.drawn import Drawn, settings
from ddpm_jax.training.setup import Run, build_run, make_train_step
from ddpm_jax.training.step import abstract_batch
from ddpm_jax.weights.load import Weights
from tests.training.tiny import IMAGE_SHAPE, tiny_config

PACKAGE = pathlib.Path(ddpm_jax.__file__).parent


class StopAfterLowering(Exception):
  pass


class Lowered:
  """Takes the place of a jitted function: keeps the StableHLO that it is lowered to, for a platform, and stops."""

  def __init__(self, jitted, platform: str, texts: list[str]):
    self.jitted, self.platform, self.texts = jitted, platform, texts

  def lower(self, *arguments):
    self.texts.append(self.jitted.trace(*arguments).lower(lowering_platforms=(self.platform,)).as_text())
    raise StopAfterLowering


def build(parallel: str = "fsdp", **changes) -> Run:
  config = tiny_config(parallel=parallel, sampler="ddim", sampling_steps=2, sample_batch_size=8, **changes)
  return build_run(config, IMAGE_SHAPE, make_mesh(parallel, matmul_precision=config.model.matmul_precision))


def weights_of(run: Run) -> Weights:
  return Weights(run, run.abstract_state.params, 5, "ema", "0" * 64)


def pictures() -> Source:
  images = np.random.default_rng(0).integers(0, 256, (8, *IMAGE_SHAPE), dtype=np.uint8)
  return Source("pictures", IMAGE_SHAPE, 8, DecodedRows(images, np.zeros(8, bool)).take, {"split": "train"}, None)


def training(run: Run, platform: str) -> str:
  step = run.mesh.compile(make_train_step(run), run.abstract_state)
  texts = []
  step._step = Lowered(step._step, platform, texts)
  with contextlib.suppress(StopAfterLowering):
    step.lower(run.abstract_state, *run.mesh.abstract_inputs(abstract_batch(IMAGE_SHAPE, 16)))
  return texts[0]


def rows_of(monkeypatch, platform: str, call) -> str:
  """What `call` lowers by `BatchedFn`, or of the loop of `BatchedLoop`."""
  texts: list[str] = []

  def recorded(init, name):
    def recording(self, *arguments, **options):
      init(self, *arguments, **options)
      setattr(self, name, Lowered(getattr(self, name), platform, texts))

    return recording

  with monkeypatch.context() as patch, contextlib.suppress(StopAfterLowering):
    patch.setattr(BatchedFn, "__init__", recorded(BatchedFn.__init__, "_jitted"))
    patch.setattr(BatchedLoop, "__init__", recorded(BatchedLoop.__init__, "_advance"))
    call()
  return texts[0]


def precisions(text: str) -> set[str]:
  """Of all products and convolutions of float32 in StableHLO; of bfloat16 the default loses nothing."""
  lines = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution|dot)\b", line)]
  of_float32 = [line for line in lines if "xf32>, tensor" in line.rpartition(" : ")[2]]
  assert of_float32
  stated = [re.findall(r"precision(?:_config)? = \[([^\]]*)\]", line) for line in of_float32]
  assert all(len(found) == 1 for found in stated), "a product that says nothing"
  return {word for (found,) in stated for word in re.findall(r"DEFAULT|HIGHEST|HIGH", found)}


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_every_product_is_of_the_precision_that_was_asked_for(platform, monkeypatch, tmp_path):
  """Training and drawing of that of the flag, whatever the process has set; bound and ODE float32 at the highest."""
  high, usual = build(matmul_precision="high"), build(dtype="bfloat16", likelihood_examples=8)
  around = Surroundings(tmp_path, lambda what: None, quiet=True)

  def drawing(run: Run) -> str:
    def draw():
      with contextlib.closing(Drawn(weights_of(run), run.config, tmp_path)) as drawn:
        drawn.draw(8, done=lambda number: None, say=lambda line: None)

    return rows_of(monkeypatch, platform, draw)

  def likelihood(name: str) -> str:
    arguments = name, usual.config, weights_of(usual), pictures(), around
    return rows_of(monkeypatch, platform, lambda: evaluate_lib._likelihood(*arguments))

  with jax.default_matmul_precision("float32"):
    texts = {
      ("training", "HIGH"): training(high, platform),
      ("drawing", "HIGH"): drawing(high),
      ("drawing in bfloat16", "DEFAULT"): drawing(usual),
    }
  texts |= {(name, "HIGHEST"): likelihood(name) for name in ("bound", "ode")}
  wrong = {name: found for (name, wanted), text in texts.items() if (found := precisions(text)) != {wanted}}
  assert not wrong
  assert {name for (name, _), text in texts.items() if "xbf16>" in text} == {"drawing in bfloat16"}


def test_an_exported_sampler_is_of_the_precision_that_was_asked_for():
  run = build("pmap", matmul_precision="highest", export_format="jax", export_platforms=("tpu",))
  assert precisions(export_sampler(run.config, weights_of(run), 2).mlir_module()) == {"HIGHEST"}


def test_checkpoints_and_draws_say_how_and_where_they_were_computed(monkeypatch):
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  run = build(matmul_precision="high", dtype="bfloat16")
  facts = json.loads(json.dumps(resume.facts(run, pictures())))
  assert facts["config"]["model"] | {"dtype": "bfloat16", "matmul_precision": "high"} == facts["config"]["model"]
  assert facts["surroundings"]["machine"] == "8 x cpu" and facts["surroundings"]["jax"] == jax.__version__
  assert facts["surroundings"]["environment"]["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
  told = settings(run.config, weights_of(run))
  assert told | {"dtype": "bfloat16", "matmul_precision": "high", "device": "cpu"} == told


OTHER_NUMBERS = {
  "JAX_ENABLE_X64": lambda: jax.enable_x64(True),
  "JAX_THREEFRY_PARTITIONABLE": lambda: jax.threefry_partitionable(False),
  "JAX_NUMPY_DTYPE_PROMOTION": lambda: jax.numpy_dtype_promotion("strict"),
  "JAX_DEFAULT_MATMUL_PRECISION": lambda: jax.default_matmul_precision("highest"),
}


def test_options_that_change_numbers_are_refused_in_one_line(monkeypatch):
  numerics.check_options("default")
  with jax.default_matmul_precision("highest"):
    numerics.check_options("highest")  # the environment and the flag say the same
  for variable, having in OTHER_NUMBERS.items():
    with (
      having(),
      pytest.raises(UserError, match=rf"^{variable}: [^\n]*; unset it in the environment(, or set the option)?$"),
    ):
      numerics.check_options("default")
  try:
    jax.config.update("jax_random_seed_offset", 1)
    with pytest.raises(UserError, match=r"^JAX_RANDOM_SEED_OFFSET: 1 "):
      numerics.check_options("default")
  finally:
    jax.config.update("jax_random_seed_offset", 0)


def test_pinned_is_as_in_a_process_that_set_nothing():
  def draw():
    keys = indexed_keys(stream_key(3, "sample"), jnp.arange(3))
    return jax.jit(jax.vmap(lambda key: jax.random.normal(key, (5,)) + np.ones(5, np.float32)))(keys)

  wanted = np.asarray(draw())
  with contextlib.ExitStack() as everything:
    for having in OTHER_NUMBERS.values():
      everything.enter_context(having())
    assert not np.array_equal(jax.random.normal(stream_key(3, "sample"), (5,)), jax.random.normal(jax.random.key(3), 5))
    with numerics.pinned("high"):
      got = np.asarray(draw())
      assert jax.config.jax_default_matmul_precision == "high"
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, wanted)


def test_keys_do_not_depend_on_the_default_implementation():
  def bits():
    keys = indexed_keys(stream_key(3, "sample"), jnp.arange(4))
    return np.asarray(jax.vmap(lambda key: jax.random.bits(key, (2,)))(keys))

  wanted = bits()
  with jax.default_prng_impl("rbg"):
    np.testing.assert_array_equal(bits(), wanted)


def test_every_key_names_its_implementation():
  unnamed = []
  for path in sorted(PACKAGE.rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
      if called in ("jax.random.key", "jax.random.PRNGKey") and "impl" not in {word.arg for word in node.keywords}:
        unnamed.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
  assert not unnamed


def test_a_run_of_the_last_release_is_of_the_default_precision():
  tree = json.loads(config_lib.to_json(tiny_config(matmul_precision="high")))
  del tree["model"]["matmul_precision"]
  assert config_lib.from_json(json.dumps(tree)) == tiny_config()
