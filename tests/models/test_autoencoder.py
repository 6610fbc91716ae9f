"""The autoencoder, its quantiser and the discriminator: published counts, a second implementation, closed forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import AutoencoderConfig, ModelConfig
from ddpm_jax.errors import UserError
from ddpm_jax.models import autoencoder, discriminator
from ddpm_jax.models.build import (
  AutoencoderNetwork,
  autoencoder_of_settings,
  autoencoder_settings,
  build_autoencoder,
  build_discriminator,
  fitted,
  num_params,
)
from tests.models import reference

TINY = ModelConfig(stage="autoencoder", channels=8, channel_multipliers=(1, 2, 1), attention_resolutions=(4,))
SHAPE = (8, 8, 3)


def tiny(regularizer="kl", **changes):
  of_latents = AutoencoderConfig(regularizer=regularizer, latent_channels=3, codebook_size=6)
  return build_autoencoder(dataclasses.replace(TINY, **changes), of_latents, SHAPE)


@functools.cache
def shapes_of(network, image_shape=SHAPE):
  return jax.eval_shape(lambda: network.init(jax.random.key(0), image_shape))


def random_params(network, seed=0):
  """NumPy float64, every parameter random."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: 0.25 * rng.standard_normal(leaf.shape), shapes_of(network))


def single(tree):
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


# Rombach et al. 2022, appendix E: multipliers, attention, regularizer, z, K -> encoder, decoder (both without the 1x1
# convolutions beside them), all.
PUBLISHED = {
  "KL-f4": ((1, 2, 4), (), "kl", 3, 0, 22_351_238, 32_960_771, 55_312_063),
  "KL-f8": ((1, 2, 4, 4), (), "kl", 4, 0, 34_163_592, 49_490_179, 83_653_863),
  "KL-f16": ((1, 1, 2, 2, 4), (16,), "kl", 16, 0, 28_265_760, 41_343_875, 69_610_963),
  "KL-f32": ((1, 1, 2, 2, 4, 4), (16, 8), "kl", 64, 0, 42_614_656, 61_244_803, 103_880_131),
  "VQ-f4": ((1, 2, 4), (), "vq", 3, 8192, 22_337_411, 32_960_771, 55_322_782),
  "VQ-f4-noattn": ((1, 2, 4), None, "vq", 3, 8192, 21_285_763, 31_909_123, 53_219_486),
  "VQ-f8": ((1, 2, 2, 4), (32,), "vq", 4, 16384, 27_397_764, 40_253_955, 67_717_295),
  "VQ-f8-n256": ((1, 2, 2, 4), (32,), "vq", 4, 256, 27_397_764, 40_253_955, 67_652_783),
  "VQ-f16": ((1, 1, 2, 2, 4), (16,), "vq", 8, 16384, 28_155_144, 41_307_011, 69_593_371),
}


def test_published_parameter_counts():
  wrong, shape = {}, (256, 256, 3)
  for name, (multipliers, attention, regularizer, z, size, *expected) in PUBLISHED.items():
    model = ModelConfig(stage="autoencoder", channels=128, channel_multipliers=multipliers, num_res_blocks=2)
    model = dataclasses.replace(model, attention_resolutions=attention or ())
    latents = AutoencoderConfig(regularizer=regularizer, latent_channels=z, codebook_size=size or 1024)
    network = build_autoencoder(model, latents, shape)
    if attention is None:
      network = AutoencoderNetwork(network.model.clone(middle_attention=False))
    params = shapes_of(network, shape)
    found = [
      num_params(params[half]) - num_params(params[half][conv])
      for half, conv in (("encoder", "quant_conv"), ("decoder", "post_quant_conv"))
    ]
    if [*found, num_params(params)] != expected:
      wrong[name] = [*found, num_params(params)], expected
    assert params.keys() == {"encoder", "decoder"} | ({"codebook"} if regularizer == "vq" else set())
  assert wrong == {}


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_both_ways_are_those_of_the_reference(regularizer):
  """Three levels, two blocks, attention half-way, all parameters random."""
  network = tiny(regularizer, num_res_blocks=2)
  params, rng = random_params(network), np.random.default_rng(1)
  sizes = {"multipliers": (1, 2, 1), "num_res_blocks": 2, "attention_resolutions": (4,), "groups": 2}
  x = rng.standard_normal((2, *SHAPE))
  expected = reference.encoder(params["encoder"], x, **sizes)
  moments = jax.jit(network.moments)(*single((params, x)))
  assert moments.shape == (2, 2, 2, 6 if regularizer == "kl" else 3) and np.abs(expected).max() > 0.3
  np.testing.assert_allclose(moments, expected, atol=3e-5)

  z = rng.standard_normal((2, *network.latent_shape(SHAPE)))
  expected = reference.decoder(params["decoder"], z, **sizes)
  decoded = jax.jit(network.decode)(*single((params, z)))
  assert decoded.shape == x.shape and np.abs(expected).max() > 0.5
  np.testing.assert_allclose(decoded, expected, atol=3e-5)


