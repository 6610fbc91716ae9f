"""The classifier of noisy images of Dhariwal and Nichol 2021: its published sizes, and its end written out."""

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import ModelConfig
from ddpm_jax.models.build import build_model, init_params, num_params
from ddpm_jax.models.layers import AttentionPool

PUBLISHED = {  # image size -> residual blocks of a level, levels, parameters of guided-diffusion's EncoderUNetModel
  64: (4, (1, 2, 3, 4), 65_438_568),
  128: (2, (1, 1, 2, 3, 4), 42_568_040),
  256: (2, (1, 1, 2, 2, 4, 4), 54_096_360),
}


def test_the_published_classifiers_have_as_many_parameters():
  found = {}
  for size, (depth, levels, _) in PUBLISHED.items():
    config = ModelConfig(
      stage="classifier",
      channels=128,
      channel_multipliers=levels,
      num_res_blocks=depth,
      attention_resolutions=(32, 16, 8),
      block="adm",
      head_channels=64,
      num_classes=1000,
    )
    shape = (size, size, 3)
    init = lambda key, config=config, shape=shape: init_params(build_model(config, shape), key, shape)  # noqa: E731
    found[size] = num_params(jax.eval_shape(init, jax.random.key(0)))
  assert found == {size: parameters for size, (_, _, parameters) in PUBLISHED.items()}


def test_attention_pooling_by_hand():
  """Two heads: the token of the mean looks at itself and at all positions, in float64."""
  pool, x = AttentionPool(features=3, num_heads=2), jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
  params = jax.tree.map(
    lambda leaf: np.random.default_rng(leaf.size).standard_normal(leaf.shape),
    pool.init(jax.random.key(1), x)["params"],
  )
  got = pool.apply({"params": jax.tree.map(jnp.float32, params)}, x)
  tokens = np.asarray(x, np.float64).reshape(2, 6, 4)
  tokens = np.concatenate([tokens.mean(1, keepdims=True), tokens], 1) + params["place"]
  q, k, v = np.split(tokens @ params["qkv"]["kernel"] + params["qkv"]["bias"], 3, axis=-1)
  heads = []
  for own in (slice(0, 2), slice(2, 4)):
    weights = np.exp(np.einsum("bd,bnd->bn", q[:, 0, own], k[:, :, own]) / np.sqrt(2))
    heads.append(np.einsum("bn,bnd->bd", weights / weights.sum(1, keepdims=True), v[:, :, own]))
  expected = np.concatenate(heads, 1) @ params["proj"]["kernel"] + params["proj"]["bias"]
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
