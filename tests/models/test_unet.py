"""The U-Net against the published parameter counts and a second implementation in float64 NumPy."""

import dataclasses
import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from ddpm_jax.config import ModelConfig
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.errors import UserError
from ddpm_jax.models import layers
from ddpm_jax.models.build import UNetNetwork, build_denoiser, build_model, fitted, init_params, num_params
from ddpm_jax.models.unet import UNet
from tests.models import reference

TINY = ModelConfig(channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), dropout=0.5)
PAPER = dict(channels=128, num_res_blocks=2, attention_resolutions=(16,))


def shapes_of(config, image_shape):
  model = build_model(config, image_shape)
  return jax.eval_shape(lambda key: init_params(model, key, image_shape), jax.random.key(0))


def randomize(params, seed=0):
  """Every parameter random, so that no zero-initialised layer hides what lies behind it."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return jax.tree.unflatten(tree, [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.fixture(scope="module")
def tiny():
  model = build_model(TINY, (8, 8, 1))
  params = jax.jit(lambda key: init_params(model, key, (8, 8, 1)))(jax.random.key(0))
  return jax.jit(UNetNetwork(model)), params


@pytest.mark.parametrize(
  ("multipliers", "image_shape", "expected"),
  [
    ((1, 2, 2, 2), (32, 32, 3), 35_746_307),  # CIFAR-10; 35,218,947 would be without attention on the way up
    ((1, 1, 2, 2, 4, 4), (256, 256, 3), 113_673_219),  # CelebA-HQ and LSUN
  ],
)
def test_published_parameter_counts(multipliers, image_shape, expected):
  assert num_params(shapes_of(ModelConfig(channel_multipliers=multipliers, **PAPER), image_shape)) == expected


# Image [H, W, C], network, parameters. With a learned variance the output has twice the channels.
IDDPM = dict(block="iddpm", channels=128, num_res_blocks=3, attention_resolutions=(16, 8), num_heads=4)
ADM = dict(block="adm", channels=256, num_res_blocks=2, attention_resolutions=(32, 16, 8), head_channels=64)
LDM = dict(block="ldm", channels=224, num_res_blocks=2, attention_resolutions=(32, 16, 8), head_channels=32)
IMAGENET64 = dict(channels=192, channel_multipliers=(1, 2, 3, 4), num_res_blocks=3, out_channels=6)
LARGE = dict(channel_multipliers=(1, 1, 2, 2, 4, 4), out_channels=6)
CHURCHES = dict(channels=192, channel_multipliers=(1, 2, 2, 4, 4), attention_resolutions=(32, 16, 8, 4))
EIGHT_HEADS, CLASSES = dict(head_channels=0, num_heads=8), dict(num_labels=1000)
PUBLISHED = {
  # Nichol and Dhariwal 2021
  "CIFAR-10": ((32, 32, 3), IDDPM | dict(out_channels=3), 52_542_979),
  "CIFAR-10, learned variance": ((32, 32, 3), IDDPM | dict(out_channels=6), 52_546_438),
  "ImageNet 64": ((64, 64, 3), IDDPM | IMAGENET64 | dict(channels=128), 121_063_942),
  "ImageNet 64, classes": ((64, 64, 3), IDDPM | IMAGENET64 | CLASSES, 273_049_350),
  "LSUN": (
    (256, 256, 3),
    LDM | LARGE | dict(channels=128, attention_resolutions=(16,), head_channels=0),
    113_676_678,
  ),
  # Dhariwal and Nichol 2021
  "ADM 64": ((64, 64, 3), ADM | IMAGENET64 | CLASSES, 295_904_454),
  "ADM 128": ((128, 128, 3), ADM | LARGE | CLASSES | dict(channel_multipliers=(1, 1, 2, 3, 4)), 421_529_606),
  "ADM 256": ((256, 256, 3), ADM | LARGE | CLASSES, 553_838_086),
  "ADM LSUN": ((256, 256, 3), ADM | LARGE, 552_814_086),
  "ADM 512": ((512, 512, 3), ADM | LARGE | CLASSES | dict(channel_multipliers=(0.5, 1, 1, 2, 2, 4, 4)), 558_997_638),
  # Rombach et al. 2022
  "LDM CelebA-HQ": ((64, 64, 3), LDM | dict(channel_multipliers=(1, 2, 3, 4), out_channels=3), 274_056_163),
  "LDM churches": ((32, 32, 4), ADM | CHURCHES | EIGHT_HEADS | dict(out_channels=4), 294_966_916),
}


def test_published_parameter_counts_of_openais_networks():
  wrong = {}
  for name, (image_shape, network, expected) in PUBLISHED.items():
    init = functools.partial(init_params, UNet(**network), image_shape=image_shape)
    if (found := num_params(jax.eval_shape(init, jax.random.key(0)))) != expected:
      wrong[name] = found, expected
  assert wrong == {}


def test_forward_pass_is_that_of_the_reference():
  """Three levels, two blocks, attention half-way, all parameters random, in colour."""
  config = ModelConfig(channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=2, attention_resolutions=(4,))
  model = build_model(config, (8, 8, 3))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: 0.25 * rng.standard_normal(leaf.shape), shapes_of(config, (8, 8, 3)))
  xt, t = rng.standard_normal((2, 8, 8, 3)), np.array([3, 977])
  expected = reference.unet(
    params, xt, t, channels=8, multipliers=(1, 2, 2), num_res_blocks=2, attention_resolutions=(4,), groups=2
  )
  single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, xt))
  got = jax.jit(UNetNetwork(model))(*single, jnp.asarray(t - 1))
  assert np.abs(expected).max() > 0.5
  np.testing.assert_allclose(got, expected, atol=2e-5)


HEADS = {"num_heads": 2, "head_channels": 4}


@pytest.mark.parametrize(
  ("block", "heads", "num_classes"),
  [("ldm", "num_heads", 0), ("iddpm", "head_channels", 3), ("adm", "head_channels", 0), ("adm", "num_heads", 3)],
)
def test_forward_pass_of_openais_networks_is_that_of_the_reference(block, heads, num_classes):
  """Three levels, two blocks, attention at two of them, all parameters random, with labels and without."""
  sizes = dict(channels=8, num_res_blocks=2, attention_resolutions=(8, 4))
  config = ModelConfig(
    channel_multipliers=(1, 2, 3), block=block, num_classes=num_classes, **sizes, **{heads: HEADS[heads]}
  )
  network, shapes = jax.jit(UNetNetwork(build_model(config, (8, 8, 3)))), shapes_of(config, (8, 8, 3))
  rng = np.random.default_rng(0)
  xt, t = rng.standard_normal((2, 8, 8, 3)), np.array([3, 977])
  label = np.array([2, 0]) if num_classes else None
  count = {"num_heads": lambda _: 2, "head_channels": lambda channels: channels // 4}[heads]
  inner = ("conv_in", "conv1", "conv2", "shortcut", "proj", "conv")
  for scale in (0.25, 0.005):  # with the second one groups vary little, so that the epsilon of each norm shows

    def random(path, leaf, scale=scale):
      return rng.standard_normal(leaf.shape) * (scale if path[-2].key in inner else 0.25)

    params = jax.tree_util.tree_map_with_path(random, shapes)
    expected = reference.openai_unet(
      params, xt, t, label, kind=block, multipliers=(1, 2, 3), heads=count, groups=2, **sizes
    )
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, xt))
    got = network(*single, jnp.asarray(t - 1), label)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(got, expected, atol=5e-5)


def test_dropout_is_before_the_last_convolution_of_a_block():
  block = layers.ResBlock(8, 2, 0.5, jnp.float32)
  x, temb = jax.random.normal(jax.random.key(0), (2, 4, 4, 8)), jnp.zeros((2, 4))
  keys = jax.random.split(jax.random.key(1))
  params = randomize(jax.eval_shape(block.init, jax.random.key(0), x, temb, None)["params"])
  p = jax.tree.map(np.asarray, params)
  h = reference.conv(reference.swish(reference.group_norm(np.asarray(x), p["norm1"], 2)), p["conv1"])
  h = reference.swish(reference.group_norm(h + p["temb_proj"]["bias"], p["norm2"], 2))
  _, found = block.apply({"params": params}, x, temb, keys, capture_intermediates=True)
  dropped = np.asarray(found["intermediates"]["dropout"]["__call__"][0])
  kept = dropped != 0
  assert 0.3 < kept.mean() < 0.7
  np.testing.assert_allclose(dropped[kept], 2 * h[kept], rtol=1e-3, atol=1e-4)
  expected = np.asarray(x) + reference.conv(dropped, p["conv2"])
  np.testing.assert_allclose(block.apply({"params": params}, x, temb, keys), expected, rtol=1e-3, atol=1e-4)


def test_where_attention_is():
  params = shapes_of(ModelConfig(channel_multipliers=(1, 2, 2, 2), **PAPER), (32, 32, 3))
  found = sorted(name for name in params if name.endswith("_attention"))
  assert found == sorted(
    [*(f"down1_block{i}_attention" for i in range(2)), "mid_attention", *(f"up1_block{i}_attention" for i in range(3))]
  )


def test_output_is_zero_at_first_so_the_first_loss_is_one(tiny):
  network, params = tiny
  xt = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
  output = network(params, xt, jnp.asarray([1, 2, 500, 1000]), None)
  chex.assert_shape(output, (4, 8, 8, 1))
  assert output.dtype == jnp.float32
  assert (output == 0).all()


def test_residual_branches_begin_as_identities(tiny):
  _, params = tiny
  for name, block in params.items():
    if "block" in name and "conv2" in block:
      assert (block["conv2"]["kernel"] == 0).all()
      # Uniform Glorot: variance 2 / (fan_in + fan_out).
      kernel = block["conv1"]["kernel"]
      assert abs(kernel.var() / (2 / (9 * (kernel.shape[2] + kernel.shape[3]))) - 1) < 0.2
    if name.endswith("attention"):
      assert (block["proj"]["kernel"] == 0).all()
      channels = block["proj"]["kernel"].shape[0]
      # Queries, keys and values each begin as a uniform Glorot layer of C -> C.
      assert abs(np.abs(block["qkv"]["kernel"]).max() / np.sqrt(3 / channels) - 1) < 0.05


def test_each_example_is_alone(tiny):
  network, params = tiny
  params = randomize(params)
  xt, t = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.asarray([1, 10, 100, 1000])
  together = network(params, xt, t, None)
  order = jnp.asarray([2, 0, 3, 1])
  chex.assert_trees_all_close(network(params, xt[order], t[order], None), together[order], rtol=1e-4, atol=1e-4)
  assert np.abs(network(params, xt, t[order], None) - together).max() > 0.01  # and t matters


def test_dropout_masks_follow_the_example_not_the_batch(tiny):
  network, params = tiny
  params = randomize(params)
  xt = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (1, 8, 8, 1)), (4, 8, 8, 1))
  t, keys = jnp.full(4, 7), jax.random.split(jax.random.key(2), 4)
  together = network(params, xt, t, dropout_keys=keys)
  reverse = network(params, xt, t, dropout_keys=keys[::-1])[::-1]
  chex.assert_trees_all_close(reverse, together, rtol=1e-4, atol=1e-4)
  assert len(np.unique(np.round(together[:, 0, 0, 0], 4))) == 4  # four examples, four masks
  same = network(params, xt, t, dropout_keys=keys[jnp.asarray([0, 0, 0, 0])])
  chex.assert_trees_all_close(same[0], same[3], rtol=1e-4, atol=1e-4)


def test_dropout_rate_and_scale():
  x = jnp.ones((64, 8, 8, 4))
  y = layers.Dropout(0.25).apply({}, x, jax.random.split(jax.random.key(0), 64))
  kept = y > 0
  assert abs(kept.mean() - 0.75) < 0.02
  np.testing.assert_allclose(y[kept], 1 / 0.75, rtol=1e-6)
  assert len({tuple(row.ravel().tolist()) for row in np.asarray(kept)}) == 64
  chex.assert_trees_all_equal(layers.Dropout(0.25).apply({}, x, None), x)


def test_layers_of_one_example_have_different_masks():
  class Two(nn.Module):
    @nn.compact
    def __call__(self, x, keys):
      return layers.Dropout(0.5, name="a")(x, keys), layers.Dropout(0.5, name="b")(x, keys)

  a, b = Two().apply({}, jnp.ones((1, 100)), jax.random.split(jax.random.key(0), 1))
  assert 20 < (a != b).sum() < 80


def test_timestep_embedding_by_hand():
  # Four channels: frequencies 1 and 10000^(-1) (the exponent runs over 0..half-1, divided by half-1); [sin | cos].
  got = layers.timestep_embedding(jnp.asarray([0, 3]), 4)
  expected = [[0, 0, 1, 1], [np.sin(3), np.sin(3e-4), np.cos(3), np.cos(3e-4)]]
  np.testing.assert_allclose(got, expected, atol=1e-6)
  # OpenAI's: frequencies 1 and 10000^(-1/2), and [cos | sin].
  got = layers.timestep_embedding(jnp.asarray([0, 3]), 4, cosines_first=True)
  expected = [[1, 1, 0, 0], [np.cos(3), np.cos(0.03), np.sin(3), np.sin(0.03)]]
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_network_is_given_t_minus_1(tiny, monkeypatch):
  seen = []
  monkeypatch.setattr(
    "ddpm_jax.models.unet.timestep_embedding",
    lambda positions, channels, _: seen.append(positions) or jnp.zeros((len(positions), channels)),
  )
  denoise = build_denoiser(TINY, "eps", (8, 8, 1)).bind(tiny[1])
  denoise(jnp.zeros((2, 8, 8, 1)), make_schedule("linear", 1000).level(jnp.asarray([1, 1000])))
  np.testing.assert_array_equal(seen[0], [0, 999])


def test_up_and_down():
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  params = {"conv": {"kernel": jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0), "bias": jnp.zeros(1)}}
  up = layers.Upsample(jnp.float32).apply({"params": params}, x)[0, :, :, 0]
  np.testing.assert_array_equal(up, np.kron(np.arange(16.0).reshape(4, 4), np.ones((2, 2))))
  # TensorFlow's SAME padding of an even size with stride 2: nothing above, one row below.
  down = layers.Downsample(jnp.float32).apply({"params": params}, x)[0, :, :, 0]
  np.testing.assert_array_equal(down, [[5, 7], [13, 15]])


def test_attention_by_hand():
  """Two positions, two channels: softmax(q k / sqrt(C)) v after the norm, plus the input; epsilon of the norm shows."""
  x = np.array([[[[0.001, 0.002]], [[0.003, -0.001]]]], np.float32)  # [1, 2, 1, 2]
  params = jax.tree.map(
    lambda p: 5 * np.asarray(p),  # large enough for the scale of the scores to show
    randomize(jax.eval_shape(layers.SelfAttention(1, jnp.float32).init, jax.random.key(0), x)["params"]),
  )
  got = layers.SelfAttention(1, jnp.float32).apply({"params": params}, x)
  h = (x - x.mean()) / np.sqrt(x.var() + 1e-6) * params["norm"]["scale"] + params["norm"]["bias"]
  q, k, v = np.split(np.asarray(h[0, :, 0] @ params["qkv"]["kernel"] + params["qkv"]["bias"]), 3, axis=-1)
  scores = np.exp(q @ k.T / np.sqrt(2))
  out = (scores / scores.sum(-1, keepdims=True)) @ v @ params["proj"]["kernel"] + params["proj"]["bias"]
  np.testing.assert_allclose(got[0, :, 0], x[0, :, 0] + out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_heads", [2, 4])
def test_attention_with_several_heads_by_hand(num_heads):
  """Head h has the channels from h C / heads on, of queries, keys and values, and the same of the output."""
  x = np.random.default_rng(0).standard_normal((2, 3, 2, 8)).astype(np.float32)
  module = layers.SelfAttention(2, jnp.float32, num_heads, 1e-5)
  params = randomize(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
  exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (x, params))
  expected = reference.attention(*exact, groups=2, heads=num_heads, epsilon=1e-5)
  got = module.apply({"params": params}, x)
  np.testing.assert_allclose(got, expected, atol=2e-6)
  assert np.abs(got - reference.attention(*exact, groups=2, heads=1, epsilon=1e-5)).max() > 1e-3


def record_attention(monkeypatch):
  """A list that receives what each attention is asked of."""
  asked, plain = [], jax.nn.dot_product_attention

  def recorded(q, k, v, implementation="xla"):
    asked.append(implementation)
    return plain(q, k, v)

  monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
  return asked


@pytest.mark.parametrize(
  ("attention", "changes", "expected"),
  [
    ("cudnn", {}, "cudnn"),
    ("xla", {}, "xla"),
    ("cudnn", {"dtype": "float32"}, "xla"),
    ("cudnn", {"head_channels": 0}, "xla"),
    ("cudnn", {"head_channels": 4}, "xla"),
    ("cudnn", {"channels": 136, "head_channels": 136}, "xla"),
  ],
)
def test_cudnn_is_asked_for_attention_where_heads_allow_it(attention, changes, expected, monkeypatch):
  sizes = {"channels": 8, "head_channels": 8, "dtype": "bfloat16"} | changes
  config = dataclasses.replace(TINY, **sizes)
  model = build_model(config, (8, 8, 1))
  params, asked = shapes_of(config, (8, 8, 1)), record_attention(monkeypatch)
  jax.eval_shape(UNetNetwork(model, attention), params, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
  assert asked == 4 * [expected]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_heads": 3}, "num_heads: 3 does not divide the 16 channels of the level of 4 rows"),
    (
      {"head_channels": 16, "attention_resolutions": (8,)},
      "head_channels: 16 does not divide the 8 channels of the lev",
    ),
  ],
)
def test_heads_that_do_not_divide_the_channels(changes, message):
  with pytest.raises(UserError, match=message):
    build_model(dataclasses.replace(TINY, **changes), (8, 8, 1))


@pytest.mark.parametrize(
  ("channels", "expected"),
  [(128, 32), (192, 32), (256, 32), (64, 16), (32, 8), (48, 12), (8, 2), (6, 1), (2, 1), (100, 25)],
)
def test_norm_groups(channels, expected):
  assert layers.num_norm_groups(channels) == expected


def test_bfloat16_keeps_float32_parameters_and_output(tiny):
  _, params = tiny
  params = randomize(params)
  xt, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 1)), jnp.asarray([5, 900])
  model = build_model(ModelConfig(**{**vars(TINY), "dtype": "bfloat16"}), (8, 8, 1))
  wide, narrow = tiny[0](params, xt, t, None), jax.jit(UNetNetwork(model))(params, xt, t, None)
  assert narrow.dtype == jnp.float32
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes_of(TINY, (8, 8, 1))))
  assert 0 < np.abs(wide - narrow).max() < 0.1 * np.abs(wide).max()
  # The last convolution is in float32: near t = T its rounding would be multiplied by 1 / sqrt(alpha_bar).
  assert (narrow != narrow.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


def with_remat(dtype, remat, block="ddpm"):
  """A network of two levels, with its parameters (shapes) and inputs: images, timesteps, dropout keys."""
  config = ModelConfig(**{**vars(TINY), "channels": 4, "dtype": dtype, "remat": remat, "block": block})
  inputs = jnp.ones((2, 8, 8, 1)), jnp.asarray([5, 900]), jax.random.split(jax.random.key(3), 2)
  return UNetNetwork(build_model(config, (8, 8, 1))), shapes_of(config, (8, 8, 1)), inputs


def equations(jaxpr):
  """All of them, also those of what is called within."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)


