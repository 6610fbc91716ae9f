"""The FID's InceptionV3 against pytorch-fid's, block by block, with random weights.

The numbers are those of tests/evaluation/make_inception_golden.py, in float64 PyTorch.
"""

import jax
import numpy as np
import pytest

from ddpm_jax.models.inception import InceptionV3, tensor_shapes, variables_of
from tests.evaluation import make_inception_golden as golden

BLOCKS = (
  *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
  *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
  *("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)


@pytest.fixture(scope="module")
def expected():
  with np.load(golden.GOLDEN) as file:
    return dict(file)


@pytest.fixture(scope="module")
def shapes():
  return tensor_shapes()


@pytest.fixture(scope="module")
def run(shapes):
  """Features, logits, and what each block says of itself, of one run with all blocks."""
  tensors = {name: golden.random_tensor(name, shape) for name, shape in shapes.items()}

  @jax.jit
  def forward(variables, x):
    def blocks(module, _):
      return len(module.path) == 1

    return InceptionV3().apply(variables, x, capture_intermediates=blocks, mutable=["intermediates"])

  (features, logits), state = jax.device_get(forward(variables_of(tensors), golden.network_input()))
  blocks = {name: golden.summary(name, calls["__call__"][0]) for name, calls in state["intermediates"].items()}
  return tensors, features, logits, blocks


def difference(actual, expected):
  """The largest one, relative to the size of the numbers."""
  assert actual.shape == expected.shape
  return np.max(np.abs(actual - expected)) / np.sqrt(np.mean(expected**2))


def test_the_network_has_the_published_number_of_parameters(shapes):
  """torchvision documents 27,161,264 for 1,000 classes with an auxiliary head, which has 3,326,696."""
  learned = [np.prod(shape) for name, shape in shapes.items() if "running" not in name]
  assert sum(learned) == 27_161_264 - 3_326_696 + 8 * 2049
  assert len(shapes) == 472
  assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
  assert shapes["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7)
  assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
  assert shapes["fc.weight"] == (1008, 2048)


def test_the_random_weights_are_those_of_the_golden_numbers(run, expected):
  assert golden.tensors_sha256(run[0]).encode() == expected["weights"].tobytes()


@pytest.mark.parametrize("name", BLOCKS)
def test_each_block_is_that_of_the_reference(name, run, expected):
  assert difference(run[3][name], expected[f"block/{name}"]) < 2e-5


def test_features_and_logits_are_those_of_the_reference(run, expected):
  _, features, logits, blocks = run
  assert set(blocks) == {*BLOCKS, "fc"}
  assert difference(features, expected["features"]) < 2e-5
  assert difference(logits, expected["logits"]) < 2e-5
  assert difference(features[0], expected["features"][1]) > 0.1


def test_without_the_output_bias_nothing_else_changes(run):
  """For the Inception Score."""
  tensors, features, logits, _ = run
  bound = InceptionV3(output_bias=False)
  x = jax.ShapeDtypeStruct((2, 299, 299, 3), np.float32)
  variables = jax.eval_shape(bound.init, jax.random.key(0), x)
  assert set(variables["params"]["fc"]) == {"kernel"}
  assert difference(features @ tensors["fc.weight"].T, logits - tensors["fc.bias"]) < 1e-5
