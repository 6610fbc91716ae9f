"""The U-Net of Ho et al. 2020 in float64 NumPy, written from the description of the authors' code, not from ours.

It shares the names of the parameters with `ddpm_jax.models` and nothing else: its own convolution, norm and attention.
"""

import numpy as np


def swish(x):
  return x / (1 + np.exp(-x))


def group_norm(x, p, groups):
  batch, height, width, channels = x.shape
  grouped = x.reshape(batch, height, width, groups, channels // groups)
  mean = grouped.mean((1, 2, 4), keepdims=True)
  variance = ((grouped - mean) ** 2).mean((1, 2, 4), keepdims=True)
  return ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * p["scale"] + p["bias"]


def conv(x, p, stride=1):
  """3x3, TensorFlow's SAME: one row on each side, or below and right only where the stride is 2."""
  batch, height, width, _ = x.shape
  around = (1, 1) if stride == 1 else (0, 1)
  padded = np.pad(x, ((0, 0), around, around, (0, 0)))
  out = np.zeros((batch, height // stride, width // stride, p["kernel"].shape[3]))
  for i in range(3):
    for j in range(3):
      rows = padded[:, i : i + height : stride, j : j + width : stride]
      out += rows[:, : height // stride, : width // stride] @ p["kernel"][i, j]
  return out + p["bias"]


def dense(x, p):
  return x @ p["kernel"] + p["bias"]


def res_block(x, temb, p, groups):
  h = conv(swish(group_norm(x, p["norm1"], groups)), p["conv1"])
  h = h + dense(swish(temb), p["temb_proj"])[:, None, None]
  h = conv(swish(group_norm(h, p["norm2"], groups)), p["conv2"])
  return (dense(x, p["shortcut"]) if "shortcut" in p else x) + h


def attention(x, p, groups):
  batch, height, width, channels = x.shape
  qkv = dense(group_norm(x, p["norm"], groups), p["qkv"]).reshape(batch, height * width, 3 * channels)
  q, k, v = np.split(qkv, 3, axis=-1)
  weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(channels))
  weights /= weights.sum(-1, keepdims=True)
  return x + dense((weights @ v).reshape(x.shape), p["proj"])


def unet(params, xt, t, *, channels, multipliers, num_res_blocks, attention_resolutions, groups):
  """xt [B, H, W, C], t [B] in 1..T -> [B, H, W, C]."""

  def block(h, name):
    h = res_block(h, temb, params[name], groups)
    return attention(h, params[f"{name}_attention"], groups) if h.shape[1] in attention_resolutions else h

  half = channels // 2
  angles = (t - 1)[:, None] * np.exp(-np.log(10000) / (half - 1) * np.arange(half))
  temb = np.concatenate([np.sin(angles), np.cos(angles)], 1)
  temb = dense(swish(dense(temb, params["temb_dense1"])), params["temb_dense2"])

  skips = [conv(xt, params["conv_in"])]
  for level in range(len(multipliers)):
    for i in range(num_res_blocks):
      skips.append(block(skips[-1], f"down{level}_block{i}"))
    if level < len(multipliers) - 1:
      skips.append(conv(skips[-1], params[f"down{level}_downsample"]["conv"], stride=2))
  h = res_block(skips[-1], temb, params["mid_block0"], groups)
  h = attention(h, params["mid_attention"], groups)
  h = res_block(h, temb, params["mid_block1"], groups)
  for level in reversed(range(len(multipliers))):
    for i in range(num_res_blocks + 1):
      h = block(np.concatenate([h, skips.pop()], -1), f"up{level}_block{i}")
    if level:
      h = conv(h.repeat(2, 1).repeat(2, 2), params[f"up{level}_upsample"]["conv"])
  return conv(swish(group_norm(h, params["norm_out"], groups)), params["conv_out"])