@pytest.mark.parametrize(
  ("block", "remat"), [("ddpm", "none"), ("ddpm", "norms"), ("ddpm", "blocks"), ("adm", "none"), ("adm", "blocks")]
)
def test_no_sum_of_a_gradient_is_in_bfloat16(block, remat):
  """But for products, which XLA sums in float32, and where a few gradients of one array meet."""
  network, params, (*inputs, keys) = with_remat("bfloat16", remat, block)
  gradient = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(network(params, *inputs, dropout_keys=keys))))(params)
  found = [equation for equation in equations(gradient.jaxpr) if equation.primitive.name == "reduce_sum"]
  assert len(found) > 40
  assert [str(equation) for equation in found if equation.invars[0].aval.dtype == jnp.bfloat16] == []


def test_gradients_by_biases_of_a_bfloat16_network_are_sums_in_float32():
  """Against sums in float64 of the gradients by what is added to each output, each of one pixel of one image."""
  model = build_model(ModelConfig(**{**vars(TINY), "dtype": "bfloat16"}), (8, 8, 1))
  params = randomize(shapes_of(TINY, (8, 8, 1)))
  xt, t = jax.random.normal(jax.random.key(1), (8, 8, 8, 1)), jnp.arange(1, 9)

  def loss(params, added):
    def intercept(call, args, kwargs, context):
      if context.method_name != "__call__" or not isinstance(context.module, layers.Conv3x3 | layers.Dense):
        return call(*args, **kwargs)
      output, name = call(*args, **kwargs), "/".join(context.module.path)
      shapes[name] = output.shape
      return output + added[name].astype(output.dtype) if name in added else output

    with nn.intercept_methods(intercept):
      return jnp.mean(jnp.square(model.apply({"params": params}, xt, t, None)))

  shapes = {}
  jax.eval_shape(loss, params, {})
  zeros = {name: jnp.zeros(shape) for name, shape in shapes.items()}
  gradient, by_output = jax.jit(jax.grad(loss, (0, 1)))(params, zeros)
  errors = {}
  for name, each in by_output.items():
    path = name.split("/")
    # The timestep embedding is added to each pixel of the first convolution's output.
    each = by_output["/".join([*path[:-1], "conv1"])] if path[-1] == "temb_proj" else each
    want = np.asarray(each, np.float64).sum(tuple(range(each.ndim - 1)))
    got = functools.reduce(dict.__getitem__, path, gradient)["bias"]
    errors[name] = np.linalg.norm(got - want) / np.linalg.norm(want)
  assert len(errors) > 40
  assert {name: error for name, error in errors.items() if error > 1e-5} == {}