def test_the_log_variance_stays_in_its_bounds():
  """At 20 it is finite, and beyond its gradient is zero."""
  network, x = tiny(), jnp.ones((1, *SHAPE))
  params = single(random_params(network))

  @jax.jit
  def bounded(bias):
    quant = params["encoder"]["quant_conv"] | {"bias": bias}
    return network.moments(params | {"encoder": params["encoder"] | {"quant_conv": quant}}, x)

  for bias, bound in ((1e3, 20.0), (-1e3, -30.0)):
    there = jnp.full(6, bias)
    moments = bounded(there)
    assert (moments[..., 3:] == bound).all() and (np.abs(moments[..., :3]) > 900).all()
    gradient = jax.grad(lambda bias: jnp.sum(bounded(bias)))(there)
    np.testing.assert_array_equal(gradient, [4, 4, 4, 0, 0, 0])  # of 2x2 latents


def test_the_nearest_vector():
  """By brute force; of two equally near ones the first; gradients are those of looking up, and by z there is none."""
  rng = np.random.default_rng(0)
  z, codes = rng.standard_normal((2, 4, 5, 3)), rng.standard_normal((7, 3))
  z[0, 0, 0] = 50.0  # far from all: no cancellation may decide
  codes[5] = codes[2]
  z[1, 3, 4] = codes[2]
  z, codes = single((z, codes))
  quantized, indices = jax.jit(autoencoder.quantize)(z, codes)
  distances = np.square(np.asarray(z, np.float64)[..., None, :] - np.asarray(codes, np.float64)).sum(-1)
  np.testing.assert_array_equal(indices, distances.argmin(-1))
  assert indices.dtype == jnp.int32 and indices[1, 3, 4] == 2
  np.testing.assert_array_equal(quantized, np.asarray(codes)[np.asarray(indices)])
  tie = jnp.asarray([[1.0, 0], [-1, 0], [3, 0]])
  assert autoencoder.quantize(jnp.asarray([[[[0.0, 7], [2, 0]]]]), tie)[1].tolist() == [[[0, 0]]]

  cotangent = jnp.asarray(rng.standard_normal(z.shape), jnp.float32)
  by_z, by_codes = jax.grad(lambda z, codes: jnp.sum(autoencoder.quantize(z, codes)[0] * cotangent), (0, 1))(z, codes)
  expected = np.zeros((7, 3))
  np.add.at(expected, np.asarray(indices).ravel(), np.asarray(cotangent).reshape(-1, 3))
  np.testing.assert_allclose(by_codes, expected, atol=1e-5)
  assert not by_z.any() and not expected[5].any()


def test_first_parameters_are_those_of_pytorch():
  """Kernels uniform within 1 / sqrt(fan-in), none zero; biases zero; the codebook within 1 / K."""
  network = tiny("vq", channels=32)
  params = jax.jit(lambda key: network.init(key, SHAPE))(jax.random.key(0))
  codebook = params.pop("codebook")["embedding"]
  assert 0.8 / 6 < np.abs(codebook).max() < 1 / 6
  wrong = []
  for path, leaf in jax.tree.leaves_with_path(params):
    kind, bound = path[-1].key, np.prod(leaf.shape[:-1]) ** -0.5
    largest, deviation = float(np.abs(leaf).max()), float(jnp.std(leaf)) * 3**0.5
    good = 0.6 * bound < largest <= bound and 0.6 < deviation / bound < 1.4 if kind == "kernel" else True
    if not good or (kind == "bias" and leaf.any()) or (kind == "scale" and not (leaf == 1).all()):
      wrong.append((jax.tree_util.keystr(path), leaf.shape, largest, deviation, bound))
  assert wrong == []


