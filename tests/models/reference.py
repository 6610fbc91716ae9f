"""The U-Nets of Ho et al. 2020 and of OpenAI, and the autoencoder of Rombach et al. 2022, in float64 NumPy.

They are written from the authors' code, not from ours. They share the names of the parameters with `ddpm_jax.models`
and nothing else: convolution, norm, attention are their own.
"""

import numpy as np


def swish(x):
  return x / (1 + np.exp(-x))


def group_norm(x, p, groups, epsilon=1e-6):
  batch, height, width, channels = x.shape
  grouped = x.reshape(batch, height, width, groups, channels // groups)
  mean = grouped.mean((1, 2, 4), keepdims=True)
  variance = ((grouped - mean) ** 2).mean((1, 2, 4), keepdims=True)
  return ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * p["scale"] + p["bias"]


def conv(x, p, stride=1, around=None):
  """3x3 with zeros before and after each row and column: TensorFlow's SAME unless they are given."""
  batch, height, width, _ = x.shape
  around = around or ((1, 1) if stride == 1 else (0, 1))
  padded = np.pad(x, ((0, 0), around, around, (0, 0)))
  out = np.zeros((batch, height // stride, width // stride, p["kernel"].shape[3]))
  for i in range(3):
    for j in range(3):
      rows = padded[:, i : i + height : stride, j : j + width : stride]
      out += rows[:, : height // stride, : width // stride] @ p["kernel"][i, j]
  return out + p["bias"]


def dense(x, p):
  return x @ p["kernel"] + p["bias"]


def repeat(x):
  return x.repeat(2, 1).repeat(2, 2)


def mean_of_four(x):
  return (x[:, ::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, ::2] + x[:, 1::2, 1::2]) / 4


def res_block(x, temb, p, groups):
  h = conv(swish(group_norm(x, p["norm1"], groups)), p["conv1"])
  h = h + dense(swish(temb), p["temb_proj"])[:, None, None]
  h = conv(swish(group_norm(h, p["norm2"], groups)), p["conv2"])
  return (dense(x, p["shortcut"]) if "shortcut" in p else x) + h


def openai_res_block(x, emb, p, groups, scale_shift, resample=lambda x: x):
  """`ResBlock` of guided_diffusion/unet.py: `in_layers`, `emb_layers`, `out_layers`, `skip_connection`."""
  h = conv(resample(swish(group_norm(x, p["norm1"], groups, 1e-5))), p["conv1"])
  out = dense(swish(emb), p["temb_proj"])[:, None, None]
  if scale_shift:
    scale, shift = out[..., : h.shape[-1]], out[..., h.shape[-1] :]
    h = group_norm(h, p["norm2"], groups, 1e-5) * (1 + scale) + shift
  else:
    h = group_norm(h + out, p["norm2"], groups, 1e-5)
  h = conv(swish(h), p["conv2"])
  x = resample(x)
  return (dense(x, p["shortcut"]) if "shortcut" in p else x) + h


def attention(x, p, groups, heads=1, epsilon=1e-6):
  batch, height, width, channels = x.shape
  qkv = dense(group_norm(x, p["norm"], groups, epsilon), p["qkv"]).reshape(batch, height * width, 3 * channels)
  size, out = channels // heads, []
  for head in range(heads):
    q, k, v = (qkv[..., part * channels + head * size :][..., :size] for part in range(3))
    weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(size))
    out.append(weights / weights.sum(-1, keepdims=True) @ v)
  return x + dense(np.concatenate(out, -1).reshape(x.shape), p["proj"])


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
      h = conv(repeat(h), params[f"up{level}_upsample"]["conv"])
  return conv(swish(group_norm(h, params["norm_out"], groups)), params["conv_out"])


def ldm_block(x, p, groups):
  """`ResnetBlock` of ldm/modules/diffusionmodules/model.py with temb_channels 0."""
  h = conv(swish(group_norm(x, p["norm1"], groups)), p["conv1"])
  h = conv(swish(group_norm(h, p["norm2"], groups)), p["conv2"])
  return (dense(x, p["shortcut"]) if "shortcut" in p else x) + h


def ldm_middle(h, p, groups):
  h = attention(ldm_block(h, p["mid_block0"], groups), p["mid_attention"], groups)
  return ldm_block(h, p["mid_block1"], groups)


def encoder(p, x, *, multipliers, num_res_blocks, attention_resolutions, groups):
  """`Encoder` there, and quant_conv: x [B, H, W, C] -> [B, h, w, features]."""
  h = conv(x, p["conv_in"])
  for level in range(len(multipliers)):
    for i in range(num_res_blocks):
      h = ldm_block(h, p[f"down{level}_block{i}"], groups)
      if h.shape[1] in attention_resolutions:
        h = attention(h, p[f"down{level}_block{i}_attention"], groups)
    if level < len(multipliers) - 1:
      h = conv(h, p[f"down{level}_downsample"]["conv"], stride=2)
  h = conv(swish(group_norm(ldm_middle(h, p, groups), p["norm_out"], groups)), p["conv_out"])
  return dense(h, p["quant_conv"])


def decoder(p, z, *, multipliers, num_res_blocks, attention_resolutions, groups):
  """post_quant_conv, and `Decoder` there: z [B, h, w, z] -> [B, H, W, C]."""
  h = ldm_middle(conv(dense(z, p["post_quant_conv"]), p["conv_in"]), p, groups)
  for level in reversed(range(len(multipliers))):
    for i in range(num_res_blocks + 1):
      h = ldm_block(h, p[f"up{level}_block{i}"], groups)
      if h.shape[1] in attention_resolutions:
        h = attention(h, p[f"up{level}_block{i}_attention"], groups)
    if level:
      h = conv(repeat(h), p[f"up{level}_upsample"]["conv"])
  return conv(swish(group_norm(h, p["norm_out"], groups)), p["conv_out"])


def openai_unet(
  params, xt, t, label, *, kind, channels, multipliers, num_res_blocks, attention_resolutions, heads, groups
):
  """xt [B, H, W, C], t [B] in 1..T, label [B] or None -> [B, H, W, C]; `heads` is a function of the channels."""
  scale_shift = kind in ("iddpm", "adm")

  def block(h, name, resample=lambda x: x):
    return openai_res_block(h, emb, params[name], groups, scale_shift, resample)

  def attend(h, name):
    return attention(h, params[name], groups, heads(h.shape[-1]), 1e-5)

  def layer(h, name):
    h = block(h, name)
    return attend(h, f"{name}_attention") if h.shape[1] in attention_resolutions else h

  half = channels // 2
  angles = (t - 1)[:, None] * np.exp(-np.log(10000) * np.arange(half) / half)
  emb = np.concatenate([np.cos(angles), np.sin(angles)], 1)
  emb = dense(swish(dense(emb, params["temb_dense1"])), params["temb_dense2"])
  if label is not None:
    emb = emb + params["label_embedding"]["embedding"][label]

  skips = [conv(xt, params["conv_in"])]
  for level in range(len(multipliers)):
    for i in range(num_res_blocks):
      skips.append(layer(skips[-1], f"down{level}_block{i}"))
    if level < len(multipliers) - 1:
      name = f"down{level}_downsample"
      if kind == "adm":
        skips.append(block(skips[-1], name, mean_of_four))
      else:
        skips.append(conv(skips[-1], params[name]["conv"], stride=2, around=(1, 1)))
  h = block(attend(block(skips[-1], "mid_block0"), "mid_attention"), "mid_block1")
  for level in reversed(range(len(multipliers))):
    for i in range(num_res_blocks + 1):
      h = layer(np.concatenate([h, skips.pop()], -1), f"up{level}_block{i}")
    if level:
      name = f"up{level}_upsample"
      h = block(h, name, repeat) if kind == "adm" else conv(repeat(h), params[name]["conv"])
  return conv(swish(group_norm(h, params["norm_out"], groups, 1e-5)), params["conv_out"])