SECOND_ORDER = {  # of a loss(params, xt), at params along v
  "forward over reverse": lambda loss, p, v, x: jax.jvp(lambda p: jax.grad(loss)(p, x), (p,), (v,))[1],
  "reverse over forward": lambda loss, p, v, x: jax.grad(lambda p: jax.jvp(lambda p: loss(p, x), (p,), (v,))[1])(p),
  "reverse over reverse": lambda loss, p, v, x: jax.grad(
    lambda p: sum(map(jnp.vdot, jax.tree.leaves(jax.grad(loss)(p, x)), jax.tree.leaves(v)))
  )(p),
  "gradient penalty": lambda loss, p, v, x: jax.grad(lambda p: jnp.sum(jnp.square(jax.grad(loss, 1)(p, x))))(p),
  "vmap(grad)": lambda loss, p, v, x: jax.vmap(jax.grad(loss), (None, 0))(p, jnp.stack([x, x])),
  "ensemble": lambda loss, p, v, x: jax.vmap(jax.grad(loss), (0, None))(
    jax.tree.map(lambda a: jnp.stack([a] * 2), p), x
  ),
}


@pytest.mark.parametrize(
  ("dtype", "remat", "block"),
  [
    *(("float32", remat, "ddpm") for remat in ("none", "norms", "blocks")),
    ("bfloat16", "none", "ddpm"),
    ("float32", "none", "ldm"),
    ("bfloat16", "norms", "adm"),
  ],
)
def test_second_and_batched_derivatives_can_be_taken(dtype, remat, block):
  """With dropout. Traced alone, as that is where a rule that is missing shows; the numbers are in the next test."""
  network, params, (xt, time, keys) = with_remat(dtype, remat, block)
  for derivative in SECOND_ORDER.values():
    loss = lambda params, xt: jnp.mean(jnp.square(network(params, xt, time, dropout_keys=keys)))  # noqa: E731
    found = jax.eval_shape(functools.partial(derivative, loss), params, params, xt)
    assert jax.tree.structure(found) == jax.tree.structure(params)