def test_dropout_and_what_is_computed_again():
  """Masks are functions of the example's key, and --remat changes no number of a gradient."""
  sizes = {"channel_multipliers": (1,), "attention_resolutions": (), "dropout": 0.5}
  network, x = tiny(**sizes), jax.random.normal(jax.random.key(0), (2, *SHAPE))
  params, keys = single(random_params(network)), jax.random.split(jax.random.key(1), 2)

  def gradient(network):
    def loss(params, x, keys):
      z = network.moments(params, x, dropout_keys=keys)[..., :3]
      return jnp.sum(jnp.square(network.decode(params, z, dropout_keys=keys)))

    return jax.jit(jax.grad(loss))

  plain = gradient(network)
  whole = plain(params, x, keys)
  halves = [plain(params, x[i : i + 1], keys[i : i + 1]) for i in range(2)]
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole))

  def check(other):
    for ours, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)

  check(jax.tree.map(jnp.add, *halves))
  for remat in ("norms", "blocks"):
    check(gradient(tiny(**sizes, remat=remat))(params, x, keys))
  other = plain(params, x, keys[::-1])
  assert any(np.abs(a - b).max() > 0.01 * scale for a, b in zip(*map(jax.tree.leaves, (whole, other)), strict=True))


def test_bfloat16_ends_in_float32():
  network, other = tiny(), tiny(dtype="bfloat16")
  params, x = single(random_params(network)), jax.random.normal(jax.random.key(0), (2, *SHAPE))
  for method, of in (("moments", x), ("decode", jnp.ones((2, *network.latent_shape(SHAPE))))):
    exact, rounded = (jax.jit(getattr(each, method))(params, of) for each in (network, other))
    assert rounded.dtype == jnp.float32
    error = float(np.abs(rounded - exact).max() / np.abs(exact).max())
    assert 1e-5 < error < 0.1


def test_settings_say_what_the_parameters_mean():
  network = tiny("vq", dropout=0.5, remat="norms", dtype="bfloat16")
  again = autoencoder_of_settings(autoencoder_settings(network), SHAPE)
  assert again == tiny("vq") and again != tiny() and hash(again) == hash(tiny("vq"))
  assert shapes_of(again) == shapes_of(network)
  described = set(autoencoder_settings(network)) | {"dropout", "remat", "dtype", "parent", "name"}
  assert {field.name for field in dataclasses.fields(network.model)} == described


def test_what_it_cannot_be():
  with pytest.raises(UserError, match="attention_resolutions: 3 is none of this autoencoder's resolutions, 8, 4, 2"):
    tiny(attention_resolutions=(3,))
  with pytest.raises(UserError, match="image_size: 8 is not divisible by 16"):
    tiny(channel_multipliers=(1,) * 5, attention_resolutions=())
  assert fitted(ModelConfig(stage="autoencoder"), SHAPE).attention_resolutions == ()
  assert fitted(ModelConfig(), SHAPE).attention_resolutions == (4,)


def test_the_discriminator_has_the_published_size():
  counts = {3: 2_765_633, 2: 663_361}
  for layers, count in counts.items():
    network = build_discriminator(layers, (256, 256, 3))
    assert num_params(jax.eval_shape(network.init, jax.random.key(0))) == count
  # Of images of so many pixels, with 3, 2 and 1 layers.
  rows = {256: (30, 62, 126), 64: (6, 14, 30), 32: (2, 6, 14), 28: (1, 5, 12)}
  for size, expected in rows.items():
    for layers, side in zip((3, 2, 1), expected, strict=True):
      network = build_discriminator(layers, (size, size + 8, 1))
      shape = jax.eval_shape(lambda key, d=network: d(d.init(key), jnp.zeros((2, *d.image_shape))), jax.random.key(0))
      assert shape.shape[:2] == (2, side) and shape.shape[2] >= side and shape.dtype == jnp.float32
      assert list(discriminator.sizes(layers, size))[-1] == side
  with pytest.raises(UserError, match=r"discriminator_layers: 4 leave nothing of .* 28x40 .*discriminator_layers=3"):
    build_discriminator(4, (28, 40, 1))
  with pytest.raises(UserError, match="discriminator_weight=0"):
    build_discriminator(1, (4, 4, 1))


def test_the_discriminator_judges_each_image_alone():
  """So its loss does not know how a batch is split; BatchNorm's would."""
  network = build_discriminator(2, (32, 32, 3))
  params = jax.jit(network.init)(jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (3, 32, 32, 3))
  logits = jax.jit(network)(params, x)
  np.testing.assert_allclose(logits[1:2], jax.jit(network)(params, x[1:2]), atol=1e-6)
  assert float(logits.std()) > 1e-3
  assert 0.01 < float(jnp.std(params["conv1"]["kernel"])) < 0.03
  scale = params["norm1"]["scale"]
  assert abs(float(scale.mean()) - 1) < 0.01 and 0.01 < float(scale.std()) < 0.03
  half = jax.jit(build_discriminator(2, (32, 32, 3), "bfloat16"))(params, x)
  assert half.dtype == jnp.float32 and 0 < float(jnp.abs(half - logits).max()) < 0.1
