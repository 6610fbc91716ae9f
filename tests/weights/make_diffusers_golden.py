"""Makes diffusers_golden.npz with diffusers: names, options, outputs and a DDIM trajectory of small networks.

  pip install -e '.[interop]'
  python -m tests.weights.make_diffusers_golden

The tests import only what needs neither PyTorch nor diffusers.
"""

from __future__ import annotations

import json
import pathlib
import zlib

import numpy as np

GOLDEN = pathlib.Path(__file__).with_name("diffusers_golden.npz")

# What a published config.json says of options that all of them share (google/ddpm-cifar10-32 and others).
PUBLISHED = {
  "act_fn": "silu",
  "attention_head_dim": None,
  "center_input_sample": False,
  "downsample_padding": 0,
  "flip_sin_to_cos": False,
  "freq_shift": 1,
  "mid_block_scale_factor": 1,
  "norm_eps": 1e-6,
  "time_embedding_type": "positional",
}


# What makes networks of OpenAI of it, by --block. The first are the defaults of diffusers.
LDM = {"downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5}
IDDPM = LDM | {"resnet_time_scale_shift": "scale_shift"}
ADM = IDDPM | {"downsample_type": "resnet", "upsample_type": "resnet"}


def options(size: int, image_channels: int, widths: list[int], attention: str, layers: int, groups: int) -> dict:
  """Keyword arguments of UNet2DModel; `attention` has a letter for each level, A where there is attention."""
  return PUBLISHED | {
    "sample_size": size,
    "in_channels": image_channels,
    "out_channels": image_channels,
    "block_out_channels": widths,
    "down_block_types": ["AttnDownBlock2D" if level == "A" else "DownBlock2D" for level in attention],
    "up_block_types": ["AttnUpBlock2D" if level == "A" else "UpBlock2D" for level in reversed(attention)],
    "layers_per_block": layers,
    "norm_num_groups": groups,
  }


def of_openai(block: dict, unet: dict, heads: int, classes: int | None = None) -> dict:
  """The network with those blocks, heads of so many channels, and labels."""
  unet = unet | block | {"attention_head_dim": heads, "num_class_embeds": classes}
  if block != LDM:
    unet["attn_norm_num_groups"] = unet["norm_num_groups"]
  if block == ADM:  # those of levels without attention; the smallest one keeps its resolution
    resnet = {"DownBlock2D": "ResnetDownsampleBlock2D", "UpBlock2D": "ResnetUpsampleBlock2D"}
    unet |= {name: [resnet.get(kind, kind) for kind in unet[name]] for name in ("down_block_types", "up_block_types")}
  return unet


NETWORKS = {
  "one_level": options(8, 1, [8], "-", 1, 2),
  "attention_at_two_levels": options(8, 3, [8, 16, 8], "-AA", 2, 4),
  "attention_at_full_resolution": options(4, 1, [6, 12], "A-", 1, 3),
  "ldm": of_openai(LDM, options(8, 3, [8, 16], "AA", 1, 4), heads=4),
  "iddpm": of_openai(IDDPM, options(8, 1, [8, 8], "-A", 1, 2), heads=4),
  "adm_with_classes": of_openai(ADM, options(8, 3, [8, 16, 8], "-A-", 1, 2), heads=4, classes=3),
}
SCHEDULER = {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.1, "variance_type": "fixed_small"}
TRAJECTORIES = ("one_level", "attention_at_two_levels", "attention_at_full_resolution")  # of DDIM, by these
STEPS = 10
BATCH = 2
TIMESTEPS = (0, 63)  # as diffusers counts them, from 0
LABELS = (2, 0)


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A float32 tensor as a function of its name, with which the activations neither grow nor vanish."""
  noise = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1.0, 1.0, shape)
  if len(shape) > 1:
    tensor = noise * np.sqrt(1.5 / np.prod(shape[1:]))
  elif name.endswith("weight"):
    tensor = 1.0 + 0.25 * noise
  else:
    tensor = 0.25 * noise
  return tensor.astype(np.float32)


def network_input(name: str, shape: tuple[int, int, int]) -> np.ndarray:
  """float32 [BATCH, H, W, C], normal, as a function of the name."""
  return np.random.default_rng(zlib.crc32(name.encode())).standard_normal((BATCH, *shape)).astype(np.float32)


def nchw(images: np.ndarray):
  """PyTorch's tensor of images [B, H, W, C]."""
  import torch

  return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def nhwc(images) -> np.ndarray:
  """Images [B, H, W, C] of PyTorch's tensor."""
  return images.numpy().transpose(0, 2, 3, 1)


def image_shape(unet: dict) -> tuple[int, int, int]:
  """H, W, C."""
  return unet["sample_size"], unet["sample_size"], unet["in_channels"]


def random_network(unet: dict):
  """UNet2DModel with the weights of `random_tensor`."""
  import torch
  from diffusers import UNet2DModel

  network = UNet2DModel(**unet).eval()
  network.load_state_dict(
    {name: torch.from_numpy(random_tensor(name, tuple(t.shape))) for name, t in network.state_dict().items()}
  )
  return network


def labels_of(unet) -> np.ndarray | None:
  """Those of a batch, int32 [BATCH], where the network with these options takes some."""
  return np.asarray(LABELS, np.int32) if unet.get("num_class_embeds") else None


def output_of(network, x: np.ndarray, timesteps) -> np.ndarray:
  """What it says of x [B, H, W, C] at the timesteps [B], or at one for all, and of `LABELS` if it takes some."""
  import torch

  labels = labels_of(network.config)
  labels = None if labels is None else torch.tensor(labels[: len(x)])
  with torch.no_grad():
    return nhwc(network(nchw(x), torch.tensor(timesteps), labels).sample)


def ddim_trajectory(network, start: np.ndarray, scheduler: dict, steps: int) -> np.ndarray:
  """Every state of deterministic DDIM from x_T on: [steps, B, H, W, C].

  Where the estimate of the image is clipped, the noise follows from it, as here; without
  `use_clipped_model_output` diffusers keeps the network's.
  """
  from diffusers import DDIMScheduler

  shared = {name: value for name, value in scheduler.items() if name != "variance_type"}
  ddim = DDIMScheduler(**shared, timestep_spacing="trailing", set_alpha_to_one=True)
  ddim.set_timesteps(steps)
  x, states = nchw(start), []
  for t in ddim.timesteps:
    x = ddim.step(nchw(output_of(network, nhwc(x), int(t))), t, x, use_clipped_model_output=True).prev_sample
    states.append(nhwc(x))
  return np.stack(states)


def main() -> None:
  from diffusers import DDPMScheduler

  golden = {"scheduler": np.asarray(DDPMScheduler(**SCHEDULER).to_json_string())}
  for name, unet in NETWORKS.items():
    network, shape = random_network(unet), image_shape(unet)
    state = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    golden[f"{name}/config"] = np.asarray(network.to_json_string())
    golden[f"{name}/shapes"] = np.asarray(json.dumps(state))
    golden[f"{name}/output"] = output_of(network, network_input(name, shape), TIMESTEPS)
    if name in TRAJECTORIES:
      golden[f"{name}/ddim"] = ddim_trajectory(network, network_input("start", shape), SCHEDULER, STEPS)[[4, -1]]
  np.savez_compressed(GOLDEN, **golden)
  for name, array in golden.items():
    print(name, array.shape, array.std() if array.dtype == np.float32 else array)
  print(GOLDEN.stat().st_size, "bytes")


if __name__ == "__main__":
  main()