@pytest.mark.slow
def test_second_and_batched_derivatives_are_right():
  """The Hessian times a vector is the difference of two gradients; the batch's gradient the mean of its examples'."""
  network, params, (_, t, keys) = with_remat("float32", "none")
  params, v = randomize(params), randomize(params, seed=1)
  xt = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))

  def loss(params, xt, t, keys):
    return jnp.mean(jnp.square(network(params, xt, t, dropout_keys=keys)))

  @jax.jit
  def derivatives(params):
    gradient = lambda params: jax.grad(loss)(params, xt, t, keys)  # noqa: E731
    alone = lambda *example: jax.grad(loss)(params, *(array[None] for array in example))  # noqa: E731
    return jax.jvp(gradient, (params,), (v,)), jax.vmap(alone)(xt, t, keys)

  (gradient, along), each = derivatives(params)
  above, below = (
    derivatives(jax.tree.map(lambda p, v, step=step: p + step * v, params, v))[0][0] for step in (1e-3, -1e-3)
  )
  difference = jax.tree.map(lambda a, b: (a - b) / 2e-3, above, below)

  def error(got, want):
    got, want = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)

  assert error(along, difference) < 2e-3
  assert error(jax.tree.map(lambda leaf: leaf.mean(0), each), gradient) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["norms", "blocks"])
