"""Makes autoencoders_golden.npz with diffusers: names, options, and outputs of small autoencoders.

  pip install -e '.[interop]'
  python -m tests.weights.make_autoencoders_golden

The tests import only what needs neither PyTorch nor diffusers.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np

from tests.weights.make_diffusers_golden import nchw, network_input, nhwc, random_tensor

GOLDEN = pathlib.Path(__file__).with_name("autoencoders_golden.npz")


def options(kind: str, size: int, image_channels: int, widths: list[int], attention: str, layers: int, **more) -> dict:
  """The class and its keyword arguments; `attention` has a letter for each level, A where there is attention."""
  return {
    "_class_name": kind,
    "sample_size": size,
    "in_channels": image_channels,
    "out_channels": image_channels,
    "block_out_channels": widths,
    "down_block_types": [f"{'Attn' if level == 'A' else ''}DownEncoderBlock2D" for level in attention],
    "up_block_types": [f"{'Attn' if level == 'A' else ''}UpDecoderBlock2D" for level in reversed(attention)],
    "layers_per_block": layers,
    "norm_num_groups": 2,
    "latent_channels": 3,
  } | more


KL, VQ = "AutoencoderKL", "VQModel"
AUTOENCODERS = {
  "kl": options(KL, 8, 3, [8, 16], "--", 2),
  "kl_with_attention": options(KL, 16, 1, [8, 16, 8], "-A-", 1, latent_channels=4, scaling_factor=0.5),
  "kl_without": options(
    KL, 8, 3, [8], "-", 1, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False
  ),
  "vq": options(VQ, 8, 3, [8, 16], "-A", 1, num_vq_embeddings=12, vq_embed_dim=3, scaling_factor=1.0),
  "vq_without_attention": options(VQ, 8, 3, [8, 8], "--", 1, mid_block_add_attention=False),
}


def image_shape(options: dict) -> tuple[int, int, int]:
  """H, W, C."""
  return options["sample_size"], options["sample_size"], options["in_channels"]


def random_autoencoder(options: dict):
  """The autoencoder of diffusers with the weights of `random_tensor`."""
  import diffusers
  import torch

  arguments = {name: value for name, value in options.items() if name != "_class_name"}
  network = getattr(diffusers, options["_class_name"])(**arguments).eval()
  network.load_state_dict(
    {name: torch.from_numpy(random_tensor(name, tuple(t.shape))) for name, t in network.state_dict().items()}
  )
  return network


def outputs_of(network, x: np.ndarray) -> dict[str, np.ndarray]:
  """What it makes of images [B, H, W, C]: 'moments', 'decoded' (of the mean), and of a codebook 'quantized', 'indices'.

  The log-variances are as the posterior has them, within its bounds.
  """
  import torch

  with torch.no_grad():
    encoded = network.encode(nchw(x))
    if type(network).__name__ == KL:
      posterior = encoded.latent_dist
      moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
      return {"moments": nhwc(moments), "decoded": nhwc(network.decode(posterior.mean).sample)}
    quantized, _, (_, _, indices) = network.quantize(encoded.latents)
    decoded = network.decode(encoded.latents).sample
    shape = (len(x), *quantized.shape[2:])
    return {
      "moments": nhwc(encoded.latents),
      "decoded": nhwc(decoded),
      "quantized": nhwc(quantized),
      "indices": indices.reshape(shape).numpy().astype(np.int32),
    }


def main() -> None:
  """Writes the file."""
  golden = {}
  for name, kwargs in AUTOENCODERS.items():
    network = random_autoencoder(kwargs)
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    config = {key: value for key, value in dict(network.config).items() if not key.startswith("_")}
    config = {"_class_name": kwargs["_class_name"], "_diffusers_version": "0.42.1"} | config
    golden |= {f"{name}/shapes": np.array(json.dumps(shapes)), f"{name}/config": np.array(json.dumps(config))}
    outputs = outputs_of(network, network_input(name, image_shape(kwargs)))
    golden |= {f"{name}/{key}": value for key, value in outputs.items()}
  np.savez_compressed(GOLDEN, **golden)


if __name__ == "__main__":
  main()
