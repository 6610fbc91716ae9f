"""From pixels to the FID's features: resizing against PyTorch and clean-fid, weights that are refused, batches."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ddpm_jax.devices import make_mesh
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import inception
from ddpm_jax.models.inception import tensor_shapes
from ddpm_jax.weights import converted
from tests.evaluation import make_inception_golden as golden

SOURCE = "0" * 64
TINY = {"Conv2d_1a_3x3.conv.weight": (2, 3, 3, 3), "Conv2d_1a_3x3.bn.running_var": (2,), "fc.bias": (5,)}


def converter():
  path = pathlib.Path(__file__).parents[2] / "experiments" / "convert_inception.py"
  spec = importlib.util.spec_from_file_location("convert_inception", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


convert_inception = converter()


def random_tensors(shapes):
  return {name: golden.random_tensor(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def expected():
  with np.load(golden.GOLDEN) as file:
    return dict(file)


@pytest.fixture(scope="module")
def mesh():
  return make_mesh("fsdp")


# Resizing


@pytest.mark.parametrize("size", golden.LINES)
@pytest.mark.parametrize("resize", ["fid", "clean"])
def test_a_line_is_resized_as_by_the_reference(resize, size, expected):
  """Both axes in turn, to a few roundings of float32 in [-1, 1]."""
  line = golden.random_images(1, size, 1)
  down = inception.preprocess(jnp.asarray(line), resize)
  across = inception.preprocess(jnp.asarray(line.swapaxes(1, 2)), resize)
  assert down.shape == across.shape == (1, 299, 299, 3)
  assert down.dtype == np.float32
  want = expected[f"{resize}/line/{size}"]
  np.testing.assert_allclose(down[0, :, 17, 0], want, rtol=0, atol=1e-6)
  np.testing.assert_allclose(across[0, 255, :, 0], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), golden.PICTURES)
@pytest.mark.parametrize("resize", ["fid", "clean"])
def test_a_picture_is_resized_as_by_the_reference(resize, height, width, expected):
  picture = golden.random_images(1, height, width)
  result = golden.pixels_at(f"{height}x{width}", np.asarray(inception.preprocess(jnp.asarray(picture), resize))[0])
  np.testing.assert_allclose(result, expected[f"{resize}/picture/{height}x{width}"], rtol=0, atol=1e-6)


def test_matrices_are_averages_and_leave_full_size_alone():
  for resize in ("fid", "clean"):
    for size in (1, 2, 17, 298, 300, 1024):
      np.testing.assert_allclose(inception.resize_matrix(resize, size).sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(inception.resize_matrix(resize, 299), np.eye(299), rtol=0, atol=1e-12)
  with pytest.raises(ValueError, match="nearest"):
    inception.resize_matrix("nearest", 32)


@pytest.mark.parametrize(("resize", "black", "white"), [("fid", -1.0, 1.0), ("clean", -1.0, 127 / 128)])
def test_range_and_grey(resize, black, white):
  grey = np.stack([np.zeros((4, 6, 1)), np.full((4, 6, 1), 255)]).astype(np.uint8)
  result = np.asarray(inception.preprocess(jnp.asarray(grey), resize))
  assert result.shape == (2, 299, 299, 3)
  np.testing.assert_allclose(result[0], black, atol=1e-6)
  np.testing.assert_allclose(result[1], white, atol=1e-6)
  image = golden.random_images(2, 9, 7, 1)
  np.testing.assert_allclose(
    inception.preprocess(jnp.asarray(image), resize),
    inception.preprocess(jnp.asarray(image.repeat(3, axis=-1)), resize),
    atol=1e-6,
  )


# Batches


class StandIn:
  """Takes the place of the network: the mean of each channel, and three classes."""

  def __init__(self, output_bias):
    assert not output_bias

  def apply(self, variables, x):
    features = jnp.mean(x, axis=(1, 2)) * variables["scale"][None]
    return features, features - 1.0


@pytest.fixture
def stand_in(monkeypatch, mesh):
  """resize -> extractor with a network of no cost."""
  monkeypatch.setattr(inception, "InceptionV3", StandIn)
  monkeypatch.setattr(inception, "variables_of", lambda tensors: {"scale": tensors["scale"]})
  monkeypatch.setattr(inception, "NUM_FEATURES", 3)
  monkeypatch.setattr(inception, "NUM_CLASSES", 3)
  weights = inception.Weights({"scale": np.float32([1, 2, 3])}, "d" * 64, SOURCE)
  monkeypatch.setattr(inception, "read_weights", lambda path: weights)

  def make(resize="fid", batch_size=16):
    return inception.load_inception("weights.safetensors", resize, mesh, batch_size)

  return make


@pytest.mark.parametrize("number", [0, 1, 16, 21])
def test_any_number_of_images(stand_in, number):
  images = golden.random_images(21, 6, 5)
  features, probabilities = stand_in().extract(images[:number])
  assert features.shape == probabilities.shape == (number, 3)
  assert features.dtype == probabilities.dtype == np.float32
  x = inception.preprocess(jnp.asarray(images), "fid")
  want = np.asarray(x, np.float64).mean(axis=(1, 2)) * [1, 2, 3]
  np.testing.assert_allclose(features, want[:number], rtol=0, atol=1e-5)
  softmax = np.exp(want) / np.exp(want).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(probabilities, softmax[:number], rtol=0, atol=1e-5)


def test_grey_images_are_extracted_and_others_refused(stand_in):
  extract = stand_in("clean", 8).extract
  grey = golden.random_images(2, 6, 5, 1)
  np.testing.assert_allclose(extract(grey).features, extract(grey.repeat(3, axis=-1)).features, rtol=0, atol=1e-5)
  with pytest.raises(UserError, match=r"^features: .* 1 or 3 channels, not 4"):
    extract(golden.random_images(2, 6, 5, 4))
  with pytest.raises(ValueError, match="float32"):
    extract(np.zeros((1, 6, 5, 3), np.float32))


def test_what_an_extractor_says_of_itself(stand_in):
  fid, clean = stand_in("fid"), stand_in("clean")
  assert fid.name == clean.name == "inception"
  assert fid.about == {"resize": "fid", "source_sha256": SOURCE}
  assert fid.identity == stand_in("fid", 8).identity != clean.identity
  assert len(bytes.fromhex(fid.identity)) == 32


def test_identity_is_that_of_the_weights(stand_in, monkeypatch):
  before = stand_in().identity
  other = inception.Weights({"scale": np.float32([1, 2, 3])}, "e" * 64, SOURCE)
  monkeypatch.setattr(inception, "read_weights", lambda path: other)
  assert stand_in().identity != before


# Weights


def test_weights_and_network_together_are_those_of_the_reference(tmp_path, mesh, expected):
  """The whole network once: converter, reader, pixels, features, probabilities without the output bias."""
  path = tmp_path / "inception.safetensors"
  convert_inception.write(random_tensors(tensor_shapes()), SOURCE, path)
  extractor = inception.inception_features(inception.read_weights(str(path), SOURCE), "fid", mesh, batch_size=8)
  image, others = golden.random_images(1, *golden.END_TO_END), golden.random_images(7, *golden.END_TO_END) // 2
  found = extractor.extract(np.concatenate([others[:5], image, others[5:]]))
  np.testing.assert_allclose(found.features[5], expected["end_to_end/features"][0], rtol=2e-5, atol=2e-5)
  np.testing.assert_allclose(found.probabilities[5], expected["end_to_end/probabilities"][0], rtol=1e-4, atol=1e-9)
  np.testing.assert_allclose(found.probabilities.sum(axis=1), 1.0, rtol=1e-5)
  assert np.abs(found.features[0] - found.features[5]).max() > 0.05


def test_products_are_of_full_precision_on_every_device():
  """A GPU's TF32 or a TPU's bfloat16 would change the features; on the CPU of the tests nothing else shows it."""

  def measure(images, variables):
    return inception.InceptionV3(output_bias=False).apply(variables, inception.preprocess(images, "fid"))

  variables = inception.variables_of(random_tensors(tensor_shapes()))
  text = str(jax.make_jaxpr(measure)(jax.ShapeDtypeStruct((1, 20, 26, 3), np.uint8), variables))
  products = text.count("conv_general_dilated[") + text.count("dot_general[")
  assert products == 94 + 2 + 1
  assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


@pytest.fixture
def tiny(tmp_path, monkeypatch):
  """A good file for a network of three tensors."""
  monkeypatch.setattr(inception, "tensor_shapes", lambda: TINY)
  path = tmp_path / "inception.safetensors"
  convert_inception.write(random_tensors(TINY), SOURCE, path)
  return path


def refusal(path, source=SOURCE):
  with pytest.raises(UserError) as caught:
    inception.read_weights(str(path), source)
  message = str(caught.value)
  assert message.startswith("inception_weights: ")
  assert "\n" not in message
  assert "experiments/convert_inception.py" in message
  if str(path):
    assert str(path) in message
  return message


def test_a_good_file_is_read(tiny):
  weights = inception.read_weights(str(tiny), SOURCE)
  assert weights.source == SOURCE
  assert weights.digest == convert_inception.tensors_sha256(random_tensors(TINY))
  for name, tensor in random_tensors(TINY).items():
    np.testing.assert_array_equal(weights.tensors[name], tensor)


def test_the_published_source_is_asked_for(tiny):
  published = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
  assert convert_inception.SOURCE_SHA256 == inception.SOURCE_SHA256 == published
  assert SOURCE in refusal(tiny, published)
  with pytest.raises(UserError, match="other weights"):
    inception.load_inception(str(tiny), "fid", None, 8)
  convert_inception.write(random_tensors(TINY), published, tiny)
  assert inception.read_weights(str(tiny)).source == published


def test_no_file(tiny):
  with pytest.raises(UserError, match="--inception_weights=FILE"):
    inception.load_inception("", "fid", None, 8)
  assert "releases/tag/fid_weights" in refusal("")
  assert "no file" in refusal(tiny.with_name("other.safetensors"))
  refusal(tiny.parent)


def test_another_kind_of_file(tiny):
  for content in (b"", b"{}", b"PK\x03\x04" + bytes(1000), bytes(7), b"\xff" * 64):
    tiny.write_bytes(content)
    assert "no whole safetensors file" in refusal(tiny)


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_a_file_that_is_not_whole(tiny, kept):
  tiny.write_bytes(tiny.read_bytes()[:kept])
  assert "no whole safetensors file" in refusal(tiny)


@pytest.mark.parametrize("place", [-1, -60, -240])
def test_a_flipped_bit(tiny, place):
  data = bytearray(tiny.read_bytes())
  data[place] ^= 1
  tiny.write_bytes(data)
  assert "damaged" in refusal(tiny)


def test_tensors_of_another_network(tiny):
  good = random_tensors(TINY)

  def changed(**changes):
    tensors = {**good, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    convert_inception.write({name: t for name, t in tensors.items() if t is not None}, SOURCE, tiny)
    return refusal(tiny)

  assert "lacks fc.bias;" in changed(fc__bias=None)
  assert "has too much: fc.weight;" in changed(fc__weight=np.zeros((5, 2), np.float32))
  assert "lacks Conv2d_1a_3x3.bn.running_var and 1 more" in changed(
    Conv2d_1a_3x3__bn__running_var=None, fc__bias=None, fc__biases=good["fc.bias"]
  )
  assert "F32 [6], not F32 [5]" in changed(fc__bias=np.zeros(6, np.float32))
  assert "F64 [5], not F32 [5]" in changed(fc__bias=np.zeros(5))
  assert "[3, 2, 3, 3]" in changed(Conv2d_1a_3x3__conv__weight=np.zeros((3, 2, 3, 3), np.float32))


@pytest.mark.parametrize("metadata", [None, {}, {"source_sha256": SOURCE}, {"tensors_sha256": SOURCE}])
def test_a_file_that_does_not_say_where_it_comes_from(tiny, metadata):
  save_file(random_tensors(TINY), tiny, metadata)
  assert "does not say" in refusal(tiny)


def test_the_digest_sees_names_shapes_and_values():
  base = {"a": np.zeros((2, 3), np.float32), "b": np.ones(2, np.float32)}
  others = (
    {"a": base["a"].reshape(3, 2), "b": base["b"]},
    {"a": base["a"], "c": base["b"]},
    {"a": base["a"], "b": base["b"].view(np.int32)},
    {"a": base["a"], "b": np.float32([1, 2])},
  )
  digests = {converted.tensors_sha256(tensors) for tensors in (base, *others)}
  assert len(digests) == 5
  assert converted.tensors_sha256(dict(reversed(base.items()))) == converted.tensors_sha256(base)


def test_the_converter_refuses_another_file(tmp_path):
  source, target = tmp_path / "weights.pth", tmp_path / "inception.safetensors"
  with pytest.raises(SystemExit, match="no file"):
    convert_inception.convert(source, target)
  source.write_bytes(b"something else")
  with pytest.raises(SystemExit, match="SHA-256"):
    convert_inception.convert(source, target)
  assert not target.exists()