def test_remat_changes_nothing(tiny, remat):
  network, params = tiny
  params = randomize(params)
  remat = UNetNetwork(build_model(ModelConfig(**{**vars(TINY), "remat": remat}), (8, 8, 1)))
  keys = jax.random.split(jax.random.key(3), 2)
  xt, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 1)), jnp.asarray([5, 900])
  gradient = lambda f: jax.jit(jax.grad(lambda p: jnp.sum(f(p, xt, t, dropout_keys=keys) ** 2)))(params)  # noqa: E731
  chex.assert_trees_all_close(gradient(network), gradient(remat), rtol=1e-3, atol=1e-3)


def test_what_remat_computes_again():
  """By the products of a gradient, forward and backward: 'norms' makes no convolution twice, 'blocks' most of them."""

  def products(remat):
    model = build_model(ModelConfig(**{**vars(TINY), "remat": remat}), (8, 8, 1))
    shapes = shapes_of(TINY, (8, 8, 1))
    xt, t = jnp.zeros((2, 8, 8, 1)), jnp.asarray([5, 900])
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(UNetNetwork(model)(params, xt, t, None) ** 2)))
    text = gradient.trace(shapes).lower(lowering_platforms=("tpu",)).as_text()
    return text.count("stablehlo.convolution"), text.count("stablehlo.rsqrt")

  (convolutions, norms), (same, more_norms), (more, _) = (products(remat) for remat in ("none", "norms", "blocks"))
  assert same == convolutions < more
  assert more_norms > norms


def test_what_remat_keeps():
  """By what the forward pass leaves to the backward pass; of 'blocks' no concatenation, and nothing of attention."""

  def kept(remat):
    model = build_model(ModelConfig(**{**vars(TINY), "remat": remat}), (8, 8, 1))
    xt, t = jnp.zeros((2, 8, 8, 1)), jnp.asarray([5, 900])
    forward = lambda params: jax.vjp(lambda p: UNetNetwork(model)(p, xt, t, None), params)[1]  # noqa: E731
    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(forward, shapes_of(TINY, (8, 8, 1))))]
    return [shape for shape in shapes if len(shape) == 4 and shape[0] == 2]

  everything, norms, blocks = (kept(remat) for remat in ("none", "norms", "blocks"))
  size = lambda shapes: sum(map(math.prod, shapes))  # noqa: E731
  assert size(blocks) < 0.6 * size(norms) < 0.2 * size(everything)
  assert max(channels for *_, channels in blocks) == 16 < max(channels for *_, channels in norms)
  assert not [shape for shape in blocks if shape[:3] == (2, 16, 1)]


@pytest.mark.parametrize(
  ("size", "multipliers", "message"),
  [
    ((28, 28), (1, 2, 2, 2), "image_size: 28 is not divisible by 8.*--image_size=24 or 32, or"),
    ((3, 3), (1, 2, 2), "image_size: 3 is not divisible by 4.*--image_size=4, or"),
    ((50, 66), (1, 2, 2, 2), "image_size: 50x66 is not divisible by 8.*--image_size=48x64 or 56x72, or"),
    ((48, 66), (1, 2, 2, 2), "image_size: 48x66 is not divisible by 8.*--image_size=48x64 or 48x72, or"),
    ((4, 66), (1, 2, 2, 2), "image_size: 4x66 is not divisible by 8.*--image_size=8x72, or"),
  ],
)
def test_sizes_that_the_levels_do_not_divide(size, multipliers, message):
  config = ModelConfig(channels=8, channel_multipliers=multipliers, attention_resolutions=())
  with pytest.raises(UserError, match=message):
    build_model(config, (*size, 1))


def test_attention_resolutions_that_never_come_up():
  with pytest.raises(UserError, match=r"attention_resolutions: 16 is none of .* 8, 4"):
    build_model(ModelConfig(channels=8, channel_multipliers=(1, 2), attention_resolutions=(4, 16)), (8, 8, 1))


def test_attention_fits_the_images_by_default():
  """At the lowest level, unless that has more than 16 x 16 pixels."""
  for height, width, multipliers, rows in (
    *((8, 8, (1, 2), (4,)), (64, 64, (1, 2), ()), (64, 64, (1, 2, 2), (16,)), (28, 28, (1, 2, 2), (7,))),
    *((8, 128, (1, 2), (4,)), (8, 130, (1, 2), ()), (128, 8, (1, 2), (64,))),
  ):
    config = ModelConfig(channels=8, channel_multipliers=multipliers)
    assert fitted(config, (height, width, 1)).attention_resolutions == rows
    assert build_model(config, (height, width, 1)).attention_resolutions == rows
  own = ModelConfig(channels=8, channel_multipliers=(1, 2), attention_resolutions=())
  assert fitted(own, (8, 8, 1)) == own


@pytest.mark.parametrize("image_shape", [(4, 4, 1), (12, 12, 3), (8, 16, 3)])
def test_any_size_that_the_levels_divide(image_shape):
  config = ModelConfig(channels=4, channel_multipliers=(1, 1, 1), num_res_blocks=1, attention_resolutions=())
  model = build_model(config, image_shape)
  output = jax.eval_shape(
    lambda key: model.init_with_output(key, jnp.zeros((2, *image_shape)), jnp.ones(2))[0], jax.random.key(0)
  )
  assert output.shape == (2, *image_shape)
